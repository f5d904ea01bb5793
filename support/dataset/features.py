"""What the image towers make of pictures, kept on disk: our cache, and the published files.

`Features` gives an example its picture; `cached_features` computes each distinct picture once and
keeps it; `published_features` reads the files of Multimodal-CoT (Zhang et al., arXiv 2302.00923:
DETR's, CLIP's, ResNet's and ViT's) by problem id.

Left out on purpose: the models, which come as a function; opening pictures (pictures.py).

Axes: N pictures of a file, each P positions of F features; H W pixels down and across.
"""

import json
import math
import os
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.dataset import images as pictures
from support.files import (
    atomic_write,
    checksum,
    field,
    is_index,
    lock,
    noted,
    progress,
    read_json,
    regular_file,
)


class Features:
    """Picture features on disk: `features[id]` is float32 (P, F), zeros without a picture.

    Zeros are the published behaviour; `id in features` says whether there is a picture.
    """

    def __init__(self, array, rows):
        self.array, self.rows, self.shape = array, rows, array.shape[1:]  # (N, P, F), {id: row}
        self.zeros = np.zeros(self.shape, array.dtype)

    def __contains__(self, id):
        return id in self.rows

    def __getitem__(self, id):
        return np.array(self.stored(id), np.float32)  # (P, F)

    def stored(self, id):
        """The row (P, F) as it is on disk, fp16 as a rule, and not read before it is used."""
        return self.array[self.rows[id]] if id in self.rows else self.zeros


