"""The models of a run and what they see, loaded by its settings.

`load_paligemma` gives the model that a run began with or trained. `image_features` gives the
features of pictures that a run's models read, made by DETR or by PaliGemma's own tower and kept on
the disk; `asked_features` those of the one picture a question is about.

Left out: the weights a run trained with mmcot (`eval.load_run`), where the settings stand
(folders.py), and the disk's side of features (features.py).

Axes: B pictures, H W S pixels, P I image positions, F D their width.
"""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

import lora
from model import DETR, PaliGemma
from support import files
from support.checkpoints.hub import resolve
from support.checkpoints.weights import weight_files
from support.dataset import images as pictures
from support.dataset.features import Features, cached_features, published_features

BLIND = ("caption", "none")  # --vision of a run that looks at no pictures


def load_paligemma(config, folder=None):
    """The base model of a run and, if its folder has them, the adapter or weights trained there."""
    trained = folder is not None and (folder / "model.safetensors").is_file()
    where = folder if trained else config["weights"][0]
    model = PaliGemma.from_pretrained(where, getattr(torch, config["dtype"]))
    if folder is not None and (folder / "adapter_model.safetensors").is_file():
        lora.load(model, folder)
    elif config["adapter"]:
        lora.load(model, config["adapter"])
    if not config["final_soft_cap"]:
        text = replace(model.config.text, final_logit_softcapping=None)
        model.config = replace(model.config, text=text)
    return model.to(config["device"]).eval()


# --- what its models see
def image_features(config, problems, model=None, skipped=None):
    """The run's `Features` for these problems, or None if it looks at no pictures.

    Published feature files are used as they are. Otherwise DETR is loaded only if a picture is not
    in the cache, and sees one size at a time: padding would change its output. A PaliGemma `model`
    makes its own, projected; they are not kept where its image tower is trained or adapted. The
    cache is named by a hash of the weights, not of the code that makes features of them. With a
    list `skipped`, problems whose picture cannot be used go there, as (id, reason).
    """
    if model is not None:
        inside = [path.startswith("language_model.") for path in lora.adapters(model)]
        if config["full"] or not all(inside):
            if skipped is not None:
                skipped += pictures.unusable(problems, pictures.open_image)
            side, tokens = model.config.vision.image_size, model.config.image_tokens
            return pictures.LazyImages(problems, side, tokens)
    elif config["vision"] in BLIND:
        return None
    elif config["features"]:
        return published_features(config["features"], config["name_map"])
    folder = resolve(config["weights"][0] if model else config["vision_weights"])
    fingerprint = checkpoint_hash(folder) + (f"-{dtype_name(model)}" if model else "")
    extract, pixels, size = eyes(config, model)
    cache = config["features_cache"] or files.cache_folder() / "features" / f"{fingerprint}-{size}"
    return cached_features(problems, extract, fingerprint, size, cache, pixels, skipped)


def eyes(config, model=None):
    """(list of pixels -> list of features, picture -> pixels, size): PaliGemma's own, or DETR's."""
    if model is not None:
        return paligemma_extractor(model), pictures.siglip_pixels, model.config.vision.image_size
    extract = feature_extractor(resolve(config["vision_weights"]), config["device"])
    return extract, pictures.detr_pixels, config["image_size"]


def dtype_name(model):
    return str(model.language_model.embed_tokens.weight.dtype).removeprefix("torch.")


def paligemma_extractor(model):
    """list of (3, S, S) -> list of (I, D), projected: what takes the places of <image> tokens."""

    @torch.inference_mode()
    def extract(pixels):
        device = model.multi_modal_projector.linear.weight.device
        stacked = torch.stack(pixels).to(device)  # (B, 3, S, S)
        return list(model.image_features(stacked).float().cpu())

    return extract


def checkpoint_hash(folder):
    """Twelve hex digits over the weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(bytes.fromhex(files.checksum(path)))
    return digest.hexdigest()[:12]


def feature_extractor(folder, device):
    """list of (3, H, W) -> list of (P, F), the model loaded at the first call."""
    loaded = []

    @torch.inference_mode()
    def extract(pixels):
        if not loaded:
            model = DETR.from_pretrained(folder).to(device, memory_format=torch.channels_last)
            loaded.append(model)
        made = [None] * len(pixels)
        sizes = Counter(tuple(p.shape) for p in pixels)
        for size in sizes:
            rows = [i for i, p in enumerate(pixels) if tuple(p.shape) == size]
            stacked = torch.stack([pixels[i] for i in rows]).to(device)  # (B, 3, H, W)
            for i, features in zip(rows, loaded[0].features(stacked).cpu(), strict=True):
                made[i] = features  # (P, F)
        return made

    return extract


def asked_features(config, models, picture):
    """`Features` of the problem "asked"; None for a model that sees no picture."""
    paligemma = config["model"] == "paligemma"
    if picture is None:
        seen = None if paligemma else models[-1].fusion
        width = seen and seen.image_dense.in_features
        return width and Features(np.zeros((1, 1, width), np.float16), {})
    if not paligemma and config["vision"] in BLIND:
        return None
    if not paligemma and config["features"]:
        raise ValueError(
            f"This run learned from published features ({config['features']}): there is no model "
            "here that makes them of another picture. Ask without --image."
        )
    extract, pixels, size = eyes(config, models[0] if paligemma else None)
    made = extract([pixels(picture, size)])[0][None].half().numpy()  # (1, P, F), as cached
    return Features(made, {"asked": 0})
