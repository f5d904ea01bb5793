"""The plain backbones: T5 (UnifiedQA, FLAN) and DETR-ResNet; weight tables, loading, decoding.

T5    Raffel et al. 2020, arXiv 1910.10683; v1.1 (gated GELU, untied) is FLAN-T5's.
DETR  Carion et al. 2020, arXiv 2005.12872; ResNet v1.5 (He et al. 2016, stride in conv2).

What is worth knowing before reading:
  * T5 does not scale attention logits, has no biases, and one relative-position table per stack.
  * T5 v1.0 ties the output layer to the embedding and scales by D^-0.5 before it; v1.1 neither.
  * DETR's `features` are the last decoder states after the decoder's norm, as Multimodal-CoT's.
  * Weight names are data: one table per architecture, file name <-> our name, for both ways.

Left out on purpose: DETR's training half (matching, losses, dropout: here it is a frozen feature
extractor), T5 fp16 (it overflows; refused with a sentence), beam search.

Axes:
  B batch        T source length   U target length   S key length     D width       N heads
  H head width   F ffn width       V vocabulary      Q object queries P feature pixels (h*w)
  C channels     L classes
"""

import itertools
import json
import math
import os
import pickle
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# ----------------------------------------------------------------------------------------------
# Files: finding a checkpoint, reading its config, moving tensors by table
# ----------------------------------------------------------------------------------------------


