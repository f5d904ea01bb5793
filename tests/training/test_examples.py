"""What a run learns from: the rows of traces, and the bad records that it does without."""

import os
import shutil
from pathlib import Path

import pytest
from small_runs import PALIGEMMA, SMALL, lines_of, settings, spoiled_data, steps, write_lines

import data
import eval as evaluation
import train
from demo import scenes, teacher
from support.dataset import features, images
from support.dataset.traces import load_traces
from support.files import read_json
from support.training import examples

pytestmark = pytest.mark.usefixtures("read_once")
REAL = Path(os.environ["NANOCOT_DATA"])  # see conftest.py
needs_real_traces = pytest.mark.skipif(
    not (REAL / "pali_reason/training_correct.csv").is_file()
    or not (REAL / "mathvista/annot_testmini.json").is_file(),
    reason=f"no pali_reason or no MathVista in {REAL}; set NANOCOT_DATA",
)
# ---- rows of traces ------------------------------------------------------------------------------


def rows_of(problems, *flags):
    return examples.training_rows(settings("paligemma", *flags), problems)


GOOD = {
    "all": lambda verdict: True,
    "correct": lambda verdict: verdict["correct"],
    "consistent": lambda verdict: verdict["correct"] and verdict["consistent"],
}


@pytest.mark.parametrize("keep, share", [("all", 1), ("correct", 0.72), ("consistent", 0.62)])
def test_the_demos_traces_that_are_kept(keep, share, capsys):
    """Against the verdicts in the file itself."""
    problems = data.load("demo", "train")[:300]
    verdicts = {t["id"]: t["verdict"] for t in lines_of(teacher.traces(scenes.demo_folder()))}
    expected = [p.id for p in problems if GOOD[keep](verdicts[p.id])]
    rows = rows_of(problems, "--keep", keep)
    assert [row.problem.id for row in rows] == expected
    assert all(row.task == "reason" and row.has_suffix for row in rows)
    assert all(row.trace["id"] == row.problem.id for row in rows)
    assert len(expected) / 300 == pytest.approx(share, abs=0.06)
    every = len(data.load("demo", "train"))
    out = capsys.readouterr().out
    assert f"{len(expected)} of {every} traces" in out and f"; {every - 300} are" in out
    if keep == "consistent":
        assert rows == rows_of(problems)  # the default


def own_problems(n=8):
    """Records of a .jsonl with questions in words that the demo's tokenizer knows."""
    split = ["train"] * (n - 2) + ["val", "test"]
    return [
        {"id": f"p{i}", "question": "Which is most?", "choices": ["red", "blue", "green"],
         "answer": i % 3, "solution": f"So the answer is {('red', 'blue', 'green')[i % 3]}.",
         "split": split[i]}
        for i in range(n)
    ]  # fmt: skip


def own_trace(id, correct=True, consistent=True, answer="red", thought="So it is."):
    verdict = {"correct": correct, "consistent": consistent}
    text = {"id": id, "question": "Which is most?", "thought": thought, "answer": answer}
    return text | {"verdict": verdict}


def own_traces(n=6):
    return [own_trace(f"p{i}") for i in range(n)]


@pytest.fixture
def own(tmp_path):
    """(problems, function of traces and flags -> rows) of six problems."""
    file = write_lines(tmp_path / "own.jsonl", own_problems())
    problems = data.load(file, "train")

    def rows(traces, *flags):
        path = write_lines(tmp_path / "traces.jsonl", traces)
        return rows_of(problems, "--data", file, "--weights", PALIGEMMA, "--traces", path, *flags)

    return problems, rows


def test_without_traces_the_datas_own_solutions_are_the_thoughts(tmp_path, capsys):
    records = own_problems()
    records[1]["solution"] = ""
    file = write_lines(tmp_path / "own.jsonl", records)
    problems = data.load(file, "train")
    rows = rows_of(problems, "--data", file, "--mix", "0")
    assert [row.problem.id for row in rows] == ["p0", "p2", "p3", "p4", "p5"]
    assert data.pali_suffix(rows[1].problem, rows[1].trace) == "So the answer is green.\nAnswer: C"
    assert "5 solutions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="No trace"):
        rows_of(problems[1:2], "--data", file)


