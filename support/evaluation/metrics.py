"""From graded answers to the numbers of metrics.json, and the comparison of two runs.

ScienceQA's categories (Lu et al. 2022, arXiv 2209.09513) as Multimodal-CoT (Zhang et al. 2023,
arXiv 2302.00923) reports them, MathVista's axes, hallucinated rationales where the scene behind an
image is known, and the text scores as their authors call them. A score is about a named set of
problems: missing, unknown and repeated predictions are errors.

Axes: `resamples` of a bootstrap.
"""

import math
import random
import re
import sys
from bisect import bisect_left
from collections import Counter, defaultdict

import numpy as np

import data
from data import Problem
from support.evaluation.errors import KINDS, Graded, before_loop, rationale_of, scene_statements
from support.evaluation.grading import grade, is_conclusive

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
def percent(share: float) -> float:
    """A share in 0..1 as a percentage with two decimals."""
    return round(100.0 * share, 2)


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> list[float]:
    """95 % Wilson score interval of hits / n, in percent: it stays inside 0..100, and does not
    shrink to nothing when all answers, or none, are right."""
    # Eq. interval (Wilson 1927)
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return [percent(max(0.0, centre - half)), percent(min(1.0, centre + half))]


def grade_all(
    problems: list[Problem],
    predictions: list[dict],
    faithful: bool = False,
    partial: bool = False,
    strict: bool = False,
) -> list[Graded]:
    """[(problem, prediction, Grade)] in prediction order. Raises ValueError on repeated, unknown
    and (unless `partial`) missing ids. `faithful`: with the original's guesses; `strict`: by
    ScienceQA's published rule."""
    by_id = {p.id: p for p in problems}
    times = Counter(x["id"] for x in predictions)
    missing = [] if partial and times else by_id.keys() - times
    for fault, ids in (
        ("prediction ids occur more than once", [i for i in times if times[i] > 1]),
        ("prediction ids match no problem, check --data and --split", times.keys() - by_id),
        ("problems have no prediction (--partial scores the others)", missing),
    ):
        if ids:
            some = listed(sorted(ids))
            raise ValueError(f"{len(ids)} {fault}: {some} (there are {len(by_id)} problems).")
    guess = random.Random(GUESS_SEED) if faithful else None
    graded = []
    for prediction in predictions:
        problem = by_id[prediction["id"]]
        graded.append((problem, prediction, grade(problem, prediction["response"], guess, strict)))
    return graded


