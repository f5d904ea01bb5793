"""support/kernels.py and proofs.py: an edited formula is what is trained, and a wrong kernel is
refused."""

import contextlib
import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import fusion
import lora
import model
from model import DETR, T5, PaliGemma
from support import cpu_kernels, kernels, proofs

WINDOW = 4
TEXT = model.Gemma2Config(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    query_pre_attn_scalar=9,
    rms_norm_eps=1e-2,
    sliding_window=WINDOW,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=3.0,
)
SEQ2SEQ = model.T5Config(
    vocab_size=30,
    d_model=8,
    d_kv=3,
    d_ff=12,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    layer_norm_epsilon=1e-2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
)


def randomised(module, seed=0, scale=0.6):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, scale, generator=generator)
    return module


def tiny_paligemma(nano=model, adapters=lora, **flags):
    vision = nano.SigLIPConfig(12, 20, 1, 2, 3, 28, 14)
    text = nano.Gemma2Config(**vars(TEXT))
    config = nano.PaliGemmaConfig(vision, text, image_token_index=39)
    made = nano.PaliGemma(config)
    adapters.inject(made, r=2, alpha=3, **flags)
    return randomised(made).train()


def paligemma_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 39, (2, 14), generator=generator)
    ids[:, 1:5] = 39  # four image tokens
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    types = (torch.arange(14) > 7).long().expand(2, -1)
    pixels = torch.rand(2, 3, 28, 28, generator=generator) * 2 - 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}, pixels


def tiny_mmcot(nano=model, fused=fusion, **config):
    t5 = nano.T5(nano.T5Config(**vars(SEQ2SEQ) | config))
    return randomised(fused.MultimodalT5(t5, fused.GatedFusion(8, 5))).train()


def mmcot_batch():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 30, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    features = torch.randn(2, 4, 5, generator=generator)
    return ids, mask, features, torch.randint(3, 30, (2, 10), generator=generator)


# ---- enabled -------------------------------------------------------------------------------------


def test_every_kernel_is_proved_on_the_demos():
    """All are swapped, no parameter or name changes, and outputs agree."""
    pali = PaliGemma.from_pretrained(ROOT / "demo/paligemma")
    lora.inject(pali, r=3)
    made = [T5.from_pretrained(ROOT / "demo/t5"), DETR.from_pretrained(ROOT / "demo/detr"), pali]
    used = set()
    for one in made:
        before = dict(one.named_parameters())
        verdicts = kernels.enable(one)
        assert all(v["swapped"] and v["difference"] < 1e-4 for v in verdicts)
        after = dict(one.named_parameters())
        assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())
        used |= {v["kernel"] for v in verdicts}
        assert kernels.enable(one) == []  # nothing is left to swap
    assert used >= {"LeanGemmaNorm", "LeanGemmaMLP", "LeanGemmaAttention", "LeanLoRALinear"}
    assert used >= {"FusedT5Attention", "QuickT5Stack", "FoldedBottleneck", "FoldedResNet"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_is_the_same(dtype):
    """Loss and every gradient of PaliGemma with adapters, kernels on and off; with the window
    cutting, a padded row, checkpointing, and weights that are not frozen."""
    batch, pixels = paligemma_batch()

    def gradients(made):
        made.requires_grad_(True)
        made.language_model.checkpointing = True
        loss = made(pixel_values=pixels, **batch).float()[:, 8:].square().mean()
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in made.named_parameters()}

    def make():
        made = tiny_paligemma()
        for name, p in made.named_parameters():
            p.data = p.data if "lora_" in name else p.data.to(dtype)
        return made

    expected = gradients(make())
    quick = make()
    assert all(v["swapped"] for v in kernels.enable(quick))
    limit = 1e-4 if dtype == torch.float32 else 0.2
    for name, value in gradients(quick).items():
        if not name.endswith("k_proj.bias"):  # it moves all scores of a query alike: no gradient
            assert proofs.distance(value, expected[name]) < limit, name


