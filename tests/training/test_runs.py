"""Run folders and --resume: a training that was stopped, killed or torn ends as one that was not.

"The same" is to the bit: weights, and the log but for its seconds.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, scored
from small_runs import (
    MMCOT,
    PALI,
    adapted,
    cut,
    flip,
    plan_of,
    settings,
    t5_row,
    tiny_t5,
    without_seconds,
)

import data
import train
from support import files
from support.files import write_json
from support.training import checks, optim, runs
from support.training.ablations import BASELINES, lines_of
from support.training.runs import Best, Checkpoints, Progress, Stopped, StopRequest, in_use
from support.training.settings import parse_args

ROWS = [t5_row(i, 4 + i, 4 + i) for i in range(6)]


class Killed(Exception):
    pass


def validate(loss_of):
    """An "accuracy" that follows from every bit of the weights."""
    total = sum(p.double().sum() for p in loss_of.model.parameters()).item()
    return {"val_loss": total, "val_accuracy": 1e4 * total % 100}


def fitted(folder, kill=None, rows=ROWS, every=2, stop=None, validate=validate):
    """(final weights, log) of two trainings of a little T5 with dropout, 9 steps each, validated
    after every third. `kill` (stage, step): it dies there, before that step can be saved."""
    chosen = settings("mmcot", "--batch-size", "2", "--lr", "0.01")
    (folder / "last").mkdir(parents=True, exist_ok=True)
    log, weights = folder / "log.jsonl", []

    def show_step(stage, step, *rest):
        if (stage, step) == kill:
            raise Killed

    with (
        pytest.MonkeyPatch.context() as patch,
        open(log, "r+" if log.exists() else "w+") as file,
    ):
        patch.setattr(optim, "show_step", show_step)
        checkpoints = Checkpoints(file, folder / "last", every, stop)
        for stage in ("one", "two"):
            plan = plan_of(tiny_t5(seed=7), chosen, rows, 3, stage, validate)
            weights.append(train.fit(plan, checkpoints).state_dict())
    return weights, without_seconds(log)


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
    out = capsys.readouterr().out
    assert "one: 4 of 9 steps" in out and "two: 6 of 9 steps" in out
    names = [f"{n}-0000000{k}" for n in (1, 2) for k in (8, 9)]
    assert states(tmp_path) == [f"{x}{end}" for x in names for end in (".json", ".safetensors")]


def test_saving_changes_nothing(whole, tmp_path):
    same(fitted(tmp_path, every=100), whole)


def shortened(log):
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-3]) + lines[-3][:20])


@pytest.mark.parametrize(
    "spoil, path, where, err, out",
    [
        (flip, "last/2-00000006.json", ("two", 8), "last/2-00000006.json", "two: 4 of 9 steps"),
        (cut, "last/2-00000006.json", ("two", 8), "last/2-00000006.json", "two: 4 of 9 steps"),
        (flip, "last/2-*6.safetensors", ("two", 8), "last/2-00000006.json", "two: 4 of 9 steps"),
        (cut, "last/2-*6.safetensors", ("two", 8), "last/2-00000006.json", "two: 4 of 9 steps"),
        (flip, "last/*.safetensors", ("one", 8), "no state", ""),  # from the beginning
        (cut, "last/1-00000009.safetensors", ("two", 8), "1-00000009.json", "one: 8 of 9 steps"),
        (shortened, "log.jsonl", ("one", 8), "log.jsonl", "one: 4 of 9 steps"),
    ],
)
def test_of_a_torn_state_the_one_before_is_taken(
    spoil, path, where, err, out, whole, tmp_path, capsys
):
    folder = killed(tmp_path, *where)
    for file in folder.glob(path):
        spoil(file)
    same(fitted(folder), whole)
    printed = capsys.readouterr()
    assert err in printed.err and out in printed.out
    assert out or "9 steps" not in printed.out


@pytest.mark.parametrize(
    "place, call",
    [(runs, "write_safetensors"), (runs, "state_checksum"), (files, "flush"),
     (files, "write_json")],
)  # fmt: skip
@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_last_state(place, call, whole, tmp_path, monkeypatch):
    calls, real = [], getattr(place, call)

    def full(*args):
        calls.append(call)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(place, call, full)
    with pytest.raises(OSError, match="disk is full.*--resume"), in_use(tmp_path):
        fitted(tmp_path)
    monkeypatch.undo()
    assert any(name.endswith(".json") for name in states(tmp_path))
    same(fitted(tmp_path), whole)


def test_other_rows_are_refused(tmp_path):
    folder = killed(tmp_path, "one", 5)
    with pytest.raises(ValueError, match="rows of one"):
        fitted(folder, rows=ROWS[:5] + [t5_row(9)])


def test_it_saves_once_a_minute_and_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    clock, saved = [0.0], []

    def slow(folder, number, state, tensors):
        saved.append((state["step"], clock[0]))
        clock[0] += 10

    monkeypatch.setattr(runs, "save_state", slow)
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    with open(tmp_path / "log.jsonl", "w+") as file:
        checkpoints = Checkpoints(file, tmp_path)
        model = torch.nn.Linear(2, 2)
        checkpoints.begin("one", model, optim.make_optimizer(model, 0.0), [])
        for step in range(1, 100):
            clock[0] += 7
            checkpoints.step(Progress(step), 100, validated=step == 50)
    assert saved[0] == (9, 63.0) and 50 in dict(saved)
    gaps = [b[1] - a[1] for a, b in zip(saved, saved[1:], strict=False) if b[0] != 50]
    assert gaps and all(210 <= gap < 218 for gap in gaps)


def test_a_state_has_adapters_and_their_best_weights_alone(tmp_path):
    """Not the frozen base: a state of a 3B model with adapters would have 6 GiB."""
    model, _ = adapted("--lora-r", "2")
    optimizer = optim.make_optimizer(model, 0.0)
    best = Best(50.0, 1, {name: p.detach() + 1 for name, p in optim.trained(model).items()})
    tensors = optim.snapshot(model, optimizer, best.weights)
    assert {name.partition(".")[0] for name in tensors} == {"model", "best", "rng"}
    assert all("lora_" in name for name in tensors if not name.startswith("rng"))
    weights = optim.restore(dict(tensors), model, optimizer)
    assert all(torch.equal(weights[name], best.weights[name]) for name in best.weights)


# ---- signals and the lock ------------------------------------------------------------------------


def test_a_signal_saves_after_the_step(whole, tmp_path, monkeypatch):
    real = checks.stop_unless_moved

    def stop_unless_moved(*args):
        real(*args)
        if args[-1] == "one, step 7":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the handler runs here

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checks, "stop_unless_moved", stop_unless_moved)
    with pytest.raises(Stopped), in_use(tmp_path) as stop:
        fitted(tmp_path, every=100, stop=stop)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "1-00000007.json" in states(tmp_path)
    same(fitted(tmp_path), whole)


def test_a_signal_stops_a_validation_at_once_and_nothing_is_lost(whole, tmp_path):
    def stopped(loss_of):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    start = time.monotonic()
    with pytest.raises(Stopped), in_use(tmp_path / "run") as stop:
        fitted(tmp_path / "run", stop=stop, validate=stopped)
    assert time.monotonic() - start < 4
    assert "1-00000002.json" in states(tmp_path / "run")
    same(fitted(tmp_path / "run"), whole)


def test_a_signal_before_a_validation_stops_that():
    stop = StopRequest()
    stop.requested = stop.in_training = True
    with pytest.raises(Stopped), stop.at_once():
        pytest.fail("it began")
    assert stop.in_training


@pytest.mark.slow
def test_a_signal_outside_training_stops_at_once_and_a_second_one_kills(tmp_path):
    with pytest.raises(Stopped), in_use(tmp_path / "run"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    code = """import os, signal, sys; from pathlib import Path
