"""train.py --resume: a run that was stopped, killed or torn ends as the run that never was.

"The same" is to the bit: weights, predictions, metrics, and the log but for its seconds.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, scored

import data
import fusion
import train
from model import T5, T5Config
from support import files
from support.dataset.traces import load_traces
from support.evaluation import errors
from support.files import write_json
from support.training import checks as guards
from support.training import examples as records
from support.training import folders, journal
from support.training.ablations import BASELINES, lines_of
from support.training.journal import Journal, Stopped, in_use
from support.training.settings import parse_args

TINY = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
MMCOT = """--model mmcot --device cpu --limit 12 --epochs 3 --batch-size 6 --max-output 6 4
    --save-every 1 --stage2-rationales generated""".split()
PALI = """--model paligemma --device cpu --limit 8 --epochs 3 --batch-size 4 --lora-r 2
    --lora-dropout 0.1 --eval-problems 2 --max-output 6 3 --save-every 1""".split()


class Killed(Exception):
    pass


def example(i):
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(3, 40, (2, 4 + i), generator=generator).tolist()
    seen = torch.randn(5, 6, generator=generator)
    return {"id": f"q{i}", "input_ids": ids[0], "labels": ids[1], "image_features": seen}


EXAMPLES = [example(i) for i in range(6)]


def validate(model):
    """An "accuracy" that follows from every bit of the weights."""
    total = sum(p.double().sum() for p in model.parameters()).item()
    return {"val_loss": total, "val_accuracy": 1e4 * total % 100}


def fitted(folder, kill=None, resume=True, examples=EXAMPLES, every=2):
    """(final weights, log) of two trainings of a little T5 with dropout, 9 steps each, validated
    after every third. `kill` (stage, step): it dies there, before that step can be saved."""
    flags = f"--model mmcot --device cpu --batch-size 2 --lr 0.01 --save-every {every}".split()
    args = parse_args(flags)
    (folder / "last").mkdir(parents=True, exist_ok=True)
    log, weights = folder / "log.jsonl", []

    def report(stage, step, *rest):
        if (stage, step) == kill:
            raise Killed

    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            open(log, "r+" if resume and log.exists() else "w+") as file,
        ):
            patch.setattr(train, "show_step", report)
            journal = Journal(file, folder / "last", args.save_every)
            for stage in ("one", "two"):
                torch.manual_seed(7)
                t5 = T5(TINY)
                t5.init_weights()
                model = fusion.MultimodalT5(t5, fusion.GatedFusion(16, 6))
                train.fit(model, examples, validate, args, stage, 3, journal)
                weights.append(model.state_dict())
    finally:
        Journal.training = Journal.stopping = False
    return weights, without_seconds(log)


def without_seconds(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(line.pop("seconds") >= 0 for line in lines)
    return lines


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch, request):
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("whole"))


def same(one, other):
    pairs = zip(one[0], other[0], strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    assert one[1] == other[1]


def killed(folder, *where, **changed):
    with pytest.raises(Killed):
        fitted(folder, where, **changed)
    return folder


def states(folder):
    return sorted(path.name for path in (folder / "last").iterdir())


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, step", [("one", 1), ("one", 5), ("two", 1), ("two", 9)])
def test_killed_and_resumed_is_never_killed(stage, step, whole, tmp_path):
    killed(tmp_path, stage, step)
    assert len(without_seconds(tmp_path / "log.jsonl")) == step + 9 * (stage == "two")
    same(fitted(tmp_path), whole)


def test_killed_again_and_again(whole, tmp_path, capsys):
    for where in (("one", 5), ("one", 8), ("two", 3), ("two", 4), ("two", 8)):
        killed(tmp_path, *where)
    same(fitted(tmp_path), whole)
    told = capsys.readouterr().out
    assert "one: 4 of 9 steps are done" in told and "two: 6 of 9 steps" in told
    names = [f"{n}-0000000{k}" for n in (1, 2) for k in (8, 9)]
    assert states(tmp_path) == [f"{x}{end}" for x in names for end in (".json", ".safetensors")]


def test_saving_changes_nothing(whole, tmp_path):
    same(fitted(tmp_path, every=100), whole)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "tear, end", [(flip, "json"), (cut, "json"), (flip, "safetensors"), (cut, "safetensors")]
)
def test_of_a_torn_state_the_one_before_is_taken(tear, end, whole, tmp_path, capsys):
    folder = killed(tmp_path, "two", 8)
    tear(folder / f"last/2-00000006.{end}")
    same(fitted(folder), whole)
    told = capsys.readouterr()
    assert "last/2-00000006.json is not whole" in told.err
    assert "two: 4 of 9 steps are done" in told.out


def test_if_no_state_is_whole_it_starts_from_the_beginning(whole, tmp_path, capsys):
    folder = killed(tmp_path, "one", 8)
    for path in (folder / "last").glob("*.safetensors"):
        flip(path)
    same(fitted(folder), whole)
    told = capsys.readouterr()
    assert "no state is whole: one starts from its beginning" in told.err
    assert "steps are done" not in told.out


def test_a_finished_training_that_is_torn_is_made_again_with_its_log(whole, tmp_path):
    folder = killed(tmp_path, "two", 8)
    cut(folder / "last/1-00000009.safetensors")
    same(fitted(folder), whole)


def test_a_shorter_log_needs_an_older_state(whole, tmp_path, capsys):
    folder = killed(tmp_path, "one", 8)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    same(fitted(folder), whole)
    assert "log.jsonl is shorter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, call",
    [(journal, "write_safetensors"), (journal, "state_checksum"), (files, "flush"),
     (files, "write_json")],
)  # fmt: skip
@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_last_state(place, call, whole, tmp_path, monkeypatch):
    calls, real = [], getattr(place, call)

    def full(*given):
        calls.append(call)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(place, call, full)
    message = "the disk is full.*No space left.*make room, then.*--resume"
    with pytest.raises(OSError, match=message), in_use(tmp_path):
        fitted(tmp_path)
    monkeypatch.undo()
    before = states(tmp_path)
    assert any(name.endswith(".json") for name in before)
    same(fitted(tmp_path), whole)


def test_other_rows_are_refused(tmp_path):
    folder = killed(tmp_path, "one", 5)
    with pytest.raises(ValueError, match="training rows of one are not those"):
        fitted(folder, examples=EXAMPLES[:5] + [example(9)])


def test_it_saves_once_a_minute_and_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    clock, saved = [0.0], []

    def slow(folder, number, facts, tensors):
        saved.append((facts["step"], clock[0]))
        clock[0] += 10

    monkeypatch.setattr(journal, "save_state", slow)
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    with open(tmp_path / "log.jsonl", "w+") as file:
        log = Journal(file, tmp_path)
        model = torch.nn.Linear(2, 2)
        log.begin("one", model, torch.optim.AdamW(model.parameters()), [])
        for step in range(1, 100):
            clock[0] += 7
            log.step(step, 100, None, 0.0, validated=step == 50)
    Journal.training = False
    assert saved[0] == (9, 63.0) and 50 in dict(saved)
    gaps = [b[1] - a[1] for a, b in zip(saved, saved[1:], strict=False) if b[0] != 50]
    assert gaps and all(210 <= gap < 218 for gap in gaps)


# ---- signals and the lock ----------------------------------------------------------------------


def test_a_signal_saves_after_the_step(whole, tmp_path):
    def report(stage, step, *rest):
        if (stage, step) == ("one", 7):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the handler runs here

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        real = guards.stop_unless_moved
        patch.setattr(
            guards, "stop_unless_moved",
            lambda *given: real(*given) or report(given[4], given[5]),
        )  # fmt: skip
        with in_use(tmp_path):
            fitted(tmp_path, every=100)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "1-00000007.json" in states(tmp_path)
    same(fitted(tmp_path), whole)


@pytest.mark.slow
def test_a_signal_outside_training_stops_at_once_and_a_second_one_kills(tmp_path):
    with pytest.raises(Stopped), in_use(tmp_path / "run"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    code = """import os, signal, sys; from pathlib import Path
