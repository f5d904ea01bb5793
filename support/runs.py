"""A run taken up again: its config.json, the model it began with, and what its models see.

`run_config` reads the flags of a run folder that train.py wrote, or somebody else. `image_features`
gives the features of pictures that a run's models read, made by DETR or by PaliGemma's own tower
and kept on the disk; `asked_features` those of the one picture a question is about.

Left out: the weights a run trained with mmcot (`eval.load_run`), and the disk's side of features.

Axes: B pictures, H W S pixels, P I image positions, F D their width.
"""

import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import fusion
import lora
from model import DETR, PaliGemma, resolve, stored_tensors
from support import files, pictures
from support.features import Features, cached_features, published_features

RUN_FLAGS = {  # of a run's config.json, what is read here
    "model": str, "recipe": str, "data": str, "test_split": str, "device": str, "weights": list,
    "epochs": list, "seed": int, "max_output": list, "eval_batch_size": int, "commit": str | None,
    "traces": str | None, "adapter": str | None, "on_error": str | None,
}  # fmt: skip
PARTS = {"weights": str, "epochs": int | float, "max_output": int}  # of those that are lists
BLIND = ("caption", "none")  # --vision of a run that looks at no pictures


def run_config(folder):
    """A run folder's config.json; {} if it has none. ValueError for one that train.py never wrote.
    A flag that a run of an older version lacks is no fault here."""
    file = Path(folder) / "config.json"
    if not os.path.lexists(file):
        return {}
    config = files.read_json(file)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} is no run folder: its config.json is none of train.py's.")
    for key in RUN_FLAGS.keys() & config.keys():
        value, part = config[key], PARTS.get(key)
        fits = isinstance(value, RUN_FLAGS[key]) and not isinstance(value, bool)
        if not fits or part and not (value and all(isinstance(x, part) for x in value)):
            raise ValueError(f"{file}: {key} is {value!r:.60}, which train.py never writes.")
    known = {"mmcot": fusion.RECIPES, "paligemma": ("reason", "answer")}
    recipes = known.get(config["model"], ())
    if not recipes or config.get("recipe", "answer") not in recipes:
        kind = f"{config['model']!r:.40} with recipe {config.get('recipe')!r:.40}"
        raise ValueError(f"{file}: there is no model {kind}.")
    if config.get("test_split", "test") not in data.SPLITS:
        raise ValueError(f"{file}: there is no split {config['test_split']!r:.40}.")
    return config


def bad_records(config):
    """The list that a run's bad records go to with --on-error skip; None: the first is an error."""
    return [] if config.get("on_error") == "skip" else None


def check_device(device):
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"There is no device {device!r} that this torch can use: try --device cpu."
        )


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
            return pictures.Pictures(problems, side, tokens)
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
    for path in sorted({path for path, _ in stored_tensors(folder).values()}):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
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
