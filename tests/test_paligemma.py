"""model.py's PaliGemma 2 (SigLIP, Gemma-2, weights, decoding) against transformers 5.23 in fp32.

Weights are seeded and large (oracle.py), the sliding window is shorter than the prompts, and rows
are padded. The golden fixture holds the same expectations for a machine without transformers.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import ATOL, STEPS
from pairs import close, padded
from safetensors import safe_open
from safetensors.torch import load_file

import model
from model import Gemma2Config, PaliGemma, SigLIPConfig
from support.checkpoints.hub import from_config, model_config
from support.checkpoints.keys import TABLES, transformers_path
from support.evaluation.decoding import stop_reason

DATA = Path(os.environ["NANOCOT_DATA"])
KEYS = TABLES["PaliGemma"]
IMAGE = oracle.TINY_PALIGEMMA["image_token_index"]


def make_batch(side="left", **how):
    """(what both forwards take, labels, which tokens are no pads)"""
    batch = oracle.paligemma_batch(side, **how)
    return batch, batch.pop("labels"), batch["attention_mask"].bool()


def alone(batch, row):
    """One row of a batch in which all rows have pictures, without its padding."""
    keep = batch["attention_mask"][row].bool()
    one = {k: v[row : row + 1] for k, v in batch.items()}
    return {k: v if k == "pixel_values" else v[:, keep] for k, v in one.items()}


def shifted_loss(logits, labels):
    """Token t predicts t + 1; the mean over what has a label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# ---- the golden fixture: no transformers needed -------------------------------------------------

