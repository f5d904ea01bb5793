"""fusion.py against the published equations, computed with torch's own MultiheadAttention and the
reference T5 around them: that is what the released mm-cot code does (SPEC of the paper's Eq. 3-6).
"""

import json
import math
from types import SimpleNamespace

import oracle
import pytest
import torch
from pairs import close, padded
from safetensors.torch import load_file
from torch import nn

import fusion
from fusion import GatedFusion, MultimodalT5
from model import T5, T5Config
from support.checkpoints.hub import from_config
from support.checkpoints.keys import TABLES

VERSIONS = ("v1.0", "v1.1")
D, FEATURES, P = 24, 10, 7  # width, feature width, image positions: pairwise different from the T5
NEW_LAYERS = {  # as the released checkpoints name them, behind `encoder.` or, in Feb 2023, bare
    "image_dense.weight": (D, FEATURES),
    "image_dense.bias": (D,),
    "mha_layer.in_proj_weight": (3 * D, D),
    "mha_layer.in_proj_bias": (3 * D,),
    "mha_layer.out_proj.weight": (D, D),
    "mha_layer.out_proj.bias": (D,),
    "gate_dense.weight": (D, 2 * D),
    "gate_dense.bias": (D,),
}


class Published(nn.Module):
    """The released computation, spelled with torch's modules under the released names."""

    def __init__(self):
        super().__init__()
        self.image_dense = nn.Linear(FEATURES, D)
        self.mha_layer = nn.MultiheadAttention(D, num_heads=1, batch_first=True)
        self.gate_dense = nn.Linear(2 * D, D)

    def forward(self, h, features):
        v = self.image_dense(features)
        a, _ = self.mha_layer(h, v, v)
        g = torch.sigmoid(self.gate_dense(torch.cat([h, a], dim=-1)))
        return (1 - g) * h + g * a


@pytest.fixture(scope="module")
def new_weights():
    return oracle.seeded_weights(NEW_LAYERS)


@pytest.fixture(scope="module")
def published(new_weights):
    reference = Published()
    reference.load_state_dict(new_weights)
    return reference.eval()


@pytest.fixture(scope="module")
def gated(new_weights):
    ours = GatedFusion(D, FEATURES)
    ours.load_state_dict(new_weights)
    return ours.eval()


def text_and_picture(batch=3, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, length, D, generator=generator)
    features = torch.randn(batch, P, FEATURES, generator=generator)
    return h, features


# Seeds for which some greedy answers end early, others never, and rows differ.
SIZES = dict(num_layers=3, num_decoder_layers=2)
SPEAKERS = {"v1.0": dict(vocab_size=30, seed=7), "v1.1": dict(vocab_size=20, seed=3)}


@pytest.fixture(scope="module", params=VERSIONS)
def mm(request, tmp_path_factory, new_weights):
    """A multimodal checkpoint in the current naming, its reference parts, and a batch."""
    chosen = SPEAKERS[request.param]
    config, hf = oracle.tiny_t5(request.param, **SIZES, **chosen)
    stored = oracle.t5_stored(hf) | {f"encoder.{n}": t for n, t in new_weights.items()}
    folder = oracle.write_checkpoint(tmp_path_factory.mktemp("mm"), config, stored)
    ids, mask, decoder_ids = oracle.t5_batch(6, 12, 5, chosen["vocab_size"], chosen["seed"])
    _, features = text_and_picture(6)
    features[2] = 0  # one problem without a picture
    return SimpleNamespace(
        folder=folder,
        config=config,
        hf=hf,
        stored=stored,
        ours=MultimodalT5.from_pretrained(folder),
        batch=(ids, mask, features, decoder_ids),
    )


@torch.no_grad()
def fused_by_reference(mm, published):
    from transformers.modeling_outputs import BaseModelOutput

    ids, mask, features, _ = mm.batch
    h = mm.hf.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return BaseModelOutput(last_hidden_state=published(h, features))