from support.training.runs import in_use
with in_use(Path(sys.argv[1])) as stop:
    stop.in_training = True
    for i in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        print("alive", flush=True)"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGINT and ran.stdout == "alive\n" and ran.stderr


def test_a_folder_in_use_is_refused(tmp_path):
    with in_use(tmp_path / "run"):
        with pytest.raises(ValueError, match="run: wait"):
            train.main([*MMCOT, "--out", str(tmp_path / "run")])
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()  # nothing was in it


# ---- folders -------------------------------------------------------------------------------------


def begun(folder, *flags, base=PALI, finished=True):
    chosen = parse_args([*base, "--out", str(folder), *flags])
    runs.begin(chosen)
    if finished:
        runs.complete(folder)
    return chosen


def test_settings_that_differ_are_named(tmp_path, monkeypatch):
    begun(tmp_path, base=MMCOT, finished=False)
    monkeypatch.setattr(train, "run_mmcot", lambda settings, stop: None)
    again = [*MMCOT, "--out", str(tmp_path), "--resume"]
    with pytest.raises(ValueError, match=r"--lr was 0.003, is 0.1; --seed was 42|--seed was 42"):
        train.main([*again, "--lr", "0.1", "--seed", "3"])
    train.main([*again, "--save-every", "9"])  # changes no result


