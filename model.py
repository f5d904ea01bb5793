"""The plain backbones, T5, DETR, SigLIP, ViT, Gemma 2 and PaliGemma 2, and their decoding loop.

T5           Raffel et al. 2020, arXiv 1910.10683; v1.1 (gated GELU, untied) is FLAN-T5's.
DETR         Carion et al. 2020, arXiv 2005.12872; ResNet v1.5 (He et al. 2016, stride in conv2).
SigLIP       Zhai et al. 2023, arXiv 2303.15343; the vision transformer, So400m/14.
ViT          Dosovitskiy et al. 2021, arXiv 2010.11929; L/32 at 384 pixels, as timm has it.
Gemma 2      arXiv 2408.00118. PaliGemma 2: Steiner et al. 2024, arXiv 2412.03555.

support/checkpoints/ reads and writes files, support/kernels.py has faster versions of some classes.
`python model.py --keys DIR_OR_HUB_ID` prints how a checkpoint loads, `--summary` its architecture.

Axes:
  B batch        T source length   U target length   S key length     D width       N heads
  H head width   F ffn width       V vocabulary      Q object queries P feature pixels (h*w)
  C channels     L classes         K key-value heads I image tokens    G = N / K
  Y X pixels of an image, down and across; h w the same of a feature map; n images
  `live` rows still decoded; `length` tokens compared; `...` any axes
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Pair = tuple[Tensor, Tensor]  # keys and values, or cosines and sines


class Pretrained(nn.Module):
    """A model with checkpoints; `config_class` is the dataclass of its sizes."""

    @classmethod
    def from_pretrained(cls, where: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Load from a folder or Hub id, in eval mode; ValueError names tensors that do not fit."""
        from support.checkpoints import hub

        return hub.load(cls, where, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in the Hub's format."""
        from support.checkpoints import hub

        hub.save(self, folder)


def split(x: Tensor, heads: int) -> Tensor:
    """A projection (B, T, N*H) -> its heads (B, N, T, H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# ---- Decoding caches -----------------------------------------------------------------------------


class LayerCache:
    """Keys and values (B, heads, S, H) of one layer's self-attention, allocated once at their final
    length, with dtype and device of `like`; in a T5 decoder also `cross`, those of its
    cross-attention, which depend on the encoder alone."""

    def __init__(self, like: Tensor, sizes: tuple[int, ...], cross: Pair | None = None) -> None:
        self.k = like.new_zeros(sizes)
        self.v = like.new_zeros(sizes)
        self.length = 0
        self.cross = cross and tuple(x.contiguous() for x in cross)  # else copied at each step

    def append(self, k: Tensor, v: Tensor) -> Pair:
        """k, v (B, heads, T, H) of the new tokens -> views of all tokens so far."""
        start = self.length
        self.length += k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]  # (B, heads, S, H)

    def keep(self, alive: Tensor) -> None:
        self.k = self.k[alive]
        self.v = self.v[alive]
        if self.cross is not None:
            self.cross = tuple(x[alive] for x in self.cross)


class Cache:
    """Decoding state of a batch: keys and values per layer, and in `rows` whatever else the model
    reads at each step, one row per text: T5's source mask, Gemma's flags of all tokens so far."""

    def __init__(self, layers: list[LayerCache], **rows: Tensor) -> None:
        self.layers = layers
        self.rows = rows

    @property
    def length(self) -> int:
        return self.layers[0].length

    def keep(self, alive: Tensor) -> None:  # (B,), False where a row is dropped
        self.rows = {name: t[alive] for name, t in self.rows.items()}
        for layer in self.layers:
            layer.keep(alive)


# ---- T5 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the defaults are t5-small's, and what old config.json files leave out."""

    vocab_size: int = 32128  # rows of the embedding; the tokenizer has 32100
    d_model: int = 512  # D
    d_kv: int = 64  # H
    d_ff: int = 2048  # F
    num_layers: int = 6  # encoder blocks
    num_decoder_layers: int = None  # None: as many as the encoder has
    num_heads: int = 8  # N; N * H need not be D
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # v1.0 "relu", v1.1 "gated-gelu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = None  # None: iff tied, which transformers 5 writes for v1.1 too
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def scaled(self) -> bool:
        """Whether the decoder's output is multiplied by D^-0.5 before the vocabulary layer."""
        if self.scale_decoder_outputs is None:
            return self.tie_word_embeddings
        return self.scale_decoder_outputs


class T5Norm(nn.Module):
    """RMSNorm as in T5: no mean, no bias; cast back to the input's dtype, then times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        # Eq. RMSNorm (T5): w x / sqrt(mean(x^2) + eps)
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)  # (..., D)


class T5Attention(nn.Module):
    """Multi-head attention without biases and without H^-0.5: T5 folds that into `init_weights`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q_proj = nn.Linear(config.d_model, inner, bias=False)
        self.k_proj = nn.Linear(config.d_model, inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def keys_values(self, x: Tensor) -> Pair:
        """x (B, S, D) -> k, v, each (B, N, S, H)."""
        return split(self.k_proj(x), self.heads), split(self.v_proj(x), self.heads)  # (B, N, S, H)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), k and v (B, N, S, H), additive bias (B or 1, N or 1, T, S) -> (B, T, D)."""
        q = split(self.q_proj(x), self.heads)  # (B, N, T, H)
        # Eq. attention (T5): softmax(q k^T + bias) v
        weights = (q @ k.transpose(2, 3) + bias).float().softmax(-1).to(v.dtype)  # (B, N, T, S)
        out = self.dropout(weights) @ v  # (B, N, T, H)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class T5FeedForward(nn.Module):
    """ReLU (v1.0) or gated tanh-GELU (v1.1); dropout sits between the activation and `wo`."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:  # (..., D)
        if self.gated:
            # Eq. GEGLU (T5): GELU(x W_0) * (x W_1)
            h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (..., F)
        else:
            h = F.relu(self.wi(x))  # (..., F)
        return self.wo(self.dropout(h))  # (..., D)


class T5Block(nn.Module):
    """Pre-norm block: self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        self.is_decoder = is_decoder
        self.self_attn = T5Attention(config)
        self.self_attn_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        if is_decoder:
            self.cross_attn = T5Attention(config)
            self.cross_attn_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.ffn = T5FeedForward(config)
        self.ffn_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); the biases are added to the scores. A decoder also reads the
        encoder's states `memory` (B, S, D). With a `LayerCache`, x holds only the newest tokens."""
        h = self.self_attn_norm(x)
        k, v = self.self_attn.keys_values(h)  # (B, N, T, H)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, N, S, H), of all tokens so far
        x = x + self.dropout(self.self_attn(h, k, v, bias))
        if self.is_decoder:
            k, v = cache.cross if cache is not None else self.cross_attn.keys_values(memory)
            x = x + self.dropout(self.cross_attn(self.cross_attn_norm(x), k, v, memory_bias))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def relative_bucket(distance: Tensor, bidirectional: bool, buckets: int, farthest: int) -> Tensor:
    """T5's bucket of a relative position `distance` = key position - query position (any shape).
    Half of the buckets hold one distance each, the others grow logarithmically up to `farthest`.
    The bidirectional encoder uses half of all buckets for keys to the right of the query."""
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    # Eq. relative buckets (T5): n below e = buckets / 2, then e + e log(n / e) / log(max / e)
    exact = buckets // 2
    log = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact)
    far = (exact + (log * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5Stack(nn.Module):
    """Encoder or decoder: blocks that share one relative-position table, and a final norm."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.is_decoder = is_decoder
        layers = config.decoder_layers if is_decoder else config.num_layers
        self.relative_attention_bias = nn.Embedding(
            config.relative_attention_num_buckets, config.num_heads
        )
        self.block = nn.ModuleList(T5Block(config, is_decoder) for _ in range(layers))
        self.final_layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def position_bias(self, start: int, end: int) -> Tensor:
        """Bias (1, N, T, S) for the queries start..end-1 over the keys 0..end-1."""
        c = self.config
        keys = torch.arange(end, device=self.relative_attention_bias.weight.device)  # (S,)
        distance = keys - keys[start:, None]  # (T, S)
        buckets = c.relative_attention_num_buckets
        farthest = c.relative_attention_max_distance
        bucket = relative_bucket(distance, not self.is_decoder, buckets, farthest)  # (T, S)
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1)[None]  # (1, N, T, S)
        if self.is_decoder:
            bias = bias.masked_fill(distance > 0, torch.finfo(bias.dtype).min)
        return bias

    def forward(
        self, x: Tensor, mask_bias: Tensor, memory: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """x (B, T, D) embeddings -> (B, T, D) states, after the final norm and dropout. `mask_bias`
        (B, 1, 1, S) hides the source's pads: an encoder's own, or those of a decoder's `memory`.
        With a `Cache`, x holds only the newest tokens, whose positions begin where it ends."""
        start = 0 if cache is None else cache.length
        bias = self.position_bias(start, start + x.shape[1])  # (1, N, T, S)
        if not self.is_decoder:
            bias = bias + mask_bias  # (B, N, T, T)
        x = self.dropout(x)
        for i, block in enumerate(self.block):
            x = block(x, bias, memory, mask_bias, cache and cache.layers[i])
        return self.dropout(self.final_layer_norm(x))

    def cache(self, memory: Tensor, memory_bias: Tensor, length: int) -> Cache:
        """A decoder's empty cache for `length` tokens that attend to `memory` (B, T, D)."""
        c = self.config
        layers = []
        for block in self.block:
            kv = block.cross_attn.keys_values(memory)  # (B, N, T, H) each
            layers.append(LayerCache(memory, (len(memory), c.num_heads, length, c.d_kv), kv))
        return Cache(layers, memory_bias=memory_bias)


class T5(Pretrained):
    """T5ForConditionalGeneration: v1.0 (UnifiedQA, tied and scaled) and v1.1 (FLAN, untied).
    `tied`: whether the output layer is the embedding; None: as the config has it."""

    config_class = T5Config

    def __init__(self, config: T5Config, tied: bool | None = None) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, is_decoder=False)
        self.decoder = T5Stack(config, is_decoder=True)
        tied = config.scaled if tied is None else tied
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """T5's own initialisation (mesh-tensorflow's), for training from scratch."""
        c = self.config
        std = {"q_proj": (c.d_model * c.d_kv) ** -0.5, "o_proj": (c.num_heads * c.d_kv) ** -0.5}
        std |= {"wo": c.d_ff**-0.5, "shared": 1.0, "lm_head": 1.0}
        for name, p in self.named_parameters():
            if p.dim() > 1:  # norms stay at one
                p.normal_(0.0, std.get(name.split(".")[-2], c.d_model**-0.5), generator=generator)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> encoder states (B, T, D)."""
        return self.encoder(self.shared(input_ids), self.mask_bias(attention_mask))

    def mask_bias(self, attention_mask: Tensor) -> Tensor:
        """(B, T) of ones and zeros -> additive (B, 1, 1, T), see `mask_bias` outside the class."""
        return mask_bias(attention_mask[:, None, None].bool(), self.shared.weight.dtype)

    def decode_states(self, ids: Tensor, memory: Tensor, memory_bias: Tensor) -> Tensor:
        """Shifted target ids (B, U) -> states (B, U, D) for `head`."""
        return self.decoder(self.shared(ids), memory_bias, memory)

    def rescaled(self, states: Tensor) -> Tensor:
        return states * self.config.d_model**-0.5 if self.config.scaled else states

    def head(self, states: Tensor) -> Tensor:
        """Decoder states (..., D) -> logits (..., V)."""
        return F.linear(self.rescaled(states), self.head_weight())  # (..., V)

    def head_weight(self) -> Tensor:
        layer = self.shared if self.lm_head is None else self.lm_head
        return layer.weight  # (V, D)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Teacher-forced logits (B, U, V) for (B, T) source ids and (B, U) shifted target ids."""
        memory = self.encode(input_ids, attention_mask)  # (B, T, D)
        states = self.decode_states(decoder_input_ids, memory, self.mask_bias(attention_mask))
        return self.head(states)  # (B, U, V)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_loops: bool = False,
        on_token: Callable[[int, Tensor], None] | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """New ids (B, <= max_new_tokens), EOS included, padded after it; greedy by default. The
        options are those of `decode`; `memory` (B, T, D) replaces the encoder's own states."""
        if memory is None:
            memory = self.encode(input_ids, attention_mask)  # (B, T, D)
        c = self.config
        cache = self.decoder.cache(memory, self.mask_bias(attention_mask), max_new_tokens)
        start = torch.full((len(memory), 1), c.decoder_start_token_id, device=memory.device)
        logits = self.step(start, cache)  # (B, V)
        return decode(
            self, logits, cache, max_new_tokens, temperature, generator, stop_loops, on_token
        )

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """The newest ids (B, 1) -> logits (B, V) of the next; the cache grows by one token."""
        x = self.shared(ids)  # (B, 1, D)
        states = self.decoder(x, cache.rows["memory_bias"], cache=cache)  # (B, 1, D)
        return self.head(states[:, -1])  # (B, V)


# ---- DETR ----------------------------------------------------------------------------------------

RESNET_LAYERS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


@dataclass(frozen=True)
class DETRConfig:
    """Sizes of a DETR; the defaults are facebook/detr-resnet-50's."""

    backbone: str = "resnet50"
    backbone_kwargs: dict = None  # {"layers": [...], "channels": [...]} for a smaller ResNet (demo)
    dilation: bool = False  # DC5: stage 4 keeps stride 16 and dilates instead
    d_model: int = 256  # D
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048  # F
    decoder_ffn_dim: int = 2048
    num_queries: int = 100  # Q
    num_labels: int = 91  # L, without "no object"
    id2label: dict = None  # {"0": name, ...}

    @property
    def resnet(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(blocks per stage, width per stage) of the ResNet."""
        kwargs = self.backbone_kwargs or {}
        layers = kwargs.get("layers") or RESNET_LAYERS[self.backbone]
        return tuple(layers), tuple(kwargs.get("channels") or (64, 128, 256, 512))


class FrozenBatchNorm(nn.Module):
    """Batch norm whose four tensors are constants: y = x * s + (b - mean * s)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        scale, shift = self.scale_shift()
        return x * scale[:, None, None] + shift[:, None, None]  # (B, C, h, w)

    def scale_shift(self) -> Pair:
        """s and b - mean * s, (C,) each."""
        # eps goes inside the root: without it, channels that died in pretraining give NaN.
        scale = self.weight * (self.running_var + 1e-5).rsqrt()  # (C,)
        return scale, self.bias - self.running_mean * scale  # (C,), (C,)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a residual; v1.5 puts the stride in the 3x3."""

    def __init__(self, inner: int, width: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        outer = 4 * width
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenBatchNorm(width)
        self.conv3 = nn.Conv2d(width, outer, 1, bias=False)
        self.bn3 = FrozenBatchNorm(outer)
        self.project = project
        if project:
            conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, FrozenBatchNorm(outer))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if self.project else x))