from support.training.journal import Journal, in_use
with in_use(Path(sys.argv[1])):
    Journal.training = True
    for i in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        print("alive", flush=True)"""
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == -signal.SIGINT and told.stdout == "alive\n"
    assert "once more: at once" in told.stderr


def test_a_folder_in_use_is_refused(tmp_path):
    with in_use(tmp_path / "run"):
        with pytest.raises(ValueError, match="Another process works in .*run"):
            train.main([*MMCOT, "--out", str(tmp_path / "run")])
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()  # nothing was in it


# ---- runs --------------------------------------------------------------------------------------


def test_flags_that_differ_are_named(tmp_path, monkeypatch):
    config = vars(parse_args([*MMCOT, "--out", str(tmp_path)]))
    folders.write_config(config, tmp_path)
    (tmp_path / "last").mkdir()
    monkeypatch.setattr(train, "run_mmcot", lambda args: None)
    given = [*MMCOT, "--out", str(tmp_path), "--resume"]
    with pytest.raises(ValueError, match=r"begun otherwise: --lr was 0.003, is 0.1; --seed was 42"):
        train.main([*given, "--lr", "0.1", "--seed", "3"])
    train.main([*given, "--save-every", "9"])  # changes no result


def test_without_resume_nothing_saved_is_written_over(tmp_path):
    killed(tmp_path, "one", 5)
    with pytest.raises(ValueError, match="interrupted: add --resume.*delete .*04.json"):
        train.main([*MMCOT, "--out", str(tmp_path)])


def test_of_many_runs_the_finished_ones_stay_and_a_torn_one_is_made_again(tmp_path, monkeypatch):
    ran, problem = [], data.load("demo", "val")[0]
    scores = scored([problem], [{"id": problem.id, "response": "Answer: A"}])

    def one(args):
        folders.begin(args)
        ran.append(os.path.relpath(args.out, tmp_path))
        if len(ran) == 3:
            raise Killed
        write_json(scores, tmp_path / ran[-1] / "metrics.json")
        folders.complete(tmp_path / ran[-1])
        return scores

    monkeypatch.setattr(train, "run_paligemma", one)
    given = [*PALI, "--out", str(tmp_path), "--limit", "1"]
    with pytest.raises(Killed):
        train.main(given)
    assert ran == ["base", "base--asked-to-reason", "answer-only"]
    with pytest.raises(ValueError, match="begun otherwise: --lr was"):
        train.main([*given, "--resume", "--lr", "0.5"])
    cut(tmp_path / "base/metrics.json")
    train.main([*given, "--resume"])
    assert ran[3:] == ["base", "answer-only", "."]
    train.main([*given, "--resume"])
    assert len(ran) == 6


def test_what_an_older_finished_run_left_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    """Killed in the second of four runs over an older table: the last two have other flags."""
    problem = data.load("demo", "val")[0]
    scores = scored([problem], [{"id": problem.id, "response": "Answer: A"}])
    ran, older = [], parse_args([*PALI, "--out", str(tmp_path), "--lr", "1"])
    for args in lines_of(older, BASELINES).values():
        folders.begin(args)
        write_json(scores, tmp_path / args.out / "metrics.json")
        folders.complete(tmp_path / args.out)
    given = parse_args([*PALI, "--out", str(tmp_path)])
    lines = list(lines_of(given, BASELINES).values())
    folders.begin(lines[0])
    folders.complete(tmp_path / lines[0].out)
    folders.begin(lines[1])
    for args in lines:
        args.resume = True
    monkeypatch.setattr(train, "run_paligemma", ran.append)
    folders.check_resume(lines)
    assert train.run_one(lines[0]) == scores and not ran
    for args in lines[1:]:
        train.run_one(args)
    assert ran == lines[1:]


def results(folder):
    """Everything that a run leaves, but what names the folder and the seconds of the log."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = {path: path.read_bytes() for path in files if path.suffix not in (".html", ".log")}
    kept |= {path: without_seconds(path) for path in kept if path.name == "log.jsonl"}
    named = {str(path.relative_to(folder)): content for path, content in kept.items()}
    return {name: x for name, x in named.items() if not name.endswith("config.json")}


