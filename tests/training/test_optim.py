"""The parts of a training: the loss in chunks, what it is divided by, AdamW, windows and rates."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_runs import settings, t5_row, tiny_t5

import data
import train
from support.training import optim

ROWS = [t5_row(i, 4 + 3 * i, 2 + 5 * (i % 3)) for i in range(6)]


# ---- the loss ------------------------------------------------------------------------------------


def random_rows():
    """States, labels with an empty row among them, and the matrix of a head."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 9, 6, generator=generator)
    labels = torch.randint(0, 30, (4, 9), generator=generator)
    for row, start in enumerate((2, 8, 9, 5)):
        labels[row, :start] = -100
    return states, labels, torch.randn(30, 6, generator=generator)


def loss_and_gradients(*options):
    """(loss, divisor, gradient of states, of the head), and with how many rows that was called."""
    states, labels, weight = random_rows()
    states.requires_grad_(), weight.requires_grad_()
    calls = []

    def head(some):
        calls.append(len(some))
        return some @ weight.T

    loss, count = train.cross_entropy(head, weight, states, labels, *options)
    loss.backward()
    return (loss.detach(), torch.tensor(count), states.grad, weight.grad), calls


@pytest.mark.parametrize("weighting", ["token", "example"])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_loss_in_chunks_is_the_loss_at_once(rows, weighting, monkeypatch):
    whole, calls = loss_and_gradients(weighting, 0.1)
    assert calls == [12]  # 7 + 1 + 4 supervised tokens, of 36
    monkeypatch.setattr(optim, "LOGITS", 30 * rows + 29 if rows > 1 else 7)
    parts, calls = loss_and_gradients(weighting, 0.1)
    assert calls == [rows] * (12 // rows)  # once: not again in the backward pass
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        states, labels, weight = random_rows()
        head = lambda x: x @ weight.T  # noqa: E731
        loss, _ = train.cross_entropy(head, weight, states, labels, weighting, 0.1)
    torch.testing.assert_close(loss, whole[0], atol=1e-6, rtol=1e-5)


def test_weighting_by_token_and_by_example():
    """By hand: the sum over tokens, or the sum of each row's mean. An empty row is no row."""
    states, labels, weight = random_rows()
    each = F.cross_entropy((states @ weight.T).transpose(1, 2), labels, reduction="none")  # (4, 9)
    (by_token, n, *_), _ = loss_and_gradients()
    assert n == 12 and by_token.item() == pytest.approx(each.sum().item(), rel=1e-6)
    (by_example, n, *_), _ = loss_and_gradients("example")
    means = each[0, 2:].mean() + each[1, 8:].mean() + each[3, 5:].mean()
    assert n == 3 and by_example.item() == pytest.approx(means.item(), rel=1e-6)
    window = [[{"labels": row} for row in rows.tolist()] for rows in labels.split(3)]
    assert (optim.units(window, "token"), optim.units(window, "example")) == (12, 3)


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_label_smoothing_is_torchs(weighting):
    states, labels, weight = random_rows()
    logits = (states[:1] @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, labels[0], label_smoothing=0.2)  # ignores -100
    head = lambda x: x @ weight.T  # noqa: E731
    loss, n = train.cross_entropy(head, weight, states[:1], labels[:1], weighting, 0.2)
    assert loss.item() / n == pytest.approx(expected.item(), rel=1e-6)


# ---- AdamW ---------------------------------------------------------------------------------------


def test_weight_decay_spares_norms_and_everything_called_bias(capsys):
    model = tiny_t5()
    optimizer = optim.make_optimizer(model, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in params} for params, _ in optimizer.groups)
    assert [decay for _, decay in optimizer.groups] == [0.01, 0.0]
    assert "t5.encoder.relative_attention_bias.weight" in spared
    assert {"fusion.mha_layer.in_proj_bias", "t5.encoder.final_layer_norm.weight"} <= spared
    assert {"t5.shared.weight", "fusion.gate_dense.weight"} <= decayed
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,} of {total:,}" in capsys.readouterr().out


def test_adamw_is_the_library_s_to_the_bit():
    """Also from a state of three steps; a parameter without a gradient stays as it is."""
    ours, theirs = tiny_t5(), tiny_t5()
    optimizer = optim.make_optimizer(ours, 0.01)
    groups = optim.make_optimizer(theirs, 0.01).groups
    reference = torch.optim.AdamW([{"params": p, "weight_decay": decay} for p, decay in groups])
    for step in range(6):
        for model in (ours, theirs):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.sin(p.detach() * (i + step)) if i else None
        if step == 3:
            saved = optim.snapshot(ours, optimizer, {})
            optimizer = optim.make_optimizer(ours, 0.01)
            optim.restore(saved, ours, optimizer)
        for group in reference.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step(0.01 / (1 + step))
        reference.step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


# ---- windows and rates ---------------------------------------------------------------------------


def test_windows_cover_every_row_once_an_epoch():
    windows = optim.windows(ROWS, batch_size=2, accumulate=2, epochs=5, seed=0)
    assert [len(window) for window in windows] == 5 * [2, 1]
    orders = []
    for start in range(0, 10, 2):
        epoch = windows[start : start + 2]
        orders.append([row["id"] for window in epoch for rows in window for row in rows])
        assert sorted(orders[-1]) == [f"q{i}" for i in range(6)]
    assert len({tuple(order) for order in orders}) > 1  # shuffled again each time
    assert len(optim.windows(ROWS, 2, 2, 0.5, 0)) == 1 and optim.windows(ROWS, 2, 2, 0, 0) == []


def test_the_rate_warms_up_and_falls_as_a_cosine():
    rates = optim.warmup_cosine(2.0, 100, 0.1)
    assert rates[:10] == pytest.approx([2 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[99] < 2e-3
    assert rates[40] == pytest.approx(1 + math.cos(math.pi * 30 / 90))
    assert optim.warmup_cosine(1.0, 1, 0.1) == [1.0] and optim.warmup_cosine(1.0, 0, 0.1) == []
    assert optim.warmup_cosine(1.0, 3, 0.0)[0] == 1.0
    assert optim.linear_decay(1.0, 4) == [1.0, 0.75, 0.5, 0.25]


def test_batches_of_one_process_have_all_their_tensors_on_the_device():
    loss_of = optim.LossOf(
        tiny_t5(), train.t5_loss, data.collate, settings("mmcot", "--device", "meta")
    )
    batch = loss_of.batch(ROWS[:2])
    devices = {x.device.type for x in batch.values() if torch.is_tensor(x)}
    assert devices == {"meta"} and batch["ids"] == ["q0", "q1"]
