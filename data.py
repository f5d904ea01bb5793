r"""Problems, prompts and batches: from the files on disk to the tensors of a batch.

The prompt formats are Multimodal-CoT's, byte for byte (Zhang et al., arXiv 2302.00923,
github.com/amazon-science/mm-cot); the sequence is PaliGemma's (Beyer et al., arXiv 2407.07726).
The readers of files, images, features, tokenizers and traces are in support/dataset/.

Axes: B batch, T length, U target length; n images of a batch, each P positions of F features, for
PaliGemma I tokens of D, or S pixels down and across.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from support.dataset import sources
from support.dataset.choices import LETTERS, final_answer, lettered, movable, shuffled
from support.dataset.features import Features, stack_features
from support.dataset.images import LazyImages
from support.dataset.sources import INSTRUCT, SPLITS
from support.dataset.tokenizers import encode, plain_ids, special_ids
from support.files import cache_folder, field

OWN_CAPTIONS = ("scienceqa", "demo", "none")  # --captions that needs no other file
ImageSource = Features | LazyImages  # where an example's image comes from


@dataclass(frozen=True)
class Problem:
    """One question of any data set.

    answer  the gold text; of a multiple-choice question, one of `choices`.
    image   a path, or None. ScienceQA: image.png, else choice_0.png, as Multimodal-CoT has it.
    meta    answer_index (None without choices), split, caption ("" if none), has_image (the
            question's, not a choice's: it counts for the IMG score), and the record's other keys.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    hint: str
    image: str | None
    lecture: str
    solution: str
    meta: dict


