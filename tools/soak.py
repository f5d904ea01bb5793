"""Hours in miniature: small runs over and over, with faults, and what they leave in memory.

    python tools/soak.py --minutes 30

In turns, a process of its own trains and decodes one of four small runs (mmcot and paligemma, on
the demo and on a file with planted bad records, --on-error skip), is hit by a fault and resumed
until it is complete: its files must be those of the run that was never stopped. Faults: SIGKILL,
SIGTERM, a full disk (a small tmpfs, where one can be mounted) and a torn state. Between them this
process itself runs one from beginning to end, every third stopped by SIGTERM and resumed, and looks
at its resident memory and its open files. It fails if a run ends otherwise, if memory would grow by
more than a quarter in 8 hours, or if a file stays open.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/helpers")]

from small_runs import MMCOT, PALI, SMALL, ended, flip, results, spoiled_data, started  # noqa: E402

import train  # noqa: E402
from support.training.runs import Stopped  # noqa: E402

FAULTS = ("SIGKILL", "SIGTERM", "full disk", "torn state")
BAD = ("train1", "train2", "whole", "val0", "test0", "test1", "line 17")  # of spoiled_data
HOURS, SHARE = 8, 0.25  # memory: may grow by this share in so many hours


def runs_of(folder):
    """{name: flags} of the runs."""
    skip = ["--data", str(spoiled_data(folder / "data")), "--on-error", "skip"]
    bad = {f"{name}, bad records": [*SMALL[name], *skip, "--save-every", "1"] for name in SMALL}
    return {"mmcot": MMCOT, "paligemma": [*PALI, "--alone"]} | bad


def check_skipped(folder):
    ids = {json.loads(line)["id"] for line in (folder / "skipped.jsonl").open()}
    assert ids - {"test2"} == {*BAD}, ids  # its image is too narrow for DETR alone


@contextlib.contextmanager
def disk(folder):
    """A function that gives a tmpfs at `folder` so many KiB; None where none can be mounted."""
    folder.mkdir()

    def mount(size, *how):
        options = ",".join([*how, f"size={size}k"])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    can = mount(1000)
    try:
        yield mount if can else None
    finally:
        subprocess.run(["umount", str(folder)] if can else ["true"], capture_output=True)


def struck(fault, flags, folder, seconds, chance, mount):
    """One run with one fault, resumed until it is complete; how often it was."""
    if fault == "full disk":
        mount(chance.randint(2_000, 12_000), "remount")
    pid, after = started(folder, flags), chance.uniform(0, seconds)
    if fault == "SIGTERM":
        timer = threading.Timer(after, os.kill, (pid, signal.SIGTERM))
        timer.start()
        status = ended(pid)
        timer.cancel()
    else:
        status = ended(pid, None if fault == "full disk" else after)
    if fault == "full disk":
        mount(200_000, "remount")
    if fault == "torn state" and (torn := sorted(folder.rglob("last/*.safetensors"))):
        flip(torn[-1])
    times = 0
    while status:
        error = folder.with_suffix(".error")
        text = error.read_text() if error.exists() else ""
        fine = status == -signal.SIGKILL or "Stopped" in text or "the disk is full" in text
        assert fine and times < 3, f"{fault}: status {status}, {text}"
        error.unlink(missing_ok=True)
        status, times = ended(started(folder, [*flags, "--resume"])), times + 1
    return times


def in_this_process(flags, folder, stop_after=None):
    """One run here, or two: stopped by SIGTERM and resumed."""
    timer = threading.Timer(stop_after or 0, os.kill, (os.getpid(), signal.SIGTERM))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            if stop_after:
                timer.start()
            train.main([*flags, "--out", str(folder)])
        except Stopped:
            train.main([*flags, "--out", str(folder), "--resume"])
        finally:
            timer.cancel()


def measured():
    """(MiB resident, open files) of this process, when free memory is given back: how much of it
    glibc keeps changes by 10 MiB from run to run."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def trend(looks):
    """(MiB an hour, mean of the first and of the last third) of (seconds, MiB), the first third,
    which warms up, left out of the slope."""
    third = max(1, len(looks) // 3)
    times, sizes = np.array(looks[third:] or looks).T
    pairs = itertools.combinations(range(len(times)), 2)
    slopes = [(sizes[j] - sizes[i]) / (times[j] - times[i]) for i, j in pairs]  # Theil and Sen
    slope = 3600 * np.median(slopes) if slopes else 0.0
    first, last = ([size for _, size in part] for part in (looks[:third], looks[-third:]))
    return float(slope), float(np.mean(first)), float(np.mean(last))


def soak(minutes, seed, folder):
    """What happened: {"faults": {fault: [runs, resumes]}, "looks": [(seconds, MiB, files)]}."""
    chance, start, looks = random.Random(seed), time.monotonic(), []
    runs, resumes, whole = Counter(), Counter(), {}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between two runs
    with disk(folder / "disk") as mount:
        flags = runs_of(folder)
        for name in flags:
            began = time.monotonic()
            assert ended(started(folder / "whole", flags[name])) == 0, name
            if "bad" in name:
                check_skipped(folder / "whole")
            whole[name] = results(folder / "whole"), time.monotonic() - began
            shutil.rmtree(folder / "whole")
        faults = [fault for fault in FAULTS if mount or fault != "full disk"]
        for turn in itertools.count():
            if time.monotonic() - start > 60 * minutes and turn >= len(faults):
                break
            name, fault = list(flags)[turn % 4], faults[(turn + turn // 4) % len(faults)]
            expected, seconds = whole[name]
            out = folder / ("disk/run" if fault == "full disk" else "run")
            resumes[fault] += struck(fault, flags[name], out, seconds, chance, mount)
            assert results(out) == expected, f"turn {turn}: {name}, {fault}: other files"
            runs[fault] += 1
            shutil.rmtree(out)
            stop = chance.uniform(0.1, seconds) if turn % 3 == 2 else None
            in_this_process(flags[name], folder / "run", stop)
            assert results(folder / "run") == expected, f"turn {turn}: {name}, in this process"
            shutil.rmtree(folder / "run")
            looks.append((time.monotonic() - start, *measured()))
            if turn % 10 == 0:
                seconds, size, _ = looks[-1]
                print(f"{seconds:6.0f} s  {turn + 1} turns  {size:.1f} MiB", flush=True)
    return {"faults": {f: (runs[f], resumes[f]) for f in faults}, "looks": looks}


def judge(result):
    """Print the table; the sentences of what is wrong."""
    looks, wrong = result["looks"], []
    print(f"\n{'fault':12} {'runs':>5} {'resumes':>8}  ended as the run that was never stopped")
    for fault, (runs, resumes) in result["faults"].items():
        print(f"{fault:12} {runs:5} {resumes:8}  all")
    slope, first, last = trend([look[:2] for look in looks])
    files, bound = [look[2] for look in looks], SHARE * first / HOURS
    print(f"{len(looks)} runs in this process, the third stopped and resumed")
    print(f"resident, MiB: {first:.1f} in the first third, {last:.1f} in the last")
    print(f"its slope, MiB an hour: {slope:+.1f}, at most {bound:.1f}")
    print(
        f"open files: {files[0]} after the first, {files[-1]} after the last, {max(files)} at most"
    )
    if len(looks) >= 30 and slope > bound:
        wrong.append(f"memory grows by {slope:.1f} MiB an hour")
    if max(files[-len(files) // 3 :]) > max(files[: -(-len(files) // 3)]):
        wrong.append("files stay open")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the random faults (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCOT_CACHE"] = f"{folder}/cache"
        result = soak(args.minutes, args.seed, Path(folder))
    if wrong := judge(result):
        sys.exit(f"soak.py: {'; '.join(wrong)}.")


if __name__ == "__main__":
    main()