def resolve(where):
    """A local folder for a directory or a Hub id ("allenai/unifiedqa-t5-base").

    Weights are fetched as safetensors; only a repository without any gives its pytorch_model.bin.
    Raises FileNotFoundError for a missing path or repository, PermissionError for a gated one,
    ConnectionError without network; each says what to do.
    """
    if Path(where).is_dir():
        return Path(where)
    if Path(where).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(where)):
        raise FileNotFoundError(
            f"{where} is neither a folder with config.json and weights nor a Hub id like org/name."
        )
    from huggingface_hub import errors, snapshot_download

    small = ["*.json", "spiece.model"]
    try:
        folder = Path(snapshot_download(where, allow_patterns=[*small, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(where, allow_patterns=[*small, "pytorch_model.bin"])
        return folder
    except errors.GatedRepoError as e:
        raise PermissionError(
            f"The Hub repository {where} is gated: accept its licence on its page, then log in "
            "with `hf auth login` or set HF_TOKEN."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise FileNotFoundError(
            f"The Hub has no repository {where}, or it is private and no token is set."
        ) from e
    except Exception as e:  # the client raises its HTTP library's own errors when offline
        raise ConnectionError(
            f"{where} is not a local folder and the Hub could not be reached "
            f"({type(e).__name__}). Download it elsewhere and pass the folder instead."
        ) from e


def read_config(folder, model_type):
    """config.json of `folder` as a dict; ValueError unless its model_type is `model_type`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a checkpoint folder needs its config.json."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}). Download it again.") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not a JSON object.")
    if config.get("model_type") != model_type:
        raise ValueError(
            f"{path} says model_type {config.get('model_type')!r}, but {model_type!r} is needed "
            "here: these weights belong to another architecture."
        )
    return config


def from_config(cls, config):
    """Dataclass `cls` from a config dict; absent and null fields keep the family's default."""
    names = {f.name for f in fields(cls)}
    return cls(**{k: v for k, v in config.items() if k in names and v is not None})


def convert_pickle(path):
    """Convert pytorch_model.bin once to model.safetensors beside it; returns the new path.

    Only tensors are unpickled (`weights_only=True`); a file that holds code is refused. Several
    names of one tensor (T5's tied embeddings) are stored once, as safetensors wants it.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is not a plain file of tensors and was not loaded ({reason}). Pickles that "
            "hold code are refused: use a safetensors version of these weights."
        ) from e
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise ValueError(f"{path} does not hold a dict of tensors, so it is no model's weights.")
    kept = {}
    for name in sorted(tensors, key=len):  # of several names the shortest: "shared.weight"
        t = tensors[name]
        kept.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else name, name)
    target = path.with_name("model.safetensors")
    write_safetensors({name: tensors[name] for name in kept.values()}, target)
    return target


def write_safetensors(tensors, path):
    """Write beside `path`, then rename: whoever has the old file mapped keeps a whole one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, {"format": "pt"})
    temporary.chmod(0o644)  # the library writes for the owner alone
    os.replace(temporary, path)


def stored_tensors(folder):
    """{name in the file: (path, shape)} over every weight file of a checkpoint folder."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        paths = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    elif single.is_file():
        paths = {single}
    elif (folder / "pytorch_model.bin").is_file():
        paths = {convert_pickle(folder / "pytorch_model.bin")}
    else:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors, model.safetensors.index.json nor "
            "pytorch_model.bin."
        )
    found = {}
    for path in sorted(paths):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    found[name] = (path, tuple(file.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} cannot be read as safetensors ({e}). Get it again.") from e
    return found


class KeyTable:
    """Names in a weight file <-> names in our module, as data; works in both directions.

    `rows` maps a file pattern to ours. `{}` stands for a layer index, `<a|b>` for each of a and b
    in turn (on both sides), "=" for the same name, None for a tensor that is known and skipped.
    `spellings` are (regex, replacement) pairs that bring the names other library versions write to
    the ones in `rows`.
    """

    IGNORED = re.compile(r"(num_batches_tracked|position_ids|rotary_emb\.inv_freq)$")

    def __init__(self, rows, spellings=()):
        self.rows, self.spellings = {}, spellings
        for theirs, ours in rows.items():
            ours = theirs if ours == "=" else ours
            names = self.expand(theirs)
            self.rows |= zip(names, self.expand(ours) if ours else [None] * len(names), strict=True)
        self.inverse = {ours: theirs for theirs, ours in self.rows.items() if ours}

    @staticmethod
    def expand(pattern):
        parts = re.split(r"<(.*?)>", pattern)
        choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
        return ["".join(chosen) for chosen in itertools.product(*choices)]

    @staticmethod
    def translate(name, rows):
        for pattern, target in rows.items():
            match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), name)
            if match:
                return target and target.format(*match.groups())
        return f"?{name}"  # no row: reported as unexpected by its own name

    def to_ours(self, name):
        """Our name for a file's tensor, None if it is to be skipped, "?name" if no row knows it."""
        if self.IGNORED.search(name):
            return None
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return self.translate(name, self.rows)

    def to_file(self, name):
        """The file's name (Hub layout) for one of our tensors."""
        return self.translate(name, self.inverse)


def load_weights(module, folder, table, dtype=torch.float32, skip=()):
    """Fill `module`, built on the meta device, from the checkpoint in `folder`; strict.

    Tensors are memory-mapped into place and copied only where `dtype` differs from the file's.
    `skip` names (ours) that the caller knows to be copies of another tensor.
    Raises ValueError that names each missing, unexpected and misshaped tensor as the file calls it.
    """
    check_dtype(dtype)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    unexpected, misshaped, by_file = [], [], {}
    for theirs, (path, shape) in stored_tensors(folder).items():
        ours = table.to_ours(theirs)
        if ours is None or ours in skip:
            continue
        if ours not in wanted:
            unexpected.append(theirs)
        elif wanted.pop(ours) != shape:
            expected = list(module.state_dict()[ours].shape)
            misshaped.append(f"{theirs}: file {list(shape)}, model {expected}")
        else:
            by_file.setdefault(path, []).append((theirs, ours))
    problems = {
        "missing": [table.to_file(name) for name in wanted],
        "unexpected": unexpected,
        "of another shape": misshaped,
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(v)} {k}: {', '.join(sorted(v))}" for k, v in problems.items() if v
        )
        raise ValueError(
            f"The weights in {folder} do not fit {type(module).__name__} as its config.json "
            f"describes it. Tensors {listed}."
        )
    tensors = {}
    for path, names in by_file.items():
        with safe_open(path, "pt") as file:
            for theirs, ours in names:
                tensors[ours] = file.get_tensor(theirs).to(dtype)
    module.load_state_dict(tensors, assign=True)
    return module


def save_weights(module, folder, table, config):
    """Write config.json and model.safetensors in the Hub's layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {table.to_file(name): t for name, t in module.state_dict().items()}
    write_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_dtype(dtype):
    if dtype == torch.float16:
        raise ValueError(
            "float16 is refused: T5 overflows in it and small gradients vanish. Use bfloat16 where "
            "the device is good at it, else float32."
        )


# ----------------------------------------------------------------------------------------------
# Decoding: one loop for every model that generates
# ----------------------------------------------------------------------------------------------


def pick(logits, temperature=0.0, generator=None):
    """The next ids (B,) from logits (B, V): arg-max, or a sample at `temperature`."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)  # (B, V)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (B,)


@torch.inference_mode()
def decode(
    step, cache, start_ids, max_new_tokens, eos_id, pad_id=0, temperature=0.0, generator=None
):
    """Generate up to `max_new_tokens` ids per row; rows that have finished leave the batch.

    `step(ids (B, 1), cache) -> logits (B, V)` runs the model on one more token per live row;
    `cache.keep(alive)` drops the rows for which the boolean (B,) is False.
    Returns (B, <= max_new_tokens) ids: EOS included, `pad_id` after it.
    """
    ids = start_ids
    out = torch.full((len(ids), max_new_tokens), pad_id, device=ids.device)  # (B, U)
    rows = torch.arange(len(ids), device=ids.device)  # which row of `out` each live row writes
    for t in range(max_new_tokens):
        ids = pick(step(ids[:, None], cache), temperature, generator)  # (B,)
        out[rows, t] = ids
        alive = ids != eos_id
        if not alive.all():
            rows, ids = rows[alive], ids[alive]
            if not len(rows):
                break
            cache.keep(alive)
    return out[:, : t + 1]


# ----------------------------------------------------------------------------------------------
# T5
# ----------------------------------------------------------------------------------------------


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
    scale_decoder_outputs: bool = None  # None: scaled iff tied (only transformers 5 writes the key)
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    @property
    def decoder_layers(self):
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def scaled(self):
        """Whether the decoder's output is multiplied by D^-0.5 before the vocabulary layer.

        transformers 5 writes tie_word_embeddings=true even for v1.1, so its own key goes first.
        """
        known = self.scale_decoder_outputs is not None
        return self.scale_decoder_outputs if known else self.tie_word_embeddings


T5_KEYS = KeyTable(
    {
        "shared.weight": "=",
        "lm_head.weight": "=",  # v1.1 only
        "<encoder|decoder>.embed_tokens.weight": None,  # copies of `shared`
        "<encoder|decoder>.final_layer_norm.weight": "=",
        "<encoder|decoder>.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            "<encoder|decoder>.relative_attention_bias.weight"
        ),
        "<encoder|decoder>.block.{}.layer.0.SelfAttention.<q|k|v|o>.weight": (
            "<encoder|decoder>.block.{}.self_attn.<q|k|v|o>_proj.weight"
        ),
        "<encoder|decoder>.block.{}.layer.0.layer_norm.weight": (
            "<encoder|decoder>.block.{}.self_attn_norm.weight"
        ),
        "decoder.block.{}.layer.1.EncDecAttention.<q|k|v|o>.weight": (
            "decoder.block.{}.cross_attn.<q|k|v|o>_proj.weight"
        ),
        "decoder.block.{}.layer.1.layer_norm.weight": "decoder.block.{}.cross_attn_norm.weight",
        # In some old files; cross-attention has no position bias and this must not be used.
        "decoder.block.{}.layer.1.EncDecAttention.relative_attention_bias.weight": None,
        "encoder.block.{}.layer.1.DenseReluDense.<wi|wi_0|wi_1|wo>.weight": (
            "encoder.block.{}.ffn.<wi|wi_0|wi_1|wo>.weight"
        ),
        "decoder.block.{}.layer.2.DenseReluDense.<wi|wi_0|wi_1|wo>.weight": (
            "decoder.block.{}.ffn.<wi|wi_0|wi_1|wo>.weight"
        ),
        "encoder.block.{}.layer.1.layer_norm.weight": "encoder.block.{}.ffn_norm.weight",
        "decoder.block.{}.layer.2.layer_norm.weight": "decoder.block.{}.ffn_norm.weight",
    }
)


class T5Norm(nn.Module):
    """RMSNorm as T5 does it: no mean, no bias, and the cast comes before the weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):  # (B, T, D)
        rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)  # (B, T, 1)
        return self.weight * (x * rms).to(self.weight.dtype)  # (B, T, D)


class T5Attention(nn.Module):
    """Multi-head attention without biases and without H^-0.5: T5 folds that into its init."""

    def __init__(self, config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.dropout = config.num_heads, config.dropout_rate
        self.q_proj = nn.Linear(config.d_model, inner, bias=False)
        self.k_proj = nn.Linear(config.d_model, inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.d_model, bias=False)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, S, N*H) -> (B, N, S, H)

    def keys_values(self, x):
        """x (B, S, D) -> k, v, each (B, N, S, H)."""
        return self.split(self.k_proj(x)), self.split(self.v_proj(x))

    def forward(self, x, k, v, bias):
        """x (B, T, D), k and v (B, N, S, H), additive bias (B or 1, N or 1, T, S) -> (B, T, D)."""
        q = self.split(self.q_proj(x))  # (B, N, T, H)
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=1.0)  # (B, N, T, H)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class T5FeedForward(nn.Module):
    """ReLU (v1.0) or gated tanh-GELU (v1.1); dropout sits between the activation and `wo`."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if not self.gated and config.feed_forward_proj != "relu":
            raise ValueError(
                f"T5 feed_forward_proj {config.feed_forward_proj!r} is not known here: "
                "released models use 'relu' (v1.0) or 'gated-gelu' (v1.1)."
            )
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x):  # (B, T, D)
        if self.gated:
            h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (B, T, F)
        else:
            h = F.relu(self.wi(x))  # (B, T, F)
        return self.wo(self.dropout(h))  # (B, T, D)


