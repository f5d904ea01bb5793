"""evaluation/predictions.py: the layouts of other people's prediction files."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from support.evaluation.metrics import grade_all  # noqa: E402
from support.evaluation.predictions import read_predictions  # noqa: E402

REAL = Path(os.environ.get("NANOCOT_DATA", ROOT / "../shared/data"))
CASES = REAL.parent / "cases/files"
EXPECTED = [{"id": "7", "response": "B"}, {"id": "9", "response": "The answer is A."}]


def problem(id, index):
    choices = ("red", "blue")
    meta = {"answer_index": index}
    return data.Problem(id, "?", choices, choices[index], "", None, "", "", meta)


PROBLEMS = [problem("7", 1), problem("9", 0)]
PAIRS = [("7", "B"), ("9", "The answer is A.")]
LLAVA = [{"question_id": i, "prompt": "?", "text": x, "model_id": "m"} for i, x in PAIRS]
VLMEVALKIT = [{"index": int(i), "question": "?", "answer": "A", "prediction": x} for i, x in PAIRS]
WHOLE = {
    "a list": [{"id": i, "response": x} for i, x in PAIRS],
    "numbers as ids": [{"id": int(i), "response": x} for i, x in PAIRS],
    "a dictionary": dict(PAIRS),
    "mathvista": {i: {"question": "?", "answer": "3", "response": x} for i, x in PAIRS},
    "llava's list": LLAVA,
    "llava's results": {
        "correct": [{"question_id": "7", "pred": "B", "parsed_ans": "B"}],
        "incorrect": [{"question_id": "9", "pred": "The answer is A.", "parsed_ans": "A"}],
    },
    "scienceqa with outputs": {"acc": 1, "results": {"7": 1, "9": 0}, "outputs": dict(PAIRS)},
    "vlmevalkit": VLMEVALKIT,
    "by position": [x | {"index": i, "answer": "BA"[i]} for i, x in enumerate(VLMEVALKIT)],
}


@pytest.mark.parametrize("name", WHOLE)
def test_json_layouts(tmp_path, name):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(WHOLE[name], indent=1))
    assert read_predictions(file, PROBLEMS) == EXPECTED


def test_lines_and_tables(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(map(json.dumps, LLAVA)))
    assert read_predictions(lines) == EXPECTED
    for name, comma in (("p.csv", ","), ("p.tsv", "\t")):
        table = tmp_path / name
        rows = [["index", "question", "prediction"], ["7", '"a\nb"', "B"]]
        rows.append(["9", "?", "The answer is A."])
        table.write_text("\ufeff" + "\r\n".join(map(comma.join, rows)), encoding="utf-8")
        assert read_predictions(table) == EXPECTED


def test_indices_without_texts_are_letters(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"acc": 100.0, "results": {"7": 1, "9": -1}}))
    got = read_predictions(file)
    assert got == [{"id": "7", "response": "B"}, {"id": "9", "response": ""}]
    assert [g.correct for *_, g in grade_all(PROBLEMS, got)] == [True, False]


def test_failed_calls_are_no_predictions(tmp_path, capsys):
    file = tmp_path / "p.json"
    failed = {"pid": "9", "error": "timeout", "prediction": "3", "extraction": "3"}
    file.write_text(json.dumps({"7": {"response": "B", "error": ""}, "9": failed}))
    assert read_predictions(file) == EXPECTED[:1]
    assert "problem 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1, "b": 2},
        {"data": [1, 2]},
        [{"name": "7", "response": "B"}],
        [{"id": "7", "completion": "B"}],
        [["7", "B"]],
    ],
)
def test_an_unknown_layout_is_refused_with_those_that_are_known(tmp_path, content):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"(?s)p\.json.*VLMEvalKit.*mm-cot") as error:
        read_predictions(file)
    assert str(file) in str(error.value)


def test_answers_of_another_order_are_refused(tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(WHOLE["by position"]))
    with pytest.raises(ValueError, match="problem 9"):
        read_predictions(file, PROBLEMS[::-1])


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_dir(), reason=f"no {CASES}")
@pytest.mark.parametrize("name", sorted(x.name for x in CASES.glob("*")) if CASES.is_dir() else [])
def test_the_files_of_the_cases(name):
    folder, split = ("scienceqa", "test") if name.startswith("sqa") else ("mathvista", "testmini")
    problems = data.load(REAL / folder, split)
    graded = grade_all(problems, read_predictions(CASES / name, problems), partial=True)
    if name != "mv_err.json":  # three of its four calls failed, and the last is wrong
        assert all(g.correct for *_, g in graded) and len(graded) == len(problems)
    else:
        assert [x["id"] for _, x, _ in graded] == ["4"]
