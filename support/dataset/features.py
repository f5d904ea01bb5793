"""Features that the image towers extract, kept on disk: our cache, and the published files.

`cached_features` computes each distinct image once; `published_features` reads the files of
Multimodal-CoT (Zhang et al., arXiv 2302.00923: DETR's, CLIP's, ResNet's and ViT's) by problem id.

Axes: N images of a file, each P positions of F features; H W pixels down and across.
"""

import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from support import files
from support.dataset.images import FORMATS, detr_pixels, open_image
from support.files import checksum, field, is_index, noted, read_json, regular_file

Extract = Callable[[list[torch.Tensor]], list[torch.Tensor]]
Pixels = Callable[[Image.Image, int], torch.Tensor]  # of (image, size), as detr_pixels


class Features:
    """Image features on disk: `features[id]` is float32 (P, F), as published zeros where no image
    is (`id not in features`)."""

    def __init__(self, array: np.ndarray, rows: dict[str, int]) -> None:
        self.array = array  # (N, P, F)
        self.rows = rows  # {id: row}
        self.shape = array.shape[1:]
        self.zeros = np.zeros(self.shape, array.dtype)

    def __contains__(self, id: str) -> bool:
        return id in self.rows

    def __getitem__(self, id: str) -> np.ndarray:
        return np.array(self.stored(id), np.float32)  # (P, F)

    def stored(self, id: str) -> np.ndarray:
        """The row (P, F) as it is on disk, fp16 as a rule, and not read before it is used."""
        return self.array[self.rows[id]] if id in self.rows else self.zeros


def stack_features(examples: Sequence[dict]) -> torch.Tensor:
    """The rows' features or pixels as one float32 tensor. ValueError if one is not finite: NaN
    would silently spread to everything."""
    stacked = np.stack([example["image_features"] for example in examples])
    stacked = torch.from_numpy(stacked).float()
    if not math.isfinite(stacked.sum()):  # far less work than isfinite of each number
        finite = stacked.flatten(1).isfinite().all(dim=1).tolist()
        bad = [e["id"] for e, ok in zip(examples, finite, strict=True) if not ok]
        if bad:  # else only the sum overflowed
            raise ValueError(f"The image features of {', '.join(bad)} are not finite.")
    return stacked


# --- The cache ------------------------------------------------------------------------------------


