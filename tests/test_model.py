"""model.py against the reference implementations: T5 live, DETR through golden fixtures.

The DETR fixtures were made once by make_fixtures.py (its docstring has the command): timm needs a
torchvision that fits torch, and there is none for the CPU build.
"""

import json
import re

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import ATOL
from pairs import VERSIONS, assert_same_logits, close, file_names, make_t5, padded, t5_logits
from safetensors.torch import load_file

import model
from model import DETR, T5, T5Config
from support.checkpoints import hub
from support.checkpoints.keys import DETR_KEYS, T5_KEYS


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request, tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"), request.param)


# Seeds and vocabularies for which some rows end early and others never do.
SPEAKERS = {"v1.0": dict(vocab_size=30, seed=9), "v1.1": dict(vocab_size=20, seed=11)}


@pytest.fixture(scope="module", params=VERSIONS)
def speaker(request, tmp_path_factory):
    """A pair that generates, and a padded batch of six. (The reference's own cache breaks where
    the decoder is deeper than the encoder, so here it is shallower.)"""
    chosen = SPEAKERS[request.param]
    folder = tmp_path_factory.mktemp("t5")
    made = make_t5(folder, request.param, num_layers=3, num_decoder_layers=2, **chosen)
    ids, mask, _ = oracle.t5_batch(6, 12, 3, chosen["vocab_size"], chosen["seed"])
    made.ids, made.mask = ids, mask
    return made


# ---- T5: forward --------------------------------------------------------------------------------


def test_t5_logits_with_padded_rows(pair):
    batch = oracle.t5_batch()
    assert batch[1].sum(1).unique().numel() == len(batch[1])  # every row padded differently
    assert_same_logits(pair.folder, pair.hf, batch)


def test_t5_positions_beyond_the_last_bucket(pair):
    assert_same_logits(pair.folder, pair.hf, oracle.t5_batch(2, 300, 200))


def test_t5_padding_is_invisible(pair):
    ids, mask, decoder_ids = oracle.t5_batch()
    with torch.no_grad():
        before = pair.t5(ids, mask, decoder_ids)
        other_pads = torch.where(mask == 0, 7, ids)
        assert torch.equal(pair.t5(other_pads, mask, decoder_ids), before)
        longer = F.pad(ids, (0, 5)), F.pad(mask, (0, 5))
        close(pair.t5(*longer, decoder_ids), before)


def test_t5_decoder_is_causal(pair):
    ids, mask, decoder_ids = oracle.t5_batch()
    changed = decoder_ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 9) % 90 + 2
    with torch.no_grad():
        a, b = pair.t5(ids, mask, decoder_ids), pair.t5(ids, mask, changed)
    close(a[:, :4], b[:, :4], 1e-5)
    assert (a[:, 4:] - b[:, 4:]).abs().max() > 0.1


@pytest.mark.plain_only
def test_t5_dropout_is_where_the_reference_has_it(pair):
    """Same seed, same random numbers in the same order: only equal sites give equal logits."""
    ours, hf, batch = T5.from_pretrained(pair.folder).train(), pair.hf, oracle.t5_batch()
    quiet = t5_logits(hf, *batch)
    hf.train()
    try:
        torch.manual_seed(0)
        theirs = t5_logits(hf, *batch)
    finally:
        hf.eval()
    torch.manual_seed(0)
    close(ours(*batch).detach(), theirs)
    assert (theirs - quiet).abs().mean() > 0.1


def test_t5_gradients(pair):
    ids, mask, decoder_ids = oracle.t5_batch()
    labels = torch.randint(1, 100, decoder_ids.shape, generator=torch.Generator().manual_seed(1))
    labels[1, 3:] = -100
    t5 = T5.from_pretrained(pair.folder)
    for module, logits in (
        (t5, t5(ids, mask, decoder_ids)),
        (pair.hf, pair.hf(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)[0]),
    ):
        module.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    theirs = {n: p.grad for n, p in oracle.t5_stored_parameters(pair.hf).items()}
    ours = {T5_KEYS.to_file(n): p.grad for n, p in t5.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad.abs().max() > 0, name
        close(grad, theirs[name])


def test_relative_buckets_golden_table():
    distances = torch.tensor([-8, -9, -10, -15, -16, -20, -30, -64, -127, 0, 1, 8, 64, 128])
    encoder = [8, 8, 8, 9, 10, 10, 11, 14, 15, 0, 17, 24, 30, 31]
    decoder = [8, 9, 10, 15, 16, 17, 20, 26, 31, 0, 0, 0, 0, 0]
    assert model.relative_bucket(distances, True, 32, 128).tolist() == encoder
    assert model.relative_bucket(distances, False, 32, 128).tolist() == decoder
    for far in (-128, -129, -1000):
        assert model.relative_bucket(torch.tensor(far), True, 32, 128) == 15
        assert model.relative_bucket(torch.tensor(far), False, 32, 128) == 31


def test_relative_buckets_equal_the_reference():
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-600, 600)
    for both in (True, False):
        for buckets, furthest in ((32, 128), (16, 40), (8, 20)):
            theirs = T5Attention._relative_position_bucket(distances, both, buckets, furthest)
            assert torch.equal(model.relative_bucket(distances, both, buckets, furthest), theirs)