@torch.no_grad()
def reference_logits(mm, published):
    _, mask, _, decoder_ids = mm.batch
    fused = fused_by_reference(mm, published)
    return mm.hf(encoder_outputs=fused, attention_mask=mask, decoder_input_ids=decoder_ids).logits


# ---- Eq. 3-6 ------------------------------------------------------------------------------------


def test_fusion_equals_the_published_computation(gated, published):
    h, features = text_and_picture()
    features[0, 3:] = 0  # rows of zeros are attended to like any other: there is no key mask
    ours, theirs = gated(h, features), published(h, features)
    close(ours, theirs, 1e-5)
    assert (theirs - h).abs().mean() > 0.1


def test_fusion_equals_the_equations_written_out(gated, new_weights):
    """One number at a time, in float64."""
    h, features = text_and_picture(1, 2)
    w = {name: t.double() for name, t in new_weights.items()}
    language, picture = h[0].double(), features[0].double()
    vision = picture @ w["image_dense.weight"].T + w["image_dense.bias"]
    project = [
        (w["mha_layer.in_proj_weight"][i * D : (i + 1) * D], w["mha_layer.in_proj_bias"][i * D :])
        for i in range(3)
    ]
    q, k, v = (
        x @ weight.T + bias[:D]
        for x, (weight, bias) in zip((language, vision, vision), project, strict=True)
    )
    for t in range(2):
        scores = torch.stack([(q[t] * k[p]).sum() / D**0.5 for p in range(P)])
        weights = torch.exp(scores) / torch.exp(scores).sum()
        seen = sum(weights[p] * v[p] for p in range(P))
        attn = w["mha_layer.out_proj.weight"] @ seen + w["mha_layer.out_proj.bias"]
        w_l, w_v = w["gate_dense.weight"][:, :D], w["gate_dense.weight"][:, D:]
        gate = 1 / (1 + torch.exp(-(w_l @ language[t] + w_v @ attn + w["gate_dense.bias"])))
        fused = (1 - gate) * language[t] + gate * attn
        close(gated(h, features)[0, t].double(), fused, 1e-5)
        _, our_gate, attention = gated.explain(h, features)
        close(our_gate[0, t].double(), gate, 1e-5)
        close(attention[0, t].double(), weights, 1e-5)


def test_fusion_gradients(gated, published):
    grads = []
    for module in (gated, published):
        h, features = (x.requires_grad_() for x in text_and_picture())
        module.zero_grad()
        module(h, features).square().sum().backward()
        grads.append({n: p.grad for n, p in module.named_parameters()} | {"h": h.grad})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        assert grads[1][name].abs().max() > 1e-3, name
        scale = grads[1][name].abs().max().item()
        close(grads[0][name], grads[1][name], 1e-5 * max(1.0, scale))


def test_fusion_has_no_dropout(gated):
    h, features = text_and_picture()
    quiet = gated(h, features)
    assert torch.equal(gated.train()(h, features), quiet)
    gated.eval()


def test_fusion_takes_cached_half_precision_features(gated):
    h, features = text_and_picture()
    close(gated(h, features.half()), gated(h, features.half().float()), 0)


# ---- no picture ---------------------------------------------------------------------------------


def test_zero_features_take_the_bias_path(gated, new_weights):
    """As published: without a picture every token is mixed with one constant, not with nothing."""
    h, features = text_and_picture()
    w = new_weights
    v = w["mha_layer.in_proj_weight"][2 * D :] @ w["image_dense.bias"]
    v = v + w["mha_layer.in_proj_bias"][2 * D :]
    constant = w["mha_layer.out_proj.weight"] @ v + w["mha_layer.out_proj.bias"]
    pair = torch.cat((h, constant.expand_as(h)), -1)
    gate = torch.sigmoid(pair @ w["gate_dense.weight"].T + w["gate_dense.bias"])
    close(gated(h, torch.zeros_like(features)), (1 - gate) * h + gate * constant, 1e-5)
    assert (gated(h, torch.zeros_like(features)) - h).abs().mean() > 0.1