class T5Block(nn.Module):
    """Pre-norm block: self-attention, in the decoder cross-attention, feed-forward."""

    def __init__(self, config, is_decoder):
        super().__init__()
        norm = (config.d_model, config.layer_norm_epsilon)
        self.is_decoder = is_decoder
        self.self_attn, self.self_attn_norm = T5Attention(config), T5Norm(*norm)
        if is_decoder:
            self.cross_attn, self.cross_attn_norm = T5Attention(config), T5Norm(*norm)
        self.ffn, self.ffn_norm = T5FeedForward(config), T5Norm(*norm)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, bias, memory=None, memory_bias=None, cache=None):
        """x (B, T, D) -> (B, T, D). With a `T5LayerCache`, keys and values come from it."""
        h = self.self_attn_norm(x)
        k, v = self.self_attn.keys_values(h)
        if cache is not None:
            k, v = cache.append(k, v)
        x = x + self.dropout(self.self_attn(h, k, v, bias))
        if self.is_decoder:
            h = self.cross_attn_norm(x)
            k, v = self.cross_attn.keys_values(memory) if cache is None else (cache.ck, cache.cv)
            x = x + self.dropout(self.cross_attn(h, k, v, memory_bias))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def relative_bucket(distance, bidirectional, buckets=32, max_distance=128):
    """T5's bucket of a relative position `distance` = key position - query position (any shape).

    Half of the buckets are exact distances, the rest grow logarithmically up to `max_distance`,
    beyond which all share the last one. The encoder spends half of them on keys to the right.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    log = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (log * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5Stack(nn.Module):
    """Encoder or decoder: blocks that share one relative-position table, and a final norm."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        layers = config.decoder_layers if is_decoder else config.num_layers
        self.relative_attention_bias = nn.Embedding(
            config.relative_attention_num_buckets, config.num_heads
        )
        self.block = nn.ModuleList(T5Block(config, is_decoder) for _ in range(layers))
        self.final_layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def position_bias(self, start, end):
        """Bias (1, N, T, S) for the queries start..end-1 over the keys 0..end-1."""
        device = self.relative_attention_bias.weight.device
        distance = (
            torch.arange(end, device=device) - torch.arange(start, end, device=device)[:, None]
        )
        c = self.config
        bucket = relative_bucket(
            distance,
            not self.is_decoder,
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )  # (T, S)
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1)[None]  # (1, N, T, S)
        if self.is_decoder:
            bias = bias.masked_fill(distance > 0, torch.finfo(bias.dtype).min)
        return bias

    def forward(self, x, mask_bias=None, memory=None, memory_bias=None, cache=None):
        """x (B, T, D) embeddings -> (B, T, D) states, normed and dropped out."""
        start = cache.length if cache is not None else 0
        bias = self.position_bias(start, start + x.shape[1])  # (1, N, T, S)
        if mask_bias is not None:
            bias = bias + mask_bias  # (B, N, T, S)
        x = self.dropout(x)
        for i, block in enumerate(self.block):
            layer = cache.layers[i] if cache is not None else None
            x = block(x, bias, memory, memory_bias, layer)
        return self.dropout(self.final_layer_norm(x))


