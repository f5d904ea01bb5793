r"""Problems, prompts and batches: from the files on disk to the tensors of a batch.

Here: one `Problem` record for ScienceQA in its original layout (Lu et al., arXiv 2209.09513),
MathVista's testmini (Lu et al., arXiv 2310.02255), your own JSONL and the built-in demo; the prompt
formats of Multimodal-CoT (Zhang et al., arXiv 2302.00923, github.com/amazon-science/mm-cot), byte
for byte; PaliGemma's sequence (Beyer et al., arXiv 2407.07726); padding and bucketing.

In support/: the layouts of the files and what is checked in them (layouts.py), tokenizers, the
letters of choices, pictures, their features, a teacher's traces, the downloads. Left out on
purpose: models, scoring (eval.py), few-shot prompts.

A problem as problems.json has it, and what `prompt(problem, "QCM-LE")` makes of it:

    "7": {"question": "Will these magnets attract or repel each other?",
          "choices": ["attract", "repel"], "answer": 1, "hint": "Two magnets are shown.",
          "image": "image.png", "lecture": "Poles push or pull.\nLike poles repel.",
          "solution": "Two north poles meet.", "split": "train", "subject": "natural science", ...}

    source  Question: Will these magnets attract or repel each other? Context: Two magnets are
            shown. Options: (A) attract (B) repel Solution:
    target  Solution: Poles push or pull. // Like poles repel. Two north poles meet..

The doubled full stop is the original's. " // " stands for the newline (see `prompt`).

The same problem as a row for PaliGemma (`sequence`) with a trace of a teacher, at 256 image tokens:

    <image><image> ... <image><bos>reason en Will these magnets attract or repel each other?
    Hint: Two magnets are shown.
    Choices: (A) attract (B) repel
    Two north poles face each other, and like poles repel.
    Answer: B<eos>

In the loss are the last two lines, from "Two north" to <eos>.

Axes: B batch, T length, U target length; n pictures of a batch, each P positions of F features, for
PaliGemma I tokens of D, or S pixels down and across.
"""

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from support.dataset.choices import LETTERS, final_answer, lettered, movable, shuffled
from support.dataset.features import Features
from support.dataset.images import Pictures
from support.dataset.layouts import SPLITS, mathvista, own_jsonl, scienceqa
from support.dataset.tokenizers import encode, plain_ids, special_ids
from support.files import cache_folder

NEWLINE = " // "
ImageSource = Features | Pictures  # what gives an example its image


# --- Problems -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One question of any data set.

    answer  the gold text; of a multiple-choice question, one of `choices`.
    image   a path, or None. ScienceQA: image.png, else choice_0.png, as Multimodal-CoT has it.
    meta    answer_index (None without choices), split, caption ("" if none), has_image, and what
            else the record says (subject, grade, topic, category, skill, task). has_image is what
            the IMG score counts: a picture of the question, not one of the choices.
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


def load(where, split, skipped=None):
    """The problems of one split, in file order.

    where    a folder in ScienceQA's or MathVista's layout, a .jsonl file, "demo", or "scienceqa" or
             "mathvista" (downloaded).
    skipped  a list: bad records are left out and added to it, as (id, reason). By default the first
             one is the error. (`pictures.unusable` has the pictures.)
    Raises FileNotFoundError or ValueError with a sentence that names the file and the problem.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    downloaded = where in ("scienceqa", "mathvista")
    path = cache_folder() / where if downloaded else Path(where)
    if where == "demo":
        path = demo_folder()
    if path.suffix == ".jsonl":
        read = own_jsonl
    elif os.path.isfile(path / "problems.json"):
        read = scienceqa
    elif os.path.isfile(path / "annot_testmini.json"):
        read = mathvista
    elif downloaded:
        raise FileNotFoundError(f"{path} is empty: run `python data.py {where}` to fill it.")
    else:
        known = "a folder with problems.json or annot_testmini.json nor a .jsonl file"
        raise FileNotFoundError(f"{path} is neither {known}.")
    return [Problem(**fields) for fields in read(path, split, skipped)]


def demo_folder():
    """The demo, drawn at first use. The folder's name has a hash of the scripts that draw it."""
    from demo import scenes

    scripts = b"".join(script.read_bytes() for script in scenes.SCRIPTS)
    folder = cache_folder() / f"demo-{hashlib.sha256(scripts).hexdigest()[:10]}"
    if not folder.is_dir():
        try:
            scenes.write(folder)  # appears whole or not at all
        except OSError:
            if not folder.is_dir():  # else another run drew it meanwhile: it is the same
                raise
    return folder


