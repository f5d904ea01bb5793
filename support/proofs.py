"""Whether a kernel computes the same as the plain class it replaces, tested on both of them.

Each kernel of support/kernels.py has cases here, on a small copy of the layer: of the plain class
as it is in memory now and with that layer's own settings, all parameters random. Outputs are
compared, and the gradients of every input and parameter. The referee is the plain class in float64:
the kernel may be a little farther from it than the plain class itself. Inputs are large, so that
tanh, GELU and softmax saturate: at unit inputs a missing tanh hides in bfloat16's rounding. Kernels
that are chosen by a layer's size are asked on the layer itself.

Axes as in support/kernels.py.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import model as plain
from lora import LoRALinear


@dataclass(frozen=True)
class Case:
    """A call to compare: `call(layer, **inputs)` gives a tensor."""

    name: str
    call: Callable
    inputs: dict = field(default_factory=dict)
    learns: bool = True  # False: without gradients, as in decoding
    ignored: torch.Tensor | None = None  # rows of pads, (B, T): finite is enough
    random: bool = False  # its numbers depend on the dtype: no referee in float64


@dataclass(frozen=True)
class Difference:
    """By how much a kernel is off, over the largest number of the plain class; and where."""

    size: float = 0.0
    allowed: float = 0.0
    where: str = ""

    @property
    def is_none(self) -> bool:
        return self.size <= self.allowed


# ----------------------------------------------------------------------------------------------
# Small copies and their cases, by plain class
# ----------------------------------------------------------------------------------------------


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers from a generator of their own."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return scale * torch.randn(shape, generator=generator)


def norm_cases(layer: nn.Module) -> tuple[nn.Module, list[Case]]:
    small = type(layer)(8, layer.eps)
    call = lambda module, x: module(x)  # noqa: E731
    # Small rows show eps, large ones the mean; each alone, as gradients shrink with the size.
    sizes = (1.0, layer.eps**0.5, 30.0, 3e4)
    return small, [Case(f"rows of {n:.2g}", call, {"x": draw(3, 8, scale=n)}) for n in sizes]


def mlp_cases(layer: nn.Module) -> tuple[nn.Module, list[Case]]:
    config = plain.Gemma2Config(hidden_size=6, intermediate_size=10)
    call = lambda module, x: module(x)  # noqa: E731
    sizes = (3.0, 1.0, 100.0)
    cases = [Case(f"inputs of {n:g}", call, {"x": draw(2, 3, 6, scale=n)}) for n in sizes]
    return type(layer)(config), cases


def gemma_cases(layer: nn.Module) -> tuple[nn.Module, list[Case]]:
    """T = S with pads on the left, in a window of 3 and without; T = 1 and T < S with a cache; many
    keys."""
    H = 6
    groups = layer.q_proj.out_features // layer.k_proj.out_features
    config = plain.Gemma2Config(
        hidden_size=10,
        num_attention_heads=2 * groups,
        num_key_value_heads=2,
        head_dim=H,
        sliding_window=3,
    )
    small = type(layer)(config)
    S = 7
    valid = torch.ones(2, S, dtype=torch.bool)  # (B, S)
    valid[1, :2] = False
    suffix = torch.zeros(2, S, dtype=torch.bool)  # (B, S)
    suffix[:, 3:] = True
    cos, sin = plain.rotary_angles(valid.cumsum(1) - 1, H, 10000.0, torch.float32)  # (B, 1, S, H)
    # Scores of about 5 in one row and 50 in the other, whatever the scale is: steep and flat parts
    # of tanh and softmax.
    x = draw(2, S, 10, scale=(2 / layer.scale) ** 0.5) * FLAT_STEEP  # (B, S, D)

    def newest(T: int, window: int | None = None) -> dict:
        allowed = plain.prefix_lm_mask(valid, suffix, T, window)  # (B, 1, T, S)
        bias = plain.mask_bias(allowed, torch.float32)  # (B, 1, T, S)
        return {"x": x[:, -T:], "cos": cos[:, :, -T:], "sin": sin[:, :, -T:], "bias": bias}

    def cached(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        cache = plain.LayerCache(x, (2, 2, bias.shape[3], H))
        past = bias.shape[3] - x.shape[1]
        keys = draw(2, 2, past, H, scale=3.0).to(x)  # (B, K, past, H)
        cache.append(keys, draw(2, 2, past, H, seed=1).to(x))
        return module(x, (cos, sin), bias.detach(), cache)

    def whole(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        return module(x, (cos, sin), bias)

    # A mask is data; that a learned bias would get no gradient is a case of its own.
    def masked(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        return module(x, (cos, sin), bias.detach())

    pads = ~valid
    learned = newest(S) | {"bias": draw(2, 1, S, S)}
    many = newest(2) | {"bias": torch.zeros(2, 1, 2, MANY)}
    return small, [
        Case("T = S, pads on the left", masked, newest(S), ignored=pads),
        Case("a window of 3", masked, newest(S, window=3), ignored=pads),
        Case("a learned bias", whole, learned),
        Case("T = S without gradients", whole, newest(S), learns=False, ignored=pads),
        Case("T = 3 with a cache", cached, newest(3), learns=False),
        Case("T = 1 with a cache, a window of 3", cached, newest(1, window=3), learns=False),
        Case("many keys", cached, many),
        Case("many keys without gradients", cached, many, learns=False),
    ]


def lora_cases(layer: nn.Module) -> tuple[nn.Module, list[Case]]:
    """The base frozen and not; merged; without gradients."""
    base = nn.Linear(6, 5, bias=layer.bias is not None)
    dora = layer.lora_magnitude_vector is not None
    small = type(layer)(base, layer.r, layer.alpha, layer.dropout, layer.rslora, dora)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def frozen(module: nn.Module, x: Tensor) -> Tensor:
        module.weight.requires_grad_(False)
        result = module(x)
        module.weight.requires_grad_(True)
        return result

    def merged(module: nn.Module, x: Tensor) -> Tensor:
        module.merge()
        result = module(x)
        module.unmerge()
        return result

    def dropped(module: nn.Module, x: Tensor) -> Tensor:
        module.dropout = layer.dropout
        result = module(x)
        module.dropout = 0.0
        return result

    def evaluated(module: nn.Module, x: Tensor) -> Tensor:
        module.dropout = layer.dropout
        return module.eval()(x)

    small.dropout = 0.0
    x = draw(2, 3, 6, scale=3.0)
    return small, [
        Case("all trained", call, {"x": x}),
        Case("with dropout", dropped, {"x": x}, random=True),
        Case("the base frozen", frozen, {"x": x}),
        Case("two axes", call, {"x": x[0]}),
        Case("in eval mode", evaluated, {"x": x}),
        Case("without gradients", evaluated, {"x": x}, learns=False),
        Case("merged", merged, {"x": x}, learns=False),
    ]


def t5_config(**changes: object) -> plain.T5Config:
    sizes = {"vocab_size": 11, "d_model": 6, "d_kv": 3, "d_ff": 7, "num_heads": 2}
    return plain.T5Config(**sizes | {"num_layers": 2} | changes)


def t5_attention_cases(layer: nn.Module) -> tuple[nn.Module, list[Case]]:
    small = type(layer)(t5_config(dropout_rate=layer.dropout.p))

    def call(module: nn.Module, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        module.dropout.p = 0.0
        return module(x, *module.keys_values(memory), bias)

    def dropping_nothing(module: nn.Module, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        # What runs with dropout, without its masks.
        module.dropout.p = 1e-9
        return module(x, *module.keys_values(memory), bias)

    cases = []
    for T, S in ((5, 5), (3, 5), (1, 5), (2, MANY)):
        x = draw(2, T, 6, scale=3.0) * FLAT_STEEP
        inputs = {"x": x, "memory": draw(2, S, 6, scale=2.0)}
        bias = draw(2, 2, T, S, scale=3.0)
        bias[1, :, :, 3:] = torch.finfo(torch.float32).min  # pads
        cases.append(Case(f"T = {T}, S = {S}", call, inputs | {"bias": bias}))
    cases += [replace(case, name=f"{case.name}, evaluated", learns=False) for case in cases]
    if layer.dropout.p:
        cases.append(replace(cases[0], name="with dropout", call=dropping_nothing))
    return small, cases


def t5_stack_cases(layer: nn.Module) -> tuple[nn.Module, list[Case]]:
    """A decoder that reads a padded memory and writes one token after the other."""
    c = layer.config
    settings = ("relative_attention_num_buckets", "relative_attention_max_distance")
    settings += ("dropout_rate", "layer_norm_epsilon", "feed_forward_proj")
    small = type(layer)(t5_config(**{name: getattr(c, name) for name in settings}), True)
    memory_bias = torch.zeros(2, 1, 1, 4)  # (B, 1, 1, S)
    memory_bias[1, :, :, 3:] = torch.finfo(torch.float32).min

    def tokens(module: nn.Module, x: Tensor, memory: Tensor, memory_bias: Tensor) -> Tensor:
        cache = module.cache(memory, memory_bias, x.shape[1])
        steps = x.split(1, 1)
        return torch.cat([module(token, memory_bias, cache=cache) for token in steps], 1)

    def at_once(module: nn.Module, x: Tensor, memory: Tensor, memory_bias: Tensor) -> Tensor:
        return module(x, memory_bias, memory)

    inputs = {"x": draw(2, 5, 6, scale=3.0), "memory": draw(2, 4, 6, scale=2.0)}
    inputs["memory_bias"] = memory_bias
    long = inputs | {"x": draw(2, 70, 6, scale=3.0)}  # beyond a block of kept biases
    return small, [
        Case("70 tokens one by one", tokens, long, learns=False),
        Case("all tokens at once", at_once, inputs, learns=False),
    ]


FLAT_STEEP = torch.tensor([0.3, 1.0])[:, None, None]  # of two rows
MANY = 600  # keys: some formulas depend on their number

CASES = {
    plain.GemmaNorm: norm_cases,
    plain.GemmaMLP: mlp_cases,
    plain.GemmaAttention: gemma_cases,
    LoRALinear: lora_cases,
    plain.T5Attention: t5_attention_cases,
    plain.T5Stack: t5_stack_cases,
}


# ----------------------------------------------------------------------------------------------
# Comparing small copies
# ----------------------------------------------------------------------------------------------


def numbers_of(layer: nn.Module) -> dict:
    """A layer's own numbers but for sizes, and for dropout, which has cases of its own."""
    sizes = ("in_features", "out_features", "channels", "heads", "kv_heads", "dropout")
    simple = {n: v for n, v in vars(layer).items() if isinstance(v, int | float | str | None)}
    return {n: v for n, v in simple.items() if n not in sizes}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the global generators afterwards; inside, gradients are on."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    grads = (torch.inference_mode(False), torch.enable_grad())
    with torch.random.fork_rng(list(devices)), grads[0], grads[1]:
        yield


