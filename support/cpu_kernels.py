"""Faster on a CPU: dropout, T5's decoder token by token, and oneDNN's products and convolutions.

See support/kernels.py, which swaps these in once each is proved equal to the plain class. oneDNN's
operators, which torch keeps for compiled models, have no public name; they take float32 without
gradients only.

Axes: B batch, S keys, T source tokens, D width, N heads, H head width, V vocabulary, I input width,
O output width, C channels, h w a feature map; `...` any axes.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as plain
from support import proofs

# ----------------------------------------------------------------------------------------------
# Dropout, and one token of T5
# ----------------------------------------------------------------------------------------------


class QuickDropout(nn.Dropout):
    """torch draws one uniform number after the other on a CPU: a quarter of a training step. Here
    each 64 bits drawn are four numbers, so that p is a multiple of 2^-16; the mean stays exact,
    because kept values are scaled by the rounded p."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1:
            return super().forward(x)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        drawn = drawn.view(torch.int16)[: x.numel()].view(x.shape)  # -2^15 to 2^15 - 1
        dropped = round(self.p * 2**16)  # of 2^16 numbers
        return DropoutGrad.apply(x, drawn >= dropped - 2**15, 1 / (1 - dropped / 2**16))


class DropoutGrad(torch.autograd.Function):
    """x * scale where `kept`, else 0; keeps one byte a place, where autograd would keep four."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(kept)
        return kept.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        [kept] = ctx.saved_tensors
        return kept.to(grad_output.dtype).mul_(ctx.scale).mul_(grad_output), None, None


class QuickT5Stack(plain.T5Stack):
    """One new token per row of a decoder: the states have two axes, so that no product reshapes
    them, heads and rows share one, and the position bias is looked up. 1.4 times as fast at the
    demo's size, where all the time is dispatch."""

    def forward(
        self,
        x: Tensor,
        mask_bias: Tensor,
        memory: Tensor | None = None,
        cache: plain.Cache | None = None,
    ) -> Tensor:
        if cache is None or x.shape[1] > 1 or self.training or torch.is_grad_enabled():
            return super().forward(x, mask_bias, memory, cache)
        rows = (len(x), self.config.num_heads, 1, -1)
        bias = self.newest_bias(cache).expand(rows).flatten(0, 1)  # (B*N, 1, S)
        memory_bias = mask_bias.expand(rows).flatten(0, 1)  # (B*N, 1, T)
        x = x[:, 0]  # (B, D)
        for block, layer in zip(self.block, cache.layers, strict=True):
            h = block.self_attn_norm(x)
            k = block.self_attn.k_proj(h).view(rows)  # (B, N, 1, H)
            v = block.self_attn.v_proj(h).view(rows)  # (B, N, 1, H)
            k, v = layer.append(k, v)  # (B, N, S, H)
            x = x + self.attend(block.self_attn, h, k, v, bias)
            h = block.cross_attn_norm(x)
            x = x + self.attend(block.cross_attn, h, *layer.cross, memory_bias)
            x = x + block.ffn(block.ffn_norm(x))
        return self.final_layer_norm(x)[:, None]  # (B, 1, D)

    @staticmethod
    def attend(
        attention: plain.T5Attention, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x (B, D), k and v (B, N, S, H), bias (B*N, 1, S) -> (B, D)."""
        q = attention.q_proj(x).view(len(bias), 1, -1)  # (B*N, 1, H)
        scores = torch.baddbmm(bias, q, k.flatten(0, 1).transpose(1, 2))  # (B*N, 1, S)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)  # (B*N, 1, S)
        out = torch.bmm(weights, v.flatten(0, 1))  # (B*N, 1, H)
        return attention.o_proj(out.view(len(x), -1))

    def newest_bias(self, cache: plain.Cache, block: int = 64) -> Tensor:
        """(1, N, 1, S) of the next token's query. The biases of a query are those of a later one
        but for the farthest keys: they are computed once every `block` tokens of a text, and kept
        with its cache, as the weights may have changed before the next one."""
        length = cache.length + 1
        bias = vars(cache).get("newest_bias")
        if bias is None or bias.shape[3] < length:
            longest = -(-length // block) * block
            bias = cache.newest_bias = self.position_bias(longest - 1, longest)
        return bias[..., bias.shape[3] - length :]


# ----------------------------------------------------------------------------------------------
# oneDNN
# ----------------------------------------------------------------------------------------------

LARGE = 2**18  # weights of a layer from which on oneDNN is worth its 12 us a call


def fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operators, which have no public name, can multiply x by this weight."""
    if weight.numel() < LARGE or torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and has_onednn()


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., I), weight (O, I) -> (..., O). oneDNN is 1.1 times as fast as torch's
    BLAS for a large weight, and 1.1 to 2.3 times for few rows if it was laid out for them."""
    if not fits_onednn(x, weight):
        return F.linear(x, weight, bias)
    weight = LAID_OUT.get(weight.data_ptr(), weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


LAID_OUT = {}  # {address of a weight: its copy for few rows}, while `laid_out` is open


@contextlib.contextmanager
def laid_out(weights: Iterable[Tensor], rows: int) -> Iterator[None]:
    """Inside, these weights are multiplied by from copies made for so many rows of x. A single row
    is bound by reading the weights, whatever their layout: none is made then."""
    made = []
    for weight in weights if rows > 1 else ():
        if fits_onednn(weight, weight):
            LAID_OUT[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            made.append(weight.data_ptr())
    try:
        yield
    finally:
        for address in made:
            LAID_OUT.pop(address, None)  # two threads may lay out the same weights


def convolved(
    x: Tensor,
    conv: nn.Conv2d,
    norm: plain.FrozenBatchNorm,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """relu(norm(conv(x)) + residual), (B, C, h, w), in one pass over memory, channels last: the
    norm is put into the weights, and oneDNN adds and clamps what it has just summed up."""
    weight, shift = folded(conv, norm)
    x = x.contiguous(memory_format=torch.channels_last)
    sizes = (conv.padding, conv.stride, conv.dilation, conv.groups)
    last = "relu" if relu else "none"
    ops = torch.ops.mkldnn
    if residual is None:
        return ops._convolution_pointwise(x, weight, shift, *sizes, last, [], "")
    add = ("add", 1.0, last, [], "")
    return ops._convolution_pointwise.binary(x, residual, weight, shift, *sizes, *add)


def folded(conv: nn.Conv2d, norm: plain.FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm` after `conv` as one convolution, channels last. Both are kept with
    the layer until one of the five tensors they are made of is written to or replaced."""
    parts = [t.detach() for t in (conv.weight, *norm.buffers())]
    state = [(t.data_ptr(), t._version) for t in parts]
    if getattr(conv, "folded", (None,))[0] != state:
        scale, shift = norm.scale_shift()
        weight = conv.weight * scale[:, None, None, None]
        weight = weight.contiguous(memory_format=torch.channels_last)
        conv.folded = (state, weight, shift, parts)  # parts: their memory is not given to others
    return conv.folded[1:3]


