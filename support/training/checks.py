"""Checks that stop a training which would go wrong silently, with the reason and the records.

All but one stop it before the step is taken; whether weights move is known after the first two. A
mask leak is tested directly: does a prediction change with what it must not see? A window is the
list of batches, lists of rows, of one step. Loss spikes, slow learning and overfitting are seen in
log.jsonl: no threshold is right for all.
"""

import math

import torch

from support.distributed import own_shard
from support.training.optim import LossOf, Rows, trained


def ids_of(*batches: Rows) -> str:
    return ", ".join(row["id"] for rows in batches for row in rows)


# ---- leaks ---------------------------------------------------------------------------------------


def evaluated_loss(
    loss_of: LossOf,
    rows: Rows,
    shown: Rows | None = None,
    targets: int | None = None,
    pad_id: int | None = None,
) -> float:
    """Summed loss of the rows' first `targets` targets each (None: of all), in evaluation mode.
    `shown` are rows that the model reads in their place; `pad_id` takes the place of pads."""
    loss_of.model.eval()
    batch = loss_of.batch(shown or rows)
    labels = loss_of.batch(rows)["labels"]
    if targets is not None:
        labels = labels.masked_fill((labels != -100).cumsum(1) > targets, -100)
    if pad_id is not None:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad_id)
    with torch.inference_mode():
        return loss_of(batch | {"labels": labels})[0].item()


def changed_from(row: dict, first: int, ids: list[int]) -> dict:
    """The row with other targets from the `first` on, each the next one among `ids`; where the
    sequence has the target too (PaliGemma), there as well."""
    labels = list(row["labels"])
    source = list(row["input_ids"])
    places = [i for i, label in enumerate(labels) if label != -100]
    for i in places[first:]:
        new = ids[(ids.index(labels[i]) + 1) % len(ids)]
        if "token_type_ids" in row:
            source[i] = new
        labels[i] = new
    return row | {"labels": labels, "input_ids": source}


def same_loss(one: float, other: float) -> bool:
    """Whether two losses are equal up to rounding; one that is not finite is another check's."""
    finite = math.isfinite(one) and math.isfinite(other)
    return not finite or abs(one - other) <= 1e-5 * max(1, abs(one))


def stop_if_it_leaks(loss_of: LossOf, rows: Rows, stage: str) -> None:
    """On four rows of the first batch: the loss of a target must be the same, whatever this target
    and those after it are, and whatever is at the pads; and every target of a row is in the loss.
    A decoder that sees ahead, labels that are not shifted, a suffix that counts as prefix and pads
    that are attended to or learned all change it. RuntimeError names the rows."""
    rows = rows[:4]
    targets = [[i for i in row["labels"] if i != -100] for row in rows]
    ids = sorted({0}.union(*targets))
    where = f"{stage}, before the first step, in {ids_of(rows)}"
    for first in {0, min(map(len, targets)) // 2}:
        others = [changed_from(row, first, ids) for row in rows]
        loss = evaluated_loss(loss_of, rows, targets=first + 1)
        changed = evaluated_loss(loss_of, rows, others, targets=first + 1)
        if not same_loss(loss, changed):
            raise RuntimeError(
                f"{where}: label leak: the loss of the first {first + 1} targets changes from "
                f"{loss:.6g} to {changed:.6g} with the last of them and those after it. Look at "
                "the attention mask, token_type_ids and the shift of labels."
            )
    count = sum(map(len, targets))
    supervised = int((loss_of.batch(rows)["labels"] != -100).sum())
    loss = evaluated_loss(loss_of, rows)
    changed = evaluated_loss(loss_of, rows, pad_id=ids[-1])
    if supervised != count or not same_loss(loss, changed):
        raise RuntimeError(
            f"{where}: padding takes part: {supervised} targets of {count} are in the loss, which "
            f"is {loss:.6g}, and {changed:.6g} with other ids at the pads. Look at the attention "
            "mask and at -100 in the labels."
        )


# ---- each step -----------------------------------------------------------------------------------


def stop_unless_supervised(window: list[Rows], where: str) -> None:
    """ValueError names the rows of a batch in which no token is in the loss."""
    for rows in window:
        if not any(label != -100 for row in rows for label in row["labels"]):
            raise ValueError(
                f"{where}: no token of {ids_of(rows)} is supervised, so nothing can "
                "be learned. Their targets are empty: look at these records."
            )


def stop_at_what_is_not_finite(
    loss_of: LossOf, loss: float, norm: float, window: list[Rows], where: str
) -> None:
    """Raise FloatingPointError. It names the records whose own loss is not finite, or all of the
    step if each is finite alone."""
    rows = [row for batch in window for row in batch]
    bad = [row for row in rows if not math.isfinite(evaluated_loss(loss_of, [row]))]
    raise FloatingPointError(
        f"{where}: loss {loss}, gradient norm {norm}, in {ids_of(bad or rows)}. This "
        "step was not taken. Look at these records, or lower --lr."
    )


# ---- the first steps -----------------------------------------------------------------------------


def stop_unless_learning(model: torch.nn.Module) -> None:
    """After the first backward pass every lora_B must have a gradient (A has none yet: B is 0).
    Checkpointing after frozen embeddings is a known way to lose them silently. RuntimeError."""
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    dead = [name for name, grad in adapters.items() if grad is None or not grad.any()]
    if dead:
        raise RuntimeError(
            f"{len(dead)} adapters got no gradient in the first step, {dead[0]} among them: "
            "nothing would be learned there. Look at what is frozen and at checkpointing."
        )


def steepest(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name: (places, values)} of the 64 weights with the largest gradients of each trained tensor.
    A gradient below AdamW's epsilon may move nothing; lora_A has none before the second step."""
    largest = {}
    for name, p in trained(model).items():
        if p.grad is None:
            continue
        grad = own_shard(p.grad).abs().flatten()
        if grad.numel() and grad.max() >= 1e-8:
            places = grad.topk(min(64, len(grad))).indices
            largest[name] = places, own_shard(p.detach()).flatten()[places].clone()
    return largest


def stop_unless_moved(
    model: torch.nn.Module, before: dict, lr: float, window: list[Rows], where: str
) -> None:
    """Every tensor of `steepest` must have changed, unless each number in it is so large that a
    step of `lr` is lost to rounding; and one at least. An optimizer of other tensors, a rate too
    small for all of them and frozen copies learn nothing, silently. RuntimeError."""
    params = trained(model) if before else {}
    unmoved = {}  # {name: whether a step of `lr` should have shown}
    for name, (places, values) in before.items():
        if torch.equal(own_shard(params[name].detach()).flatten()[places], values):
            unmoved[name] = (values.abs() * torch.finfo(values.dtype).eps < lr).any()
    if unmoved and (any(unmoved.values()) or len(unmoved) == len(before)):
        raise RuntimeError(
            f"{where}, in {ids_of(*window)}: {len(unmoved)} of {len(before)} trained tensors have "
            f"a gradient and did not change, {next(iter(unmoved))} among them. Look at --lr, the "
            "dtype and the parameters that the optimizer has."
        )
