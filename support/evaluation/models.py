"""The models of a run and what they read: images and prompts.

`load_paligemma` gives the model that a run started from or trained, `image_features` the features
of images that a run's models read, made by DETR or by PaliGemma's own tower and kept on the disk.

Axes: B images, H W S pixels, n images of a batch, P I image positions, F D their width.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

import data
import lora
from model import DETR, PaliGemma, ViT
from support import files, kernels
from support.checkpoints.hub import build, resolve
from support.checkpoints.weights import weight_files
from support.dataset import images
from support.dataset.features import Features, cached_features, published_features
from support.training.settings import Settings

ENCODERS = {"detr": (DETR, images.detr_pixels), "vit": (ViT, images.vit_pixels)}  # by --vision


def load_paligemma(settings: Settings, folder: Path | None = None) -> PaliGemma:
    """The base model of a run and, if its folder has them, the adapter or weights trained there."""
    trained = folder is not None and (folder / "model.safetensors").is_file()
    weights = folder if trained else settings.weights[0]
    model = PaliGemma.from_pretrained(weights, getattr(torch, settings.dtype))
    if folder is not None and (folder / "adapter_model.safetensors").is_file():
        lora.load(model, folder)
    elif settings.adapter:
        lora.load(model, settings.adapter)
    if not settings.final_soft_cap:
        text = replace(model.config.text, final_logit_softcapping=None)
        model.config = replace(model.config, text=text)
    return model.to(settings.device).eval()


# --- the images they read
@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen image encoder: `preprocess(image, size)` gives pixels (3, H, W), `extract` a list
    of features (P, F) of a list of these."""

    extract: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    preprocess: Callable[[Image.Image, int], torch.Tensor]
    size: int


def feature_extractor(settings: Settings, model: PaliGemma | None = None) -> FeatureExtractor:
    """PaliGemma's own tower, with the projected features that replace the <image> tokens, or the
    run's DETR or ViT."""
    if model is None:
        encoder_class, preprocess = ENCODERS[settings.vision]
        folder = resolve(settings.vision_weights)
        extract = frozen_extract(encoder_class, folder, settings.device, settings.plain)
        size = settings.image_size
        if settings.vision == "vit":  # it has positions for one size
            size = build(ViT, folder).config.image_size
        return FeatureExtractor(extract, preprocess, size)

    @torch.inference_mode()
    def extract(pixels: list[torch.Tensor]) -> list[torch.Tensor]:
        device = model.multi_modal_projector.linear.weight.device
        stacked = torch.stack(pixels).to(device)  # (B, 3, S, S)
        return list(model.image_features(stacked).float().cpu())

    return FeatureExtractor(extract, images.siglip_pixels, model.config.vision.image_size)


def frozen_extract(encoder_class: type, folder: Path, device: str, plain: bool) -> Callable:
    """list of (3, H, W) -> list of (P, F), by a DETR or ViT."""

    @functools.cache
    def encoder() -> torch.nn.Module:  # not needed if all features are cached
        model = encoder_class.from_pretrained(folder).to(device, memory_format=torch.channels_last)
        if not plain:
            kernels.enable(model)
        return model

    @torch.inference_mode()
    def extract(pixels: list[torch.Tensor]) -> list[torch.Tensor]:
        results = [None] * len(pixels)
        # One size at a time: padding would change DETR's output.
        for size in Counter(tuple(p.shape) for p in pixels):
            rows = [i for i, p in enumerate(pixels) if tuple(p.shape) == size]
            stacked = torch.stack([pixels[i] for i in rows]).to(device)  # (B, 3, H, W)
            for i, features in zip(rows, encoder().features(stacked).cpu(), strict=True):
                results[i] = features  # (P, F)
        return results

    return extract


