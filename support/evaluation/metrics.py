"""Many answers: from graded ones to the numbers of metrics.json, and two runs beside each other.

Implements
* the categories of ScienceQA (Lu et al. 2022, arXiv 2209.09513) as Multimodal-CoT (Zhang et al.
  2023, arXiv 2302.00923) reports them, and MathVista's axes;
* the Wilson (1927) interval of every accuracy, with n and chance beside it; of two runs the paired
  bootstrap interval of the difference (Efron 1979) and McNemar's exact test (1947);
* Multimodal-CoT's test for hallucinated rationales, wherever the scene behind a picture is known.

A score is about a named set of problems: missing, unknown and repeated predictions are errors.
"Graded" is everywhere a list of (problem, prediction, Grade), in the order of the predictions.

Left out: corrections for many comparisons at once; tables and files (support/evaluation/tables.py).

Axes: `resamples` of a bootstrap.
"""

import math
import random
import re
from collections import Counter

import numpy as np

import data
from support.evaluation.decode_cache import before_loop
from support.evaluation.errors import KINDS, stated, thought_of
from support.evaluation.grading import grade
from support.evaluation.rouge import bleu, rouge_l

GUESS_SEED = 42  # the original's
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
AXES = {  # MathVista's, or your own: key of the record, what its rows are called
    "task": "task", "context": "context", "skills": "skill", "answer_type": "answer type",
    "question_type": "question type", "source": "source", "category": "category",
    "language": "language", "grade": "grade",
}  # fmt: skip
PLAIN = ("task", "context", "skills")  # in MathVista's layout their rows have no prefix
DETAILS = ("question type", "source", "category", "language", "grade")  # only with --all-rows


# --- grades, rates and rows
def percent(share):
    """A share in 0..1 as a percentage with two decimals."""
    return round(100.0 * share, 2)


def wilson(hits, n, z=1.959963984540054):
    """95 % Wilson score interval of hits / n, in percent: it stays inside 0..100, and does not
    shrink to nothing when all answers, or none, are right."""
    # Eq. interval (Wilson 1927)
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return [percent(max(0.0, centre - half)), percent(min(1.0, centre + half))]


def grade_all(problems, predictions, faithful=False, partial=False):
    """[(problem, prediction, Grade)] in prediction order. Raises ValueError on repeated, unknown
    and (unless `partial`) missing ids. `faithful`: with the original's guesses."""
    by_id = {p.id: p for p in problems}
    times = Counter(x["id"] for x in predictions)
    missing = [] if partial and times else by_id.keys() - times
    for fault, ids in (
        ("prediction ids are there more than once", [i for i in times if times[i] > 1]),
        ("prediction ids are of no problem here, check --data and --split", times.keys() - by_id),
        ("problems have no prediction (--partial scores the others)", missing),
    ):
        if ids:
            some = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
            raise ValueError(f"{len(ids)} {fault}: {some} (there are {len(by_id)} problems).")
    guess = random.Random(GUESS_SEED) if faithful else None
    pairs = [(by_id[x["id"]], x) for x in predictions]
    return [(p, x, grade(p, x["response"], guess)) for p, x in pairs]


def axes(problem):
    """{axis: the table rows a problem counts in}.

    ScienceQA: subject; TXT has a hint, IMG a picture *of the question* (pictures of the choices do
    not count, as published), NO neither; grades. The demo's family is a row as well. MathVista: its
    task, context and skills by their own names, the others as "source: TQA"; rows of different axes
    never share a name. Your own JSONL: whatever it has of both, all AXES with that prefix.
    """
    meta, found = problem.meta, {}
    mathvista = isinstance(meta.get("skills"), list)
    subject = SUBJECTS.get(str(meta.get("subject")))
    if not mathvista:
        has_image = meta.get("has_image", problem.image is not None)
        kinds = {"TXT": problem.hint, "IMG": has_image, "NO": not problem.hint and not has_image}
        year = re.fullmatch(r"grade(\d+)", str(meta.get("grade")))
        years = ["G1-6" if int(year[1]) <= 6 else "G7-12"] if year else []
        found = {"subject": [subject] if subject else [], "years": years}
        found["modality"] = [name for name, counts in kinds.items() if counts]
        found["family"] = [str(meta["family"])] if meta.get("family") else []
    for key, axis in () if subject else AXES.items():
        values = meta.get(key) if isinstance(meta.get(key), list) else [meta.get(key)]
        before = "" if mathvista and key in PLAIN else f"{axis}: "
        found[axis] = [before + x for x in dict.fromkeys(values) if isinstance(x, str) and x]
    return found