def load(
    where: str | Path, split: str, skipped: list | None = None, captions: str | Path = "scienceqa"
) -> list[Problem]:
    """The problems of one split, in file order.

    where    a folder in the layout of ScienceQA, A-OKVQA or MathVista, a .jsonl file, "demo", or
             "scienceqa", "aokvqa" or "mathvista" (downloaded).
    skipped  a list: bad records are left out and added to it, as (id, reason). By default the first
             one is the error. (Images are not opened: `images.unusable` checks them.)
    captions "scienceqa": the data's own (captions.json, or the key "caption" of a record);
             "instruct": mm-cot's instruct_captions.json, next to it; or another file like these.
    FileNotFoundError or ValueError name the file and the problem.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    path = Path(where)
    advice = ""
    if where in ("scienceqa", "aokvqa", "mathvista"):
        path = cache_folder() / where
        advice = f": download it with `python data.py {where}`"
    elif where == "demo":
        from demo.scenes import demo_folder  # late: only the demo needs it

        path = demo_folder()
    read = sources.reader_of(path)
    if read is None:
        files = f"problems.json, {sources.AOKVQA.format('val')} or annot_testmini.json"
        known = f"a .jsonl file nor a folder with {files}"
        raise FileNotFoundError(f"{path} is neither {known}{advice}.")
    problems = [Problem(**fields) for fields in read(path, split, skipped)]
    if captions not in OWN_CAPTIONS:
        put_captions(problems, path / INSTRUCT if captions == "instruct" else Path(captions))
    if not problems:
        empty = (
            f'{path} has no problem of the split "{split}" (in a .jsonl file, "train" is default).'
        )
        raise ValueError(skipped[0][1] if skipped else empty)
    return problems


def has_answers(problems: Sequence[Problem]) -> bool:
    """False of a test split whose answers are not public: nothing can be scored or judged on it."""
    return any(problem.answer for problem in problems)


def put_captions(problems: list[Problem], file: Path) -> None:
    """Replace the captions of problems by those of a file; ValueError if it has none of them."""
    if not file.is_file():
        advice = "`python data.py scienceqa` fetches both of ScienceQA"
        raise FileNotFoundError(f"There are no captions {file}; {advice}.")
    captions = sources.read_captions(file)
    for problem in problems:
        problem.meta["caption"] = field(captions, problem.id, str, file, "")
    if any(p.image for p in problems) and not any(p.meta["caption"] for p in problems):
        raise ValueError(f"{file} has no caption of these problems, as of {problems[0].id}.")


# --- Prompts --------------------------------------------------------------------------------------
# A format is INPUT-OUTPUT: Question, Context (hint and caption), Multiple options, Generated
# rationale, Lecture, Explanation (the solution), Answer. "QCM-LE" gives
#
#     source  Question: Will these magnets attract or repel each other? Context: Two magnets are
#             shown. Options: (A) attract (B) repel Solution:
#     target  Solution: Poles push or pull. // Like poles repel. Two north poles meet..
#
# where // is a newline of the lecture; the doubled full stop is the original's.

NEWLINE = " // "
INPUTS = {
    "QM": "{question} {options}",
    "QC": "{question} {context}",
    "QCM": "{question} {context} {options}",
    "CQM": "{context} {question} {options}",
    "QCMG": "{question} {context} {options} {rationale}",
    "CQMG": "{context} {question} {options} {rationale}",
    "QCML": "{question} {context} {options} BECAUSE: {lecture}",
    "QCME": "{question} {context} {options} BECAUSE: {solution}",
    "QCMLE": "{question} {context} {options} BECAUSE: {lecture} {solution}",
    "QCLM": "{question} {context} BECAUSE: {lecture} {options}",
    "QCEM": "{question} {context} BECAUSE: {solution} {options}",
    "QCLEM": "{question} {context} BECAUSE: {lecture} {solution} {options}",
    "QCMA": "{question} {context} {options} Answer: {answer}",
    "QCA": "{question} {context} Answer: {answer} BECAUSE:",  # no space before the cue (sic)
}
OUTPUTS = {
    "A": "{answer}",
    "AL": "{answer} BECAUSE: {solution}",  # AL and AE are swapped in the original too
    "AE": "{answer} BECAUSE: {lecture}",
    "ALE": "{answer} BECAUSE: {lecture} {solution}",
    "AEL": "{answer} BECAUSE: {solution} {lecture}",
    "LA": "{lecture} {answer}",
    "EA": "{solution} {answer}",
    "LEA": "{lecture} {solution} {answer}",
    "ELA": "{solution} {lecture} {answer}",
    "LE": "Solution: {lecture} {solution}.",  # the extra full stop too
    "E": "Solution: {solution}",
}


def prompt(
    problem: Problem,
    fmt: str,
    generated: str | None = None,
    caption: bool = False,
    faithful: bool = False,
) -> tuple[str, str]:
    """(source, target): the two texts of a training pair, as mm-cot's utils_prompt.py has them.

    fmt        a key of INPUTS, a hyphen, a key of OUTPUTS: "QCM-LE", "QCMG-A".
    generated  the rationale for G, with its "Solution:"; None puts in the gold one.
    caption    whether the context includes the image's caption.
    faithful   The original turns a newline of lecture or solution into a backslash and an n, which
               T5 reads as <unk> and "n". By default it is " // ", one T5 piece that is nowhere in
               ScienceQA, so decoded text can be split at it: the only difference.

    A problem without choices has no options, and its answer reads "The answer is 12." ValueError
    for an unknown format or too many choices.
    """
    inputs, _, outputs = fmt.partition("-")
    if inputs not in INPUTS or outputs not in OUTPUTS:
        known = f"{' '.join(INPUTS)} - {' '.join(OUTPUTS)}"
        raise ValueError(f"There is no prompt format {fmt!r}; the parts are {known}.")
    letters = LETTERS[:5] if faithful else LETTERS
    options = lettered(problem, letters)
    lecture = one_line(problem.lecture, faithful)
    solution = one_line(problem.solution, faithful)
    index = problem.meta.get("answer_index")
    answer = problem.answer if index is None else f"({letters[index]})"
    context = f"{problem.hint} {problem.meta.get('caption', '')}" if caption else problem.hint
    parts = {
        "question": f"Question: {problem.question}",
        "context": f"Context: {context.strip() or 'N/A'}",
        "options": f"Options: {options}" if options else "",
        "rationale": f"Solution: {lecture} {solution}" if generated is None else generated,
        "lecture": lecture,
        "solution": solution,
        "answer": f"The answer is {answer}.",
    }
    cue = "Answer:" if outputs == "A" else "Solution:"
    source = INPUTS[inputs].format_map(parts) + (cue if inputs == "QCA" else f" {cue}")
    target = OUTPUTS[outputs].format_map(parts)
    if target.endswith("BECAUSE:"):  # where a solution ends so, the original deletes the word
        target = target.replace("BECAUSE:", "")
    return " ".join(source.split()), " ".join(target.replace("Answer:", "").split())


def one_line(text: str, faithful: bool) -> str:
    if faithful:
        return text.replace("\n", "\\n")
    return NEWLINE.join(line.strip() for line in text.split("\n") if line.strip())


# --- Tokens and batches ---------------------------------------------------------------------------


def examples(
    problems: Sequence[Problem],
    fmt: str,
    tokenizer: Tokenizer,
    features: ImageSource | None = None,
    generated: dict[str, str] | None = None,
    *,
    max_input: int,
    max_output: int,
    captions: bool = False,
    faithful: bool = False,
) -> list[dict]:
    """Dicts {"id", "input_ids", "labels", "image_features"?} of problems in one prompt format.

    features    `Features`, or None for a text-only run.
    generated   {id: rationale} that G stands for; None puts in the gold ones.
    max_input   the most tokens of a source, max_output of a target; more are cut (`encode`).
    captions, faithful  as in `prompt`; faithful also cuts as the original does.
    """
    pairs = []
    for problem in problems:
        rationale = None if generated is None else generated[problem.id]
        pairs.append(prompt(problem, fmt, rationale, captions, faithful))
    tail = 1 if faithful else 16
    sources = encode(tokenizer, [source for source, _ in pairs], max_input, tail)
    targets = encode(tokenizer, [target for _, target in pairs], max_output, tail)
    rows = []
    for problem, source, target in zip(problems, sources, targets, strict=True):
        rows.append({"id": problem.id, "input_ids": source, "labels": target})
        if features is not None:
            rows[-1]["image_features"] = features.stored(problem.id)  # (P, F), read in collate
    return rows


def padded(rows: Iterable[Sequence[int]], value: int = 0, side: str = "right") -> torch.Tensor:
    """Rows of unequal length as one tensor (B, T)."""
    tensors = [torch.as_tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def collate(examples: Sequence[dict], pad_id: int = 0) -> dict:
    """A batch of `examples`, padded on the right: as `pali_collate` has it, but labels (B, U), and
    with them decoder_input_ids (B, U): the labels one to the right after T5's start token, which is
    its pad. Either all rows have image_features (B, P, F) or none."""
    batch = pali_collate(examples, pad_id, side="right")
    if "labels" in batch:
        shifted = torch.nn.functional.pad(batch["labels"], (1, -1), value=pad_id)  # (B, U)
        batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, pad_id)
    return batch


def batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Row numbers, one list a batch, rows of like length together so that little is padding.

    With a generator: shuffled, sorted by length within every 50 batches, then the batches shuffled.
    Without: sorted by length, for decoding. Deterministic either way.
    """

    def grouped(rows: Sequence[int], size: int) -> list[Sequence[int]]:
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def by_length(rows: Iterable[int]) -> list[Sequence[int]]:
        return grouped(sorted(rows, key=lambda row: lengths[row]), batch_size)

    if generator is None:
        return by_length(range(len(lengths)))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    ordered = [batch for rows in grouped(order, 50 * batch_size) for batch in by_length(rows)]
    return [ordered[i] for i in torch.randperm(len(ordered), generator=generator).tolist()]


