"""What a trace file holds, in words: the closing table of teacher.py.

Counts by kind of question, why replies ended and why traces were not kept, how long the thoughts
are, and where the rule and the judge, or old and new verdicts, differ. Left out: what a run scored
(tables.py).
"""

import math
import sys
from collections import Counter

from support.evaluation import metrics, tables
from support.teachers.judging import agreement
from support.teachers.shaping import length


def trace_table(records, problems, tokenizer=None, failed=0):
    """The closing text. records: all of a trace file, one per reply (several per question with
    --attempts or --diverse); failed: calls given up in this run, which are no records. A thought is
    "unclear" where nobody could say whether it leads to the answer; the rule often cannot."""
    by_id, groups = {problem.id: problem for problem in problems}, {"": {"all": records}}
    for record in records:
        for axis, names in metrics.axes(by_id[record["id"]]).items():
            for name in names if axis not in metrics.DETAILS else ():
                groups.setdefault(axis, {}).setdefault(name, []).append(record)
    heads = ",questions,asked,answered,thought,correct,consistent,unclear,kept,USD".split(",")
    rows = [row(name, some) for group in groups.values() for name, some in sorted(group.items())]
    lines = [tables.align([heads, *rows], False)]
    stops = Counter(record["stop"] for record in records)
    lines += [f"ended by {listed(stops)}; {failed} calls failed for good (asked again next time)"]
    dropped = Counter(record["dropped"] for record in records if record.get("dropped"))
    lines += [f"not kept: {listed(dropped)}"] if dropped else []
    lines += lengths(records, by_id, tokenizer) + agreements(records)
    return "\n".join(lines)


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda x: -x[1]))


def row(name, records):
    """A row of the table."""
    usages = [u for r in records for u in (r["usage"], r["usage"].get("judge", {}))]
    verdicts = [record["verdict"] for record in records]
    counts = [len({record["id"] for record in records}), len(records)]
    counts += [sum(bool(record[key]) for record in records) for key in ("answer", "thought")]
    counts += [sum(v[key] is True for v in verdicts) for key in ("correct", "consistent")]
    counts += [sum(bool(r["thought"]) and r["verdict"]["consistent"] is None for r in records)]
    counts += [sum(record["kept"] for record in records)]
    return [name, *map(str, counts), f"{sum(u.get('cost') or 0 for u in usages):.4f}"]


def lengths(records, by_id, tokenizer):
    """Lines: how long the thoughts are as the teacher wrote them, and shaped."""
    told, sizes = [record for record in records if record["thought"]], {}
    for name, some in (("before shaping", [r["reply"] | {"id": r["id"]} for r in told]),
                       ("after", told), ("kept", [r for r in told if r["kept"]])):  # fmt: skip
        sizes[name] = [length(by_id[r["id"]], r["thought"], tokenizer) for r in some]
    unit = "tokens" if tokenizer else "words"
    return [f"{unit} {name}: {spread(some)}" for name, some in sizes.items() if some]


def spread(sizes):
    """Median, 90th percentile (nearest rank) and maximum, in words."""
    sizes = sorted(sizes)
    ranks = (sizes[math.ceil(len(sizes) * share) - 1] for share in (0.5, 0.9, 1))
    return "median {}, p90 {}, max {}".format(*ranks)


def agreements(records):
    """Lines: the rule beside the judge, old verdicts beside new ones, and where they differ."""
    lines = []
    for key, names in (("rule", "the rule and the judge"), ("before", "old and new verdicts")):
        both = [(r["id"], r["verdict"][key]["correct"], r["verdict"]) for r in records
                if r["verdict"].get(key)]  # fmt: skip
        found = agreement([(id, one, verdict["correct"]) for id, one, verdict in both])
        if found["n"]:
            kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.3f}"
            share = f"{metrics.percent(found['agreement'])} % of {found['n']}"
            where = ", ".join(found["disagreements"]) or "none"
            lines += [f"{names} agree on {share}, kappa {kappa}; they differ at: {where}"]
    return lines


def report(run, records, left):
    """Print the summary, what failed, and how to go on.

    run      teacher.py's Run, whose calls have come to their end
    records  what the trace file holds for its command; left: how many questions can be asked yet
    """
    calls = run.calls
    if records:
        print(trace_table(records, run.problems, run.tokenizer, len(calls.failed)))
    for id, why in list(calls.failed.items())[:10]:
        print(f"failed: {id}: {why}", file=sys.stderr)
    if len(calls.failed) > 10:
        print(f"failed: {len(calls.failed) - 10} more", file=sys.stderr)
    if calls.lost:
        text = f"Replies that never came whole may have been billed too: ${calls.lost:.4f} at most."
        print(text, file=sys.stderr)
    if calls.stop:
        many = f"{left} of {len(run.problems)} questions are left"
        text = f"Stopped: {calls.stop}. {many}; the same command goes on with them."
        print(text, file=sys.stderr)