def cached_features(
    problems: Sequence,
    extract: Extract,
    fingerprint: str,
    size: int,
    folder: str | Path,
    pixels: Pixels = detr_pixels,
    skipped: list | None = None,
) -> Features:
    """Features of every distinct image of `problems`, computed once and kept in `folder`.

    extract      a list of up to 32 (3, H, W) of mixed sizes -> list of (P, F). It must not pad them
                 together: pads change DETR's output.
    fingerprint  a hash of the checkpoint. A cache of another one, or another size, is refused.
    skipped      a list: problems whose image cannot be used have no features and are added to it,
                 as (id, reason). By default the first one is the error.

    The folder holds features.npy, fp16 (N, P, F), and manifest.json: {"fingerprint", "size",
    "shape": [P, F], "rows": {sha256 of the image file: row}}. Only rows in the manifest count, so
    an interrupted run is resumed, and new images are added at the end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}  # {problem id: sha256 of its image}
    by_hash = {}  # {sha256: the last problem with that image}
    for problem in problems:
        if problem.image is not None:
            with noted(skipped, problem.id):
                hashes[problem.id] = image_hash(problem)
                by_hash[hashes[problem.id]] = problem
    with open(folder / "lock", "w") as writer:
        files.lock(writer)  # a second run waits, then finds the work done
        manifest = read_manifest(folder, fingerprint, size)
        rows = manifest["rows"]
        if manifest["shape"] is None:
            manifest["shape"] = list(extract([torch.zeros(3, size, size)])[0].shape)
        todo = [(sha, problem) for sha, problem in by_hash.items() if sha not in rows]
        todo.sort(key=lambda item: aspect_ratio(item[1]))  # equal sizes share a batch of `extract`
        before = len(rows)
        array = open_array(folder, manifest, before + len(todo))
        save_manifest(array, manifest, folder)
        start = time.monotonic()
        unusable = {}  # {sha256: reason}
        for items in decoded(todo, size, pixels):
            unusable |= add_rows(array, rows, items, extract)
            save_manifest(array, manifest, folder)
            if unusable and skipped is None:
                raise ValueError(next(iter(unusable.values())))
            files.progress("images", len(rows) + len(unusable) - before, len(todo), start)
    for id, sha in hashes.items():
        if sha in unusable:
            skipped.append((id, unusable[sha]))
    known = {id: rows[sha] for id, sha in hashes.items() if sha in rows}
    return Features(np.load(folder / "features.npy", mmap_mode="r"), known)


def aspect_ratio(problem: Any) -> float:
    """Width over height; 0 for a file that is not an image, which decoding will report."""
    try:
        with Image.open(problem.image, formats=FORMATS) as image:
            return image.width / image.height
    except Exception:
        return 0.0


def image_hash(problem: Any) -> str:
    try:
        return checksum(regular_file(problem.image))
    except (OSError, ValueError) as error:
        raise type(error)(f"Problem {problem.id}: the image {error}") from None


def read_manifest(folder: Path, fingerprint: str, size: int) -> dict:
    """manifest.json, checked; one without rows if there is none yet."""
    file = folder / "manifest.json"
    if not file.exists():
        return {"fingerprint": fingerprint, "size": size, "shape": None, "rows": {}}
    try:
        manifest = read_json(file)
        shape = field(manifest, "shape", list, file)
        rows = list(field(manifest, "rows", dict, file).values())
        counted = all(type(x) is int for x in rows + shape) and sorted(rows) == [*range(len(rows))]
        if not counted or len(shape) != 2 or min(shape) < 1 or math.prod(shape) > 10**8:
            raise ValueError(f"{file} does not list which image is in which row.")
        found = (field(manifest, "fingerprint", str, file), field(manifest, "size", int, file))
    except ValueError as error:
        raise ValueError(f"{error} Delete {folder}.") from None
    if found != (fingerprint, size):
        raise ValueError(
            f"The feature cache {folder} is of checkpoint {found[0]} at size {found[1]}, not "
            f"{fingerprint} at size {size}. Delete it or name another with --features-cache."
        )
    return manifest


def save_manifest(array: np.memmap, manifest: dict, folder: Path) -> None:
    array.flush()  # first the rows, then the list that counts them
    with files.atomic_write(folder / "manifest.json") as file:
        file.write(json.dumps(manifest))


def open_array(folder: Path, manifest: dict, count: int) -> np.memmap:
    """features.npy (N, P, F) open for writing with N >= count; grown by copying if need be."""
    file = folder / "features.npy"
    shape = tuple(manifest["shape"])
    old = np.zeros((0, *shape))
    if manifest["rows"]:
        try:
            old = np.load(regular_file(file), mmap_mode="r+")
            fits = old.dtype == np.float16 and old.shape[1:] == shape
            if not fits or len(old) < len(manifest["rows"]):
                raise ValueError("it does not fit its manifest")
        except Exception as error:  # numpy's reader of headers raises almost anything
            raise ValueError(f"{file} cannot be read ({error}). Delete {folder}.") from None
        if len(old) >= count:
            return old
    temporary = folder / "features.npy.part"
    array = np.lib.format.open_memmap(temporary, "w+", np.float16, (max(count, 1), *shape))
    array[: len(old)] = old
    os.replace(temporary, file)
    return array


def add_rows(array: np.memmap, rows: dict[str, int], items: list, extract: Extract) -> dict:
    """Add the features of (sha, problem, pixels) items to array and rows. Returns {sha: reason} of
    those that cannot be used."""
    unusable = {sha: pixels for sha, _, pixels in items if isinstance(pixels, str)}
    usable = [item for item in items if item[0] not in unusable]
    results = extract([pixels for *_, pixels in usable]) if usable else []
    for (sha, problem, _), features in zip(usable, results, strict=True):
        features = features.detach().cpu().half()  # fp16 ends at 65504
        if torch.isfinite(features).all():
            array[len(rows)] = features.numpy()  # (P, F)
            rows[sha] = len(rows)
        else:
            unusable[sha] = f"Problem {problem.id}: the features of its image are not finite."
    return unusable


def decoded(todo: list[tuple[str, Any]], size: int, pixels: Pixels) -> Iterator[list[tuple]]:
    """Lists of 32 (sha, problem, pixels), or the reason in place of pixels that cannot be had. A
    few threads decode the next list in advance."""

    def decode(item: tuple[str, Any]) -> tuple[str, Any, torch.Tensor | str]:
        sha, problem = item
        try:
            return sha, problem, pixels(open_image(problem.image), size)
        except (OSError, ValueError) as error:
            return sha, problem, f"Problem {problem.id}: {error}"

    with ThreadPoolExecutor(4) as pool:
        due = None
        for first in range(0, len(todo), 32):
            ahead = pool.map(decode, todo[first : first + 32])  # starts now
            if due:
                yield list(due)
            due = ahead
        if due:
            yield list(due)


# --- Published files ------------------------------------------------------------------------------

PUBLISHED = {
    "detr.npy": (100, 256),
    "clip.npy": (49, 2048),
    "resnet.npy": (2048,),
    "vit.pth": (145, 1024),
}


def local_file(where: str | Path) -> Path:
    """A file's path, or that of one on the Hub ("cooelf/vision_features/vit.pth"), downloaded."""
    parts = str(where).split("/", 2)
    if len(parts) < 3 or not all(parts) or os.path.exists(where):
        return Path(where)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2]))
    except Exception as error:  # the client raises its HTTP library's own errors when offline
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        text = f"{where} does not exist, and could not be fetched from the Hub ({why})."
        raise FileNotFoundError(text) from None


def published_features(path: str | Path, name_map: str | Path) -> Features:
    """The feature files of cooelf/vision_features, memory-mapped, by problem id: name_map is
    mm-cot's name_map.json, {problem id: row}. resnet.npy has one vector an image, used 512 times.
    """
    path = local_file(path)
    name_map = local_file(name_map)
    rows = field({"names": read_json(name_map)}, "names", dict, name_map)
    if path.name not in PUBLISHED:  # vit.npy is another model's: (11208, 577, 768)
        raise ValueError(
            f"{path} is not one of {', '.join(PUBLISHED)}, which the checkpoints read."
        )
    regular_file(path)
    needed = PUBLISHED[path.name]
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        else:
            mmap = zipfile.is_zipfile(path)
            array = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap).numpy()
        if array.shape[1:] != needed or array.dtype.kind != "f":
            found = f"{array.dtype} rows of {array.shape[1:]}"
            raise ValueError(f"{found}, not {needed}, of floats")
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not a feature file ({why}).") from None
    for id, row in rows.items():
        if not is_index(str(row)) or int(row) >= len(array):
            found = f"{id:.60} has row {row!s:.60}"
            raise ValueError(f"{name_map}: {found}, but {path} has {len(array)} rows.")
    if path.name == "resnet.npy":
        array = np.broadcast_to(array[:, None, :], (len(array), 512, 2048))  # no copy
    return Features(array, {id: int(row) for id, row in rows.items()})
