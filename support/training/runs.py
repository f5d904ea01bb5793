"""Run folders, and never losing work: what --resume needs of a run that was stopped or killed.

RUN/config.json has settings, versions and commit; RUN/log.jsonl a line a step. RUN/last/, there
until the run is complete, has the two newest states of each of its trainings: N-STEP.safetensors
(weights, AdamW's moments, the best weights, the generators) and N-STEP.json (where it is, and a
SHA-256 of both), which is renamed into place last, so a kill leaves the state before. All else
follows from the settings: on a CPU the resumed run ends in the same bits. No pickle.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import fusion
from support import files
from support.checkpoints.weights import write_safetensors
from support.distributed import any_rank, gather_dicts, in_turn, rank, world
from support.evaluation import tables
from support.training.optim import AdamW, Tensors, restore, snapshot, trained
from support.training.settings import Settings, flag_of, read_config

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FULL = (errno.ENOSPC, errno.EDQUOT)
# Settings that change no result, or (threads) only bits of it.
MAY_DIFFER = ("resume", "dry_run", "save_every", "out", "features_cache", "threads")
# A finished run and one with others of these belong together: rows of a table, or two stages.
SAME_RUN = ("ablation", "alone", "teacher_forced", "stage")


# ---- the folder ----------------------------------------------------------------------------------


def begin(settings: Settings) -> None:
    """Make the folder of a run that can start, with config.json and last/."""
    if rank():
        return
    out = Path(settings.out)
    fresh = not settings.resume or changed_settings(settings) != {}
    if fresh:
        (out / "config.json").unlink(missing_ok=True)
    (out / "last").mkdir(parents=True, exist_ok=True)  # from now on it is not complete
    if fresh:
        return write_config(settings, out)
    before = files.read_json(out / "config.json")["versions"]
    if before != versions():
        text = f"{out} was started with {before} and is resumed with {versions()}: bits may differ"
        print(text, file=sys.stderr)


def versions() -> dict:
    """All that the last bits depend on, apart from settings and machine."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": world(),
    }


def write_config(settings: Settings, out: Path, hub_config: dict | None = None) -> None:
    """config.json: the settings, the versions that it ran with and the commit. `hub_config` is that
    of a model that is saved in the same folder: one file for both."""
    git = ["git", "-C", str(files.ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    kept = {k: v for k, v in asdict(settings).items() if k not in ("resume", "dry_run")}
    config = (hub_config or {}) | kept | {"versions": versions(), "commit": commit}
    files.write_json(config, out / "config.json")


def complete(out: Path) -> None:
    """Delete last/, and so make the run complete, when all its files are on the disk."""
    if rank():
        return
    for path in out.iterdir():
        if path.is_file():
            files.flush(path)
    shutil.rmtree(out / "last")


def is_complete(settings: Settings) -> bool:
    """Whether --resume finds nothing to do in a run's folder."""
    out = Path(settings.out)
    if not settings.resume or (out / "last").exists() or changed_settings(settings) != {}:
        return False
    names = fusion.stage_names(settings.recipe) if settings.model == "mmcot" else ()
    if len(names) == 2 and settings.stage == names[0]:  # no answers to score yet
        return (out / names[0] / "model.safetensors").is_file()
    return bool(tables.read_metrics(out))


def changed_settings(settings: Settings) -> dict[str, str] | None:
    """{name: sentence} of the settings that config.json has otherwise; None if it has none."""
    try:
        config = read_config(settings.out)
    except ValueError:
        return None
    if "recipe" not in config:
        return None
    now = json.loads(json.dumps(asdict(settings)))  # tuples as lists
    return {
        name: f"{flag_of(name)} was {config[name]}, is {value}"
        for name, value in now.items()
        if name not in MAY_DIFFER and name in config and config[name] != value
    }


def check_resume(runs: list[Settings]) -> None:
    """Before anything is done, for the runs of one command. ValueError where --resume has other
    settings than the unfinished one of them was started with, and where without --resume an
    interrupted run, or a finished one of other settings, would be overwritten."""
    if rank():
        return
    unfinished = [run for run in runs if (Path(run.out) / "last").is_dir()]
    if not runs[0].resume:
        for run in runs:
            refuse_to_overwrite(run, finished=run not in unfinished)
        return
    for run in unfinished or runs:
        if changed := changed_settings(run):
            text = "; ".join(changed.values())
            raise ValueError(f"{run.out} was started with other settings: {text}.")
    if not unfinished and not any(map(is_complete, runs)):
        print(f"{runs[-1].out}: nothing was saved; it starts from the beginning", flush=True)


def refuse_to_overwrite(settings: Settings, finished: bool) -> None:
    out = Path(settings.out)
    if saved := [*out.glob("last/*.json"), *out.glob("predictions.part*.jsonl")]:
        raise ValueError(
            f"{out} has a run that was interrupted: add --resume to resume it, or delete "
            f"{' and '.join(map(str, saved))} to start again."
        )
    changed = changed_settings(settings) if finished else None
    changed = [text for name, text in (changed or {}).items() if name not in SAME_RUN]
    if changed:
        raise ValueError(
            f"{out} has a finished run with other settings ({'; '.join(changed)}): give this one "
            "another --out, or delete that folder."
        )


# ---- signals, and a folder in use ----------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came; what was done is saved."""


class StopRequest:
    """SIGTERM and Ctrl-C. The first raises `Stopped` at once, but during training only after the
    step, when a state is saved (`Checkpoints`). A second one kills."""

    def __init__(self) -> None:
        self.requested = False
        self.in_training = False

    def handle(self, number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.requested = True
        if not self.in_training:
            raise Stopped
        if not rank():
            # os.write: print may be in the middle of a line when the signal comes.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to quit now\n")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For a part of training that changes nothing, and is repeated on --resume."""
        before = self.in_training
        self.in_training = False
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self.in_training = before


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[StopRequest]:
    """While this process works in a run folder no other may, signals are heard, and a full disk is
    an OSError with a sentence."""
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        if not rank():
            stack.enter_context(locked(folder))
        for number in SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, stop.handle))
        try:
            yield stop
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) not in FULL and "os error 28" not in str(error):
                raise
            raise OSError(
                f"{folder}: the disk is full ({error}). What was saved before is intact: make "
                "room, then give the same command with --resume."
            ) from None
        except RuntimeError:
            if world() > 1 and stop.requested:  # another process had the signal first
                raise Stopped from None
            raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder itself is locked, so the kernel releases it however the process ends. Of a run
    that could not start nothing is left."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = files.fcntl and os.open(folder, os.O_RDONLY)  # Windows opens no folder
    try:
        busy = f"Another process works in {folder}: wait, or take another --out."
        if why := files.lock(handle, busy):
            print(f"{folder} cannot be locked ({why}): let no other run use it", file=sys.stderr)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()
    finally:
        if handle is not None:
            os.close(handle)