# --- Prompts --------------------------------------------------------------------------------------
# A format is INPUT-OUTPUT. Question, Context (hint and caption), Multiple options, Generated
# rationale, Lecture, Explanation (the solution), Answer.


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


def prompt(problem, fmt, generated=None, caption=False, faithful=False):
    """(source, target): the two texts of a training pair, as mm-cot's utils_prompt.py has them.

    fmt        a key of INPUTS, a hyphen, a key of OUTPUTS: "QCM-LE", "QCMG-A".
    generated  the rationale for G, with its "Solution:"; None puts in the gold one.
    caption    whether the context includes the picture's caption.
    faithful   The original turns a newline of lecture or solution into a backslash and an n, of
               which T5 sees <unk> and "n" ("...light.nThe..."). By default it is " // " here, one
               T5 piece that is nowhere in ScienceQA, so decoded text can be split at it. That is
               the only difference; all other white space becomes single spaces either way.

    A problem without choices has no options, and its answer reads "The answer is 12."
    """
    inputs, _, outputs = fmt.partition("-")
    if inputs not in INPUTS or outputs not in OUTPUTS:
        known = f"{' '.join(INPUTS)} - {' '.join(OUTPUTS)}"
        raise ValueError(f"There is no prompt format {fmt!r}; the parts are {known}.")
    letters = LETTERS[:5] if faithful else LETTERS
    options = lettered(problem, letters)
    lecture, solution = _one_line(problem.lecture, faithful), _one_line(problem.solution, faithful)
    index = problem.meta.get("answer_index")
    answer = problem.answer if index is None else f"({letters[index]})"
    context = f"{problem.hint} {problem.meta.get('caption', '') if caption else ''}".strip()
    parts = {
        "question": f"Question: {problem.question}",
        "context": f"Context: {context or 'N/A'}",
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


def _one_line(text, faithful):
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
    captions    puts captions into the context.
    faithful    as in `prompt`, and truncation as the original has it.
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
        row = {"id": problem.id, "input_ids": source, "labels": target}
        if features is not None:
            row["image_features"] = features.stored(problem.id)  # (P, F), read in collate
        rows.append(row)
    return rows


def collate(examples, pad_id=0):
    """A batch of {"id", "input_ids", "labels"?, "image_features"?} dicts, padded on the right.

    Returns ids (list of str), input_ids and attention_mask (B, T); with labels also labels (B, U),
    -100 at pads so that none is in the loss, and decoder_input_ids (B, U), the labels one to the
    right behind T5's start token, which is its pad; with features also image_features (B, P, F),
    float32.
    """

    def column(key):
        return [torch.as_tensor(example[key]) for example in examples]

    rows = column("input_ids")
    batch = {
        "ids": [example["id"] for example in examples],
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),  # (B, T)
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if "labels" in examples[0]:
        labels = pad_sequence(column("labels"), batch_first=True, padding_value=-100)  # (B, U)
        shifted = torch.nn.functional.pad(labels, (1, -1), value=pad_id)
        batch["labels"] = labels
        batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, pad_id)
    if "image_features" in examples[0]:
        batch["image_features"] = _stacked(examples)  # (B, P, F)
    return batch