def compare(layer: nn.Module, kernel: type, device: torch.device, dtype: torch.dtype) -> Difference:
    """What a kernel does differently from a layer's class, on a small copy of it: in float32, then
    in the run's own dtype and, where it is on, under autocast. The first difference, or the last
    that is none."""
    small, cases = CASES[type(layer)](layer)
    with torch.no_grad():
        for i, t in enumerate((*small.parameters(), *small.buffers())):
            t.copy_(draw(*t.shape, seed=i))
    for name, value in numbers_of(layer).items():
        setattr(small, name, value)
    small.requires_grad_(True).to(device)
    first = cases[0]
    in_eval_mode = lambda module, **inputs: first.call(module.eval(), **inputs)  # noqa: E731
    if first.learns:
        cases.append(replace(first, name=f"{first.name}, in eval mode", call=in_eval_mode))
    ways = [(torch.float32, False)]
    if dtype != torch.float32:
        ways.append((dtype, False))
    if torch.is_autocast_enabled(device.type):
        ways.append((torch.float32, True))
    for numbers, autocast in ways:
        for case in cases:
            small.train(case.learns)
            difference = worst(compare_case(small, kernel, case, numbers, autocast))
            if not difference.is_none:
                return difference
    if isinstance(small, plain.T5Attention) and small.dropout.p:
        return compare_masks(small, kernel)
    return difference


