"""Published formulas stand in the code under a tag each, `# Eq. 5 (Multimodal-CoT)`.

A tag is a comment on a line of its own: "Eq.", the number or name of the formula, its source in
parentheses, and behind a colon perhaps the formula; the statement below it is that formula.
Comments say "Eq." in no other way; docstrings may cite equations as they like.

TAGS is the list. For each tag it names the function that has it and the test of the formula: one
below, which computes it independently on random numbers, or one of another file.
"""

import ast
import cmath
import io
import math
import re
import tokenize

import pytest
import torch
from conftest import ROOT
from torch import nn

import lora
import model
from fusion import GatedFusion, MultimodalT5

TAGS = {
    "1 (Multimodal-CoT)": ("MultimodalT5.forward", "test_factors_of_the_text"),
    "2 (Multimodal-CoT)": ("MultimodalT5.encode", "test_logits_equal_the_released_computation"),
    "3 (Multimodal-CoT)": ("GatedFusion.explain", "test_fusion_equals_the_equations_written_out"),
    "4 (Multimodal-CoT)": (
        "SingleHeadAttention.forward",
        "test_fusion_equals_the_equations_written_out",
    ),
    "5 (Multimodal-CoT)": ("GatedFusion.explain", "test_fusion_equals_the_equations_written_out"),
    "6 (Multimodal-CoT)": ("GatedFusion.explain", "test_fusion_equals_the_equations_written_out"),
    "3 (LoRA)": ("LoRALinear.forward", "test_adapters"),
    "5 (DoRA)": ("LoRALinear.forward", "test_adapters"),
    "scaling (rsLoRA)": ("LoRALinear.__init__", "test_adapters"),
    "RMSNorm (T5)": ("T5Norm.forward", "test_norms"),
    "attention (T5)": ("T5Attention.forward", "test_attention"),
    "GEGLU (T5)": ("T5FeedForward.forward", "test_geglu"),
    "relative buckets (T5)": ("relative_bucket", "test_relative_buckets_equal_the_reference"),
    "sine positions (DETR)": ("sine_positions", "test_sine_positions"),
    "attention (DETR)": ("DETRAttention.forward", "test_attention"),
    "attention (SigLIP)": ("SigLIPAttention.forward", "test_attention"),
    "positions (SigLIP)": ("SigLIP.forward", "test_siglip_positions"),
    "attention (ViT)": ("ViTAttention.forward", "test_vit_equals_timm"),
    "positions (ViT)": ("ViT.features", "test_vit_equals_timm"),
    "RMSNorm (Gemma)": ("GemmaNorm.forward", "test_norms"),
    "angles (RoPE)": ("rotary_angles", "test_rotary_positions"),
    "rotation (RoPE)": ("rotate", "test_rotary_positions"),
    "soft-cap (Gemma 2)": ("soft_cap", "test_soft_cap"),
    "GQA (Gemma 2)": ("GemmaAttention.attend", "test_grouped_query_attention"),
    "GEGLU (Gemma)": ("GemmaMLP.forward", "test_geglu"),
    "cross-entropy (training)": (
        "cross_entropy.chunk_loss",
        "test_the_loss_is_the_plain_cross_entropy_of_the_logits",
    ),
    "BLEU (Papineni et al. 2002)": ("bleu", "test_scores_equal_the_packages_on_small_alphabets"),
    "ROUGE-L (Lin 2004)": ("rouge_l", "test_scores_equal_the_packages_on_small_alphabets"),
    "interval (Wilson 1927)": ("wilson", "test_wilson_against_published_values"),
    "bootstrap (Efron 1979)": ("compare", "test_the_interval_is_that_of_resampled_problems"),
    "exact test (McNemar 1947)": ("mcnemar", "test_mcnemar"),
    "kappa (Cohen 1960)": ("agreement", "test_kappa"),
}
HOME = {"Multimodal-CoT": "fusion.py", "LoRA": "lora.py", "DoRA": "lora.py", "rsLoRA": "lora.py"}
HOME |= dict.fromkeys(("T5", "DETR", "SigLIP", "ViT", "Gemma", "Gemma 2", "RoPE"), "model.py")
TAG = re.compile(r"# Eq\. (.+? \(.+?\))(?:: \S.*)?")