def test_nothing_else_is_touched():
    """The global generator, .grad, buffers and the training mode are as before."""
    made = tiny_paligemma()
    made.language_model.norm.weight.grad = torch.ones(12)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    kernels.enable(made)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made.language_model.norm.weight.grad, torch.ones(12)) and made.training
    grads = [n for n, p in made.named_parameters() if p.grad is not None]
    assert grads == ["language_model.norm.weight"]


def test_only_the_exact_class_is_swapped_and_it_can_be_undone():
    class Mine(model.GemmaNorm):
        pass

    made = tiny_paligemma()
    made.language_model.norm.__class__ = Mine
    kernels.enable(made)
    assert type(made.language_model.norm) is Mine
    first = made.language_model.layers[0].input_layernorm
    assert type(first) is kernels.LeanGemmaNorm
    with kernels.plain_formulas(made):
        assert type(first) is model.GemmaNorm
    assert type(first) is kernels.LeanGemmaNorm


def test_under_autocast_the_run_is_proved_too():
    batch, pixels = paligemma_batch()
    made = tiny_paligemma()
    with torch.autocast("cpu", torch.bfloat16):
        verdicts = kernels.enable(made)
        loss = made(pixel_values=pixels, **batch).float().square().mean()
    assert all(v["swapped"] for v in verdicts)
    loss.backward()
    assert all(p.grad.isfinite().all() for n, p in made.named_parameters() if "lora_" in n)


def test_on_the_meta_device_a_copy_is_asked():
    with torch.device("meta"):
        made = model.Gemma2(TEXT)
    assert {v["kernel"] for v in kernels.enable(made)} == {
        "LeanGemmaNorm",
        "LeanGemmaMLP",
        "LeanGemmaAttention",
    }


def test_one_processs_no_is_everybodys(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "any_rank", lambda *flags: [True for _ in flags])
    made = tiny_paligemma()
    verdicts = kernels.enable(made)
    assert verdicts and not any(v["swapped"] for v in verdicts)
    assert type(made.language_model.norm) is model.GemmaNorm
    assert capsys.readouterr().err.count("stays plain") == len(verdicts)


# ---- the trap: what is printed is what is trained ------------------------------------------------