class T5LayerCache:
    """One decoder layer's keys and values: self-attention's grow in place, cross-attention's are
    computed once from the encoder's output."""

    def __init__(self, block, memory, length):
        self.ck, self.cv = block.cross_attn.keys_values(memory)  # (B, N, T, H)
        B, N, _, H = self.ck.shape
        self.k = memory.new_zeros(B, N, length, H)
        self.v = memory.new_zeros(B, N, length, H)
        self.length = 0

    def append(self, k, v):
        """k, v (B, N, U, H) of the new positions -> views on all positions so far."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]  # (B, N, S, H)

    def keep(self, alive):
        self.k, self.v = self.k[alive], self.v[alive]
        self.ck, self.cv = self.ck[alive], self.cv[alive]


class T5Cache:
    """Decoding state of a batch: a `T5LayerCache` per layer and the source mask."""

    def __init__(self, decoder, memory, memory_bias, length):
        self.layers = [T5LayerCache(block, memory, length) for block in decoder.block]
        self.memory_bias = memory_bias  # (B, 1, 1, T)

    @property
    def length(self):
        return self.layers[0].length

    def keep(self, alive):
        self.memory_bias = self.memory_bias[alive]
        for layer in self.layers:
            layer.keep(alive)


class T5(nn.Module):
    """T5ForConditionalGeneration: v1.0 (UnifiedQA, tied and scaled) and v1.1 (FLAN, untied)."""

    def __init__(self, config, tied=None):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder, self.decoder = T5Stack(config, False), T5Stack(config, True)
        tied = config.scaled if tied is None else tied
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, where, dtype=torch.float32):
        """Load from a folder or Hub id, in eval mode; strict, as `load_weights` says."""
        folder = resolve(where)
        config = from_config(T5Config, read_config(folder, "t5"))
        with torch.device("meta"):
            model = cls(config, tied=t5_is_tied(folder, T5_KEYS))
        skip = ("lm_head.weight",) if model.lm_head is None else ()
        return load_weights(model, folder, T5_KEYS, dtype, skip).eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors as the Hub has them."""
        save_weights(self, folder, T5_KEYS, self.hub_config("T5ForConditionalGeneration"))

    def hub_config(self, architecture):
        """config.json's content; the output scaling is spelled for 4.x and for 5.x readers."""
        config = asdict(self.config) | {
            "model_type": "t5",
            "architectures": [architecture],
            "is_encoder_decoder": True,
            "num_decoder_layers": self.config.decoder_layers,
            "tie_word_embeddings": self.lm_head is None,
            "scale_decoder_outputs": self.config.scaled,
        }
        return config

    @torch.no_grad()
    def init_weights(self, generator=None):
        """T5's own initialisation (mesh-tensorflow's), for training from scratch."""
        c = self.config
        std = {"q_proj": (c.d_model * c.d_kv) ** -0.5, "o_proj": (c.num_heads * c.d_kv) ** -0.5}
        std |= {"wo": c.d_ff**-0.5, "shared": 1.0, "lm_head": 1.0}
        for name, p in self.named_parameters():
            if p.dim() > 1:  # norms stay at one
                p.normal_(0.0, std.get(name.split(".")[-2], c.d_model**-0.5), generator=generator)

    def encode(self, input_ids, attention_mask):
        """(B, T) ids and mask -> encoder states (B, T, D)."""
        return self.encoder(self.shared(input_ids), self.mask_bias(attention_mask))

    def mask_bias(self, attention_mask):
        """(B, T) of ones and zeros -> additive (B, 1, 1, T): 0 or the dtype's lowest number."""
        dtype = self.shared.weight.dtype
        blocked = (1 - attention_mask[:, None, None, :]).to(dtype)  # (B, 1, 1, T)
        return blocked * torch.finfo(dtype).min

    def decode_states(self, decoder_input_ids, memory, memory_bias, cache=None):
        """(B, U) ids -> (B, U, D), ready for the vocabulary layer (v1.0's D^-0.5 is applied)."""
        x = self.decoder(self.shared(decoder_input_ids), None, memory, memory_bias, cache)
        return x * self.config.d_model**-0.5 if self.config.scaled else x

    def head(self, states):
        """(..., D) -> logits (..., V)."""
        return F.linear(states, (self.lm_head or self.shared).weight)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        """Teacher-forced logits (B, U, V) for (B, T) source ids and (B, U) shifted target ids."""
        memory = self.encode(input_ids, attention_mask)  # (B, T, D)
        states = self.decode_states(decoder_input_ids, memory, self.mask_bias(attention_mask))
        return self.head(states)  # (B, U, V)

    @torch.inference_mode()
    def generate(self, input_ids, attention_mask, max_new_tokens, temperature=0.0, generator=None):
        """New ids (B, <= max_new_tokens), EOS included, padded after it; greedy by default."""
        memory = self.encode(input_ids, attention_mask)
        return self.generate_from(memory, attention_mask, max_new_tokens, temperature, generator)

    @torch.inference_mode()
    def generate_from(
        self, memory, attention_mask, max_new_tokens, temperature=0.0, generator=None
    ):
        """As `generate`, from encoder states (B, T, D), perhaps fused with a picture."""
        c = self.config
        cache = T5Cache(self.decoder, memory, self.mask_bias(attention_mask), max_new_tokens)

        def step(ids, cache):  # (B, 1) -> (B, V)
            return self.head(self.decode_states(ids, None, cache.memory_bias, cache)[:, -1])

        start = torch.full((len(memory),), c.decoder_start_token_id, device=memory.device)  # (B,)
        ends = (c.eos_token_id, c.pad_token_id)
        return decode(step, cache, start, max_new_tokens, *ends, temperature, generator)