def rows_by_axis(graded):
    """{axis: {row: its graded}}, the rows of AXES by name: for task and skill the paper's order."""
    found = {}
    for item in graded:
        for axis, names in axes(item[0]).items():
            for name in names:
                found.setdefault(axis, {}).setdefault(name, []).append(item)
    return {a: dict(sorted(x.items())) if a in AXES.values() else x for a, x in found.items()}


def tally(graded):
    """n, accuracy, its interval and chance; rates in percent, None where there is nothing."""
    n, hits = len(graded), sum(g.correct for *_, g in graded)
    luck = sum(1 / len(p.choices) for p, *_ in graded if p.choices)
    rates = (percent(hits / n), wilson(hits, n), percent(luck / n)) if n else (None, None, None)
    return dict(zip(("n", "accuracy", "ci95", "chance"), (n, *rates), strict=True))


# --- rationales
def rationale_scores(graded, rationale_format, faithful=False):
    """Mean ROUGE-L and BLEU in percent of the rationales against the gold target of their stage; {}
    without rationales. Empty targets do not count. An empty rationale scores 0, but the original
    (`faithful`) leaves it out of ROUGE-L."""
    told = [(x["rationale"], p) for p, x, _ in graded if x.get("rationale") is not None]
    if rationale_format is None:  # a teacher's thought has another form than the gold solution
        return {}
    pairs = [(said, data.prompt(p, rationale_format)[1].strip()) for said, p in told]
    pairs = [(said, gold) for said, gold in pairs if gold]
    if not pairs or not any(p.lecture or p.solution for _, p in told):
        return {}
    rouge = [rouge_l(*pair) for pair in pairs if pair[0] or not faithful]
    means = {f"bleu{n}": sum(bleu(*pair, n) for pair in pairs) / len(pairs) for n in (1, 4)}
    means = {"rougeL": sum(rouge) / max(1, len(rouge))} | means
    return {"n_rationales": len(pairs)} | {name: percent(mean) for name, mean in means.items()}


def rationale_quality(graded, facts=None):
    """Of `explained` answers {"failure_modes": {kind: n}}; of their thoughts {"consistency": of the
    "n_consistency" that come to an answer those that give it, "rationale_words": {"mean",
    "median"}, "loop_share" of all words, "hallucination"?: see there}; rates in percent."""
    kinds = Counter(x["kind"] for _, x, _ in graded if "kind" in x)
    found = {name: kinds[name] for name in KINDS if name in kinds}
    found = {"failure_modes": found} if kinds else {}
    told = [(p, g, thought) for p, x, g in graded if (thought := thought_of(x))]
    if not told:
        return found
    ends = [(x["concludes"], g.parsed) for _, x, g in graded if x.get("concludes")]
    same = [end == parsed for end, parsed in ends if parsed is not None]
    words = [re.findall(r"\w+", thought) for *_, thought in told]
    looped, counts = sum(len(x) - len(before_loop(x)) for x in words), [len(x) for x in words]
    if same:
        found |= {"consistency": percent(sum(same) / len(same)), "n_consistency": len(same)}
    length = {"mean": round(float(np.mean(counts)), 1), "median": float(np.median(counts))}
    found |= {"rationale_words": length, "loop_share": percent(looped / max(1, sum(counts)))}
    return found | ({"hallucination": hallucination(told, facts)} if facts else {})


def hallucination(told, facts):
    """The paper's test (its section 3) by rule, over all thoughts and those with right and wrong
    answers: "n" thoughts with "stated" facts; percent of thoughts with a false one, of facts."""

    def rates(rows):
        said = [so for row in rows for _, so in row]
        lies = sum(any(not so for _, so in row) for row in rows)
        shares = {"false_rationales": percent(lies / max(1, len(rows)))}
        shares["false_facts"] = percent(said.count(False) / max(1, len(said)))
        return {"n": len(rows), "stated": len(said)} | shares

    rows = [(g.correct, stated(thought, facts.get(p.id))) for p, g, thought in told]
    by = {"right": [row for ok, row in rows if ok], "wrong": [row for ok, row in rows if not ok]}
    return rates([row for _, row in rows]) | {name: rates(rows) for name, rows in by.items()}