def _stacked(examples):
    """The rows' features or pixels as one float32 tensor; NaN would silently become everything."""
    stacked = np.stack([example["image_features"] for example in examples])
    stacked = torch.from_numpy(stacked).float()
    if math.isfinite(stacked.sum()):  # far less work than isfinite of each number
        return stacked
    finite = stacked.flatten(1).isfinite().all(dim=1).tolist()
    if not all(finite):
        bad = ", ".join(e["id"] for e, fine in zip(examples, finite, strict=True) if not fine)
        raise ValueError(f"The picture features of these problems are not finite: {bad}.")
    return stacked


def batches(lengths, batch_size, generator=None, chunk=50):
    """Row numbers, one list a batch, rows of like length together so that little is padding.

    With a torch.Generator: shuffled, sorted by length within every `chunk` batches, then the
    batches shuffled. Without: sorted by length, for decoding. Deterministic either way.
    """

    def split(rows, size):
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    if generator is None:
        return split(sorted(range(len(lengths)), key=lambda row: lengths[row]), batch_size)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    made = []
    for rows in split(order, chunk * batch_size):
        made += split(sorted(rows, key=lambda row: lengths[row]), batch_size)
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


# --- PaliGemma ------------------------------------------------------------------------------------
# A row (Beyer et al., arXiv 2407.07726). Image and prefix see each other, the suffix is causal, the
# loss is on suffix and <eos>:
#
#     <image> x I   <bos>   prefix   "\n"   suffix   <eos>


def pali_prefix(problem, task):
    """What PaliGemma reads beside the picture; task: "answer" or "reason"."""
    return f"{task} en {question_lines(problem)}"


def question_lines(problem):
    """The question, then a line each for what the problem has of Hint, Unit (MathVista) and
    Choices: what a student reads, and a teacher."""
    parts = {
        "Hint": problem.hint,
        "Unit": problem.meta.get("unit"),
        "Choices": lettered(problem),
    }
    told = [f"{name}: {text}" for name, text in parts.items() if text]
    return "\n".join([problem.question, *told])


def pali_suffix(problem, trace=None):
    """What PaliGemma is to write: the letter, or the text of a problem without choices.

    With a trace (dataset/traces.py) its thought comes first, and the last line is "Answer: B".
    The gold answer stands there if the trace was judged correct, else what the teacher itself said;
    if it said nothing there is no such line.
    """
    index = problem.meta.get("answer_index")
    gold = problem.answer if index is None else LETTERS[index]
    if trace is None:
        return gold
    answer = gold if trace["verdict"]["correct"] else final_answer(problem, trace["answer"])
    return f"{trace['thought'].strip()}\nAnswer: {answer}" if answer else trace["thought"].strip()


def sequence(tokenizer, prefix, suffix=None, image_tokens=0, layout="paligemma", eos_in_loss=True):
    """One row: {"input_ids", "token_type_ids", "labels"}, lists of T; without suffix no labels.

    token_type_ids  0 through the newline (all of it sees itself), 1 for suffix and <eos> (causal).
    labels          the ids of suffix and <eos>, -100 before them; not shifted.
    layout          "seed" puts <bos> behind the prefix, as pali_reason did.
    eos_in_loss     False keeps <eos> in the row but out of the loss, so nothing teaches to stop.

    The newline is tokenised on its own: no neighbour changes its id. A training row ends in its
    only <eos>, since no text can hold one (`plain_ids`).
    """
    if layout not in ("paligemma", "seed"):
        raise ValueError(f"There is no layout {layout!r}; there are paligemma and seed.")
    ids = special_ids(tokenizer)
    text = plain_ids(tokenizer, prefix)
    text = [ids["bos"], *text] if layout == "paligemma" else [*text, ids["bos"]]
    seen = [ids["image"]] * image_tokens + text + plain_ids(tokenizer, "\n")
    if suffix is None:
        return {"input_ids": seen, "token_type_ids": [0] * len(seen)}
    told = plain_ids(tokenizer, suffix)
    return {
        "input_ids": [*seen, *told, ids["eos"]],
        "token_type_ids": [0] * len(seen) + [1] * (len(told) + 1),
        "labels": [-100] * len(seen) + told + [ids["eos"] if eos_in_loss else -100],
    }