# ---- T5: configs --------------------------------------------------------------------------------


def test_t5_defaults_are_the_familys():
    from transformers import T5Config as HFConfig

    hf, ours = HFConfig(), T5Config()
    for name in vars(ours):
        if name not in ("tie_word_embeddings", "scale_decoder_outputs", "num_decoder_layers"):
            expected = 0 if name == "decoder_start_token_id" else getattr(hf, name)
            assert getattr(ours, name) == expected, name
    assert ours.decoder_layers == ours.num_layers
    assert ours.scaled


def test_t5_absent_and_null_fields(tmp_path):
    """The old files' way: no num_decoder_layers, feed_forward_proj, tie_word_embeddings ..."""
    config, hf = oracle.tiny_t5("v1.0", num_decoder_layers=None)
    del config["num_decoder_layers"], config["decoder_start_token_id"]
    config["feed_forward_proj"] = None
    oracle.write_checkpoint(tmp_path, config, oracle.t5_stored(hf))
    assert T5.from_pretrained(tmp_path).config.decoder_layers == 2
    assert_same_logits(tmp_path, hf)


@pytest.mark.parametrize("version", VERSIONS)
def test_t5_unusual_sizes_come_from_the_config(version, tmp_path):
    unusual = dict(
        relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
        layer_norm_epsilon=0.3,
        num_layers=3,
        num_decoder_layers=1,
    )
    made = make_t5(tmp_path, version, **unusual)
    assert_same_logits(tmp_path, made.hf, oracle.t5_batch(2, 70, 60))


@pytest.mark.parametrize("version", VERSIONS)
def test_t5_starts_from_scratch_as_the_reference_does(version):
    from transformers import T5Config as HFConfig
    from transformers import T5ForConditionalGeneration

    sizes = dict(vocab_size=300, d_model=96, d_kv=20, d_ff=130, num_layers=2, num_heads=8)
    config = sizes | (oracle.V1_1 if version == "v1.1" else {})
    torch.manual_seed(0)
    hf = T5ForConditionalGeneration(HFConfig.from_dict(config)).state_dict()
    ours = T5(hub.from_config(T5Config, config))
    ours.init_weights(torch.Generator().manual_seed(0))
    for name, p in ours.named_parameters():
        theirs = hf[T5_KEYS.to_file(name)]
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:  # 256 numbers or more: a sampling error of 4 % a side
            assert p.std().item() == pytest.approx(theirs.std().item(), rel=0.2), name
            assert p.mean().abs() < 0.2 * p.std(), name


# full shapes: (config, tensors stored, unique parameters), SPEC's table
T5_BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
T5_LARGE = dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
T5_SIZES = {
    "t5-base": (T5_BASE, 257, 222_903_552),
    "t5-large": (T5_LARGE, 509, 737_668_096),
    "flan-t5-base": (T5_BASE | oracle.V1_1 | {"d_ff": 2048}, 282, 247_577_856),
    "flan-t5-large": (T5_LARGE | oracle.V1_1 | {"d_ff": 2816}, 558, 783_150_080),
}


@pytest.mark.parametrize("size", T5_SIZES)
def test_t5_full_shapes_by_key(size):
    from transformers import T5Config as HFConfig
    from transformers import T5ForConditionalGeneration

    config, tensors, parameters = T5_SIZES[size]
    with torch.device("meta"):
        ours = T5(hub.from_config(T5Config, config))
        hf = T5ForConditionalGeneration(HFConfig.from_dict({"vocab_size": 32128} | config))
    theirs = {name: tuple(t.shape) for name, t in hf.state_dict().items()}
    del theirs["encoder.embed_tokens.weight"], theirs["decoder.embed_tokens.weight"]
    if size.startswith("t5"):
        del theirs["lm_head.weight"]
    assert file_names(T5_KEYS, ours) == theirs
    assert len(theirs) == tensors
    assert sum(p.numel() for p in ours.parameters()) == parameters


