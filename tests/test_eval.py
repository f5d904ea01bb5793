"""eval.py: answers, run folders side by side, files of predictions, one question."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from graded import graded_run, own_data, problem, says
from PIL import Image

import data
import eval as evaluation
from demo import scenes
from fusion import GatedFusion, MultimodalT5
from model import T5
from support.evaluation import grading, metrics, tables
from support.evaluation.models import image_features
from support.training import ablations
from support.training.settings import parse_args

T5_FOLDER = ROOT / "demo/t5"


# --- answers
@pytest.mark.parametrize(
    "response, parsed, how",
    [
        ("The answer is (B).", "B", "letter"),
        ("Solution: it is so. The answer is (B) because", "B", "letter"),
        ("The answer is (D).", None, "letter not among the options"),
        ("The answer is (Z).", None, "letter not among the options"),
        ("The answer is (B). The answer is (B).", None, "several answers"),
        ("The answer is (A). The answer is (B).", None, "several answers"),
        ("The answer is (b).", None, "no answer found"),
        ("the answer is (B).", None, "no answer found"),
        ("(B)", "B", "letter"),  # PaliGemma's forms
        ("no", "B", "choice text"),
        ("Look: A or C.\nAnswer: B", "B", "letter"),
        ("Answer: D", None, "no answer found"),
        ("", None, "no answer found"),
    ],
)
def test_letter_is_read_or_the_parse_failed(response, parsed, how):
    """By ScienceQA's published rule."""
    right, wrong = problem(index=1), problem(index=0)
    got = evaluation.grade(right, response, strict=True)
    assert got == grading.Grade(parsed == "B", parsed, how)
    assert evaluation.grade(wrong, response, strict=True) == replace(got, correct=False)


def test_the_index_decides_between_choices_of_the_same_text():
    twins = problem(choices=("cat", "cat"), index=1)
    assert evaluation.grade(twins, says("B")).correct
    assert not evaluation.grade(twins, says("A")).correct
    without_index = problem(choices=("cat", "dog"), index=1, meta={"answer_index": None})
    assert evaluation.grade(without_index, says("B")).correct