def test_masked_rows_pass_untouched(gated, new_weights):
    h, features = text_and_picture()
    features[1] = 0
    features[2, :-1] = 0  # a picture whose last position alone is not zero is still a picture
    features[2, -1, :-1] = 0
    masked = GatedFusion(D, FEATURES, no_image="mask")
    masked.load_state_dict(new_weights)
    out, zero = masked(h, features), gated(h, features)
    assert torch.equal(out[1], h[1])
    for row in (0, 2):
        assert torch.equal(out[row], zero[row])
    assert not torch.equal(zero[1], h[1])


def test_no_image_has_two_values():
    with pytest.raises(ValueError, match="no_image is 'none'; it must be one of zero, mask"):
        GatedFusion(D, FEATURES, no_image="none")


def test_no_image_is_read_from_the_config(mm, tmp_path):
    ids, mask, features, decoder_ids = mm.batch
    oracle.write_checkpoint(tmp_path, mm.config | {"no_image": "mask"}, mm.stored)
    masked = MultimodalT5.from_pretrained(tmp_path)
    text_only = T5(masked.t5.config, tied=masked.t5.lm_head is None)
    text_only.load_state_dict(masked.t5.state_dict())
    with torch.no_grad():
        logits = masked(*mm.batch)
        plain = text_only.eval()(ids, mask, decoder_ids)
        published = mm.ours(*mm.batch)
    assert (features[2] == 0).all()
    close(logits[2], plain[2])
    assert (published[2] - plain[2]).abs().mean() > 0.05
    close(logits[[0, 1, 3, 4, 5]], published[[0, 1, 3, 4, 5]])
    masked.save_pretrained(tmp_path / "out")
    assert MultimodalT5.from_pretrained(tmp_path / "out").fusion.no_image == "mask"


# ---- new layers ---------------------------------------------------------------------------------


def assert_uniform(tensor, bound):
    """Within the bound, reaching for it, centred: what uniform(-bound, bound) looks like."""
    assert tensor.abs().max() <= bound
    assert tensor.abs().max() > 0.97 * bound
    assert abs(tensor.std() - bound / math.sqrt(3)) < 0.05 * bound
    assert tensor.mean().abs() < 0.05 * bound


def test_new_layers_start_as_the_released_code_starts_them():
    width, features = 96, 160
    torch.manual_seed(0)
    fresh = GatedFusion(width, features)
    # nn.Linear: kaiming_uniform(a=sqrt(5)) is uniform within 1/sqrt(fan_in), biases likewise
    assert_uniform(fresh.image_dense.weight, features**-0.5)
    assert fresh.image_dense.bias.abs().max() <= features**-0.5
    assert_uniform(fresh.gate_dense.weight, (2 * width) ** -0.5)
    assert fresh.gate_dense.bias.abs().max() <= (2 * width) ** -0.5
    assert_uniform(fresh.mha_layer.out_proj.weight, width**-0.5)
    assert_uniform(fresh.mha_layer.in_proj_weight, math.sqrt(6 / (width + 3 * width)))  # xavier
    assert (fresh.mha_layer.in_proj_bias == 0).all()
    assert (fresh.mha_layer.out_proj.bias == 0).all()