def foldable(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `convolved` can take x. A weight made under inference_mode has no version."""
    usable = x.device.type == "cpu" and x.dtype == torch.float32 and has_onednn()
    return usable and not torch.is_grad_enabled() and not conv.weight.is_inference()


class QuickLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class QuickT5(plain.T5):
    """The vocabulary layer and, for several rows, weights that are laid out before they decode."""

    def head(self, states: Tensor) -> Tensor:
        weight = self.head_weight()
        if not fits_onednn(states, weight):
            return super().head(states)
        return product(self.rescaled(states), weight)

    def generate(self, input_ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        layers = (m for m in self.decoder.modules() if isinstance(m, nn.Linear))
        weights = [self.head_weight(), *(layer.weight for layer in layers)]
        with torch.inference_mode(), laid_out(weights, len(input_ids)):
            return super().generate(input_ids, *arguments, **options)


class QuickPaliGemma(plain.PaliGemma):
    """The vocabulary layer. No weight is laid out: a copy of the 3B takes 10 GB."""

    def head(self, states: Tensor) -> Tensor:
        weight = self.language_model.embed_tokens.weight
        if not fits_onednn(states, weight):
            return super().head(states)
        logits = product(states, weight)  # (..., V)
        return plain.soft_cap(logits, self.config.text.final_logit_softcapping)


class FoldedBottleneck(plain.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        if not foldable(x, self.conv1):
            return super().forward(x)
        y = convolved(x, self.conv1, self.bn1)
        y = convolved(y, self.conv2, self.bn2)
        residual = convolved(x, *self.downsample, relu=False) if self.project else x
        return convolved(y, self.conv3, self.bn3, residual)


class FoldedResNet(plain.ResNet):
    def stem(self, pixels: Tensor) -> Tensor:
        if not foldable(pixels, self.conv1):
            return super().stem(pixels)
        return convolved(pixels, self.conv1, self.bn1)


# ----------------------------------------------------------------------------------------------
# Kernels chosen by a layer's size: asked on the layer's own weights, two rows
# ----------------------------------------------------------------------------------------------


def on_itself(layer: nn.Module, kernel: type) -> proofs.Difference:
    """The difference on a layer's own weights, two rows, small ones and large ones; of a whole
    model its vocabulary layer. In eval mode: these kernels take nothing with gradients."""
    if isinstance(layer, nn.Dropout):
        return proofs.compare_masks(layer, kernel)
    device = next(layer.parameters()).device
    if isinstance(layer, plain.Bottleneck | plain.ResNet):
        x = proofs.draw(2, layer.conv1.in_channels, 9, 11)
        call = layer.stem if isinstance(layer, plain.ResNet) else layer.forward
    elif isinstance(layer, nn.Linear):
        x = proofs.draw(2, layer.in_features)
        call = layer.forward
    else:
        text = layer.config.text.hidden_size if hasattr(layer.config, "text") else None
        x = proofs.draw(2, text or layer.config.d_model)
        call = layer.head
    before = type(layer)
    modes = [(m, m.training) for m in layer.modules()]
    worst = 0.0
    try:
        layer.eval()
        for scale in (1.0, 100.0):
            with torch.no_grad():
                layer.__class__ = before
                expected = getattr(layer, call.__name__)(scale * x.to(device))
                layer.__class__ = kernel
                found = getattr(layer, call.__name__)(scale * x.to(device))
            worst = max(worst, proofs.distance(found, expected))
    finally:
        layer.__class__ = before
        for module, training in modes:
            module.training = training
    return proofs.Difference(worst, 5e-5, "the output on its own weights")