# --- predictions on the command line
def test_command_line_grades_a_file_and_shows_runs(tmp_path, capsys):
    own_data(tmp_path, n=4)
    lines = [{"id": f"testq{i}", "response": r, "mine": i}
             for i, r in enumerate([says("A"), says("B"), says("B"), "hm"])]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    where = ["--predictions", str(tmp_path / "p.jsonl"), "--data", str(tmp_path / "own.jsonl")]
    out = tmp_path / "runs/x"
    evaluation.main([*where, "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"^avg +4 +50\.00 +50\.00 \[15\.00, 85\.00\]$", printed, re.M)
    written = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert written[2].pop("because")
    assert written[2] == {"id": "testq2", "response": says("B"), "mine": 2, "correct": False,
                          "parsed": "B", "how": "letter in words", "kind": "wrong"}  # fmt: skip
    assert [x["kind"] for x in written] == ["right", "right", "wrong", "no parse"]
    assert json.loads((out / "metrics.json").read_text())["parse_failures"] == 25.0
    evaluation.main([str(out), f"{out}/"])
    assert len(re.findall(r"50\.00 \[15\.00, 85\.00\]", capsys.readouterr().out)) >= 2
    with pytest.raises(FileNotFoundError):
        evaluation.main([str(tmp_path)])


@pytest.mark.slow
def test_command_line_errors_are_sentences(tmp_path):
    where = ["--predictions", str(tmp_path / "p.jsonl"), "--data", str(own_data(tmp_path))]
    (tmp_path / "p.jsonl").write_text('{"id": "q0", "response": "x"}\n{"id": ')
    command = [sys.executable, ROOT / "eval.py", *where]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.match(r"eval\.py: .*p\.jsonl, line 2 ", run.stderr)
    for wrong in ([], ["run", *where], ["--predictions", "x"], ["run", "--data", "x"]):
        with pytest.raises(SystemExit):
            evaluation.parse_args(wrong)


@pytest.mark.slow
def test_ten_thousand_predictions_in_ten_seconds(tmp_path, capsys):
    own_data(tmp_path, n=10_000)
    start = time.process_time()
    run = graded_run(tmp_path, "run", "AB" * 5_000, "test", "own.jsonl", "--no-report")
    assert "100.00 [99.96, 100.00]" in shown(capsys, run, run + "/", "--no-report")
    assert time.process_time() - start < 20  # graded three times


def test_only_a_trained_run_has_novel_answers(tmp_path):
    scenes.write(tmp_path / "demo", {"train": 1, "val": 1, "test": 3})
    where = str(tmp_path / "demo")
    problems = data.load(where, "test")
    predictions = []
    for p in problems:
        rationale = data.prompt(p, "QCM-LE")[1]
        letter = says("ABCDE"[p.meta["answer_index"]])
        predictions.append({"id": p.id, "response": letter, "rationale": rationale})
    graded = metrics.grade_all(problems, predictions)
    subject = evaluation.about(where, "test", None)

    def kinds(config):
        return evaluation.assess(graded, subject, config)[0]["failure_modes"]

    config = {"data": where, "epochs": [1.0]}  # one problem, about magnets
    assert kinds(config) == {"sound": 1, "novel": 2}
    assert kinds(config | {"epochs": [0.0], "adapter": "a"}) == {"sound": 1, "novel": 2}
    for untrained in (None, config | {"epochs": [0.0]}, config | {"data": "nothing"}):
        assert kinds(untrained) == {"sound": 3}


# --- folders side by side
@pytest.fixture
def two(tmp_path, capsys):
    own_data(tmp_path)
    own_data(tmp_path, "val")
    runs = [graded_run(tmp_path, "a", "ABABABAB"), graded_run(tmp_path, "b", "AAAAABAB")]
    capsys.readouterr()
    return SimpleNamespace(a=runs[0], b=runs[1], folder=tmp_path)


def shown(capsys, *arguments):
    capsys.readouterr()
    evaluation.main([*map(str, arguments)])
    return capsys.readouterr().out


def headings(text):
    return [line for line in text.splitlines() if "jsonl, " in line and " - " not in line]


def rows(text):
    return [line for line in text.splitlines() if "[" in line and " - " not in line]


def test_each_other_run_is_compared_with_the_first(two, capsys):
    text = shown(capsys, two.a, two.b, two.a + "/")
    assert text.startswith("own.jsonl, test\n\n")
    line = f"{two.b} - {two.a}: -25.00 points [-62.50, 0.00], 0 better, 2 worse, McNemar p = 0.500"
    assert f"\n\n{line} (n = 8)\n{two.a}/ - {two.a}: +0.00 points" in text
    assert shown(capsys, two.a, two.b, two.a + "/") == text
    assert "points" not in shown(capsys, two.a)


def test_other_splits_and_other_data_are_never_compared_in_silence(two, capsys):
    other = graded_run(two.folder, "v", "ABABABAB", "val")
    assert f"{other} - {two.a}: not compared, " in shown(capsys, two.a, other)
    own_data(two.folder, n=6, name="fewer.jsonl")
    less = graded_run(two.folder, "less", "AAABAB", "test", "fewer.jsonl")
    text = shown(capsys, two.a, less)
    assert "(n = 6, those that both answered; fewer.jsonl, test against own.jsonl, test)" in text
    assert headings(text) == ["own.jsonl, test", "fewer.jsonl, test"]  # a table each
    own_data(two.folder, name="turned.jsonl", question="!")
    turned = graded_run(two.folder, "turned", "ABABABAB", "test", "turned.jsonl")
    assert f"{turned} - {two.a}: not compared, 8 problems" in shown(capsys, two.a, turned)


def test_a_config_without_data_is_one_of_the_graded_problems(two, capsys):
    config = {"model": "mmcot", "recipe": "two-stage", "test_split": "test", "epochs": [1.0]}
    Path(two.a, "config.json").write_text(json.dumps(config))
    assert rows(shown(capsys, two.a))


def test_each_split_of_a_run_has_its_own_folder_and_heading(two, capsys):
    own = str(two.folder / "own.jsonl")
    config = {"model": "paligemma", "data": own, "test_split": "test", "epochs": [0.0], "seed": 1}
    Path(two.a, "config.json").write_text(json.dumps(config))
    graded_run(Path(two.a), "val", "BBBBBBBB", "val", own)
    for split, rate in (("test", "100.00"), ("val", "50.00")):
        text = shown(capsys, two.a, "--split", split)
        assert headings(text) == [f"own.jsonl, {split}"]
        assert rows(text)[0].split()[1:4] == ["8", "50.00", rate]
        folder = two.a if split == "test" else f"{two.a}/val"
        assert json.loads(Path(folder, "metrics.json").read_text())["split"] == split


def test_a_run_is_graded_again_and_its_broken_metrics_are_replaced(two, capsys):
    before = shown(capsys, two.a)
    metrics = Path(two.a, "metrics.json")
    good = metrics.read_bytes()
    metrics.write_text(json.dumps(json.loads(good) | {"accuracy": {}}))  # of older rules, say
    assert shown(capsys, two.a) == before and metrics.read_bytes() == good
    stamp = metrics.stat().st_mtime_ns
    assert shown(capsys, two.a) == before and metrics.stat().st_mtime_ns == stamp


def test_stored_metrics_are_shown_where_problems_or_predictions_are_gone(two, capsys):
    table = shown(capsys, two.a, two.b)
    own = two.folder / "own.jsonl"
    own.rename(two.folder / "moved.jsonl")
    evaluation.main([two.a, two.b])
    printed = capsys.readouterr()
    assert printed.out.split("\n\n")[1] == table.split("\n\n")[1]
    assert str(own) in printed.err and f"{two.b} - {two.a}: not compared" in printed.out
    with pytest.raises(FileNotFoundError):
        evaluation.main([two.a, "--limit", "2"])
    (two.folder / "moved.jsonl").rename(own)
    Path(two.a, "predictions.jsonl").unlink()
    evaluation.main([two.a])
    assert f"{two.a}/predictions.jsonl" in capsys.readouterr().err
    Path(two.a, "metrics.json").unlink()
    with pytest.raises(FileNotFoundError):
        evaluation.main([two.a])
    Path(two.b, "predictions.jsonl").write_text('{"id": "q0", "resp')
    with pytest.raises(ValueError, match="predictions.jsonl, line 1 "):
        evaluation.main([two.b])


def test_limit_shows_the_first_problems_and_writes_nothing(two, capsys):
    files = [Path(two.b, name) for name in ("predictions.jsonl", "metrics.json")]
    before = [file.read_bytes() for file in files]
    text = shown(capsys, two.b, "--limit", "4")
    assert text.split("\navg")[1].split()[:3] == ["4", "50.00", "50.00"]
    assert [file.read_bytes() for file in files] == before
    where = ["--predictions", two.folder / "b-predictions.jsonl"]
    where += ["--data", two.folder / "own.jsonl"]
    assert rows(shown(capsys, *where, "--limit", 4)) == rows(text)
    with pytest.raises(SystemExit):
        evaluation.main([two.b, "--limit", "0"])


def test_guesses_are_named_in_the_table_and_stay_named(two, capsys):
    guessed = graded_run(two.folder, "g", "AZZZZZZZ", "test", "own.jsonl", "--faithful-parse")
    first = capsys.readouterr().out
    assert first.startswith("own.jsonl, test, guessing")
    again = shown(capsys, guessed)
    assert headings(again) == headings(first) and rows(again) == rows(first)
    assert "guessing" not in shown(capsys, two.a)


def test_the_lines_of_an_ablation_are_compared_with_the_run_itself(two, capsys):
    flags = ["--model", "mmcot", "--out", two.b, "--data", str(two.folder / "own.jsonl")]
    settings = parse_args([*flags, "--limit", "8"])
    runs = {"base": {"recipe": "answer"}, "not made": {"lr": 1.0}, "itself": {}}
    graded_run(Path(two.b), "base", "ABABABAB", source="../own.jsonl")
    metrics = {name: tables.read_metrics(two.b) for name in runs}
    capsys.readouterr()
    ablations.show(settings, ablations.lines_of(settings, runs), metrics)
    text = capsys.readouterr().out
    assert "own.jsonl, test: n = 8 problems" in text
    assert text.splitlines()[-1].startswith("base - itself: +25.00 points [")
    assert "not made - " not in text


# --- run folders: one question, attention maps
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of both models as they are before training; of the fusion with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    t5 = T5.from_pretrained(T5_FOLDER)
    mm = MultimodalT5(t5, GatedFusion(t5.config.d_model, 64))
    mm.fusion.image_dense.weight.data.mul_(9)  # else an image changes no word
    for stage in ("rationale", "answer"):
        mm.save_pretrained(folder / "mm" / stage)
        shutil.copy(T5_FOLDER / "tokenizer.json", folder / "mm" / stage)
    (folder / "pali").mkdir()
    for name, flags in {
        "mm": "mmcot --max-output 12 6",
        "pali": "paligemma --max-output 6 2",
    }.items():
        cache = ["--features-cache", str(folder / f"cache-{name}")]
        config = vars(parse_args(["--device", "cpu", *cache, "--model", *flags.split()]))
        (folder / name / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (96, 96), "red").save(folder / "red.png")
    return folder


@pytest.mark.parametrize("name", ["mm", "pali"])
def test_the_printed_text_is_the_prediction(runs, name, capsys, monkeypatch):
    """With an image and without; and where the answer was forced, that is printed."""
    results = []
    predict = evaluation.predict

    def watched(*given):
        results.extend(predict(*given))
        return results[-1:]

    monkeypatch.setattr(evaluation, "predict", watched)
    for image in ([], ["--image", str(runs / "red.png")]):
        choices = ["--choices", "red", "blue"]
        question = ["--question", "Which colour is it?"]
        evaluation.main([str(runs / name), *question, *choices, *image])
        printed, x = capsys.readouterr(), results[-1]
        text = "\n".join(([x["rationale"]] if name == "mm" else []) + [x["response"].rstrip()])
        assert re.fullmatch(re.escape(text) + r"(  \((red|blue)\))?\n+", printed.out)
        if name == "pali":
            assert x["forced_after"] == "length" and "length" in printed.err
        else:
            assert printed.err == ("" if x["stop"] == "eos" else f"(stopped: {x['stop']})\n")
    assert results[0] != results[1]


def test_errors_of_asking(runs, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    ask = ["--question", "What?"]
    for flags, error, named in [
        ([runs / "mm", *ask, "--image", tmp_path / "no.png"], FileNotFoundError, "no.png"),
        ([runs / "mm", *ask, "--image", tmp_path / "bad.png"], ValueError, "bad.png"),
        ([runs / "mm", *ask, "--choices", *"abcdefghijk"], ValueError, "11 choices"),
        ([tmp_path, *ask], FileNotFoundError, str(tmp_path)),
        ([T5_FOLDER, *ask], ValueError, "config.json"),
    ]:
        with pytest.raises(error, match=named):
            evaluation.main(list(map(str, flags)))
    for flags in (["--image", "x.png"], ["--choices", "a"], ["another", *ask], ["--question", ""]):
        with pytest.raises(SystemExit):
            evaluation.main([str(runs / "mm"), *flags])
        assert "--question TEXT" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mm", "pali"])
def test_attention_maps_change_no_prediction(runs, name, tmp_path):
    shutil.copytree(runs / name, tmp_path / "run")
    settings, models, tokenizer = evaluation.load_run(tmp_path / "run")
    problems = data.load("demo", "test")[:3]
    features = image_features(settings, problems, models[0] if name == "pali" else None)
    written = {}
    for count in (0, 2):
        inputs = (models, problems, settings, tokenizer, features)
        evaluation.evaluate(tmp_path / "run", *inputs, attention_maps=count)
        files = ("predictions.jsonl", "metrics.json", "looks.json")
        written[count] = [(tmp_path / "run" / file).read_text() for file in files]
    assert written[0][:2] == written[2][:2] and '"ids"' not in written[2][0]
    assert json.loads(written[0][2]) == {}
    maps = json.loads(written[2][2])
    assert list(maps) == [p.id for p in problems[:2]]
    for line in map(json.loads, written[2][0].splitlines()[:2]):
        shown_map = maps[line["id"]]
        if name == "pali":
            text = "".join("".join(shown_map["tokens"]).split())
            assert text == "".join(line["response"].split())
            assert len(shown_map["p"]) == len(shown_map["tokens"])
            assert all(0 <= p <= 1 for p in shown_map["p"])
        else:
            assert [x["stage"] for x in shown_map] == ["rationale", "answer"]
            source = " ".join("".join(shown_map[1]["tokens"]).split())
            assert line["rationale"].strip() in source
