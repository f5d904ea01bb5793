"""What stops a training that goes wrong without an error, and what passes."""

import contextlib

import pytest
import torch
from small_runs import PALIGEMMA, adapted, fit, loss_of, settings, t5_row, tiny_t5, weights

import data
import model as backbones
import train
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer
from support.evaluation import models
from support.training import checks, optim

FLAGS = ("--batch-size", "3", "--lr", "0.01", "--epochs", "2")


@pytest.fixture(scope="module")
def pali():
    """() -> (the demo's PaliGemma with adapters, its settings, three rows of unequal lengths)."""
    problems = data.load("demo", "train")[:3]
    tokenizer = load_tokenizer(PALIGEMMA)
    verdict = dict.fromkeys(("correct", "consistent"), True)
    rows = [
        data.TrainRow(p, "reason", {"thought": "So. " * i, "answer": p.answer, "verdict": verdict})
        for i, p in enumerate(problems, 1)
    ]

    def build():
        model, chosen = adapted("--lora-r", "2", *FLAGS)
        shape = (3, model.config.image_tokens, model.config.text.hidden_size)
        array = torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy()
        features = Features(array, {p.id: i for i, p in enumerate(problems)})
        encoded = data.pali_examples(rows, tokenizer, features, max_suffix=chosen.max_suffix)
        return model, chosen, encoded

    return build


def mmcot():
    return tiny_t5(), settings("mmcot", *FLAGS), [t5_row(i) for i in range(3)]


@pytest.fixture(params=["mmcot", "paligemma"])
def training(request):
    """(model, settings, rows)"""
    return mmcot() if request.param == "mmcot" else request.getfixturevalue("pali")()


def stopped(error, training, match=None, named=None):
    """It stops with that error, which names the records, and the weights are as they were."""
    model, chosen, rows = training
    before = weights(model)
    with pytest.raises(error, match=match) as stop:
        fit(model, chosen, rows, epochs=2)
    assert all(row["id"] in str(stop.value) for row in named or rows)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


# ---- leaks ---------------------------------------------------------------------------------------


def test_no_check_stops_an_honest_training_or_changes_a_generator_or_a_weight(training):
    model, chosen, rows = training
    before, state = weights(model), torch.get_rng_state()
    checks.stop_if_it_leaks(loss_of(model, chosen), rows, "reason")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    assert len(fit(*training, epochs=2)[1]) == 2


LEAKS = {}  # {"SYSTEM: what is wrong": a function that breaks it}


def leak(name):
    return lambda spoil: LEAKS.setdefault(name, spoil)


def collated_with(patch, system, change):
    """Batches of a system with `change(batch)` in them."""
    real = train.COLLATE[system]
    patch.setitem(train.COLLATE, system, lambda rows: (b := real(rows)) | change(b))


@leak("mmcot: a decoder without a causal mask")
def _(patch):
    real = backbones.T5Stack.position_bias

    def bias(self, *rest):
        return real(self, *rest).clamp(min=-1e3).relu()

    patch.setattr(backbones.T5Stack, "position_bias", bias)


@leak("mmcot: a decoder that sees one token ahead")
def _(patch):
    real = backbones.T5Stack.position_bias

    def bias(self, *rest):
        bias = real(self, *rest)
        ahead = torch.ones(bias.shape[-2:]).triu(1).tril(1).bool()
        return bias.masked_fill(ahead, 0.0) if self.is_decoder else bias

    patch.setattr(backbones.T5Stack, "position_bias", bias)


@leak("mmcot: labels as decoder input")
def _(patch):
    collated_with(patch, "mmcot", lambda b: {"decoder_input_ids": b["labels"].clamp(min=0)})


@leak("paligemma: everything sees everything")
def _(patch):
    def full(valid, suffix, new, window=None):
        return valid[:, None, None, :].expand(-1, 1, new, -1)

    patch.setattr(backbones, "prefix_lm_mask", full)


@leak("paligemma: token types all 0")
def _(patch):
    collated_with(patch, "paligemma", lambda b: {"token_type_ids": b["token_type_ids"] * 0})


@leak("paligemma: labels not shifted")
def _(patch):
    def loss(model, batch, *options):
        states = model.states(**models.paligemma_inputs(model, batch))
        weight = model.language_model.embed_tokens.weight
        return train.cross_entropy(model.head, weight, states, batch["labels"], *options)

    patch.setitem(train.LOSS, "paligemma", loss)


