"""Bytes alive at the peak of the real 3B's LoRA step; and whether that count can be believed."""

import memory
import oracle
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lora
import train
from model import Gemma2Config, PaliGemma, PaliGemmaConfig, SigLIPConfig
from support.training import optim as optimizing


def small_step(checkpointing):
    """A LoRA step of a PaliGemma small enough for real numbers: model, loss_of, batch."""
    text = Gemma2Config(4096, 128, 512, 3, 4, 2, 32, 32)
    vision = SigLIPConfig(64, 128, 1, 4, image_size=56, patch_size=14)
    model = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=4095))
    lora.inject(model, r=8, alpha=16)
    model.language_model.checkpointing = checkpointing
    ids = torch.randint(3, 4000, (2, 400), generator=torch.manual_seed(0))
    ids[:, :16] = 4095
    kinds = (torch.arange(400) >= 200).long().expand(2, -1)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=kinds)
    batch |= {"labels": ids.masked_fill(kinds == 0, -100)}
    batch["image_features"] = oracle.uniform("features", (2, 16, 128), -1.0, 1.0)

    def loss_of(model, batch):
        loss, count = train.paligemma_loss(model, batch)
        return loss / count

    return model.train(), loss_of, batch


def allocated(model, loss_of, batch):
    """The same step's peak as torch's allocator saw it, beyond what was there before."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    there = [*model.parameters(), *batch.values(), *moments]
    return peak + sum(t.untyped_storage().nbytes() for t in there)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_is_the_allocators(checkpointing, monkeypatch):
    """Of a step with several chunks of the loss; 0.1 % is for what kernels borrow."""
    monkeypatch.setattr(optimizing, "LOGITS", 2**19)
    real, loss_of, batch = small_step(checkpointing)
    with torch.device("meta"):
        model, _, _ = small_step(checkpointing)
    counted = memory.step_peak(memory.made_fake(model), loss_of, batch)
    assert counted == pytest.approx(allocated(real, loss_of, batch), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, opponent, most",
    [
        ({}, "as people run it", 0.45),
        ({"checkpointing": True}, "suffix logits + checkpointing", 0.85),
    ],
)
def test_peak_of_the_3b(how, opponent, most):
    """Every layer adds as many bytes, so two depths say what 26 layers hold (`tools/bench.py --only
    memory` counts them all, and finds the same)."""

    def whole(peak_of, **how):
        two, three = (peak_of(layers, **how) for layers in (2, 3))
        return two + (memory.LAYERS - 2) * (three - two)

    ours, theirs = whole(memory.ours, **how), whole(memory.theirs, **memory.THEIRS[opponent])
    print(f"{ours / memory.GIB:.2f} GiB, {opponent} {theirs / memory.GIB:.2f}")
    assert ours <= most * theirs