def t5_is_tied(folder, table):
    """Untied iff the file has its own lm_head that differs from `shared`.

    The config cannot tell: transformers 5 writes tie_word_embeddings=true for v1.1 as well.
    """
    files = {table.to_ours(n): (path, n) for n, (path, _) in stored_tensors(folder).items()}
    pair = [files[n] for n in files if n and n.split(".")[-2] in ("shared", "lm_head")]
    if len(pair) < 2:
        return True
    tensors = []
    for path, name in pair:
        with safe_open(path, "pt") as file:
            tensors.append(file.get_tensor(name))
    return torch.equal(*tensors)


# ----------------------------------------------------------------------------------------------
# DETR
# ----------------------------------------------------------------------------------------------

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

    @classmethod
    def from_hub(cls, config):
        """From config.json: transformers 5 moves the backbone's name into `backbone_config`, and
        the number of classes is only there as the length of `id2label`."""
        config = dict(config)
        config["backbone"] = config.get("backbone") or (config.get("backbone_config") or {}).get(
            "backbone"
        )
        config["num_labels"] = len(config["id2label"]) if config.get("id2label") else None
        return from_config(cls, config)

    @property
    def resnet(self):
        """(blocks per stage, width per stage) of the ResNet."""
        kwargs = self.backbone_kwargs or {}
        layers = kwargs.get("layers") or RESNET_LAYERS.get(self.backbone)
        if layers is None:
            raise ValueError(
                f"DETR backbone {self.backbone!r} is not known; {', '.join(RESNET_LAYERS)} are."
            )
        return tuple(layers), tuple(kwargs.get("channels") or (64, 128, 256, 512))


