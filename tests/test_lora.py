"""lora.py against PEFT: outputs, gradients and files, on tiny models with large weights."""

import copy
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
from oracle import ATOL
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from fusion import GatedFusion, MultimodalT5
from model import T5, PaliGemma

VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}  # to PEFT
OURS = {v: {k.removeprefix("use_"): on for k, on in kw.items()} for v, kw in VARIANTS.items()}
IMAGE = 57  # id of <image>
LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def close(ours, theirs, atol=ATOL):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# ---- tiny models --------------------------------------------------------------------------------


def tiny_paligemma():
    """transformers' PaliGemma 2: sizes that differ, large weights, a window below the length."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = dict(model_type="gemma2", vocab_size=60, hidden_size=24, intermediate_size=40)
    text |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    text |= dict(query_pre_attn_scalar=8, sliding_window=6)
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48)
    vision |= dict(num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=28)
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision | {"vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=24,
    )
    hf = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            scale = 0.3 if p.dim() == 1 or "embed_" in name else 1.5 * p[0].numel() ** -0.5
            layer_norm = re.search(r"layer_?norm\d?\.weight", name) and "vision" in name
            p.normal_(float(bool(layer_norm)), scale, generator=generator)  # Gemma's are offsets
    return hf.eval()


def paligemma_inputs():
    """Two rows of four picture tokens, prefix and suffix; the second is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 14), generator=generator)
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    ids[0, :4], ids[1, 3:7], ids[1, :3], mask[1, :3] = IMAGE, IMAGE, 0, 0
    kinds[:, 9:] = 1
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=mask, token_type_ids=kinds)