FIXTURE = json.loads((oracle.FIXTURES / "paligemma.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(oracle.FIXTURES / "paligemma.safetensors")


def seeded(folder, seed=0, **overrides):
    """Our model with the oracle's weights, written and read as a Hub file; no transformers."""
    config = oracle.paligemma_config(**overrides)
    with torch.device("meta"):
        shapes = PaliGemma(model_config(PaliGemma, config)).state_dict()
    weights = oracle.paligemma_weights({KEYS.to_file(n): t.shape for n, t in shapes.items()}, seed)
    oracle.write_checkpoint(folder, config, weights)
    return PaliGemma.from_pretrained(folder)


@pytest.fixture(scope="module")
def pg(tmp_path_factory):
    return seeded(tmp_path_factory.mktemp("pg"))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A model that ends some rows of `oracle.PROMPTS` within STEPS, and that batch."""
    made = seeded(tmp_path_factory.mktemp("speaker"), **oracle.SPEAKER)
    return SimpleNamespace(pg=made, batch=make_batch(**oracle.PROMPTS)[0])


def test_golden_weights(pg):
    tensors = {KEYS.to_file(name): t for name, t in pg.state_dict().items()}
    assert oracle.fingerprint(tensors) == FIXTURE["fingerprint"], "not the weights of the fixture"


@torch.no_grad()
@pytest.mark.parametrize("case", oracle.PALIGEMMA_CASES)
def test_golden_logits_and_loss(pg, golden, case):
    batch, labels, valid = make_batch(**oracle.PALIGEMMA_CASES[case])
    logits, expected = pg(**batch), golden[f"{case}/logits"]
    assert expected[valid].std() > 1  # else the tolerance would mean nothing
    close(logits[valid], expected[valid])
    close(shifted_loss(logits, labels), golden[f"{case}/loss"], 1e-5)


@torch.no_grad()
def test_golden_picture_features(pg, golden):
    """The features are not scaled, the word embeddings are: 4.46's 6 % came from scaling both."""
    pixels = make_batch()[0]["pixel_values"]
    close(pg.vision_tower(pixels), golden["patches"])
    close(pg.image_features(pixels), golden["features"])
    assert golden["features"].std() > 0.5


def test_golden_greedy_ids(speaker, golden):
    assert torch.equal(speaker.pg.generate(**speaker.batch, max_new_tokens=STEPS), golden["ids"])
    assert golden["ids"].unique().numel() > 10


# ---- live parity --------------------------------------------------------------------------------


def reference():
    return pytest.importorskip(
        "transformers", reason="the live oracle; the golden tests do without"
    )


def make_pair(folder, seed=0, **overrides):
    reference()
    config, hf = oracle.tiny_paligemma(seed, **overrides)
    oracle.write_checkpoint(folder, config, oracle.paligemma_stored(hf))
    made = PaliGemma.from_pretrained(folder)
    return SimpleNamespace(folder=folder, config=config, hf=hf, pg=made)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@torch.no_grad()
def assert_same_logits(pg, hf, side="left", **how):
    """Returns the logits that both sides gave."""
    batch, labels, valid = make_batch(side, **how)
    theirs, ours = hf(**batch, labels=labels), pg(**batch)
    close(ours[valid], theirs.logits[valid])
    close(shifted_loss(ours, labels), theirs.loss, 1e-5)
    return ours[valid]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pictures", [None, (1,), (0, 2), ()])
def test_logits_and_loss(pair, side, pictures):
    """Prefix and suffix, padded, with pictures in all, in some and in none of the rows."""
    rows = ((6, 9), (11, 2), (0, 5))
    assert_same_logits(pair.pg, pair.hf, side, pictures=pictures, rows=rows, seed=3)


def test_window_is_shorter_than_prefix_and_suffix():
    """Otherwise the tests above would not tell a window from none."""
    batch, labels, _ = make_batch()
    window = oracle.TINY_PALIGEMMA["text_config"]["sliding_window"]
    assert (labels != -100).sum(1).max() > window
    assert (batch["attention_mask"] - batch["token_type_ids"]).sum(1).max() > window


@torch.no_grad()
def test_all_token_types_prefix_is_what_none_means(pair):
    """transformers 5.23 takes None for purely causal; its processor never gives None, and nor is
    the prompt ever causal for PaliGemma. Zeros are what both agree on."""
    batch, _, valid = make_batch()
    batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    theirs = pair.hf(**batch).logits
    close(pair.pg(**batch)[valid], theirs[valid])
    del batch["token_type_ids"]
    close(pair.pg(**batch)[valid], theirs[valid])
    assert (pair.hf(**batch).logits - theirs)[valid].abs().max() > 1


def test_gradients_of_every_weight(pair, tmp_path):
    batch, labels, _ = make_batch()
    ours, hf = PaliGemma.from_pretrained(pair.folder), pair.hf
    hf.zero_grad()
    hf(**batch, labels=labels).loss.backward()
    shifted_loss(ours(**batch), labels).backward()
    theirs = {name: p.grad for name, p in oracle.paligemma_stored(hf).items()}
    found = {KEYS.to_file(name): p.grad for name, p in ours.named_parameters()}
    assert found.keys() == theirs.keys()
    for name, grad in found.items():
        if not name.endswith("k_proj.bias"):  # the softmax cancels it: zero up to rounding
            assert grad.abs().max() > 1e-3, name
        close(grad, theirs[name])


OFF, ABSENT = None, ...
FIELDS = {
    "attention cap 3": {"attn_logit_softcapping": 3.0},
    "attention cap off": {"attn_logit_softcapping": OFF},
    "final cap 4": {"final_logit_softcapping": 4.0},
    "final cap off": {"final_logit_softcapping": OFF},
    "scale": {"query_pre_attn_scalar": 3},
    "scale of 28B": {"query_pre_attn_scalar": 144},
    "head_dim": {"head_dim": 10},
    "one key-value head": {"num_key_value_heads": 1},
    "as many key-value heads": {"num_key_value_heads": 6},
    "norm eps": {"rms_norm_eps": 0.3},
    "window 1": {"sliding_window": 1},
    "window 4096": {"sliding_window": 4096},
    "all full": {"layer_types": ["full_attention"] * 4},
    "sliding last": {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
    "rope_theta, as 4.x": {"rope_theta": 50.0},
    "rope_parameters, as 5.x": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}},
    "five layers": {"num_hidden_layers": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_text_fields_are_honoured(pair, fields, tmp_path):
    """Equal to the reference, and not what the plain config gives: soft-caps got lost silently in
    half a dozen projects (a fast attention path, a hard-coded 0, the final cap forgotten)."""
    made = make_pair(tmp_path, text=fields)
    plain = pair.pg(**make_batch()[0])[make_batch()[2]]
    assert (assert_same_logits(made.pg, made.hf) - plain).abs().max() > 100 * ATOL


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
        {"rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    ],
)
def test_absent_text_fields_have_the_familys_values(pair, fields, tmp_path):
    assert not fields.keys() & oracle.TINY_PALIGEMMA["text_config"].keys()
    made = make_pair(tmp_path, text=fields)
    batch, _, valid = make_batch()
    with torch.no_grad():
        assert torch.equal(made.pg(**batch)[valid], pair.pg(**batch)[valid])


@pytest.mark.parametrize(
    "fields",
    [{"layer_norm_eps": 0.5}, {"num_attention_heads": 2}, {"num_hidden_layers": 3}],
    ids=lambda fields: next(iter(fields)),
)
def test_vision_fields_are_honoured(pair, fields, tmp_path):
    made = make_pair(tmp_path, vision=fields)
    plain = pair.pg(**make_batch()[0])[make_batch()[2]]
    assert (assert_same_logits(made.pg, made.hf) - plain).abs().max() > 100 * ATOL


# ---- prefix and suffix --------------------------------------------------------------------------


def test_mask_is_the_picture_in_its_docstring():
    drawn = [line.split() for line in model.prefix_lm_mask.__doc__.splitlines()]
    drawn = [line[1:6] for line in drawn if len(line) > 5 and line[1] in "01"]
    rows = [[cell == "1" for cell in line] for line in drawn]
    suffix = torch.tensor([[False, False, False, True, True]])
    valid = torch.ones_like(suffix)
    assert model.prefix_lm_mask(valid, suffix, 5)[0, 0].tolist() == rows
    assert len(rows) == 5
    windowed = re.findall(r"[01](?: [01]){4}", model.prefix_lm_mask.__doc__.split("window of 2")[1])
    short = model.prefix_lm_mask(valid, suffix, 5, window=2)[0, 0]
    assert short[:3].tolist() == rows[:3]
    assert short[3:].int().tolist() == [[int(c) for c in row.split()] for row in windowed[:2]]
    last = model.prefix_lm_mask(valid, suffix, 1, window=2)  # one cached step: the last row
    assert torch.equal(last[0, 0, 0], short[-1])


def changed(batch, row, place):
    ids = batch["input_ids"].clone()
    ids[row, place] = 4 + (ids[row, place] + 17) % 80
    return batch | {"input_ids": ids}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_later_suffix_token_never_changes_earlier_logits(pg, side):
    """A model that sees the answer it is to give trains to a loss far below the real one."""
    batch, _, valid = make_batch(side)
    before = pg(**batch)
    for row in range(3):
        for place in batch["token_type_ids"][row].nonzero().flatten().tolist():
            after = pg(**changed(batch, row, place))
            difference = (after - before).abs().amax(-1) * valid  # (B, T)
            assert difference[row, place:].max() > 0.01
            difference[row, place:] = 0
            assert difference.max() < 1e-6


@torch.no_grad()
def test_every_prefix_token_changes_every_prefix_state(pg):
    """Also the last one, also those beyond the window, also the picture's places: a causal prompt
    is the second way to get this mask wrong."""
    batch, _, valid = make_batch()
    pixels = batch.pop("pixel_values")
    features = pg.image_features(pixels)
    before = pg.states(**batch, image_features=features)
    for row in range(3):
        prefix = valid[row] & (batch["token_type_ids"][row] == 0)
        words = prefix & (batch["input_ids"][row] != IMAGE)
        for place in words.nonzero().flatten().tolist():
            after = pg.states(**changed(batch, row, place), image_features=features)
            difference = (after - before).abs().amax(-1)  # (B, T)
            assert difference[row, valid[row]].min() > 1e-3, place
            assert difference[[r for r in range(3) if r != row]].max() < 1e-6
    other = features.clone()
    other[0, 3] += 1  # the last patch of row 0's picture
    difference = (pg.states(**batch, image_features=other) - before).abs().amax(-1)
    assert difference[0, valid[0]].min() > 1e-3
    assert difference[1:].max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_nothing(pg, side):
    """Neither what they hold, nor how many, nor on which side. (transformers 4.46 to 4.48 made
    left pads visible to the prefix again.)"""
    batch, labels, valid = make_batch(side)
    before = pg(**batch)
    other = batch | {"input_ids": batch["input_ids"].masked_fill(~valid, 7)}
    other["token_type_ids"] = batch["token_type_ids"].masked_fill(~valid, 1)
    close(pg(**other)[valid], before[valid], 1e-6)
    pad = (7, 0) if side == "left" else (0, 7)
    wider = {k: v if k == "pixel_values" else F.pad(v, pad) for k, v in batch.items()}
    close(pg(**wider)[F.pad(valid, pad)], before[valid])
    for row in range(3):
        one, keep = alone(batch, row), valid[row]
        close(pg(**one)[0], before[row, keep])
        loss = shifted_loss(before[row : row + 1], labels[row : row + 1])
        close(shifted_loss(pg(**one), labels[row : row + 1, keep]), loss, 1e-5)


# ---- pictures -----------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_features_are_the_pictures(pg):
    batch, _, valid = make_batch(pictures=(0, 2))
    pixels = batch.pop("pixel_values")
    features = pg.image_features(pixels)
    assert features.shape == (2, pg.config.image_tokens, pg.config.text.hidden_size)
    assert torch.equal(pg(**batch, image_features=features), pg(**batch, pixel_values=pixels))
    swapped = pg(**batch, image_features=features.flip(0))
    assert (swapped - pg(**batch, image_features=features))[valid].abs().max() > 1


@pytest.mark.parametrize("pictures, given", [((0, 1, 2), 2), ((0,), 2), ((0, 1), 0), ((), 1)])
def test_pictures_and_image_tokens_must_agree(pg, pictures, given):
    """Truncation that cuts image tokens shifts every later feature by one place, silently."""
    batch, _, _ = make_batch(pictures=pictures)
    batch["pixel_values"] = torch.zeros(given, 3, 28, 28) if given else None
    had = re.escape(str([4 * (row in pictures) for row in range(3)]))
    sentence = f"rows have {had} <image> tokens.*features for {4 * given}.*needs 4"
    with pytest.raises(ValueError, match=sentence):
        pg(**batch)


def test_one_row_too_short_and_one_too_long_do_not_make_it_right(pg):
    batch, _, _ = make_batch()
    ids = batch["input_ids"]
    ids[1, (ids[1] == IMAGE).nonzero()[0]] = 5
    ids[0, (ids[0] != IMAGE).nonzero()[-1]] = IMAGE
    with pytest.raises(ValueError, match=r"rows have \[5, 3, 4\] <image> tokens.*features for 12"):
        pg(**batch)


@pytest.mark.parametrize("size", [(14, 28), (42, 42), (28, 42)])
def test_wrong_picture_size(pg, size):
    with pytest.raises(ValueError, match=f"28 x 28 .*{size[0]}, {size[1]}"):
        pg.image_features(torch.zeros(1, 3, *size))


# ---- configs as the Hub has them ----------------------------------------------------------------


def hub_config(text, image_size=None):
    """What google/paligemma2-*'s config.json says, and nothing that it leaves out."""
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "projection_dim": text["hidden_size"],
        "torch_dtype": "bfloat16",
        "vision_use_head": False,
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "image_token_index": 257152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": text["hidden_size"],
        "text_config": text
        | {
            "eos_token_id": [1, 107],
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "model_type": "gemma2",
            "torch_dtype": "bfloat16",
            "vocab_size": 257216,
        },
        "torch_dtype": "bfloat16",
        "vision_config": vision | ({"image_size": image_size} if image_size else {}),
    }


T2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
T9B = {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
}
T27B = {
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
}
# name -> (config, parameters, stored tensors, image tokens); SPEC 1.5 for the 3B
SIZES = {
    "3b-224": (hub_config(T2B), 3_032_242_416, 727, 256),
    "3b-448": (hub_config(T2B, 448), 3_033_127_152, 727, 1024),
    "10b-896": (hub_config(T9B, 896), None, 727 + 16 * 11, 4096),
    "28b-224": (hub_config(T27B), None, 727 + 20 * 11, 256),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_by_key(size):
    HFConfig, HF = reference().PaliGemmaConfig, reference().PaliGemmaForConditionalGeneration
    config, parameters, tensors, image_tokens = SIZES[size]
    with torch.device("meta"):
        ours = PaliGemma(model_config(PaliGemma, config))
        hf = HF(HFConfig.from_dict(json.loads(json.dumps(config))))
    theirs = {n: tuple(p.shape) for n, p in oracle.paligemma_stored(hf).items()}
    assert {KEYS.to_file(n): tuple(t.shape) for n, t in ours.state_dict().items()} == theirs
    assert len(theirs) == tensors
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in hf.parameters())
    assert parameters in (None, count)
    assert ours.config.image_tokens == image_tokens
    assert ours.config.text.query_pre_attn_scalar == config["text_config"]["query_pre_attn_scalar"]
    assert (ours.config.pad_token_id, ours.config.eos_token_id, ours.config.bos_token_id) == (
        0,
        1,
        2,
    )


def test_defaults_are_the_familys():
    HFText, HFVision = reference().Gemma2Config, reference().SiglipVisionConfig
    for ours, theirs in ((Gemma2Config(), HFText()), (SigLIPConfig(), HFVision())):
        for name in vars(ours).keys() - {"rope_theta", "layer_types"}:
            assert getattr(ours, name) == getattr(theirs, name), name
    assert Gemma2Config().rope_theta == HFText().rope_parameters["rope_theta"]
    sliding = ["sliding_attention", "full_attention"]
    layers = [sliding[not Gemma2Config().is_sliding(i)] for i in range(26)]
    assert layers == HFText().layer_types


def test_null_fields_are_absent_fields_but_for_the_caps():
    nothing = {"head_dim": None, "rms_norm_eps": None, "sliding_window": None, "rope_theta": None}
    assert from_config(Gemma2Config, nothing) == Gemma2Config()
    off = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    expected = replace(Gemma2Config(), **off)
    assert from_config(Gemma2Config, off) == expected != Gemma2Config()


def test_a_text_config_that_says_nothing_is_the_2b():
    """Nothing of it comes from the top level, which has a hidden_size and a vocab_size too."""
    top = {"hidden_size": 2048, "vocab_size": 257152, "num_hidden_layers": 18}
    text = {"model_type": "gemma2", "vocab_size": 257216}  # else <image> were not in it
    config = hub_config(T2B) | top | {"text_config": text}
    assert model_config(PaliGemma, config).text == replace(Gemma2Config(), vocab_size=257216)
    assert (Gemma2Config().hidden_size, Gemma2Config().num_hidden_layers) == (2304, 26)


@pytest.mark.parametrize("wrong", [2048, 7, ABSENT])
def test_top_level_hidden_size_is_never_read(pair, wrong, tmp_path):
    """2048 is the class default that real files carry. 4.46 scaled by its root: pictures 6 % too
    large."""
    made = make_pair(tmp_path, hidden_size=wrong)
    assert made.pg.config == pair.pg.config
    batch = make_batch()[0]
    with torch.no_grad():
        assert torch.equal(made.pg(**batch), pair.pg(**batch))


def test_ids_and_image_size_come_from_the_config(pair, tmp_path):
    made = make_pair(tmp_path, image_token_index=5, eos_token_id=9, pad_token_id=8)
    c = made.pg.config
    assert (c.image_token_index, c.eos_token_id, c.pad_token_id, c.bos_token_id) == (5, 9, 8, 2)
    batch, _, valid = make_batch()
    swap = torch.arange(96)
    swap[5], swap[IMAGE] = IMAGE, 5
    batch["input_ids"] = swap[batch["input_ids"]]
    with torch.no_grad():
        close(made.pg(**batch)[valid], made.hf(**batch).logits[valid])


# ---- every file layout --------------------------------------------------------------------------


LAYOUTS = {  # {name in the file: tensor} of the reference
    "the Hub's, transformers 4": oracle.paligemma_stored,
    "with the tied head, as some fine-tuning code": lambda hf: (
        oracle.paligemma_stored(hf) | {"language_model.lm_head.weight": hf.lm_head.weight}
    ),
    "transformers 5 in memory, head spelled out": lambda hf: hf.state_dict(),
    "4.53 to 4.57 in memory": lambda hf: {
        name.replace("vision_tower.", "vision_tower.vision_model."): t
        for name, t in hf.state_dict().items()
    },
    "with what old versions stored and nobody needs": lambda hf: (
        oracle.paligemma_stored(hf)
        | {
            "vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        }
    ),
}


def layout_b(folder, config, hf):
    """The file transformers 5 writes, with its own config."""
    hf.save_pretrained(folder)
    names = load_file(folder / "model.safetensors").keys()
    assert "vision_tower.post_layernorm.weight" in names
    assert "language_model.model.norm.weight" in names
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())["text_config"]


def sharded(folder, config, hf):
    oracle.write_shards(folder, config, oracle.paligemma_stored(hf))


def written_as(layout):
    def write(folder, config, hf):
        oracle.write_checkpoint(folder, config, LAYOUTS[layout](hf))

    return write


WRITERS = {layout: written_as(layout) for layout in LAYOUTS} | {"5": layout_b, "shards": sharded}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_layouts_load_identically(pair, write, tmp_path):
    write(tmp_path, pair.config, pair.hf)
    loaded, expected = PaliGemma.from_pretrained(tmp_path), pair.pg.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not loaded.training


def test_a_head_of_its_own_is_refused(pair, tmp_path):
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        other = pair.hf.lm_head.weight.detach().clone()
        other[3, 4] += 1e-3
        oracle.write_checkpoint(
            tmp_path, pair.config, oracle.paligemma_stored(pair.hf) | {name: other}
        )
        with pytest.raises(ValueError, match="lm_head of its own that differs.*one matrix"):
            PaliGemma.from_pretrained(tmp_path)


SAVED = {
    "plain": {},
    "caps off": {"text": {"attn_logit_softcapping": OFF, "final_logit_softcapping": OFF}},
    "other fields": {
        "text": {
            "attn_logit_softcapping": 7.0,
            "final_logit_softcapping": 5.0,
            "rope_theta": 50.0,
            "rms_norm_eps": 0.1,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        "vision": {"layer_norm_eps": 0.1},
        "eos_token_id": 9,
    },
}


@pytest.mark.parametrize("overrides", SAVED.values(), ids=SAVED)
def test_saved_files_load_in_transformers_and_here(overrides, tmp_path):
    HF = reference().PaliGemmaForConditionalGeneration
    made = make_pair(tmp_path / "in", **overrides)
    made.pg.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == oracle.paligemma_stored(made.hf).keys()
    back, info = HF.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch, _, valid = make_batch()
    with torch.no_grad():
        close(back(**batch).logits[valid], made.hf(**batch).logits[valid], 1e-6)
    assert back.generation_config.eos_token_id == made.pg.config.eos_token_id
    again = PaliGemma.from_pretrained(tmp_path)
    assert again.config == made.pg.config
    expected = made.pg.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in again.state_dict().items())


def test_transformers_path_is_where_transformers_has_the_module(pair):
    """PEFT names adapters by it."""
    theirs = dict(pair.hf.named_modules())
    for name, module in pair.pg.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert theirs[transformers_path(PaliGemma, name)].weight.shape == module.weight.shape, (
                name
            )


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [{"model_type": "gemma", "hidden_size": 2048}, {"hidden_size": 2048}, None, ABSENT]
)
def test_paligemma_1_is_refused_by_name(text, tmp_path):
    """Its files have the same model_type. In PaliGemma 2 code they answer with 108 spaces, the
    other way round too."""
    config = {k: v for k, v in (hub_config(T2B) | {"text_config": text}).items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PaliGemma 1 .*not 'gemma2'.*paligemma2"):
        PaliGemma.from_pretrained(tmp_path)


# ---- dtypes, memory, gradients ------------------------------------------------------------------


def test_bf16_is_close(pair):
    half = PaliGemma.from_pretrained(pair.folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch, _, valid = make_batch()
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        features = half.image_features(pixels)  # fp32, as siglip_pixels gives them
        logits = half(**batch, image_features=features.float())  # as the cache on disk has them
        assert logits.dtype == features.dtype == torch.bfloat16
        exact = pair.pg(**batch, pixel_values=pixels)
    assert (logits.float() - exact)[valid].abs().mean() < 0.15
    said = half.generate(**batch, image_features=features, max_new_tokens=3)
    assert said.shape == (3, 3)


@pytest.mark.parametrize("width, scale", [(2304, 48.0), (3584, 59.75), (4608, 68.0)])
def test_embedding_scale_is_rounded_to_the_models_dtype(width, scale):
    sizes = dict(num_hidden_layers=0, vocab_size=3, hidden_size=width)
    text = model.Gemma2(Gemma2Config(**sizes))
    words = text.embed_tokens.weight
    torch.nn.init.uniform_(words, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 2]])
    close(text.embed(ids)[0], words[[0, 2]] * width**0.5)
    text.bfloat16()
    exact = words[[0, 2]].float() * scale  # a product of two bf16 numbers fits fp32
    assert text.embed(ids).dtype == torch.bfloat16
    assert torch.equal(text.embed(ids)[0], exact.bfloat16())


def test_norm_computes_in_fp32_and_casts_last():
    """Multiplying after the cast is Llama's way, and a rounding more."""
    norm = model.GemmaNorm(8, 1e-6).bfloat16()
    torch.nn.init.uniform_(norm.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(0))
    x = 30 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = (exact * (1 + norm.weight.float())).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) != exact).float().mean() < 0.01  # a last bit of rsqrt at most


