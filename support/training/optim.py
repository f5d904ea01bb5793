"""What makes a training step small and its start quick, with the mathematics unchanged.

The loss in chunks: the logits of all supervised tokens are never there at once, in neither
direction (`in_chunks`). AdamW (Loshchilov and Hutter, arXiv 1711.05101) without the two seconds
that torch's class takes to import. Which tensors decay is as published: see `make_optimizer`.

Left out: other optimizers, gradient scaling (what is trained is fp32). The loss itself and the
learning rate's schedule are in train.py.

Axes: D width, V vocabulary, `tokens` those that are supervised.
"""

import torch
from torch.optim.adamw import adamw

LOGITS = 2**24  # of one chunk of the loss: 64 MiB in fp32


def trained(model):
    """{name: parameter} of what is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- the loss, some tokens at a time -------------------------------------------------------------


def in_chunks(loss, weight, states, labels, rows):
    """The sum of loss(states, labels, rows) over chunks that have `LOGITS` logits at most.

    states (tokens, D), labels and rows (tokens,), which go through `loss` as they are; `weight`
    (V, D) is what it multiplies states by, and gets its gradient here.
    """
    size, given = max(1, LOGITS // len(weight)), (states, labels, rows)
    if len(states) > size and torch.is_grad_enabled():
        return InChunks.apply(loss, size, weight, *given)
    parts = zip(*(x.split(size) for x in given), strict=True)
    return sum(loss(*part) for part in parts)


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


# ---- AdamW ---------------------------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay):
    """AdamW with the published decay groups: no decay on vectors (norms, DoRA's magnitudes), and on
    what has "bias" in its name, T5's relative-position tables among it. Prints how much decays."""
    groups = {True: [], False: []}
    for name, p in trained(model).items():
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
    """Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2: with m and v the running means of the
    gradient and its square, both unbiased, p loses lr (m / (sqrt(v) + eps) + weight_decay p).

    It calls the function behind torch.optim.AdamW, to the bit the same, and does without that
    class, whose first use imports torch's compiler: 2 s of each start."""

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