# --- metrics.json
def metrics_of(graded, faithful=False, rationale_format="QCM-LE", facts=None):
    """The table's numbers of `explained` grades; rates are percentages with two decimals.

    Returns {"n", "accuracy": {"avg", "NAT", ...}, "ci95": [low, high], "chance", "parse_failures",
    "n_rationales"?, "rougeL"?, "bleu1"?, "bleu4"?, what `rationale_quality` says, "families"?,
    "axes"?: {axis: its rows}, "stop"?, "n_by", "ci95_by", "chance_by"}; a category without problems
    is None.
    """
    found = rows_by_axis(graded)
    families = found.pop("family", {})
    details = {axis: found.pop(axis) for axis in AXES.values() if axis in found}
    scienceqa = {name: items for rows in found.values() for name, items in rows.items()}
    groups = {"avg": graded} | {name: scienceqa.get(name, []) for name in CATEGORIES if scienceqa}
    for rows in (families, *details.values()):
        groups |= rows
    by = {name: tally(items) for name, items in groups.items()}
    rates = {name: by[name]["accuracy"] for name in by}
    stops = Counter(x["stop"] for _, x, _ in graded if x.get("stop"))
    return {
        "n": len(graded),
        "accuracy": {name: rate for name, rate in rates.items() if name not in families},
        "ci95": by["avg"]["ci95"],
        "chance": by["avg"]["chance"],
        "parse_failures": percent(sum(g.parsed is None for *_, g in graded) / len(graded)),
        **rationale_scores(graded, rationale_format, faithful),
        **rationale_quality(graded, facts),
        **({"families": {name: rates[name] for name in sorted(families)}} if families else {}),
        **({"axes": {axis: list(rows) for axis, rows in details.items()}} if details else {}),
        **({"stop": dict(sorted(stops.items()))} if stops else {}),
        **{f"{k}_by": {name: t[k] for name, t in by.items()} for k in ("n", "ci95", "chance")},
    }


# --- two runs
def compare(graded_a, graded_b, resamples=10_000, seed=0):
    """Is b better than a, on the problems that both answered? Lists as of `grade_all`.

    Returns {"n", "difference" (b - a, in points), "ci95": [low, high] in points, "better" (only b
    is right), "worse" (only a), "p"}. ci95: paired bootstrap over problems, percentiles. As a
    resampled difference depends only on how often better and worse problems were drawn, these
    counts are drawn at once, from the multinomial distribution they have. p: McNemar's exact test.
    Raises ValueError if they have no problem in common, or if problems of the same id are
    different ones.
    """
    first = {p.id: (p, g.correct) for p, _, g in graded_a}
    common = [(*first[p.id], p, g.correct) for p, _, g in graded_b if p.id in first]
    unlike = [p.id for p, _, q, _ in common if (p.question, p.answer) != (q.question, q.answer)]
    if unlike:
        some = ", ".join(unlike[:5]) + (", ..." if len(unlike) > 5 else "")
        raise ValueError(f"{len(unlike)} problems of the same id are different ones ({some})")
    if not common:
        raise ValueError("they have no problem in common")
    n = len(common)
    better = sum(b and not a for _, a, _, b in common)
    worse = sum(a and not b for _, a, _, b in common)
    shares = [better / n, worse / n, (n - better - worse) / n]
    # Eq. bootstrap (Efron 1979): percentiles of the difference over resampled problems
    drawn = np.random.default_rng(seed).multinomial(n, shares, resamples)  # (resamples, 3)
    ends = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5]).tolist()
    said = {"difference": percent((better - worse) / n), "ci95": [percent(x) for x in ends]}
    return {"n": n} | said | {"better": better, "worse": worse, "p": mcnemar(better, worse)}


def mcnemar(better, worse):
    """Two-sided: how often a fair coin thrown so many times is at least as lopsided."""
    # Eq. exact test (McNemar 1947): 2 sum of C(n, k) / 2^n, k up to min(better, worse)
    throws, ways, total = better + worse, 1, 0
    for k in range(min(better, worse) + 1):  # ways: throws over k. Integers: exact, no overflow
        total += ways
        ways = ways * (throws - k) // (k + 1)
    return min(1.0, 2 * total / 2**throws)