def started(folder, flags):
    """The id of a process of its own that trains; what it says goes to told.log."""
    folder.mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(folder.with_suffix(".told"), "w") as sys.stdout:
            sys.stderr = sys.stdout
            train.main([*flags, "--out", str(folder)])
            status = 0
    except BaseException as error:
        folder.with_suffix(".error").write_text(repr(error))
    finally:
        os._exit(status)


def ended(pid, after=None):
    """Its exit status; SIGKILL `after` so many seconds, unless it has ended by itself."""
    start = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if after is not None and time.monotonic() - start > after:
            os.kill(pid, signal.SIGKILL)
            after = None
        time.sleep(0.002)


def final_table(folder):
    return folder.with_suffix(".told").read_text().splitlines()[-15:-2]


@pytest.fixture(scope="module")
def demo(read_once):
    """Read before processes are forked: they have it."""
    for split in ("train", "val", "test"):
        data.load("demo", split)
    load_traces(records.demo_traces())
    errors.scene_facts("demo")


@pytest.mark.slow
@pytest.mark.parametrize("flags, kills", [(MMCOT, 13), (PALI, 12)], ids=["mmcot", "paligemma"])
def test_sigkill_at_random_moments(flags, kills, demo, tmp_path):
    whole, chance, count, runs = tmp_path / "whole", random.Random(6), 0, 0
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
            found, expected = results(folder), results(whole)
            assert found.keys() == expected.keys()
            assert [name for name in found if found[name] != expected[name]] == []
            assert final_table(folder) == [
                text.replace(str(whole), str(folder)) for text in final_table(whole)
            ]
            runs += 1
            folder = tmp_path / f"run{runs}"
    print(f"{count} kills of {runs} runs of {seconds:.1f} s in {time.monotonic() - start:.0f} s")