def found(source):
    """(tag, what it stands in, what is wrong with it or None) of a file's comments with "Eq."."""
    tree, lines = ast.parse(source), source.splitlines()
    statements = {}
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for n in ast.walk(function):  # outer functions first, so that the innermost stays
            if isinstance(n, ast.stmt) and n is not function:
                statements[n.lineno] = (function, n)
    names = dict(qualified(tree))
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT and "Eq." in t.string:
            line = t.start[0]
            tag, alone = TAG.fullmatch(t.string), lines[line - 1].lstrip().startswith("#")
            while line < len(lines) and lines[line].lstrip().startswith("#"):
                line += 1
            function, below = statements.get(line + 1, (None, None))
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            wrong = "no tag on a line of its own" if not tag or not alone else None
            wrong = wrong or ("no code of a function below it" if not below or text else None)
            yield tag[1] if tag else t.string, names.get(function), wrong


def qualified(node, before=""):
    for child in ast.iter_child_nodes(node):
        name = before
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            name = f"{before}.{child.name}".strip(".")
            yield child, name
        yield from qualified(child, name)


def test_each_formula_has_one_tag_and_each_tag_a_formula():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py")]
    assert len(files) >= 8
    all_tags = [(path, *told) for path in files for told in found(path.read_text("utf-8"))]
    assert not [(path.name, tag, wrong) for path, tag, _, wrong in all_tags if wrong]
    assert sorted(tag for _, tag, *_ in all_tags) == sorted(TAGS)  # each on the list, and once
    for path, tag, function, _ in all_tags:
        assert function == TAGS[tag][0], tag
        assert path.name == HOME.get(tag.partition("(")[2].rstrip(")"), path.name), tag


def test_each_formula_has_a_test():
    texts = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.M)}
    assert {test for _, test in TAGS.values()} <= there


def test_what_a_tag_is():
    source = '''class A:
    def f(self):
        """# Eq. 1 (X)"""
        # Eq. 2 (X): y = (a) b
        # and a word more
        y = 1
        z = 2  # Eq. 3 (X)
        # as in Eq. 3
        # Eq. 4 (X)
        "text"
        def g():
            # Eq. 5 (X)
            return y
# Eq. 6 (X)
z = 3
'''
    alone, code = "no tag on a line of its own", "no code of a function below it"
    assert list(found(source)) == [
        ("2 (X)", "A.f", None),
        ("3 (X)", "A.f", alone),
        ("# as in Eq. 3", "A.f", alone),
        ("4 (X)", "A.f", code),
        ("5 (X)", "A.f.g", None),
        ("6 (X)", None, code),
    ]


# ---- the formulas, a number at a time, in Python's floats ----------------------------------------


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(ours, exact, atol=1e-5):
    exact = torch.tensor(exact, dtype=torch.float64) if isinstance(exact, list) else exact.double()
    assert ours.shape == exact.shape and exact.std() > 0.01
    torch.testing.assert_close(ours.detach().double(), exact, atol=atol, rtol=1e-4)


def attended(q, k, v, score):
    """sum of softmax(score(q, k, s, t)) v: q (T, H), k and v (S, H)."""
    made = []
    for t, one in enumerate(q.tolist()):
        scores = [score(sum(a * b for a, b in zip(one, other, strict=True)), t, s)
                  for s, other in enumerate(k.tolist())]  # fmt: skip
        weights = [math.exp(x) for x in scores]
        columns = zip(*v.tolist(), strict=True)
        made.append([sum(w * x for w, x in zip(weights, c, strict=True)) for c in columns])
        made[-1] = [x / sum(weights) for x in made[-1]]
    return torch.tensor(made, dtype=torch.float64)


def heads(linear, x, width):
    """(T, D) -> [(T, width)] of each head."""
    return (x @ linear.weight.T + (0 if linear.bias is None else linear.bias)).split(width, -1)