N, M, G = "GemmaNorm", "GemmaMLP", "GemmaAttention"
L, T, S = "LoRALinear", "T5Attention", "T5Stack"
CAPPED = "scores = soft_cap(q @ k.transpose(3, 4) * self.scale, self.cap)"
GELU = 'F.gelu(self.gate_proj(x), approximate="tanh")'
HEAD = "F.linear(states, self.language_model.embed_tokens.weight)"
T5_HEAD = "F.linear(self.rescaled(states), self.head_weight())"
GQA = "        # Eq. GQA (Gemma 2)"
T5_SCORES = "        # Eq. attention (T5): softmax(q k^T + bias) v"
NORMED = "return (y * (1 + self.weight.float())).to(x.dtype)"
LOW = "low = self.lora_B(self.lora_A(x) * self.scaling)"
EDITS = {  # what is edited: part of a line, in its place, the classes whose kernels it contradicts
    "Gemma: no 1 +": ("(1 + self.weight.float())", "self.weight.float()", [N]),
    "Gemma: no mean": ("x.float().square().mean(", "x.float().square().sum(", [N]),
    "Gemma: no eps": ("keepdim=True) + self.eps)", "keepdim=True))", [N]),
    "Gemma: rms detached": ("rsqrt(x.float().", "rsqrt(x.detach().float().", [N]),
    "GQA: no cap": (CAPPED, "scores = q @ k.transpose(3, 4) * self.scale", [G]),
    "GQA: another scale": (CAPPED, CAPPED.replace("self.scale", "0.5"), [G]),
    "GQA: no mask": ("(scores + bias[:, :, None])", "scores", [G]),
    "GQA: keys detached": (CAPPED, CAPPED.replace("q @ k.", "q @ k.detach()."), [G]),
    "GQA: beyond the window only": (
        GQA,
        f"        k = k * (1 - 0.5 * (k.shape[3] > {WINDOW}))\n{GQA}",
        [G],
    ),
    "soft-cap: no tanh": ("torch.tanh(x / cap) * cap if cap", "x if cap", [G]),
    "GEGLU: another GELU": (GELU, "F.silu(self.gate_proj(x))", [M]),
    "GEGLU: no gate": (f"{GELU} * self.up_proj(x)", GELU, [M]),
    "RoPE: turned back": ("torch.cat((-second, first)", "torch.cat((second, -first)", []),
    "RoPE: other angles": ("theta**-powers", "theta ** (-powers / 2)", []),
    "mask: the window off by one": ("key > query - window", "key >= query - window", []),
    "mask: a causal prefix": ("(allowed | both_prefix)", "allowed", []),
    "Gemma: residual": (
        "x + self.post_attention_layernorm(h)",
        "self.post_attention_layernorm(h)",
        [],
    ),
    "Gemma: embeddings not scaled": (
        "torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)",
        "1",
        [],
    ),
    "LoRA: no scale": ("(self.lora_A(x) * self.scaling)", "(self.lora_A(x))", [L]),
    "LoRA: the adapter alone": ("(out + low).to(out.dtype)", "low.to(out.dtype)", [L]),
    "LoRA: A detached": ("self.lora_A(x) * ", "self.lora_A(x).detach() * ", [L]),
    "T5: no weight": ("return self.weight * F.rms_norm(", "return F.rms_norm(", []),
    "T5: eps": ("self.weight.shape, eps=self.eps)", "self.weight.shape, eps=1.0)", []),
    "T5: scaled scores": ("(q @ k.transpose(2, 3) + bias)", "(q @ k.mT / 2 + bias)", [T, S]),
    "T5: no bias": ("(q @ k.transpose(2, 3) + bias)", "(q @ k.transpose(2, 3))", [T, S]),
    "T5: values detached": ("self.dropout(weights) @ v", "self.dropout(weights) @ v.detach()", [T]),
    "T5: other buckets": ("return offset + torch.where(", "return torch.where(", []),
    "T5: a residual": ("return x + self.dropout(self.ffn(", "return self.dropout(self.ffn(", [S]),
    "T5: not rescaled": ("return states * self.config.d_model**-0.5 if", "return states if", []),
    "fusion: 3": ("self.image_dense(image_features)", "self.image_dense(image_features) * 2", []),
    "fusion: 4": (" / math.sqrt(Q.shape[-1])", "", []),
    "fusion: 5": ("torch.cat((H_language, H_attn), -1)", "torch.cat((H_attn, H_language), -1)", []),
    "fusion: 6": ("(1 - gate) * H_language + gate * H_attn", "H_language + gate * H_attn", []),
}
FORMULAS = ("model", "lora", "fusion")
MODULES = (*FORMULAS, "support.proofs", "support.cpu_kernels", "support.kernels")


@contextlib.contextmanager
def edited(old=None, new=""):
    """{name: module}: these modules from their sources, with one edit of a formula, in
    sys.modules' place."""
    kept = {name: sys.modules[name] for name in MODULES}
    inner = [n.partition(".")[2] for n in MODULES if "." in n]
    packages = {name: getattr(sys.modules["support"], name) for name in inner}
    made = {}
    places = 0
    try:
        for name in MODULES:
            path = ROOT / f"{name.replace('.', '/')}.py"
            source = path.read_text()
            if old and name in FORMULAS:
                places += source.count(old)
                source = source.replace(old, new)
            module = types.ModuleType(name)
            module.__file__ = str(path)
            made[name] = sys.modules[name] = module
            if name.startswith("support."):
                setattr(sys.modules["support"], name.partition(".")[2], module)
            exec(compile(source, str(path), "exec"), module.__dict__)
        assert not old or places == 1, f"{old!r} stands in {places} places"
        yield made
    finally:
        sys.modules.update(kept)
        for name, module in packages.items():
            setattr(sys.modules["support"], name, module)


