"""What a run learns from and is tested on: which problems, which traces, and what is left out.

Bad records: with --on-error stop, the default, the first bad record, image or trace is the error.
With skip each goes to RUN/skipped.jsonl with the reason, and the run does without. Skipping test
problems changes the test set: the table gives the number skipped and the accuracy if all of those
were wrong.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
from data import Problem, TrainRow
from model import PaliGemma
from support import files
from support.checkpoints.hub import resolve
from support.checkpoints.weights import headers
from support.dataset import images
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import load_traces, overlap, training_notice
from support.distributed import in_turn, rank
from support.evaluation import grading, models
from support.training import runs
from support.training.optim import Rows
from support.training.settings import MultimodalSettings, PaliGemmaSettings, Settings

Splits = dict[str, list[Problem]]
Skipped = dict[str, list[tuple[str, str]]]  # {split: [(id, reason)]} of bad records


@dataclass(frozen=True)
class Inputs:
    """What the trainings and the decoding of a run read."""

    splits: Splits
    tokenizer: Tokenizer
    features: data.ImageSource | None  # None: no images
    skipped: dict[str, int] | None = None  # bad records by split, for the table


# ---- problems, and bad records -------------------------------------------------------------------


def begin(
    settings: Settings, splits: Splits, skipped: Skipped | None, model: PaliGemma | None = None
) -> Inputs:
    """The inputs of a run, whose folder is made when all of them are there: a run that cannot start
    leaves nothing."""
    tokenizer = load_tokenizer(resolve(settings.weights[0]))
    if settings.model == "mmcot":
        check_widths(settings)
    with in_turn():  # the first process fills the cache of features for all
        features, splits = with_features(settings, splits, skipped, model)
    runs.begin(settings)
    counts = write_skipped_report(Path(settings.out), skipped)
    return Inputs(splits, tokenizer, features, counts)


def bad_records(on_error: str) -> list[tuple[str, str]] | None:
    """The list that a run's bad records go to with --on-error skip; None: the first is an error."""
    return [] if on_error == "skip" else None


def load_splits(settings: Settings) -> tuple[Splits, Skipped | None]:
    """The problems of all three splits, and with --on-error skip the bad records (else None: the
    first is the error). No split is cut off another: ValueError if one is missing."""
    names = ("train", "val", settings.test_split)
    splits = {}
    skipped = {name: bad_records(settings.on_error) for name in names}
    try:
        for name in names:
            problems = models.load_problems(settings, name, skipped[name])
            splits[name] = problems[: settings.limit]
    except ValueError as error:
        raise ValueError(f"{error} A run needs problems of {', '.join(names)}.") from None
    if not data.has_answers(splits[settings.test_split]):
        raise ValueError(
            f"The answers of {settings.data}'s {settings.test_split} are not public: score another "
            f"with --test-split val, then decode it with `eval.py {settings.out} --split test`."
        )
    if settings.on_error == "stop":
        return splits, None
    for name in names:
        # Those with too many choices; no image is opened yet.
        skipped[name] += images.unusable(splits[name], lambda path: None)
        bad = {id for id, _ in skipped[name]}
        splits[name] = [p for p in splits[name] if p.id not in bad]
    return splits, skipped


def check_widths(settings: MultimodalSettings) -> None:
    """ValueError if a checkpoint of --weights has a fusion for features of another width."""
    for weights in settings.weights if settings.vision != "none" else ():
        for name, header in headers(resolve(weights)).items():
            if name.endswith("image_dense.weight"):
                *_, width = models.feature_shape(settings)
                if header.shape[1] != width:
                    source = settings.features or settings.vision_weights
                    raise ValueError(
                        f"{weights} was trained with image features of width {header.shape[1]}, "
                        f"but those of {source} have {width}."
                    )