@pytest.fixture
def small_disk(tmp_path):
    """size -> mounts a tmpfs of so many KiB, or changes the size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, *how):
        how = ["-o", f"{','.join([*how, f'size={size}k'])}", "tmpfs", str(disk)]
        told = subprocess.run(["mount", "-t", "tmpfs", *how], capture_output=True, text=True)
        if told.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {told.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [6_000, 14_000])
def test_a_disk_that_is_really_full(size, small_disk, demo, tmp_path):
    assert ended(started(tmp_path / "whole", MMCOT)) == 0
    folder = small_disk(size) / "run"
    assert ended(started(folder, MMCOT)) == 1
    error = folder.with_suffix(".error").read_text()
    assert "the disk is full" in error and "--resume" in error
    small_disk(64_000, "remount")
    assert ended(started(folder, [*MMCOT, "--resume"])) == 0
    assert results(folder) == results(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_of_the_command_exits_0(tmp_path):
    command = [sys.executable, "train.py", *MMCOT, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("run/last/*.json")):
        time.sleep(0.01)
    process.terminate()
    told, _ = process.communicate()
    assert process.returncode == 0 and list(tmp_path.glob("run/last/*.json"))
    assert told.endswith("stopped; the same command with --resume goes on from here\n")


def test_a_finished_run_is_not_replaced_by_one_of_other_flags(tmp_path):
    """Two runs of other seeds, or of a hacked fusion, went to one folder, the last was left."""
    args = parse_args([*PALI, "--alone", "--out", str(tmp_path)])
    folders.begin(args)
    folders.complete(tmp_path)
    folders.check_resume([parse_args([*PALI, "--out", str(tmp_path)])])  # the same, in a table
    other = parse_args([*PALI, "--alone", "--out", str(tmp_path), "--seed", "7"])
    with pytest.raises(ValueError, match=r"finished run of other flags \(--seed was \d+, is 7\)"):
        folders.check_resume([other])