@pytest.fixture(scope="module", params=["paligemma", "t5"])
def tiny(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    return make_tiny("paligemma", tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_tiny("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def t5_adapter(t5, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    peft_file(t5, folder)
    return folder


@pytest.fixture
def adapter(t5_adapter, tmp_path):
    """An adapter folder for the T5 as PEFT writes it, to be spoiled."""
    return Path(shutil.copytree(t5_adapter, tmp_path / "adapter"))


def make_tiny(name, folder):
    """A reference model and its folder; fresh copies of it, ours and theirs; one batch."""
    if name == "paligemma":
        hf, ours, inputs, targets = tiny_paligemma(), PaliGemma, paligemma_inputs(), LANGUAGE
        hf.save_pretrained(folder)
    else:
        config, hf = oracle.tiny_t5("v1.1")
        oracle.write_checkpoint(folder, config, oracle.t5_stored(hf))
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        inputs = dict(zip(names, oracle.t5_batch(), strict=True))
        ours, targets = T5, ["q", "v", "wi_1", "wo"]
    return SimpleNamespace(
        name=name,
        folder=folder,
        inputs=inputs,
        targets=targets,
        ours=lambda **kw: ours.from_pretrained(folder, **kw),
        theirs=lambda: copy.deepcopy(hf),
    )


def run(model, tiny):
    """Logits at the tokens that are no pads."""
    inputs = dict(tiny.inputs)
    if tiny.name == "paligemma":
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    out = model(**inputs)
    logits = getattr(out, "logits", out)
    return logits if tiny.name == "t5" else logits[inputs["attention_mask"].bool()]


def scramble(model, seed=0):
    """Adapters as after training: B not zero, magnitudes off the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(torch.rand(p.shape, generator=generator) + 0.5)
            elif "lora_" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def peft_model(tiny, r=3, alpha=5, **config):
    config = {"target_modules": tiny.targets} | config
    kind = "CAUSAL_LM" if tiny.name == "paligemma" else "SEQ_2_SEQ_LM"
    config = LoraConfig(r=r, lora_alpha=alpha, task_type=kind, **config)
    return scramble(get_peft_model(tiny.theirs(), config)).eval()


def peft_file(tiny, folder, **config):
    """An adapter folder as PEFT writes it, and the PEFT model."""
    theirs = peft_model(tiny, **config)
    theirs.save_pretrained(folder)
    return theirs


def rewrite(folder, rename=None, **settings):
    """Change tensors (a function of {key: tensor}) and settings of an adapter folder."""
    weights, config = folder / lora.WEIGHTS, folder / lora.CONFIG
    if rename:
        tensors = {k: t.clone() for k, t in load_file(weights).items()}
        save_file(rename(tensors), weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


# ---- the same as PEFT ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_pefts(tiny, variant, tmp_path):
    theirs, ours = peft_file(tiny, tmp_path, **VARIANTS[variant]), tiny.ours()
    with torch.no_grad():
        base = run(ours, tiny)
    names = lora.load(ours, tmp_path)
    logits, expected = run(ours, tiny), run(theirs, tiny)
    close(logits, expected)
    assert (logits - base).abs().mean() > 0.1  # the adapters matter
    for out in (logits, expected):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad or "lora_" in n
    }
    if variant == "dora":  # in memory PEFT has a module where its file has a tensor
        grads = {
            n.replace("magnitude_vector.weight", "magnitude_vector"): g for n, g in grads.items()
        }
    assert len(grads) == len(names) * (3 if variant == "dora" else 2)
    for path, layer in lora.adapters(ours).items():
        for name, p in layer.adapter().items():
            expected = grads[f"{ours.hub_path(path)}.{name}"]
            assert expected.abs().max() > 1e-3
            close(p.grad / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.slow
def test_peft_loads_ours(tiny, variant, tmp_path):
    ours = tiny.ours()
    names = lora.inject(ours, 3, 5, **OURS[variant])
    scramble(ours)
    lora.save(ours, tmp_path, base="org/name")
    theirs = PeftModel.from_pretrained(tiny.theirs(), tmp_path)
    close(run(ours, tiny), run(theirs, tiny))
    adapted = {n.split(".lora_A")[0] for n, _ in theirs.named_modules() if n.endswith("lora_A")}
    assert adapted == {f"base_model.model.{ours.hub_path(path)}" for path in names}
    config = theirs.peft_config["default"]
    assert config.base_model_name_or_path == "org/name"
    assert config.task_type == ("SEQ_2_SEQ_LM" if tiny.name == "t5" else "CAUSAL_LM")


@pytest.mark.parametrize("variant", OURS)
def test_our_file_round_trip(tiny, variant, tmp_path):
    ours, again = tiny.ours(), tiny.ours()
    names = lora.inject(ours, 3, 5, dropout=0.25, **OURS[variant])
    lora.save(scramble(ours), tmp_path)
    assert lora.load(again, tmp_path) == names
    assert torch.equal(run(ours, tiny), run(again, tiny))
    for layer in lora.adapters(again).values():
        assert (layer.r, layer.alpha, layer.dropout) == (3, 5, 0.25)
        assert all(p.requires_grad for p in layer.adapter().values())
    assert (tmp_path / lora.WEIGHTS).stat().st_mode & 0o777 == 0o644


class Layers(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.plain, self.biased = nn.Linear(10, 14, bias=False), nn.Linear(14, 6)
        self.to(dtype)

    def forward(self, x):
        return self.biased(self.plain(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("variant, dropout", (("lora", 0), ("lora", 0.4), ("dora", 0)))
def test_one_layer_in_every_dtype(variant, dropout, dtype):
    """With biases. Dropout is compared as well: the same random numbers at the same place; not for
    DoRA, where PEFT's drops the base's input too."""
    torch.manual_seed(0)
    base, x = Layers(dtype), torch.randn(5, 10, dtype=dtype)
    ours, unadapted = copy.deepcopy(base), base(x)
    config = dict(r=4, lora_alpha=9, lora_dropout=dropout) | VARIANTS[variant]
    config = LoraConfig(target_modules=["plain", "biased"], **config)
    theirs = scramble(get_peft_model(base, config))
    values = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    for path in ("plain", "biased"):
        layer = lora.LoRALinear(getattr(ours, path), 4, 9, dropout, **OURS[variant])
        setattr(ours, path, layer)
        for name, p in layer.adapter().items():
            name = name.replace("vector", "vector.weight")  # so PEFT has it in memory
            assert p.dtype == torch.float32
            p.data.copy_(values[f"base_model.model.{path}.{name}"])
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    assert outputs[0].dtype == dtype
    close(*outputs, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert (outputs[0] - unadapted).abs().max() > 0.3


# ---- layers: start, mode, what trains -----------------------------------------------------------


@pytest.mark.parametrize("variant", OURS)
def test_starts_as_the_base(tiny, variant):
    ours = tiny.ours()
    with torch.no_grad():
        base = run(ours, tiny)
        lora.inject(ours, dropout=0.5, **OURS[variant])
        assert not any(m.training for m in ours.modules())  # still in eval mode: no dropout
        adapted = run(ours, tiny)
    assert variant == "dora" or torch.equal(adapted, base)
    close(adapted, base, 1e-4)


def test_a_base_that_somebody_unfreezes_learns_too():
    base = nn.Linear(6, 5)
    layer = scramble(lora.LoRALinear(base, 2, 4))
    x, up = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 5)
    names = [x, *layer.parameters()]
    plain = x @ (layer.weight + layer.delta()).T + layer.bias
    for one, other in zip(
        *(torch.autograd.grad(y, names, up) for y in (layer(x), plain)), strict=True
    ):
        close(one, other, 1e-5)


def test_initialisation_and_scaling():
    torch.manual_seed(0)
    base = nn.Linear(400, 50)
    layer = lora.LoRALinear(base, 16, 8)
    A = layer.lora_A.weight
    assert A.shape == (16, 400) and layer.lora_B.weight.shape == (50, 16)
    assert A.abs().max() <= 1 / math.sqrt(400) < 1.01 * A.abs().max()
    assert not layer.lora_B.weight.any()
    assert layer.scaling == 0.5 and lora.LoRALinear(base, 16, 8, rslora=True).scaling == 2.0
    assert layer.weight is base.weight and layer.bias is base.bias


def test_adapters_are_fp32_on_a_bf16_base(paligemma):
    ours = paligemma.ours(dtype=torch.bfloat16)
    lora.inject(ours, 3, 5, dora=True)
    scramble(ours)
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    assert all(p.dtype == torch.bfloat16 for p in ours.parameters() if not p.requires_grad)
    logits = run(ours, paligemma)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained)


def test_only_adapters_train_and_all_of_them_do(tiny):
    ours = tiny.ours()
    names = lora.inject(ours, 3, 5)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{half}.weight" for path in names for half in "AB"
    }
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # A has no gradient while B is zero
        run(ours, tiny).square().mean().backward()
        optimizer.step()
    for layer in lora.adapters(ours).values():
        assert layer.lora_A.weight.grad.any() and layer.lora_B.weight.grad.any()
    parameters = dict(ours.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in frozen.items())


def test_checkpointing_gives_the_same_gradients(paligemma):
    grads = []
    for checkpointing in (False, True):
        ours = paligemma.ours().train()
        ours.language_model.checkpointing = checkpointing
        torch.manual_seed(0)
        lora.inject(ours, 3, 5, dropout=0.3)
        scramble(ours)
        torch.manual_seed(1)
        run(ours, paligemma).square().mean().backward()
        grads.append([layer.lora_B.weight.grad for layer in lora.adapters(ours).values()])
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, 1e-6)


# ---- targets ------------------------------------------------------------------------------------

VISION_Q = "vision_tower.encoder.layers.0.self_attn.q_proj"
TARGETS = {
    "paligemma": {
        None: r"language_model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj",
        ("q_proj",): r"language_model\..*\.q_proj",
        ("self_attn.q_proj", "up_proj"): r"language_model\..*\.(q|up)_proj",
        (VISION_Q,): re.escape(VISION_Q),
        (f"model.{VISION_Q}",): re.escape(VISION_Q),
        ("multi_modal_projector.linear",): r"multi_modal_projector\.linear",
        r".*\.q_proj": r"(language_model|vision_tower)\..*\.q_proj",
        r"vision_tower.*": r"vision_tower\..*(_proj|fc1|fc2)",
    },
    "t5": {
        None: r".*(self|cross)_attn\.[qv]_proj",
        ("q", "v"): r".*(self|cross)_attn\.[qv]_proj",
        ("q_proj",): r".*\.q_proj",
        ("SelfAttention.q", "wo"): r".*(self_attn\.q_proj|ffn\.wo)",
        ("encoder.block.1.layer.0.SelfAttention.o",): r"encoder\.block\.1\.self_attn\.o_proj",
        r"decoder.*cross_attn.*": r"decoder.*cross_attn\.[qkvo]_proj",
    },
}


def test_targets(tiny):
    for targets, expected in TARGETS[tiny.name].items():
        ours = tiny.ours()
        paths = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear)]
        wanted = [path for path in paths if re.fullmatch(expected, path)]
        targets = list(targets) if isinstance(targets, tuple) else targets
        assert wanted and lora.inject(ours, 2, 2, targets) == wanted == list(lora.adapters(ours))


@pytest.mark.parametrize("targets", (["q_proj", "qproj"], "qproj", [], ["lm_head"], ["fc1"]))
def test_a_target_without_a_layer_is_an_error(tiny, targets):
    """fc1 is SigLIP's alone, and names mean the language model."""
    ours, unknown = tiny.ours(), targets[-1:] if isinstance(targets, list) else [targets]
    with pytest.raises(ValueError, match=r"\.self_attn\.q_proj, ") as e:
        lora.inject(ours, targets=targets)
    assert f"that can be adapted fits {unknown}. " in str(e.value)
    assert not lora.adapters(ours) and all(p.requires_grad for p in ours.parameters())


def test_twice_is_an_error(tiny, tmp_path):
    ours = tiny.ours()
    lora.inject(ours)
    lora.save(ours, tmp_path)
    for again in (lambda: lora.inject(ours), lambda: lora.load(ours, tmp_path)):
        with pytest.raises(ValueError, match="already has adapters"):
            again()


@pytest.mark.parametrize("r", (0, -1, 2.5))
def test_rank_must_be_whole(r):
    with pytest.raises(ValueError, match="rank"):
        lora.LoRALinear(nn.Linear(3, 3), r, 1)


def test_describe(paligemma):
    ours = paligemma.ours()
    total = sum(p.numel() for p in ours.parameters())
    lora.inject(ours, 3, 5, ["q_proj", "k_proj"])
    added = 2 * (3 * (24 + 32) + 3 * (24 + 16))
    assert lora.describe(ours).splitlines() == [
        "Adapters of rank 3 on 4 Linear layers:",
        "  2 x language_model.layers.{}.self_attn.q_proj",
        "  2 x language_model.layers.{}.self_attn.k_proj",
        f"{added:,} of {total + added:,} parameters train ({100 * added / (total + added):.2f} %).",
    ]


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("variant", OURS)
def test_merge_and_unmerge(tiny, variant, dtype):
    ours = tiny.ours(dtype=dtype)
    before = {n: p.clone() for n, p in ours.named_parameters()}
    lora.inject(ours, 3, 5, **OURS[variant])
    scramble(ours)
    with torch.no_grad():
        unmerged = run(ours, tiny)
        lora.merge(ours)
        merged = run(ours, tiny)
        for path, layer in lora.adapters(ours).items():
            rounded_once = (before[f"{path}.weight"].float() + layer.delta()).to(dtype)
            assert variant == "dora" or torch.equal(layer.weight, rounded_once)
            assert not torch.equal(layer.weight, before[f"{path}.weight"])
        lora.unmerge(ours)
        assert torch.equal(run(ours, tiny), unmerged)
    if dtype == torch.float32:
        close(merged, unmerged)
    else:  # the sum is rounded to bf16 once more
        assert (merged - unmerged).abs().mean() < 0.1 * unmerged.abs().mean()
    after = dict(ours.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("variant", OURS)
def test_merged_weights_are_pefts_and_save_as_a_plain_checkpoint(tiny, variant, tmp_path):
    theirs, ours = peft_file(tiny, tmp_path / "adapter", **VARIANTS[variant]), tiny.ours()
    names = lora.load(ours, tmp_path / "adapter")
    with torch.no_grad():
        adapted = run(ours, tiny)
    lora.merge(ours, remove=True)
    assert all(type(ours.get_submodule(path)) is nn.Linear for path in names)
    ours.save_pretrained(tmp_path / "merged")
    plain = type(ours).from_pretrained(tmp_path / "merged")
    expected = theirs.merge_and_unload()
    for path in names:
        close(
            plain.get_submodule(path).weight.data,
            expected.get_submodule(ours.hub_path(path)).weight.data,
            1e-6,
        )
    with torch.no_grad():
        close(run(plain, tiny), adapted)
    lora.inject(ours)  # it is a plain model again


def test_merge_state_is_checked(t5):
    ours = t5.ours()
    for change in (lora.merge, lora.unmerge):
        with pytest.raises(ValueError, match="has no adapters"):
            change(ours)
    lora.inject(ours)
    with pytest.raises(ValueError, match="not merged"):
        lora.unmerge(ours)
    lora.merge(ours)
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(ours)


def test_saving_while_merged_writes_the_same_adapter(t5, tmp_path):
    ours = t5.ours()
    lora.inject(ours, dora=True)
    lora.save(scramble(ours), tmp_path / "a")
    lora.merge(ours)
    lora.save(ours, tmp_path / "b")
    files = [(tmp_path / name / lora.WEIGHTS).read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_generation_sees_the_adapters(paligemma):
    ours = paligemma.ours()
    inputs = {k: v[:, :9] for k, v in paligemma.inputs.items() if k != "pixel_values"}
    inputs["pixel_values"] = paligemma.inputs["pixel_values"]
    base = ours.generate(**inputs, max_new_tokens=6)
    lora.inject(ours, 3, 5)
    scramble(ours)
    adapted = ours.generate(**inputs, max_new_tokens=6)
    lora.merge(ours)
    assert adapted.tolist() == ours.generate(**inputs, max_new_tokens=6).tolist() != base.tolist()


# ---- other people's files -----------------------------------------------------------------------

SPELLINGS = {
    "transformers 4": ("language_model.model.", "vision_tower.vision_model."),
    "transformers 4.53": ("model.language_model.", "model.vision_tower.vision_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_older_key_spellings(paligemma, spelling, tmp_path):
    """["q_proj"] is both towers in PEFT."""
    theirs = peft_file(paligemma, tmp_path, target_modules=["q_proj"])
    text, vision = SPELLINGS[spelling]

    def older(key):
        key = key.replace("model.model.language_model.", f"model.{text}")
        return key.replace("model.model.vision_tower.", f"model.{vision}")

    rewrite(tmp_path, lambda tensors: {older(k): t for k, t in tensors.items()})
    assert any(vision in key for key in load_file(tmp_path / lora.WEIGHTS))
    ours = paligemma.ours()
    names = lora.load(ours, tmp_path)
    assert len(names) == 4 and VISION_Q in names
    close(run(ours, paligemma), run(theirs, paligemma))


def test_a_layer_missing_from_an_old_spelling_is_seen(paligemma, tmp_path):
    peft_file(paligemma, tmp_path)
    new, old = "model.model.language_model.layers", "model.language_model.model.layers"
    rewrite(
        tmp_path,
        lambda ts: {k.replace(new, old): t for k, t in ts.items() if "1.mlp.up_proj" not in k},
        target_modules=r"language_model\.model\.layers\.\d\.mlp.*",
    )
    with pytest.raises(ValueError, match=r"2 missing: base_model\.model\.language_model\.model\."):
        lora.load(paligemma.ours(), tmp_path)


CONFIGS = {
    "patterns": {
        "rank_pattern": {r"0\..*q_proj": 5, "decoder.block.1.layer.0.SelfAttention.q": 2},
        "alpha_pattern": {"v_proj": 11, "SelfAttention.v": 11},
        "use_rslora": True,
    },
    "exclude list": {"exclude_modules": ["v_proj", "SelfAttention.v"]},
    "exclude regex": {"exclude_modules": r".*(self_attn\.q_proj|EncDecAttention.*)"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "one layer": {"layers_to_transform": 1, "target_modules": ["q_proj", "q"]},
    "layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "q"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_obeyed(tiny, config, tmp_path):
    theirs, ours = peft_file(tiny, tmp_path / "peft", **CONFIGS[config]), tiny.ours()
    if config == "all-linear":  # PEFT writes what it found
        rewrite(tmp_path / "peft", target_modules="all-linear")
    lora.load(ours, tmp_path / "peft")
    expected = run(theirs, tiny)
    close(run(ours, tiny), expected)
    lora.save(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny.theirs(), tmp_path / "ours")
    close(run(again, tiny), expected)
    if config == "patterns":
        assert len({layer.r for layer in lora.adapters(ours).values()}) > 1
        assert len({layer.alpha for layer in lora.adapters(ours).values()}) > 1


UNSUPPORTED = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [3],
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [5],
    "target_modules": None,
    "something_new": 0.5,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_settings_are_refused(t5, key, adapter):
    lora.load(t5.ours(), adapter)  # as PEFT writes it, all else in it is harmless
    rewrite(adapter, **{key: UNSUPPORTED[key]})
    match = "only peft_type 'LORA'" if key == "peft_type" else f"not supported here: {key} = "
    with pytest.raises(ValueError, match=match):
        lora.load(t5.ours(), adapter)


def drop(tensors):
    del tensors["base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_B.weight"]
    return tensors


def head(tensors):
    return tensors | {f"base_model.model.lm_head.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}


def stranger(tensors):
    return tensors | {"base_model.model.vision_tower.q_proj.lora_A.weight": torch.ones(3, 3)}


def untargeted(tensors):
    key = "base_model.model.encoder.block.0.layer.0.SelfAttention.{}.lora_A.weight"
    return tensors | {key.format("k"): tensors[key.format("q")].clone()}


def reshape(tensors):
    key = "base_model.model.decoder.block.2.layer.1.EncDecAttention.v.lora_A.weight"
    return tensors | {key: tensors[key][:2].contiguous()}


MISFITS = {
    drop: r"1 missing: base_model\S+block\.1\.layer\.0\.SelfAttention\.q\.lora_B\.weight\.$",
    head: r"2 unexpected: base_model\.model\.lm_head\.lora_A\.weight, .*lm_head\.lora_B\.weight\.$",
    stranger: r"1 unexpected: base_model\.model\.vision_tower\.q_proj\.lora_A\.weight\.$",
    untargeted: r"1 unexpected: base_model\S+block\.0\.layer\.0\.SelfAttention\.k\.lora_A\.weight",
    reshape: r"1 of another shape: \S+\.v\.lora_A\.weight: file \[2, 24\], model \[3, 24\]\.$",
}


@pytest.mark.parametrize("change", MISFITS, ids=lambda f: f.__name__)
def test_tensors_that_do_not_fit_are_named(t5, change, adapter):
    rewrite(adapter, change)
    ours = t5.ours()
    with pytest.raises(ValueError, match=MISFITS[change]):
        lora.load(ours, adapter)
    assert not lora.adapters(ours) and all(p.requires_grad for p in ours.parameters())


def test_config_and_file_must_agree(t5, adapter):
    rewrite(adapter, target_modules=["q", "v", "wi_1", "wo", "k"])
    with pytest.raises(ValueError, match=r"16 missing: .*\.k\.lora_A"):  # 2 + 3 * 2 layers
        lora.load(t5.ours(), adapter)
    rewrite(adapter, target_modules=["q", "v", "wi_1", "wo"], use_dora=True)
    with pytest.raises(ValueError, match=r"26 missing: .*lora_magnitude_vector"):
        lora.load(t5.ours(), adapter)


@pytest.mark.parametrize("name", (lora.CONFIG, lora.WEIGHTS))
def test_absent_and_torn_files(t5, name, adapter):
    path = adapter / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read .* Get it again"):
        lora.load(t5.ours(), adapter)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        lora.load(t5.ours(), adapter)


WRONG_SETTINGS = [
    ("r", "8", "wrong type"),
    ("r", True, "wrong type"),
    ("r", 10**12, "of another shape"),  # and nothing of that size is made
    ("r", -1, "of another shape"),
    ("lora_alpha", [16], "wrong type"),
    ("lora_alpha", float("nan"), "wrong type"),
    ("lora_dropout", 7, "no share"),
    ("use_dora", "no", "wrong type"),
    ("rank_pattern", [8], "wrong type"),
    ("rank_pattern", {"q": "8"}, "wrong type"),
    ("alpha_pattern", {"(": 8}, "no pattern"),
    ("target_modules", {"q": 1}, "wrong type"),
    ("target_modules", ["q", None], "wrong type"),
    ("target_modules", "(((", "no pattern"),
    ("target_modules", "(a+)+$", "more repetitions"),
    ("target_modules", ".*.*.*.*.*.*x", "more repetitions"),
    ("exclude_modules", 5, "wrong type"),
    ("layers_to_transform", "1", "wrong type"),
    ("layers_to_transform", [1, "2"], "wrong type"),
]


@pytest.mark.parametrize("key, value, sentence", WRONG_SETTINGS)
def test_wrong_settings_are_named(t5, key, value, sentence, adapter):
    rewrite(adapter, **{key: value})
    with pytest.raises(ValueError, match=sentence) as caught:
        lora.load(t5.ours(), adapter)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), 3))
def test_adapters_that_are_not_finite_are_named(t5, bad, adapter):
    key = "base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_B.weight"

    def spoil(tensors):
        tensors[key][0, 0] = bad
        return tensors | ({key: tensors[key].int()} if bad == 3 else {})

    rewrite(adapter, spoil)
    ours = t5.ours()
    with pytest.raises(ValueError, match=f"1 without finite floating-point numbers: {key}"):
        lora.load(ours, adapter)
    assert not lora.adapters(ours)


@pytest.mark.parametrize("text", (b"[" * 100_000, b"\xe9", b"[]", b"5", b""))
def test_a_config_that_is_none(t5, text, adapter):
    (adapter / lora.CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match="adapter_config.json|cannot be read"):
        lora.load(t5.ours(), adapter)


# ---- MultimodalT5 -------------------------------------------------------------------------------


def test_multimodal_t5(t5, tmp_path):
    torch.manual_seed(0)
    model = MultimodalT5(t5.ours(), GatedFusion(24, 7)).eval()
    inputs = t5.inputs | {"image_features": torch.randn(3, 4, 7)}
    model.save_pretrained(tmp_path / "base")
    again = MultimodalT5.from_pretrained(tmp_path / "base")
    names = lora.inject(model, 3, 5)
    assert len(names) == 2 * (2 + 3 * 2) and all(name.startswith("t5.") for name in names)
    assert not any(p.requires_grad for p in model.fusion.parameters())
    with torch.no_grad():
        base, adapted = again(**inputs), scramble(model)(**inputs)
        lora.save(model, tmp_path / "adapter")
        assert lora.load(again, tmp_path / "adapter") == names
        assert torch.equal(again(**inputs), adapted) and not torch.allclose(base, adapted, atol=0.1)
        theirs = PeftModel.from_pretrained(t5.theirs(), tmp_path / "adapter")  # its T5's too
        plain = t5.ours()
        lora.load(plain, tmp_path / "adapter")
        close(run(plain, t5), run(theirs, t5))
        lora.merge(model, remove=True)
        model.save_pretrained(tmp_path / "merged")
        close(MultimodalT5.from_pretrained(tmp_path / "merged")(**inputs), adapted)