def with_features(
    settings: Settings, splits: Splits, skipped: Skipped | None, model: PaliGemma | None = None
) -> tuple[data.ImageSource | None, Splits]:
    """Image features and, with --on-error skip, the splits without the problems whose image cannot
    be used, which are added to `skipped`. ValueError if a split has no problem left."""
    problems = [p for ps in splits.values() for p in ps]
    bad = bad_records(settings.on_error)
    features = models.image_features(settings, problems, model, bad)
    reasons = dict(bad or [])
    for name, ps in splits.items() if bad else ():
        skipped[name] += [(p.id, reasons[p.id]) for p in ps if p.id in reasons]
        if ps and all(p.id in reasons for p in ps):
            raise ValueError(f"No problem of {name} is left, with --on-error skip: {bad[0][1]}")
        splits = splits | {name: [p for p in ps if p.id not in reasons]}
    return features, splits


def halves(problems: list[Problem], seed: int) -> list[tuple[list[Problem], list[Problem]]]:
    """Two pairs (learned, unseen): each half of the problems is unseen in one of them. The halves
    are random, as every second problem of a file may be of the same kind (in the demo it is)."""
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = []
    for half in (0, 1):
        unseen = set(order[half::2])
        learned = [p for i, p in enumerate(problems) if i not in unseen]
        pairs.append((learned, [problems[i] for i in sorted(unseen)]))
    return pairs


def write_skipped_report(folder: Path, skipped: Skipped | None) -> dict[str, int] | None:
    """Write skipped.jsonl; {split: count} for the table. A record that cannot be read at all is of
    no known split: all three have it."""
    file = folder / "skipped.jsonl"
    if not rank():
        file.unlink(missing_ok=True)
    if skipped is None:
        return None
    splits_of = {}  # {(id, reason): names of the splits that have it}
    for name, entries in skipped.items():
        for entry in entries:
            splits_of.setdefault(entry, []).append(name)
    rows = [(*entry, names[0] if len(names) == 1 else None) for entry, names in splits_of.items()]
    found = Counter(split or "split unknown" for *_, split in rows)
    counts = dict.fromkeys(skipped, 0) | found
    if rows and not rank():
        files.write_skipped(rows, file)
        text = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        print(f"  skipped: {text}; the reasons are in {file}", flush=True)
    return counts


# ---- paligemma: rows of traces -------------------------------------------------------------------