def test_without_resume_nothing_saved_is_overwritten(tmp_path):
    killed(tmp_path, "one", 5)
    with pytest.raises(ValueError, match="--resume.*04.json"):
        train.main([*MMCOT, "--out", str(tmp_path)])


def test_a_finished_run_is_not_replaced_by_one_of_other_settings(tmp_path):
    """Two runs of other seeds, or of a hacked fusion, went to one folder, and the last was left."""
    begun(tmp_path, "--alone")
    runs.check_resume([parse_args([*PALI, "--out", str(tmp_path)])])  # the same, in a table
    other = parse_args([*PALI, "--alone", "--out", str(tmp_path), "--seed", "7"])
    with pytest.raises(ValueError, match=r"--seed was \d+, is 7"):
        runs.check_resume([other])


def test_a_stage_alone_is_complete_without_metrics(tmp_path, monkeypatch):
    flags = ["--stage", "rationale", "--resume"]
    chosen = parse_args(["--model", "mmcot", "--out", str(tmp_path), *flags])
    assert not runs.is_complete(chosen)
    runs.begin(chosen)
    (tmp_path / "rationale").mkdir()
    (tmp_path / "rationale/model.safetensors").touch()
    assert not runs.is_complete(chosen)  # last/ is there
    runs.complete(tmp_path)
    assert runs.is_complete(chosen)
    monkeypatch.setattr(train, "run_mmcot", None)
    train.main(["--model", "mmcot", "--out", str(tmp_path), *flags])
    assert not runs.is_complete(replace(chosen, stage="both"))


@pytest.fixture
def metrics_of_one():
    problem = data.load("demo", "val")[0]
    scores = scored([problem], [{"id": problem.id, "response": "Answer: A"}])
    return scores | {"data": "demo", "split": "val"}


def test_of_many_runs_finished_ones_stay_and_a_torn_one_is_repeated(
    tmp_path, monkeypatch, metrics_of_one
):
    ran = []

    def run(chosen, stop):
        runs.begin(chosen)
        ran.append(os.path.relpath(chosen.out, tmp_path))
        if len(ran) == 3:
            raise Killed
        write_json(metrics_of_one, tmp_path / ran[-1] / "metrics.json")
        runs.complete(tmp_path / ran[-1])
        return metrics_of_one

    monkeypatch.setattr(train, "run_paligemma", run)
    flags = [*PALI, "--out", str(tmp_path), "--limit", "1"]
    with pytest.raises(Killed):
        train.main(flags)
    assert ran == ["base", "base--asked-to-reason", "answer-only"]
    with pytest.raises(ValueError, match="--lr was"):
        train.main([*flags, "--resume", "--lr", "0.5"])
    cut(tmp_path / "base/metrics.json")
    train.main([*flags, "--resume"])
    assert ran[3:] == ["base", "answer-only", "."]
    train.main([*flags, "--resume"])
    assert len(ran) == 6


def test_an_older_finished_run_is_not_taken_for_this_one(tmp_path, monkeypatch, metrics_of_one):
    """Killed in the second of four runs over an older table: the last two have other settings."""
    older = parse_args([*PALI, "--out", str(tmp_path), "--lr", "1"])
    for line in lines_of(older, BASELINES).values():
        runs.begin(line)
        write_json(metrics_of_one, tmp_path / line.out / "metrics.json")
        runs.complete(tmp_path / line.out)
    now = parse_args([*PALI, "--out", str(tmp_path)])
    lines = list(lines_of(now, BASELINES).values())
    runs.begin(lines[0])
    runs.complete(tmp_path / lines[0].out)
    runs.begin(lines[1])
    lines = [replace(line, resume=True) for line in lines]
    ran = []
    monkeypatch.setattr(train, "run_paligemma", lambda chosen, stop: ran.append(chosen))
    runs.check_resume(lines)
    assert train.run_one(lines[0], None) == metrics_of_one and not ran
    for line in lines[1:]:
        train.run_one(line, None)
    assert ran == lines[1:]
