"""eval.py: two runs against each other, several runs on the command line, MathVista's rows."""

import json
import math
import re
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import scored
from test_eval import SCIENCEQA, problem, says

import data
import eval as scoring
from support.evaluation import metrics, tables
from support.training import ablations

MATHVISTA = SCIENCEQA.parent / "mathvista"
needs_mathvista = pytest.mark.skipif(
    not (MATHVISTA / "annot_testmini.json").is_file(),
    reason=f"no MathVista in {MATHVISTA}; set NANOCOT_DATA",
)


def graded(outcomes, **other):
    """What `grade_all` gives, of one problem for each outcome."""
    grades = {True: scoring.Grade(True, "A", ""), False: scoring.Grade(False, "B", "")}
    pairs = ((problem(str(i), **other), grades[bool(x)]) for i, x in enumerate(outcomes))
    return [(p, {"id": p.id, "response": ""}, g) for p, g in pairs]


def pair(both, better, worse, neither):
    first = [1] * both + [0] * better + [1] * worse + [0] * neither
    second = [1] * both + [1] * better + [0] * worse + [0] * neither
    return graded(first), graded(second)


# --- compare
def test_the_counts_by_hand():
    got = metrics.compare(*pair(100, 41, 24, 235))
    assert {k: got[k] for k in ("n", "difference", "better", "worse")} == {
        "n": 400, "difference": 4.25, "better": 41, "worse": 24,
    }  # fmt: skip
    assert got["p"] == pytest.approx(0.046, abs=5e-4)
    assert got["ci95"][0] < 4.25 < got["ci95"][1]
    assert json.loads(json.dumps(got)) == got


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


def test_runs_that_agree_everywhere():
    assert metrics.compare(*pair(3, 0, 0, 4)) == {
        "n": 7, "difference": 0.0, "ci95": [0.0, 0.0], "better": 0, "worse": 0, "p": 1.0,
    }  # fmt: skip


def test_the_same_seed_gives_the_same_digits_and_order_does_not_matter():
    a, b = pair(40, 13, 7, 20)
    got = metrics.compare(a, b)
    assert metrics.compare(a[::-1], b[3:] + b[:3]) == got == metrics.compare(a, b)
    back = metrics.compare(b, a)
    assert (back["difference"], back["better"], back["worse"]) == (-got["difference"], 7, 13)
    assert back["p"] == got["p"]
    others = {tuple(metrics.compare(a, b, 200, seed)["ci95"]) for seed in range(5)}
    assert len(others) > 1  # it is really drawn


@pytest.mark.parametrize(
    "better, worse, p", [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (10, 2, 0.03857421875), (4, 4, 1)]
)
def test_mcnemar_of_known_cases(better, worse, p):
    assert metrics.mcnemar(better, worse) == metrics.mcnemar(worse, better) == p


def test_mcnemar_equals_the_sum_of_binomial_tails():
    for throws in range(1, 40):
        ways = [math.comb(throws, k) for k in range(throws + 1)]
        for worse in range(throws + 1):
            off = [abs(2 * k - throws) for k in range(throws + 1)]
            far = sum(w for w, x in zip(ways, off, strict=True) if x >= off[worse])
            assert metrics.mcnemar(throws - worse, worse) == float(Fraction(far, 2**throws))


def test_mcnemar_of_thousands_neither_overflows_nor_takes_long():
    start = time.process_time()
    z = 200 / math.sqrt(10_000)
    normal = math.erfc((z - 1 / math.sqrt(10_000)) / math.sqrt(2))  # continuity-corrected
    assert metrics.mcnemar(5_100, 4_900) == pytest.approx(normal, rel=1e-3)
    assert metrics.mcnemar(10_000, 0) == 0.0 and metrics.mcnemar(8_000, 8_000) == 1.0
    assert time.process_time() - start < 2


