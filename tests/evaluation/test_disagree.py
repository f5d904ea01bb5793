"""tools/disagree.py: what it shows of two files of verdicts, and the labels that it takes."""

import json

import disagree
import pytest


def write(path, verdicts, key="correct"):
    rows = [{"id": i, key: x, "response": f"reply {i}"} for i, x in verdicts.items()]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def files(tmp_path):
    lines = [
        {"id": str(i), "question": f"q{i}?", "choices": ["x", "y"], "answer": 1, "split": "test"}
        for i in (1, 2, 3)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write(tmp_path / "a.jsonl", {"1": True, "2": True, "3": False})
    theirs = {"1": {"true_false": True}, "2": {"true_false": False}, "3": {"true_false": True}}
    (tmp_path / "b.json").write_text(json.dumps(theirs))
    a, b, own = (str(tmp_path / name) for name in ("a.jsonl", "b.json", "own.jsonl"))
    return [a, b, "--data", own]


def test_disagreements_are_shown(files, capsys):
    disagree.main(files)
    out = capsys.readouterr().out
    assert "q1?" not in out and "q2?" in out and "q3?" in out and "reply 2" in out
    assert "2 of 3 verdicts differ" in out


def test_labels_are_taken_once_and_counted(files, tmp_path, capsys, monkeypatch):
    labels = tmp_path / "labels.jsonl"
    keys = iter("rq")
    monkeypatch.setattr("builtins.input", lambda _: next(keys))
    disagree.main([*files, "--labels", str(labels), "--ask"])
    assert json.loads(labels.read_text()) == {"id": "2", "correct": True}
    keys = iter("xw")  # an unknown key is asked again; what has a label is not
    disagree.main([*files, "--labels", str(labels), "--ask"])
    assert len(labels.read_text().splitlines()) == 2
    out = capsys.readouterr().out
    assert "a.jsonl: 2 of 2" in out and "b.json: 0 of 2" in out


def test_a_record_without_a_verdict_is_named(files, tmp_path):
    write(tmp_path / "a.jsonl", {"1": True}, key="score")
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1"):
        disagree.main(files)
