"""Every shape comment of the product, against the real tensors: see tests/helpers/shapes.py."""

import subprocess
import sys

import pytest
import shapes
from conftest import ROOT


@pytest.mark.slow
def test_no_comment_lies():
    """In a process of its own: the product's files are imported in another form there."""
    command = [sys.executable, str(ROOT / "tests/helpers/shapes.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    for name, path in shapes.FILES.items():
        told = len(shapes.comments(path.read_text(encoding="utf-8")))
        said = f"\n{name}: {told} lines say a shape, {told} of them were checked"
        assert said in f"\n{run.stdout}" or not told


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
    monkeypatch.setattr(shapes, "FILES", {"toy": tmp_path / "toy.py"})
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


def test_a_line_whose_letters_share_a_size_does_not_count(tmp_path, monkeypatch):
    """(B, T) of a square tells nothing of the order: the second call does."""
    source = "def f(x):  # (B, T)\n    return x.T  # (T, B)\n"
    assert lies(tmp_path, monkeypatch, source, "import torch; f(torch.ones(3, 3))") == []
    assert not shapes.RECORD.apart
    assert lies(tmp_path, monkeypatch, source, "import torch; f(torch.ones(3, 5))") == []
    assert shapes.RECORD.apart == {("toy", 1), ("toy", 2)}


# Sizes that no model could have otherwise: heads times their width, an even head for RoPE, G * K
# query heads, a width of DETR that four divides, the patches of a square, and with a class token.
PRODUCTS = {11 * 4, 2 * 2, 17 * 5, 2 * 5, 2 * 3, 31 * 4, 7 * 7, 5 * 5, 5 * 5 + 1}


def test_sizes_are_distinct_and_primes_where_no_product_is_asked_for():
    sizes = [n for letter in shapes.FIXED["model"].values() for n in letter]
    assert len(sizes) == len(set(sizes)) and set(sizes) > PRODUCTS
    for n in set(sizes) - PRODUCTS:
        assert n > 1 and all(n % k for k in range(2, n)), n