def test_new_layers_are_never_uninitialised_memory(monkeypatch):
    """The released recipe had that on newer libraries; here fresh memory is made of nan."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    assert nn.Parameter(torch.empty(2)).isnan().all()
    for name, p in GatedFusion(D, FEATURES).named_parameters():
        assert p.isfinite().all(), name


# ---- the multimodal T5 --------------------------------------------------------------------------


def test_logits_equal_the_released_computation(mm, published):
    with torch.no_grad():
        ours = mm.ours(*mm.batch)
    theirs = reference_logits(mm, published)
    close(ours, theirs)
    assert theirs.std() > 0.5
    ids, mask, features, decoder_ids = mm.batch
    with torch.no_grad():
        other = mm.ours(ids, mask, features.flip(0), decoder_ids)
    assert (other - ours).abs().mean() > 0.05  # the picture is seen


def old_names(stored):
    """The first checkpoints (February 2023): the new layers at top level."""
    bare = {n: n.removeprefix("encoder.") for n in stored if n.split(".")[1] in fusion_layers}
    assert len(bare) == 8
    return {bare.get(name, name): tensor for name, tensor in stored.items()}


fusion_layers = {name.split(".")[0] for name in NEW_LAYERS}


@pytest.mark.parametrize("rename", [dict, old_names], ids=["encoder.", "top level"])
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_both_released_namings(mm, rename, container, published, tmp_path):
    stored = rename(mm.stored)
    if container == "safetensors":
        oracle.write_checkpoint(tmp_path, mm.config, stored)
    else:
        torch.save(stored, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps(mm.config))
    with torch.no_grad():
        close(MultimodalT5.from_pretrained(tmp_path)(*mm.batch), reference_logits(mm, published))


def test_save_writes_the_released_names(mm, published, tmp_path):
    mm.ours.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == mm.stored.keys()
    assert all(torch.equal(written[name], mm.stored[name]) for name in written)
    with torch.no_grad():
        close(MultimodalT5.from_pretrained(tmp_path)(*mm.batch), reference_logits(mm, published))


@pytest.mark.parametrize(
    "size, feature_dim, tensors, extra",
    [("t5", 256, 265, 3_740_160), ("flan", 256, 290, 3_740_160), ("t5", 1024, 265, 4_329_984)],
)
def test_full_shapes(size, feature_dim, tensors, extra):
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    if size == "flan":
        sizes = vars(config) | oracle.V1_1 | {"d_ff": 2048}
        config = from_config(T5Config, sizes)
    with torch.device("meta"):
        mm = MultimodalT5(T5(config), GatedFusion(768, feature_dim))
    names = [TABLES["MultimodalT5"].to_file(name) for name in mm.state_dict()]
    assert len(set(names)) == tensors
    assert sum(name.split(".")[1] in fusion_layers for name in names) == 8
    assert sum(p.numel() for p in mm.fusion.parameters()) == extra


def test_a_plain_t5_has_no_fusion(mm, tmp_path):
    ids, mask, features, decoder_ids = mm.batch
    oracle.write_checkpoint(tmp_path, mm.config, oracle.t5_stored(mm.hf))
    text_only = MultimodalT5.from_pretrained(tmp_path)
    assert text_only.fusion is None
    with torch.no_grad():
        theirs = mm.hf(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        close(text_only(ids, mask, None, decoder_ids), theirs)
    text_only.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == (
        oracle.t5_stored(mm.hf).keys()
    )


def test_a_fresh_fusion_on_a_pretrained_t5(mm, tmp_path):
    oracle.write_checkpoint(tmp_path, mm.config, oracle.t5_stored(mm.hf))
    fresh = MultimodalT5(T5.from_pretrained(tmp_path), GatedFusion(D, FEATURES))
    fresh.eval().save_pretrained(tmp_path / "out")
    again = MultimodalT5.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(*mm.batch), fresh(*mm.batch))


def test_every_parameter_learns(mm):
    ours = MultimodalT5.from_pretrained(mm.folder)
    ours(*mm.batch).square().sum().backward()
    for name, p in ours.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


# ---- errors -------------------------------------------------------------------------------------


def test_a_multimodal_checkpoint_is_not_silently_a_t5(mm):
    with pytest.raises(ValueError, match="8 unexpected: encoder.gate_dense.bias"):
        T5.from_pretrained(mm.folder)


# ---- decoding -----------------------------------------------------------------------------------


def test_greedy_ids_equal_the_reference_and_a_recomputation(mm, published):
    ids, mask, features, _ = mm.batch
    ours = padded(mm.ours.generate(ids, mask, features, max_new_tokens=16), 16)
    theirs = mm.hf.generate(
        encoder_outputs=fused_by_reference(mm, published),
        attention_mask=mask,
        max_new_tokens=16,
        do_sample=False,
    )[:, 1:]
    assert torch.equal(ours, padded(theirs, 16))
    assert ours.unique().numel() > 5
    for i in range(len(ids)):
        row = slice(i, i + 1)
        one = mm.ours.generate(ids[row], mask[row], features[row], max_new_tokens=16)
        assert torch.equal(padded(one, 16)[0], ours[i])
    out = torch.zeros(len(ids), 1, dtype=torch.long)
    for step in range(16):
        with torch.no_grad():
            best = mm.ours(ids, mask, features, out)[:, -1].argmax(-1)
        ended = (out == 1).any(1)
        out = torch.cat((out, best.masked_fill(ended, 0)[:, None]), 1)
        assert torch.equal(out[:, -1], ours[:, step])


def test_sampling_passes_through(mm):
    ids, mask, features, _ = mm.batch

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return mm.ours.generate(
            ids, mask, features, max_new_tokens=8, temperature=1.0, generator=generator
        )

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(padded(sample(3), 8), padded(sample(4), 8))


# ---- the two-stage loop -------------------------------------------------------------------------


class Numbers:
    """A tokenizer that writes ids as words; 0 and 1 are special."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(int(i)) for i in ids if int(i) > 1)