_NORM = "<weight|bias|running_mean|running_var>"
_LAYER = "<encoder|decoder>.layers.{}"
DETR_KEYS = KeyTable(
    {
        "model.backbone.conv_encoder.model.conv1.weight": "backbone.conv1.weight",
        f"model.backbone.conv_encoder.model.bn1.{_NORM}": f"backbone.bn1.{_NORM}",
        "model.backbone.conv_encoder.model.layer{}.{}.<conv1|conv2|conv3|downsample.0>.weight": (
            "backbone.layer{}.{}.<conv1|conv2|conv3|downsample.0>.weight"
        ),
        f"model.backbone.conv_encoder.model.layer{{}}.{{}}.<bn1|bn2|bn3|downsample.1>.{_NORM}": (
            f"backbone.layer{{}}.{{}}.<bn1|bn2|bn3|downsample.1>.{_NORM}"
        ),
        "model.<input_projection|decoder.layernorm>.<weight|bias>": (
            "<input_projection|decoder.layernorm>.<weight|bias>"
        ),
        "model.query_position_embeddings.weight": "query_position_embeddings.weight",
        f"model.{_LAYER}.self_attn.<q|k|v|out>_proj.<weight|bias>": (
            f"{_LAYER}.self_attn.<q|k|v|o>_proj.<weight|bias>"
        ),
        "model.decoder.layers.{}.encoder_attn.<q|k|v|out>_proj.<weight|bias>": (
            "decoder.layers.{}.encoder_attn.<q|k|v|o>_proj.<weight|bias>"
        ),
        f"model.{_LAYER}.<self_attn_layer_norm|final_layer_norm|fc1|fc2>.<weight|bias>": (
            f"{_LAYER}.<self_attn_layer_norm|final_layer_norm|fc1|fc2>.<weight|bias>"
        ),
        "model.decoder.layers.{}.encoder_attn_layer_norm.<weight|bias>": (
            "decoder.layers.{}.encoder_attn_layer_norm.<weight|bias>"
        ),
        "<class_labels_classifier|bbox_predictor.layers.{}>.<weight|bias>": "=",
    },
    spellings=(  # transformers 5's in-memory names
        (r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),
        (r"attn\.o_proj\.", "attn.out_proj."),
        (r"\.mlp\.(fc[12])\.", r".\1."),
    ),
)