# --- PaliGemma ------------------------------------------------------------------------------------
# A row (Beyer et al., arXiv 2407.07726) is <image> x I, <bos>, prefix, newline, suffix, <eos>:
#
#     <image><image> ... <image><bos>reason en Will these magnets attract or repel each other?
#     Hint: Two magnets are shown.
#     Choices: (A) attract (B) repel
#     Two north poles face each other, and like poles repel.
#     Answer: B<eos>
#
# Image and prefix attend to each other, the suffix (the last two lines) is causal and in the loss.


def pali_prefix(problem: Problem, task: str) -> str:
    """PaliGemma's prompt next to the image; task: "answer" or "reason"."""
    return f"{task} en {question_lines(problem)}"


def question_lines(problem: Problem) -> str:
    """The question, then a line each of Hint, Unit (MathVista) and Choices, where it has them: the
    text that a student reads, and a teacher."""
    parts = {"Hint": problem.hint, "Unit": problem.meta.get("unit"), "Choices": lettered(problem)}
    lines = [f"{name}: {text}" for name, text in parts.items() if text]
    return "\n".join([problem.question, *lines])


def pali_suffix(problem: Problem, trace: dict | None = None) -> str:
    """PaliGemma's target: the letter, or the text of a problem without choices. With a trace its
    thought comes first, and the last line is "Answer: B": the gold answer if the trace was judged
    correct, else the teacher's own, if it has one."""
    index = problem.meta.get("answer_index")
    gold = problem.answer if index is None else LETTERS[index]
    if trace is None:
        return gold
    answer = gold if trace["verdict"]["correct"] else final_answer(problem, trace["answer"])
    thought = trace["thought"].strip()
    return f"{thought}\nAnswer: {answer}" if answer else thought


