"""The parts of a training: its plan, a model with its loss, AdamW, and a step's state.

AdamW (Loshchilov and Hutter, arXiv 1711.05101): which tensors decay is as published.

Axes: D width, V vocabulary, `tokens` those that are supervised.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

import data
import fusion
from support import files
from support.checkpoints.weights import in_file_names
from support.distributed import on_first, rank, shard_like, summed, world
from support.training.settings import Settings

LOGITS = 2**24  # of one chunk of the loss: 64 MiB in fp32
KEPT_BY = {"val_accuracy", "val_rougeL"}  # what a best epoch is chosen by
Rows = list[dict]  # examples, as data.py makes them; a batch is a list of them
Tensors = dict[str, torch.Tensor]


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of the trained parameters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- a model, and its loss -----------------------------------------------------------------------


def start_model(
    weights: str, features: data.ImageSource | None, no_image: str, seed: int
) -> fusion.MultimodalT5:
    """T5, or a whole released mm-cot checkpoint, with a fusion iff the run looks at images."""
    torch.manual_seed(seed)  # of a new fusion, and of dropout
    model = fusion.MultimodalT5.from_pretrained(weights)
    if features is None:
        model.fusion = None
    elif model.fusion is None:
        width = model.t5.config.d_model
        model.fusion = fusion.GatedFusion(width, features.shape[1], no_image)
    in_file_names(model)  # an error for what could not be saved, before it is trained
    return model


class LossOf(torch.nn.Module):
    """A model and its loss as one module, which is what DDP and FSDP take.

    loss(model, batch, weighting, label_smoothing) gives the summed loss of a batch and what to
    divide it by; collate(rows) gives a batch."""

    def __init__(
        self, model: torch.nn.Module, loss: Callable, collate: Callable, settings: Settings
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.collate = collate
        self.settings = settings

    def batch(self, rows: Rows) -> dict:
        """The rows as a batch on the device."""
        device = self.settings.device
        batch = self.collate(rows)
        return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def forward(self, batch: dict) -> tuple[torch.Tensor, int]:
        return self.loss(self.model, batch, self.settings.weighting, self.settings.label_smoothing)

    def with_model(self, model: torch.nn.Module) -> "LossOf":
        """The same loss, of another model."""
        return LossOf(model, self.loss, self.collate, self.settings)


def units(window: list[Rows], weighting: str) -> int:
    """What a window's summed loss is divided by: its supervised tokens, or its rows."""
    counts = [len(e["labels"]) - e["labels"].count(-100) for rows in window for e in rows]
    return sum(counts) if weighting == "token" else sum(count > 0 for count in counts)


@torch.inference_mode()
def mean_loss(loss_of: LossOf, rows: Rows, batch_size: int) -> float:
    """Cross-entropy in nats per supervised token (or of the mean row, see --weighting)."""
    loss_of.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # of losses, and of what to divide by
    order = data.batches([len(row["input_ids"]) for row in rows], batch_size)
    for chosen in order[rank() :: world()]:
        loss, count = loss_of(loss_of.batch([rows[i] for i in chosen]))
        sums += torch.tensor([loss.item(), count], dtype=torch.float64)
    total, count = summed(sums).tolist()
    return total / count


# ---- the plan ------------------------------------------------------------------------------------


@dataclass
class Plan:
    """A training before its first step: `train.fit` takes the steps, a dry run measures one."""

    stage: str  # its name in the log and in errors
    loss_of: LossOf
    rows: Rows
    windows: list[list[Rows]]  # the batches of each step
    rates: list[float]  # learning rate of each step
    epoch_ends: set[int]  # the steps, counted from 1, after which it validates
    # Returns what is logged after an epoch. With one of KEPT_BY in it, the best epoch's weights are
    # kept.
    validate: Callable[[LossOf], dict]