class ResNet(nn.Module):
    """ResNet v1.5 up to its last feature map C5; stride 32, or 16 with DC5."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = FrozenBatchNorm(64)
        inner = 64
        for i, (depth, width) in enumerate(zip(*config.resnet, strict=True)):
            dc5 = config.dilation and i == 3
            blocks = []
            for j in range(depth):
                stride = 2 if j == 0 and i > 0 and not dc5 else 1
                # In DC5 the blocks after the first dilate; the first keeps dilation 1.
                dilation = 2 if dc5 and j > 0 else 1
                project = j == 0 and (i > 0 or inner != 4 * width)
                blocks.append(Bottleneck(inner, width, stride, dilation, project))
                inner = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = inner

    def stem(self, pixels: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(pixels)))  # (B, C, h, w), stride 2

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, Y, X) -> C5 (B, C, h, w)."""
        x = F.max_pool2d(self.stem(pixels), 3, 2, 1)  # stride 4
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, C, h, w)


def sine_positions(mask: Tensor, width: int) -> Tensor:
    """DETR's 2-D positions: (B, h, w) valid mask -> (B, P, D), rows (y) first, then columns (x).
    Positions are normalised to 2*pi over the valid part, so padding does not shift them."""
    half = width // 2
    frequency = 10000 ** (2 * (torch.arange(half, device=mask.device) // 2) / half)  # (D/2,)
    encoded = []
    for axis in (1, 2):
        position = mask.float().cumsum(axis)  # (B, h, w), 1-based
        last = position[:, -1:, :] if axis == 1 else position[:, :, -1:]
        # Eq. sine positions (DETR): sin and cos of 2 pi (y / h) / 10000^(2i / (D/2))
        angle = (position / (last + 1e-6) * 2 * math.pi)[..., None] / frequency  # (B, h, w, D/2)
        pairs = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1)
        encoded.append(pairs.flatten(3))  # (B, h, w, D/2), sin and cos interleaved
    return torch.cat(encoded, -1).flatten(1, 2)  # (B, P, D)


class DETRAttention(nn.Module):
    """Multi-head attention with biases; positions go into queries and keys, never values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """query (B, T, D), key, value (B, S, D), mask (B, 1, 1, S) of valid keys -> (B, T, D)."""
        q = split(self.q_proj(query), self.heads)  # (B, N, T, H)
        k = split(self.k_proj(key), self.heads)  # (B, N, S, H)
        v = split(self.v_proj(value), self.heads)  # (B, N, S, H)
        # Eq. attention (DETR): softmax(q k^T / sqrt(H)) v
        out = F.scaled_dot_product_attention(q, k, v, mask)  # (B, N, T, H)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class DETREncoderLayer(nn.Module):
    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        D = config.d_model
        self.self_attn = DETRAttention(D, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, D)
        self.final_layer_norm = nn.LayerNorm(D)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x, positions (B, P, D); mask (B, 1, 1, P). Post-norm."""
        x = self.self_attn_layer_norm(x + self.self_attn(x + positions, x + positions, x, mask))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class DETRDecoderLayer(nn.Module):
    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        D = config.d_model
        self.self_attn = DETRAttention(D, config.decoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(D)
        self.encoder_attn = DETRAttention(D, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, D)
        self.final_layer_norm = nn.LayerNorm(D)

    def forward(
        self, x: Tensor, queries: Tensor, memory: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """x, queries (B, Q, D); memory, positions (B, P, D); mask (B, 1, 1, P). Post-norm."""
        x = self.self_attn_layer_norm(x + self.self_attn(x + queries, x + queries, x))
        attended = self.encoder_attn(x + queries, memory + positions, memory, mask)  # (B, Q, D)
        x = self.encoder_attn_layer_norm(x + attended)
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class DETR(Pretrained):
    """DetrForObjectDetection: ResNet, transformer encoder, Q object queries, two small heads."""

    config_class = DETRConfig

    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        self.config = config
        D = config.d_model
        self.backbone = ResNet(config)
        self.input_projection = nn.Conv2d(self.backbone.channels, D, 1)
        self.query_position_embeddings = nn.Embedding(config.num_queries, D)
        self.encoder = nn.Module()
        layers = (DETREncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder.layers = nn.ModuleList(layers)
        self.decoder = nn.Module()
        layers = (DETRDecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder.layers = nn.ModuleList(layers)
        self.decoder.layernorm = nn.LayerNorm(D)
        self.class_labels_classifier = nn.Linear(D, config.num_labels + 1)
        self.bbox_predictor = nn.Module()
        self.bbox_predictor.layers = nn.ModuleList(nn.Linear(D, out) for out in (D, D, 4))

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Object features (B, Q, D) of Multimodal-CoT: the last states after the decoder's norm.

        pixel_values (B, 3, Y, X), ImageNet-normalised; pixel_mask (B, Y, X), 1 where the image is,
        for batches of unequal sizes. (Padding changes activations at the border a little.)"""
        c5 = self.backbone(pixel_values)  # (B, C, h, w)
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values[:, 0].shape)  # (B, Y, X)
        valid = F.interpolate(pixel_mask[:, None].float(), c5.shape[-2:])[:, 0] > 0.5  # (B, h, w)
        positions = sine_positions(valid, self.config.d_model).to(c5.dtype)  # (B, P, D)
        mask = valid.flatten(1)[:, None, None, :]  # (B, 1, 1, P)
        x = self.input_projection(c5).flatten(2).transpose(1, 2)  # (B, P, D), row by row
        for layer in self.encoder.layers:
            x = layer(x, positions, mask)
        queries = self.query_position_embeddings.weight.expand(len(x), -1, -1)  # (B, Q, D)
        objects = torch.zeros_like(queries)  # (B, Q, D)
        for layer in self.decoder.layers:
            objects = layer(objects, queries, x, positions, mask)
        return self.decoder.layernorm(objects)  # (B, Q, D)

    def detect(self, objects: Tensor) -> Pair:
        """Features (..., D) -> class logits (..., L + 1), the last one "no object", and boxes
        (..., 4) as centre x, centre y, width, height, each in 0..1 of the image."""
        boxes = objects
        for layer in self.bbox_predictor.layers[:-1]:
            boxes = F.relu(layer(boxes))  # (..., D)
        boxes = self.bbox_predictor.layers[-1](boxes).sigmoid()  # (..., 4)
        return self.class_labels_classifier(objects), boxes  # (..., L + 1), (..., 4)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Pair:
        """(B, 3, Y, X) -> class logits (B, Q, L + 1) and boxes (B, Q, 4)."""
        return self.detect(self.features(pixel_values, pixel_mask))  # (B, Q, L + 1), (B, Q, 4)


# ---- SigLIP --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of a SigLIP; the defaults are transformers', and what configs leave out."""

    hidden_size: int = 768  # D
    intermediate_size: int = 3072  # F
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # N
    num_channels: int = 3
    image_size: int = 224  # Y, the images are squares
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2  # I


class SigLIPAttention(nn.Module):
    """Multi-head attention with biases, every patch to every patch."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:  # (B, I, D)
        q = split(self.q_proj(x), self.heads)  # (B, N, I, H)
        k = split(self.k_proj(x), self.heads)  # (B, N, I, H)
        v = split(self.v_proj(x), self.heads)  # (B, N, I, H)
        # Eq. attention (SigLIP): softmax(q k^T / sqrt(H)) v
        out = F.scaled_dot_product_attention(q, k, v)  # (B, N, I, H)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, I, D)


class VisionLayer(nn.Module):
    """A pre-norm block of SigLIP or, with another attention and the exact GELU, of a ViT."""

    def __init__(
        self, config: SigLIPConfig, attention: type = SigLIPAttention, gelu: str = "tanh"
    ) -> None:
        super().__init__()
        D = config.hidden_size
        self.gelu = gelu  # F.gelu's `approximate`
        self.layer_norm1 = nn.LayerNorm(D, config.layer_norm_eps)
        self.self_attn = attention(config)
        self.layer_norm2 = nn.LayerNorm(D, config.layer_norm_eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(D, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, D)

    def forward(self, x: Tensor) -> Tensor:  # (B, I, D)
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate=self.gelu)  # (B, I, F)
        return x + self.mlp.fc2(hidden)


def patch_states(patch_embedding: nn.Conv2d, pixels: Tensor, side: int) -> Tensor:
    """(B, 3, Y, Y) -> a vector for each patch (B, I, D), row by row. ValueError for other sides,
    for which there are no positions."""
    if pixels.shape[-2:] != (side, side):
        raise ValueError(f"This model reads {side} x {side} pixels, not {tuple(pixels.shape)}.")
    return patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, I, D)


class SigLIP(nn.Module):
    """SigLIP's vision transformer without its pooling head: one state per patch, no CLS token."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        patch = config.patch_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(config.num_channels, D, patch, patch)
        self.embeddings.position_embedding = nn.Embedding(config.patches, D)
        self.encoder = nn.Module()
        layers = (VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder.layers = nn.ModuleList(layers)
        self.post_layernorm = nn.LayerNorm(D, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, Y, Y) in -1..1 -> (B, I, D), row by row."""
        patch_embedding = self.embeddings.patch_embedding
        x = patch_states(patch_embedding, pixels, self.config.image_size)  # (B, I, D)
        # Eq. positions (SigLIP): a learned vector for each patch
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


# ---- ViT -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig(SigLIPConfig):
    """Sizes of a ViT; the defaults are those of timm's vit_large_patch32_384."""

    hidden_size: int = 1024  # D
    intermediate_size: int = 4096  # F
    num_hidden_layers: int = 24
    num_attention_heads: int = 16  # N
    image_size: int = 384  # Y
    patch_size: int = 32


class ViTAttention(nn.Module):
    """As SigLIP's, with one matrix for queries, keys and values."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:  # (B, I, D)
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, -1))  # (B, N, I, H)
        # Eq. attention (ViT): softmax(q k^T / sqrt(H)) v
        out = F.scaled_dot_product_attention(q, k, v)  # (B, N, I, H)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, I, D)


class ViT(Pretrained):
    """A vision transformer without its classifier: a state per patch, the class token's first."""

    config_class = ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, D))
        layers = (
            VisionLayer(config, ViTAttention, gelu="none") for _ in range(config.num_hidden_layers)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D, config.layer_norm_eps)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Image features (B, 1 + I, D) of Multimodal-CoT's second version: timm's forward_features.
        pixel_values (B, 3, Y, Y) in -1..1."""
        x = patch_states(self.patch_embedding, pixel_values, self.config.image_size)  # (B, I, D)
        cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        # Eq. positions (ViT): a learned vector for the class token and for each patch
        x = torch.cat((cls, x), 1) + self.pos_embed  # (B, 1 + I, D)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    forward = features


# ---- Gemma-2 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gemma2Config:
    """Sizes of a Gemma-2; the defaults are the 2B's, and what real PaliGemma2 configs leave out."""

    vocab_size: int = 256000  # V; PaliGemma 2 has 257216
    hidden_size: int = 2304  # D
    intermediate_size: int = 9216  # F
    num_hidden_layers: int = 26
    num_attention_heads: int = 8  # N
    num_key_value_heads: int = 4  # K
    head_dim: int = 256  # H; N * H need not be D
    query_pre_attn_scalar: float = 256  # scores are divided by its root, not by head_dim's
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int = 4096  # reach of the even layers
    layer_types: tuple = None  # None: sliding, full, sliding, full ...
    attn_logit_softcapping: float | None = 50.0  # None: off
    final_logit_softcapping: float | None = 30.0  # None: off

    def is_sliding(self, layer: int) -> bool:
        if self.layer_types:
            return self.layer_types[layer] == "sliding_attention"
        return layer % 2 == 0


class GemmaNorm(nn.Module):
    """RMSNorm as in Gemma: the stored weight is an offset from 1, and the cast comes last."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        # Eq. RMSNorm (Gemma): (1 + w) x / sqrt(mean(x^2) + eps)
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)  # (B, T, D)


def rotary_angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Pair:
    """cos and sin (B, 1, T, H) of positions (B, T): H/2 angles in fp32, for both halves."""
    # Eq. angles (RoPE): position * theta^(-2i / H)
    powers = torch.arange(0, width, 2, device=positions.device).float() / width  # (H/2,)
    angle = positions[:, None, :, None].float() * theta**-powers  # (B, 1, T, H/2)
    angle = torch.cat((angle, angle), -1)  # (B, 1, T, H)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): rotates x (..., T, H) by its position. Entry i is paired with
    i + H/2, as in Hugging Face's weights, not with its neighbour as in the paper."""
    first, second = x.chunk(2, -1)  # (..., T, H/2)
    # Eq. rotation (RoPE): (a, b) -> (a cos - b sin, b cos + a sin)
    return x * cos + torch.cat((-second, first), -1) * sin  # (..., T, H)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): close to x where small, never beyond the cap; None or 0: no cap."""
    # Eq. soft-cap (Gemma 2)
    return torch.tanh(x / cap) * cap if cap else x


def prefix_lm_mask(valid: Tensor, suffix: Tensor, new: int, window: int | None = None) -> Tensor:
    """Who sees whom: (B, 1, T, S) booleans for the last T = `new` of S tokens.

    valid, suffix (B, S): False at pads; True where the text is generated, one after the other.
    Image and prefix (p) see each other, the suffix (s) sees everything before it:

          p p p s s
        p 1 1 1 0 0
        p 1 1 1 0 0        With a window of 2 the s rows become 0 0 1 1 0 and 0 0 0 1 1: it
        p 1 1 1 0 0        limits what the suffix sees, but not what the prefix sees of itself.
        s 1 1 1 1 0
        s 1 1 1 1 1
    """
    position = valid.cumsum(1)  # (B, S), from 1, pads not counted
    query = position[:, -new:, None]  # (B, T, 1)
    key = position[:, None, :]  # (B, 1, S)
    allowed = key <= query  # (B, T, S)
    if window is not None:
        allowed = allowed & (key > query - window)
    both_prefix = ~suffix[:, -new:, None] & ~suffix[:, None, :]  # (B, T, S)
    return ((allowed | both_prefix) & valid[:, None, :])[:, None]  # (B, 1, T, S)


def mask_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Booleans -> 0 where True, the dtype's lowest number where False, to be added to scores."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


class GemmaAttention(nn.Module):
    """Grouped-query attention with RoPE and soft-capped scores. Each of the K key-value heads
    serves G = N / K consecutive query heads. Written out, because torch's SDPA cannot cap."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        c = config
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.scale = c.query_pre_attn_scalar**-0.5  # not head_dim^-0.5 in all sizes
        self.cap = c.attn_logit_softcapping
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.softmax = nn.Softmax(-1)  # a module, so that a hook can watch the weights

    def forward(
        self, x: Tensor, angles: Pair, bias: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """x (B, T, D), cos and sin (B, 1, T, H), additive mask (B, 1, T, S) -> (B, T, D). With a
        `LayerCache`, x holds the newest T of S tokens."""
        q = rotate(split(self.q_proj(x), self.heads), *angles)  # (B, N, T, H)
        k = rotate(split(self.k_proj(x), self.kv_heads), *angles)  # (B, K, T, H)
        v = split(self.v_proj(x), self.kv_heads)  # (B, K, T, H)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, H), of all tokens so far
        out = self.attend(q, k, v, bias)  # (B, N, T, H)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q (B, N, T, H), k and v (B, K, S, H), bias (B, 1, T, S) -> (B, N, T, H)."""
        # G queries share a key head: k and v are broadcast over them, not copied.
        q = q.unflatten(1, (self.kv_heads, -1))  # (B, K, G, T, H)
        k = k[:, :, None]  # (B, K, 1, S, H)
        v = v[:, :, None]  # (B, K, 1, S, H)
        # Eq. GQA (Gemma 2): softmax(cap tanh(q k^T s / cap) + bias) v
        scores = soft_cap(q @ k.transpose(3, 4) * self.scale, self.cap)  # (B, K, G, T, S)
        # The mask is finfo.min, not -inf: a query that may see nothing (a pad) would give NaN.
        weights = self.softmax((scores + bias[:, :, None]).float()).to(v.dtype)  # (B, K, G, T, S)
        return (weights @ v).flatten(1, 2)  # (B, N, T, H)


class GemmaMLP(nn.Module):
    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        # Eq. GEGLU (Gemma): GELU(x W_gate) * (x W_up)
        h = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)  # (B, T, F)
        return self.down_proj(h)  # (B, T, D)


class GemmaLayer(nn.Module):
    """Four norms: before and after attention, before and after the feed-forward."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaNorm(*norm)
        self.post_attention_layernorm = GemmaNorm(*norm)
        self.pre_feedforward_layernorm = GemmaNorm(*norm)
        self.post_feedforward_layernorm = GemmaNorm(*norm)

    def forward(
        self, x: Tensor, angles: Pair, bias: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        h = self.self_attn(self.input_layernorm(x), angles, bias, cache)  # (B, T, D)
        x = x + self.post_attention_layernorm(h)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(nn.Module):
    """The language model up to its final norm; the output layer is the embedding, transposed. With
    `checkpointing`, training keeps only each layer's input and computes the rest again."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (GemmaLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = GemmaNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), times sqrt(D)."""
        # The root is rounded to the embedding's dtype, as in the original.
        x = self.embed_tokens(input_ids)  # (B, T, D)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)

    def cache(self, B: int, length: int) -> Cache:
        """An empty cache for B rows of up to `length` tokens, prompt included."""
        c = self.config
        like = self.embed_tokens.weight
        sizes = (B, c.num_key_value_heads, length, c.head_dim)
        layers = [LayerCache(like, sizes) for _ in self.layers]
        no_flags = torch.zeros(B, 0, dtype=torch.bool, device=like.device)  # (B, 0)
        return Cache(layers, valid=no_flags, suffix=no_flags)

    def forward(
        self, x: Tensor, valid: Tensor, suffix: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Embeddings (B, T, D) and flags (B, T) as in `prefix_lm_mask` -> states (B, T, D). With a
        `Cache`, all three are of the newest tokens only."""
        c = self.config
        T = x.shape[1]
        if cache is not None:
            valid = torch.cat((cache.rows["valid"], valid), 1)  # (B, S)
            suffix = torch.cat((cache.rows["suffix"], suffix), 1)  # (B, S)
            cache.rows = {"valid": valid, "suffix": suffix}
        full = mask_bias(prefix_lm_mask(valid, suffix, T), x.dtype)  # (B, 1, T, S)
        sliding = full
        if valid.shape[1] > c.sliding_window:  # else the window hides nothing
            sliding = mask_bias(prefix_lm_mask(valid, suffix, T, c.sliding_window), x.dtype)
        positions = valid.cumsum(1)[:, -T:] - 1  # (B, T), from 0; pads take no position
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, x.dtype)  # (B, 1, T, H)
        for i, layer in enumerate(self.layers):
            bias = sliding if c.is_sliding(i) else full
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, angles, bias, use_reentrant=False)
            else:
                x = layer(x, angles, bias, cache and cache.layers[i])
        return self.norm(x)


# ---- PaliGemma 2 ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaliGemmaConfig:
    """A SigLIP, a Gemma-2, and the ids that join them."""

    vision: SigLIPConfig
    text: Gemma2Config
    image_token_index: int = 257152
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    @property
    def image_tokens(self) -> int:
        """Tokens per image: 256 at 224 pixels, 1024 at 448, 4096 at 896."""
        return self.vision.patches  # I


class PaliGemma(Pretrained):
    """PaliGemmaForConditionalGeneration with a Gemma 2: SigLIP's patch states, through one linear
    layer, replace the <image> tokens of a prefix language model."""

    config_class = PaliGemmaConfig

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = SigLIP(config.vision)
        projector = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear = projector
        self.language_model = Gemma2(config.text)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fan-in initialisation for training from scratch (the demo); norms stay as they are."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                p.zero_()

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, Y, Y) -> (n, I, D), in the place of embeddings but not multiplied by sqrt(D)."""
        weight = self.multi_modal_projector.linear.weight
        return self.multi_modal_projector.linear(self.vision_tower(pixel_values.to(weight.dtype)))

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T) ids -> states (B, T, D) after the final norm.

        attention_mask  0 at pads, on the left or on the right.
        token_type_ids  0 for image and prefix, 1 for the suffix; None is all prefix.
        image_features  (n, I, D) of the n rows with <image> tokens, in their order.
        """
        x = self.language_model.embed(input_ids)  # (B, T, D)
        is_image = input_ids == self.config.image_token_index  # (B, T)
        vectors = 0 if image_features is None else image_features.shape[:2].numel()
        decoding = cache is not None and cache.length > 0
        # An <image> id that the model itself generates stands for no image.
        tokens = [0] if decoding else is_image.sum(1).tolist()  # per row
        if sum(tokens) != vectors or any(count % self.config.image_tokens for count in tokens):
            text = f"The rows have {tokens} <image> tokens, but there are features for {vectors}"
            raise ValueError(f"{text}: each image needs {self.config.image_tokens}, uncut.")
        if vectors:
            features = image_features.to(x.dtype).flatten(0, 1)  # (n * I, D)
            x = x.masked_scatter(is_image[..., None], features)  # (B, T, D)
        ones = torch.ones_like(input_ids)
        valid = (ones if attention_mask is None else attention_mask).bool()  # (B, T)
        suffix = (ones * 0 if token_type_ids is None else token_type_ids).bool()  # (B, T)
        return self.language_model(x, valid, suffix, cache)

    def head(self, states: Tensor) -> Tensor:
        """(..., D) -> soft-capped logits (..., V)."""
        logits = F.linear(states, self.language_model.embed_tokens.weight)  # (..., V)
        return soft_cap(logits, self.config.text.final_logit_softcapping)  # (..., V)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V); see `states`. Give pixel_values (n, 3, Y, Y) or their features."""
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)  # (n, I, D)
        return self.head(self.states(input_ids, attention_mask, token_type_ids, image_features))

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_loops: bool = False,
        on_token: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Continue prompts (B, T), whose ends may be suffix already: new ids
        (B, <= max_new_tokens), EOS included, padded after it; greedy by default. The last four
        options are those of `decode`, the others those of `forward`."""
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)  # (n, I, D)
        cache = self.language_model.cache(len(input_ids), input_ids.shape[1] + max_new_tokens)
        states = self.states(input_ids, attention_mask, token_type_ids, image_features, cache)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
        pads = mask.int().flip(1).argmax(1)  # (B,), how many follow each prompt's last token
        last = states[torch.arange(len(pads), device=pads.device), -1 - pads]  # (B, D)
        logits = self.head(last)  # (B, V)
        return decode(
            self, logits, cache, max_new_tokens, temperature, generator, stop_loops, on_token
        )

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """The newest ids (B, 1) -> logits (B, V) of the next; the cache grows by one token."""
        states = self.states(ids, token_type_ids=torch.ones_like(ids), cache=cache)  # (B, 1, D)
        return self.head(states[:, -1])  # (B, V)


# ---- Decoding: one loop for every model that generates -------------------------------------------


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next ids (B,) from logits (B, V): arg-max, or a sample at `temperature`."""
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probabilities = torch.softmax(logits.float() / temperature, -1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (B,)


def looping(ids: Tensor, times: int = 4, least: int = 24) -> Tensor:
    """(B, U) ids -> (B,): whether a row ends in the same chunk `times` times in a row, `least` or
    more tokens in all. To stop at n-grams repeated anywhere would cut one in five of 335 thoughts
    of Gemini, which restate formulas; this rule cuts none (NOTES.md)."""
    found = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (B,)
    for period in range(1, ids.shape[1] // times + 1):
        length = max(times * period, least)
        if length <= ids.shape[1]:
            tail = ids[:, -length:]  # (B, length)
            found |= (tail[:, period:] == tail[:, :-period]).all(1)  # (B,)
    return found


@torch.inference_mode()
def decode(
    model: nn.Module,
    logits: Tensor,
    cache: Cache,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_loops: bool = False,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Generate up to `max_new_tokens` ids per row; rows that have finished leave the batch.

    logits (B, V) choose the first id; `model.step(ids (B, 1), cache) -> logits (B, V)` reads one
    more token per live row. With `stop_loops`, a row that repeats itself (see `looping`) ends too.
    `on_token(t, ids)` receives the ids of the live rows at step t (from 0) as soon as they are
    chosen. Returns (B, <= max_new_tokens) ids, EOS included, pads after a row's end.
    """
    pad_id = model.config.pad_token_id
    out = torch.full((len(logits), max_new_tokens), pad_id, device=logits.device)  # (B, U)
    rows = torch.arange(len(logits), device=logits.device)  # (live,), rows of `out`
    length = 0
    while length < max_new_tokens:
        ids = pick(logits, temperature, generator)  # (live,)
        out[rows, length] = ids
        if on_token:
            on_token(length, ids)
        length += 1
        stopped = ids == model.config.eos_token_id  # (live,)
        if stop_loops:
            stopped = stopped | looping(out[rows, :length])
        if stopped.any():
            alive = ~stopped
            rows = rows[alive]  # (live,)
            ids = ids[alive]  # (live,)
            if not len(rows):
                break
            cache.keep(alive)
        if length < max_new_tokens:
            logits = model.step(ids[:, None], cache)  # (live, V)
    return out[:, :length]


if __name__ == "__main__":  # --keys and --summary
    from support.checkpoints import summary

    summary.main({"t5": T5, "detr": DETR, "vit_large_patch32_384": ViT, "paligemma": PaliGemma})
