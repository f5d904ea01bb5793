"""Images: a file becomes upright RGB, and that becomes the input pixels of DETR, ViT or SigLIP.

Multimodal-CoT's resizing for DETR and ViT (Zhang et al., arXiv 2302.00923), PaliGemma's for SigLIP
(Beyer et al., arXiv 2407.07726). No random crops and flips: they may change an answer.

Axes: H W pixels down and across, S both of a square, I image tokens.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from support.dataset.choices import lettered
from support.files import progress, regular_file

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # an EPS would start Ghostscript
ONE_LARGE = threading.Lock()  # an image takes up to 9 bytes a pixel while it is decoded


def open_image(path: str | Path) -> Image.Image:
    """The image in RGB, upright.

    As in the original, alpha is dropped and not blended, and of an animation the first frame is
    taken. The EXIF orientation is obeyed; the original ignores it, but no image of ScienceQA or
    MathVista is known to have one. 16 bits of grey are scaled to 8, where PIL would make all but
    the darkest white. FileNotFoundError, or ValueError for a file that is not a whole image and for
    one of over Image.MAX_IMAGE_PIXELS (89 million), which is not decoded.
    """
    try:
        with Image.open(regular_file(path), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            with ONE_LARGE if pixels > 1 << 24 else contextlib.nullcontext():
                return upright_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {path} does not exist.") from None
    except Exception as error:  # a broken file makes PIL's decoders raise almost anything
        raise ValueError(f"The image {path} cannot be read ({error}).") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with contextlib.suppress(Exception):  # a torn EXIF block rotates nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image) >> 8  # (H, W)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)  # dropped, without PIL's advice to keep it
    return image.convert("RGB")


def unit_pixels(image: Image.Image) -> torch.Tensor:
    """float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255  # (3, H, W)


def detr_pixels(image: Image.Image, size: int = 224) -> torch.Tensor:
    """DETR's input in Multimodal-CoT: float32 (3, H, W), the shorter side `size`, no crop.

    PIL's bilinear filter, which antialiases; the long side rounded down; ImageNet mean and
    deviation. Not the 800/1333 pixels of DETR's own preprocessor, which is for detection.
    """
    pixels = unit_pixels(resized(image, size, Image.Resampling.BILINEAR))  # (3, H, W)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def resized(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """The image with its shorter side at `size` and the long one rounded down, as torchvision."""
    short, long = sorted(image.size)
    if long > 50 * short:
        raise ValueError(f"{image.width} x {image.height} pixels: too narrow to resize")
    return image.resize([size * side // short for side in image.size], filter)


def vit_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """ViT's input in Multimodal-CoT: float32 (3, S, S) in [-1, 1], the middle of the image.

    timm's transform of this model for evaluation: the shorter side S (its crop_pct is 1) by PIL's
    bicubic filter, then the centre of the longer one; half pixels are rounded to even.
    """
    image = resized(image, size, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = unit_pixels(image.crop((left, top, left + size, top + size)))  # (3, S, S)
    return (pixels - 0.5) / 0.5


def siglip_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """SigLIP's input in PaliGemma: float32 (3, S, S) in [-1, 1], whatever the image's shape.

    PIL's bicubic filter, which antialiases, on 8 bits. transformers 5 resizes with torchvision by
    default, which differs by at most 2 of 255 grey levels.
    """
    pixels = unit_pixels(image.resize((size, size), Image.Resampling.BICUBIC))  # (3, S, S)
    return (pixels - 0.5) / 0.5


class LazyImages:
    """In place of `features.Features` where the image tower is trained too: pixels, decoded at each
    use. side: S, of the pixels; tokens: I, the number of <image> tokens for an image."""

    def __init__(self, problems: Sequence, side: int, tokens: int) -> None:
        self.paths = {p.id: p.image for p in problems if p.image is not None}
        self.side = side
        self.shape = (tokens,)

    def __contains__(self, id: str) -> bool:
        return id in self.paths

    def stored(self, id: str) -> "LazyImage":
        return LazyImage(self.paths[id], self.side)


@dataclass(frozen=True)
class LazyImage:
    """A file that is read when numpy asks for it: float32 (3, S, S)."""

    path: str
    side: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return siglip_pixels(open_image(self.path), self.side).numpy()


def unusable(
    problems: Sequence, check: Callable[[str], Any] = regular_file
) -> list[tuple[str, str]]:
    """[(problem id, reason)] of the problems that cannot be asked, in their order.

    check  has to succeed on an image's path: by default reading the file is possible; `open_image`
           decodes it whole.
    """

    def reason(problem: Any) -> tuple[str, str] | None:
        try:
            lettered(problem)
            if problem.image is not None:
                check(problem.image)
        except (OSError, ValueError) as error:
            return problem.id, str(error)

    start = time.monotonic()
    found = []
    with ThreadPoolExecutor(4) as pool:
        for count, pair in enumerate(pool.map(reason, problems), 1):
            found += [pair] if pair else []
            progress("problems", count, len(problems), start)
    return found
