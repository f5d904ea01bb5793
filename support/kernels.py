"""Faster and leaner versions of plain classes, swapped in from outside, each proved equal first.

model.py and lora.py print one formula for each layer, and that is what runs until somebody calls
`enable(model)`. For each layer whose exact type is a plain class it compares that class, as it is
in memory at that moment, with the version here. Where they differ the plain class stays and a line
says which and by how much, so that an edited formula is never silently replaced by another one.

  Leaner in training   autograd keeps every step of a formula; NormGrad, GatedGELU, CappedAttention
                       and LoRAGrad keep what it starts from and compute the rest again.
  Faster on a CPU      support/cpu_kernels.py: dropout from 16-bit numbers, a T5 decoder that takes
                       one token at a time, oneDNN for large layers and folded batch norms.

The proofs are in support/proofs.py. Call `enable` after adapters are injected and before DDP or
FSDP; layers that are changed later need it again.

Axes: B batch, T queries, S keys, D width, N heads, K key-value heads, G = N / K, H head width,
F ffn width, I input width, O output width, r rank, n rows; `...` any axes.
"""

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import model as plain
from lora import LoRALinear
from support import proofs
from support.cpu_kernels import (
    FoldedBottleneck,
    FoldedResNet,
    QuickDropout,
    QuickLinear,
    QuickPaliGemma,
    QuickT5,
    QuickT5Stack,
    fits_onednn,
    foldable,
    laid_out,
    on_itself,
    product,
    weight_of,
)
from support.distributed import any_rank

# ----------------------------------------------------------------------------------------------
# Leaner in training
# ----------------------------------------------------------------------------------------------


def keeps_autocast(function: type) -> type:
    """A decorator for autograd functions: the backward pass computes in the dtypes of the forward
    pass. Autograd runs it outside of any `torch.autocast`, where bfloat16 would meet float32."""
    forward = function.forward
    backward = function.backward

    @functools.wraps(forward)
    def remember(ctx, x: Tensor, *rest: Any) -> Any:
        device = x.device.type
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else None
        ctx.autocast = functools.partial(torch.autocast, device, dtype, enabled)
        return forward(ctx, x, *rest)

    @functools.wraps(backward)
    @once_differentiable  # what is kept has no graph: a second derivative would be wrong
    def recall(ctx, *grads: Tensor) -> Any:
        with ctx.autocast():
            return backward(ctx, *grads)

    function.forward = staticmethod(remember)
    function.backward = staticmethod(recall)
    return function


@keeps_autocast
class NormGrad(torch.autograd.Function):
    """y = x r (1 + w), r = (mean x^2 + eps)^-0.5. Keeps x as it is, and r, where autograd would
    keep two or three copies of x in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., D), (D,)
        y = x.float()
        r = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, r, weight)
        return (y * r * (1 + weight.float())).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x = r (g - n mean(g n)), with n = x r and g = grad_output (1 + w); grad_w is the sum
        of grad_output n."""
        x, r, weight = ctx.saved_tensors
        n = x.float() * r  # (..., D)
        g = grad_output.float()  # (..., D)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (g * n).reshape(-1, len(weight)).sum(0).to(weight.dtype)  # (D,)
        g = g * (1 + weight.float())
        g = (g - n * (g * n).mean(-1, keepdim=True)) * r
        return g.to(x.dtype), grad_weight, None


