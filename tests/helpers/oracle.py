"""The parity oracle: weights, pictures and configs that two sides can make without sharing a file.

No released weight can be had without a network, so every backbone is compared with the reference
implementation (transformers, and for DETR's ResNet timm) on made-up weights. `seeded_weights` is
bit-identical on every machine: `make_fixtures.py` fills the reference with it in one environment,
the tests fill our models with it in another, and only the expected outputs are committed.

The scales are large on purpose: with the usual 0.02 a missing norm, bias or scale stays below the
tolerance. Nothing here imports transformers until an oracle model is asked for.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
ATOL = 1e-4  # fp32, absolute; outputs are of order 1 to 10


# ---- numbers ------------------------------------------------------------------------------------


def uniform(name, shape, low, high, seed=0):
    """float32 in [low, high) from PCG64's raw bits, keyed by `name`: no libm, no version drift."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = np.random.PCG64(key).random_raw(int(np.prod(shape)) or 1)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    values = np.float32(low) + unit * np.float32(high - low)
    return torch.from_numpy(values[: int(np.prod(shape))].reshape(shape))


def seeded_weights(shapes, seed=0):
    """{name: tensor} for {name: shape}: one rule for T5, DETR and the fusion, by name and rank."""
    return {name: _tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def _tensor(name, shape, seed):
    if re.search(r"(bn\d|downsample\.1)\.", name):
        if name.endswith("running_var"):
            return uniform(name, shape, 0.5, 1.5, seed)
        if name.endswith(("running_mean", "bias")):
            return uniform(name, shape, -0.4, 0.4, seed)
        # bn3 closes a residual branch: a smaller weight keeps 33 stacked blocks from exploding
        low, high = (0.1, 0.4) if "bn3" in name else (0.5, 1.5)
        return uniform(name, shape, low, high, seed)
    if len(shape) == 1:
        centre = 1.0 if re.search(r"norm\d?\.weight$", name) else 0.0
        return uniform(name, shape, centre - 0.5, centre + 0.5, seed)
    if re.search(r"(?<!patch_)embed|cls_token|shared|relative_attention_bias", name):
        return uniform(name, shape, -1.7, 1.7, seed)  # standard deviation about 1
    bound = _gain(name) * (3 / np.prod(shape[1:])) ** 0.5  # deviation: gain / sqrt(fan_in)
    return uniform(name, shape, -bound, bound, seed)


def _gain(name):
    """How strong a matrix is, chosen so that outputs differ between positions and between queries
    and yet fp32 keeps 5 digits (make_fixtures.py and test_model.py print and check both)."""
    if re.search(r"Attention\.q\.", name):
        return 0.6  # T5 does not scale its attention logits
    if re.search(r"Attention\.o\.|\.wo\.", name):
        return 3.0  # else T5's residual stream is mostly the input token
    if re.search(r"\.wi_[01]\.", name):
        return 0.8  # their product grows with the square
    if re.search(r"[qk]_proj", name):
        return 2.4  # DETR is post-norm: sharp attention over modest values, or all queries
    return 0.7 if re.search(r"(v|out)_proj", name) else 1.5  # end up as one vector


def fingerprint(tensors):
    """sha256 over names, shapes and bytes: says whether both sides really had the same weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.hexdigest()


def key_patterns(shapes):
    """["2 x layers.{}.fc1.weight [48, 32]", ...]: a key listing short enough to commit and read."""
    counts = {}
    for name, shape in shapes.items():
        line = f"{re.sub(r'[.][0-9]+(?=[.])', '.{}', name)} {list(shape)}"
        counts[line] = counts.get(line, 0) + 1
    return sorted(f"{count} x {line}" for line, count in counts.items())


def write_checkpoint(folder, config, tensors, file="model.safetensors"):
    """config.json and one safetensors file as on the Hub; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / file, {"format": "pt"})
    return folder


