"""Whole runs that are killed at any moment, stopped or on a full disk, and resumed: the same files
as without. The processes are forked."""

import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from small_runs import MMCOT, PALI, ended, results, started

import data
from support.dataset.traces import load_traces
from support.evaluation import errors
from support.training import examples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(read_once):
    """Read before processes are forked: they have it."""
    for split in ("train", "val", "test"):
        data.load("demo", split)
    load_traces(examples.demo_traces())
    errors.scene_facts("demo")


def final_table(folder):
    lines = folder.with_suffix(".out").read_text().splitlines()[-15:-2]
    return [line.replace(str(folder), "RUN") for line in lines]


@pytest.mark.parametrize("flags, kills", [(MMCOT, 13), (PALI, 12)], ids=["mmcot", "paligemma"])
def test_sigkill_at_random_moments(flags, kills, demo, tmp_path):
    whole, chance, count, finished = tmp_path / "whole", random.Random(6), 0, 0
    start = time.monotonic()
    assert ended(started(whole, flags)) == 0
    seconds, folder = time.monotonic() - start, tmp_path / "run0"
    status = -signal.SIGKILL
    while count < kills or status:
        again = ["--resume"] if status and count else []
        pid = started(folder, [*flags, *again])
        status = ended(pid, chance.uniform(0, 0.7 * seconds) if count < kills else None)
        count += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), folder.with_suffix(".error").read_text()
        if status == 0:
            left, expected = results(folder), results(whole)
            assert left.keys() == expected.keys()
            assert [name for name in left if left[name] != expected[name]] == []
            assert final_table(folder) == final_table(whole)
            finished += 1
            folder = tmp_path / f"run{finished}"
    print(f"{count} kills of {finished} runs of {seconds:.1f} s")


@pytest.fixture
def small_disk(tmp_path):
    """size -> mounts a tmpfs of so many KiB, or changes the size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, *options):
        options = ["-o", ",".join([*options, f"size={size}k"]), "tmpfs", str(disk)]
        ran = subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {ran.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


@pytest.mark.parametrize("size", [6_000, 14_000])
def test_a_disk_that_is_really_full(size, small_disk, demo, tmp_path):
    assert ended(started(tmp_path / "whole", MMCOT)) == 0
    folder = small_disk(size) / "run"
    assert ended(started(folder, MMCOT)) == 1
    error = folder.with_suffix(".error").read_text()
    assert "OSError" in error and "disk is full" in error
    small_disk(64_000, "remount")
    assert ended(started(folder, [*MMCOT, "--resume"])) == 0
    assert results(folder) == results(tmp_path / "whole")


def test_sigterm_of_the_command_exits_0(tmp_path):
    command = [sys.executable, "train.py", *MMCOT, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("run/last/*.json")):
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == 0 and list(tmp_path.glob("run/last/*.json"))
    assert "--resume" in out.splitlines()[-1]