def sequence(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str | None = None,
    image_tokens: int = 0,
    layout: str = "paligemma",
    eos_in_loss: bool = True,
) -> dict[str, list[int]]:
    """One row: {"input_ids", "token_type_ids", "labels"}, lists of T; without suffix no labels.

    token_type_ids  0 through the newline (attends to all of itself), 1 for suffix and <eos>.
    labels          the ids of suffix and <eos>, -100 before them; not shifted.
    layout          "seed" puts <bos> after the prefix, as pali_reason did.
    eos_in_loss     False keeps <eos> in the row but out of the loss, so nothing teaches to stop.

    The newline is tokenised on its own: no neighbour changes its id. No text can hold an <eos>
    (`plain_ids`). ValueError for an unknown layout.
    """
    if layout not in ("paligemma", "seed"):
        raise ValueError(f"There is no layout {layout!r}; there are paligemma and seed.")
    ids = special_ids(tokenizer)
    text = plain_ids(tokenizer, prefix)
    text = [ids["bos"], *text] if layout == "paligemma" else [*text, ids["bos"]]
    visible = [ids["image"]] * image_tokens + text + plain_ids(tokenizer, "\n")
    if suffix is None:
        return {"input_ids": visible, "token_type_ids": [0] * len(visible)}
    target = plain_ids(tokenizer, suffix)
    return {
        "input_ids": [*visible, *target, ids["eos"]],
        "token_type_ids": [0] * len(visible) + [1] * (len(target) + 1),
        "labels": [-100] * len(visible) + target + [ids["eos"] if eos_in_loss else -100],
    }


class TrainRow(NamedTuple):
    """One sequence for PaliGemma."""

    problem: Problem
    task: str  # "answer" or "reason"
    trace: dict | None = None  # a teacher's
    has_suffix: bool = True  # to train on; else to decode from


def pali_examples(
    rows: Sequence[TrainRow],
    tokenizer: Tokenizer,
    features: ImageSource | None = None,
    *,
    max_suffix: int,
    layout: str = "paligemma",
    eos_in_loss: bool = True,
    shuffle_choices: bool = False,
    seed: int = 0,
) -> list[dict]:
    """Dicts {"id", "input_ids", "token_type_ids", "labels"?, "image_features"?} for `pali_collate`.

    features         `Features` of I positions, or `LazyImages`; None for a run without images. A
                     problem without an image has no image tokens.
    max_suffix       tokens, with <eos>. A longer row is left out and counted on stderr, never cut.
    shuffle_choices  `shuffled` by `seed`, where no text names a choice by its letter.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for problem, task, trace, has_suffix in rows:
        if has_suffix and shuffle_choices and movable(problem, trace):
            problem = shuffled(problem, generator)
        has_image = features is not None and problem.id in features
        image_tokens = features.shape[0] if has_image else 0
        prefix = pali_prefix(problem, task)
        suffix = pali_suffix(problem, trace) if has_suffix else None
        example = sequence(tokenizer, prefix, suffix, image_tokens, layout, eos_in_loss)
        if sum(example["token_type_ids"]) > max_suffix:
            continue
        if has_image:
            example["image_features"] = features.stored(problem.id)  # (I, D)
        examples.append({"id": problem.id} | example)
    if left_out := len(rows) - len(examples):
        text = f"{left_out} of {len(rows)} rows were left out: over max_suffix {max_suffix}."
        print(text, file=sys.stderr)
    return examples


def pali_collate(examples: Sequence[dict], pad_id: int = 0, side: str = "left") -> dict:
    """A batch of `pali_examples`, padded on the left or the right.

    Returns ids (list of str); input_ids, attention_mask (0 at pads) and, where the rows have them,
    token_type_ids and labels (-100 at pads, so that none is in the loss), (B, T); and of the n rows
    with an image, if any, image_features (n, I, D), float32, or (`LazyImages`) pixel_values
    (n, 3, S, S).
    """
    batch = {"ids": [example["id"] for example in examples]}
    batch["attention_mask"] = padded([[1] * len(e["input_ids"]) for e in examples], side=side)
    for key, pad in (("input_ids", pad_id), ("token_type_ids", 0), ("labels", -100)):
        if key in examples[0]:
            batch[key] = padded([example[key] for example in examples], pad, side)
    with_image = [example for example in examples if "image_features" in example]
    if with_image:
        stacked = stack_features(with_image)  # n x I x D, or n x 3 x S x S
        batch["image_features" if stacked.ndim == 3 else "pixel_values"] = stacked
    return batch


def main(argv: list[str] | None = None) -> None:
    """Download a data set (see `sources.download_command`), then count its problems."""
    try:
        folder = sources.download_command(argv)
        for split in SPLITS[:3]:
            print(f"{split}: {len(load(folder, split))} problems")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
