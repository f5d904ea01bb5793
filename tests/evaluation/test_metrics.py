"""metrics.py: numbers by hand, the text scores against the packages of the authors, comparisons."""

import gzip
import json
import math
import os
import random
import re
import time
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import scored
from graded import MATHVISTA, SCIENCEQA, graded, needs_mathvista, needs_scienceqa, problem, says

import data
from support.evaluation import grading, metrics, tables
from support.evaluation.metrics import bleu, rouge_l


# --- text scores
def rouge_of_the_package(candidate, reference):
    rouge = pytest.importorskip("rouge").Rouge(metrics=["rouge-l"])
    try:  # hypothesis and reference are exchanged in the authors' call
        return rouge.get_scores(reference, candidate, avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


def bleu_of_the_package(candidate, reference, n):
    score = pytest.importorskip("nltk.translate.bleu_score").sentence_bleu
    ours, gold = ([t for t in re.split(r"\s|\.", x) if t] for x in (candidate, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score([gold], ours, (1 / n,) * n)


def assert_equal_to_the_packages(candidate, reference):
    expected = rouge_of_the_package(candidate, reference)
    assert abs(rouge_l(candidate, reference) - expected) < 1e-9, (candidate, reference)
    for n in (1, 2, 4):
        expected = bleu_of_the_package(candidate, reference, n)
        assert math.isclose(bleu(candidate, reference, n), expected, rel_tol=1e-9)


def perturbed(text, rng):
    """Drop, copy and move words, and break sentences: about a third of the text."""
    words = text.split(" ")
    for _ in range(rng.randint(0, 1 + len(words) // 3)):
        i = rng.randrange(len(words))
        edits = ([], [rng.choice(words)], [".", words[i]], [words[i], rng.choice(words)])
        words[i : i + 1] = rng.choice(edits) or ([words[i]] if len(words) == 1 else [])
    return " ".join(words)


@pytest.mark.slow
@needs_scienceqa
def test_scores_equal_the_packages_on_real_solutions():
    rng = random.Random(0)
    problems = [p for p in data.load(SCIENCEQA, "test") if p.solution][::3]
    targets = [data.prompt(p, "QCM-E")[1] for p in problems]
    pairs = [(perturbed(x, rng), x) for x in targets] + [(rng.choice(targets), x) for x in targets]
    assert len(pairs) > 300
    for pair in pairs:
        assert_equal_to_the_packages(*pair)


@pytest.mark.slow
def test_scores_equal_the_packages_on_small_alphabets():
    """Few words and many sentences: here equally long common subsequences differ in their words."""
    rng = random.Random(1)
    for _ in range(2000):
        words = "abcdefgh"[: rng.choice((2, 3, 5, 8))] + " ."
        marks = [rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(0, 60))]
        half = rng.randint(0, len(marks))
        assert_equal_to_the_packages("".join(marks[:half]), "".join(marks[half:]))


ODD = ["", ".", "...", " ", ". .", "a", "a.", "a. ", "\n", "ein Wort", "été. 中 文 .",
       "x\xad\u2003y", "\U0001f9f2 attracts \U0001f9f2. \U0001f9f2", "the " * 60]  # fmt: skip


@pytest.mark.parametrize("candidate", ODD)
def test_odd_texts_get_a_score_and_the_package_one(candidate):
    for reference in ODD:
        assert_equal_to_the_packages(candidate, reference)
        if not candidate.strip(". ") or not reference.strip(". "):
            assert bleu(candidate, reference, 4) == 0.0
    if not candidate.strip("."):
        assert rouge_l(candidate, "a b. c") == 0.0 == rouge_l("a b", candidate)


def test_rationales_are_scored_against_the_target_of_their_stage(monkeypatch):
    problems = [problem(str(i), lecture="Poles push.", solution=s) for i, s in enumerate("ab")]
    gold = data.prompt(problems[0], "QCM-LE")[1]
    predictions = [{"id": "0", "response": "", "rationale": gold},
                   {"id": "1", "response": "", "rationale": ""}]  # fmt: skip
    scores = scored(problems, predictions)
    names = ("rougeL", "bleu1", "bleu4", "n_rationales")
    assert [scores[name] for name in names] == [50, 50, 50, 2]
    faithful = scored(problems, predictions, faithful=True)
    assert (faithful["rougeL"], faithful["bleu1"]) == (100, 50)  # their ROUGE-L skips empty ones
    assert 0 < scored(problems, predictions, rationale_format="QCM-E")["rougeL"] < 50
    assert "rougeL" not in scored([problem("0"), problem("1")], predictions)  # no gold text
    # Empty targets do not count.
    problems = [problem(str(i), solution=s) for i, s in enumerate(("", "a b c d"))]
    predictions = [{"id": p.id, "response": "", "rationale": "a b c d"} for p in problems]
    monkeypatch.setattr(data, "prompt", lambda p, fmt: ("", p.solution))
    scores = scored(problems, predictions)
    assert (scores["n_rationales"], scores["rougeL"], scores["bleu4"]) == (1, 100, 100)
    assert "rougeL" not in scored(problems[:1], predictions[:1])


# --- metrics
def small_set():
    """Eight problems, one prediction each; A is the right letter and five get it."""
    rows = [  # hint, choices, subject, grade, has an image, response
        ("read this", 2, "natural", 1, True, says("A")),
        ("read this", 2, "natural", 6, False, says("B")),
        ("", 4, "natural", 7, True, says("A")),
        ("", 4, "social", 12, False, "dunno"),
        ("", 4, "social", 2, False, says("A")),
        ("", 4, "social", 2, False, says("A")),
        ("", 4, "social", 2, False, says("A")),
        ("", 4, "social", 2, False, says("B")),
    ]
    problems = []
    for i, (hint, n, subject, grade, has_image, _) in enumerate(rows):
        meta = {"subject": f"{subject} science", "grade": f"grade{grade}", "has_image": has_image}
        image = "choice_0.png"
        problems.append(problem(f"p{i}", tuple("wxyz"[:n]), hint=hint, meta=meta, image=image))
    return problems, [{"id": f"p{i}", "response": row[-1]} for i, row in enumerate(rows)]


def test_metrics_by_hand():
    scores = scored(*small_set())
    assert scores["n"] == 8 and scores["accuracy"]["avg"] == 62.5
    assert scores["chance"] == 31.25  # (2 / 2 + 6 / 4) / 8
    assert scores["parse_failures"] == 12.5
    assert scores["ci95"] == [30.57, 86.32]
    by = scores["n_by"], scores["accuracy"], scores["chance_by"]
    assert {name: tuple(x[name] for x in by) for name in by[0]} == {
        "avg": (8, 62.5, 31.25),
        "NAT": (3, 66.67, 41.67),
        "SOC": (5, 60.0, 25.0),
        "LAN": (0, None, None),
        "TXT": (2, 50.0, 50.0),
        "IMG": (2, 100.0, 37.5),  # an image of a choice makes no IMG problem
        "NO": (5, 60.0, 25.0),
        "G1-6": (6, 66.67, 33.33),
        "G7-12": (2, 50.0, 25.0),
    }
    assert not {"rougeL", "families", "stop"} & scores.keys()
    assert json.loads(json.dumps(scores)) == scores


def test_families_stops_and_free_form_chance():
    problems = [problem(str(i), meta={"family": f}) for i, f in enumerate(("dots", "cup", "cup"))]
    problems.append(problem("3", choices=(), answer="5"))
    replies = [says("A"), says("B"), says("A"), "The answer is 5."]
    predictions = [{"id": str(i), "response": reply} for i, reply in enumerate(replies)]
    for x, stop in zip(predictions, ["eos", "length", "eos", None], strict=True):
        x["stop"] = stop
    scores = scored(problems, predictions)
    assert scores["families"] == {"cup": 50.0, "dots": 100.0}
    assert scores["stop"] == {"eos": 2, "length": 1}
    assert scores["chance"] == 25.0  # three thirds and a zero, of four


@needs_scienceqa
def test_categories_equal_a_count_on_the_raw_file():
    """The published definitions, applied to problems.json itself with random answers."""
    problems = data.load(SCIENCEQA, "test")
    raw = json.loads((SCIENCEQA / "problems.json").read_text())
    rng = random.Random(2)
    picks = {p.id: rng.randrange(len(p.choices)) for p in problems}
    predictions = [{"id": i, "response": says("ABCDE"[pick])} for i, pick in picks.items()]
    tests = {
        "NAT": lambda r: r["subject"] == "natural science",
        "SOC": lambda r: r["subject"] == "social science",
        "LAN": lambda r: r["subject"] == "language science",
        "TXT": lambda r: bool(r["hint"]),
        "IMG": lambda r: bool(r["image"]),
        "NO": lambda r: not r["hint"] and not r["image"],
        "G1-6": lambda r: r["grade"] in [f"grade{g}" for g in range(1, 7)],
        "G7-12": lambda r: r["grade"] in [f"grade{g}" for g in range(7, 13)],
        "avg": lambda r: True,
    }
    rates = scored(problems, predictions)["accuracy"]
    for name, counts in tests.items():
        hits = [pick == raw[i]["answer"] for i, pick in picks.items() if counts(raw[i])]
        assert f"{rates[name]:.2f}" == f"{100 * sum(hits) / len(hits):.2f}", name


def published_problems(labels):
    """({category: are its labels known of all 4,241}, the test split) from all that is there of
    ScienceQA; of a problem that is not, only the published label and whether it has a caption."""
    records = json.loads((SCIENCEQA / "problems.json").read_text())
    rest = SCIENCEQA / "problems_partial.json.gz"
    records |= json.loads(gzip.decompress(rest.read_bytes())) if rest.is_file() else {}
    splits = SCIENCEQA / "pid_splits_full.json"
    pids = json.loads((splits if splits.is_file() else SCIENCEQA / "pid_splits.json").read_text())
    with_image = json.loads((SCIENCEQA / "captions.json").read_text())["captions"]
    problems, fields = [], dict.fromkeys(("subject", "grade", "hint"), True)
    for pid, label in zip(pids["test"], labels, strict=True):
        record, gold = records.get(pid, {}), "ABCDE".index(grading.ANSWER.search(label)[1])
        fields = {k: known and record.get(k) is not None for k, known in fields.items()}
        meta = {k: record.get(k) for k in fields} | {"has_image": pid in with_image}
        choices = tuple(record.get("choices") or "vwxyz")
        problems.append(problem(pid, choices, gold, hint=record.get("hint") or "", meta=meta))
    needs = ["subject"] * 3 + ["hint", None, "hint"] + ["grade"] * 2
    known = {c: fields.get(x, True) for c, x in zip(metrics.CATEGORIES, needs, strict=True)}
    return known | {"avg": True}, problems


@needs_scienceqa
@pytest.mark.skipif(
    "NANOCOT_PUBLISHED" not in os.environ,
    reason="set NANOCOT_PUBLISHED to a folder of mm-cot's predictions_ans_test.json of stage 2",
)
def test_published_predictions_keep_their_scores_to_two_decimals():
    names = "natural social language has_text has_image no_context grade_1_6 grade_7_12".split()
    names = dict(zip(metrics.CATEGORIES, names, strict=True)) | {"avg": "average"}
    files = sorted(Path(os.environ["NANOCOT_PUBLISHED"]).rglob("*.json"))
    files = [file for file in files if "answer" in json.loads(file.read_text()).get("scores", {})]
    assert files
    for file in files:
        published = json.loads(file.read_text())
        known, problems = published_problems(published["labels"])
        items = metrics.grade_all(problems, tables.read_predictions(file, problems), True)
        rates = metrics.metrics_of(items, True)["accuracy"]
        equal = [name for name, complete in known.items() if complete]
        for category in equal:
            official = published["scores"]["answer"][f"acc_{names[category]}"]
            assert f"{rates[category]:.2f}" == official, (file, category)
        verdicts = published.get("per_question_correct", {})
        assert {p.id: g.correct for p, _, g in items} == verdicts or not verdicts
        print(f"{file}: n = {len(items)}, equal in {', '.join(equal)}")


def test_wilson_against_published_values():
    """Newcombe (1998), Statistics in Medicine 17, Table I, method 3: four (hits, n)."""
    assert metrics.wilson(81, 263) == [25.53, 36.62]
    assert metrics.wilson(15, 148) == [6.24, 16.05]
    assert metrics.wilson(0, 20) == [0.0, 16.11]
    assert metrics.wilson(1, 29) == [0.61, 17.18]
    assert metrics.wilson(20, 20) == [83.89, 100.0]


@pytest.mark.parametrize(
    "ids, count, named",
    [(["p0", "p1", "p0"], 1, "p0"), (["p0", "p1", "p9"], 1, "p9"), (["p0"], 1, "p1"),
     ([], 2, "p0, p1")],
)  # fmt: skip
def test_predictions_must_be_of_these_problems(ids, count, named):
    problems = [problem("p0"), problem("p1")]
    predictions = [{"id": i, "response": says("A")} for i in ids]
    for partial in (False, True):
        if partial and ids == ["p0"]:
            assert scored(problems, predictions, partial=True)["n"] == 1
        else:
            with pytest.raises(ValueError, match=f"^{count} .*: {named} "):
                scored(problems, predictions, partial=partial)


def test_faithful_parse_draws_as_the_released_code_does():
    """The released loop, written out with the random module's own state, seeded 42."""
    replies = ["", says("A"), says("Z"), "A? B?", says("A") * 2, says("E"), says("B")]
    problems = [problem(str(i), index=i % 3) for i in range(210)]
    predictions = [{"id": p.id, "response": random.Random(p.id).choice(replies)} for p in problems]
    random.seed(42)
    expected = []
    for p, x in zip(problems, predictions, strict=True):
        letters = re.findall(r"The answer is \(([A-Z])\)", x["response"])
        if len(letters) == 1 and letters[0] in "ABCDE":
            index = "ABCDE".index(letters[0])
        else:
            index = random.choice(range(5))
        expected.append(index == p.meta["answer_index"])
    guessed = metrics.grade_all(problems, predictions, faithful=True)
    assert [g.correct for *_, g in guessed] == expected
    assert any(g.correct and g.parsed is None for *_, g in guessed)
    honest = metrics.grade_all(problems, predictions)
    assert not any(g.correct for *_, g in honest if g.parsed is None)
    assert sum(g.correct for *_, g in honest) < sum(expected)


# --- rows
def categories(problem):
    return [name for names in metrics.axes(problem).values() for name in names]


def test_rows_of_your_own_data_have_their_axis_in_the_name():
    meta = {"task": "text", "context": "text", "skill": "unused", "language": "en", "source": 3}
    own = problem(hint="h", meta=meta | {"skills": "text", "grade": "grade3", "family": "avg"})
    names = ["G1-6", "TXT", "avg", "task: text", "context: text", "skill: text", "language: en"]
    assert [x for x in categories(own) if x != "grade: grade3"] == names
    scores = metrics.metrics_of([(own, {}, grading.Grade(True, "A", ""))])
    assert scores["axes"]["task"] == ["task: text"] and scores["accuracy"]["task: text"] == 100.0
    assert scores["accuracy"]["TXT"] == 100.0 and scores["accuracy"]["NAT"] is None


def test_scienceqas_own_fields_make_no_rows():
    meta = {"subject": "natural science", "task": "closed choice", "grade": "grade7",
            "category": "Physics", "skill": "Identify magnets"}  # fmt: skip
    assert categories(problem(hint="", meta=meta)) == ["NAT", "G7-12", "NO"]


@pytest.mark.slow
@needs_mathvista
def test_mathvistas_rows_are_those_of_its_official_scores():
    """The same rows with the same n, in each of nine axes. (Bard's file has older labels of skill
    and grade; those are counted in the annotation itself.)"""
    problems = data.load(MATHVISTA, "testmini")
    bard = tables.read_predictions(MATHVISTA / "results/bard/output_bard.json")
    assert len(bard) == 1000 and bard[0].keys() == {"id", "response"}
    scores = scored(problems, bard)
    official = json.loads((MATHVISTA / "results/bard/scores_bard.json").read_text())
    records = json.loads((MATHVISTA / "annot_testmini.json").read_text()).values()
    skills = Counter(skill for x in records for skill in x["metadata"]["skills"])
    grades = Counter(x["metadata"]["grade"] for x in records)
    for axis, counts in {"skill": skills, "grade": grades}.items():
        official[axis] = {name: {"total": n} for name, n in counts.items()}
    for axis, names in scores["axes"].items():
        theirs = official[axis.replace(" ", "_")]
        ours = {name.removeprefix(f"{axis}: "): scores["n_by"][name] for name in names}
        assert ours == {name: x["total"] for name, x in theirs.items()}
    assert len(scores["axes"]) == 9 and not {"NAT", "TXT"} & scores["n_by"].keys()
    assert len(scores["n_by"]) == 1 + sum(map(len, scores["axes"].values()))  # no name twice
    assert scores["axes"]["task"][0] == "figure question answering"
    assert all(scores["n_by"][x] for x in categories(problems[0]))
    table = tables.table({"bard": scores})
    assert len(table.splitlines()) < 60 and "GeoQA+" not in table
    assert "(--all-rows: 42 more, by question type, source, " in table
    assert "\nby source\n" in tables.table({"bard": scores}, all_rows=True)
    assert max(map(len, table.splitlines())) < 80


# --- two runs
def pair(both, better, worse, neither):
    first = [1] * both + [0] * better + [1] * worse + [0] * neither
    second = [1] * both + [1] * better + [0] * worse + [0] * neither
    return graded(first), graded(second)


def test_the_counts_by_hand():
    compared = metrics.compare(*pair(100, 41, 24, 235))
    low, high = compared.pop("ci95")
    assert low < 4.25 < high and compared.pop("p") == pytest.approx(0.046, abs=5e-4)
    assert compared == {"n": 400, "difference": 4.25, "better": 41, "worse": 24}
    alike = {"n": 7, "difference": 0.0, "ci95": [0.0, 0.0], "better": 0, "worse": 0, "p": 1.0}
    assert metrics.compare(*pair(3, 0, 0, 4)) == alike  # runs that agree everywhere


@pytest.mark.parametrize("counts", [(100, 41, 24, 235), (30, 6, 1, 3), (5, 0, 9, 200)])
def test_the_interval_is_that_of_resampled_problems(counts):
    """The published way: draw problems with replacement, both runs' outcomes together."""
    a, b = pair(*counts)
    rights = np.array([[g.correct for *_, g in run] for run in (a, b)]).astype(float)
    n, rng = rights.shape[1], np.random.default_rng(7)
    rows = rng.integers(0, n, (20_000, n))
    means = (rights[1] - rights[0])[rows].mean(1)
    expected = 100 * np.percentile(means, [2.5, 97.5])
    assert np.abs(np.array(metrics.compare(a, b)["ci95"]) - expected).max() <= 100 / n + 0.1


def test_the_same_seed_gives_the_same_digits_and_order_does_not_matter():
    a, b = pair(40, 13, 7, 20)
    compared = metrics.compare(a, b)
    assert metrics.compare(a[::-1], b[3:] + b[:3]) == compared == metrics.compare(a, b)
    back = metrics.compare(b, a)
    assert (back["difference"], back["better"], back["worse"]) == (-compared["difference"], 7, 13)
    assert back["p"] == compared["p"]
    others = {tuple(metrics.compare(a, b, 200, seed)["ci95"]) for seed in range(5)}
    assert len(others) > 1  # it is really drawn


def test_only_the_same_problems_are_compared():
    a, b = pair(10, 3, 2, 5)
    assert metrics.compare(a, b[5:])["n"] == 15
    with pytest.raises(ValueError):
        metrics.compare(a, [(problem(f"x{p.id}"), x, g) for p, x, g in b])
    with pytest.raises(ValueError, match=r"^20 .*\(0, 1, "):
        metrics.compare(a, graded([1] * 20, index=1))


def test_mcnemar():
    """Known cases, and always the sum of binomial tails; of thousands it is quick and finite."""
    for better, worse, p in ((0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (10, 2, 0.03857421875)):
        assert metrics.mcnemar(better, worse) == metrics.mcnemar(worse, better) == p
    for throws in range(1, 40):
        ways = [math.comb(throws, k) for k in range(throws + 1)]
        for worse in range(throws + 1):
            off = [abs(2 * k - throws) for k in range(throws + 1)]
            far = sum(w for w, x in zip(ways, off, strict=True) if x >= off[worse])
            assert metrics.mcnemar(throws - worse, worse) == float(Fraction(far, 2**throws))
    z = 200 / math.sqrt(10_000)
    normal = math.erfc((z - 1 / math.sqrt(10_000)) / math.sqrt(2))  # continuity-corrected
    assert metrics.mcnemar(5_100, 4_900) == pytest.approx(normal, rel=1e-3)
    assert metrics.mcnemar(10_000, 0) == 0.0 and metrics.mcnemar(8_000, 8_000) == 1.0


@pytest.mark.slow
def test_speed():
    """10,000 answers within 10 s, and the rationales of a ScienceQA test split in a few more."""
    rng = random.Random(3)
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(rng.choice(words) + "." * (rng.random() < 0.07) for _ in range(100))
             for _ in range(1000)]  # fmt: skip
    problems = [problem(str(i), solution=texts[i % 1000]) for i in range(10_000)]
    predictions = [{"id": p.id, "response": says("A")} for p in problems]
    start = time.process_time()
    scored(problems, predictions)
    assert time.process_time() - start < 10
    start = time.process_time()
    for x in predictions[:1000]:
        x["rationale"] = perturbed(texts[int(x["id"])], rng)
    assert scored(problems, predictions)["n_rationales"] == 1000
    assert time.process_time() - start < 10
