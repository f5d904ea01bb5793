"""lora.py against PEFT: outputs, gradients and files, on tiny models with large weights."""

import copy
import math
import re

import pytest
import torch
from pairs import (
    OURS,
    VARIANTS,
    close,
    make_tiny,
    peft_file,
    run,
    scramble,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora
from fusion import GatedFusion, MultimodalT5
from support.checkpoints import peft
from support.checkpoints.keys import transformers_path

# ---- tiny models --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["paligemma", "t5"])
def tiny(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    return make_tiny("paligemma", tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_tiny("t5", tmp_path_factory.mktemp("t5"))


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
            expected = grads[f"{transformers_path(type(ours), path)}.{name}"]
            assert expected.abs().max() > 1e-3
            close(p.grad / expected.abs().max(), expected / expected.abs().max())


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
            expected.get_submodule(transformers_path(type(ours), path)).weight.data,
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
    files = [(tmp_path / name / peft.WEIGHTS).read_bytes() for name in "ab"]
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