def test_answer_rows_are_one_for_each_problem_of_the_kept_traces(own):
    """Otherwise the baseline would learn other problems than the run, or some of them twice."""
    problems, rows = own
    traces = [own_trace("p1"), own_trace("p1", thought="Look."), own_trace("p2", correct=False)]
    traces += [own_trace("p4"), own_trace("p3", consistent=False)]
    answers = rows(traces, "--recipe", "answer")
    assert answers == [data.TrainRow(problems[i], "answer") for i in (1, 4)]
    reasons = [(row.problem.id, row.trace["thought"]) for row in rows(traces, "--mix", "0")]
    assert reasons == [("p1", "So it is."), ("p1", "Look."), ("p4", "So it is.")]


@pytest.mark.parametrize(
    "traces, mix, ids",
    [(1, 0, []), (1, 0.5, [0, 2, 4]), (1, 1, [0, 1, 2, 3, 4, 5]),
     (2, 1.5, [i for i in range(6) for _ in range(3)])],  # more answers than problems
)  # fmt: skip
def test_answer_only_rows_are_mixed_in_evenly(own, traces, mix, ids):
    problems, rows = own
    mixed = rows(own_traces() * traces, "--mix", str(mix))
    assert [row.task for row in mixed] == ["reason"] * 6 * traces + ["answer"] * len(ids)
    assert mixed[6 * traces :] == [data.TrainRow(problems[i], "answer") for i in ids]


def test_limit_traces_counts_kept_ones(own):
    traces = [own_trace(f"p{i}", correct=i % 2 == 0) for i in range(6)]
    rows = own[1](traces, "--limit-traces", "2", "--mix", "1")
    assert [(row.problem.id, row.task) for row in rows] == [
        ("p0", "reason"), ("p2", "reason"), ("p0", "answer"), ("p2", "answer")
    ]  # fmt: skip


def test_traces_of_other_problems_are_counted(own, capsys):
    rows = own[1]
    rows([own_trace("p0"), own_trace("p6"), own_trace("x"), own_trace("p1", correct=False)])
    out = capsys.readouterr().out
    assert "1 of 4 traces" in out and "; 2 are" in out
    with pytest.raises(ValueError, match="--traces, --keep and --data"):
        rows([own_trace("p6")])


def test_where_nobody_judged_the_answer_decides(own):
    traces = [
        own_trace("p0", None, None, "The answer is (A)."),
        own_trace("p1", None, None, "The answer is (A)."),
        own_trace("p2", True, None, "\\boxed{green}"),
        own_trace("p3", True, None, "blue"),
        own_trace("p4", None, True, "blue"),
        own_trace("p5", False, None, "green"),
    ]
    for keep, ids in {"all": "012345", "correct": "0234", "consistent": "024"}.items():
        rows = own[1](traces, "--mix", "0", "--keep", keep)
        assert [row.problem.id for row in rows] == [f"p{i}" for i in ids]


@needs_real_traces
def test_the_real_traces_that_are_kept(capsys):
    """Eight of the 251 that Claude let through do not end in the gold answer."""
    problems = data.load(str(REAL / "mathvista"), "testmini")

    def kept(file, *more):
        flags = ["--data", str(REAL / "mathvista"), "--mix", "0", "--traces"]
        rows = rows_of(problems, *flags, str(REAL / "pali_reason" / file), *more)
        return [row.trace["id"] for row in rows]

    every = kept("training_correct.csv", "--keep", "correct")
    assert "MathVista is a test set" in capsys.readouterr().err  # not licensed for training
    consistent = kept("training_correct.csv")
    assert (len(every), len(consistent)) == (251, 243)
    gone = {"20", "35", "107", "126", "140", "226", "255", "337"}  # as in test_traces.py
    assert consistent == [i for i in every if i not in gone]
    unjudged = kept("training.csv")
    assert len(kept("training.csv", "--keep", "all")) == 335
    assert set(consistent) <= set(unjudged) and len(unjudged) < 335