class LeanGemmaNorm(plain.GemmaNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # nothing is kept then
            return super().forward(x)
        return NormGrad.apply(x, self.weight, self.eps)


@keeps_autocast
class GatedGELU(torch.autograd.Function):
    """GELU(gate) * up. Keeps gate and up, and computes GELU(gate), which is as large, again in the
    backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # (..., F)
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_up = F.gelu(gate, approximate="tanh").mul_(grad_output)
        grad_gate = torch.ops.aten.gelu_backward(grad_output * up, gate, approximate="tanh")
        return grad_gate, grad_up


class LeanGemmaMLP(plain.GemmaMLP):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return self.down_proj(GatedGELU.apply(self.gate_proj(x), self.up_proj(x)))


@keeps_autocast
class CappedAttention(torch.autograd.Function):
    """softmax(cap tanh(q k^T) + bias) v. Keeps q, k and v and computes the scores again in the
    backward pass, those of one key-value head at a time, where autograd would keep three tensors of
    N * T * S numbers. Neither the bias nor the cap gets a gradient."""

    @staticmethod
    def weights(
        q: Tensor, k: Tensor, bias: Tensor | None, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        """One head's q (B, G*T, H) and k (B, S, H) -> capped scores / cap, weights (B, G*T, S)."""
        scores = q @ k.transpose(1, 2)  # (B, G*T, S)
        if cap:
            scores = scores.tanh_()
        groups = scores.unflatten(1, (-1, bias.shape[2]))  # (B, G, T, S)
        biased = torch.add(bias, groups, alpha=cap or 1)  # (B, G, T, S)
        return scores, biased.softmax(-1, dtype=torch.float32).flatten(1, 2)

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cap: float | None
    ) -> Tensor:
        """q (B, K, G*T, H), already times its scale and over the cap; k, v (B, K, S, H) -> as q."""
        ctx.save_for_backward(q, k, v, bias)
        ctx.cap = cap
        out = []
        for head in range(k.shape[1]):
            _, weights = CappedAttention.weights(q[:, head], k[:, head], bias, cap)  # (B, G*T, S)
            out.append(weights.to(v.dtype) @ v[:, head])  # (B, G*T, H)
        return torch.stack(out, 1)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k = torch.empty_like(k)
        grad_v = torch.empty_like(v)
        for head in range(k.shape[1]):
            g = grad_output[:, head].to(v.dtype)  # (B, G*T, H)
            capped, weights = CappedAttention.weights(q[:, head], k[:, head], bias, ctx.cap)
            grad_v[:, head] = weights.to(v.dtype).transpose(1, 2) @ g  # (B, S, H)
            g = (g @ v[:, head].transpose(1, 2)).float()  # (B, G*T, S)
            g = torch.ops.aten._softmax_backward_data(g, weights, -1, torch.float32)
            del weights  # the next line makes another of its size
            g = g.to(capped.dtype)
            if ctx.cap:
                g = torch.ops.aten.tanh_backward(g, capped).mul_(ctx.cap)
            grad_q[:, head] = g @ k[:, head]
            grad_k[:, head] = g.transpose(1, 2) @ q[:, head]
        return grad_q, grad_k, grad_v, None, None


class LeanGemmaAttention(plain.GemmaAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if bias.requires_grad:
            return super().attend(q, k, v, bias)
        T = q.shape[2]
        # The division by the cap is done on q, which is smaller than the scores.
        q = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # (B, K, G*T, H)
        q = q * (self.scale / (self.cap or 1))
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out = CappedAttention.apply(q, k, v, bias, self.cap)  # (B, K, G*T, H)
        else:  # all heads in one product: fewer launches, and nothing is kept
            scores = (q @ k.transpose(2, 3)).unflatten(2, (-1, T))  # (B, K, G, T, S)
            if self.cap:
                scores = scores.tanh_()
            scores = torch.add(bias[:, :, None], scores, alpha=self.cap or 1)
            weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)  # (B, K, G, T, S)
            out = weights.flatten(2, 3) @ v  # (B, K, G*T, H)
        return out.unflatten(2, (-1, T)).flatten(1, 2)  # (B, N, T, H)


@keeps_autocast
class LoRAGrad(torch.autograd.Function):
    """W0 x + b + s B A x. Keeps x once, in its own dtype, and s A x, which is small. PEFT keeps an
    fp32 copy of x for each layer, a fifth of a step's memory.

    x (..., I), weight (O, I), bias (O), A (r, I), B (O, r) -> (..., O).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        low = F.linear(x.to(A.dtype), A) * scaling  # (..., r)
        ctx.scaling = scaling
        ctx.save_for_backward(x, weight, A, B, low)
        return plus(product(x, weight, bias), low, B.T)  # (..., O)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, low = ctx.saved_tensors
        flat = grad_output.reshape(-1, grad_output.shape[-1])  # (n, O)
        exact = flat.to(low.dtype)
        grad_low = exact @ B * ctx.scaling  # (n, r)
        grad_B = (exact.T @ low.view(-1, low.shape[-1])).to(B.dtype)  # (O, r)
        del exact
        rows = x.reshape(-1, x.shape[-1])  # (n, I)
        grad_A = (grad_low.T @ rows.to(grad_low.dtype)).to(A.dtype)  # (r, I)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = plus(product(flat, weight.T), grad_low, A)  # (n, I)
            grad_x = grad_x.view(x.shape).to(x.dtype)  # (..., I)
        if ctx.needs_input_grad[1]:  # the base is frozen, unless somebody unfreezes it
            grad_weight = (flat.T @ rows).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


def plus(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out (..., O) + a (..., r) b (r, O), in the dtype of `out`, which is overwritten."""
    if out.dtype != a.dtype or a.dtype != b.dtype:
        return (out + a @ b).to(out.dtype)
    out.view(-1, out.shape[-1]).addmm_(a.view(-1, a.shape[-1]), b)
    return out