class FrozenBatchNorm(nn.Module):
    """Batch norm whose four tensors are constants: y = x * s + (b - mean * s)."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):  # (B, C, h, w)
        # eps goes in before rsqrt: without it, channels that died in pretraining give nan.
        scale = self.weight * (self.running_var + 1e-5).rsqrt()  # (C,)
        shift = self.bias - self.running_mean * scale  # (C,)
        return x * scale[:, None, None] + shift[:, None, None]  # (B, C, h, w)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a residual; v1.5 puts the stride in the 3x3."""

    def __init__(self, inner, width, stride, dilation, project):
        super().__init__()
        outer = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), FrozenBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenBatchNorm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outer, 1, bias=False), FrozenBatchNorm(outer)
        self.downsample = nn.Identity()
        if project:
            conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, FrozenBatchNorm(outer))

    def forward(self, x):  # (B, C, h, w)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet v1.5 up to its last feature map C5; stride 32, or 16 with DC5."""

    def __init__(self, config):
        super().__init__()
        layers, channels = config.resnet
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), FrozenBatchNorm(64)
        inner = 64
        for i, (depth, width) in enumerate(zip(layers, channels, strict=True)):
            dc5 = config.dilation and i == 3
            stride, blocks = 1 if i == 0 or dc5 else 2, []
            for j in range(depth):
                # In DC5 the blocks after the first dilate; the first keeps dilation 1.
                project = j == 0 and (stride > 1 or inner != 4 * width or i > 0)
                block = Bottleneck(
                    inner, width, stride if j == 0 else 1, 2 if dc5 and j else 1, project
                )
                blocks.append(block)
                inner = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = inner

    def forward(self, pixels):
        """(B, 3, H, W) -> C5 (B, C, h, w)."""
        x = F.relu(self.bn1(self.conv1(pixels)))  # stride 2
        x = F.max_pool2d(x, 3, 2, 1)  # stride 4
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, C, h, w)


