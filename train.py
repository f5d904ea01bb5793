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
`torchrun --nproc-per-node N train.py ...` takes N devices: see "many devices".

Left out on purpose: trainer classes, callbacks, autocast (weights that are trained are fp32, frozen
ones bf16 where the device is good at it), loggers other than log.jsonl.

Axes: B batch, T length, U target length, D width, V vocabulary, `tokens` in the loss.
"""

import argparse
import contextlib
import ctypes
import datetime
import errno
import functools
import gc
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
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.adamw import adamw

import data
import eval as evaluation
import fusion
import lora
from model import of_all_ranks, rank, resolve, stored_tensors, world, write_safetensors
from support import files, pictures
from support.features import Features
from support.tokenizing import load_tokenizer
from support.traces import load_traces, overlap, training_notice

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


def cross_entropy(head, weight, states, labels, args):
    """Summed cross-entropy of the supervised tokens, and what to divide it by.

    states (B, T, D), labels (B, T), -100 where nothing is learned. The vocabulary layer `head`,
    which multiplies by `weight` (V, D), sees only the supervised positions, some at a time: the
    logits of PaliGemma's 257,216 words are never all there, in neither direction.
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

    size, given = max(1, LOGITS // args.vocabulary), (states, labels, rows)
    if len(states) > size and torch.is_grad_enabled():
        loss = InChunks.apply(chunk_loss, size, weight, *given)
    else:
        parts = zip(*(x.split(size) for x in given), strict=True)
        loss = sum(chunk_loss(*part) for part in parts)
    return loss, int((lengths > 0).sum()) if by_row else len(labels)


class InChunks(torch.autograd.Function):
    """The sum of loss(states, labels, rows) over chunks of `size`, each chunk's gradient taken at
    once: its logits are computed once, and gone before the next chunk's are made."""

    @staticmethod
    def forward(ctx, loss, size, weight, states, labels, rows):
        learned, of_weight = [weight] if ctx.needs_input_grad[2] else [], None
        total, of_states = 0, torch.empty_like(states)
        for at in (slice(i, i + size) for i in range(0, len(states), size)):
            with torch.enable_grad():
                part = states[at].detach().requires_grad_()
                value = loss(part, labels[at], rows[at])
                of_states[at], *more = torch.autograd.grad(value, [part, *learned])
            total += value.detach()
            if more:
                of_weight = more[0] if of_weight is None else of_weight.add_(more[0])
        ctx.save_for_backward(of_states, of_weight)
        return total

    @staticmethod
    def backward(ctx, given):
        of_states, of_weight = ctx.saved_tensors
        of_weight = None if of_weight is None else of_weight * given
        return None, None, of_weight, of_states * given, None, None


def t5_loss(model, batch, args):
    states = model.states(
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("image_features"),
        batch["decoder_input_ids"],
    )  # (B, U, D)
    t5 = model.t5
    weight = (t5.lm_head or t5.shared).weight
    return cross_entropy(t5.head, weight, states, batch["labels"], args)


def paligemma_loss(model, batch, args):
    """The states before the first token that is learned are not computed in the top layer."""
    labels = batch["labels"][:, 1:]  # (B, T-1)
    U = labels.shape[1] - int((labels != -100).any(0).int().argmax())
    inputs = evaluation.paligemma_inputs(model, batch)
    states = model.states(**inputs, last=U + 1)[:, :-1]  # (B, U, D)
    weight = model.language_model.embed_tokens.weight
    return cross_entropy(model.head, weight, states, labels[:, -U:], args)


LOSS = {"mmcot": t5_loss, "paligemma": paligemma_loss}
COLLATE = {"mmcot": data.collate, "paligemma": data.pali_collate}


def units(window, args):
    """What a window's summed loss is divided by: its supervised tokens, or its rows."""
    counts = [len(e["labels"]) - e["labels"].count(-100) for rows in window for e in rows]
    return sum(map(bool, counts)) if args.weighting == "example" else sum(counts)


def to_device(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@torch.inference_mode()
def mean_loss(model, examples, args):
    """Cross-entropy in nats per supervised token (or of the mean example, see --weighting)."""
    model.eval()
    total = count = 0
    order = data.batches([len(e["input_ids"]) for e in examples], args.batch_size)
    for rows in order[rank() :: world()]:
        batch = COLLATE[args.model]([examples[i] for i in rows])
        loss, n = LOSS[args.model](model, to_device(batch, args.device), args)
        total, count = total + loss.item(), count + n
    total, count = summed(torch.tensor([total, count], dtype=torch.float64)).tolist()
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

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def state_dict(self):
        numbered = enumerate(self.parameters)
        return {"state": {i: self.state[p] for i, p in numbered if p in self.state}}

    def load_state_dict(self, saved):
        for i, moments in saved["state"].items():
            p = self.parameters[i]
            self.state[p] = {n: t if n == "step" else t.to(p.device) for n, t in moments.items()}


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
    """Train in place (of FSDP's parts it makes a new model) and return the model; `validate(model)`
    gives what is logged after each epoch. `log` is a `Journal`, which goes on from the last saved
    step, or any text file.

    If that has "val_accuracy", the weights of the best epoch are what is left in the end.
    What can go wrong without a word stops it with one: see "guards".
    """
    model.to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    plan = list(windows(examples, args, epochs, generator))[: args.max_steps]
    if plan and not args.dry_run:
        stop_if_it_leaks(model, plan[0][0], args, stage)
    forward = on_devices(model, args)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    if args.dry_run:
        dry_step(model, optimizer, plan, args)
        return model
    per_epoch = steps_per_epoch(examples, args)
    journal = log if isinstance(log, Journal) else Journal(log)
    done, best, seconds = journal.begin(stage, model, optimizer, examples)
    own_dropout(args, done)
    start = time.monotonic() - seconds
    for step, window in enumerate(plan[done:], done + 1):
        model.train()
        stop_unless_supervised(window, stage, step)
        batches = [to_device(COLLATE[args.model](rows), args.device) for rows in dealt(window)]
        count = units(window, args)
        total = backward(forward, batches, count)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not (math.isfinite(total) and math.isfinite(norm)):
            stop_at_what_is_not_finite(whole_model(model), total, norm, window, args, stage, step)
        if step == 1:
            stop_unless_learning(model)
        lr = args.lr * schedule(step - 1, len(plan), args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = steepest(model) if step <= 2 and lr else {}  # at the end lr rounds to nothing
        optimizer.step()
        stop_unless_moved(model, before, lr, window, stage, step)
        optimizer.zero_grad()
        entry = {"stage": stage, "step": step, "loss": round(total.item(), 6), "lr": lr}
        entry |= {"grad_norm": round(norm.item(), 4), args.weighting + "s": count}
        validates = step % per_epoch == 0 or step == len(plan)
        if validates:
            entry |= journal.validation(validate, whole_model(model))
            best = better(best, entry, model)
        seconds = time.monotonic() - start
        journal.write(entry | {"seconds": round(seconds, 2)})
        report(stage, step, len(plan), entry, seconds)
        journal.step(step, len(plan), best, seconds, validates)
    journal.end()
    if best:
        model.load_state_dict(best[2], strict=False)
        print(f"  kept: the weights after step {best[1]}, validation accuracy {best[0]:.2f}")
    return whole_model(model).eval()


def backward(forward, batches, count):
    """Put the gradients of a window's summed loss over `count` into the weights; that loss."""
    total = 0.0
    for batch in batches:
        forward.require_backward_grad_sync = batch is batches[-1]  # DDP: once a step
        loss = forward(batch)
        (loss * world() / count).backward()  # as the devices' gradients are averaged
        total += loss.detach() / count
    return summed(total)


def better(best, entry, model):
    """(accuracy, step, trained weights) of the best epoch so far; of equal ones the later."""
    accuracy = entry.get("val_accuracy")
    if accuracy is None or (best and accuracy < best[0]):
        return best
    return accuracy, entry["step"], {n: p.detach().clone() for n, p in trained(model).items()}


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


# ---- guards ------------------------------------------------------------------------------------
# Each stops the training with the reason and the records before a step is taken, or behind the
# first. A mask leak could be seen by a loss far below the base model's, but how far is a guess; so
# the first batch is asked directly whether a prediction changes with what it must not see.


def evaluated_loss(model, examples, args, shown=None, told=None, junk=None):
    """Summed loss of the examples' first `told` targets each (None: of all), in evaluation mode.
    `shown` are examples that take their place in all that the model reads; `junk` is an id that
    takes the place of pads."""
    model.eval()
    batch = COLLATE[args.model](shown or examples)
    labels = COLLATE[args.model](examples)["labels"]
    if told is not None:
        labels = labels.masked_fill((labels != -100).cumsum(1) > told, -100)
    if junk is not None:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, junk)
    batch = to_device(batch | {"labels": labels}, args.device)
    with torch.inference_mode():
        return LOSS[args.model](model, batch, args)[0].item()


def changed_from(example, first, ids):
    """The example with other targets from the `first` on, each the next one among `ids`; where the
    sequence has the target too (PaliGemma), there as well."""
    labels, source = list(example["labels"]), list(example["input_ids"])
    places = [i for i, label in enumerate(labels) if label != -100]
    for i in places[first:]:
        new = ids[(ids.index(labels[i]) + 1) % len(ids)]
        if "token_type_ids" in example:
            source[i] = new
        labels[i] = new
    return example | {"labels": labels, "input_ids": source}


def stop_if_it_leaks(model, rows, args, stage, most=4):
    """On some rows of the first batch: the loss of a target must be the same, whatever this target
    and those behind it are, and whatever is at the pads; and every target of a row is in the loss.
    A decoder that sees ahead, labels that are not shifted, a suffix that counts as prefix and pads
    that are attended to or learned all change it. RuntimeError names the rows."""
    rows = rows[:most]
    labels = [[i for i in e["labels"] if i != -100] for e in rows]
    ids = sorted({0}.union(*labels))
    said = f"{stage}, before the first step, in {', '.join(e['id'] for e in rows)}: "

    def same(one, other):  # where neither is a number another guard says so
        return one != one or other != other or abs(one - other) <= 1e-5 * max(1, abs(one))

    for first in {0, min(map(len, labels)) // 2}:
        other = [changed_from(e, first, ids) for e in rows]
        loss = evaluated_loss(model, rows, args, told=first + 1)
        if not same(loss, seen := evaluated_loss(model, rows, args, other, told=first + 1)):
            raise RuntimeError(
                f"{said}the loss of the first {first + 1} targets changes from {loss:.6g} to "
                f"{seen:.6g} with the last of them and those behind it: the model sees what it "
                "shall predict. Look at the attention mask, token_type_ids and the shift of labels."
            )
    supervised = int((COLLATE[args.model](rows)["labels"] != -100).sum())
    loss, seen = evaluated_loss(model, rows, args), evaluated_loss(model, rows, args, junk=ids[-1])
    if supervised != sum(map(len, labels)) or not same(loss, seen):
        raise RuntimeError(
            f"{said}pads take part: {supervised} targets of {sum(map(len, labels))} are in the "
            f"loss, which is {loss:.6g}, and {seen:.6g} with other ids at the pads. Look at the "
            "attention mask and at -100 in the labels."
        )


def stop_unless_supervised(window, stage, step):
    for rows in window:
        if not any(label != -100 for e in rows for label in e["labels"]):
            raise ValueError(
                f"{stage}, step {step}: no token of {', '.join(e['id'] for e in rows)} is "
                "supervised, so nothing can be learned. Their targets are empty: look at these "
                "records."
            )


def stop_at_what_is_not_finite(model, loss, norm, window, args, stage, step):
    """Of the step's records those are named whose own loss is not finite, or all if none is."""
    rows = [e for rows in window for e in rows]
    bad = [e for e in rows if not math.isfinite(evaluated_loss(model, [e], args))] or rows
    raise FloatingPointError(
        f"{stage}, step {step}: loss {float(loss)}, gradient norm {float(norm)}, in "
        f"{', '.join(e['id'] for e in bad)}. This step was not taken. Look at these records, or "
        "lower --lr."
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


def steepest(model, most=64):
    """{name: (places, values)} of the trained weights with the largest gradients of each tensor. A
    gradient below AdamW's epsilon may move nothing; lora_A has none before the second step."""
    found = {}
    for name, p in trained(model).items():
        grad = torch.zeros(0) if p.grad is None else own_part(p.grad).abs().flatten()
        if grad.numel() and grad.max() >= 1e-8:
            places = grad.topk(min(most, len(grad))).indices
            found[name] = places, own_part(p.detach()).flatten()[places].clone()
    return found


def stop_unless_moved(model, before, lr, window, stage, step):
    """Every tensor of `steepest` must have changed, unless each number in it is so large that a
    step of `lr` rounds to nothing beside it; and one at least. An optimizer of other tensors, a
    rate too small for all of them and frozen copies learn without a word."""
    now = trained(model)
    still = {
        name: (values.abs() * torch.finfo(values.dtype).eps < lr).any()
        for name, (places, values) in before.items()
        if torch.equal(own_part(now[name].detach()).flatten()[places], values)
    }
    if still and (any(still.values()) or len(still) == len(before)):
        raise RuntimeError(
            f"{stage}, step {step}, in {', '.join(e['id'] for rows in window for e in rows)}: "
            f"{len(still)} of {len(before)} trained tensors have a gradient and did not change, "
            f"{next(iter(still))} among them. Look at --lr, the dtype and what the optimizer was "
            "given."
        )


# ---- many devices ------------------------------------------------------------------------------
# Under torchrun every process runs this file, on a device of its own, and knows the whole plan:
# what differs is which rows it is dealt, and that only the first one (rank 0) writes and is heard.
# The steps are those of one device: N of them change the time, the last bits of sums, and dropout.
# All must see one disk. (How the texts of all are put together: `model.of_all_ranks`.)


def under_torchrun():
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def devices(args):
    """As one of torchrun's processes, if it started this one."""
    if not under_torchrun():
        yield
        return
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device} under torchrun: give cpu or cuda, it picks each.")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    try:
        with contextlib.ExitStack() as silence:
            if rank():
                null = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(null))
                silence.enter_context(contextlib.redirect_stderr(null))
            yield
    except Exception:
        if rank():  # the first one may say the same; then torchrun ends this one meanwhile
            time.sleep(5)
        raise
    dist.destroy_process_group()


class LossOf(torch.nn.Module):
    """A model's summed loss of a batch as a module, which is what DDP and FSDP take."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, batch):
        return LOSS[self.args.model](self.model, batch, self.args)[0]


def on_devices(model, args):
    """`LossOf` whose gradients are averaged over all devices: by DDP, which has all of the model
    on each, or (--full) by FSDP, which leaves each a part of weights, gradients and moments."""
    loss_of = LossOf(model, args)
    if world() == 1:
        return loss_of
    if args.full:
        from torch.distributed.device_mesh import init_device_mesh  # seconds to import
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(args.device, (world(),))
        for layer in (*model.vision_tower.encoder.layers, *model.language_model.layers):
            fully_shard(layer, mesh=mesh)
        return fully_shard(loss_of, mesh=mesh)
    ids = [torch.cuda.current_device()] if args.device == "cuda" else None
    unseen = any("vision_tower" in n or "projector" in n for n in trained(model))  # no picture
    ddp = torch.nn.parallel.DistributedDataParallel
    return ddp(loss_of, device_ids=ids, find_unused_parameters=unseen)


def dealt(window):
    """A window's batches as this process gets them: every `world()` of them become one, and its
    rows are dealt. So a device never has more than --batch-size at once, and all have as many
    batches.

    Who gets no row, or no picture where others train the image tower on one (it waits for all
    devices), gets one more without labels: it is in no loss, and in no gradient."""
    batches = []
    for start in range(0, len(window), world()):
        rows = [e for batch in window[start : start + world()] for e in batch]
        mine, seen = rows[rank() :: world()], [e for e in rows if trains_on_picture(e)]
        if not mine or (seen and not any(map(trains_on_picture, mine))):
            watched = (seen or rows)[0]
            mine = [*mine, watched | {"labels": [-100] * len(watched["labels"])}]
        batches.append(mine)
    return batches


def trains_on_picture(example):
    return isinstance(example.get("image_features"), pictures.Picture)


def own_dropout(args, done):
    """The first process draws as a single one; each other has a generator of its own."""
    if rank():
        torch.manual_seed(args.seed + (rank() << 40) + (done << 20))


def summed(tensor):
    """A tensor's sum over all processes, for each of them."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def whole(tensor):
    """A tensor of which FSDP gave each device a part; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor):
    """This device's part of a tensor that FSDP dealt; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_first(tensor):
    """The same for a state file: in the memory of the first process, and nowhere else."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return None if rank() else tensor.cpu()


def part_like(tensor, other):
    """This device's part of a whole tensor, if it has only that of `other`."""
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_model(model):
    """A model of which FSDP gave each device a part, put together; any other as it is. Devices
    decode texts of their own, and none can wait there for the others' layers."""
    if not hasattr(next(model.parameters()), "full_tensor"):
        return model
    with torch.device("meta"):
        made = type(model)(model.config)
    tensors = {name: whole(p.detach()) for name, p in model.named_parameters()}
    made.load_state_dict(tensors, assign=True)
    return made


def agreed(*flags):
    """The flags, each set if any process has set it."""
    if world() == 1:
        return flags
    return summed(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


@contextlib.contextmanager
def in_turn():
    """The first process alone, then the others, which find its files."""
    if rank():
        dist.barrier(patient_group())
    yield
    if world() > 1 and not rank():
        dist.barrier(patient_group())


@functools.cache
def patient_group():
    """The first one may be making features, or a report, for longer than a step may ever take."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


# ---- never losing work -------------------------------------------------------------------------
# RUN/last/ has the two newest states of each training of a run: N-STEP.safetensors (weights,
# AdamW's moments, the best weights, the generators) and N-STEP.json (where it is; a SHA-256 of
# both). The JSON is renamed into place last, so a kill leaves the state before. All else is made
# again on --resume: it follows from the flags. The folder is there until the run is complete.

# Flags that change no result, or (threads) only bits of it.
MAY_DIFFER = ("resume", "dry_run", "save_every", "out", "features_cache", "threads")
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
        with in_turn():
            facts, tensors = newest_state(self.folder, self.trainings, stage, len(log))
        if len(set(of_all_ranks([{rank(): facts and facts["step"]}]).values())) > 1:
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


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
    """Undo `snapshot`; returns the best weights. Clones: memory is aligned as it always is."""
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
            state, file = files.read_json(path), path.with_suffix(".safetensors")
            if state["sha256"] != checksum(file, state["state"]):
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
    if rank():
        return
    out, anew = Path(args.out), not args.resume or other_flags(args) != []
    if anew:
        (out / "config.json").unlink(missing_ok=True)
    (out / "last").mkdir(parents=True, exist_ok=True)  # from now on it is not complete
    if anew:
        write_config(vars(args), out)
    elif (then := files.read_json(out / "config.json")["versions"]) != (now := versions()):
        print(f"begun with {then}, goes on with {now}: bits may differ", file=sys.stderr)


def versions():
    """All that the last bits depend on, but for flags and machine."""
    return VERSIONS | {"threads": torch.get_num_threads(), "processes": world()}


@contextlib.contextmanager
def opened_journal(args):
    path = Path(args.out) / "log.jsonl"
    mode = "r+" if args.resume and path.is_file() else "w+"
    with open(os.devnull if rank() else path, mode, encoding="utf-8") as file:
        yield Journal(file, path.parent / "last", args.save_every)


def complete(out):
    """last/ goes when all files of the run are on the disk."""
    if rank():
        return
    for path in out.iterdir():
        if path.is_file():
            flush(path)
    shutil.rmtree(out / "last")


def other_flags(args):
    """The flags that config.json has otherwise, as sentences; None if it has no flags."""
    try:
        config = files.read_json(Path(args.out) / "config.json")
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
    if rank():
        return
    unfinished = [args for args in runs if (Path(args.out) / "last").is_dir()]
    for out in (Path(args.out) for args in runs if not args.resume):
        if saved := [*out.glob("last/*.json"), *out.glob("predictions.part*.jsonl")]:
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
    whole = bool(evaluation.metrics_then(out))
    if args.model == "mmcot" and args.stage == "rationale" != fusion.stage_names(args.recipe)[-1]:
        whole = (out / "rationale/model.safetensors").is_file()  # it has nothing to score
    return bool(args.resume and whole and not (out / "last").exists() and other_flags(args) == [])


def run_one(args):
    """The metrics of a run, which is trained and decoded unless it is complete."""
    if is_complete(args):
        print(f"{args.out}: complete already", flush=True)
        return evaluation.metrics_then(Path(args.out))
    return {"mmcot": run_mmcot, "paligemma": run_paligemma}[args.model](args)


def load_splits(args):
    """{split: problems}, and with --on-error skip {split: [(id, reason)]} of its bad records (else
    None: the first is the error). Three different ones: none is cut off another."""
    names, splits = ("train", "val", args.test_split), {}
    skipped = {name: evaluation.bad_records(vars(args)) for name in names}
    try:
        for name in names:
            splits[name] = data.load(args.data, name, skipped[name])[: args.limit]
    except ValueError as error:
        raise ValueError(f"{error} A run needs problems of {', '.join(names)}.") from None
    if args.on_error == "stop":
        return splits, None
    for name in names:
        skipped[name] += pictures.unusable(splits[name], lambda path: None)  # too many choices
    return left_of(splits, skipped), skipped


# ---- bad records -------------------------------------------------------------------------------
# --on-error stop, the default: the first bad record, picture or trace is the error. skip: each goes
# to RUN/skipped.jsonl with the reason, and the run does without. Of a test problem that means
# another test: n is smaller, and the table says by how many and what the accuracy would be were
# they wrong.


def left_of(splits, skipped):
    """{split: problems} without those in {split: [(id, reason)]}."""
    lost = {name: {id for id, _ in bad} for name, bad in skipped.items()}
    return {name: [p for p in ps if p.id not in lost[name]] for name, ps in splits.items()}


def with_pictures(args, splits, skipped, model=None):
    """(features, splits): with --on-error skip without the problems whose picture cannot be used,
    which are added to `skipped`. Pictures that are in the feature cache are not decoded again."""
    problems = [p for ps in splits.values() for p in ps]
    bad = None if skipped is None else []
    features = evaluation.image_features(vars(args), problems, model, bad)
    if not bad:
        return features, splits
    reasons = dict(bad)
    for name, ps in splits.items():
        skipped[name] += [(p.id, reasons[p.id]) for p in ps if p.id in reasons]
        if ps and all(p.id in reasons for p in ps):
            raise ValueError(f"No problem of {name} is left, with --on-error skip: {bad[0][1]}")
    return features, left_of(splits, {name: skipped[name] for name in splits})


def told_skipped(args, skipped):
    """Write skipped.jsonl; {split: count} for the table. A record that cannot be read at all is of
    no known split: all three found it."""
    file = Path(args.out) / "skipped.jsonl"
    if not rank():
        file.unlink(missing_ok=True)
    if skipped is None:
        return None
    found = {}
    for name, bad in skipped.items():
        for entry in bad:
            found.setdefault(entry, []).append(name)
    rows = [(*entry, names[0] if len(names) == 1 else None) for entry, names in found.items()]
    counts = {name: sum(row[2] == name for row in rows) for name in skipped}
    if unknown := sum(row[2] is None for row in rows):
        counts["split unknown"] = unknown
    if rows and not rank():
        files.write_skipped(rows, file)
        told = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        print(f"  skipped: {told}; {file} says why", flush=True)
    return counts


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
    splits, skipped = load_splits(args)
    tokenizer = load_tokenizer(resolve(args.weights[0]))
    with in_turn():
        features, splits = with_pictures(args, splits, skipped)
    begin(args)  # only now: a run that cannot start leaves nothing
    skipped = told_skipped(args, skipped)
    names, models = fusion.stage_names(args.recipe), []
    with opened_journal(args) as log:
        for stage, name in enumerate(names):
            if args.stage in ("both", name):
                models.append(run_stage(args, stage, splits, tokenizer, features, log))
                if not rank():
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
        skipped=skipped,
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
    config = config | {"versions": versions(), "commit": commit}
    kept = {k: v for k, v in config.items() if k not in ("resume", "dry_run")}
    write_json(kept, out / "config.json")


# ---- paligemma: one run ------------------------------------------------------------------------


def run_paligemma(args):
    """Train (unless --epochs 0), decode and score one recipe; returns its metrics."""
    out, config = Path(args.out), vars(args)
    print(f"{out}: recipe {args.recipe}, epochs {args.epochs[0]:g}", flush=True)
    splits, skipped = load_splits(args)
    tokenizer = load_tokenizer(resolve(args.weights[0]))
    model = evaluation.load_paligemma(config)
    args.vocabulary = model.config.text.vocab_size
    if args.epochs[0]:
        free(args, model)
    rows = training_rows(args, splits["train"], skipped) if args.epochs[0] else []
    learned = {row[0].id: row[0] for row in rows}
    splits |= {"train": [*learned.values()], "val": splits["val"][: args.eval_problems]}
    with in_turn():
        features, splits = with_pictures(args, splits, skipped, model)
    left, test = {p.id for p in splits["train"]}, splits[args.test_split]
    rows = [row for row in rows if row[0].id in left]
    if not isinstance(features, pictures.Pictures):
        model.vision_tower = None  # all pictures were looked at: 0.8 GiB of the 3B's 5.7 in bf16
    begin(args)  # only now: a run that cannot start leaves nothing
    skipped = told_skipped(args, skipped)
    if rows and args.data != "demo":  # its splits are disjoint by construction
        warn_of_overlap([row[0] for row in rows], test)
    if args.epochs[0]:
        with opened_journal(args) as log:
            model = tune(args, model, rows, splits["val"], tokenizer, features, log)
        if not rank():
            save_paligemma(args, model, tokenizer)
    how = argparse.Namespace(
        faithful_parse=False,
        teacher_forced=False,
        looks=evaluation.LOOKS,
        report=True,
        skipped=skipped,
    )
    scores = evaluation.evaluate(out, [model], test, config, tokenizer, features, how)
    complete(out)
    return scores


def save_paligemma(args, model, tokenizer):
    out = Path(args.out)
    if args.full:
        model.save_pretrained(out)
        write_config(files.read_json(out / "config.json") | vars(args), out)  # one file for both
    else:
        lora.save(model, out, args.weights[0])
    tokenizer.save(str(out / "tokenizer.json"))


def training_rows(args, problems, skipped=None):
    """(problem, task, trace, True) per training row, as `data.pali_examples` takes them."""
    if notice := training_notice(args.data):
        print(notice, file=sys.stderr)
    by_id = {p.id: p for p in problems}
    traces = kept_traces(args, by_id, skipped)[: args.limit_traces]
    if not traces:
        raise ValueError("No trace is left to learn from: look at --traces, --keep and --data.")
    unique = list({trace["id"]: by_id[trace["id"]] for trace in traces}.values())
    answers = [(p, "answer", None, True) for p in unique]
    if args.recipe == "answer":
        return answers
    count = round(args.mix * len(traces))  # answer-only rows among the traces, evenly spread
    mixed = [answers[i * len(answers) // count] for i in range(count)] if count else []
    return [(by_id[t["id"]], "reason", t, True) for t in traces] + mixed


def kept_traces(args, by_id, skipped=None):
    """The traces of --traces that --keep lets through; without a file, the data's own solutions.
    Bad ones go to skipped["traces"], if that is given."""
    if args.traces is None:
        told = [p for p in by_id.values() if p.solution]
        print(f"  no --traces: {len(told)} solutions of the data itself are the thoughts")
        verdict = {"correct": True, "consistent": True, "by": "data", "why": ""}
        return [
            {"id": p.id, "thought": p.solution, "answer": p.answer, "verdict": verdict}
            for p in told
        ]
    bad = None if skipped is None else skipped.setdefault("traces", [])
    traces = load_traces(demo_traces() if args.traces == "demo" else args.traces, bad)
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


def demo_traces():
    from demo import teacher

    return teacher.traces(data.demo_folder())


def warn_of_overlap(train, test):
    """Say how many test pictures were trained on. Not refused: ScienceQA shares many by design."""
    shared = {pair[1] for pair in overlap(train, test)}
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
    """Fit what `free` left trainable to these rows, validated on real answers; the model."""
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

    return fit(model, train, validate, args, args.recipe, args.epochs[0], log)


# ---- before a run: --dry-run -------------------------------------------------------------------
# What is kept for the way back grows by the same amount with each row, so it is counted on one and
# on two rows of the longest batch (unique storages of the saved tensors) and goes from there to the
# batch: nothing is tried that may not fit. Not counted: what a kernel needs while it runs.

GIB = 2**30


def dry_run(args):
    """Parameters, memory, one step and the time of each training of a run. Nothing is written; the
    pictures are not looked at: features of zeros stand for them."""
    print(f"{args.out}: recipe {args.recipe}", flush=True)
    splits, skipped = load_splits(args)
    if skipped and (bad := [entry for found in skipped.values() for entry in found]):
        print(f"  {len(set(bad))} bad records would be skipped, the first is {bad[0][0]}")
    tokenizer = load_tokenizer(resolve(args.weights[0]))
    if args.model == "paligemma":
        return dry_paligemma(args, splits, tokenizer)
    features = blank_features(args, splits["train"] + splits["val"])
    args = argparse.Namespace(**vars(args) | {"stage2_rationales": "gold"})
    models = []  # they stay, as in a run
    for stage, name in enumerate(fusion.stage_names(args.recipe)):
        if args.stage in ("both", name):
            models.append(run_stage(args, stage, splits, tokenizer, features, None))


def dry_paligemma(args, splits, tokenizer):
    if not args.epochs[0]:
        return print("  nothing is trained: it only decodes")
    model = evaluation.load_paligemma(vars(args))
    args.vocabulary = model.config.text.vocab_size
    free(args, model)
    rows = training_rows(args, splits["train"])
    features = blank_features(args, [row[0] for row in rows], model)
    tune(args, model, rows, splits["val"], tokenizer, features, None)


def blank_features(args, problems, model=None):
    """Features of zeros in the shape that these problems' pictures will have."""
    if model is not None:
        inside = all(name.startswith("language_model.") for name in lora.adapters(model))
        if args.full or not inside:
            return evaluation.image_features(vars(args), problems, model)  # pixels, read when used
        shape = model.config.image_tokens, model.config.text.hidden_size
    elif args.vision != "detr" or args.features:
        return evaluation.image_features(vars(args), problems)
    else:
        folder = resolve(args.vision_weights)
        count = sum(math.prod(shape) for _, shape in stored_tensors(folder).values())
        print(f"  {folder}: {count:,} numbers, frozen; it sees each picture once, before training")
        shape = [files.read_json(folder / "config.json")[key] for key in ("num_queries", "d_model")]
    rows = {p.id: 0 for p in problems if p.image is not None}
    return Features(torch.zeros(1, *shape).numpy(), rows)


def dry_step(model, optimizer, plan, args):
    """Print what a training takes and what the device has; then, if that fits, one step."""
    if not plan:
        return print("  nothing is trained: it only decodes")
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what another stage gave back
        ctypes.CDLL(None).malloc_trim(0)
    before = held(args.device)
    total = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in trained(model).values())
    rows = max((rows for window in plan for rows in window), key=tokens)
    source, target = longest_row(rows)
    print(f"  {learned:,} parameters trainable, {total - learned:,} frozen")
    sizes = memory(model, rows, args)
    sizes["program and data"] = max(0, before - sizes["weights"])
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        print(f"    {name:18} {size / GIB:8.3f} GiB")
    print(f"    the longest batch: {len(rows)} rows of {source} + {target} tokens")
    cache = cache_size(model, source, args)
    print(f"    (decoding {args.eval_batch_size} rows: a cache of {cache / GIB:.3f} GiB)")
    free_now, has = device_memory(args.device)
    print(f"    {args.device} has {has / GIB:.1f} GiB, {free_now / GIB:.1f} GiB of it free")
    if (needed := sum(sizes.values())) > free_now + before:
        return print(
            f"  Not tried: {needed / GIB:.1f} GiB are more than there are. Take a smaller "
            "--batch-size (with --accumulate the result is the same), --checkpointing or a "
            "smaller model."
        )
    shortest = min((rows for window in plan for rows in window), key=tokens)
    timed_step(model, optimizer, [shortest], args)  # makes AdamW's moments
    seconds, peak = timed_step(model, optimizer, [rows] * min(2, args.accumulate), args)
    off = 100 * (needed / peak - 1)
    print(f"  one step of it: {seconds:.2f} s, peak {peak / GIB:.3f} GiB, estimated {off:+.0f} %")
    rate = seconds / tokens(rows) / min(2, args.accumulate)
    whole = rate * sum(tokens(rows) for window in plan for rows in window)
    print(f"  {len(plan)} steps: {whole / 60:.1f} minutes, without validation and decoding")


def tokens(rows):
    """Of a batch, with its pads."""
    return len(rows) * sum(longest_row(rows))


def longest_row(rows):
    """The longest source and target of a batch; PaliGemma's target is in its source."""
    target = 0 if "token_type_ids" in rows[0] else max(len(e["labels"]) for e in rows)
    return max(len(e["input_ids"]) for e in rows), target


def memory(model, rows, args):
    """{what: bytes} of a training step on these rows, the program itself left out."""
    tensors = [*model.parameters(), *model.buffers()]
    learned = sum(p.numel() * p.element_size() for p in trained(model).values())
    sizes = {"weights": sum(t.numel() * t.element_size() for t in tensors)}
    sizes |= {"gradients": learned, "AdamW's moments": 2 * learned}
    if args.model == "paligemma":
        sizes["best epoch"] = learned
    longest = max(rows, key=lambda e: len(e["input_ids"]))
    if args.model == "mmcot":
        longest = longest | {"labels": max((e["labels"] for e in rows), key=len)}
    text = getattr(model, "language_model", None)
    recomputed = 0
    one, two = (saved(model, [longest] * n, args) for n in (1, 2))
    if text is not None and text.checkpointing:  # on the way back one layer has all of it again
        text.checkpointing = False
        plain = [saved(model, [longest] * n, args) for n in (1, 2)]
        text.checkpointing = True
        recomputed = plain[0] - one + (len(rows) - 1) * (plain[1] - plain[0] - two + one)
        recomputed //= len(text.layers)
    sizes["activations"] = one + (len(rows) - 1) * (two - one) + recomputed
    count = sum(label != -100 for e in rows for label in e["labels"])
    logits = min(LOGITS, count * args.vocabulary)
    sizes["logits"] = 3 * 4 * logits  # themselves, their softmax and their gradient
    return sizes


def saved(model, rows, args):
    """Bytes that a forward pass keeps for the way back, logits and weights left out."""
    batch = to_device(COLLATE[args.model](rows), args.device)
    part = max(1, sum(label != -100 for e in rows for label in e["labels"]) // 2)
    args = argparse.Namespace(**vars(args) | {"vocabulary": LOGITS // part})  # logits in two parts
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its graph it would never be freed

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = LOSS[args.model](model, batch, args)  # alive: all addresses differ
    del loss
    return sum(size for place, size in sizes.items() if place not in weights)


def cache_size(model, source, args):
    """Bytes of keys and values when --eval-batch-size rows are decoded at full length."""
    new, size = max(args.max_output), next(model.parameters()).element_size()
    if args.model == "mmcot":
        c = model.t5.config
        each = 2 * c.decoder_layers * c.num_heads * c.d_kv * (source + new)
    else:
        c = model.config.text
        each = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (source + new)
    return args.eval_batch_size * each * size


def timed_step(model, optimizer, window, args):
    """(seconds, peak bytes) of a step as in `fit`."""
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    start = time.monotonic()
    model.train()
    for rows in window:
        batch = to_device(COLLATE[args.model](rows), args.device)
        loss, count = LOSS[args.model](model, batch, args)
        (loss / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize(args.device)
        return time.monotonic() - start, torch.cuda.max_memory_allocated(args.device)
    return time.monotonic() - start, held("peak")


def held(what):
    """Bytes that this process holds, on a GPU what its tensors take; "peak": the most it held."""
    if what.startswith("cuda"):
        return torch.cuda.memory_allocated(what)
    try:
        told = Path("/proc/self/status").read_text()
        line = "VmHWM:" if what == "peak" else "VmRSS:"
        return 1024 * int(told.split(line)[1].split()[0])
    except OSError:  # macOS tells only the most, in bytes
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory(device):
    """(bytes free, bytes in all) of a GPU, or of the machine; a container may have less."""
    if device.startswith("cuda"):
        free_now, has = torch.cuda.mem_get_info(device)
        return free_now + torch.cuda.memory_reserved(device) - held(device), has
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free_now = has
    with contextlib.suppress(OSError, IndexError):
        told = Path("/proc/meminfo").read_text()
        free_now = 1024 * int(told.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        has, free_now = min(has, limit), min(free_now, limit - used)
    return free_now, has


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
    if rank():
        return
    print(f"\n{evaluation.summary(rows)}")
    bad, columns = evaluation.bad_records(vars(args)), {}
    problems = data.load(args.data, args.test_split, bad)[: args.limit]
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
    bad = "a record, picture or trace that cannot be used: stop at it, or do without (%(default)s)"
    files.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=bad)
    files.add_argument("--test-split", default="test", help="what the table is about (%(default)s)")


def add_how(parser):
    how = parser.add_argument_group("how")
    epochs = "mmcot: for both stages or one each; 0 only decodes"
    how.add_argument("--epochs", type=float, nargs="+", help=epochs)
    how.add_argument("--max-steps", type=int, help="stop each training after so many steps")
    rows = "rows that go through the model together, at most, on a device"
    how.add_argument("--batch-size", type=int, help=rows)
    step = "batches in an optimizer step, on however many devices"
    how.add_argument("--accumulate", type=int, help=step)
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--weight-decay", type=float, help="of matrices")
    weighting = "token: the mean over a step's tokens; example: the mean of each row's mean"
    how.add_argument("--weighting", choices=("token", "example"), help=weighting)
    how.add_argument("--max-output", type=int, nargs="+", help="new tokens: rationale, answer")
    how.add_argument("--eval-batch-size", type=int, default=64, help="(%(default)s)")
    how.add_argument("--limit", type=int, help="only the first N problems of each split")
    resume = "go on, to the bit, with the run in --out that was interrupted"
    how.add_argument("--resume", action="store_true", help=resume)
    dry = "print parameters, memory, one measured step and the time it would take; write nothing"
    how.add_argument("--dry-run", action="store_true", help=dry)
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
    lines = lines_of(args, runs) if runs else {args.out: args}
    if args.dry_run and under_torchrun():
        raise ValueError("--dry-run measures a single process: give it without torchrun.")
    if args.dry_run:
        for line in lines.values():
            dry_run(line)
        return
    with devices(args), in_use(Path(args.out)):
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
        if not rank():
            print("\ntrain.py: stopped; the same command with --resume goes on from here")
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        who = f" (process {rank()} of {world()})" if world() > 1 else ""
        sys.exit(f"train.py{who}: {error}")
