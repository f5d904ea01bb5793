"""What a run learns from and is tested on: which problems, which traces, and what is left out.

Bad records: with --on-error stop, the default, the first bad record, picture or trace is the error.
With skip each goes to RUN/skipped.jsonl with the reason, and the run does without. Of a test
problem that means another test: n is smaller, and the table says by how many and what the accuracy
would be were they wrong.

Rows: paligemma learns from traces that --keep lets through, a row each, and from --mix answer-only
rows for each of them.

Left out: how a text becomes ids (data.py), and who judged the traces (teacher.py).
"""

import sys
from pathlib import Path

import data
from support import files
from support.dataset import images as pictures
from support.dataset.traces import load_traces, overlap, training_notice
from support.distributed import rank
from support.evaluation import grading
from support.evaluation import models as loading

# ---- bad records ---------------------------------------------------------------------------------


def bad_records(config):
    """The list that a run's bad records go to with --on-error skip; None: the first is an error."""
    return [] if config.get("on_error") == "skip" else None


def load_splits(args):
    """{split: problems}, and with --on-error skip {split: [(id, reason)]} of its bad records (else
    None: the first is the error). All three must be there: none is cut off another. ValueError."""
    names, splits = ("train", "val", args.test_split), {}
    skipped = {name: bad_records(vars(args)) for name in names}
    try:
        for name in names:
            splits[name] = data.load(args.data, name, skipped[name])[: args.limit]
    except ValueError as error:
        raise ValueError(f"{error} A run needs problems of {', '.join(names)}.") from None
    if args.on_error == "stop":
        return splits, None
    for name in names:
        # Those with too many choices; no picture is opened yet.
        skipped[name] += pictures.unusable(splits[name], lambda path: None)
    return left_of(splits, skipped), skipped


def left_of(splits, skipped):
    """{split: problems} without those in {split: [(id, reason)]}."""
    lost = {name: {id for id, _ in bad} for name, bad in skipped.items()}
    return {name: [p for p in ps if p.id not in lost[name]] for name, ps in splits.items()}


def with_pictures(args, splits, skipped, model=None):
    """(features, splits): with --on-error skip without the problems whose picture cannot be used,
    which are added to `skipped`. Pictures that are in the feature cache are not decoded again.
    ValueError if a split has no problem left."""
    problems = [p for ps in splits.values() for p in ps]
    bad = None if skipped is None else []
    features = loading.image_features(args, problems, model, bad)
    if not bad:
        return features, splits
    reasons = dict(bad)
    for name, ps in splits.items():
        skipped[name] += [(p.id, reasons[p.id]) for p in ps if p.id in reasons]
        if ps and all(p.id in reasons for p in ps):
            raise ValueError(f"No problem of {name} is left, with --on-error skip: {bad[0][1]}")
    return features, left_of(splits, {name: skipped[name] for name in splits})


def told_skipped(args, skipped):
    """Write skipped.jsonl; {split: count} for the table. A record that cannot be read at all is of
    no known split: all three found it."""
    file = Path(args.out) / "skipped.jsonl"
    if not rank():
        file.unlink(missing_ok=True)
    if skipped is None:
        return None
    found = {}
    for name, bad in skipped.items():
        for entry in bad:
            found.setdefault(entry, []).append(name)
    rows = [(*entry, names[0] if len(names) == 1 else None) for entry, names in found.items()]
    counts = {name: sum(row[2] == name for row in rows) for name in skipped}
    if unknown := sum(row[2] is None for row in rows):
        counts["split unknown"] = unknown
    if rows and not rank():
        files.write_skipped(rows, file)
        told = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        print(f"  skipped: {told}; {file} says why", flush=True)
    return counts


# ---- paligemma: rows of traces -------------------------------------------------------------------


def training_rows(args, problems, skipped=None):
    """A `data.TrainRow` for each training row. ValueError if no trace is left. Bad traces as in
    `kept_traces`."""
    if notice := training_notice(args.data):
        print(notice, file=sys.stderr)
    by_id = {p.id: p for p in problems}
    traces = kept_traces(args, by_id, skipped)[: args.limit_traces]
    if not traces:
        raise ValueError("No trace is left to learn from: look at --traces, --keep and --data.")
    unique = list({trace["id"]: by_id[trace["id"]] for trace in traces}.values())
    answers = [data.TrainRow(p, "answer") for p in unique]
    if args.recipe == "answer":
        return answers
    count = round(args.mix * len(traces))  # of answer-only rows, spread evenly over the problems
    mixed = [answers[i * len(answers) // count] for i in range(count)] if count else []
    return [data.TrainRow(by_id[t["id"]], "reason", t) for t in traces] + mixed


def kept_traces(args, by_id, skipped=None):
    """The traces of --traces that --keep lets through; without a file, the data's own solutions.
    Bad ones go to skipped["traces"], if that is given."""
    if args.traces is None:
        told = [p for p in by_id.values() if p.solution]
        print(f"  no --traces: {len(told)} solutions of the data itself are the thoughts")
        verdict = {"correct": True, "consistent": True, "by": "data", "why": ""}
        return [
            {"id": p.id, "thought": p.solution, "answer": p.answer, "verdict": verdict}
            for p in told
        ]
    bad = None if skipped is None else skipped.setdefault("traces", [])
    traces = load_traces(demo_traces() if args.traces == "demo" else args.traces, bad)
    known = [t for t in traces if t["id"] in by_id]
    wanted = {"all": (), "correct": ("correct",), "consistent": ("correct", "consistent")}
    kept = [t for t in known if all(holds(t, by_id[t["id"]], key) for key in wanted[args.keep])]
    if args.keep == "consistent":  # teacher.py's word: too long, not distinct ...
        kept = [t for t in kept if t.get("kept", True)]
    print(
        f"  {len(kept)} of {len(traces)} traces kept ({args.keep}); "
        f"{len(traces) - len(known)} are of no training problem here"
    )
    return kept


def holds(trace, problem, key):
    """The judge's word; where there is none, whether the teacher's answer is the gold one. Some
    traces that were judged correct end in another: the thought then argues for that."""
    verdict = trace["verdict"][key]
    if verdict is None:
        said, _ = grading.commitment(problem, trace["answer"], prose=True)
        return grading.right(problem, said)
    return verdict


def demo_traces():
    from demo import scenes, teacher

    return teacher.traces(scenes.demo_folder())


def warn_of_overlap(train, test):
    """Say how many test pictures were trained on. Not refused: ScienceQA shares many by design."""
    shared = {pair[1] for pair in overlap(train, test)}
    if shared:
        some = ", ".join(sorted(shared)[:5])
        share = f"{len(shared)} of {len(test)}"
        print(f"{share} test problems show a picture that is trained on ({some}).")


# ---- the first one -------------------------------------------------------------------------------


def show_example(example, tokenizer, what):
    """The first example as the model gets it: text and ids, the supervised part marked."""
    print(f"  first {what} example, {example['id']}:")
    parts = {"source": example["input_ids"], "supervised": example["labels"]}
    if "token_type_ids" in example:  # one sequence: image tokens are many and all alike
        start = len(example["input_ids"]) - sum(example["token_type_ids"])
        parts = {"prefix": example["input_ids"][:start], "supervised": example["labels"][start:]}
    for part, ids in parts.items():
        ids = [i for i in ids if i >= 0]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        image = tokenizer.token_to_id("<image>")
        if (n := ids.count(image)) if image else 0:
            text, ids = text.replace("<image>", ""), [i for i in ids if i != image]
            text = f"<image> x {n} {text.strip()}"
        print(f"    {part:10} {text!r}\n    {'':10} {ids}")