class LeanLoRALinear(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.dropout
        if drops or self.lora_magnitude_vector is not None:
            return super().forward(x)
        if self.original is None and torch.is_grad_enabled():
            A = self.lora_A.weight
            B = self.lora_B.weight
            return LoRAGrad.apply(x, self.weight, self.bias, A, B, self.scaling)  # (..., O)
        out = product(x, self.weight, self.bias)  # (..., O)
        if self.original is not None:
            return out
        low = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)) * self.scaling)  # (..., O)
        return (out + low).to(out.dtype)


class FusedT5Attention(plain.T5Attention):
    """One call of scaled_dot_product_attention, which keeps no scores. On a CPU it has a slow
    dropout: there the scores are written out, and the bias is added in place."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q = plain.split(self.q_proj(x), self.heads)  # (B, N, T, H)
        p = self.dropout.p if self.training else 0.0
        if p and x.device.type == "cpu":
            scores = (q @ k.transpose(2, 3)).add_(bias)  # (B, N, T, S)
            weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)  # (B, N, T, S)
            out = self.dropout(weights) @ v  # (B, N, T, H)
        else:
            bias = bias.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=1.0)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


# ----------------------------------------------------------------------------------------------
# Swapping
# ----------------------------------------------------------------------------------------------

KERNELS = {  # plain class: its version here
    plain.GemmaNorm: LeanGemmaNorm,
    plain.GemmaMLP: LeanGemmaMLP,
    plain.GemmaAttention: LeanGemmaAttention,
    LoRALinear: LeanLoRALinear,
    plain.T5Attention: FusedT5Attention,
}
CPU_KERNELS = {
    nn.Dropout: QuickDropout,
    plain.T5Stack: QuickT5Stack,
    plain.T5: QuickT5,
    plain.PaliGemma: QuickPaliGemma,
    plain.Bottleneck: FoldedBottleneck,
    plain.ResNet: FoldedResNet,
    nn.Linear: QuickLinear,
}


def enable(model: nn.Module) -> list[dict]:
    """Swap every layer whose class has a kernel that is proved equal to it, here and now.

    Returns a verdict for each kind of layer: its class, its kernel, how many there are, whether
    they were swapped, the largest difference relative to the largest number, and where. A refusal
    is also printed on stderr. Under torchrun, a kernel that one process refuses is used by none.
    """
    device = next(model.parameters()).device
    kernels = dict(KERNELS)
    if device.type == "cpu":
        kernels |= CPU_KERNELS
    kinds = {}
    for layer in model.modules():
        if type(layer) in kernels and worthwhile(layer):
            kinds.setdefault((type(layer), settings(layer)), []).append(layer)
    verdicts = []
    for (kind, _), layers in kinds.items():
        kernel = kernels[kind]
        with proofs.undisturbed():
            try:
                worst = proofs.worst(differences(model, layers, kernel, device))
            except Exception as error:  # an edited class may not take what a proof gives it
                text = f"{type(error).__name__} ({error})".splitlines()[0]
                worst = proofs.Difference(math.inf, 0.0, text)
        [refused] = any_rank(not worst.is_none)
        names = {"layer": kind.__name__, "kernel": kernel.__name__, "count": len(layers)}
        result = {"swapped": not refused, "difference": worst.size, "where": worst.where}
        verdicts.append(names | result)
        if refused:
            text = f"kernels: {kind.__name__} stays plain, as {kernel.__name__} differs from it by"
            print(f"{text} {worst.size:.2g} in {worst.where}", file=sys.stderr)
            continue
        for layer in layers:
            layer.__class__ = kernel
    return verdicts


def worthwhile(layer: nn.Module) -> bool:
    """Whether the kernel of a layer's class would do anything for this one."""
    if isinstance(layer, nn.Dropout):
        return 0 < layer.p < 1
    if isinstance(layer, plain.T5Stack):
        return layer.is_decoder
    if isinstance(layer, plain.Bottleneck | plain.ResNet):
        with torch.no_grad():
            return foldable(layer.conv1.weight, layer.conv1)
    if type(layer) not in (nn.Linear, plain.T5, plain.PaliGemma):
        return True
    with torch.no_grad():
        return fits_onednn(weight_of(layer), weight_of(layer))