def image_features(
    settings: Settings,
    problems: list[data.Problem],
    model: PaliGemma | None = None,
    skipped: list[tuple[str, str]] | None = None,
) -> data.ImageSource | None:
    """The features that a run's models read of these problems' images; None if it reads none.

    Published feature files are used as they are. A PaliGemma `model` makes its own, projected;
    where its image tower is trained or adapted they are not kept, and `LazyImages` gives the
    pixels. The cache is named by a hash of the weights, not of the code that makes features of
    them. With a list `skipped`, problems whose image cannot be used go there, as (id, reason).
    """
    if model is not None:
        frozen = all(path.startswith("language_model.") for path in lora.adapters(model))
        if settings.full or not frozen:
            if skipped is not None:
                skipped += images.unusable(problems, images.open_image)
            size = model.config.vision.image_size
            return images.LazyImages(problems, size, model.config.image_tokens)
    elif settings.vision == "none":
        return None
    elif settings.features:
        return published_features(settings.features, settings.name_map)
    encoder = feature_extractor(settings, model)
    weights = weight_files(resolve(settings.weights[0] if model else settings.vision_weights))
    digests = [bytes.fromhex(files.checksum(path)) for path in weights]
    fingerprint = hashlib.sha256(b"".join(digests)).hexdigest()[:12]
    if model:
        dtype = model.language_model.embed_tokens.weight.dtype
        fingerprint += f"-{str(dtype).removeprefix('torch.')}"
    default = files.cache_folder() / "features" / f"{fingerprint}-{encoder.size}"
    cache = settings.features_cache or default
    return cached_features(
        problems, encoder.extract, fingerprint, encoder.size, cache, encoder.preprocess, skipped
    )


def feature_shape(settings: Settings) -> tuple[int, ...]:
    """(P, F) of the features that an mmcot run reads. Its encoder looks at a blank image."""
    if settings.features:
        return published_features(settings.features, settings.name_map).shape
    encoder = feature_extractor(settings)
    [features] = encoder.extract([torch.zeros(3, encoder.size, encoder.size)])
    return tuple(features.shape)


def question_features(
    settings: Settings, models: list, image: Image.Image | None
) -> Features | None:
    """`Features` of the problem "asked", zeros without an image; None for a model that reads none.
    ValueError for an image if the run learned from published features."""
    paligemma = settings.model == "paligemma"
    reads = image is not None if paligemma else models[-1].fusion is not None
    if not reads:
        return None
    if image is None:
        width = models[-1].fusion.image_dense.in_features
        zeros = np.zeros((1, 1, width), np.float16)  # (1, P, F)
        return Features(zeros, {})
    if not paligemma and settings.features:
        raise ValueError(
            f"This run learned from published features ({settings.features}), which no model here "
            "extracts from another image: ask without --image."
        )
    encoder = feature_extractor(settings, models[0] if paligemma else None)
    [features] = encoder.extract([encoder.preprocess(image, encoder.size)])  # (P, F)
    return Features(features[None].half().numpy(), {"asked": 0})  # half, as the cached ones


# --- the prompts they read
def load_problems(
    settings: Settings, split: str, skipped: list | None = None
) -> list[data.Problem]:
    """`data.load` of a run's data, with the captions that its prompts have."""
    captions = settings.captions if settings.model == "mmcot" else "none"
    return data.load(settings.data, split, skipped, captions)


def stage_examples(
    settings: Settings,
    problems: list[data.Problem],
    fmt: str,
    tokenizer: Tokenizer,
    features: data.ImageSource | None,
    generated: dict[str, str] | None = None,
) -> list[dict]:
    """`data.examples` of one stage of an mmcot run, `fmt` its prompt format."""
    return data.examples(
        problems,
        fmt,
        tokenizer,
        features,
        generated,
        max_input=settings.max_input,
        max_output=settings.max_output[-1 if "G" in fmt else 0],
        captions=settings.captions != "none",
        faithful=settings.faithful_text,
    )


def prompt_examples(
    settings: Settings,
    problems: list[data.Problem],
    tokenizer: Tokenizer,
    features: data.ImageSource | None,
) -> list[dict]:
    """`data.pali_examples` of the prompts of a paligemma run, without suffixes."""
    rows = [data.TrainRow(p, settings.recipe, has_suffix=False) for p in problems]
    limits = {"max_suffix": settings.max_suffix, "layout": settings.layout}
    return data.pali_examples(rows, tokenizer, features, **limits)


def paligemma_inputs(model: PaliGemma, batch: dict) -> dict[str, torch.Tensor]:
    """The arguments of `PaliGemma.states` in a batch of `data.pali_collate`. Features of images
    that are not cached (--full) are computed here, with gradients."""
    names = ("input_ids", "attention_mask", "token_type_ids", "image_features")
    inputs = {name: batch[name] for name in names if name in batch}
    if "pixel_values" in batch:
        inputs["image_features"] = model.image_features(batch["pixel_values"])  # (n, I, D)
    return inputs
