"""bench.py itself: its arithmetic, and that nothing is timed whose outputs differ."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import bench
import pytest
import torch

QUICK = ["--quick", "--no-memory", "--repeats", "1", "--device", "cpu", "--threads", "1"]


def toy(*flags):
    return bench.parse_args([*QUICK, *flags])


def side(output, amount=1, target=None):
    return bench.Side(lambda: lambda: output, amount, target)


def test_rows_have_medians_ratios_and_neighbours(monkeypatch, capsys):
    seconds = {"ours": [1.0, 2.0, 4.0], "slow": [4.0, 4.0, 2.0]}
    monkeypatch.setattr(bench, "take_turns", lambda *_: seconds)
    ours, slow = (side(torch.zeros(2), 8, target) for target in (None, 1.5))
    sides = (ours, {"slow": slow}, bench.close(0))
    [row] = bench.compare(toy(), "toy", "eights", "things/s", *sides)
    assert (row.ours, row.theirs, row.ratio) == (4.0, 2.0, 2.0)
    assert row.spread == (0.5, 4.0)
    slow.amount = ours.amount = 1
    [row] = bench.compare(toy(), "toy", "seconds", "s", *sides)
    assert (row.ours, row.theirs, row.ratio, row.spread) == (2.0, 4.0, 2.0, (0.5, 4.0))
    assert ">= 1.5 " in bench.line(row) and "missed" not in bench.line(row)
    row.at_most = True
    assert "<= 1.5 missed" in bench.line(row)


def test_sides_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "AB"}
    seconds = bench.take_turns(runs, toy("--repeats", "3"), "toy", dict.fromkeys("AB", 1.0))
    assert "".join(calls) == "ABABAB" and {len(s) for s in seconds.values()} == {3}


def test_different_outputs_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("timed"))
    opponents = {"other": side(torch.tensor([0.0, 2e-3]))}
    with pytest.raises(AssertionError, match="0.002 apart"):
        bench.compare(toy(), "toy", "", "s", side(torch.zeros(2)), opponents, bench.close(1e-3))
    with pytest.raises(AssertionError, match="shapes"):
        bench.compare(toy(), "toy", "", "s", side(torch.zeros(1, 2)), opponents, bench.close(1))


def test_decoding_that_differs_is_not_timed(monkeypatch):
    """The item itself, with the worst word at every step of ours."""
    pick = bench.nano.pick
    monkeypatch.setattr(bench.nano, "pick", lambda logits, *rest: pick(-logits, *rest))
    with pytest.raises(AssertionError, match="wrote different things"):
        bench.main([*QUICK, "--only", "mmcot-decode"])


@pytest.mark.slow
def test_training_that_differs_is_not_timed(monkeypatch):
    loss = bench.train.t5_loss

    def scaled(*args):
        total, count = loss(*args)
        return total * 1.002, count

    monkeypatch.setattr(bench.train, "t5_loss", scaled)
    with pytest.raises(AssertionError, match="loss and gradient"):
        bench.main([*QUICK, "--only", "mmcot-train"])


@pytest.mark.slow
def test_the_json_has_the_rows_of_the_table(tmp_path, capsys):
    file = tmp_path / "rows.json"
    bench.main([*QUICK, "--only", "mmcot-decode", "--json", str(file)])
    table, found = capsys.readouterr().out, json.loads(file.read_text())
    assert found["machine"]["threads"] == 1 and found["machine"]["torch"] == str(torch.__version__)
    assert [row["case"][:4] for row in found["rows"]] == ["demo", "demo"]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert row["case"] in table and row["unit"] == "tokens/s" and row["target"]


def test_the_plot_has_every_line_and_its_labels():
    lines = {"a step": ([1, 4, 64], [0.5, 2.0, 90.0], "red"), "flat": ([1, 4], [3.0, 3.0], "blue")}
    svg = bench.svg({("s", "batch"): lines, ("MiB", "batch"): lines})
    picture = ElementTree.fromstring("\n".join(svg))
    drawn = [e.get("points").split() for e in picture.iter() if e.tag.endswith("polyline")]
    assert [len(points) for points in drawn] == [3, 2, 3, 2]
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in drawn[1])
    assert x1 > x0 and y1 == y0
    texts = {e.text for e in picture.iter() if e.tag.endswith("text")}
    assert {"a step", "flat", "batch", "s", "MiB", "64", "linear"} <= texts


def test_live_bytes_are_exact():
    """Two tensors of 4 KB at once, then one of 8 KB; what was there before does not count."""
    old = torch.ones(1 << 20)

    def run():
        a = torch.ones(1000)
        b = a + 1  # 8,000 bytes
        del a
        old.add_(1)
        torch.cat((b, b)).view(2, -1).sum()  # 4,000 + 8,000 + 4

    assert bench.live_peak(run, [old]) == 12_004
    x = torch.ones(1000, requires_grad=True)
    kept = bench.live_peak(lambda: x.exp().exp().exp().sum(), [x])  # for the backward pass
    assert kept == 12_004


@pytest.mark.slow
def test_our_start_ends_in_a_step():
    """A script in a string, where no linter finds a name that has moved."""
    command = [sys.executable, "-c", bench.OUR_START, str(bench.ROOT / "demo/paligemma"), "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.ROOT)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.split()[-1]) < 20


@pytest.mark.slow
def test_memory_is_that_of_one_side_in_its_own_process(tmp_path):
    args = toy("--only", "detr")
    args.no_memory, args.folder = False, str(tmp_path)
    bench.made_once(args, "detr", lambda folder: bench.write_detr(bench.oracle.TINY_DETR, folder))
    peak = bench.peak_memory(args, "detr/batch 1, 64x96/ours")
    assert 100 * 2**20 < peak < 2 * 2**30
    with pytest.raises(RuntimeError, match="the memory of detr/batch 1, 64x96/nobody"):
        bench.peak_memory(args, "detr/batch 1, 64x96/nobody")