def compare_case(
    small: nn.Module, kernel: type, case: Case, dtype: torch.dtype, autocast: bool
) -> Iterator[Difference]:
    """Of the output and each gradient. The plain class in float64 is the referee: the kernel may be
    a little farther from it than the plain class is in this dtype."""
    device = next(small.parameters()).device
    module = cast(copy.deepcopy(small), dtype)
    inputs = {}
    for name, t in case.inputs.items():
        lowest = torch.finfo(dtype).min  # float32's is -inf in bfloat16
        inputs[name] = t.to(device).clamp(min=lowest).to(dtype)
    exact = copy.deepcopy(module)
    if not case.random:
        exact = exact.double()
    quick = copy.deepcopy(module)
    quick.__class__ = kernel
    exact_inputs = {n: t.to(next(exact.parameters()).dtype) for n, t in inputs.items()}
    expected = called(exact, case, exact_inputs, autocast and case.random)
    plainly = called(module, case, inputs, autocast)
    quickly = called(quick, case, inputs, autocast)
    precision = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for name, reference in expected.items():
        numbers = "autocast" if autocast else str(dtype).removeprefix("torch.")
        where = f"{name}, {case.name}, {numbers}"
        allowed = 4 * distance(plainly[name], reference) + 60 * precision
        if precision > 1e-3:  # bfloat16: the referee alone decides
            allowed = 3 * distance(plainly[name], reference) + 2 * precision
        found = Difference(distance(quickly[name], reference), allowed, where)
        if getattr(plainly[name], "dtype", None) != getattr(quickly[name], "dtype", None):
            found = Difference(math.inf, 0.0, f"the dtype of {where}")
        yield found


