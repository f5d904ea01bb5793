"""support/dataset/images.py: odd and hostile files, DETR's and SigLIP's pixels."""

import contextlib
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from samples import write_image

import data
from support.dataset.images import detr_pixels, open_image, siglip_pixels, unusable


def test_unusable_problems(tmp_path):
    whole, torn = write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png")
    torn.write_bytes(torn.read_bytes()[:60])
    asked = data.Problem("e", "q", tuple("abcdefghijk"), "a", "", None, "", "", {})
    paths = {"a": whole, "b": torn, "c": tmp_path / "c.png", "d": None}
    problems = [replace(asked, id=i, choices=(), image=p and str(p)) for i, p in paths.items()]
    problems.append(asked)
    assert [id for id, _ in unusable(problems)] == ["c", "e"]
    reasons = dict(unusable(problems, open_image))
    assert list(reasons) == ["b", "c", "e"]
    assert "b.png" in reasons["b"] and "c.png" in reasons["c"] and "11" in reasons["e"]


def test_open_image(tmp_path, monkeypatch):
    translucent = write_image(tmp_path / "a.png", colour=(10, 20, 30, 0), mode="RGBA")
    assert open_image(translucent).getpixel((0, 0)) == (10, 20, 30)  # dropped, not blended
    with pytest.raises(FileNotFoundError, match="missing.png"):
        open_image(tmp_path / "missing.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:20], b"", b"<html>", b"GIF89a"):
        (tmp_path / "b.png").write_bytes(broken)
        with pytest.raises(ValueError, match="b.png"):
            open_image(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for size in ((40, 30), (400, 300)):  # PIL itself refuses only twice the limit
        with (
            pytest.warns() if size[0] == 40 else pytest.MonkeyPatch.context(),
            pytest.raises(ValueError, match="bomb.png .*pixels"),
        ):
            open_image(write_image(tmp_path / "bomb.png", size))


@pytest.mark.parametrize("ending", ("jpg", "png", "webp", "tiff"))
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright(tmp_path, ending, orientation):
    """However a phone was held: the red corner, written where that orientation has it, is at the
    top left. 0 and 9 are none."""
    upright = Image.new("RGB", (48, 32))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that undoes the camera's
    held = upright
    if orientation in turns:
        held = upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    held.save(path, exif=exif, **({"quality": 100} if ending in ("jpg", "webp") else {}))
    image = open_image(path)
    assert image.size == (48, 32)
    red, black = image.getpixel((4, 4)), image.getpixel((40, 28))
    assert red[0] > 200 and max(red[1:]) < 60 and max(black) < 40


def test_a_torn_exif_block_turns_nothing(tmp_path):
    image = Image.new("RGB", (30, 20), (9, 9, 9))
    for block in (b"", b"MM\0*\xff\xff\xff\xff", bytes(40), b"\xff" * 50):
        image.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
        assert open_image(tmp_path / "a.jpg").size == (30, 20)


def test_odd_images(tmp_path):
    red = Image.new("RGB", (16, 12), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    pixel = open_image(tmp_path / "cmyk.jpg").getpixel((3, 3))
    assert max(abs(a - b) for a, b in zip(pixel, (255, 0, 0), strict=True)) < 6
    red.convert("P").save(tmp_path / "palette.png", transparency=bytes(256))
    red.quantize(4).save(tmp_path / "still.png")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (16, 12))])
    for name in ("palette.png", "still.png", "moving.gif"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", None)  # nothing to warn of
            assert open_image(tmp_path / name).getpixel((3, 3)) == (255, 0, 0), name
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "deeper.tiff")
    for name in ("deep.png", "deeper.tiff"):
        grey = np.asarray(open_image(tmp_path / name))[..., 0]
        np.testing.assert_array_equal(grey, np.arange(256).reshape(16, 16))
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "bits.png")
    assert open_image(tmp_path / "bits.png").getpixel((2, 2)) == (255, 255, 255)
    Image.fromarray(np.eye(9, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="float.tiff"):
        open_image(tmp_path / "float.tiff")
    for size in ((1, 1), (10_000, 10)):
        path = write_image(tmp_path / "size.png", size)
        assert siglip_pixels(open_image(path), 14).shape == (3, 14, 14)


def chunk(kind, content):
    size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return size + kind + content + check


def test_hostile_images(tmp_path):
    bomb, path = zlib.compress(bytes(80_000_000)), tmp_path / "a.png"
    whole = write_image(path).read_bytes()
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        path.write_bytes(whole[:33] + chunk(kind, head + bomb) + whole[33:])
        with contextlib.suppress(ValueError):  # read without it or refused
            assert open_image(path).size == (40, 30)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(whole[:8] + chunk(b"IHDR", header) + whole[33:])
    with pytest.raises(ValueError, match="a.png .*60000"):
        open_image(path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(path)
    with pytest.raises(ValueError, match="cannot identify"):  # not handed to Ghostscript
        open_image(path)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (53, 760), (760, 333)])
def test_detr_pixels(size):
    """The shape rule of torchvision's Resize(224), ToTensor's scale, ImageNet's normalisation."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    resized = image.resize([int(224 * side / min(size)) for side in size], Image.BILINEAR)
    expected = np.asarray(resized, np.float32).transpose(2, 0, 1) / 255
    expected = expected - np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
    expected = expected / np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
    pixels = detr_pixels(image)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.numpy(), expected)
    with pytest.raises(ValueError, match="2 x 101"):
        detr_pixels(Image.new("RGB", (2, 101)))
    assert detr_pixels(Image.new("RGB", (2, 100)), 4).shape == (3, 200, 4)


@pytest.mark.parametrize("size", [(300, 200), (53, 760), (64, 64), (2, 500)])
def test_siglip_pixels(size):
    from transformers import SiglipImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    reference = SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=3)
    pixels = siglip_pixels(image, 56)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 56, 56)
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    white = siglip_pixels(Image.new("RGB", (9, 5), "white"), 14)
    assert white.min() == white.max() == 1
