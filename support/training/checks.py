"""What stops a training that goes wrong without a word, with the reason and the records.

All but one stop it before the step is taken; whether weights move is seen after the first two. A
mask leak could be seen by a loss far below the base model's, but how far is a guess; so the first
batch is asked directly whether a prediction changes with what it must not see. `loss_of` is
train.py's `LossOf` everywhere: it makes a batch of rows and gives the summed loss of one. A window
is the list of batches, lists of rows, of one step.

Left out: loss spikes, slow learning, overfitting. They are seen in log.jsonl, and no threshold is
right for all runs.
"""

import math

import torch

from support.distributed import own_part
from support.training.optim import trained


def evaluated_loss(loss_of, rows, shown=None, told=None, junk=None):
    """Summed loss of the rows' first `told` targets each (None: of all), in evaluation mode.
    `shown` are rows that take their place in all that the model reads; `junk` is an id that
    takes the place of pads."""
    loss_of.model.eval()
    batch, labels = loss_of.batch(shown or rows), loss_of.batch(rows)["labels"]
    if told is not None:
        labels = labels.masked_fill((labels != -100).cumsum(1) > told, -100)
    if junk is not None:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, junk)
    with torch.inference_mode():
        return loss_of(batch | {"labels": labels})[0].item()


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


def stop_if_it_leaks(loss_of, rows, stage):
    """On four rows of the first batch: the loss of a target must be the same, whatever this target
    and those behind it are, and whatever is at the pads; and every target of a row is in the loss.
    A decoder that sees ahead, labels that are not shifted, a suffix that counts as prefix and pads
    that are attended to or learned all change it. RuntimeError names the rows."""
    rows = rows[:4]
    labels = [[i for i in e["labels"] if i != -100] for e in rows]
    ids = sorted({0}.union(*labels))
    said = f"{stage}, before the first step, in {', '.join(e['id'] for e in rows)}: "

    def same(one, other):  # where neither is a number another guard says so
        return one != one or other != other or abs(one - other) <= 1e-5 * max(1, abs(one))

    for first in {0, min(map(len, labels)) // 2}:
        other = [changed_from(e, first, ids) for e in rows]
        loss = evaluated_loss(loss_of, rows, told=first + 1)
        if not same(loss, seen := evaluated_loss(loss_of, rows, other, told=first + 1)):
            raise RuntimeError(
                f"{said}the loss of the first {first + 1} targets changes from {loss:.6g} to "
                f"{seen:.6g} with the last of them and those behind it: the model sees what it "
                "shall predict. Look at the attention mask, token_type_ids and the shift of labels."
            )
    supervised = int((loss_of.batch(rows)["labels"] != -100).sum())
    loss, seen = evaluated_loss(loss_of, rows), evaluated_loss(loss_of, rows, junk=ids[-1])
    if supervised != sum(map(len, labels)) or not same(loss, seen):
        raise RuntimeError(
            f"{said}pads take part: {supervised} targets of {sum(map(len, labels))} are in the "
            f"loss, which is {loss:.6g}, and {seen:.6g} with other ids at the pads. Look at the "
            "attention mask and at -100 in the labels."
        )


def stop_unless_supervised(window, stage, step):
    """ValueError names the rows of a batch in which no token is in the loss."""
    for rows in window:
        if not any(label != -100 for e in rows for label in e["labels"]):
            raise ValueError(
                f"{stage}, step {step}: no token of {', '.join(e['id'] for e in rows)} is "
                "supervised, so nothing can be learned. Their targets are empty: look at these "
                "records."
            )


def stop_at_what_is_not_finite(loss_of, loss, norm, window, stage, step):
    """FloatingPointError, always. Of the step's records those are named whose own loss is not
    finite; all, if each is finite alone."""
    rows = [e for rows in window for e in rows]
    bad = [e for e in rows if not math.isfinite(evaluated_loss(loss_of, [e]))] or rows
    raise FloatingPointError(
        f"{stage}, step {step}: loss {float(loss)}, gradient norm {float(norm)}, in "
        f"{', '.join(e['id'] for e in bad)}. This step was not taken. Look at these records, or "
        "lower --lr."
    )


def stop_unless_learning(model):
    """After the first backward pass every lora_B must have a gradient (A has none yet: B is 0).
    Checkpointing behind frozen embeddings is a known way to lose them without a word. RuntimeError
    names one of those that have none."""
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


def steepest(model):
    """{name: (places, values)} of the 64 weights with the largest gradients of each trained tensor.
    A gradient below AdamW's epsilon may move nothing; lora_A has none before the second step."""
    found = {}
    for name, p in trained(model).items():
        grad = torch.zeros(0) if p.grad is None else own_part(p.grad).abs().flatten()
        if grad.numel() and grad.max() >= 1e-8:
            places = grad.topk(min(64, len(grad))).indices
            found[name] = places, own_part(p.detach()).flatten()[places].clone()
    return found


def stop_unless_moved(model, before, lr, window, stage, step):
    """Every tensor of `steepest` must have changed, unless each number in it is so large that a
    step of `lr` rounds to nothing beside it; and one at least. An optimizer of other tensors, a
    rate too small for all of them and frozen copies learn nothing without a word. RuntimeError."""
    now = trained(model) if before else {}
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