def large_t5(config):
    """transformers' T5 on random weights. To draw 200 M numbers takes it seconds: two layers are
    drawn, and each further one has the second's, rolled by its number."""
    from transformers import T5Config as HFConfig
    from transformers import T5ForConditionalGeneration as HF

    drawn = HF._from_config(HFConfig.from_dict(config | {"num_layers": 2})).state_dict()
    with torch.device("meta"):
        hf = HF._from_config(HFConfig.from_dict(config))
    state = {}
    for name in hf.state_dict():
        first = re.sub(r"block\.(\d+)", lambda found: f"block.{min(int(found[1]), 1)}", name)
        layer = int(name.split("block.")[1].split(".")[0]) if "block." in name else 0
        state[name] = drawn[first].roll(max(layer - 1, 0), -1) if layer else drawn[first]
    hf.load_state_dict(state, assign=True)
    hf.tie_weights()
    return hf.eval()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["t5-base", "flan-t5-base"])
def test_t5_full_shape_logits(size, tmp_path):
    config = T5_SIZES[size][0] | {"model_type": "t5", "vocab_size": 32128}
    torch.manual_seed(0)
    hf = large_t5(config)
    if size != "t5-base":
        hf.lm_head.weight = torch.nn.Parameter(hf.shared.weight.detach().flip(0) / 10)
    oracle.write_checkpoint(tmp_path, config, oracle.t5_stored(hf))
    assert_same_logits(tmp_path, hf, oracle.t5_batch(2, 200, 40, 32100))
    (tmp_path / "model.safetensors").unlink()  # 0.9 GB that pytest would keep for three runs


# ---- T5: dtype ----------------------------------------------------------------------------------