# ---- log and checkpoints -------------------------------------------------------------------------


@dataclass
class Best:
    """The epoch of the highest validation score, the later of equal ones."""

    score: float
    step: int
    weights: Tensors  # the trained ones only


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    best: Best | None = None
    seconds: float = 0.0

    def keep_if_best(self, step: int, score: float | None, model: torch.nn.Module) -> None:
        if score is not None and (self.best is None or score >= self.best.score):
            weights = {name: p.detach().clone() for name, p in trained(model).items()}
            self.best = Best(score, step, weights)


class Checkpoints:
    """The log and the states of a run's trainings, one after the other. Without a folder nothing is
    saved or resumed: only the log is written."""

    def __init__(
        self,
        log: TextIO,
        folder: Path | None = None,
        every: int | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.log = log
        self.folder = folder
        self.every = every
        self.stop = stop or StopRequest()
        self.lines = 0  # in the log
        self.trainings = 0

    def write(self, entry: dict) -> None:
        print(json.dumps(entry), file=self.log, flush=True)
        self.lines += 1

    def begin(
        self, stage: str, model: torch.nn.Module, optimizer: AdamW, rows: list[dict]
    ) -> Progress:
        """Load the newest whole state of the run's next training into model, optimizer and
        generators, and cut the log to it. ValueError if the rows are others, or the processes see
        other files."""
        self.trainings += 1
        self.model = model
        self.optimizer = optimizer
        self.due = time.monotonic() + 60
        if self.folder is None:
            return Progress()
        self.stop.in_training = True
        self.rows = files.digest([[e["id"], e["input_ids"], e["labels"]] for e in rows])
        self.log.seek(0)
        lines = [line for line in self.log if line.endswith("\n")]
        with in_turn():
            state, tensors = newest_state(self.folder, self.trainings, stage, len(lines))
        steps = gather_dicts([{rank(): state and state["step"]}])
        if len(set(steps.values())) > 1:
            raise ValueError(f"Not all processes find the same files: can all see {self.folder}?")
        if state and state["rows"] != self.rows:
            raise ValueError(
                f"{self.folder.parent}: the training rows of {stage} are not those that its state "
                "learned from. Give it the same data again, or another --out."
            )
        if state:
            self.lines = state["lines"]
        # The log of a training that has ended may go on with lines of the next one.
        if not rank() and not (state and state["step"] == state["steps"]):
            self.log.seek(sum(map(len, lines[: self.lines])))
            self.log.truncate()
        if not state:
            return Progress()
        weights = restore(tensors, model, optimizer)
        print(f"  {stage}: {state['step']} of {state['steps']} steps are done", flush=True)
        best = Best(*state["best"], weights) if state["best"] else None
        return Progress(state["step"], best, state["seconds"])

    def step(self, progress: Progress, steps: int, validated: bool) -> None:
        """Save after a validation and every --save-every steps, else once a minute, but for at most
        a twentieth of the time. Raises Stopped, the state saved, if a signal asked for that."""
        start = time.monotonic()
        due = progress.step % self.every == 0 if self.every else start >= self.due
        # All processes must save together. Their clocks differ, so rank 0 decides; and a signal may
        # have reached only one of them.
        due, stopping = any_rank((due or validated) and not rank(), self.stop.requested)
        if self.folder is None or not (due or stopping):
            return
        best = progress.best
        state = {
            "step": progress.step,
            "steps": steps,
            "lines": self.lines,
            "rows": self.rows,
            "seconds": progress.seconds,
            "best": best and (best.score, best.step),
        }
        optimizer = self.optimizer if progress.step < steps else None
        tensors = snapshot(self.model, optimizer, best.weights if best else {})
        if not rank():
            os.fsync(self.log.fileno())
            save_state(self.folder, self.trainings, state, tensors)
        self.due = time.monotonic() + max(60, 20 * (time.monotonic() - start))
        if stopping:
            raise Stopped

    def end(self) -> None:
        self.stop.in_training = False
        if any(any_rank(self.stop.requested)):  # the signal came after the last step
            raise Stopped


@contextlib.contextmanager
def opened_checkpoints(settings: Settings, stop: StopRequest) -> Iterator[Checkpoints]:
    """The run's `Checkpoints`, its log.jsonl open; emptied without --resume. Only rank 0 writes."""
    path = Path(settings.out) / "log.jsonl"
    mode = "r+" if settings.resume and path.is_file() else "w+"
    with open(os.devnull if rank() else path, mode, encoding="utf-8") as file:
        yield Checkpoints(file, path.parent / "last", settings.save_every, stop)


# ---- one state -----------------------------------------------------------------------------------


def save_state(folder: Path, number: int, state: dict, tensors: Tensors) -> None:
    """Write a state of training `number`; the one before stays, older ones go."""
    path = folder / f"{number}-{state['step']:08d}.json"
    file = path.with_suffix(".safetensors")
    write_safetensors(tensors, file)
    files.flush(file)
    files.write_json({"state": state, "sha256": state_checksum(file, state)}, path)
    kept = sorted(path.stem for path in folder.glob(f"{number}-*.json"))[-2:]
    for path in sorted(folder.iterdir()):  # sorted: the JSON of a state goes first
        if path.stem not in kept and path.name.lstrip(".").startswith(f"{number}-"):
            path.unlink()


def newest_state(
    folder: Path, number: int, stage: str, lines: int
) -> tuple[dict | None, Tensors | None]:
    """(state, tensors) of the newest whole state of a training whose log has at most `lines`;
    (None, None) if there is none. A torn one is reported and removed."""
    paths = sorted(folder.glob(f"{number}-*.json"), reverse=True)
    for path in paths:
        try:
            content = files.read_json(path)
            file = path.with_suffix(".safetensors")
            if content["sha256"] != state_checksum(file, content["state"]):
                raise ValueError("the checksum differs")
            if content["state"]["lines"] > lines and not rank():  # the others have no log
                raise ValueError("log.jsonl is shorter than it was then")
            return content["state"], load_file(file)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            print(f"{path} is damaged ({error}) and is ignored", file=sys.stderr)
            if not rank():
                path.unlink()
    if paths:
        print(
            f"{folder}: no state is undamaged: {stage} starts from the beginning", file=sys.stderr
        )
    return None, None


def state_checksum(file: Path, state: dict) -> str:
    """One SHA-256 over the tensors' file and the state that belongs to it."""
    with open(file, "rb") as tensors:
        digest = hashlib.file_digest(tensors, "sha256")
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()
