"""Pictures: a file becomes upright RGB, and that becomes the input pixels of DETR or of SigLIP.

Multimodal-CoT's resizing for DETR (Zhang et al., arXiv 2302.00923), PaliGemma's for SigLIP (Beyer
et al., arXiv 2407.07726); problems that cannot be asked. Files come from strangers: what is
no whole picture, or too large, is refused with a sentence.

Left out on purpose: what a model makes of the pixels and where that is kept (features.py); random
crops and flips, which may change an answer.

Axes: H W pixels down and across, S both of a square, I image tokens.
"""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from support.dataset.choices import lettered
from support.files import progress, regular_file

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # an EPS would start Ghostscript
_ONE_LARGE = threading.Lock()  # a picture takes up to 9 bytes a pixel while it is decoded


def open_image(path):
    """The picture in RGB, upright.

    As in the original, alpha is dropped and not blended, and of an animation the first frame is
    taken. The EXIF note of how a phone was held is obeyed, as every viewer does; the original does
    not, but no picture of ScienceQA or MathVista that was seen has one. 16 bits of grey are scaled
    to 8, where PIL would make all but the darkest white.
    Raises FileNotFoundError, or ValueError for a file that is no whole picture and for one of over
    Image.MAX_IMAGE_PIXELS (89 million), which is not decoded.
    """
    try:
        with Image.open(regular_file(path), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            with _ONE_LARGE if pixels > 1 << 24 else contextlib.nullcontext():
                return _upright_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {path} does not exist.") from None
    except Exception as error:  # a broken file makes PIL's decoders raise almost anything
        raise ValueError(f"The image {path} cannot be read ({error}).") from None


def _upright_rgb(image):
    image.load()
    with contextlib.suppress(Exception):  # a torn EXIF block turns nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image) >> 8  # (H, W)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)  # dropped, without PIL's advice to keep it
    return image.convert("RGB")


def detr_pixels(image, size=224):
    """What Multimodal-CoT shows DETR: float32 (3, H, W), the shorter side `size`, no crop.

    PIL's bilinear filter, which antialiases; the long side rounded down; ImageNet mean and
    deviation. Not the 800/1333 pixels of DETR's own preprocessor, which is for detection.
    """
    short, long = sorted(image.size)
    if long > 50 * short:
        raise ValueError(f"{image.width} x {image.height} pixels: too narrow to resize")
    image = image.resize([size * side // short for side in image.size], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255  # (3, H, W)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def siglip_pixels(image, size):
    """What PaliGemma shows SigLIP: float32 (3, S, S) in [-1, 1], whatever the picture's shape.

    PIL's bicubic filter, which antialiases, on 8 bits. transformers 5 resizes with torchvision by
    default, which differs by at most 2 of 255 grey levels.
    """
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255  # (3, S, S)
    return (pixels - 0.5) / 0.5


class Pictures:
    """In place of `features.Features` where the image tower is trained too: pixels, decoded at each
    use. side: S, of the pixels; tokens: I, how many <image> tokens stand for a picture."""

    def __init__(self, problems, side, tokens):
        self.paths = {p.id: p.image for p in problems if p.image is not None}
        self.side, self.shape = side, (tokens,)

    def __contains__(self, id):
        return id in self.paths

    def stored(self, id):
        return Picture(self.paths[id], self.side)


@dataclass(frozen=True)
class Picture:
    """A file that is read when numpy asks for it: float32 (3, S, S)."""

    path: str
    side: int

    def __array__(self, dtype=None, copy=None):
        return siglip_pixels(open_image(self.path), self.side).numpy()


def unusable(problems, look=None):
    """[(problem id, reason)] of the problems that cannot be asked, in their order.

    look  what has to be possible with a picture's path, by default only to read the file:
          `open_image` decodes it whole.
    """
    look, start, reasons = look or regular_file, time.monotonic(), []

    def reason(problem):
        try:
            lettered(problem)
            if problem.image is not None:
                look(problem.image)
        except (OSError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        for problem, why in zip(problems, pool.map(reason, problems), strict=True):
            reasons.append((problem.id, why))
            progress("problems", len(reasons), len(problems), start)
    return [pair for pair in reasons if pair[1] is not None]
