"""Never losing work: what a run that was stopped, killed or torn goes on from with --resume.

RUN/last/ has the two newest states of each training of a run: N-STEP.safetensors (weights,
AdamW's moments, the best weights, the generators) and N-STEP.json (where it is; a SHA-256 of
both). The JSON is renamed into place last, so a kill leaves the state before. All else is made
again on --resume: it follows from the flags. The folder is there until the run is complete. On a
CPU the resumed run ends in the same bits.

Left out: pickle, copies on other machines, states of the decoding (its lines are in
predictions.part.jsonl).
"""

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
import time

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from support import files
from support.checkpoints.weights import write_safetensors
from support.distributed import (
    agreed,
    gather_dicts,
    in_turn,
    on_first,
    part_like,
    rank,
    world,
)
from support.training.optim import trained

FULL = (errno.ENOSPC, errno.EDQUOT)


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came; what was done is saved."""


class Journal:
    """log.jsonl of a run, and its states in `folder`; without a folder none is kept."""

    training = stopping = False  # of this process, see `in_use`

    def __init__(self, file, folder=None, every=None):
        self.file, self.folder, self.every = file, folder, every
        self.lines = self.trainings = 0

    def write(self, entry):
        print(json.dumps(entry), file=self.file, flush=True)
        self.lines += 1

    def begin(self, stage, model, optimizer, examples):
        """Put the newest whole state of the run's next training into model, optimizer and
        generators; (steps done, best, seconds spent), as train.py's `fit` has them. The log is
        cut to it. ValueError if the rows are others, or the processes see other files."""
        self.trainings += 1
        self.model, self.optimizer, self.due = model, optimizer, time.monotonic() + 60
        if self.folder is None:
            return 0, None, 0.0
        Journal.training = True
        rows = [[e["id"], e["input_ids"], e["labels"]] for e in examples]
        self.rows = files.digest(rows)
        self.file.seek(0)
        log = [line for line in self.file.readlines() if line.endswith("\n")]
        with in_turn():
            facts, tensors = newest_state(self.folder, self.trainings, stage, len(log))
        if len(set(gather_dicts([{rank(): facts and facts["step"]}]).values())) > 1:
            raise ValueError(f"Not all processes find the same files: can all see {self.folder}?")
        if facts and facts["rows"] != self.rows:
            raise ValueError(
                f"{self.folder.parent}: the training rows of {stage} are not those that its state "
                "learned from. Give it the same data again, or another --out."
            )
        self.lines = facts["lines"] if facts else self.lines
        ended = facts and facts["step"] == facts["steps"]  # the next one's lines may follow
        if not ended and not rank():
            self.file.seek(sum(map(len, log[: self.lines])))
            self.file.truncate()
        if not facts:
            return 0, None, 0.0
        best = restore(tensors, model, optimizer)
        print(f"  {stage}: {facts['step']} of {facts['steps']} steps are done", flush=True)
        return facts["step"], facts["best"] and (*facts["best"], best), facts["seconds"]

    def step(self, step, steps, best, seconds, validated):
        """Save after a validation and every --save-every steps, else once a minute, but at most a
        twentieth of the time. Raises Stopped, the state saved, if that was asked for."""
        start = time.monotonic()
        due = step % self.every == 0 if self.every else start >= self.due
        # Each clock is another, and a signal may come to one process in the middle of this.
        due, stopping = agreed((due or validated) and not rank(), Journal.stopping)
        if self.folder is None or not (due or stopping):
            return
        facts = {"step": step, "steps": steps, "lines": self.lines, "rows": self.rows}
        facts |= {"seconds": seconds, "best": best and best[:2]}
        optimizer = self.optimizer if step < steps else None
        tensors = snapshot(self.model, optimizer, best)
        if not rank():
            os.fsync(self.file.fileno())
            save_state(self.folder, self.trainings, facts, tensors)
        self.due = time.monotonic() + max(60, 20 * (time.monotonic() - start))
        if stopping:
            raise Stopped

    def validation(self, validate, model):
        """What `validate(model)` gives. A signal stops it at once: what was done since the last
        state is done again then."""
        then, Journal.training = Journal.training, False
        try:
            if Journal.stopping:
                raise Stopped
            return validate(model)
        finally:
            Journal.training = then

    def end(self):
        Journal.training = False
        if any(agreed(Journal.stopping)):  # the signal came behind the last step
            raise Stopped


# ---- a state -------------------------------------------------------------------------------------


def snapshot(model, optimizer, best):
    """Tensors by name; without an optimizer, of a training that has ended."""
    tensors = {f"model.{name}": p.detach() for name, p in trained(model).items()}
    tensors |= {f"best.{name}": p for name, p in best[2].items()} if best else {}
    for i, moments in optimizer.state_dict()["state"].items() if optimizer else ():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    tensors = {name: on_first(t) for name, t in tensors.items()}
    device = next(model.parameters()).device
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore(tensors, model, optimizer):
    """Undo `snapshot`; returns the best weights. All are cloned: a mapped file's tensors may be
    aligned otherwise than torch's own, and the last bits of a sum can depend on that."""
    parts, moments = {"model": {}, "best": {}, "optimizer": {}, "rng": {}}, {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    theirs = trained(model) | {str(i): p for i, p in enumerate(params)}
    for name in list(tensors):
        part, _, rest = name.partition(".")
        other = theirs.get(rest, theirs.get(rest.partition(".")[0]))
        parts[part][rest] = part_like(tensors.pop(name).clone(), other)
    model.load_state_dict(parts["model"], strict=False)
    for name, tensor in parts["optimizer"].items():
        i, _, key = name.partition(".")
        moments.setdefault(int(i), {})[key] = tensor
    if moments:
        optimizer.load_state_dict({"state": moments})
    device = next(model.parameters()).device
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"], device)
    return {name: tensor.to(device) for name, tensor in parts["best"].items()}


def save_state(folder, number, facts, tensors):
    name = f"{number}-{facts['step']:08d}"
    write_safetensors(tensors, folder / f"{name}.safetensors")
    files.flush(folder / f"{name}.safetensors")
    state = {"state": facts, "sha256": state_checksum(folder / f"{name}.safetensors", facts)}
    files.write_json(state, folder / f"{name}.json")
    kept = sorted(path.stem for path in folder.glob(f"{number}-*.json"))[-2:]
    for path in sorted(folder.iterdir()):  # the JSON of a state goes first
        if path.stem not in kept and path.name.lstrip(".").startswith(f"{number}-"):
            path.unlink()


def newest_state(folder, number, stage, lines):
    """(facts, tensors) of the newest whole state of a training, whose log has `lines` or fewer;
    (None, None) if there is none. What is torn is said, and removed."""
    paths = sorted(folder.glob(f"{number}-*.json"), reverse=True)
    for path in paths:
        try:
            state, file = files.read_json(path), path.with_suffix(".safetensors")
            if state["sha256"] != state_checksum(file, state["state"]):
                raise ValueError("the checksum is another")
            if state["state"]["lines"] > lines and not rank():  # the others have no log
                raise ValueError("log.jsonl is shorter than it was then")
            return state["state"], load_file(file)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            print(f"{path} is not whole ({error}): it is left out", file=sys.stderr)
            if not rank():
                path.unlink()
    if paths:
        print(f"{folder}: no state is whole: {stage} starts from its beginning", file=sys.stderr)
    return None, None


def state_checksum(file, facts):
    """One SHA-256 over the tensors' file and the facts that belong to it."""
    with open(file, "rb") as tensors:
        digest = hashlib.file_digest(tensors, "sha256")
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


# ---- a folder in use -----------------------------------------------------------------------------


@contextlib.contextmanager
def in_use(folder):
    """While this process works in a run folder: no other may, SIGTERM and Ctrl-C stop it when the
    step is done (a second one at once), and a full disk is a sentence."""
    before = {}

    def stop(number, frame):
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        Journal.stopping = True
        if not Journal.training:
            raise Stopped
        if not rank():
            os.write(2, b"\nstopping after this step; once more: at once\n")

    with contextlib.nullcontext() if rank() else locked(folder):
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, stop)
            yield
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) not in FULL and "os error 28" not in str(error):
                raise
            raise OSError(
                f"{folder}: the disk is full ({error}). What was saved before is whole: make "
                "room, then give the same command with --resume."
            ) from None
        except RuntimeError:
            if world() > 1 and Journal.stopping:  # another process had the signal first
                raise Stopped from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            Journal.training = Journal.stopping = False


@contextlib.contextmanager
def locked(folder):
    """The folder itself is locked, so the kernel lets go of it however the process ends. Of a run
    that could not start nothing is left."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = files.fcntl and os.open(folder, os.O_RDONLY)  # Windows opens no folder
    busy = f"Another process works in {folder}: wait, or take another --out."
    try:
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