def cached_features(
    problems, extract, fingerprint, size, folder, pixels=pictures.detr_pixels, skipped=None
):
    """Features of every distinct picture of `problems`, computed once and kept in `folder`.

    extract      list of (3, H, W) tensors -> list of (P, F) tensors. It gets up to 32 pictures of
                 mixed sizes and must not pad them together: pads change DETR's output.
    pixels       what makes a tensor of a picture: detr_pixels or siglip_pixels.
    fingerprint  a hash of the checkpoint. A cache of another one, or another size, is refused.
    skipped      a list: problems whose picture cannot be used have no features and are added to it,
                 as (id, reason). By default the first one is the error.

    The folder holds features.npy, fp16 (N, P, F), read by memory map, and manifest.json:
    {"fingerprint", "size", "shape": [P, F], "rows": {sha256 of the image file: row}}. Only rows in
    the manifest count, so an interrupted run is resumed, and new pictures are added at the end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictured, shas = [], []
    for problem in (problem for problem in problems if problem.image is not None):
        with noted(skipped, problem.id):
            shas.append(_image_sha(problem))
            pictured.append(problem)
    with open(folder / "lock", "w") as writer:
        lock(writer)  # a second run waits, then finds the work done
        manifest = _feature_manifest(folder, fingerprint, size)
        if manifest["shape"] is None:
            manifest["shape"] = list(extract([torch.zeros(3, size, size)])[0].shape)
        images = dict(zip(shas, pictured, strict=True))
        todo = [item for item in images.items() if item[0] not in manifest["rows"]]
        todo.sort(key=lambda item: _aspect(item[1]))  # equal sizes share a batch of `extract`
        array = _feature_array(folder, manifest, len(manifest["rows"]) + len(todo))
        _save_manifest(array, manifest, folder)
        skips = skipped is not None
        bad = _extract_into(array, manifest, todo, extract, pixels, folder, skips)
    rows = {}
    for problem, sha in zip(pictured, shas, strict=True):
        if sha in manifest["rows"]:
            rows[problem.id] = manifest["rows"][sha]
        else:
            skipped.append((problem.id, bad[sha]))
    return Features(np.load(folder / "features.npy", mmap_mode="r"), rows)


def _aspect(problem):
    """Width over height; 0 for a file that is no picture, which is said when it is decoded."""
    try:
        with Image.open(problem.image, formats=pictures.FORMATS) as image:
            return image.width / image.height
    except Exception:
        return 0.0


def _image_sha(problem):
    try:
        return checksum(regular_file(problem.image))
    except (OSError, ValueError) as error:
        raise type(error)(f"Problem {problem.id}: the image {error}") from None


def _feature_manifest(folder, fingerprint, size):
    file = folder / "manifest.json"
    if not file.exists():
        return {"fingerprint": fingerprint, "size": size, "shape": None, "rows": {}}
    try:
        manifest = read_json(file)
        shape = field(manifest, "shape", list, file)
        rows = list(field(manifest, "rows", dict, file).values())
        whole = all(type(x) is int for x in rows + shape) and sorted(rows) == list(range(len(rows)))
        if not whole or len(shape) != 2 or min(shape) < 1 or math.prod(shape) > 10**8:
            raise ValueError(f"{file} does not say which picture is in which row.")
        field(manifest, "fingerprint", str, file), field(manifest, "size", int, file)
    except ValueError as error:
        raise ValueError(f"{error} Delete {folder}.") from None
    if (manifest["fingerprint"], manifest["size"]) != (fingerprint, size):
        raise ValueError(
            f"The feature cache {folder} was made by checkpoint {manifest['fingerprint']} at size "
            f"{manifest['size']}, but this run has checkpoint {fingerprint} at size {size}. Delete "
            f"{folder} or name another folder with --features-cache."
        )
    return manifest


def _feature_array(folder, manifest, count):
    """features.npy (N, P, F) open for writing with N >= count; grown by copying if need be."""
    file, shape, old = folder / "features.npy", tuple(manifest["shape"]), np.zeros(0)
    if manifest["rows"]:
        try:
            old = np.load(regular_file(file), mmap_mode="r+")
            fits = old.dtype == np.float16 and old.shape[1:] == shape
        except Exception as error:  # numpy's reader of headers raises almost anything
            raise ValueError(f"{file} cannot be read ({error}). Delete {folder}.") from None
        if not fits or len(old) < len(manifest["rows"]):
            raise ValueError(f"{file} does not fit its manifest. Delete {folder}.")
        if len(old) >= count:
            return old
    temporary = folder / "features.npy.part"
    array = np.lib.format.open_memmap(temporary, "w+", np.float16, (max(count, 1), *shape))
    array[: len(old)] = old.reshape(-1, *shape)
    os.replace(temporary, file)
    return array


def _extract_into(array, manifest, todo, extract, pixels, folder, skips, chunk=32):
    """Add the features of each (sha, problem) of todo; {sha: why not} where that `skips`."""
    start, bad = time.monotonic(), {}
    decoded = _decoded([problem for _, problem in todo], manifest["size"], pixels, skips)
    for first in range(0, len(todo), chunk):
        items = [(*item, next(decoded)) for item in todo[first : first + chunk]]
        bad |= {sha: seen for sha, _, seen in items if isinstance(seen, str)}
        whole = [item for item in items if item[0] not in bad]
        made = extract([seen for *_, seen in whole]) if whole else []
        for (sha, problem, _), features in zip(whole, made, strict=True):
            features = features.detach().cpu().half()  # fp16 ends at 65504
            if not torch.isfinite(features).all():
                bad[sha] = f"Problem {problem.id}: the features of its image are not finite."
                if skips:
                    continue
                raise ValueError(bad[sha])
            array[len(manifest["rows"])] = features.numpy()  # (P, F)
            manifest["rows"][sha] = len(manifest["rows"])
        _save_manifest(array, manifest, folder)
        progress("images", first + len(items), len(todo), start)
    return bad


def _decoded(problems, size, pixels, skips, ahead=64):
    """The problems' pixels in order, where it `skips` the reason of those that cannot be had; a few
    threads decode at most `ahead` pictures in advance."""

    def decode(problem):
        try:
            return pixels(pictures.open_image(problem.image), size)
        except (OSError, ValueError) as error:
            reason = f"Problem {problem.id}: {error}"
            if skips:
                return reason
            raise ValueError(reason) from None

    with ThreadPoolExecutor(4) as pool:
        queue = deque()
        for problem in problems:
            queue.append(pool.submit(decode, problem))
            if len(queue) == ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _save_manifest(array, manifest, folder):
    array.flush()  # first the rows, then the list that says they are there
    with atomic_write(folder / "manifest.json") as file:
        file.write(json.dumps(manifest))


PUBLISHED = {
    "detr.npy": (100, 256),
    "clip.npy": (49, 2048),
    "resnet.npy": (2048,),
    "vit.pth": (145, 1024),
}


def published_features(path, name_map):
    """The feature files of cooelf/vision_features (PUBLISHED), memory-mapped, by problem id.

    name_map  mm-cot's name_map.json, {problem id: row}. It includes the problems whose only
              pictures are the choices'. resnet.npy has one vector a picture, used 512 times.
    """
    path = Path(path)
    rows = field({"names": read_json(name_map)}, "names", dict, name_map)
    if path.name not in PUBLISHED:  # vit.npy is another model's: (11208, 577, 768)
        raise ValueError(f"{path} is none of {', '.join(PUBLISHED)}, which the checkpoints read.")
    regular_file(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        else:
            mmap = zipfile.is_zipfile(path)
            array = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap).numpy()
        shape, kind = array.shape[1:], array.dtype.kind
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not a feature file ({why}).") from None
    if shape != PUBLISHED[path.name] or kind != "f":
        needed = f"{PUBLISHED[path.name]}, of floats"
        raise ValueError(f"{path} has {array.dtype} rows of {shape}, not {needed}.")
    for id, row in rows.items():
        if not is_index(str(row)) or int(row) >= len(array):
            found = f"{id:.60} has row {row!s:.60}"
            raise ValueError(f"{name_map}: {found}, but {path} has {len(array)} rows.")
    if path.name == "resnet.npy":
        array = np.broadcast_to(array[:, None, :], (len(array), 512, 2048))  # no copy
    return Features(array, {id: int(row) for id, row in rows.items()})