def listed(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")


def axes(problem: Problem) -> dict[str, list[str]]:
    """{axis: the table rows a problem counts in}.

    ScienceQA: subject; TXT has a hint, IMG an image *of the question* (images of the choices do not
    count, as published), NO neither; grades; the demo's family. MathVista: its task, context and
    skills by their own names, the others as "source: TQA". Your own JSONL: whatever it has of both.
    """
    meta = problem.meta
    mathvista = isinstance(meta.get("skills"), list)
    subject = SUBJECTS.get(str(meta.get("subject")))
    rows = {}
    if not mathvista:
        has_image = meta.get("has_image", problem.image is not None)
        modality = {"TXT": problem.hint, "IMG": has_image, "NO": not problem.hint and not has_image}
        year = re.fullmatch(r"grade(\d+)", str(meta.get("grade")))
        rows["subject"] = [subject] if subject else []
        rows["years"] = ["G1-6" if int(year[1]) <= 6 else "G7-12"] if year else []
        rows["modality"] = [name for name, counts in modality.items() if counts]
        rows["family"] = [str(meta["family"])] if meta.get("family") else []
    if subject:  # a record of ScienceQA: its task, grade and skill are no rows of their own
        return rows
    for key, axis in AXES.items():
        values = meta.get(key) if isinstance(meta.get(key), list) else [meta.get(key)]
        prefix = "" if mathvista and key in PLAIN else f"{axis}: "
        rows[axis] = [prefix + x for x in dict.fromkeys(values) if isinstance(x, str) and x]
    return rows


def rows_by_axis(graded: list[Graded]) -> dict[str, dict[str, list[Graded]]]:
    """{axis: {row: its graded}}, the rows of AXES by name: for task and skill the paper's order."""
    by_axis = defaultdict(lambda: defaultdict(list))
    for item in graded:
        for axis, names in axes(item[0]).items():
            for name in names:
                by_axis[axis][name].append(item)
    details = set(AXES.values())
    return {x: dict(sorted(rows.items()) if x in details else rows) for x, rows in by_axis.items()}


def tally(graded: list[Graded]) -> dict:
    """n, accuracy, its interval and chance; rates in percent, None where there is nothing."""
    n = len(graded)
    if not n:
        return {"n": 0, "accuracy": None, "ci95": None, "chance": None}
    hits = sum(g.correct for *_, g in graded)
    chance = percent(sum(1 / len(p.choices) for p, *_ in graded if p.choices) / n)
    return {"n": n, "accuracy": percent(hits / n), "ci95": wilson(hits, n), "chance": chance}


# --- rationales
def rationale_scores(
    graded: list[Graded], rationale_format: str | None, faithful: bool = False
) -> dict:
    """Mean ROUGE-L and BLEU in percent of the rationales against the gold target of their stage; {}
    without. An empty rationale scores 0, but the original (`faithful`) leaves it out of ROUGE-L."""
    if rationale_format is None:  # a teacher's rationale has another form than the gold solution
        return {}
    written = [(x["rationale"], p) for p, x, _ in graded if x.get("rationale") is not None]
    pairs = [(text, data.prompt(p, rationale_format)[1].strip()) for text, p in written]
    pairs = [(text, gold) for text, gold in pairs if gold]
    if not pairs or not any(p.lecture or p.solution for _, p in written):
        return {}
    rouge = [rouge_l(*pair) for pair in pairs if pair[0] or not faithful]
    scores = {"n_rationales": len(pairs), "rougeL": percent(sum(rouge) / max(1, len(rouge)))}
    for n in (1, 4):
        scores[f"bleu{n}"] = percent(sum(bleu(*pair, n) for pair in pairs) / len(pairs))
    return scores


def validation_score(
    problems: list[data.Problem], texts: dict[str, dict], fmt: str
) -> dict[str, float]:
    """What the best epoch of a stage is chosen by, in percent: {"val_accuracy"} of the answers, or
    {"val_rougeL"} of what has a rationale. `texts`: {id: {"text"}}; `fmt`: the stage's format."""
    if fmt.endswith("-A"):
        right = sum(grade(p, texts[p.id]["text"]).correct for p in problems)
        return {"val_accuracy": percent(right / len(problems))}
    written = [(p, {"rationale": texts[p.id]["text"]}, None) for p in problems]
    return {"val_rougeL": rationale_scores(written, fmt).get("rougeL", 0.0)}


def rationale_quality(graded: list[Graded], facts: dict[str, dict] | None = None) -> dict:
    """Of `classify_all`'s answers {"failure_modes": {kind: n}}; of their rationales {"consistency":
    of the "n_consistency" that come to an answer those that give it, "rationale_words": {"mean",
    "median"}, "loop_share" of all words, "hallucination"?}; rates in percent."""
    scores = {}
    counts = Counter(x["kind"] for _, x, _ in graded if "kind" in x)
    if counts:
        scores["failure_modes"] = {kind: counts[kind] for kind in KINDS if kind in counts}
    rationales = [(p, g, text) for p, x, g in graded if (text := rationale_of(x))]
    if not rationales:
        return scores
    ends = [(x["concludes"], g.parsed) for _, x, g in graded if x.get("concludes")]
    same = [end == parsed for end, parsed in ends if parsed is not None]
    if same:
        scores["consistency"] = percent(sum(same) / len(same))
        scores["n_consistency"] = len(same)
    words = [re.findall(r"\w+", text) for *_, text in rationales]
    lengths = [len(x) for x in words]
    looped = sum(len(x) - len(before_loop(x)) for x in words)
    mean = round(float(np.mean(lengths)), 1)
    scores["rationale_words"] = {"mean": mean, "median": float(np.median(lengths))}
    scores["loop_share"] = percent(looped / max(1, sum(lengths)))
    if facts:
        # The test of the Multimodal-CoT paper's section 3, by rule.
        found = [(g.correct, scene_statements(text, facts.get(p.id))) for p, g, text in rationales]
        shares = false_shares([statements for _, statements in found])
        for name, correct in (("right", True), ("wrong", False)):
            shares[name] = false_shares([x for right, x in found if right is correct])
        scores["hallucination"] = shares
    return scores


def false_shares(rationales: list[list[tuple[str, bool]]]) -> dict:
    """Of the `scene_statements` of each rationale: how many rationales and facts there are, and
    the percentages of rationales with a false fact and of false facts."""
    holds = [holds for statements in rationales for _, holds in statements]
    with_false = sum(any(not holds for _, holds in statements) for statements in rationales)
    return {
        "n": len(rationales),
        "stated": len(holds),
        "false_rationales": percent(with_false / max(1, len(rationales))),
        "false_facts": percent(holds.count(False) / max(1, len(holds))),
    }


# --- one rationale against the gold one
def bleu(candidate: str, reference: str, n: int) -> float:
    """Sentence BLEU-n in 0..1 with uniform weights and no smoothing; tokens end at white space and
    full stops. An order without a match counts as the smallest positive float (as in nltk), but
    without a common word it is 0."""
    ours, gold = (re.findall(r"[^\s.]+", x) for x in (candidate, reference))
    logs = []
    for order in range(1, n + 1):
        ngrams, expected = (
            Counter(zip(*(tokens[i:] for i in range(order)), strict=False))
            for tokens in (ours, gold)
        )
        hits = (ngrams & expected).total()
        if not hits and order == 1:
            return 0.0
        logs.append(math.log(hits / ngrams.total() if hits else sys.float_info.min))
    # Eq. BLEU (Papineni et al. 2002): BP exp(sum of log p_n / N)
    brevity = 1.0 if len(ours) > len(gold) else math.exp(1 - len(gold) / len(ours))
    return brevity * math.exp(math.fsum(x / n for x in logs))


def lcs_words(x: list[str], places: dict[str, list[int]]) -> set[str]:
    """The words, as a set, of one longest common subsequence of the word list x and a second, y:
    `places` maps each word of y to its positions, last first (Hunt and Szymanski 1977)."""
    ends = []  # [k]: where the shortest prefix of y ends that has k+1 words in common with x so far
    rows = []
    for word in x:
        if word in places:
            for j in places[word]:
                k = bisect_left(ends, j)
                ends[k : k + 1] = [j]
            rows.append((word, ends.copy()))
    words = set()
    k = len(ends) - 1
    # Among equals, the choice of walking back the full table and shortening y first.
    for word, ends_then in reversed(rows):
        if k >= 0 and ends_then[k] in places[word]:
            words.add(word)
            k -= 1
    return words


def rouge_l(candidate: str, reference: str) -> float:
    """Summary-level ROUGE-L F in 0..1, equal to the package `rouge` 1.0.1 in the authors' call.

    Sentences end at every full stop, the longest common subsequences of all pairs of sentences join
    in one *set* of words, and lengths count distinct words (a blank sentence has the word ""). A
    text without a sentence scores 0; the package raises.
    """
    ours, gold = (
        [" ".join(s.split()).split(" ") for s in text.split(".") if s]
        for text in (candidate, reference)
    )
    if not ours or not gold:
        return 0.0
    common = set()
    for theirs in gold:
        places = defaultdict(list)
        for j in reversed(range(len(theirs))):
            places[theirs[j]].append(j)
        for sentence in ours:
            if not common >= places.keys() & set(sentence):  # else it cannot add a word
                common |= lcs_words(sentence, places)
    # Eq. ROUGE-L (Lin 2004): 2 P R / (P + R)
    precision, recall = (len(common) / len(set().union(*x)) for x in (ours, gold))
    return 2.0 * precision * recall / (precision + recall + 1e-8)


# --- metrics.json
def metrics_of(
    graded: list[Graded],
    faithful: bool = False,
    rationale_format: str | None = "QCM-LE",
    facts: dict[str, dict] | None = None,
) -> dict:
    """The table's numbers of `classify_all`'s answers; rates are percentages with two decimals.

    Returns {"n", "accuracy": {"avg", "NAT", ...}, "ci95": [low, high], "chance", "inconclusive",
    "parse_failures", "n_rationales"?, "rougeL"?, "bleu1"?, "bleu4"?, those of `rationale_quality`,
    "families"?, "axes"?: {axis: its rows}, "stop"?, "n_by", "ci95_by", "chance_by"}; a category
    without problems is None.
    """
    by_axis = rows_by_axis(graded)
    families = by_axis.pop("family", {})
    details = {axis: by_axis.pop(axis) for axis in AXES.values() if axis in by_axis}
    groups = {"avg": graded}
    if scienceqa := {name: items for rows in by_axis.values() for name, items in rows.items()}:
        groups |= {name: scienceqa.get(name, []) for name in CATEGORIES}
    for rows in (families, *details.values()):
        groups |= rows
    by_row = {name: tally(items) for name, items in groups.items()}
    rates = {name: row["accuracy"] for name, row in by_row.items()}
    scores = {
        "n": len(graded),
        "accuracy": {name: rate for name, rate in rates.items() if name not in families},
        "ci95": by_row["avg"]["ci95"],
        "chance": by_row["avg"]["chance"],
        "inconclusive": percent(sum(not is_conclusive(g) for *_, g in graded) / len(graded)),
        "parse_failures": percent(sum(g.parsed is None for *_, g in graded) / len(graded)),
        **rationale_scores(graded, rationale_format, faithful),
        **rationale_quality(graded, facts),
    }
    if families:
        scores["families"] = {name: rates[name] for name in sorted(families)}
    if details:
        scores["axes"] = {axis: list(rows) for axis, rows in details.items()}
    if stops := Counter(x["stop"] for _, x, _ in graded if x.get("stop")):
        scores["stop"] = dict(sorted(stops.items()))
    for key in ("n", "ci95", "chance"):
        scores[f"{key}_by"] = {name: row[key] for name, row in by_row.items()}
    return scores


# --- two runs
def compare(
    graded_a: list[Graded], graded_b: list[Graded], resamples: int = 10_000, seed: int = 0
) -> dict:
    """Is b better than a, on the problems that both answered?

    Returns {"n", "difference" (b - a, in points), "ci95": [low, high] in points, "better" (only b
    is right), "worse" (only a), "p"}. Raises ValueError if they have no problem in common, or if
    problems of the same id are different ones.
    """
    first = {p.id: (p, g.correct) for p, _, g in graded_a}
    common = [(*first[p.id], p, g.correct) for p, _, g in graded_b if p.id in first]
    unlike = [p.id for p, _, q, _ in common if (p.question, p.answer) != (q.question, q.answer)]
    if unlike:
        raise ValueError(f"{len(unlike)} problems of the same id differ ({listed(unlike)})")
    if not common:
        raise ValueError("they have no problem in common")
    n = len(common)
    better = sum(b and not a for _, a, _, b in common)
    worse = sum(a and not b for _, a, _, b in common)
    shares = [better / n, worse / n, (n - better - worse) / n]
    # Eq. bootstrap (Efron 1979): percentiles of the difference over resampled problems. It depends
    # only on how many better and worse ones were drawn, which have a multinomial distribution.
    drawn = np.random.default_rng(seed).multinomial(n, shares, resamples)  # (resamples, 3)
    ends = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5]).tolist()
    compared = {"n": n, "difference": percent((better - worse) / n)}
    compared["ci95"] = [percent(x) for x in ends]
    return compared | {"better": better, "worse": worse, "p": mcnemar(better, worse)}


def mcnemar(better: int, worse: int) -> float:
    """Two-sided: how often a fair coin thrown so many times is at least as lopsided."""
    # Eq. exact test (McNemar 1947): 2 sum of C(n, k) / 2^n, k up to min(better, worse)
    # Integers: exact, no overflow.
    throws = better + worse
    ways = 1  # throws over k
    total = 0
    for k in range(min(better, worse) + 1):
        total += ways
        ways = ways * (throws - k) // (k + 1)
    return min(1.0, 2 * total / 2**throws)