def windows(
    rows: Rows, batch_size: int, accumulate: int, epochs: float, seed: int
) -> list[list[Rows]]:
    """Windows of `accumulate` batches, `epochs` times through the rows, each time freshly shuffled;
    an epoch's last window may have fewer. One is a step of the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
    steps = math.ceil(steps_per_epoch(len(rows), batch_size, accumulate) * epochs)
    result = []
    while len(result) < steps:
        order = data.batches(lengths, batch_size, generator)
        batches = [[rows[i] for i in chosen] for chosen in order]
        for start in range(0, len(batches), accumulate):
            result.append(batches[start : start + accumulate])
    return result[:steps]


def steps_per_epoch(rows: int, batch_size: int, accumulate: int) -> int:
    return math.ceil(math.ceil(rows / batch_size) / accumulate)


def linear_decay(peak: float, steps: int) -> list[float]:
    """The learning rate of each step: from the peak to 0, as published for mmcot."""
    return [peak * (1 - step / max(1, steps)) for step in range(steps)]


def warmup_cosine(peak: float, steps: int, warmup: float) -> list[float]:
    """The learning rate of each step: linear warm-up over a share `warmup` of them, then a cosine
    to 0. The first step's is not 0, or it would be lost."""
    warm = max(1, round(warmup * steps))
    rates = [peak * ((step + 1) / warm) for step in range(min(warm, steps))]
    for step in range(warm, steps):
        angle = math.pi * (step - warm) / max(1, steps - warm)
        rates.append(peak * (0.5 * (1 + math.cos(angle))))
    return rates


# ---- the loss, some tokens at a time -------------------------------------------------------------