def test_bf16_is_close(pair):
    half = T5.from_pretrained(pair.folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = oracle.t5_batch()
    with torch.no_grad():
        theirs = t5_logits(pair.hf, *batch)
        assert (half(*batch).float() - theirs).abs().mean() < 0.15


# ---- decoding -----------------------------------------------------------------------------------


def lengths(rows, eos=1):
    """Tokens per row up to and including EOS; the row's width where there is none."""
    return [row.index(eos) + 1 if eos in row else len(row) for row in rows.tolist()]


def recompute(t5, ids, mask, steps):
    """Greedy decoding without a cache and without dropping rows."""
    out = torch.zeros(len(ids), 1, dtype=torch.long)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        with torch.no_grad():
            best = t5(ids, mask, out)[:, -1].argmax(-1)
        best = best.masked_fill(ended, 0)
        ended = ended | (best == 1)
        out = torch.cat((out, best[:, None]), 1)
    return out[:, 1:]


def test_greedy_ids_equal_the_reference(speaker):
    theirs = speaker.hf.generate(
        input_ids=speaker.ids, attention_mask=speaker.mask, max_new_tokens=20, do_sample=False
    )[:, 1:]
    ours = speaker.t5.generate(speaker.ids, speaker.mask, max_new_tokens=20)
    assert min(lengths(theirs)) < 10 and max(lengths(theirs)) == 20  # some end, some do not
    assert theirs.unique().numel() > 5
    assert torch.equal(ours, theirs)


def test_cached_equals_recomputed(speaker):
    ours = speaker.t5.generate(speaker.ids, speaker.mask, max_new_tokens=20)
    assert torch.equal(padded(ours, 20), recompute(speaker.t5, speaker.ids, speaker.mask, 20))


def test_cached_equals_recomputed_beyond_the_last_bucket(speaker):
    """150 steps: query positions in the cache count on, and distances pass 128."""
    no_end = T5.from_pretrained(speaker.folder)
    no_end.config = hub.from_config(T5Config, vars(no_end.config) | {"eos_token_id": -1})
    ids, mask = speaker.ids[:2], speaker.mask[:2]
    ours = no_end.generate(ids, mask, max_new_tokens=150)
    assert ours.shape == (2, 150)
    start = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        logits = no_end(ids, mask, torch.cat((start, ours[:, :-1]), 1))
    assert torch.equal(logits.argmax(-1), ours)


def test_batched_equals_single(speaker):
    batched = speaker.t5.generate(speaker.ids, speaker.mask, max_new_tokens=20)
    for i in range(len(speaker.ids)):
        keep = int(speaker.mask[i].sum())
        one = speaker.t5.generate(
            speaker.ids[i : i + 1, :keep], speaker.mask[i : i + 1, :keep], max_new_tokens=20
        )
        assert torch.equal(padded(one, 20)[0], padded(batched, 20)[i])


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.slow
def test_sampling_frequencies(speaker, temperature):
    n = 4000
    ids, mask = speaker.ids[:1].expand(n, -1), speaker.mask[:1].expand(n, -1)
    with torch.no_grad():
        logits = speaker.t5(ids[:1], mask[:1], torch.zeros(1, 1, dtype=torch.long))[0, 0]
    expected = torch.softmax(logits / temperature, -1)
    drawn = speaker.t5.generate(
        ids,
        mask,
        max_new_tokens=1,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    found = torch.bincount(drawn.flatten(), minlength=len(expected)) / n
    margin = 5 * (expected * (1 - expected) / n).sqrt() + 1e-3  # five standard errors
    assert ((found - expected).abs() < margin).all()
    assert (torch.softmax(logits, -1) - expected).abs().max() > margin.max()


def test_generate_leaves_no_gradient_and_no_state(speaker):
    a = speaker.t5.generate(speaker.ids, speaker.mask, max_new_tokens=5)
    speaker.t5.generate(speaker.ids[:2], speaker.mask[:2], max_new_tokens=9)
    assert torch.equal(a, speaker.t5.generate(speaker.ids, speaker.mask, max_new_tokens=5))
    assert not a.requires_grad


# ---- DETR ---------------------------------------------------------------------------------------

GOLDEN = json.loads((oracle.FIXTURES / "detr.json").read_text())
RELEASED = ("detr-resnet-50", "detr-resnet-101-dc5")


def released_slow(names):
    """As parameters: the released sizes take seconds, the tiny ones show the same."""
    return [pytest.param(x, marks=pytest.mark.slow if x in RELEASED else ()) for x in names]


@pytest.fixture(scope="session")
def golden():
    return load_file(oracle.FIXTURES / "detr.safetensors")


@pytest.fixture(scope="session")
def detr_files(tmp_path_factory):
    """{config name: folder} with the oracle's weights, each written when first asked for."""
    made = {}

    def folder(name):
        if name not in made:
            weights = oracle.seeded_weights(detr_shapes(name))
            recorded = GOLDEN["configs"][name]["fingerprint"]
            assert oracle.fingerprint(weights) == recorded, "not the weights of the fixture"
            path = tmp_path_factory.mktemp(name)
            made[name] = oracle.write_checkpoint(path, oracle.DETR_CONFIGS[name], weights)
        return made[name]

    return folder


def detr_shapes(name):
    with torch.device("meta"):
        return file_names(DETR_KEYS, DETR(hub.model_config(DETR, oracle.DETR_CONFIGS[name])))


@torch.no_grad()
def assert_golden(detr, case, golden):
    config, _, _, outputs, stride = oracle.DETR_CASES[case]
    inputs = oracle.detr_inputs(case)
    ours = dict(zip(("logits", "boxes"), detr(*inputs), strict=True))
    ours["features"] = detr.features(*inputs)
    for name in outputs:
        expected = golden[f"{case}/{name}"]
        assert expected.std(dim=1).mean() > 100 * ATOL  # the queries differ
        close(ours[name][:, ::stride], expected)


@pytest.mark.parametrize("case", released_slow(oracle.DETR_CASES))
def test_detr_equals_the_fixture(case, detr_files, golden):
    assert_golden(DETR.from_pretrained(detr_files(oracle.DETR_CASES[case][0])), case, golden)


def test_dc5_and_the_pixel_mask_matter(golden):
    """Otherwise the cases above would not tell."""
    assert (golden["tiny/features"] - golden["tiny-dc5/features"]).abs().mean() > 0.01
    for case, size in (("tiny-padded", (3, 3)), ("tiny-dc5-padded", (6, 6))):
        mask = oracle.detr_inputs(case)[1]
        at_c5 = F.interpolate(mask[:, None].float(), size).flatten(1)
        assert (at_c5.mean(1) < 1).all()  # padding is still seen at the feature map's size


@pytest.mark.parametrize("name", RELEASED)
def test_detr_full_shapes_by_key(name):
    shapes, recorded = detr_shapes(name), GOLDEN["configs"][name]
    assert oracle.key_patterns(shapes) == recorded["keys"]
    assert len(shapes) == recorded["tensors"]
    assert sum(torch.Size(s).numel() for s in shapes.values()) == recorded["elements"]
    if name == "detr-resnet-101-dc5":  # as published
        assert (recorded["tensors"], recorded["elements"]) == (785, 60_675_360)


@pytest.mark.parametrize("rename", [oracle.detr_layout_c, lambda n: n], ids=["C", "A"])
def test_detr_layouts_and_ignored_tensors(rename, detr_files, golden, tmp_path):
    weights = load_file(detr_files("tiny-dc5") / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in weights.items()}
    assert len(renamed) == len(weights)
    if rename is oracle.detr_layout_c:
        changed = " ".join(renamed.keys() - weights.keys())
        assert all(part in changed for part in ("backbone", "o_proj", "fc1"))
    prefix = rename("model.backbone.conv_encoder.model.")
    for norm in ("bn1", "layer1.0.bn2", "layer1.0.downsample.1"):
        renamed[f"{prefix}{norm}.num_batches_tracked"] = torch.tensor(5)
    oracle.write_checkpoint(tmp_path, oracle.DETR_CONFIGS["tiny-dc5"], renamed)
    assert_golden(DETR.from_pretrained(tmp_path), "tiny-dc5-padded", golden)


def test_detr_defaults_are_the_familys():
    from transformers import DetrConfig

    ours, theirs = vars(hub.model_config(DETR, {"model_type": "detr"})), DetrConfig()
    for name in ours.keys() - {"backbone", "backbone_kwargs", "num_labels", "id2label"}:
        assert ours[name] == getattr(theirs, name), name
    assert ours["backbone"] == theirs.backbone_config.backbone
    assert ours["num_labels"] == 91  # COCO's; transformers itself would say 2


@pytest.mark.parametrize("name", RELEASED)
def test_detr_config_of_transformers_5(name):
    """It moves the backbone into backbone_config and drops the old fields."""
    newer = GOLDEN["configs"][name]["config_5x"]
    assert "backbone" not in newer
    assert hub.model_config(DETR, newer) == hub.model_config(DETR, oracle.DETR_CONFIGS[name])


@pytest.mark.parametrize("name", released_slow(["tiny-dc5", *RELEASED]))
def test_detr_round_trip(name, detr_files, tmp_path):
    from transformers import DetrConfig

    detr = DETR.from_pretrained(detr_files(name))
    detr.save_pretrained(tmp_path)
    before = load_file(detr_files(name) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert DETR.from_pretrained(tmp_path).config == detr.config
    config = json.loads((tmp_path / "config.json").read_text())
    if name in RELEASED:
        theirs = DetrConfig.from_dict(config)
        assert theirs.backbone_config.backbone == detr.config.backbone
        assert theirs.num_labels == 91
        assert theirs.dilation is detr.config.dilation
    else:  # where transformers 4 looks; 5 cannot build a reduced ResNet from a config at all
        assert config["backbone_kwargs"] == oracle.TINY_DETR["backbone_kwargs"]


def test_detr_full_mask_is_no_mask_and_rows_are_independent(detr_files):
    detr = DETR.from_pretrained(detr_files("tiny"))
    pixels = torch.cat((oracle.detr_inputs("tiny")[0], oracle.detr_inputs("tiny")[0].flip(3)))
    with torch.no_grad():
        both = detr.features(pixels)
        assert torch.equal(detr.features(pixels, torch.ones(2, 75, 101, dtype=torch.long)), both)
        for row in range(2):
            close(detr.features(pixels[row : row + 1])[0], both[row])
    assert (both[0] - both[1]).abs().mean() > 0.01


def test_detr_boxes_are_in_the_unit_square(detr_files):
    detr = DETR.from_pretrained(detr_files("tiny"))
    assert not any("bn" in name or "downsample.1" in name for name, _ in detr.named_parameters())
    logits, boxes = detr(*oracle.detr_inputs("tiny"))
    assert logits.shape == (1, 5, 7) and boxes.shape == (1, 5, 4)
    assert (boxes > 0).all() and (boxes < 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_kwargs": {"layers": [10**9, 1, 1, 1]}},
        {"backbone_kwargs": {"layers": [1, 1], "channels": [8, 8, 8, 8]}},
        {"backbone_kwargs": {"layers": "abcd"}},
        {"backbone_config": 5, "backbone": None},
        {"id2label": 5},
        {"backbone": "swin_tiny", "backbone_kwargs": None},
        {"d_model": 33},
        {"encoder_attention_heads": 5},
    ],
)
def test_a_detr_config_of_no_model(changes, detr_files, tmp_path):
    weights = load_file(detr_files("tiny") / "model.safetensors")
    oracle.write_checkpoint(tmp_path, oracle.DETR_CONFIGS["tiny"] | changes, weights)
    with pytest.raises(ValueError, match="config.json"):
        DETR.from_pretrained(tmp_path)