def training_rows(
    settings: PaliGemmaSettings, problems: list[Problem], skipped: Skipped | None = None
) -> list[TrainRow]:
    """The rows that a run learns. ValueError if no trace is left. Bad traces go to
    skipped["traces"], if that is given."""
    if notice := training_notice(settings.data):
        print(notice, file=sys.stderr)
    by_id = {p.id: p for p in problems}
    if settings.traces is None:
        traces = own_solutions(problems)
    else:
        bad = None if skipped is None else skipped.setdefault("traces", [])
        traces = kept_traces(settings.traces, settings.keep, by_id, bad)
    traces = traces[: settings.limit_traces]
    if not traces:
        raise ValueError("No trace is left to learn from: look at --traces, --keep and --data.")
    unique = list({trace["id"]: by_id[trace["id"]] for trace in traces}.values())
    answers = [TrainRow(p, "answer") for p in unique]
    if settings.recipe == "answer":
        return answers
    count = round(settings.mix * len(traces))
    # Spread evenly over the problems; more answers than problems repeat them.
    mixed = [answers[i * len(answers) // count] for i in range(count)]
    return [TrainRow(by_id[trace["id"]], "reason", trace) for trace in traces] + mixed


def own_solutions(problems: list[Problem]) -> list[dict]:
    """Traces made of the data's own solutions."""
    solved = [p for p in problems if p.solution]
    print(f"  no --traces: {len(solved)} solutions from the data serve as thoughts")
    common = {"verdict": {"correct": True, "consistent": True, "by": "data", "why": ""}}
    return [{"id": p.id, "thought": p.solution, "answer": p.answer} | common for p in solved]


def kept_traces(
    file: str, keep: str, by_id: dict[str, Problem], skipped: list | None = None
) -> list[dict]:
    """The traces of a file that --keep lets through; "demo": of the built-in demo."""
    traces = load_traces(demo_traces() if file == "demo" else file, skipped)
    known = [t for t in traces if t["id"] in by_id]
    wanted = {"all": (), "correct": ("correct",), "consistent": ("correct", "consistent")}[keep]
    kept = [t for t in known if all(holds(t, by_id[t["id"]], key) for key in wanted)]
    if keep == "consistent":  # teacher.py marks what is too long, not distinct ...
        kept = [t for t in kept if t.get("kept", True)]
    print(
        f"  {len(kept)} of {len(traces)} traces kept ({keep}); "
        f"{len(traces) - len(known)} are of no training problem here"
    )
    return kept


def holds(trace: dict, problem: Problem, key: str) -> bool:
    """The judge's verdict; where there is none, whether the teacher's answer is the gold one. Some
    traces that were judged correct end in another: the thought then argues for that."""
    verdict = trace["verdict"][key]
    if verdict is None:
        answer, _ = grading.commitment(problem, trace["answer"], prose=True)
        return grading.right(problem, answer)
    return verdict


def demo_traces() -> str:
    from demo import scenes, teacher

    return teacher.traces(scenes.demo_folder())


def warn_of_overlap(train: list[Problem], test: list[Problem]) -> None:
    """Print how many test images were trained on. Not refused: ScienceQA shares many by design."""
    shared = {test_id for _, test_id in overlap(train, test)}
    if shared:
        some = ", ".join(sorted(shared)[:5])
        share = f"{len(shared)} of {len(test)}"
        print(f"{share} test problems show an image that is trained on ({some}).")


def tuning_rows(
    settings: PaliGemmaSettings, rows: list[TrainRow], inputs: Inputs
) -> tuple[Rows, Rows]:
    """paligemma: (rows to train on, rows held out for the validation loss); the first is printed.
    ValueError if --max-suffix leaves none to train on."""
    encoded = data.pali_examples(
        rows,
        inputs.tokenizer,
        inputs.features,
        max_suffix=settings.max_suffix,
        layout=settings.layout,
        eos_in_loss=settings.eos_in_loss,
        shuffle_choices=settings.shuffle_choices,
        seed=settings.seed,
    )
    ids = list(dict.fromkeys(row["id"] for row in encoded))
    held_ids = set(ids[:: max(20, len(ids) // 100)])  # 5 % of the problems, or 100 of them
    held_out = [row for row in encoded if row["id"] in held_ids]
    train = [row for row in encoded if row["id"] not in held_ids]
    if not train:
        raise ValueError(
            f"{len(encoded)} rows are left, {len(held_out)} of them held back for validation: "
            "none to train on. Look at --max-suffix, --limit-traces and --on-error."
        )
    show_example(encoded[0], inputs.tokenizer, settings.recipe)
    return train, held_out


def show_example(example: dict, tokenizer: Tokenizer, name: str) -> None:
    """The first example as the model gets it: text and ids, the supervised part marked."""
    print(f"  first {name} example, {example['id']}:")
    parts = {"source": example["input_ids"], "supervised": example["labels"]}
    if "token_type_ids" in example:
        start = example["token_type_ids"].count(0)
        parts = {"prefix": example["input_ids"][:start], "supervised": example["labels"][start:]}
    image = tokenizer.token_to_id("<image>")
    for part, ids in parts.items():
        ids = [i for i in ids if i >= 0]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if image is not None and image in ids:  # image tokens are many and all alike
            count = ids.count(image)
            text = f"<image> x {count} {text.replace('<image>', '').strip()}"
            ids = [i for i in ids if i != image]
        print(f"    {part:10} {text!r}\n    {'':10} {ids}")