def batches(mm, ids=None):
    """Two uneven batches as data.collate makes them."""
    input_ids, mask, features, decoder_ids = mm.batch
    input_ids = input_ids if ids is None else ids
    labels = decoder_ids.roll(-1, 1)
    labels[:, -1] = -100
    for rows in (slice(0, 4), slice(4, 6)):
        yield {
            "ids": [f"p{i}" for i in range(6)][rows],
            "input_ids": input_ids[rows],
            "attention_mask": mask[rows],
            "image_features": features[rows],
            "decoder_input_ids": decoder_ids[rows],
            "labels": labels[rows],
        }


def generated(model, batches, max_new_tokens):
    texts = {}
    for batch in batches:
        texts |= fusion.generate_texts(model, batch, Numbers(), max_new_tokens)
    return texts


def test_generate_texts_decodes_every_problem(mm):
    ids, mask, features, _ = mm.batch
    expected = mm.ours.generate(ids, mask, features, max_new_tokens=6)
    written = generated(mm.ours.train(), batches(mm), 6)
    assert list(written) == [f"p{i}" for i in range(6)]
    stops = set()
    for row, got in zip(expected.tolist(), written.values(), strict=True):
        ended = 1 in row
        answer = row[: row.index(1)] if ended else row
        assert got["text"] == Numbers().decode(answer, True)
        assert got["stop"] == ("eos" if ended else "length")
        assert got["tokens"] == len(answer) + ended
        stops.add(got["stop"])
    assert not mm.ours.training
    assert stops == {"eos", "length"}  # both were seen


def test_stage_two_reads_what_stage_one_wrote(mm):
    seen = []

    def answers(rationales):
        seen.append(rationales)
        shift = sum(map(len, rationales.values())) % 7 + 1
        ids = (mm.batch[0] + shift) % (mm.config["vocab_size"] - 2) + 2
        return generated(mm.ours, batches(mm, ids), 3)

    stage_1 = generated(mm.ours, batches(mm), 6)
    results = fusion.two_stage(lambda: stage_1, answers)
    texts = {pid: got["text"] for pid, got in stage_1.items()}
    assert seen == [texts]
    stage_2 = answers(texts)
    for pid, result in results.items():
        assert result["rationale"] == texts[pid]
        assert result["response"] == stage_2[pid]["text"]
        assert result["tokens"] == stage_1[pid]["tokens"] + stage_2[pid]["tokens"]
        cut = "length" in (stage_1[pid]["stop"], stage_2[pid]["stop"])
        assert result["stop"] == ("length" if cut else "eos")


def test_teacher_forced_reads_the_gold_text(mm):
    """That is why it is not a prediction: other gold text, other output."""
    forced = {}
    for batch in batches(mm):
        forced |= fusion.teacher_forced_texts(mm.ours, batch, Numbers())
    with torch.no_grad():
        best = mm.ours(*mm.batch).argmax(-1)
    assert forced == {
        f"p{i}": Numbers().decode(row[:-1].tolist(), True) for i, row in enumerate(best)
    }
