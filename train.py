"""Training: `python train.py --model mmcot` or `--model paligemma`; each ends in a table.

mmcot (Zhang et al., arXiv 2302.00923). Stage 1 learns QCM-LE, question to rationale; stage 2 learns
QCMG-A, question and rationale to answer. Both start from the same T5, both read the same image
features, and at test time stage 2 reads what stage 1 really wrote.

As published by default: AdamW (0.9, 0.999, 1e-8), weight decay 0.01 except on norms and on every
parameter with "bias" in its name, linear decay without warm-up, gradients clipped at 1, stage 2
trained on gold rationales. Not as published: pads are never in the loss (there they were most of
it), and a window of accumulated batches is averaged over its tokens, not over its batches.

paligemma (pali_reason; Beyer et al., arXiv 2407.07726 and 2412.03555). A teacher's traces, judged
right, become suffixes "thought, newline, Answer: B"; LoRA teaches PaliGemma 2 to write them. The
table has what that must be compared with: chance, the model as it was, and the same model trained
as long on the same answers without the thoughts.

A run that was killed goes on with --resume and ends in the same bits (on a CPU): see `Journal`.

Left out on purpose: trainer classes, callbacks, autocast (weights that are trained are fp32, frozen
ones bf16 where the device is good at it), loggers other than log.jsonl.

Axes: B batch, T length, U target length, D width, V vocabulary.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint

import data
import eval as evaluation
import fusion
import lora
from model import resolve, write_safetensors

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None

HERE = Path(__file__).parent
VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_THREADS = torch.get_num_threads()
MMCOT_DEMO = {  # three minutes on one core
    "weights": [str(HERE / "demo/t5")],
    "vision_weights": str(HERE / "demo/detr"),
    "recipe": "two-stage",
    "image_size": 96,
    "epochs": [8.0, 2.0],
    "lr": 3e-3,
    "weight_decay": 0.01,
    "batch_size": 32,
    "accumulate": 1,
    "weighting": "token",
    "max_input": 256,
    "max_output": [64, 16],
    "threads": 1,  # the result depends on it; two are 1.5 times as fast on an idle machine
}
MMCOT = MMCOT_DEMO | {  # arXiv 2302.00923, base model
    "weights": ["allenai/unifiedqa-t5-base"],
    "vision_weights": "facebook/detr-resnet-101-dc5",
    "image_size": 224,
    "epochs": [20.0],
    "lr": 5e-5,
    "batch_size": 8,
    "max_input": 512,
    "max_output": [512, 64],
    "threads": ALL_THREADS,
}
PALIGEMMA = {  # none of it was tried at full size; the sources are papers and big_vision's configs
    "weights": ["google/paligemma2-3b-mix-448"],  # mix has answered questions, pt has not
    "recipe": "reason",
    "epochs": [5.0],  # at most: the best epoch on validation answers is kept
    "lr": 1e-4,  # of adapters; for --full take 6e-6 (ScienceQA in 2412.03555, Table 14)
    "weight_decay": 0.0,  # as the published ScienceQA transfer
    "batch_size": 4,  # a guess at what a 24 GB GPU holds with checkpointing at 448 pixels
    "accumulate": 8,  # 32 rows a step: 4, as in pali_reason, is noise
    "weighting": "example",  # as big_vision: a long thought does not outweigh a short answer
    "warmup": 0.05,
    "lora_r": 32,  # long texts are a new skill: more than the usual 8 or 16
    "lora_alpha": 64.0,  # a scale of 2
    "max_suffix": 384,  # 62 of pali_reason's 251 are longer; short suits the small (2502.12143)
    "max_output": [384, 16],
    "mix": 0.25,  # answer-only rows a trace, so that short answers are not forgotten
    "final_soft_cap": False,  # "better for transfer" (big_vision); arg-max is the same without
    "checkpointing": True,
    "eval_problems": 200,  # decoded after each epoch
    "threads": ALL_THREADS,
}
PALIGEMMA_DEMO = PALIGEMMA | {  # four minutes on one core
    "weights": [str(HERE / "demo/paligemma")],
    "epochs": [4.0],
    "lr": 4e-3,
    "batch_size": 16,
    "accumulate": 1,
    "weighting": "token",
    "lora_r": 16,
    "lora_alpha": 32.0,
    "max_suffix": 96,
    "max_output": [96, 8],
    "mix": 0.0,
    "final_soft_cap": True,
    "checkpointing": False,
    "eval_problems": 200,
    "threads": 1,
}
DEFAULTS = {
    ("mmcot", True): MMCOT_DEMO,
    ("mmcot", False): MMCOT,
    ("paligemma", True): PALIGEMMA_DEMO,
    ("paligemma", False): PALIGEMMA,
}
LOGITS = 2**25  # of one chunk of the loss: 128 MiB in fp32


# ---- the loss ----------------------------------------------------------------------------------


def cross_entropy(head, states, labels, args):
    """Summed cross-entropy of the supervised tokens, and what to divide it by.

    states (B, T, D), labels (B, T), -100 where nothing is learned. The vocabulary layer `head` sees
    only the supervised positions, some at a time: the logits of PaliGemma's 257,216 words are never
    all there, in neither direction (a chunk's are computed again on the way back).
    args.weighting "token" counts tokens; "example" gives each row the same weight, however long.
    """
    supervised = labels != -100  # (B, T)
    rows, lengths = supervised.nonzero()[:, 0], supervised.sum(1)  # (tokens,), (B,)
    states, labels = states[supervised], labels[supervised]  # (tokens, D), (tokens,)
    by_row = args.weighting == "example"
    smoothing = args.label_smoothing

    def chunk_loss(states, labels, rows):
        logits = head(states).float()  # (tokens, V)
        if not by_row:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (each / lengths[rows]).sum()

    size = max(1, LOGITS // args.vocabulary)
    parts = list(zip(states.split(size), labels.split(size), rows.split(size), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        loss = sum(checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts)
    else:
        loss = sum(chunk_loss(*part) for part in parts)
    return loss, int((lengths > 0).sum()) if by_row else len(labels)


def t5_loss(model, batch, args):
    states = model.states(
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("image_features"),
        batch["decoder_input_ids"],
    )  # (B, U, D)
    return cross_entropy(model.t5.head, states, batch["labels"], args)


def paligemma_loss(model, batch, args):
    states = model.states(**evaluation.paligemma_inputs(model, batch))  # (B, T, D)
    return cross_entropy(model.head, states[:, :-1], batch["labels"][:, 1:], args)


LOSS = {"mmcot": t5_loss, "paligemma": paligemma_loss}
COLLATE = {"mmcot": data.collate, "paligemma": data.pali_collate}


def units(batch, args):
    """What a batch's summed loss is divided by: its supervised tokens, or its rows."""
    supervised = batch["labels"] != -100
    return int((supervised.any(1) if args.weighting == "example" else supervised).sum())


def to_device(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@torch.inference_mode()
def mean_loss(model, examples, args):
    """Cross-entropy in nats per supervised token (or of the mean example, see --weighting)."""
    model.eval()
    total = count = 0
    for rows in data.batches([len(e["input_ids"]) for e in examples], args.batch_size):
        batch = COLLATE[args.model]([examples[i] for i in rows])
        loss, n = LOSS[args.model](model, to_device(batch, args.device), args)
        total, count = total + loss.item(), count + n
    return total / count


# ---- the loop ----------------------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay):
    """AdamW with the published decay groups; prints what is in them."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = {True: [], False: []}
    for name, p in trained.items():
        groups[not (p.dim() == 1 or "bias" in name)].append(p)
    count = {decayed: sum(p.numel() for p in g) for decayed, g in groups.items()}
    total = sum(p.numel() for p in model.parameters())
    print(
        f"  trainable {sum(count.values()):,} of {total:,} parameters, "
        f"weight decay {weight_decay:g} on {count[True]:,} of them"
    )
    return AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=lr,
    )


class AdamW:
    """Loshchilov and Hutter, arXiv 1711.05101: the function behind torch.optim.AdamW, to the bit,
    without that class, whose first use imports torch's compiler: 2 s of each start."""

    def __init__(self, groups, lr):
        self.param_groups = [group | {"lr": lr} for group in groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.state = {}  # {parameter: {"step", "exp_avg", "exp_avg_sq"}}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if p not in self.state:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.tensor(0.0)} | moments
            step, *moments = (
                [self.state[p][name] for p in trained] for name in ("step", "exp_avg", "exp_avg_sq")
            )
            rates = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": 1e-8}
            rates |= {"beta1": 0.9, "beta2": 0.999, "amsgrad": False, "maximize": False}
            adamw(trained, [p.grad for p in trained], *moments, [], step, **rates)

    def zero_grad(self, set_to_none=True):  # called as the class is
        for p in self.parameters:
            p.grad = None

    def state_dict(self):
        numbered = enumerate(self.parameters)
        return {"state": {i: self.state[p] for i, p in numbered if p in self.state}}

    def load_state_dict(self, saved):
        for i, moments in saved["state"].items():
            p = self.parameters[i]
            self.state[p] = {n: t if n == "step" else t.to(p) for n, t in moments.items()}


def schedule(step, steps, args):
    """The share of the peak learning rate at a step: linear decay to 0 (mmcot, as published), or
    linear warm-up and a cosine to 0 (paligemma)."""
    if args.model == "mmcot":
        return 1 - step / max(1, steps)
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def steps_per_epoch(examples, args):
    return math.ceil(math.ceil(len(examples) / args.batch_size) / args.accumulate)


def windows(examples, args, epochs, generator):
    """Lists of `args.accumulate` batches, `epochs` times through the examples, freshly shuffled."""
    lengths = [len(e["input_ids"]) + len(e["labels"]) for e in examples]
    left = math.ceil(steps_per_epoch(examples, args) * epochs)
    while left > 0:
        order = data.batches(lengths, args.batch_size, generator)
        for start in range(0, len(order), args.accumulate):
            if left > 0:
                yield [
                    [examples[i] for i in rows] for rows in order[start : start + args.accumulate]
                ]
            left -= 1


def fit(model, examples, validate, args, stage, epochs, log):
    """Train in place; `validate(model)` gives what is logged after each epoch. `log` is a
    `Journal`, which goes on from the last saved step, or any text file.

    If that has "val_accuracy", the weights of the best epoch are what is left in the end.
    FloatingPointError names the records of a non-finite loss.
    """
    model.to(args.device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    plan = list(windows(examples, args, epochs, generator))[: args.max_steps]
    per_epoch = steps_per_epoch(examples, args)
    journal = log if isinstance(log, Journal) else Journal(log)
    done, best, seconds = journal.begin(stage, model, optimizer, examples)
    start = time.monotonic() - seconds
    for step, window in enumerate(plan[done:], done + 1):
        model.train()
        batches = [to_device(COLLATE[args.model](rows), args.device) for rows in window]
        count = sum(units(batch, args) for batch in batches)
        total = 0.0
        for batch in batches:
            loss, _ = LOSS[args.model](model, batch, args)
            (loss / count).backward()
            total += loss.detach() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stop_unless_finite(total, norm, window, stage, step)
        if step == 1:
            stop_unless_learning(model)
        lr = args.lr * schedule(step - 1, len(plan), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        entry = {"stage": stage, "step": step, "loss": round(total.item(), 6), "lr": lr}
        entry |= {"grad_norm": round(norm.item(), 4), args.weighting + "s": count}
        validates = step % per_epoch == 0 or step == len(plan)
        if validates:
            entry |= validate(model)
            best = better(best, entry, model)
        seconds = time.monotonic() - start
        journal.write(entry | {"seconds": round(seconds, 2)})
        report(stage, step, len(plan), entry, seconds)
        journal.step(step, len(plan), best, seconds, validates)
    journal.end()
    if best:
        model.load_state_dict(best[2], strict=False)
        print(f"  kept: the weights after step {best[1]}, validation accuracy {best[0]:.2f}")
    return model.eval()


def better(best, entry, model):
    """(accuracy, step, trained weights) of the best epoch so far; of equal ones the later."""
    accuracy = entry.get("val_accuracy")
    if accuracy is None or (best and accuracy < best[0]):
        return best
    return accuracy, entry["step"], {n: p.detach().clone() for n, p in trained(model).items()}


def stop_unless_finite(loss, norm, window, stage, step):
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ids = ", ".join(e["id"] for rows in window for e in rows)
        raise FloatingPointError(
            f"{stage}, step {step}: loss {float(loss)}, gradient norm {float(norm)}, in {ids}. "
            "This step was not taken. Look at these records, or lower --lr."
        )


def stop_unless_learning(model):
    """After the first backward pass every lora_B must have a gradient (A has none yet: B is 0).
    Checkpointing behind frozen embeddings is a known way to lose them without a word."""
    dead = [
        name
        for name, p in model.named_parameters()
        if "lora_B" in name and (p.grad is None or not p.grad.any())
    ]
    if dead:
        raise RuntimeError(
            f"{len(dead)} adapters got no gradient in the first step, {dead[0]} among them: "
            "nothing would be learned there."
        )


def report(stage, step, steps, entry, seconds):
    """A line per validation; on a terminal also a running one with rate and time left."""
    text = f"  {stage} {step}/{steps}  loss {entry['loss']:.4f}"
    if "val_loss" in entry:
        clear = "\r" if sys.stderr.isatty() else ""
        right = f"  val accuracy {entry['val_accuracy']:.2f}" if "val_accuracy" in entry else ""
        text = f"{clear}{text}  val loss {entry['val_loss']:.4f}{right}"
        print(f"{text}  {seconds:.0f} s", flush=True)
    elif sys.stderr.isatty():
        rate = step / seconds
        left = f"{rate:.1f} steps/s, {(steps - step) / rate:.0f} s left"
        print(f"\r{text}  {left}   ", end="", file=sys.stderr, flush=True)


# ---- never losing work -------------------------------------------------------------------------
# RUN/last/ has the two newest states of each training of a run: N-STEP.safetensors (weights,
# AdamW's moments, the best weights, the generators) and N-STEP.json (where it is; a SHA-256 of
# both). The JSON is renamed into place last, so a kill leaves the state before. All else is made
# again on --resume: it follows from the flags. The folder is there until the run is complete.

MAY_DIFFER = ("resume", "save_every", "out", "features_cache")  # flags that change no result
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
        generators; (steps done, best, seconds spent), see `fit`. The log is cut to it."""
        self.trainings += 1
        self.model, self.optimizer, self.due = model, optimizer, time.monotonic() + 60
        if self.folder is None:
            return 0, None, 0.0
        Journal.training = True
        rows = [[e["id"], e["input_ids"], e["labels"]] for e in examples]
        self.rows = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        self.file.seek(0)
        log = [line for line in self.file.readlines() if line.endswith("\n")]
        facts, tensors = newest_state(self.folder, self.trainings, stage, len(log))
        if facts and facts["rows"] != self.rows:
            raise ValueError(
                f"{self.folder.parent}: the training rows of {stage} are not those that its state "
                "learned from. Give it the same data again, or another --out."
            )
        self.lines = facts["lines"] if facts else self.lines
        if not facts or facts["step"] < facts["steps"]:  # else the next one's lines may follow
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
        if self.folder is None or not (due or validated or Journal.stopping):
            return
        facts = {"step": step, "steps": steps, "lines": self.lines, "rows": self.rows}
        facts |= {"seconds": seconds, "best": best and best[:2]}
        optimizer = self.optimizer if step < steps else None
        os.fsync(self.file.fileno())
        save_state(self.folder, self.trainings, facts, snapshot(self.model, optimizer, best))
        self.due = time.monotonic() + max(60, 20 * (time.monotonic() - start))
        if Journal.stopping:
            raise Stopped

    def end(self):
        Journal.training = False
        if Journal.stopping:  # the signal came behind the last step
            raise Stopped


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model, optimizer, best):
    """Tensors by name; without an optimizer, of a training that has ended."""
    tensors = {f"model.{name}": p for name, p in trained(model).items()}
    tensors |= {f"best.{name}": p for name, p in best[2].items()} if best else {}
    for i, moments in optimizer.state_dict()["state"].items() if optimizer else ():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    device = next(model.parameters()).device
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore(tensors, model, optimizer):
    """Undo `snapshot`; returns the best weights. Clones: memory is aligned as it always is."""
    parts, moments = {"model": {}, "best": {}, "optimizer": {}, "rng": {}}, {}
    for name in list(tensors):
        part, _, rest = name.partition(".")
        parts[part][rest] = tensors.pop(name).clone()
    model.load_state_dict(parts["model"], strict=False)
    for name, tensor in parts["optimizer"].items():
        i, _, key = name.partition(".")
        moments.setdefault(int(i), {})[key] = tensor
    if moments:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    device = next(model.parameters()).device
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"], device)
    return {name: tensor.to(device) for name, tensor in parts["best"].items()}


def save_state(folder, number, facts, tensors):
    name = f"{number}-{facts['step']:08d}"
    write_safetensors(tensors, folder / f"{name}.safetensors")
    flush(folder / f"{name}.safetensors")
    state = {"state": facts, "sha256": checksum(folder / f"{name}.safetensors", facts)}
    write_json(state, folder / f"{name}.json")
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
            state, file = data.read_json(path), path.with_suffix(".safetensors")
            if state["sha256"] != checksum(file, state["state"]):
                raise ValueError("the checksum is another")
            if state["state"]["lines"] > lines:
                raise ValueError("log.jsonl is shorter than it was then")
            return state["state"], load_file(file)
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            print(f"{path} is not whole ({error}): it is left out", file=sys.stderr)
            path.unlink()
    if paths:
        print(f"{folder}: no state is whole: {stage} starts from its beginning", file=sys.stderr)
    return None, None


def checksum(file, facts):
    with open(file, "rb") as tensors:
        digest = hashlib.file_digest(tensors, "sha256")
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def flush(path):
    """To the disk itself, file or folder; Windows cannot."""
    if fcntl:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(value, path):
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


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
        os.write(2, b"\nstopping after this step; once more: at once\n")

    with locked(folder):
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
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            Journal.training = Journal.stopping = False


@contextlib.contextmanager
def locked(folder):
    """The folder itself is locked, so the kernel lets go of it however the process ends. Of a run
    that could not start nothing is left."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = fcntl and os.open(folder, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"Another process works in {folder}: wait, or take another --out."
        ) from None
    except OSError as error:
        print(f"{folder} cannot be locked ({error}): let no other run use it", file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        if fcntl:
            os.close(handle)


# ---- run folders -------------------------------------------------------------------------------


def begin(args):
    """The folder of a run that can start, with config.json and last/."""
    out, anew = Path(args.out), not args.resume or other_flags(args) != []
    if anew:
        (out / "config.json").unlink(missing_ok=True)
    (out / "last").mkdir(parents=True, exist_ok=True)  # from now on it is not complete
    if anew:
        write_config(vars(args), out)
    elif (then := data.read_json(out / "config.json")["versions"]) != VERSIONS:
        print(f"begun with {then}, goes on with {VERSIONS}: bits may differ", file=sys.stderr)


@contextlib.contextmanager
def opened_journal(args):
    path = Path(args.out) / "log.jsonl"
    mode = "r+" if args.resume and path.is_file() else "w+"
    with open(path, mode, encoding="utf-8") as file:
        yield Journal(file, path.parent / "last", args.save_every)


def complete(out):
    """last/ goes when all files of the run are on the disk."""
    for path in out.iterdir():
        if path.is_file():
            flush(path)
    shutil.rmtree(out / "last")


def other_flags(args):
    """The flags that config.json has otherwise, as sentences; None if it has no flags."""
    try:
        config = data.read_json(Path(args.out) / "config.json")
    except (FileNotFoundError, ValueError):
        return None
    if "recipe" not in config:
        return None
    now = {k: v for k, v in json.loads(json.dumps(vars(args))).items() if k not in MAY_DIFFER}
    return [
        f"--{k.replace('_', '-')} was {config[k]}, is {v}"
        for k, v in now.items()
        if k in config and config[k] != v
    ]


def check_resume(runs):
    """Before anything is done: --resume goes with the flags that an unfinished run of these was
    started with, and without it nothing that was saved is written over."""
    unfinished = [args for args in runs if (Path(args.out) / "last").is_dir()]
    for out in (Path(args.out) for args in runs if not args.resume):
        if saved := [*out.glob("last/*.json"), *out.glob("predictions.part.jsonl")]:
            raise ValueError(
                f"{out} has a run that was interrupted: add --resume to go on with it, or delete "
                f"{' and '.join(map(str, saved))} to begin anew."
            )
    for args in unfinished or runs:
        if args.resume and (other := other_flags(args)):
            raise ValueError(f"{args.out} was begun otherwise: {'; '.join(other)}.")
    if runs[0].resume and not unfinished and not any(is_complete(args) for args in runs):
        print(f"{runs[-1].out}: nothing was saved; it starts from its beginning", flush=True)


def is_complete(args):
    """Whether --resume finds nothing to do in a run's folder."""
    out = Path(args.out)
    whole = evaluation.metrics_then(out) and not (out / "last").exists()
    return bool(args.resume and whole and other_flags(args) == [])


def run_one(args):
    """The metrics of a run, which is trained and decoded unless it is complete."""
    if is_complete(args):
        print(f"{args.out}: complete already", flush=True)
        return evaluation.metrics_then(Path(args.out))
    return {"mmcot": run_mmcot, "paligemma": run_paligemma}[args.model](args)


def load_splits(args):
    """{split: problems}. Three different ones: none is cut off another."""
    names = ("train", "val", args.test_split)
    try:
        return {name: data.load(args.data, name)[: args.limit] for name in names}
    except ValueError as error:
        raise ValueError(f"{error} A run needs problems of {', '.join(names)}.") from None


# ---- mmcot: one run ----------------------------------------------------------------------------


def start_model(args, features, stage):
    """T5, or a whole released mm-cot checkpoint, with a fusion iff the run looks at pictures."""
    torch.manual_seed(args.seed)
    model = fusion.MultimodalT5.from_pretrained(args.weights[min(stage, len(args.weights) - 1)])
    if features is None:
        model.fusion = None
    elif model.fusion is None:
        width = model.t5.config.d_model
        model.fusion = fusion.GatedFusion(width, features.shape[1], args.no_image)
    args.vocabulary = model.t5.config.vocab_size
    return model


def run_mmcot(args):
    """Train, decode and score one recipe; returns its metrics. Writes the run folder `args.out`."""
    out, config = Path(args.out), vars(args)
    print(f"{out}: recipe {args.recipe}, vision {args.vision}", flush=True)
    splits = load_splits(args)
    tokenizer = data.load_tokenizer(resolve(args.weights[0]))
    features = evaluation.image_features(config, [p for ps in splits.values() for p in ps])
    begin(args)  # only now: a run that cannot start leaves nothing
    names, models = fusion.stage_names(args.recipe), []
    with opened_journal(args) as log:
        for stage, name in enumerate(names):
            if args.stage in ("both", name):
                models.append(run_stage(args, stage, splits, tokenizer, features, log))
                models[-1].save_pretrained(out / name)
                tokenizer.save(str(out / name / "tokenizer.json"))
            else:
                models.append(fusion.MultimodalT5.from_pretrained(out / name).to(args.device))
            if args.stage == name != names[-1]:
                return complete(out)  # the rationale stage alone has nothing to score yet
    how = argparse.Namespace(
        faithful_parse=False,
        teacher_forced=args.teacher_forced,
        looks=evaluation.LOOKS,
        report=True,
    )
    test = splits[args.test_split]
    scores = evaluation.evaluate(out, models, test, config, tokenizer, features, how)
    complete(out)
    return scores


def run_stage(args, stage, splits, tokenizer, features, log):
    """Train stage 0 or 1 of the recipe; returns the model."""
    fmt, name = fusion.RECIPES[args.recipe][stage], fusion.stage_names(args.recipe)[stage]
    generated = None
    if stage == 1 and args.stage2_rationales == "generated":
        generated = own_rationales(args, splits["train"], splits["val"], tokenizer, features, log)
    train = data.examples(splits["train"], fmt, tokenizer, features, generated, vars(args))
    val = data.examples(splits["val"], fmt, tokenizer, features, None, vars(args))
    show_example(train[0], tokenizer, fmt)
    model = start_model(args, features, stage)
    epochs = args.epochs[min(stage, len(args.epochs) - 1)]

    def validate(model):
        return {"val_loss": round(mean_loss(model, val, args), 6)}

    return fit(model, train, validate, args, name, epochs, log)


def own_rationales(args, problems, val, tokenizer, features, log, folds=2):
    """{id: rationale} of the training problems, each written by a stage-1 model that did not train
    on it. Training stage 2 on these closes the gap to what it reads at test time."""
    generated = {}
    # Shuffled: every second problem of a file may be of the same kind (in the demo it is).
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(args.seed))
    for fold in range(folds):
        held = set(order[fold::folds].tolist())
        seen = [p for i, p in enumerate(problems) if i not in held]
        unseen = [p for i, p in enumerate(problems) if i in held]
        splits = {"train": seen, "val": val}
        model = run_stage(args, 0, splits, tokenizer, features, log)
        examples = data.examples(unseen, "QCM-LE", tokenizer, features, None, vars(args))
        batches = evaluation.in_batches(examples, args.eval_batch_size, "own rationales")
        part = log and evaluation.Part(args.out, [model])
        texts = fusion.write(model, batches, tokenizer, args.max_output[0], part)
        generated |= {problem_id: told["text"] for problem_id, told in texts.items()}
    return generated


def show_example(example, tokenizer, what):
    """The first example as the model gets it: text and ids, the supervised part marked."""
    print(f"  first {what} example, {example['id']}:")
    parts = {"source": example["input_ids"], "supervised": example["labels"]}
    if "token_type_ids" in example:  # one sequence: image tokens are many and all alike
        start = len(example["input_ids"]) - sum(example["token_type_ids"])
        parts = {"prefix": example["input_ids"][:start], "supervised": example["labels"][start:]}
    for part, ids in parts.items():
        ids = [i for i in ids if i >= 0]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        image = tokenizer.token_to_id("<image>")
        if (n := ids.count(image)) if image else 0:
            text, ids = text.replace("<image>", ""), [i for i in ids if i != image]
            text = f"<image> x {n} {text.strip()}"
        print(f"    {part:10} {text!r}\n    {'':10} {ids}")


def write_config(config, out):
    """config.json: every flag, the versions it ran with and the commit."""
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    config = config | {"versions": VERSIONS, "commit": commit}
    write_json({k: v for k, v in config.items() if k != "resume"}, out / "config.json")


# ---- paligemma: one run ------------------------------------------------------------------------


def run_paligemma(args):
    """Train (unless --epochs 0), decode and score one recipe; returns its metrics."""
    out, config = Path(args.out), vars(args)
    print(f"{out}: recipe {args.recipe}, epochs {args.epochs[0]:g}", flush=True)
    splits = load_splits(args)
    test = splits[args.test_split]
    tokenizer = data.load_tokenizer(resolve(args.weights[0]))
    model = evaluation.load_paligemma(config)
    args.vocabulary = model.config.text.vocab_size
    if args.epochs[0]:
        free(args, model)
    rows = training_rows(args, splits["train"]) if args.epochs[0] else []
    rows = with_pictures(rows, args)
    pictured = [row[0] for row in rows] + splits["val"][: args.eval_problems] + test
    features = evaluation.image_features(config, pictured, model)
    begin(args)  # only now: a run that cannot start leaves nothing
    if rows and args.data != "demo":  # its splits are disjoint by construction
        warn_of_overlap([row[0] for row in rows], test)
    if args.epochs[0]:
        with opened_journal(args) as log:
            tune(args, model, rows, splits["val"], tokenizer, features, log)
        if args.full:
            model.save_pretrained(out)
            write_config(data.read_json(out / "config.json") | config, out)  # one file for both
        else:
            lora.save(model, out, args.weights[0])
        tokenizer.save(str(out / "tokenizer.json"))
    how = argparse.Namespace(
        faithful_parse=False, teacher_forced=False, looks=evaluation.LOOKS, report=True
    )
    scores = evaluation.evaluate(out, [model], test, config, tokenizer, features, how)
    complete(out)
    return scores


def training_rows(args, problems):
    """(problem, task, trace, True) per training row, as `data.pali_examples` takes them."""
    if notice := data.training_notice(args.data):
        print(notice, file=sys.stderr)
    by_id = {p.id: p for p in problems}
    traces = kept_traces(args, by_id)[: args.limit_traces]
    if not traces:
        raise ValueError("No trace is left to learn from: look at --traces, --keep and --data.")
    unique = list({trace["id"]: by_id[trace["id"]] for trace in traces}.values())
    answers = [(p, "answer", None, True) for p in unique]
    if args.recipe == "answer":
        return answers
    count = round(args.mix * len(traces))  # answer-only rows among the traces, evenly spread
    mixed = [answers[i * len(answers) // count] for i in range(count)] if count else []
    return [(by_id[t["id"]], "reason", t, True) for t in traces] + mixed


def kept_traces(args, by_id):
    """The traces of --traces that --keep lets through; without a file, the data's own solutions."""
    if args.traces is None:
        told = [p for p in by_id.values() if p.solution]
        print(f"  no --traces: {len(told)} solutions of the data itself are the thoughts")
        verdict = {"correct": True, "consistent": True, "by": "data", "why": ""}
        return [
            {"id": p.id, "thought": p.solution, "answer": p.answer, "verdict": verdict}
            for p in told
        ]
    traces = data.load_traces(demo_traces() if args.traces == "demo" else args.traces)
    known = [t for t in traces if t["id"] in by_id]
    wanted = {"all": (), "correct": ("correct",), "consistent": ("correct", "consistent")}
    kept = [t for t in known if all(holds(t, by_id[t["id"]], key) for key in wanted[args.keep])]
    if args.keep == "consistent":  # teacher.py's word: too long, not distinct ...
        kept = [t for t in kept if t.get("kept", True)]
    print(
        f"  {len(kept)} of {len(traces)} traces kept ({args.keep}); "
        f"{len(traces) - len(known)} are of no training problem here"
    )
    return kept


def holds(trace, problem, key):
    """The judge's word; where there is none, whether the teacher's answer is the gold one. Some
    traces that were judged correct end in another: the thought then argues for that."""
    verdict = trace["verdict"][key]
    if verdict is None:
        said, _ = evaluation.commitment(problem, trace["answer"], prose=True)
        return evaluation.right(problem, said)
    return verdict


def with_pictures(rows, args):
    """The training rows, with --on-error skip without those (named on stderr) whose picture file
    is not there. A test problem is never left out: it would be another test."""
    images = {p.id: p.image for p, *_ in rows if p.image and args.on_error == "skip"}
    missing = {id: path for id, path in images.items() if not Path(path).is_file()}
    for id, path in missing.items():
        print(f"skipped: problem {id} has no {path}", file=sys.stderr)
    return [row for row in rows if row[0].id not in missing]


def demo_traces():
    from demo import teacher

    return teacher.traces(data.demo_folder())


def warn_of_overlap(train, test):
    """Say how many test pictures were trained on. Not refused: ScienceQA shares many by design."""
    shared = {pair[1] for pair in data.overlap(train, test)}
    if shared:
        some = ", ".join(sorted(shared)[:5])
        share = f"{len(shared)} of {len(test)}"
        print(f"{share} test problems show a picture that is trained on ({some}).")


def free(args, model):
    """What shall be trained: new adapters, those of --adapter or, with --full, everything. Before
    the picture features are computed: they are not cached if the image tower is adapted too."""
    torch.manual_seed(args.seed)
    if args.full:
        model.requires_grad_(True)
    elif args.adapter is None:
        flags = ("r", "alpha", "targets", "dropout", "rslora", "dora")
        lora.inject(model, **{flag: vars(args)[f"lora_{flag}"] for flag in flags})
    if not args.full:
        print(lora.describe(model))
    model.language_model.checkpointing = args.checkpointing


def tune(args, model, rows, val, tokenizer, features, log):
    """Fit what `free` left trainable to these rows, validated on real answers."""
    config, val = vars(args), val[: args.eval_problems]
    examples = data.pali_examples(rows, tokenizer, features, config)
    ids = list(dict.fromkeys(example["id"] for example in examples))
    held_ids = set(ids[:: max(20, len(ids) // 100)])  # for the validation loss: 5 % or 100 problems
    held_back = [e for e in examples if e["id"] in held_ids]
    train = [e for e in examples if e["id"] not in held_ids]
    if not train:
        raise ValueError(
            f"{len(examples)} rows are left, {len(held_back)} of them held back for validation: "
            "none to train on. Look at --max-suffix, --limit-traces and --on-error."
        )
    show_example(examples[0], tokenizer, args.recipe)

    def validate(model):
        predictions = evaluation.predict([model.eval()], val, config, tokenizer, features)
        right = sum(g.correct for *_, g in evaluation.grade_all(val, predictions))
        accuracy = {"val_accuracy": round(100 * right / len(val), 2)} if val else {}
        return {"val_loss": round(mean_loss(model, held_back, args), 6)} | accuracy

    fit(model, train, validate, args, args.recipe, args.epochs[0], log)


# ---- many runs ---------------------------------------------------------------------------------

MMCOT_ABLATION = {  # name: changed flags; the paper's Tables 2, 3 and 6
    "QCM->A": {"recipe": "answer", "vision": "none"},
    "QCM->RA": {"recipe": "reason", "vision": "none"},
    "QCM->AR": {"recipe": "explain", "vision": "none"},
    "two-stage, text only": {"vision": "none"},
    "two-stage, captions": {"vision": "caption"},
    "two-stage, vision": {},
    "two-stage, vision, no picture masked": {"no_image": "mask"},
    "two-stage, vision, own rationales": {"stage2_rationales": "generated"},
    "one-stage QCM->RA, vision": {"recipe": "reason"},
    "QCM->A, vision": {"recipe": "answer"},
}
BASELINES = {  # what a distilled PaliGemma is compared with; the last is the run itself
    "base": {"recipe": "answer", "epochs": [0.0]},
    "base, asked to reason": {"epochs": [0.0]},
    "answer-only": {"recipe": "answer"},
    "distilled": {},
}
PALIGEMMA_ABLATION = BASELINES | {  # one part changed in each
    "unfiltered traces": {"keep": "all"},
    "judged traces": {"keep": "correct"},
    "EOS not in the loss": {"eos_in_loss": False},
    "BOS after the question": {"layout": "seed"},
    "32 traces": {"limit_traces": 32},
    "no loop stop, no forced answer": {"loop_stop": False, "force_answer": False, "epochs": [0.0]},
    "vote of 5": {"samples": 5, "temperature": 0.7, "epochs": [0.0]},
}
DECODED_AGAIN = ("no loop stop, no forced answer", "vote of 5")  # the weights of the run itself


def lines_of(args, runs):
    """{name: flags} of every line of a table like the above. The line that changes nothing is the
    run itself, in `args.out`; the others have folders in it."""
    lines = {}
    for name, changed in runs.items():
        changed = changed | {"out": str(line_folder(args, name, changed))}
        if name in DECODED_AGAIN:
            changed |= {"weights": [args.out]} if args.full else {"adapter": args.out}
        lines[name] = argparse.Namespace(**vars(args) | changed)
    return lines


def run_many(lines):
    """{name: metrics} of such lines, each shown as it is there."""
    rows = {}
    for name, args in lines.items():
        rows[name] = run_one(args)
        print(evaluation.summary(rows), flush=True)
    return rows


def line_folder(args, name, changed):
    plain = "".join(c if c.isalnum() else "-" for c in name.replace("->", "-"))
    return Path(args.out) / plain if changed else Path(args.out)


def show_many(args, runs, rows):
    """The summary of such a table, and each line's paired difference to the run itself."""
    print(f"\n{evaluation.summary(rows)}")
    problems, columns = data.load(args.data, args.test_split)[: args.limit], {}
    for name in sorted(runs, key=lambda name: bool(runs[name])):  # the run itself first
        folder = line_folder(args, name, runs[name])
        if (folder / "predictions.jsonl").is_file():
            graded = evaluation.graded_folder(folder, problems)
            columns[name] = evaluation.Column(rows[name], graded, folder)
    if len(columns) > 1:
        print(f"\n{evaluation.differences(columns)[1]}")
        evaluation.write_report(args.out, columns)


# ---- command line ------------------------------------------------------------------------------

AT_LEAST_ONE = """max_steps batch_size accumulate max_output eval_batch_size limit threads samples
    image_size max_input max_suffix lora_r save_every""".split()  # others may be 0, none negative


def parse_args(argv=None):
    """The flags; those not given take the defaults of --model, the demo's or the published ones."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    for add in (add_what, add_files, add_how, add_mmcot, add_paligemma, add_adapter, add_decoding):
        add(parser)
    args = parser.parse_args(argv)
    if bool(args.features) != bool(args.name_map):
        parser.error("--features FILE and --name-map name_map.json go together")
    for name, value in DEFAULTS[args.model, args.data == "demo"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    refuse_senseless_numbers(parser, args)
    known = fusion.RECIPES if args.model == "mmcot" else ("reason", "answer")
    if args.recipe not in known:
        parser.error(f"--model {args.model} knows the recipes {', '.join(known)}")
    if args.full and args.adapter:
        parser.error("--full trains all weights, --adapter starts from an adapter: not both")
    if args.samples > 1 and args.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy texts are all the same")
    half = args.model == "paligemma" and args.device.startswith("cuda") and not args.full
    if args.full and args.dtype == "bfloat16":
        parser.error("--full trains in float32: steps of 1e-5 are lost in bfloat16's 8 bits")
    args.dtype = args.dtype or ("bfloat16" if half else "float32")
    what = args.vision if args.model == "mmcot" else "paligemma"
    args.out = args.out or f"runs/{Path(args.data).stem}-{args.recipe}-{what}"
    if args.model == "paligemma" and args.data == "demo":
        args.traces = args.traces or "demo"
    return args


def refuse_senseless_numbers(parser, args):
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            least = 1 if name in AT_LEAST_ONE else 0
            if isinstance(x, int | float) and not x >= least:  # nan is refused as well
                parser.error(f"--{name.replace('_', '-')} {x} makes no sense: {least} is the least")


def add_what(parser):
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model", choices=("mmcot", "paligemma"), required=True, help="the system to train"
    )
    recipes = "mmcot: two-stage, answer, reason, explain; paligemma: reason, answer"
    what.add_argument("--recipe", metavar="NAME", help=recipes)
    tables = "mmcot: the paper's Tables 2, 3 and 6; paligemma: what each part buys"
    what.add_argument("--ablation", action="store_true", help=tables)


def add_files(parser):
    files = parser.add_argument_group("files")
    folders = "demo, scienceqa, mathvista, a folder of theirs or a .jsonl (%(default)s)"
    files.add_argument("--data", default="demo", help=folders)
    weights = "T5 or PaliGemma folder or Hub id; mmcot takes one for both stages or one each"
    files.add_argument("--weights", nargs="+", help=weights)
    files.add_argument("--features-cache", help="folder for image features")
    files.add_argument("--out", help="run folder (runs/DATA-RECIPE-...)")
    files.add_argument("--test-split", default="test", help="what the table is about (%(default)s)")


def add_how(parser):
    how = parser.add_argument_group("how")
    epochs = "mmcot: for both stages or one each; 0 only decodes"
    how.add_argument("--epochs", type=float, nargs="+", help=epochs)
    how.add_argument("--max-steps", type=int, help="stop each training after so many steps")
    how.add_argument("--batch-size", type=int, help="rows that go through the model together")
    how.add_argument("--accumulate", type=int, help="batches in an optimizer step")
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--weight-decay", type=float, help="of matrices")
    weighting = "token: the mean over a step's tokens; example: the mean of each row's mean"
    how.add_argument("--weighting", choices=("token", "example"), help=weighting)
    how.add_argument("--max-output", type=int, nargs="+", help="new tokens: rationale, answer")
    how.add_argument("--eval-batch-size", type=int, default=64, help="(%(default)s)")
    how.add_argument("--limit", type=int, help="only the first N problems of each split")
    resume = "go on, to the bit, with the run in --out that was interrupted"
    how.add_argument("--resume", action="store_true", help=resume)
    every = "steps between two saved states (one a minute, at most a twentieth of the time)"
    how.add_argument("--save-every", type=int, metavar="N", help=every)
    how.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    how.add_argument("--device", default=DEVICE, help="(%(default)s)")
    how.add_argument("--threads", type=int, help="CPU threads (demo: 1, else all)")


def add_mmcot(parser):
    mmcot = parser.add_argument_group("mmcot")
    pictures = ("detr", "caption", "none")
    mmcot.add_argument(
        "--vision", choices=pictures, default="detr", help="what stands for the picture"
    )
    mmcot.add_argument("--vision-weights", help="DETR folder or Hub id")
    mmcot.add_argument("--image-size", type=int, help="shorter side for DETR, in pixels")
    mmcot.add_argument("--features", help="published detr.npy, clip.npy, resnet.npy or vit.pth")
    mmcot.add_argument("--name-map", help="name_map.json that goes with --features")
    none = "problems without picture, in a new fusion: see fusion.py"
    mmcot.add_argument("--no-image", choices=fusion.NO_IMAGE, default="zero", help=none)
    stages = ("both", "rationale", "answer")
    mmcot.add_argument("--stage", choices=stages, default="both", help="train one stage")
    kinds = ("gold", "generated")
    reads = "what stage 2 trains on"
    mmcot.add_argument("--stage2-rationales", choices=kinds, default="gold", help=reads)
    longest = "source tokens; longer ones lose their middle"
    mmcot.add_argument("--max-input", type=int, help=longest)
    stray = 'as the original had it: a newline becomes a stray "n"'
    mmcot.add_argument("--faithful-text", action="store_true", help=stray)
    forced = "show the inflated ROUGE-L of teacher-forced rationales as well"
    mmcot.add_argument("--teacher-forced", action="store_true", help=forced)


def add_paligemma(parser):
    pali = parser.add_argument_group("paligemma")
    traces = "traces.jsonl, or pali_reason's csv or json; none: the data's own solutions"
    pali.add_argument("--traces", metavar="FILE", help=traces)
    kept = "traces to learn from: all, judged correct, or also judged consistent (%(default)s)"
    kinds = ("all", "correct", "consistent")
    pali.add_argument("--keep", choices=kinds, default="consistent", help=kept)
    pali.add_argument("--limit-traces", type=int, metavar="N", help="only the first N of them")
    pali.add_argument("--mix", type=float, help="answer-only rows for each trace")
    longest = "tokens of a suffix; longer ones are left out, never cut"
    pali.add_argument("--max-suffix", type=int, help=longest)
    shuffle = "shuffle the choices of training rows where no text names their letters"
    pali.add_argument("--shuffle-choices", action="store_true", help=shuffle)
    pali.add_argument("--warmup", type=float, help="share of the steps; then a cosine to 0")
    pali.add_argument(
        "--label-smoothing", type=float, default=0.0, help="spread this much over all words"
    )
    pali.add_argument("--eval-problems", type=int, help="validation problems decoded each epoch")
    missing = "training problems whose picture is missing: stop, or do without (%(default)s)"
    pali.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=missing)
    alone = "only this run, without the baselines it must be compared with"
    pali.add_argument("--alone", action="store_true", help=alone)
    seed_layout = "seed: BOS after the question, as pali_reason had it"
    layouts = ("paligemma", "seed")
    pali.add_argument("--layout", choices=layouts, default="paligemma", help=seed_layout)
    no_eos = "leave EOS out of the loss: shows what that does"
    pali.add_argument("--no-eos-loss", dest="eos_in_loss", action="store_false", help=no_eos)


def add_adapter(parser):
    lora_ = parser.add_argument_group("paligemma: weights")
    lora_.add_argument("--full", action="store_true", help="train all weights, not adapters")
    lora_.add_argument("--adapter", metavar="DIR", help="start from this adapter, or only decode")
    lora_.add_argument("--lora-r", type=int, help="rank")
    lora_.add_argument("--lora-alpha", type=float, help="the update is scaled by alpha / r")
    lora_.add_argument("--lora-dropout", type=float, default=0.0, help="(%(default)s)")
    targets = "module names or paths; no patterns (all projections of the language model)"
    lora_.add_argument("--lora-targets", nargs="+", help=targets)
    lora_.add_argument("--lora-rslora", action="store_true", help="scale by alpha / sqrt(r)")
    lora_.add_argument("--lora-dora", action="store_true", help="magnitude and direction apart")
    dtype = "of frozen weights and compute (bfloat16 on a GPU, else float32)"
    lora_.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
    again = "keep only each layer's input, compute it again on the way back"
    flag = argparse.BooleanOptionalAction
    lora_.add_argument("--checkpointing", action=flag, help=again)
    cap = "cap the final logits as in pretraining"
    lora_.add_argument("--final-soft-cap", action=flag, help=cap)


def add_decoding(parser):
    how = parser.add_argument_group("paligemma: decoding")
    many = "texts per problem; their answers vote (%(default)s)"
    how.add_argument("--samples", type=int, default=1, metavar="N", help=many)
    how.add_argument("--temperature", type=float, default=0.0, help="(%(default)s: greedy)")
    loops = "let a rationale repeat itself until its budget is spent"
    how.add_argument("--no-loop-stop", dest="loop_stop", action="store_false", help=loops)
    cut = 'do not give a cut rationale its "Answer:"'
    how.add_argument("--no-forced-answer", dest="force_answer", action="store_false", help=cut)


def main(argv=None):
    args = parse_args(argv)
    evaluation.check_device(args.device)
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    distilled = args.model == "paligemma" and args.recipe == "reason" and args.epochs[0]
    compared = distilled and not args.alone
    tables = {"mmcot": MMCOT_ABLATION, "paligemma": PALIGEMMA_ABLATION}
    runs = tables[args.model] if args.ablation else BASELINES if compared else None
    args.teacher_forced |= args.ablation
    with in_use(Path(args.out)):
        lines = lines_of(args, runs) if runs else {args.out: args}
        check_resume([*lines.values()])
        if runs:
            rows = run_many(lines)
            if not args.ablation:
                print(f"\n{evaluation.table(rows)}")
            show_many(args, runs, rows)
        elif scores := run_one(args):
            print(f"\n{evaluation.table({args.out: scores})}")
    print(f"\n{args.out}: done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        print("\ntrain.py: stopped; the same command with --resume goes on from here")
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"train.py: {error}")