def worst(differences: Iterator[Difference]) -> Difference:
    """The first real difference, else the largest."""
    largest = Difference()
    for difference in differences:
        if not difference.is_none:
            return difference
        largest = max(largest, difference, key=lambda d: d.size)
    return largest


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In the dtype of a run, in which adapters are float32 whatever their base is."""
    for name, p in module.named_parameters():
        if not name.startswith("lora_"):
            p.data = p.data.to(dtype)
    return module


def called(module: nn.Module, case: Case, inputs: dict, autocast: bool) -> dict:
    """{what: tensor} of one call: the output and every gradient."""
    leaves = {n: t.detach().clone().requires_grad_(case.learns) for n, t in inputs.items()}
    device = next(module.parameters()).device.type
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.learns), torch.autocast(device, torch.bfloat16, autocast):
        out = case.call(module, **leaves)
    if not out.isfinite().all():
        return dict.fromkeys(("the output",))
    keep = torch.ones(out.shape[:-1], dtype=torch.bool, device=out.device)
    if case.ignored is not None:
        keep = ~case.ignored[:, -out.shape[1] :].to(out.device)  # (B, T)
    results = {"the output": out.detach() * keep[..., None]}
    if case.learns:
        direction = draw(*out.shape, seed=9).to(out) * keep[..., None]
        with torch.autocast(device, enabled=False):
            (out * direction).sum().backward()  # out.backward(direction) imports torch's compiler
        for name, t in (*leaves.items(), *module.named_parameters()):
            results[f"the gradient of {name}"] = t.grad
    return results


def distance(t: torch.Tensor | None, reference: torch.Tensor | None) -> float:
    """The largest difference over the largest number; infinite where only one of them is there."""
    if t is None or reference is None:
        return 0.0 if t is reference else math.inf
    if t.shape != reference.shape:
        return math.inf
    if not t.numel():
        return 0.0
    largest = reference.double().abs().max().clamp(min=1e-30)
    off = (t.double() - reference.double()).abs().max() / largest
    return math.inf if off.isnan() else off.item()


# ----------------------------------------------------------------------------------------------
# Dropout: other numbers of the same law
# ----------------------------------------------------------------------------------------------


def compare_masks(layer: nn.Module, kernel: type) -> Difference:
    """With p > 0 a kernel's mean is the output without dropout, and the backward pass has the mask
    of the forward pass: as the output is linear in v, <output, g> = <v, gradient of v>. What is
    dropped shows in the variance, place by place."""
    plainly = copy.deepcopy(layer).train()
    quick = copy.deepcopy(plainly)
    quick.__class__ = kernel
    rows = 200_000 if isinstance(layer, nn.Dropout) else 20_000
    device = next(iter(layer.parameters()), torch.empty(0)).device
    if isinstance(layer, nn.Dropout):
        v = torch.ones(rows, 1, device=device).requires_grad_()
        expected = v[0].detach()
        call = lambda module, v: module(v)  # noqa: E731
    else:
        # Small inputs: no weight is nearly one, so that it matters what is dropped.
        x = draw(1, 2, 6, scale=0.1).to(device).expand(rows, -1, -1)  # (rows, T, D)
        k, v = (t.detach() for t in layer.keys_values(draw(1, 4, 6).to(device)))  # (1, N, S, H)
        bias = torch.zeros(1, 1, 2, 4, device=device)
        expected = copy.deepcopy(layer).eval()(x[:1], k, v, bias)[0].detach()  # (T, D)
        v = v.repeat(rows, 1, 1, 1).requires_grad_()
        call = lambda module, v: module(x, k.expand_as(v), v, bias)  # noqa: E731
    torch.manual_seed(0)
    out = call(quick, v)
    g = draw(*out.shape, seed=3).to(out)
    (out * g).sum().backward()
    with torch.no_grad():
        spread = out.std(0) / rows**0.5 + 1e-6
        if out.std() == 0:
            return Difference(math.inf, 0.0, "nothing is dropped")
        off = ((out.mean(0) - expected) / spread).abs().max().item()
        if off > 6:
            return Difference(off, 6.0, "standard errors of the mean with dropout")
        off = (out.std(0) / call(plainly, v).std(0)).log().abs().mean().item()
        p = (layer if isinstance(layer, nn.Dropout) else layer.dropout).p
        allowed = 0.03 + 1.5 / (rows * min(p, 1 - p)) ** 0.5
        if not off < allowed:
            return Difference(off, allowed, "the spread with dropout")
        forward = (out * g).sum().double()
        backward = (v * v.grad).sum().double()
    return Difference(distance(backward, forward), 1e-3, "the masks of the two passes")