def write_shards(folder, config, tensors):
    """As `write_checkpoint`, in three files and an index."""
    names = sorted(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        write_checkpoint(folder, config, part, file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- DETR ---------------------------------------------------------------------------------------

# Encoder and decoder differ in depth, heads and ffn width, and layer4 has a second block (whose
# dilation is what DC5 changes), so that nothing can be swapped unnoticed.
TINY_DETR = {
    "model_type": "detr",
    "backbone": "resnet50",
    "backbone_kwargs": {"layers": [2, 1, 1, 2], "channels": [8, 16, 24, 32]},
    "d_model": 32,
    "num_queries": 5,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 40,
    "id2label": {str(i): f"label {i}" for i in range(6)},
}
LABELS_91 = {str(i): f"label {i}" for i in range(91)}
# The released configs, cut down to what differs from the family's defaults.
DETR_CONFIGS = {
    "tiny": TINY_DETR,
    "tiny-dc5": TINY_DETR | {"dilation": True},
    # 4 * 16 = 64 = the stem's width, so layer1.0 has no downsample
    "tiny-plain-stem": TINY_DETR
    | {"backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 8, 8, 8]}},
    "detr-resnet-50": {"model_type": "detr", "backbone": "resnet50", "id2label": LABELS_91},
    "detr-resnet-101-dc5": {
        "model_type": "detr",
        "backbone": "resnet101",
        "dilation": True,
        "id2label": LABELS_91,
    },
}
# case -> (config, image shape, valid (height, width) of each row or None, outputs, query stride)
ALL = ("features", "logits", "boxes")
DETR_CASES = {
    "tiny": ("tiny", (1, 3, 75, 101), None, ALL, 1),
    "tiny-padded": ("tiny", (2, 3, 96, 85), [(96, 50), (60, 85)], ALL, 1),
    "tiny-dc5": ("tiny-dc5", (1, 3, 75, 101), None, ALL, 1),
    "tiny-dc5-padded": ("tiny-dc5", (2, 3, 96, 85), [(96, 50), (60, 85)], ALL, 1),
    "tiny-plain-stem": ("tiny-plain-stem", (1, 3, 64, 97), None, ("features",), 1),
    "detr-resnet-50": ("detr-resnet-50", (1, 3, 96, 131), None, ("features",), 4),
    "detr-resnet-101-dc5": ("detr-resnet-101-dc5", (1, 3, 96, 131), None, ("features",), 1),
}


def detr_inputs(case):
    """(pixel_values, pixel_mask or None) of a case; the padding is zeros."""
    _, shape, valid, _, _ = DETR_CASES[case]
    cells = uniform(f"cells/{case}", (*shape[:2], 8, 8), -2.0, 2.0)  # normalised pixels: +-2.6
    pixels = cells.repeat_interleave(17, 2).repeat_interleave(17, 3)[..., : shape[2], : shape[3]]
    pixels = pixels + uniform(f"noise/{case}", shape, -0.5, 0.5)  # white noise alone averages out
    if valid is None:
        return pixels, None
    mask = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    for row, (height, width) in enumerate(valid):
        mask[row, :height, :width] = 1
    return pixels * mask[:, None], mask


def detr_layout_c(name):
    """Hub name (layout A) -> the in-memory name of transformers 5 (layout C)."""
    name = name.replace("backbone.conv_encoder.model.", "backbone.model.")
    name = re.sub(r"(self_attn|encoder_attn)\.out_proj", r"\1.o_proj", name)
    return re.sub(r"(layers\.\d+)\.(fc[12])", r"\1.mlp.\2", name)


# ---- ViT ----------------------------------------------------------------------------------------

# As the Hub's config; sizes by timm's names, pairwise different.
VIT_CONFIGS = {
    "tiny": {
        "architecture": "vit_large_patch32_384",
        "num_classes": 5,
        "num_features": 24,
        "model_args": {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5}
        | {"img_size": 40, "patch_size": 8},
    },
    "released": {
        "architecture": "vit_large_patch32_384",
        "num_classes": 1000,
        "num_features": 1024,
        "global_pool": "token",
        "pretrained_cfg": {"input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "center"},
    },
}
# case -> (config, what the embeddings are multiplied by, stride over the states' numbers); where
# they are small, the eps of the norms matters.
VIT_CASES = {
    "tiny": ("tiny", 1, 1),
    "tiny-faint": ("tiny", 1e-3, 1),
    "released": ("released", 1, 8),
}


def vit_weights(shapes, faint):
    """Seeded weights by timm's names, those of the embeddings multiplied by `faint`."""
    weights = seeded_weights(shapes)
    first = "patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"
    return weights | {name: weights[name] * faint for name in first}


def vit_pixels(case):
    side = 40 if VIT_CASES[case][0] == "tiny" else 384
    return uniform(f"vit/{case}", (2, 3, side, side), -1.0, 1.0)


def noise_image(width, height):
    """An 8-bit image, the same on every machine."""
    from PIL import Image

    cells = uniform("image", (height, width, 3), 0, 256).to(torch.uint8)
    return Image.fromarray(cells.numpy())


IMAGES = ((61, 47), (33, 80), (40, 40))  # width and height


# ---- T5 -----------------------------------------------------------------------------------------

# pairwise different sizes; decoder deeper than the encoder
TINY_T5 = {
    "model_type": "t5",
    "vocab_size": 100,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 36,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def tiny_t5(version="v1.0", seed=0, **overrides):
    """(config as transformers 4 wrote it, HF model in eval mode with large seeded weights).

    v1.1 gets an lm_head of its own: built at random, transformers 5 would tie it.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    config = TINY_T5 | (V1_1 if version == "v1.1" else {}) | overrides
    hf = T5ForConditionalGeneration._from_config(
        T5Config.from_dict(config), attn_implementation="eager"
    )
    if version == "v1.1":
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
    names = t5_stored(hf)
    values = seeded_weights({name: t.shape for name, t in names.items()}, seed)
    with torch.no_grad():
        for name, tensor in names.items():
            tensor.copy_(values[name])
    return config, hf.eval()


def t5_stored(hf):
    """The tensors a Hub file holds (layout A): no embed_tokens aliases, lm_head only if untied."""
    state = hf.state_dict()
    tied = hf.lm_head.weight is hf.shared.weight
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    aliases |= {"lm_head.weight"} if tied else set()
    return {name: tensor for name, tensor in state.items() if name not in aliases}


def t5_stored_parameters(hf):
    """As t5_stored, but the parameters themselves, with their gradients."""
    stored = t5_stored(hf)
    return {name: p for name, p in hf.named_parameters() if name in stored}


def t5_batch(batch=3, source=11, target=7, vocab=100, seed=0):
    """input_ids, attention_mask (rows padded on the right by different amounts), decoder ids."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, vocab, (batch, source), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, batch):
        keep = max(1, source - 3 * row)
        input_ids[row, keep:], attention_mask[row, keep:] = 0, 0
    decoder_input_ids = torch.randint(2, vocab, (batch, target), generator=generator)
    decoder_input_ids[:, 0] = 0
    return input_ids, attention_mask, decoder_input_ids


# ---- PaliGemma ----------------------------------------------------------------------------------

# As the Hub's config, in small. Pairwise different sizes; N * H (48) is not D (24), G (3) is not K
# (2), the scale is neither H's nor D's, the window (6) is shorter than a prompt, and the top-level
# hidden_size misleads as it does there.
TINY_PALIGEMMA = {
    "model_type": "paligemma",
    "hidden_size": 2048,
    "image_token_index": 90,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "projection_dim": 24,
    "text_config": {
        "model_type": "gemma2",
        "vocab_size": 96,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 11,
        "sliding_window": 6,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 28,
        "projection_dim": 24,
        "vision_use_head": False,
    },
}
NEWLINE = 3


def paligemma_config(text=(), vision=(), **top):
    """TINY_PALIGEMMA with fields replaced; a value of ... leaves the field out."""
    parts = {"text_config": dict(text), "vision_config": dict(vision)}
    parts = {name: TINY_PALIGEMMA[name] | given for name, given in parts.items()}
    kept = {k: {f: v for f, v in part.items() if v is not ...} for k, part in parts.items()}
    return {k: v for k, v in (TINY_PALIGEMMA | kept | top).items() if v is not ...}


def paligemma_weights(shapes, seed=0):
    """{layout A name: tensor}, large enough for soft-caps, windows and norms to show."""
    return {name: _paligemma_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def _paligemma_tensor(name, shape, seed):
    if len(shape) == 1:  # Gemma's norms are stored as offsets from 1, SigLIP's are not
        centre = 1.0 if re.search(r"vision.*norm\d?\.weight$", name) else 0.0
        centre = 2.0 if re.search(r"layers.*post_.*norm\.weight$", name) else centre
        return uniform(name, shape, centre - 0.5, centre + 0.5, seed)  # post_: else the tied head
    if "position_embedding" in name:  # only repeats the token that came in
        return uniform(name, shape, -1.7, 1.7, seed)
    if "embed_tokens" in name:
        return uniform(name, shape, -1.0, 1.0, seed)
    gain = 1.7 if re.search(r"language_model.*[qk]_proj", name) else 1.0
    bound = gain * (3 / np.prod(shape[1:])) ** 0.5  # deviation: gain / sqrt(fan_in)
    return uniform(name, shape, -bound, bound, seed)


def paligemma_hub_name(name):
    """In-memory name of transformers 5 (layout C) -> the Hub file's (layout A)."""
    name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


def tiny_paligemma(seed=0, text=(), vision=(), **top):
    """(config as transformers 4 wrote it, HF model in eval mode with large seeded weights)."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = paligemma_config(text, vision, **top)
    hf = PaliGemmaForConditionalGeneration._from_config(
        PaliGemmaConfig.from_dict(json.loads(json.dumps(config))), attn_implementation="eager"
    )
    names = paligemma_stored(hf)
    values = paligemma_weights({name: t.shape for name, t in names.items()}, seed)
    with torch.no_grad():
        for name, tensor in names.items():
            tensor.copy_(values[name])
    return config, hf.eval()


def paligemma_stored(hf):
    """{name: parameter} as a Hub file holds them (layout A); lm_head is the embedding."""
    return {paligemma_hub_name(n): p for n, p in hf.named_parameters()}


def paligemma_batch(side="left", rows=((5, 8), (2, 5), (3, 1)), pictures=None, seed=0):
    """What both sides' forward takes, and labels: rows of (prefix, suffix) lengths.

    <image> * 4, <bos>, prefix, newline, suffix, <eos>, padded on `side`; suffix None is a prompt.
    `pictures` lists the rows that have one (None: all).
    """
    image, longest = TINY_PALIGEMMA["image_token_index"], 0
    words = torch.randint(4, image, (len(rows), 32), generator=torch.Generator().manual_seed(seed))
    pictures, made = range(len(rows)) if pictures is None else pictures, []
    for row, (prefix, suffix) in enumerate(rows):
        start = [image] * 4 * (row in pictures) + [2, *words[row, :prefix].tolist(), NEWLINE]
        end = [] if suffix is None else [*words[row, 16 : 16 + suffix].tolist(), 1]
        made.append((start, end))
        longest = max(longest, len(start + end))

    def padded(sequences, fill):
        gaps = [[fill] * (longest - len(values)) for values in sequences]
        pairs = zip(sequences, gaps, strict=True)
        return torch.tensor([v + gap if side == "right" else gap + v for v, gap in pairs])

    batch = {
        "input_ids": padded([s + e for s, e in made], 0),
        "attention_mask": padded([[1] * len(s + e) for s, e in made], 0),
        "token_type_ids": padded([[0] * len(s) + [1] * len(e) for s, e in made], 0),
        "labels": padded([[-100] * len(s) + e for s, e in made], -100),
    }
    if len(pictures):
        batch["pixel_values"] = uniform(f"pixels/{seed}", (len(pictures), 3, 28, 28), -1.0, 1.0)
    return batch


# case -> how its batch is made; the fixture has the logits and the loss of each
PALIGEMMA_CASES = {
    "left-padded": {},
    "right-padded": {"side": "right"},
    "one-picture": {"pictures": (1,)},
    "no-picture": {"pictures": ()},
}
# weights and prompts of which three rows end within 16 steps, each at another, and two never
SPEAKER = {"seed": 0, "eos_token_id": 22}
PROMPTS = {"rows": ((5, None), (1, None), (3, None), (7, None), (2, None)), "seed": 0}
STEPS = 16