class TrainRow(NamedTuple):
    """One sequence for PaliGemma: a problem, a task ("answer" or "reason"), a teacher's trace or
    None, and whether the row has a suffix (to train on) or not (to decode from)."""

    problem: Problem
    task: str
    trace: dict | None = None
    has_suffix: bool = True


def pali_examples(
    rows: Sequence[TrainRow],
    tokenizer: Tokenizer,
    features: ImageSource | None = None,
    *,
    max_suffix: int,
    max_prefix: int | None = None,
    layout: str = "paligemma",
    eos_in_loss: bool = True,
    shuffle_choices: bool = False,
    seed: int = 0,
) -> list[dict]:
    """Dicts {"id", "input_ids", "token_type_ids", "labels"?, "image_features"?} for `pali_collate`.

    features         `Features` of I positions, or `Pictures`; None for a run without images. A
                     problem without an image has no image tokens.
    max_suffix       tokens, with <eos>; max_prefix, without <bos> and newline (None: any number).
    layout           see `sequence`; eos_in_loss too.
    shuffle_choices  `shuffled` by `seed`, where no text names a choice by its letter.

    A training row that is too long is left out and counted on stderr, never cut. Rows without a
    suffix have no limit: leaving out long questions would change the test set.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = {"max_prefix": max_prefix, "max_suffix": max_suffix}
    left_out = dict.fromkeys(limits, 0)
    examples = []
    for problem, task, trace, has_suffix in rows:
        if has_suffix and shuffle_choices and movable(problem, trace):
            problem = shuffled(problem, generator)
        has_image = features is not None and problem.id in features
        image_tokens = features.shape[0] if has_image else 0
        prefix = pali_prefix(problem, task)
        suffix = pali_suffix(problem, trace) if has_suffix else None
        example = sequence(tokenizer, prefix, suffix, image_tokens, layout, eos_in_loss)
        suffix_length = sum(example["token_type_ids"])
        prefix_length = len(example["input_ids"]) - suffix_length - image_tokens - 2
        lengths = {"max_prefix": prefix_length, "max_suffix": suffix_length}
        over = [key for key, most in limits.items() if most is not None and lengths[key] > most]
        if over and has_suffix:
            left_out[over[0]] += 1
            continue
        if has_image:
            example["image_features"] = features.stored(problem.id)  # (I, D)
        examples.append({"id": problem.id} | example)
    for key, count in left_out.items():
        if count:
            text = f"{count} of {len(rows)} rows were left out: over {key} {limits[key]}."
            print(text, file=sys.stderr)
    return examples


def pali_collate(examples, pad_id=0, side="left"):
    """A batch of `pali_examples`, padded on the left or the right.

    Returns ids (list of str); input_ids, attention_mask (0 at pads), token_type_ids and, where the
    rows have suffixes, labels (-100 at pads), (B, T); image_features (n, I, D), float32, of the n
    rows with a picture, in their order, or (`Pictures`) pixel_values (n, 3, S, S); no such key if n
    is 0.
    """

    def padded(rows, value=0):
        rows = [torch.as_tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    rows = [example["input_ids"] for example in examples]
    batch = {
        "ids": [example["id"] for example in examples],
        "input_ids": padded(rows, pad_id),  # (B, T)
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "token_type_ids": padded([example["token_type_ids"] for example in examples]),
    }
    if "labels" in examples[0]:
        batch["labels"] = padded([example["labels"] for example in examples], -100)
    if pictured := [example for example in examples if "image_features" in example]:
        seen = _stacked(pictured)  # n x I x D, or n x 3 x S x S
        batch["image_features" if seen.ndim == 3 else "pixel_values"] = seen
    return batch


def main(argv=None):
    """Download a data set (downloads.py says how), then count what is there."""
    from support.dataset import downloads  # a network's modules, which nothing else here needs

    try:
        folder = downloads.command(argv)
        for split in SPLITS[:3]:
            print(f"{split}: {len(load(folder, split))} problems")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