def test_other_problems():
    a, b = pair(10, 3, 2, 5)
    assert metrics.compare(a, b[5:])["n"] == 15
    moved = [(problem(f"x{p.id}"), x, g) for p, x, g in b]
    with pytest.raises(ValueError, match="no problem in common"):
        metrics.compare(a, moved)
    with pytest.raises(ValueError, match=r"20 problems of the same id are different ones \(0, 1, "):
        metrics.compare(a, graded([1] * 20, index=1))


# --- folders on the command line
def own_data(folder, split="test", n=8, name="own.jsonl", **more):
    records = [{"id": f"q{i}", "question": "?", "choices": ["a", "b"], "answer": i % 2} | more
               for i in range(n)]  # fmt: skip
    with open(folder / name, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(x | {"id": f"{split}{x['id']}", "split": split}) + "\n"
                        for x in records)  # fmt: skip
    return folder / name


def graded_run(folder, name, letters, split="test", source="own.jsonl", *flags):
    file = folder / f"{name}-said.jsonl"
    lines = [{"id": f"{split}q{i}", "response": says(x)} for i, x in enumerate(letters)]
    file.write_text("\n".join(map(json.dumps, lines)))
    where = ["--predictions", str(file), "--data", str(folder / source), "--split", split]
    scoring.main([*where, "--out", str(folder / name), *flags])
    return str(folder / name)


@pytest.fixture
def two(tmp_path, capsys):
    own_data(tmp_path)
    own_data(tmp_path, "val")
    runs = [graded_run(tmp_path, "a", "ABABABAB"), graded_run(tmp_path, "b", "AAAAABAB")]
    capsys.readouterr()
    return SimpleNamespace(a=runs[0], b=runs[1], folder=tmp_path)


def shown(capsys, *arguments):
    capsys.readouterr()
    scoring.main([*map(str, arguments)])
    return capsys.readouterr().out


def headings(text):
    return [line for line in text.splitlines() if "jsonl, " in line and " - " not in line]


def rows(text):
    return [line for line in text.splitlines() if "[" in line and " - " not in line]


def test_each_other_run_is_compared_with_the_first(two, capsys):
    told = shown(capsys, two.a, two.b, two.a + "/")
    assert told.startswith("own.jsonl, test\n\n")
    line = f"{two.b} - {two.a}: -25.00 points [-62.50, 0.00], 0 better, 2 worse, McNemar p = 0.500"
    assert f"\n\n{line} (n = 8)\n{two.a}/ - {two.a}: +0.00 points" in told
    assert shown(capsys, two.a, two.b, two.a + "/") == told
    assert "points" not in shown(capsys, two.a)


def test_other_splits_and_other_data_are_never_compared_in_silence(two, capsys):
    other = graded_run(two.folder, "v", "ABABABAB", "val")
    assert f"{other} - {two.a}: not compared, they have no problem" in shown(capsys, two.a, other)
    own_data(two.folder, n=6, name="fewer.jsonl")
    less = graded_run(two.folder, "less", "AAABAB", "test", "fewer.jsonl")
    told = shown(capsys, two.a, less)
    assert "(n = 6, those that both answered; fewer.jsonl, test against own.jsonl, test)" in told
    assert headings(told) == ["own.jsonl, test", "fewer.jsonl, test"]  # a table each
    own_data(two.folder, name="turned.jsonl", question="!")
    turned = graded_run(two.folder, "turned", "ABABABAB", "test", "turned.jsonl")
    assert "not compared, 8 problems of the same id are different" in shown(capsys, two.a, turned)


def test_each_split_of_a_run_has_its_own_folder_and_heading(two, capsys):
    own = str(two.folder / "own.jsonl")
    config = {"model": "paligemma", "data": own, "test_split": "test", "epochs": [0.0], "seed": 1}
    Path(two.a, "config.json").write_text(json.dumps(config))
    graded_run(Path(two.a), "val", "BBBBBBBB", "val", own)
    test, val = shown(capsys, two.a), shown(capsys, two.a, "--split", "val")
    assert [headings(x) for x in (test, val)] == [["own.jsonl, test"], ["own.jsonl, val"]]
    assert [rows(x)[0].split()[1:4] for x in (test, val)] == [
        ["8", "50.00", "100.00"],
        ["8", "50.00", "50.00"],
    ]
    for folder, split in ((two.a, "test"), (f"{two.a}/val", "val")):
        assert json.loads(Path(folder, "metrics.json").read_text())["split"] == split


