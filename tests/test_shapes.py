"""Every shape comment of the product, against the real tensors: see tests/shapes.py."""

import subprocess
import sys

import pytest
import shapes
from conftest import ROOT


@pytest.mark.slow
def test_no_comment_lies():
    """In a process of its own: the product's files are imported in another form there."""
    command = [sys.executable, str(ROOT / "tests/shapes.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    for name in shapes.FILES:
        told = len(shapes.comments((ROOT / f"{name}.py").read_text(encoding="utf-8")))
        assert f"{name}.py: {told} lines say a shape, {told} of them were checked" in run.stdout


@pytest.mark.parametrize(
    "comment, shapes_",
    [
        ("# (B, T, D)", ([], [("B", "T", "D")])),
        ("# (B, N, T, H), (B, K, T, H)", ([], [("B", "N", "T", "H"), ("B", "K", "T", "H")])),
        ("# (B, 1) -> (B, V)", ([("B", "1")], [("B", "V")])),
        ("# (B,), the last", ([], [("B",)])),
        ("# (B, S), consecutive (as a rule, not always)", ([], [("B", "S")])),
        ("# (seen, as it were, by all)", None),
        ("# the last one (B, T)", None),
    ],
)
def test_what_a_comment_says(comment, shapes_):
    assert shapes.shapes_of(comment) == shapes_


def lies(tmp_path, monkeypatch, source, call):
    monkeypatch.setattr(shapes, "ROOT", tmp_path)
    monkeypatch.setattr(shapes, "RECORD", shapes.Record())
    (tmp_path / "toy.py").write_text(source)
    code, told, unplaced = shapes.instrumented("toy")
    names = {"__Frame__": shapes.Frame}
    exec(code, names)
    assert not unplaced
    exec(call, names)
    assert set(shapes.RECORD.checked["toy"]) == told
    return sorted(line for _, line in shapes.RECORD.lies)


def test_a_lie_is_found_wherever_it_stands(tmp_path, monkeypatch):
    source = """import torch

def f(x, y):  # (B, T), (B, D)
    z = x @ x.T  # (B, B)
    made = {
        "a": z.sum(0),  # (B,)
        "b": z[:1],  # (B, B)
    }
    for row in z:  # (T,)
        row += 1
    u, v = x, y  # (B, T), (B, T)
    return u.T @ v  # (T, D)

def g(x):  # (B, T) -> (B,)
    return x.sum(0)
"""
    call = "f(torch.ones(2, 3), torch.ones(2, 5)); g(torch.ones(2, 3))"
    assert lies(tmp_path, monkeypatch, source, call) == [7, 9, 11, 14]


def test_a_letter_has_the_sizes_that_the_configuration_gives(tmp_path, monkeypatch):
    source = "def f(x):  # (D,)\n    return x[:, None]  # (D, 1)\n"
    monkeypatch.setattr(shapes.RECORD, "sizes", {})
    assert lies(tmp_path, monkeypatch, source, "import torch; f(torch.ones(3))") == []
    record = shapes.RECORD
    record.sizes = {"toy": {"D": {5}}}
    frame = shapes.Frame("toy", "f")
    frame.check(__import__("torch").ones(3), [("D",)], 1)
    assert record.lies
