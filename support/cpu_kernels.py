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
from torch.autograd.function import once_differentiable

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
        one = cache is not None and x.shape[1] == 1 and x.dtype == torch.float32
        if not one or self.training or torch.is_grad_enabled():
            return super().forward(x, mask_bias, memory, cache)
        length = cache.length + 1  # S
        bias, memory_bias, layers = self.by_heads(mask_bias, cache, length)
        x = x[:, 0]  # (B, D)
        for block, layer, (keys, values, *cross) in zip(
            self.block, cache.layers, layers, strict=True
        ):
            h = block.self_attn_norm(x)
            k = block.self_attn.k_proj(h).view(len(keys), -1)  # (B*N, H)
            v = block.self_attn.v_proj(h).view(len(keys), -1)  # (B*N, H)
            keys.select(1, length - 1).copy_(k)
            values.select(1, length - 1).copy_(v)
            layer.length = length
            k = keys.narrow(1, 0, length)  # (B*N, S, H)
            v = values.narrow(1, 0, length)  # (B*N, S, H)
            x = x + self.attend(block.self_attn, h, k, v, bias)
            x = x + self.attend(block.cross_attn, block.cross_attn_norm(x), *cross, memory_bias)
            x = x + block.ffn(block.ffn_norm(x))
        return self.final_layer_norm(x)[:, None]  # (B, 1, D)

    @staticmethod
    def attend(
        attention: plain.T5Attention, x: Tensor, k: Tensor, v: Tensor, bias: Tensor
    ) -> Tensor:
        """x (B, D), k and v (B*N, S, H), bias (B*N, 1, S) -> (B, D)."""
        q = attention.q_proj(x).view(len(bias), 1, -1)  # (B*N, 1, H)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2))  # (B*N, 1, S)
        out = torch.bmm(scores.softmax(-1), v)  # (B*N, 1, H)
        return attention.o_proj(out.view(len(x), -1))

    def by_heads(
        self, mask_bias: Tensor, cache: plain.Cache, length: int
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """(B*N, 1, S) of the next token's query, (B*N, 1, T) over the source, and each layer's four
        caches, their rows and heads on one axis. A query's biases are those of a later one but for
        the farthest keys. All are made once every 64 tokens of a text, and when rows have left the
        batch, and kept with its cache: the weights may have changed before the next text."""
        rows = (len(mask_bias), self.config.num_heads, 1, -1)
        first, bias, memory_bias, layers = vars(cache).get("by_heads", (None,) * 4)
        if first is not cache.layers[0].k or bias.shape[2] < length:
            first = cache.layers[0].k  # `Cache.keep` makes another
            longest = -(-length // 64) * 64
            bias = self.position_bias(longest - 1, longest).expand(rows).flatten(0, 1)
            memory_bias = mask_bias.expand(rows).flatten(0, 1)  # (B*N, 1, T)
            layers = [(layer.k, layer.v, *layer.cross) for layer in cache.layers]
            layers = [tuple(t.flatten(0, 1) for t in layer) for layer in layers]
            cache.by_heads = (first, bias, memory_bias, layers)
        return bias.narrow(2, bias.shape[2] - length, length), memory_bias, layers


# ----------------------------------------------------------------------------------------------
# oneDNN
# ----------------------------------------------------------------------------------------------

LARGE = 2**18  # weights of a layer from which on oneDNN is worth its 12 us a call


def fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operators, which have no public name, can multiply x by this weight."""
    if weight.numel() < LARGE or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and has_onednn()


def weight_of(layer: nn.Module) -> Tensor:
    """A linear layer's weight (O, I); of a whole model that of its vocabulary layer, (V, D)."""
    if isinstance(layer, plain.T5):
        return layer.head_weight()
    if isinstance(layer, plain.PaliGemma):
        return layer.language_model.embed_tokens.weight
    return layer.weight


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., I), weight (O, I) -> (..., O). oneDNN is 1.1 times as fast as torch's
    BLAS for a large weight, and 1.1 to 2.3 times for few rows if it was laid out for them."""
    if not fits_onednn(x, weight):
        return F.linear(x, weight, bias)
    if weight.is_contiguous():  # not the transpose of a weight, which has its address
        weight = LAID_OUT.get(weight.data_ptr(), weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


LAID_OUT = {}  # {address of a weight: its copy for few rows}, while `laid_out` is open


class FrozenProduct(torch.autograd.Function):
    """x (..., I) times a frozen weight (O, I) -> (..., O); the weight gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        [weight] = ctx.saved_tensors
        return product(grad_output, weight.T), None


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
    """The vocabulary layer, frozen in training. No weight is laid out: a copy of the 3B takes 10
    GB."""

    def head(self, states: Tensor) -> Tensor:
        weight = self.language_model.embed_tokens.weight
        learned = torch.is_grad_enabled() and weight.requires_grad
        with torch.no_grad():
            fits = fits_onednn(states, weight)
        if learned or not fits:
            return super().head(states)
        logits = FrozenProduct.apply(states, weight)  # (..., V)
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
    model its vocabulary layer. Of what is used in training with a frozen weight, the gradient too.
    In eval mode: these kernels take no other gradients."""
    if isinstance(layer, nn.Dropout):
        return proofs.compare_masks(layer, kernel)
    if isinstance(layer, plain.Bottleneck | plain.ResNet):
        x = proofs.draw(2, layer.conv1.in_channels, 9, 11)
        name = "stem" if isinstance(layer, plain.ResNet) else "forward"
    else:
        x = proofs.draw(2, weight_of(layer).shape[1])
        name = "forward" if isinstance(layer, nn.Linear) else "head"
    frozen = type(layer) not in (nn.Linear, plain.T5, plain.Bottleneck, plain.ResNet)
    before = type(layer)
    modes = [(m, m.training) for m in layer.modules()]
    worst = 0.0
    try:
        layer.eval()
        for scale in (1.0, 100.0):
            trains = frozen and scale == 1.0  # where a soft-cap is flat, gradients are rounding
            pair = []
            for kind in (kernel, before):
                layer.__class__ = kind
                rows = (scale * x).to(next(layer.parameters()).device).requires_grad_(trains)
                with torch.set_grad_enabled(trains):
                    out = getattr(layer, name)(rows)
                    of_rows = torch.autograd.grad(out.square().sum(), rows) if trains else ()
                pair.append((out.detach(), *of_rows))
            worst = max(worst, *map(proofs.distance, *pair))
    finally:
        layer.__class__ = before
        for module, training in modes:
            module.training = training
    return proofs.Difference(worst, 5e-5, "the output on its own weights")