@leak("paligemma: one token ahead")
def _(patch):
    real = backbones.prefix_lm_mask

    def ahead(valid, suffix, new, window=None):
        mask = real(valid, suffix, new, window)
        return mask | (torch.ones(mask.shape[-2:]).triu(1).tril(1).bool() & valid[:, None, None, :])

    patch.setattr(backbones, "prefix_lm_mask", ahead)


@leak("mmcot: pads in the loss")
@leak("paligemma: pads in the loss")
def _(patch):
    for system in train.COLLATE:
        change = lambda b: {"labels": b["labels"].masked_fill(b["labels"] == -100, 0)}  # noqa: E731
        collated_with(patch, system, change)


@leak("mmcot: pads attended to")
@leak("paligemma: pads attended to")
def _(patch):
    patch.setattr(backbones.T5, "mask_bias", lambda self, mask: torch.zeros(len(mask), 1, 1, 1))
    mask = backbones.prefix_lm_mask
    patch.setattr(
        backbones, "prefix_lm_mask", lambda valid, *rest: mask(torch.ones_like(valid), *rest)
    )


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_stops_before_the_first_step(name, pali, monkeypatch):
    training = pali() if name.startswith("paligemma") else mmcot()
    LEAKS[name](monkeypatch)
    stopped(RuntimeError, training, "pads" if "pads" in name else "leak")


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["gradient", "nan", "inf"])
def test_what_is_not_finite_is_not_learned(training, fault, monkeypatch):
    """Where one record's loss is not finite, it alone is named."""
    model, chosen, rows = training
    real = train.LOSS[chosen.model]

    def loss(model, batch, *options):
        value, n = real(model, batch, *options)
        if rows[1]["id"] not in batch["ids"]:
            return value, n
        if fault != "gradient":
            return value * float(fault), n
        # The root of 0 has no gradient.
        return (value.sqrt() * 0 + (value - value.detach()).sqrt() if model.training else value), n

    monkeypatch.setitem(train.LOSS, chosen.model, loss)
    named = rows if fault == "gradient" else rows[1:2]
    match = "gradient norm (nan|inf)" if fault == "gradient" else f", in {rows[1]['id']}\\. "
    stopped(FloatingPointError, (model, chosen, rows), match, named)


def test_a_batch_without_a_supervised_token(training):
    for row in training[2]:
        row["labels"] = [-100] * len(row["labels"])
    stopped(ValueError, training)


@pytest.mark.parametrize("gradient", ["none", "zeros"])
def test_an_adapter_that_gets_no_gradient(pali, gradient, monkeypatch):
    training = pali()
    layer = training[0].language_model.layers[2].mlp.up_proj

    def forward(x):
        base = torch.nn.functional.linear(x, layer.weight)
        return base if gradient == "none" else base + 0.0 * layer.lora_B(layer.lora_A(x))

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(RuntimeError, match=r"layers\.2\.mlp\.up_proj\.lora_B"):
        fit(*training)
    # No step was taken.
    assert not any(p.any() for n, p in training[0].named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("fault", ["no step", "other tensors", "one tensor"])
def test_weights_that_do_not_change(training, fault, monkeypatch):
    model, chosen, rows = training
    real = optim.make_optimizer

    def broken(*args):
        optimizer = real(*args)
        for params, _ in optimizer.groups:
            if fault == "other tensors":
                params[:] = [p.detach().clone().requires_grad_() for p in params]
            elif fault == "one tensor":
                del params[:1]
        if fault == "no step":
            optimizer.step = lambda lr: None
        return optimizer

    monkeypatch.setattr(optim, "make_optimizer", broken)
    with pytest.raises(RuntimeError, match="did not change") as stop:
        fit(model, chosen, rows, epochs=2)
    assert rows[0]["id"] in str(stop.value)


@pytest.mark.parametrize(
    "lr, outcome",
    [("1e-9", pytest.raises(RuntimeError, match="--lr")), ("0", contextlib.nullcontext())],
)
def test_a_rate_that_is_lost_to_rounding(lr, outcome):
    model = tiny_t5()
    with torch.no_grad():
        for p in optim.trained(model).values():
            p.add_(1.0)
    with outcome:  # a rate of 0 is as one wishes
        fit(model, settings("mmcot", "--batch-size", "3", "--lr", lr), mmcot()[2], epochs=2)