def in_chunks(
    loss: Callable,
    weight: torch.Tensor,
    states: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """The sum of loss(states, labels, rows) over chunks that have `LOGITS` logits at most.

    states (tokens, D), labels and rows (tokens,), which go through `loss` as they are; `weight`
    (V, D) is what it multiplies states by, and gets its gradient here.
    """
    size = max(1, LOGITS // len(weight))
    if len(states) > size and torch.is_grad_enabled():
        return InChunks.apply(loss, size, weight, states, labels, rows)
    chunks = zip(states.split(size), labels.split(size), rows.split(size), strict=True)
    return sum(loss(*chunk) for chunk in chunks)


class InChunks(torch.autograd.Function):
    """The sum of loss(states, labels, rows) over chunks of `size`, each chunk's gradient taken at
    once: its logits are computed once, and gone before the next chunk's are computed."""

    @staticmethod
    def forward(
        ctx,
        loss: Callable,
        size: int,
        weight: torch.Tensor,
        states: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        wanted = [weight] if ctx.needs_input_grad[2] else []  # a frozen head needs no gradient
        grad_weight = None
        grad_states = torch.empty_like(states)
        total = 0
        for start in range(0, len(states), size):
            at = slice(start, start + size)
            with torch.enable_grad():
                chunk = states[at].detach().requires_grad_()
                value = loss(chunk, labels[at], rows[at])
                grad_states[at], *rest = torch.autograd.grad(value, [chunk, *wanted])
            total += value.detach()
            if rest:
                grad_weight = rest[0] if grad_weight is None else grad_weight.add_(rest[0])
        ctx.save_for_backward(grad_states, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        grad_states, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad_output
        return None, None, grad_weight, grad_states * grad_output, None, None


# ---- AdamW ---------------------------------------------------------------------------------------


class AdamW:
    """Loshchilov and Hutter, Algorithm 2: with m and v the running means of the gradient and its
    square, both unbiased, p loses lr (m / (sqrt(v) + eps) + weight_decay p).

    The function that torch.optim.AdamW calls, without that class, whose first use imports torch's
    compiler: 3 s of each start."""

    def __init__(self, groups: list[tuple[list[torch.nn.Parameter], float]]) -> None:
        """Groups (parameters, weight decay)."""
        self.groups = groups
        self.parameters = [p for params, _ in groups for p in params]
        self.state = {}  # {parameter: {"step", "exp_avg", "exp_avg_sq"}}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group, weight_decay in self.groups:
            params = [p for p in group if p.grad is not None]
            for p in params:
                if p not in self.state:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.tensor(0.0)} | moments
            states = [self.state[p] for p in params]
            adamw(
                params,
                grads=[p.grad for p in params],
                exp_avgs=[state["exp_avg"] for state in states],
                exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                lr=lr,
                weight_decay=weight_decay,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> AdamW:
    """AdamW with the published decay groups: no decay on vectors (norms, DoRA's magnitudes), and on
    what has "bias" in its name, T5's relative-position tables among it. Prints how much decays."""
    decayed = []
    spared = []
    for name, p in trained(model).items():
        group = spared if p.dim() == 1 or "bias" in name else decayed
        group.append(p)
    decays = sum(p.numel() for p in decayed)
    trainable = decays + sum(p.numel() for p in spared)
    total = sum(p.numel() for p in model.parameters())
    print(
        f"  trainable {trainable:,} of {total:,} parameters, "
        f"weight decay {weight_decay:g} on {decays:,} of them"
    )
    return AdamW([(decayed, weight_decay), (spared, 0.0)])


def show_step(stage: str, step: int, steps: int, entry: dict, seconds: float) -> None:
    """A line per validation; on a terminal also a running one with rate and time left."""
    loss = f"  loss {entry['loss']:.4f}"
    if "val_loss" not in entry:
        files.progress(f"  {stage}", step, steps, time.monotonic() - seconds, loss)
        return
    clear = "\r" if sys.stderr.isatty() else ""
    text = f"{clear}  {stage} {step}/{steps}{loss}  val loss {entry['val_loss']:.4f}"
    for name in KEPT_BY & entry.keys():
        text += f"  {name.replace('_', ' ')} {entry[name]:.2f}"
    print(f"{text}  {seconds:.0f} s", flush=True)


# ---- all that the next step depends on -----------------------------------------------------------


def snapshot(model: torch.nn.Module, optimizer: AdamW | None, best: Tensors) -> Tensors:
    """Trained weights, moments (without an optimizer none: the training has ended), the weights of
    the best epoch and the generators, by name."""
    tensors = {f"model.{name}": p.detach() for name, p in trained(model).items()}
    tensors |= {f"best.{name}": p for name, p in best.items()}
    for i, p in enumerate(optimizer.parameters if optimizer else ()):
        for name, moment in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{i}.{name}"] = moment
    tensors = {name: on_first(t) for name, t in tensors.items()}
    device = next(model.parameters()).device
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def restore(tensors: Tensors, model: torch.nn.Module, optimizer: AdamW) -> Tensors:
    """Undo `snapshot`; returns the best weights. All are cloned: a mapped file's tensors may be
    aligned otherwise than torch's own, and the last bits of a sum can depend on that."""
    parts = {"model": {}, "best": {}, "optimizer": {}, "rng": {}}
    params = trained(model) | {str(i): p for i, p in enumerate(optimizer.parameters)}
    for name in list(tensors):
        part, _, rest = name.partition(".")
        # `rest` is "t5.shared.weight" or "3.exp_avg": a moment is sharded as its parameter is.
        param = params.get(rest, params.get(rest.partition(".")[0]))
        parts[part][rest] = shard_like(tensors.pop(name).clone(), param)
    model.load_state_dict(parts["model"], strict=False)
    device = next(model.parameters()).device
    for name, moment in parts["optimizer"].items():
        i, _, key = name.partition(".")
        moments = optimizer.state.setdefault(optimizer.parameters[int(i)], {})
        moments[key] = moment if key == "step" else moment.to(device)
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"]:
        torch.cuda.set_rng_state(parts["rng"]["cuda"], device)
    return {name: tensor.to(device) for name, tensor in parts["best"].items()}