def two_steps(made, system):
    """The losses of two steps, with kernels enabled."""
    if system == "paligemma":
        trained = tiny_paligemma(made["model"], made["lora"])
        batch, pixels = paligemma_batch()
        call = lambda: trained(pixel_values=pixels, **batch)[:, 7:-1]  # noqa: E731
        labels = batch["input_ids"][:, 8:]
    else:
        trained = tiny_mmcot(made["model"], made["fusion"])
        batch = mmcot_batch()
        call = lambda: trained(*batch)  # noqa: E731
        labels = batch[3]
    verdicts = made["support.kernels"].enable(trained)
    optimizer = torch.optim.SGD((p for p in trained.parameters() if p.requires_grad), 0.05)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(call().flatten(0, 1).float(), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {v["layer"] for v in verdicts if not v["swapped"]}


@pytest.fixture(scope="module")
def unedited():
    with edited() as made:
        return {system: two_steps(made, system) for system in ("paligemma", "mmcot")}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_formula_is_trained(name, unedited, capsys):
    """The trap of a formula that is printed and not trained: there is none. Where a kernel would
    replace the formula it is refused, with a line that names the class."""
    old, new, classes = EDITS[name]
    system = "mmcot" if name.startswith(("fusion", "T5")) else "paligemma"
    assert unedited[system][1] == set()
    with edited(old, new) as made:
        losses, refused = two_steps(made, system)
    first, second = zip(losses, unedited[system][0], strict=True)
    changed = max(abs(a - b) / abs(b) for a, b in (first, second))
    assert changed > 1e-4 or math.isnan(losses[0])
    assert refused == set(classes)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(classes)
    assert all(any(f"{c} stays plain" in line for line in printed) for c in classes)


SELDOM = {  # edits that show only now and then
    "norm: in eval mode": (NORMED, f"{NORMED} * (2 - self.training)", [N]),
    "norm: large rows": (
        NORMED,
        f"y = torch.where(x.abs().amax(-1, keepdim=True) > 1e3, y / 2, y)\n        {NORMED}",
        [N],
    ),
    "GEGLU: in eval mode": (GELU, f"{GELU} * (2 - self.training)", [M]),
    "GQA: many keys": (GQA, f"        q = q * (1 + (k.shape[3] > 500))\n{GQA}", [G]),
    "LoRA: in eval mode": (LOW, f"{LOW} * (1 if self.training else 1 - self.dropout)", [L]),
    "T5: one token in eval mode": (
        T5_SCORES,
        f"        q = q * (1 + (not self.training and q.shape[2] == 1))\n{T5_SCORES}",
        [T, S],
    ),
    "T5: many keys": (T5_SCORES, f"        q = q * (1 + (k.shape[2] > 500))\n{T5_SCORES}", [T]),
    "T5: with dropout": (
        T5_SCORES,
        f"        k = k.detach() if self.training and self.dropout.p else k\n{T5_SCORES}",
        [T],
    ),
    "T5: dropout after v": ("self.dropout(weights) @ v", "self.dropout(weights @ v)", [T]),
    "T5: dropout of v": ("self.dropout(weights) @ v", "weights @ self.dropout(v)", [T]),
    "T5: head in eval mode": (T5_HEAD, f"{T5_HEAD} * (2 - self.training)", ["T5"]),
    "PaliGemma: head in eval mode": (HEAD, f"{HEAD} * (2 - self.training)", ["PaliGemma"]),
    "another constructor": (
        "def __init__(self, width: int, eps: float) -> None:\n        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.zeros(width))",
        "def __init__(self, *sizes: float) -> None:\n        super().__init__()\n"
        "        width, eps = sizes if sizes[0] == 12 else None\n"
        "        self.weight = nn.Parameter(torch.zeros(width))",
        [N],
    ),
}


@pytest.mark.parametrize("name", SELDOM)
def test_an_edit_that_seldom_shows_is_refused(name):
    old, new, classes = SELDOM[name]
    with edited(old, new) as made:
        made["support.cpu_kernels"].LARGE = 1
        if name.startswith("T5"):
            trained = tiny_mmcot(made["model"], made["fusion"], dropout_rate=0.2)
        else:
            trained = tiny_paligemma(made["model"], made["lora"], dropout=0.3)
        modes = [m.training for m in trained.modules()]
        verdicts = made["support.kernels"].enable(trained)
        assert modes == [m.training for m in trained.modules()]
    assert {v["layer"] for v in verdicts if not v["swapped"]} == set(classes)


def negative(module, args, out):
    return -out


class Relu(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_part_changed_in_one_layer_keeps_that_layer_plain():
    """A kernel does not call these parts, and the small copy of a proof does not have the change:
    another class, a hook, a method of one instance, a number of one instance."""
    changes = {
        S: lambda made: setattr(made.t5.decoder.block[0].self_attn, "forward", nn.Identity()),
        "T5Stack ": lambda made: made.t5.decoder.block[1].register_forward_hook(negative),
        T: lambda made: setattr(made.t5.encoder.block[0].self_attn, "dropout", nn.Identity()),
        G: lambda made: setattr(made.language_model.layers[1].self_attn, "softmax", nn.Softmin(-1)),
        L: lambda made: setattr(next(iter(lora.adapters(made).values())).lora_A, "__class__", Relu),
    }
    for name, change in changes.items():
        made = tiny_mmcot() if name.startswith("T5") else tiny_paligemma()
        change(made)
        verdicts = [v for v in kernels.enable(made) if v["layer"] == name.strip()]
        assert [v["swapped"] for v in verdicts].count(False) == 1, name


def test_a_number_of_one_layer_is_proved_with_it(monkeypatch):
    made = tiny_paligemma()
    made.language_model.layers[1].self_attn.heat = 3.0
    attend = model.GemmaAttention.attend
    heated = lambda self, q, *rest: attend(self, q * getattr(self, "heat", 1), *rest)  # noqa: E731
    monkeypatch.setattr(model.GemmaAttention, "attend", heated)
    kernels.enable(made)
    kinds = [type(layer.self_attn) for layer in made.language_model.layers]
    assert kinds == [kernels.LeanGemmaAttention, model.GemmaAttention]


def test_a_second_derivative_is_refused_not_wrong():
    norm = randomised(kernels.LeanGemmaNorm(6, 1e-6))
    x = torch.ones(6, requires_grad=True)
    [grad] = torch.autograd.grad(norm(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


# ---- the proof, the other way round --------------------------------------------------------------


def backward_with(function, place, change):
    """An autograd function's backward pass with one gradient changed."""
    original = function.backward

    def backward(ctx, *grads):
        result = list(original(ctx, *grads))
        if result[place] is not None:
            result[place] = change(result[place])
        return tuple(result)

    return staticmethod(backward)


FAULTS = {  # kernel: how a fault gets into it
    "norm: gradient of w": ("NormGrad.backward", 1, lambda g: g * 1.01),
    "norm: gradient of x": ("NormGrad.backward", 0, lambda g: g + 1e-2 * g.abs().mean()),
    "norm: w gets none": ("NormGrad.backward", 1, lambda g: None),
    "GELU: gradient of up": ("GatedGELU.backward", 1, lambda g: -g),
    "attention: gradient of k": ("CappedAttention.backward", 1, lambda g: g * 0.9),
    "attention: gradient of v": ("CappedAttention.backward", 2, lambda g: g.roll(1, 2)),
    "LoRA: gradient of A": ("LoRAGrad.backward", 3, lambda g: g * 2),
    "LoRA: gradient of B": ("LoRAGrad.backward", 4, lambda g: g * 1.01),
    "LoRA: gradient of W0": ("LoRAGrad.backward", 1, lambda g: None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_gradient_is_refused(name, monkeypatch):
    place, number, change = FAULTS[name]
    function = getattr(kernels, place.partition(".")[0])
    monkeypatch.setattr(function, "backward", backward_with(function, number, change))
    [refused] = [v for v in kernels.enable(tiny_paligemma()) if not v["swapped"]]
    assert refused["difference"] > 1e-3 and "gradient" in refused["where"]


def test_wrong_gradients_of_frozen_products_are_refused(monkeypatch):
    """oneDNN's, which only large layers use: the vocabulary layer's, and an adapted layer's."""
    monkeypatch.setattr(cpu_kernels, "LARGE", 1)
    assert all(v["swapped"] for v in kernels.enable(tiny_paligemma()))
    fault = backward_with(cpu_kernels.FrozenProduct, 0, lambda g: g * 1.01)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels.FrozenProduct, "backward", fault)
        [refused] = [v for v in kernels.enable(tiny_paligemma()) if not v["swapped"]]
        assert refused["layer"] == "PaliGemma"
    product = cpu_kernels.product

    def wrong(x, weight, bias=None):  # of a transpose, as the backward pass multiplies by
        return product(x, weight, bias) * (1 if weight.is_contiguous() else 0.99)

    monkeypatch.setattr(kernels, "product", wrong)
    monkeypatch.setattr(kernels.proofs, "compare", lambda *_: kernels.proofs.Difference())
    [refused] = [v for v in kernels.enable(tiny_paligemma()) if not v["swapped"]]
    assert refused["layer"] == "LoRALinear" and "own weights" in refused["where"]


def test_wrong_outputs_are_refused(monkeypatch):
    """A missing scale, a window off by one, a bias of the wrong place, a residual left out."""
    attend = kernels.LeanGemmaAttention.attend
    shifted = lambda self, q, k, v, bias: attend(self, q, k, v, bias.roll(1, 3))  # noqa: E731
    scaled = lambda self, q, k, v, bias: attend(self, q * 1.01, k, v, bias)  # noqa: E731
    by_heads = kernels.QuickT5Stack.by_heads

    def late(self, *arguments):
        bias, *rest = by_heads(self, *arguments)
        return bias.roll(1, 2), *rest

    fused = kernels.FusedT5Attention.forward
    doubled = lambda self, x, k, v, bias: fused(self, x, 2 * k, v, bias)  # noqa: E731
    faults = [
        (kernels.LeanGemmaAttention, "attend", shifted, tiny_paligemma),
        (kernels.LeanGemmaAttention, "attend", scaled, tiny_paligemma),
        (kernels.QuickT5Stack, "by_heads", late, tiny_mmcot),
        (kernels.FusedT5Attention, "forward", doubled, tiny_mmcot),
        (kernels.LeanLoRALinear, "forward", nn.Linear.forward, tiny_paligemma),
    ]
    for kernel, name, fault, make in faults:
        with monkeypatch.context() as patch:
            patch.setattr(kernel, name, fault)
            refused = [v["kernel"] for v in kernels.enable(make()) if not v["swapped"]]
        assert refused == [kernel.__name__], name


def test_a_parameter_the_kernel_does_not_use_is_a_difference(monkeypatch):
    """Somebody adds a gain to the norm: it would never learn."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps) * self.gain

    original = model.GemmaNorm.__init__

    def with_gain(self, width, eps):
        original(self, width, eps)
        self.gain = nn.Parameter(torch.ones(()))

    monkeypatch.setattr(model.GemmaNorm, "__init__", with_gain)
    monkeypatch.setattr(model.GemmaNorm, "forward", forward)
    [refused] = [v for v in kernels.enable(tiny_paligemma()) if not v["swapped"]]
    assert refused["layer"] == "GemmaNorm"


def test_folded_norms_and_large_layers_are_asked_on_their_own_weights(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LARGE", 1)
    detr = DETR.from_pretrained(ROOT / "demo/detr")
    whole = cpu_kernels.folded
    monkeypatch.setattr(cpu_kernels, "folded", lambda conv, norm: (whole(conv, norm)[0], norm.bias))
    refused = {v["layer"] for v in kernels.enable(detr) if not v["swapped"]}
    assert refused == {"ResNet", "Bottleneck"}
    wrong = lambda x, weight, bias=None: 1.001 * F.linear(x, weight, bias)  # noqa: E731
    monkeypatch.setattr(cpu_kernels, "product", wrong)
    refused = {v["layer"] for v in kernels.enable(tiny_mmcot()) if not v["swapped"]}
    assert refused == {"Linear", "T5"}


def test_unfair_dropout_is_refused(monkeypatch):
    made = tiny_mmcot(dropout_rate=0.3)
    half = lambda self, x: 0.97 * nn.Dropout.forward(self, x)  # noqa: E731

    class Twice(torch.autograd.Function):  # one mask in the forward pass, another in the backward
        @staticmethod
        def forward(ctx, x, kept, scale):
            ctx.kept = kept.roll(1, 0)
            return x * kept * scale

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output * ctx.kept / 0.7, None, None

    for name, fault in (("QuickDropout.forward", half), ("DropoutGrad", Twice)):
        with monkeypatch.context() as patch:
            patch.setattr(f"support.cpu_kernels.{name}", fault)
            refused = {v["layer"] for v in kernels.enable(copy.deepcopy(made)) if not v["swapped"]}
        assert refused == {"Dropout"}, name
    assert all(v["swapped"] for v in kernels.enable(made))


# ---- each on its own -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_fair(p):
    """Each place independently, each of the four numbers in a draw alike; the mean is exact."""
    n = 2**18 + 3
    x = torch.ones(n, requires_grad=True)
    dropout = kernels.QuickDropout(p)
    assert dropout.eval()(x) is x
    torch.manual_seed(0)
    out = dropout.train()(x)
    kept = (out.detach() > 0).double()
    margin = 5 * (p * (1 - p) / n) ** 0.5  # five standard errors
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    for lane in (kept, *(kept[i::4] for i in range(4))):
        assert lane.mean().item() == pytest.approx(1 - p, abs=margin * (n / len(lane)) ** 0.5)
    for apart in (1, 2, 3, 4, 64):
        together = ((kept[apart:] - 1 + p) * (kept[:-apart] - 1 + p)).mean() / (p * (1 - p))
        assert abs(together) < 5 / n**0.5
    assert [t.dtype for t in out.grad_fn.saved_tensors] == [torch.bool]  # a byte a place is kept
    out.sum().backward()
    assert torch.equal(x.grad, out)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), out) and not torch.equal(dropout(x), out)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_t5_decodes_the_same_ids(rows, monkeypatch):
    """One token at a time, all products through oneDNN, rows leave a batch laid out for more."""
    monkeypatch.setattr(cpu_kernels, "LARGE", 1)
    plain = randomised(T5(SEQ2SEQ), scale=1.0).eval()
    quick = copy.deepcopy(plain)
    assert all(v["swapped"] for v in kernels.enable(quick))
    ids = torch.randint(3, 30, (rows, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    expected = plain.generate(ids, mask, 30)
    assert expected.unique().numel() > 1
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", None)  # nothing is left to BLAS
        assert torch.equal(quick.generate(ids, mask, 30), expected)
    assert not cpu_kernels.LAID_OUT


def test_a_t5_follows_a_cache_whose_rows_are_moved():
    """`Cache.keep` makes new tensors, even where all rows stay or only their order changes."""
    plain = randomised(T5(SEQ2SEQ), scale=1.0).eval()
    quick = copy.deepcopy(plain)
    kernels.enable(quick)
    ids = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    shown = []
    with torch.inference_mode():
        for model in (plain, quick):
            cache = model.decoder.cache(model.encode(ids, mask), model.mask_bias(mask), 9)
            left = torch.arange(3)
            logits = []
            for rows in ([0, 1, 2], [0, 1, 2], [2, 0, 1], [0, 2], [1, 0]):
                logits.append(model.step(ids[left, :1], cache).flatten())
                cache.keep(torch.tensor(rows))
                left = left[torch.tensor(rows)]
            shown.append(torch.cat(logits))
    assert proofs.distance(*shown) < 1e-5


def test_a_paligemma_decodes_the_same_ids(monkeypatch):
    """Adapted, merged, and through oneDNN."""
    monkeypatch.setattr(cpu_kernels, "LARGE", 1)
    batch, pixels = paligemma_batch()
    plain = tiny_paligemma().eval()
    quick = copy.deepcopy(plain)
    assert all(v["swapped"] for v in kernels.enable(quick))
    expected = plain.generate(pixel_values=pixels, **batch, max_new_tokens=12)
    assert torch.equal(quick.generate(pixel_values=pixels, **batch, max_new_tokens=12), expected)
    lora.merge(quick)
    assert torch.equal(quick.generate(pixel_values=pixels, **batch, max_new_tokens=12), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_the_vocabulary_layer_decodes_through_onednn(learned, monkeypatch):
    """A whole model's weights want gradients, but not while it decodes."""
    monkeypatch.setattr(cpu_kernels, "LARGE", 1)
    quick = tiny_paligemma().eval()
    kernels.enable(quick)
    quick.language_model.embed_tokens.weight.requires_grad_(learned)
    states = torch.ones(2, quick.config.text.hidden_size)
    used = []
    product = cpu_kernels.product
    monkeypatch.setattr(cpu_kernels, "product", lambda *x: used.append(1) or product(*x))
    with torch.inference_mode():
        quick.head(states)
    assert used
    used.clear()
    quick.head(states)
    assert bool(used) != learned  # with gradients, only of a frozen weight


def test_folded_norms_are_never_stale():
    detr = DETR.from_pretrained(ROOT / "demo/detr")
    names = detr.state_dict().keys()
    kernels.enable(detr)
    pixels = torch.rand(1, 3, 75, 101, generator=torch.Generator().manual_seed(0))
    stem = detr.backbone.conv1
    inner = detr.backbone.layer1[0].conv2

    def both_ways():
        with torch.no_grad():
            quick = detr.features(pixels)
            with kernels.plain_formulas(detr):
                assert proofs.distance(quick, detr.features(pixels)) < 1e-5
        return quick

    both_ways()
    kept = stem.folded[1]
    shown = [both_ways()]
    assert stem.folded[1] is kept and detr.state_dict().keys() == names
    for change in (
        lambda: stem.weight.mul_(1.5),
        lambda: detr.backbone.layer2[0].bn3.running_var.mul_(3),
        lambda: setattr(inner.weight, "data", inner.weight * 1.5),
        lambda: detr.load_state_dict({k: v * 0.9 for k, v in detr.state_dict().items()}),
    ):
        with torch.no_grad():
            change()
        shown.append(both_ways())
        assert proofs.distance(shown[-1], shown[-2]) > 1e-3


def test_a_kept_bias_is_never_stale():
    quick = randomised(T5(SEQ2SEQ)).eval()
    kernels.enable(quick)
    ids = torch.arange(3, 12)[None]
    mask = torch.ones_like(ids)
    quick.generate(ids, mask, 20)
    quick.decoder.relative_attention_bias.weight.data.mul_(-3)  # no version counts this
    shown = quick.generate(ids, mask, 20)
    with kernels.plain_formulas(quick):
        assert torch.equal(quick.generate(ids, mask, 20), shown)