def sine_positions(mask, width):
    """DETR's 2-D positions: (B, h, w) valid mask -> (B, P, D), rows (y) first, then columns (x).

    Positions are normalised to 2*pi over the valid part, so padding does not shift them.
    """
    half = width // 2
    frequency = 10000 ** (2 * (torch.arange(half, device=mask.device) // 2) / half)  # (D/2,)
    encoded = []
    for axis in (1, 2):
        position = mask.float().cumsum(axis)  # (B, h, w), 1-based
        last = position[:, -1:, :] if axis == 1 else position[:, :, -1:]
        angle = (position / (last + 1e-6) * 2 * math.pi)[..., None] / frequency  # (B, h, w, D/2)
        pairs = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1)
        encoded.append(pairs.flatten(3))  # (B, h, w, D/2), sin and cos interleaved
    return torch.cat(encoded, -1).flatten(1, 2)  # (B, P, D)


class DETRAttention(nn.Module):
    """Multi-head attention with biases; positions go into queries and keys, never values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query, key, value, mask=None):
        """query (B, Q, D), key, value (B, S, D), mask (B, 1, 1, S) of valid keys -> (B, Q, D)."""
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected
        )  # (B, N, S, H)
        out = F.scaled_dot_product_attention(q, k, v, mask)  # softmax(q k^T / sqrt(H)) v
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, Q, D)


class DETREncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, ffn = config.d_model, config.encoder_ffn_dim
        self.self_attn = DETRAttention(D, config.encoder_attention_heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, ffn), nn.Linear(ffn, D)

    def forward(self, x, positions, mask):  # (B, P, D), (B, P, D), (B, 1, 1, P); post-norm
        x = self.self_attn_layer_norm(x + self.self_attn(x + positions, x + positions, x, mask))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class DETRDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, ffn, heads = config.d_model, config.decoder_ffn_dim, config.decoder_attention_heads
        self.self_attn, self.encoder_attn = DETRAttention(D, heads), DETRAttention(D, heads)
        self.self_attn_layer_norm, self.encoder_attn_layer_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, ffn), nn.Linear(ffn, D)
        self.final_layer_norm = nn.LayerNorm(D)

    def forward(self, x, queries, memory, positions, mask):  # (B, Q, D); post-norm
        x = self.self_attn_layer_norm(x + self.self_attn(x + queries, x + queries, x))
        seen = self.encoder_attn(x + queries, memory + positions, memory, mask)  # (B, Q, D)
        x = self.encoder_attn_layer_norm(x + seen)
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class DETR(nn.Module):
    """DetrForObjectDetection: ResNet, transformer encoder, Q object queries, two small heads."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.d_model
        self.backbone = ResNet(config)
        self.input_projection = nn.Conv2d(self.backbone.channels, D, 1)
        self.query_position_embeddings = nn.Embedding(config.num_queries, D)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(
            DETREncoderLayer(config) for _ in range(config.encoder_layers)
        )
        self.decoder.layers = nn.ModuleList(
            DETRDecoderLayer(config) for _ in range(config.decoder_layers)
        )
        self.decoder.layernorm = nn.LayerNorm(D)
        self.class_labels_classifier = nn.Linear(D, config.num_labels + 1)
        self.bbox_predictor = nn.Module()
        self.bbox_predictor.layers = nn.ModuleList(nn.Linear(D, out) for out in (D, D, 4))

    @classmethod
    def from_pretrained(cls, where, dtype=torch.float32):
        """Load from a folder or Hub id, in eval mode; strict, as `load_weights` says."""
        folder = resolve(where)
        config = DETRConfig.from_hub(read_config(folder, "detr"))
        with torch.device("meta"):
            model = cls(config)
        return load_weights(model, folder, DETR_KEYS, dtype).eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors as the Hub has them."""
        config = asdict(self.config) | {
            "model_type": "detr",
            "architectures": ["DetrForObjectDetection"],
            "use_timm_backbone": True,
            "id2label": {str(i): f"LABEL_{i}" for i in range(self.config.num_labels)},
        }
        config = {k: v for k, v in config.items() if v is not None}  # no empty backbone_kwargs
        save_weights(self, folder, DETR_KEYS, config)

    def features(self, pixel_values, pixel_mask=None):
        """Object features (B, Q, D): the last decoder layer's states after the decoder's norm.

        pixel_values (B, 3, H, W), ImageNet-normalised; pixel_mask (B, H, W), 1 where the picture
        is, for batches of unequal sizes. Padding changes activations at the border a little, so
        features for training are made one size at a time.
        """
        c5 = self.backbone(pixel_values)  # (B, C, h, w)
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values[:, 0].shape)  # (B, H, W)
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

    def detect(self, objects):
        """Features (B, Q, D) -> class logits (B, Q, L + 1), the last one "no object", and boxes
        (B, Q, 4) as centre x, centre y, width, height, each in 0..1 of the picture."""
        boxes = objects
        for layer in self.bbox_predictor.layers[:-1]:
            boxes = F.relu(layer(boxes))  # (B, Q, D)
        boxes = self.bbox_predictor.layers[-1](boxes).sigmoid()  # (B, Q, 4)
        return self.class_labels_classifier(objects), boxes

    def forward(self, pixel_values, pixel_mask=None):
        """(B, 3, H, W) -> class logits (B, Q, L + 1) and boxes (B, Q, 4)."""
        return self.detect(self.features(pixel_values, pixel_mask))