# ---- bad records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_bad_records_are_skipped_and_counted_in_all_splits(name, tmp_path, capsys, monkeypatch):
    spoiled = spoiled_data(tmp_path / "data")
    cache = ["--features-cache", str(tmp_path / "cache")]
    flags = [*SMALL[name], "--data", str(spoiled), *cache, "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="train1|whole|line 4"):
        train.main(flags)
    assert not (tmp_path / "run").exists()
    opened, real = [], images.open_image
    for module in (features, images):
        monkeypatch.setattr(module, "open_image", lambda path: opened.append(path) or real(path))
    monkeypatch.setattr(evaluation, "write_report", lambda *args: None)
    monkeypatch.setattr(examples, "warn_of_overlap", lambda *args: None)
    train.main([*flags, "--on-error", "skip"])
    assert opened and len(opened) == len(set(opened))  # no image is decoded twice
    monkeypatch.undo()
    skipped = lines_of(tmp_path / "run/skipped.jsonl")
    narrow = {"test2": "test"} if name == "mmcot" else {}
    assert {x["id"]: x["split"] for x in skipped} == narrow | {
        "train1": "train", "train2": "train", "whole": "train", "val0": "val", "test0": "test",
        "test1": "test", "line 17": None,
    }  # fmt: skip
    assert all(len(x["reason"]) > 20 for x in skipped)
    metrics = read_json(tmp_path / "run/metrics.json")
    left = 5 - 2 - len(narrow)
    assert metrics["n"] == left and metrics["skipped"]["test"] == 5 - left
    assert metrics["skipped"] | {"test": 0, "traces": 0} == {
        "train": 3, "val": 1, "test": 0, "split unknown": 1, "traces": 0
    }  # fmt: skip
    table = capsys.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert rows["skipped, test"] == [str(5 - left)] and rows["skipped, split unknown"] == ["1"]
    least = metrics["accuracy"]["avg"] * left / 5
    assert float(rows["avg, skipped as wrong"][0]) == pytest.approx(least, abs=0.006)
    again = evaluation.parse_args([str(tmp_path / "run"), "--no-report"])
    assert evaluation.score_run(tmp_path / "run", again).scores == metrics


def test_bad_traces_are_skipped(tmp_path):
    good = {"id": "1", "question": "q", "thought": "So.", "answer": "A"}
    file = Path(
        write_lines(tmp_path / "t.jsonl", [good, good | {"id": [1]}, good | {"verdict": 3}])
    )
    file.write_text(f"{file.read_text()}{{\n")
    with pytest.raises(ValueError, match="line 2"):
        load_traces(file)
    skipped = []
    assert len(load_traces(file, skipped)) == 1
    assert [id for id, _ in skipped] == ["line 2", "line 3", "line 4"]


TINY = "--model paligemma --device cpu --limit 8 --eval-problems 2 --max-output 8 4".split()


@pytest.fixture
def with_images(tmp_path):
    """A function: writes a .jsonl whose problems have images, of those named the file is missing;
    returns flags."""
    source = next(p.image for p in data.load("demo", "train") if p.image)

    def flags(*missing):
        records = own_problems()
        for record in records:
            record["image"] = f"{record['id']}.png"
            if record["id"] not in missing:
                shutil.copy(source, tmp_path / record["image"])
        file = write_lines(tmp_path / "own.jsonl", records)
        return [
            *TINY, "--alone", "--data", file, "--weights", PALIGEMMA, "--max-suffix", "90",
            "--batch-size", "4", "--features-cache", str(tmp_path / "cache"), "--epochs", "1",
            "--max-steps", "2", "--out", str(tmp_path / "run"),
        ]  # fmt: skip

    return flags


def test_a_missing_training_image_stops_the_run_or_is_skipped(with_images, tmp_path, capsys):
    flags = with_images("p3")
    with pytest.raises(FileNotFoundError, match=r"p3\.png"):
        train.main(flags)
    assert not (tmp_path / "run").exists()
    train.main([*flags, "--on-error", "skip"])
    out = capsys.readouterr().out
    assert "1 of train" in out and "6 solutions" in out
    [line] = lines_of(tmp_path / "run/skipped.jsonl")
    assert line["id"] == "p3" and line["split"] == "train" and "p3.png" in line["reason"]
    log = steps((tmp_path / "run/log.jsonl").read_text())
    assert sum(x["examples"] for x in log) == 4  # p0 is held out, p3 skipped
    assert read_json(tmp_path / "run/metrics.json")["n"] == 1
    # All images are copies of one.
    assert "1 of 1 test problems" in out and "(p7)" in out


def test_no_image_at_all_is_no_silent_run_of_the_base(with_images, tmp_path):
    flags = with_images(*(f"p{i}" for i in range(6)))
    with pytest.raises(ValueError, match=r"of train.*p0\.png"):
        train.main([*flags, "--on-error", "skip"])
    assert not (tmp_path / "run").exists()


def test_your_own_data_need_all_three_splits(tmp_path):
    record = {"id": 1, "question": "?", "choices": ["a", "b"], "answer": 0, "split": "train"}
    file = write_lines(tmp_path / "own.jsonl", [record])
    with pytest.raises(ValueError, match="own.jsonl.*val.*train, val, test"):
        examples.load_splits(settings("mmcot", "--data", file))