def settings(layer: nn.Module) -> tuple:
    """What a layer's formula depends on but for sizes: layers with the same are proved once."""
    numbers = proofs.numbers_of(layer).items()
    dropout = [m.p for m in layer.children() if isinstance(m, nn.Dropout)]
    if isinstance(layer, LoRALinear):
        dropout = [layer.dropout]
    # Whether there is a bias, or a magnitude; in which dtype
    parameters = [(name, p.dtype) for name, p in layer.named_parameters(recurse=False)]
    return (*numbers, *parameters, *dropout, changed_part(layer))


def changed_part(layer: nn.Module) -> str:
    """A part that was changed in this one layer, which a kernel or a small copy would not have: one
    of another class, with a hook, or with a method of its own. "" if there is none."""
    whole = isinstance(layer, plain.Pretrained)  # its kernel computes the vocabulary layer alone
    for name, part in [("", layer)] if whole else layer.named_modules():
        if isinstance(part, nn.Linear) and type(layer) not in (nn.Linear, LoRALinear):
            continue  # kernels call it as the plain class does
        kind = PLAIN.get(type(part), type(part))
        hooks = part._forward_hooks or part._forward_pre_hooks
        own = any(inspect.isroutine(value) for value in vars(part).values())
        if own or part is not layer and (hooks or kind not in PARTS):
            return f"its {name or 'methods'}, changed in this layer only"
    return ""


def differences(
    model: nn.Module, layers: list[nn.Module], kernel: type, device: torch.device
) -> Iterator[proofs.Difference]:
    """Of a small copy that stands for all of these layers, or of each of them."""
    if part := changed_part(layers[0]):
        yield proofs.Difference(math.inf, 0.0, part)
        return
    if type(layers[0]) in proofs.CASES:
        dtype = next(layers[0].parameters()).dtype
        device = torch.device("cpu") if device.type == "meta" else device
        yield proofs.compare(layers[0], kernel, device, dtype)
        if isinstance(layers[0], LoRALinear) and device.type == "cpu":  # one of each large size
            with torch.no_grad():
                large = {x.weight.shape: x for x in layers if fits_onednn(x.weight, x.weight)}
            yield from (on_itself(layer, kernel) for layer in large.values())
        return
    # T5's weights are also laid out for rows, see QuickT5.
    rows = 2 if any(isinstance(m, plain.T5) for m in model.modules()) else 1
    for layer in layers[:1] if isinstance(layers[0], nn.Dropout) else layers:
        yield on_itself(layer, kernel)
        if isinstance(layer, nn.Linear | plain.T5):
            with torch.no_grad(), laid_out([weight_of(layer)], rows):
                yield on_itself(layer, kernel)


@contextlib.contextmanager
def plain_formulas(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as before `enable`: attention maps are read with hooks, which kernels do
    not call."""
    swapped = [(m, type(m)) for m in model.modules() if type(m) in PLAIN]
    for module, kernel in swapped:
        module.__class__ = PLAIN[kernel]
    try:
        yield
    finally:
        for module, kernel in swapped:
            module.__class__ = kernel


PARTS = {plain.T5Block, plain.T5FeedForward, plain.T5Norm, plain.FrozenBatchNorm, nn.Conv2d}
PARTS |= {nn.Embedding, nn.ModuleList, nn.Sequential, nn.Softmax, *KERNELS, *CPU_KERNELS}
PLAIN = {kernel: kind for kind, kernel in (KERNELS | CPU_KERNELS).items()}