def test_a_run_is_graded_anew_and_its_broken_metrics_are_made_anew(two, capsys):
    before = shown(capsys, two.a)
    metrics = Path(two.a, "metrics.json")
    good = metrics.read_bytes()
    metrics.write_text(json.dumps(json.loads(good) | {"accuracy": {}}))  # of older rules, say
    assert shown(capsys, two.a) == before and metrics.read_bytes() == good
    stamp = metrics.stat().st_mtime_ns
    assert shown(capsys, two.a) == before and metrics.stat().st_mtime_ns == stamp


def test_what_is_not_there_is_said(two, capsys):
    table = shown(capsys, two.a, two.b)
    (two.folder / "own.jsonl").rename(two.folder / "moved.jsonl")
    scoring.main([two.a, two.b])
    told = capsys.readouterr()
    assert told.out.split("\n\n")[1] == table.split("\n\n")[1]
    assert "own.jsonl does not exist" in told.err and "not compared, the problems are" in told.out
    (two.folder / "moved.jsonl").rename(two.folder / "own.jsonl")
    Path(two.a, "predictions.jsonl").unlink()
    scoring.main([two.a])
    assert "predictions.jsonl does not exist" in capsys.readouterr().err
    Path(two.a, "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="no run folder"):
        scoring.main([two.a])
    Path(two.b, "predictions.jsonl").write_text('{"id": "q0", "resp')
    with pytest.raises(ValueError, match="predictions.jsonl, line 1 is not complete JSON"):
        scoring.main([two.b])


def test_limit_shows_the_first_problems_and_writes_nothing(two, capsys):
    files = [Path(two.b, name) for name in ("predictions.jsonl", "metrics.json")]
    before = [file.read_bytes() for file in files]
    told = shown(capsys, two.b, "--limit", "4")
    assert told.split("\navg")[1].split()[:3] == ["4", "50.00", "50.00"]
    assert [file.read_bytes() for file in files] == before
    where = ["--predictions", two.folder / "b-said.jsonl", "--data", two.folder / "own.jsonl"]
    assert rows(shown(capsys, *where, "--limit", 4)) == rows(told)
    with pytest.raises(SystemExit):
        scoring.main([two.b, "--limit", "0"])


def test_guesses_are_named_in_the_table_and_stay_named(two, capsys):
    guessed = graded_run(two.folder, "g", "AZZZZZZZ", "test", "own.jsonl", "--faithful-parse")
    told = capsys.readouterr().out
    assert told.startswith("own.jsonl, test, guessing where no answer was found\n")
    again = shown(capsys, guessed)
    assert headings(again) == headings(told) and rows(again) == rows(told)
    assert "guessing" not in shown(capsys, two.a)


@pytest.mark.slow
def test_ten_thousand_predictions_in_ten_seconds(tmp_path, capsys):
    own_data(tmp_path, n=10_000)
    start = time.process_time()
    run = graded_run(tmp_path, "run", "AB" * 5_000, "test", "own.jsonl", "--no-report")
    assert "100.00 [99.96, 100.00]" in shown(capsys, run, run + "/", "--no-report")
    assert time.process_time() - start < 20  # graded three times


# --- a table of many runs
def test_the_lines_of_an_ablation_are_compared_with_the_run_itself(two, capsys):
    args = SimpleNamespace(
        out=two.b, data=str(two.folder / "own.jsonl"), test_split="test", limit=8
    )
    runs = {"base": {"recipe": "answer"}, "not made": {"lr": 1.0}, "itself": {}}
    graded_run(Path(two.b), "base", "ABABABAB", source="../own.jsonl")
    rows = {name: tables.metrics_then(Path(two.b)) for name in runs}
    capsys.readouterr()
    ablations.show(args, ablations.lines_of(args, runs), rows)
    told = capsys.readouterr().out
    assert "own.jsonl, test: n = 8 problems" in told
    assert told.splitlines()[-1].startswith("base - itself: +25.00 points [")
    assert "not made - " not in told


# --- rows
def test_how_answers_end_stands_below():
    graded_ = graded([1, 1, 0, 0])
    first = metrics.metrics_of(graded_) | {"failure_modes": {"wrong": 1, "sound": 2, "loop": 1}}
    said = {"n": 4, "false_rationales": 50.0, "false_facts": 12.5}
    second = first | {"failure_modes": {"sound": 4}, "consistency": 75.0, "hallucination": said}
    lines = tables.table({"a": first, "b": second, "c": metrics.metrics_of(graded_)}).splitlines()
    told = [re.split("  +", line.strip()) for line in lines[-7:]]
    assert told == [
        ["rationale agrees %", "-", "75.00", "-"],
        ["false rationales %", "-", "50.00", "-"],
        ["false facts %", "-", "12.50", "-"],
        ["answers in %"],
        ["sound", "50.00 (2)", "100.00 (4)", "0.00 (0)"],
        ["loop", "25.00 (1)", "0.00 (0)", "0.00 (0)"],
        ["wrong", "25.00 (1)", "0.00 (0)", "0.00 (0)"],
    ]


def categories(problem):
    return [name for names in metrics.axes(problem).values() for name in names]


def test_rows_of_your_own_data_have_their_axis_in_the_name():
    meta = {"task": "text", "context": "text", "skill": "unused", "language": "en", "source": 3}
    own = problem(hint="h", meta=meta | {"skills": "text", "grade": "grade3", "family": "avg"})
    names = ["G1-6", "TXT", "avg", "task: text", "context: text", "skill: text", "language: en"]
    assert [x for x in categories(own) if x != "grade: grade3"] == names
    got = metrics.metrics_of([(own, {}, scoring.Grade(True, "A", ""))])
    assert got["axes"]["task"] == ["task: text"] and got["accuracy"]["task: text"] == 100.0
    assert got["accuracy"]["TXT"] == 100.0 and got["accuracy"]["NAT"] is None


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
    by_id = {p.id: p for p in problems}
    bard = tables.read_predictions(MATHVISTA / "results/bard/output_bard.json")
    assert len(bard) == 1000 and bard[0].keys() == {"id", "response"}
    got = scored(problems, bard)
    official = json.loads((MATHVISTA / "results/bard/scores_bard.json").read_text())
    records = json.loads((MATHVISTA / "annot_testmini.json").read_text()).values()
    skills = Counter(skill for x in records for skill in x["metadata"]["skills"])
    grades = Counter(x["metadata"]["grade"] for x in records)
    for axis, counts in {"skill": skills, "grade": grades}.items():
        official[axis] = {name: {"total": n} for name, n in counts.items()}
    for axis, names in got["axes"].items():
        theirs = official[axis.replace(" ", "_")]
        found = {name.removeprefix(f"{axis}: "): got["n_by"][name] for name in names}
        assert found == {name: x["total"] for name, x in theirs.items()}
    assert len(got["axes"]) == 9 and "NAT" not in got["accuracy"] and "TXT" not in got["n_by"]
    assert len(got["n_by"]) == 1 + sum(map(len, got["axes"].values()))  # no name twice
    assert got["axes"]["task"][0] == "figure question answering"
    assert all(got["n_by"][x] for x in categories(by_id["1"]))
    table = tables.table({"bard": got})
    assert len(table.splitlines()) < 60 and "GeoQA+" not in table
    assert "(--all-rows: 42 more, by question type, source, " in table
    assert "\nby source\n" in tables.table({"bard": got}, all_rows=True)
    assert max(map(len, table.splitlines())) < 80