def grads(pg, batch, labels):
    pg.train().zero_grad()
    shifted_loss(pg(**batch), labels).backward()
    return {n: p.grad.clone() for n, p in pg.named_parameters() if p.grad is not None}


def test_checkpointing_gives_the_same_gradients(pair, monkeypatch):
    pg, (batch, labels, _) = PaliGemma.from_pretrained(pair.folder), make_batch()
    plain, calls, checkpoint = grads(pg, batch, labels), [], model.checkpoint
    monkeypatch.setattr(
        model, "checkpoint", lambda *args, **how: calls.append(how) or checkpoint(*args, **how)
    )
    pg.language_model.checkpointing = True
    again = grads(pg, batch, labels)
    assert len(calls) == 4  # each layer
    for name, grad in plain.items():
        close(again[name], grad, 1e-6)


def test_checkpointing_does_not_touch_decoding(speaker, golden):
    speaker.pg.language_model.checkpointing = True
    try:
        said = speaker.pg.generate(**speaker.batch, max_new_tokens=STEPS)
    finally:
        speaker.pg.language_model.checkpointing = False
    assert torch.equal(said, golden["ids"])


MEASURE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import model
torch.set_num_threads(1)
def kilobytes(field):
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith(field)))
model.PaliGemma.from_pretrained(sys.argv[4])  # what torch imports on the way is not the weights'
before = kilobytes("VmRSS")
pg = model.PaliGemma.from_pretrained(sys.argv[2], getattr(torch, sys.argv[3]))
parts = (part for p in pg.parameters() for part in p.detach().flatten().split(1 << 20))
ones = sum(part.sum(dtype=torch.float32).item() for part in parts)  # every page is read
print(before, kilobytes("VmHWM"), int(ones))
"""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """A sharded bf16 checkpoint of 250 MB, all ones, and how many bytes it has."""
    folder = tmp_path_factory.mktemp("heavy")
    text = dict(hidden_size=1024, intermediate_size=4096, vocab_size=24000, head_dim=64)
    config = oracle.paligemma_config(text=text | {"num_hidden_layers": 6})
    with torch.device("meta"):
        shapes = PaliGemma(model_config(PaliGemma, config)).state_dict()
    ones = {KEYS.to_file(n): torch.ones(t.shape, dtype=torch.bfloat16) for n, t in shapes.items()}
    oracle.write_shards(folder, config, ones)
    yield folder, 2 * sum(shape.numel() for shape in shapes.values())
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype, times", [("bfloat16", 1.0), ("float32", 2.3)])
def test_peak_memory_of_loading(heavy, dtype, times, tmp_path):
    """bf16 is mapped, so its peak is the file; fp32 is a copy (twice the bytes) plus the shard that
    is being read (at most half of this file)."""
    folder, size = heavy
    assert size > 200e6
    seeded(tmp_path)
    given = (Path(model.__file__).parent, folder, dtype, tmp_path)
    command = [sys.executable, "-c", MEASURE, *map(str, given)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    before, peak, ones = map(int, result.stdout.split())
    assert ones == size // 2
    taken = (peak - before) * 1024
    print(f"\n{dtype}: {taken / size:.2f} of {size / 1e6:.0f} MB")
    assert 0.9 * times * size < taken + 60e6  # the measure measures
    assert taken < 1.1 * times * size + 20e6


# ---- generation ---------------------------------------------------------------------------------


def endless(pg):
    """The same weights with an EOS that never comes."""
    with torch.device("meta"):
        other = PaliGemma(replace(pg.config, eos_token_id=-1))
    other.load_state_dict(pg.state_dict(), assign=True)
    return other.eval()


@torch.no_grad()
def recomputed(pg, one, steps):
    """Greedy ids of one unpadded row without a cache."""
    one, said = dict(one), []
    for _ in range(steps):
        logits = pg(**one)[0, -1]
        best, second = logits.topk(2)[0].tolist()
        assert best - second > 1e-3  # no tie that rounding could turn
        said.append(int(logits.argmax()))
        new = {"input_ids": said[-1], "attention_mask": 1, "token_type_ids": 1}
        one |= {k: torch.cat((one[k], torch.tensor([[v]])), 1) for k, v in new.items()}
    return said


@pytest.mark.parametrize("window", [6, 4096])
def test_greedy_ids_equal_the_reference(window, tmp_path):
    """Cached on both sides, left-padded."""
    made = make_pair(tmp_path, text={"sliding_window": window}, **oracle.SPEAKER)
    batch, _, _ = make_batch(**oracle.PROMPTS)
    theirs = made.hf.generate(**batch, max_new_tokens=STEPS, do_sample=False)
    theirs = theirs[:, batch["input_ids"].shape[1] :]
    assert theirs.unique().numel() > 10
    assert torch.equal(
        padded(made.pg.generate(**batch, max_new_tokens=STEPS), STEPS), padded(theirs, STEPS)
    )


def test_prompts_with_suffix_tokens_equal_the_reference(tmp_path):
    made = make_pair(tmp_path)
    batch, _, _ = make_batch(rows=((5, 7), (2, 4), (3, 1)))
    theirs = made.hf.generate(
        **batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = endless(made.pg).generate(**batch, max_new_tokens=STEPS)
    assert torch.equal(ours, theirs[:, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_and_batched_equal_recomputed_and_single(speaker, side):
    """The pain of most libraries: padded rows decode differently, and only the last one right."""
    pg, (batch, _, _) = endless(speaker.pg), make_batch(side, **oracle.PROMPTS)
    said = pg.generate(**batch, max_new_tokens=STEPS)
    for row in range(len(said)):
        one = alone(batch, row)
        assert torch.equal(pg.generate(**one, max_new_tokens=STEPS)[0], said[row])
        assert recomputed(pg, one, STEPS) == said[row].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_suffix_in_the_prompt_continues_as_if_generated(speaker, side):
    """What forces an "Answer:" behind a rationale that was cut."""
    pg, (batch, _, _) = endless(speaker.pg), make_batch(side, **oracle.PROMPTS)
    whole = pg.generate(**batch, max_new_tokens=STEPS)
    for cut in (1, 7):
        kept = whole[:, :cut]
        new = {"input_ids": kept, "attention_mask": kept * 0 + 1, "token_type_ids": kept * 0 + 1}
        longer = batch | {k: torch.cat((batch[k], v), 1) for k, v in new.items()}
        assert torch.equal(pg.generate(**longer, max_new_tokens=STEPS - cut), whole[:, cut:])
    as_prefix = longer | {"token_type_ids": longer["token_type_ids"] * 0}
    assert not torch.equal(pg.generate(**as_prefix, max_new_tokens=STEPS - cut), whole[:, cut:])


def test_mask_and_types_may_be_left_out_or_boolean(speaker):
    one = alone(speaker.batch, 0)
    expected = speaker.pg.generate(**one, max_new_tokens=5)
    bare = {k: one[k] for k in ("input_ids", "pixel_values")}
    assert torch.equal(speaker.pg.generate(**bare, max_new_tokens=5), expected)
    boolean = speaker.batch | {
        k: speaker.batch[k].bool() for k in ("attention_mask", "token_type_ids")
    }
    expected = speaker.pg.generate(**speaker.batch, max_new_tokens=5)
    assert torch.equal(speaker.pg.generate(**boolean, max_new_tokens=5), expected)


def test_pictures_of_some_rows_only_in_generation(speaker):
    batch, _, _ = make_batch(**oracle.PROMPTS | {"pictures": (1, 3)})
    pg, pixels = endless(speaker.pg), batch.pop("pixel_values")
    said = pg.generate(**batch, pixel_values=pixels, max_new_tokens=6)
    for row in range(len(said)):
        one = alone(batch, row)
        if row in (1, 3):
            one["pixel_values"] = pixels[row // 2 : row // 2 + 1]
        assert torch.equal(pg.generate(**one, max_new_tokens=6)[0], said[row])


def test_a_generated_image_token_is_a_word(speaker):
    """The model may say <image>; there is no picture behind it, and no error."""
    pg, one = endless(speaker.pg), alone(speaker.batch, 0)
    said = pg.generate(**one, max_new_tokens=STEPS)
    new = next(token for token in said[0].tolist() if token not in one["input_ids"])
    with torch.device("meta"):
        other = PaliGemma(replace(pg.config, image_token_index=new))
    other.load_state_dict(pg.state_dict(), assign=True)
    one["input_ids"] = one["input_ids"].masked_fill(one["input_ids"] == IMAGE, new)
    assert torch.equal(other.generate(**one, max_new_tokens=STEPS), said)


def test_sampling_follows_the_generator_and_the_temperature(speaker):
    def sample(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        how = dict(max_new_tokens=STEPS, temperature=temperature, generator=generator)
        return padded(speaker.pg.generate(**speaker.batch, **how), STEPS)

    assert torch.equal(sample(1, 1.0), sample(1, 1.0))
    assert not torch.equal(sample(1, 1.0), sample(2, 1.0))
    greedy = padded(speaker.pg.generate(**speaker.batch, max_new_tokens=STEPS), STEPS)
    assert torch.equal(sample(1, 0), greedy) and torch.equal(sample(2, 0), greedy)
    assert torch.equal(sample(1, 1e-4), greedy)
    assert not greedy.requires_grad


# ---- loops --------------------------------------------------------------------------------------

TIMES, LEAST = model.looping.__defaults__


def ends_in_a_loop(ids, times, least):
    """`looping` spelled out for one list."""
    for period in range(1, len(ids) // times + 1):
        length = max(times * period, least)
        tail, chunk = ids[-length:], ids[-period:]
        whole = (chunk * length)[-length:]
        if length <= len(ids) and tail == whole:
            return True
    return False


@pytest.mark.parametrize("times, least", [(2, 1), (2, 5), (3, 1), (3, 7), (4, 6)])
def test_looping_by_its_definition(times, least):
    generator, found = torch.Generator().manual_seed(0), Counter()
    for length in range(1, 26):
        ids = torch.randint(0, 3, (60, length), generator=generator)
        period, start = 1 + length % 6, length // 4
        for row in range(30):  # half of the rows end in something periodic, some too short
            ids[row, start:] = ids[row, :period].repeat(26)[: length - start]
        ours = model.looping(ids, times, least).tolist()
        assert ours == [ends_in_a_loop(row, times, least) for row in ids.tolist()], length
        found.update(ours)
    assert min(found[True], found[False]) > 150


@pytest.mark.parametrize("period", [1, 5, 6, 7, 60])
def test_how_soon_a_loop_is_stopped(period):
    """After four rounds, or 24 tokens if that is more; whatever came before it."""
    words = torch.randperm(500, generator=torch.Generator().manual_seed(period))
    ids = torch.cat((words[:100], words[100 : 100 + period].repeat(60)))[None]
    needed = max(4 * period, 24)
    assert not model.looping(ids[:, : 100 + needed - 1])
    assert model.looping(ids[:, : 100 + needed])
    assert model.looping(ids[:, : 100 + needed + 1])  # also in the middle of a round


def first_stop(ids):
    """After how many tokens `looping` stops a row, or None: in one pass over numbers of matches."""
    ids = torch.tensor(ids)
    found = []
    for period in range(1, len(ids) // TIMES + 1):
        same = (ids[period:] == ids[:-period]).int()
        need = max(TIMES * period, LEAST) - period
        if need <= same.sum():
            full = same.cumsum(0) - F.pad(same, (need, 0))[:-need].cumsum(0) == need
            found += (full.nonzero().flatten()[:1] + period + 1).tolist()
    return min(found, default=None)


def occurrences(ids, n):
    """How often the most frequent n-gram occurs."""
    return max(Counter(zip(*(ids[i:] for i in range(n)), strict=False)).values(), default=0)


@pytest.mark.slow
def test_sound_thoughts_are_not_stopped():
    """Gemini's own thoughts restate a formula as often as they need it. By the measure of a loop
    first used here (an 8-gram four times) every fifth of them would have been cut off."""
    from support.dataset.traces import load_traces

    names = ("pali_reason/training.csv", "tokenizers/paligemma/tokenizer.json")
    files = [DATA / name for name in names]
    if not all(file.is_file() for file in files):
        pytest.skip(f"needs {files[0]} and {files[1]} (set NANOCOT_DATA)")
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(files[1])).encode
    thoughts = [trace["thought"] for trace in load_traces(files[0])]
    ids = [encode(thought, add_special_tokens=False).ids for thought in thoughts if thought.strip()]
    assert len(ids) == 335
    assert sum(occurrences(row, 8) >= 4 for row in ids) == 68
    assert [first_stop(row) for row in ids] == [None] * 335
    looped = ids[0][:230] + ids[0][200:230] * 3  # the measure measures
    assert first_stop(looped) == 230 + 3 * 30
    assert model.looping(torch.tensor([looped])) and not model.looping(torch.tensor([looped[:-1]]))


class Script:
    """A "model" that says given rows, for `decode`: the cache knows which rows are live."""

    def __init__(self, rows):
        self.rows, self.at = torch.tensor(rows), 0

    def keep(self, alive):
        self.rows = self.rows[alive]

    def logits(self):
        said = F.one_hot(self.rows[:, self.at], 1000).float()
        self.at += 1
        return said

    def step(self, ids, cache):
        assert cache is self and ids.shape == (len(self.rows), 1)
        assert torch.equal(ids[:, 0], self.rows[:, self.at - 1])
        return self.logits()

    def decode(self, limit, stop_loops=False, pad_id=0):
        self.config = SimpleNamespace(eos_token_id=1, pad_token_id=pad_id)
        said = model.decode(self, self.logits(), self, limit, stop_loops=stop_loops)
        return said, [stop_reason(row, 1, pad_id, stop_loops) for row in said]


LIMIT = 80


def script():
    counting = list(range(100, 100 + LIMIT))
    looping = [*range(200, 210), *[7, 8] * LIMIT]
    late = [*range(300, 330), *[9] * LIMIT]
    ending = [*range(500, 540), 1, *range(600, 700)]
    return [row[:LIMIT] for row in (looping, counting, ending, late)]


@pytest.mark.parametrize("stop_loops", [True, False])
def test_decode(stop_loops):
    """A row that has ended or loops leaves the batch, and others do not notice; pads follow."""
    rows = script()
    stops = (
        ["loop", "length", "eos", "loop"] if stop_loops else ["length", "length", "eos", "length"]
    )
    lengths = [10 + LEAST, LIMIT, 41, 30 + LEAST] if stop_loops else [LIMIT, LIMIT, 41, LIMIT]
    written, found = Script(rows).decode(LIMIT, stop_loops, pad_id=3)
    assert found == stops
    for row, ids, length in zip(rows, written.tolist(), lengths, strict=True):
        assert ids == row[:length] + [3] * (LIMIT - length)
    for limit in (1, 41):
        assert torch.equal(Script(rows).decode(limit, stop_loops, pad_id=3)[0], written[:, :limit])


def test_decoding_ends_with_the_last_row():
    """A row that ends where it would have been stopped has ended."""
    ended = [5] * (LEAST - 1) + [1] + [6] * (LIMIT - LEAST)
    written, stops = Script([ended, [1] * LIMIT, [8] * LIMIT]).decode(LIMIT, stop_loops=True)
    assert stops == ["eos", "eos", "loop"]
    assert written.tolist() == [ended[:LEAST], [1] + [0] * (LEAST - 1), [8] * LEAST]


def test_a_real_loop_is_stopped(speaker):
    """A tiny random model soon repeats itself: it is stopped there, and other rows go on."""
    pg, limit = endless(speaker.pg), 60
    batch = {k: v for k, v in speaker.batch.items() if k != "pixel_values"}
    batch["image_features"] = pg.image_features(speaker.batch["pixel_values"])
    free = pg.generate(max_new_tokens=limit, **batch)
    said = pg.generate(max_new_tokens=limit, stop_loops=True, **batch)
    eos = pg.config.eos_token_id
    stops = [stop_reason(row, eos, 0, True) for row in said]
    assert "loop" in stops
    for row, stop in enumerate(stops):
        end = first_stop(free[row].tolist())
        assert stop == ("loop" if end else "length")
        assert padded(said, limit)[row].tolist() == free[row, :end].tolist() + [0] * (
            limit - (end or limit)
        )


# ---- from scratch and at full width -------------------------------------------------------------


def test_starts_from_scratch_with_states_of_unit_scale():
    made = PaliGemma(model_config(PaliGemma, oracle.paligemma_config()))
    made.init_weights(torch.Generator().manual_seed(0))
    again = PaliGemma(made.config)
    again.init_weights(torch.Generator().manual_seed(0))
    for (name, p), other in zip(made.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, other), name
        if p.dim() == 1:
            plain = 1.0 if re.search(r"vision.*norm\d?\.weight", name) else 0.0
            assert (p == plain).all(), name
        else:  # a patch's fan-in is 3 * 14 * 14, not the 14 of its last side
            fan_in = p.shape[1:].numel()
            assert p.std().item() == pytest.approx(fan_in**-0.5, rel=0.15), name


@pytest.mark.slow
def test_full_width_logits(tmp_path):
    """The released 3B's widths and window, cut to two layers each and a small vocabulary."""
    HFConfig, HF = reference().PaliGemmaConfig, reference().PaliGemmaForConditionalGeneration
    config = hub_config(T2B | {"num_hidden_layers": 2, "sliding_window": 100})
    config["vision_config"]["num_hidden_layers"] = 2
    config["text_config"]["vocab_size"], config["image_token_index"] = 2000, 1999
    hf = HF._from_config(
        HFConfig.from_dict(json.loads(json.dumps(config))),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() > 1:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                p.normal_(0.0, gain * p[0].numel() ** -0.5, generator=generator)
            else:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    oracle.write_checkpoint(tmp_path, config, oracle.paligemma_stored(hf))
    pg = PaliGemma.from_pretrained(tmp_path)
    ids = torch.randint(3, 1999, (1, 300), generator=generator)
    ids[:, :256] = 1999
    types = (torch.arange(300) > 280).long()[None]
    pixels = torch.rand(1, 3, 224, 224, generator=generator) * 2 - 1
    with torch.no_grad():
        given = dict(input_ids=ids, token_type_ids=types, pixel_values=pixels)
        theirs = hf(**given, attention_mask=torch.ones_like(ids)).logits
        ours = pg(**given)
    assert theirs.std() > 0.5
    print(f"\nfull width: {(ours - theirs).abs().max():.1e}, logits {theirs.std():.2f}")
    close(ours, theirs)
    (tmp_path / "model.safetensors").unlink()
