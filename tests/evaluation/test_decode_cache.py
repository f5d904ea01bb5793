"""decode_cache.py: what one process decoded is found by the next, and by no other model."""

import pytest
import torch

from support.evaluation import decode_cache
from support.evaluation.decode_cache import DecodeCache, fingerprint


def test_a_result_is_that_of_its_weights_and_key(tmp_path):
    model = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(2, 2)
    DecodeCache(tmp_path, [model]).get_or_compute(["q1"], lambda: {"q1": "mine"})
    assert DecodeCache(tmp_path, [model]).get_or_compute(["q1"], dict) == {"q1": "mine"}
    assert DecodeCache(tmp_path, [other]).get_or_compute(["q1"], dict) == {}
    assert DecodeCache(tmp_path, [model]).get_or_compute(["q2"], dict) == {}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (7, 8192, 3 * 8192 + 5))
def test_every_bit_of_the_weights_counts(size, dtype):
    weights = torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    mapped = weights[1:]  # as in a file: its bytes begin anywhere
    expected = fingerprint(mapped)
    assert fingerprint(mapped.clone()) == expected and len(expected) < 8 * 8192
    for place in (0, size // 2, size - 1):
        other = mapped.clone()
        other.view(torch.uint8)[place * dtype.itemsize] ^= 1
        assert fingerprint(other) != expected
    if size > 8192:  # in another order
        assert fingerprint(mapped.roll(8192)) != expected


def test_any_number_of_processes_reads_what_others_wrote(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)

    def cache_of(rank):
        monkeypatch.setattr(decode_cache, "rank", lambda: rank)
        return DecodeCache(tmp_path, [model])

    for rank in (0, 1, 2):
        cache_of(rank).get_or_compute([f"q{rank}"], {"by": rank}.copy)
    names = [f"predictions.part{n}.jsonl" for n in ("", 1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with open(tmp_path / names[2], "a") as file:
        file.write('["torn')
    cache = cache_of(0)
    results = [cache.get_or_compute([f"q{i}"], dict) for i in (0, 1, 2, 3)]
    assert results == [{"by": 0}, {"by": 1}, {"by": 2}, {}]
    cache.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_is_cut_off_before_the_next_is_written(tmp_path):
    DecodeCache(tmp_path, []).get_or_compute(["q1"], dict)
    path = tmp_path / "predictions.part.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete + b'["torn')
    DecodeCache(tmp_path, []).get_or_compute(["q2"], dict)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == complete and len(lines) == 2