def test_factors_of_the_text():
    """p(Y | X) = prod p(Y_i | X, Y_<i): a factor needs nothing behind it, and Y_i itself is not
    read. Against the text said one token more at a time."""
    config = model.T5Config(40, 16, 4, 24, 1, None, 4)
    net = MultimodalT5(model.T5(config), GatedFusion(16, 6)).eval()
    net.t5.init_weights()
    ids, picture, text = torch.randint(2, 40, (1, 7)), torch.randn(1, 3, 6), [5, 9, 30, 1]
    given = ids, torch.ones(1, 7), picture
    logits = net(*given, torch.tensor([[0, *text[:-1]]]))
    whole = sum(logits[0, i].log_softmax(-1)[y] for i, y in enumerate(text)).item()
    factors = []
    for i, y in enumerate(text):
        weights = net(*given, torch.tensor([[0, *text[:i]]]))[0, -1].double().exp()
        factors.append((weights[y] / weights.sum()).item())
    assert math.exp(whole) == pytest.approx(math.prod(factors), rel=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(dora):
    layer = lora.LoRALinear(nn.Linear(5, 3), 2, 7, rslora=True, dora=dora)
    for p in layer.parameters():
        p.data.normal_()
    x, W0 = torch.randn(4, 5), layer.weight.double()
    W = W0 + 7 / math.sqrt(2) * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    if dora:
        norms = [math.sqrt(sum(w * w for w in row)) for row in W.tolist()]
        W = torch.stack(
            [m * row / n for m, row, n in zip(layer.lora_magnitude_vector, W, norms, strict=True)]
        )
    exact = x.double() @ W.T + layer.bias.double()
    close(layer(x), exact, 1e-4)


@pytest.mark.parametrize("kind, offset", [(model.T5Norm, 0), (model.GemmaNorm, 1)])
def test_norms(kind, offset):
    norm, x = kind(6, 0.3), torch.randn(4, 6)
    w = norm.weight.data.normal_().tolist()
    roots = [math.sqrt(sum(a * a for a in row) / 6 + 0.3) for row in x.tolist()]
    exact = [
        [(offset + b) * a / root for a, b in zip(row, w, strict=True)]
        for row, root in zip(x.tolist(), roots, strict=True)
    ]
    close(norm(x), exact)


def test_geglu():
    """GELU in the tanh form that both use, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    t5 = model.T5FeedForward(
        model.T5Config(d_model=4, d_ff=6, feed_forward_proj="gated-gelu")
    ).eval()
    gemma = model.GemmaMLP(model.Gemma2Config(hidden_size=4, intermediate_size=6))
    for net, gate, up, down in (
        (t5, t5.wi_0, t5.wi_1, t5.wo),
        (gemma, gemma.gate_proj, gemma.up_proj, gemma.down_proj),
    ):
        x = 3 * torch.randn(5, 4)
        g, u = gate(x).double(), up(x).double()
        gelu = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        close(net(x), gelu * u @ down.weight.double().T)


T5_BIAS = torch.arange(32.0).view(1, 2, 4, 4).sin()
SEEN = torch.tensor([1, 1, 0, 1, 1]).bool()  # no pads
ATTENTIONS = {  # layer, tokens, the call, the score of one number, query, key and head
    "t5": (
        lambda: model.T5Attention(model.T5Config(d_model=10, d_kv=3, num_heads=2)).eval(),
        4,
        lambda net, q, k, v: net(q, *net.keys_values(q), T5_BIAS),
        lambda a, t, s, n: a + T5_BIAS[0, n, t, s].item(),
    ),
    "detr": (
        lambda: model.DETRAttention(8, 2),
        5,
        lambda net, q, k, v: net(q, k, v, SEEN[None, None, None]),
        lambda a, t, s, n: a / 2 if SEEN[s] else -math.inf,
    ),
    "siglip": (
        lambda: model.SigLIPAttention(model.SigLIPConfig(hidden_size=8, num_attention_heads=2)),
        5,
        lambda net, q, k, v: net(q),
        lambda a, t, s, n: a / 2,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention(kind):
    """Of two heads; only DETR's has keys and values that are no queries."""
    make, length, call, score = ATTENTIONS[kind]
    net = make()
    query, key, value = torch.randn(3, 1, length, net.q_proj.in_features)
    if kind != "detr":
        key = value = query
    width = net.q_proj.out_features // 2
    parts = ((net.q_proj, query), (net.k_proj, key), (net.v_proj, value))
    q, k, v = (heads(projection, x[0], width) for projection, x in parts)
    kept = [attended(q[n], k[n], v[n], lambda a, t, s, n=n: score(a, t, s, n)) for n in range(2)]
    last = net.out_proj if kind == "siglip" else net.o_proj
    exact = torch.cat(kept, -1) @ last.weight.double().T
    close(call(net, query, key, value)[0], exact + (0 if last.bias is None else last.bias))


@torch.no_grad()
def test_siglip_positions():
    """Without layers and norm a state is its patch's pixels times the kernel, and its vector."""
    config = model.SigLIPConfig(6, 8, 0, 1, image_size=6, patch_size=2)
    net, pixels = model.SigLIP(config), torch.randn(1, 3, 6, 6)
    net.post_layernorm = nn.Identity()
    kernel, bias = net.embeddings.patch_embedding.weight, net.embeddings.patch_embedding.bias
    exact = []
    for i in range(9):
        y, x = 2 * (i // 3), 2 * (i % 3)
        seen = (kernel * pixels[0, :, y : y + 2, x : x + 2]).sum((1, 2, 3)) + bias
        exact.append((seen + net.embeddings.position_embedding.weight[i]).tolist())
    close(net(pixels)[0], exact)


def test_sine_positions():
    """One place and channel after the other; the second picture is 2 x 3 of 3 x 4."""
    mask = torch.ones(2, 3, 4)
    mask[1, 2:], mask[1, :, 3:] = 0, 0
    ours = model.sine_positions(mask.bool(), 8).unflatten(1, (3, 4))
    for b, height, width in ((0, 3, 4), (1, 2, 3)):
        for y in range(height):
            for x in range(width):
                exact = []
                for place, size in ((y + 1, height), (x + 1, width)):
                    for i in range(2):  # D/2 = 4 channels an axis: two pairs
                        angle = 2 * math.pi * place / size / 10000 ** (2 * i / 4)
                        exact += [math.sin(angle), math.cos(angle)]
                close(ours[b, y, x], exact, 1e-4)


def test_rotary_positions():
    """Channel i and channel i + H/2 are a complex number, turned by position * theta^(-2i/H)."""
    x, positions = torch.randn(1, 1, 5, 6), torch.tensor([[0, 1, 2, 7, 90]])
    ours = model.rotate(x, *model.rotary_angles(positions, 6, 50.0, torch.float32))
    exact = torch.zeros(5, 6, dtype=torch.float64)
    for t, position in enumerate(positions[0].tolist()):
        for i in range(3):
            z = complex(x[0, 0, t, i].item(), x[0, 0, t, i + 3].item())
            z *= cmath.exp(1j * position * 50.0 ** (-2 * i / 6))
            exact[t, i], exact[t, i + 3] = z.real, z.imag
    close(ours[0, 0], exact)


def test_soft_cap():
    x = 40 * torch.randn(30)
    close(model.soft_cap(x, 7.0), [7 * math.tanh(a / 7) for a in x.tolist()])
    assert model.soft_cap(x, None) is x


@pytest.mark.parametrize("cap", [None, 2.0])
def test_grouped_query_attention(cap):
    """Query head n reads key-value head n // G."""
    config = model.Gemma2Config(
        hidden_size=5, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
        query_pre_attn_scalar=3, attn_logit_softcapping=cap,
    )  # fmt: skip
    net, x = model.GemmaAttention(config), 2 * torch.randn(1, 4, 5)
    bias = torch.randn(1, 1, 4, 4)
    still = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)  # turned by no angle
    q, k, v = (heads(p, x[0].detach(), 4) for p in (net.q_proj, net.k_proj, net.v_proj))

    def score(a, t, s):
        a /= math.sqrt(3)
        return (cap * math.tanh(a / cap) if cap else a) + bias[0, 0, t, s].item()

    kept = [attended(q[n], k[n // 3], v[n // 3], score) for n in range(6)]
    exact = torch.cat(kept, -1) @ net.o_proj.weight.double().T
    close(net(x, still, bias)[0], exact)
