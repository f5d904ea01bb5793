"""support/dataset/features.py: the feature cache, whole, torn and shared; the published files."""

import hashlib
import itertools
import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from samples import with_images

from support.dataset.features import cached_features, published_features
from support.dataset.images import detr_pixels, open_image, siglip_pixels


class Extract:
    """A stand-in for DETR: three numbers of the image, (2, 3); counts its images."""

    def __init__(self, fail_after=None):
        self.sizes, self.fail_after = [], fail_after

    def __call__(self, pixels):
        if self.fail_after is not None and len(self.sizes) >= self.fail_after:
            raise KeyboardInterrupt
        self.sizes += [tuple(p.shape) for p in pixels]
        return [torch.stack([p.mean((1, 2)), p.amax((1, 2))]) for p in pixels]  # (2, 3)


def test_images_of_one_size_go_through_the_model_together(tmp_path):
    extract = Extract()
    cached_features(with_images(tmp_path / "set", 40), extract, "w", 32, tmp_path / "cache")
    assert len(set(extract.sizes[1:])) == 7  # sizes that take turns in the file
    assert len(list(itertools.groupby(extract.sizes[1:]))) == 7


def test_features_are_computed_once(tmp_path):
    problems, cache_ = with_images(tmp_path / "set", 5), tmp_path / "cache"
    extract = Extract()
    features = cached_features(problems, extract, "weights-1", 32, cache_)
    assert len(extract.sizes) == 1 + 5  # one to learn the shape, then each distinct image
    assert set(extract.sizes[1:]) == {(3, 32, 32 * (40 + i) // 30) for i in range(5)}
    for problem in problems:
        assert (problem.id in features) == (problem.id != "none")
        assert features[problem.id].dtype == np.float32 and features[problem.id].shape == (2, 3)
        if problem.image:
            pixels = detr_pixels(open_image(problem.image), 32)
            expected = extract([pixels])[0].half().float().numpy()
            np.testing.assert_array_equal(features[problem.id], expected)
    assert not features["none"].any() and not features["never heard of"].any()
    np.testing.assert_array_equal(features["copy"], features["0"])
    stored = np.load(cache_ / "features.npy", mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape == (5, 2, 3)
    manifest = json.loads((cache_ / "manifest.json").read_text())
    assert (manifest["fingerprint"], manifest["size"]) == ("weights-1", 32)
    sha = hashlib.sha256((tmp_path / "set/images/test/0/image.png").read_bytes()).hexdigest()
    assert manifest["shape"] == [2, 3] and sha in manifest["rows"]
    again = cached_features(problems, Extract(fail_after=0), "weights-1", 32, cache_)
    np.testing.assert_array_equal(again["3"], features["3"])


def test_feature_cache_of_another_checkpoint_or_size(tmp_path):
    problems = with_images(tmp_path / "set", 2)
    cached_features(problems, Extract(), "weights-1", 32, tmp_path / "cache")
    for other in (("weights-2", 32), ("weights-1", 48)):
        with pytest.raises(ValueError, match="weights-1 .*32") as caught:
            cached_features(problems, Extract(), *other, tmp_path / "cache")
        for word in (other[0], f"size {other[1]}", str(tmp_path / "cache"), "--features-cache"):
            assert word in str(caught.value)


def test_feature_cache_resumes_and_grows(tmp_path):
    problems, cache_ = with_images(tmp_path / "set", 80), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        cached_features(problems, Extract(fail_after=40), "w", 32, cache_)
    assert len(json.loads((cache_ / "manifest.json").read_text())["rows"]) == 64  # two chunks
    extract = Extract()
    first = cached_features(problems, extract, "w", 32, cache_)
    assert len(extract.sizes) == 16
    more = problems + with_images(tmp_path / "more", 3, start=100)[:3]
    extract = Extract()
    grown = cached_features(more, extract, "w", 32, cache_)
    assert len(extract.sizes) == 3
    fresh = cached_features(more, Extract(), "w", 32, tmp_path / "fresh")
    for problem in more:
        np.testing.assert_array_equal(grown[problem.id], fresh[problem.id])
    np.testing.assert_array_equal(first["79"], fresh["79"])
    assert not list(cache_.glob("*.part"))


def test_feature_cache_with_two_writers(tmp_path):
    problems, extract, made = with_images(tmp_path / "set", 40), Extract(), []

    def slow(pixels):
        time.sleep(0.05)
        return extract(pixels)

    def work():
        made.append(cached_features(problems, slow, "w", 32, tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(extract.sizes) == 41
    for problem in problems:
        np.testing.assert_array_equal(made[0][problem.id], made[2][problem.id])


def test_feature_cache_bad_input(tmp_path):
    problems, cache_ = with_images(tmp_path / "set", 3), tmp_path / "cache"
    broken = tmp_path / "set/images/test/1/image.png"
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(ValueError, match=f"Problem 1: .*{broken}"):
        cached_features(problems, Extract(), "w", 32, cache_)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match=f"Problem 1: .*{broken}"):
        cached_features(problems, Extract(), "w", 32, cache_)
    rest = [problem for problem in problems if problem.id != "1"]
    for value in (float("inf"), 70_000.0):  # the second is more than fp16 has
        extract = lambda pixels: [torch.full((2, 3), value) for _ in pixels]  # noqa: B023, E731
        with pytest.raises(ValueError, match=r"Problem \w+: "):
            cached_features(rest, extract, "w", 32, tmp_path / "infinite")
    cached_features(rest, Extract(fail_after=0), "w", 32, cache_)  # kept when the first one failed
    (cache_ / "features.npy").write_bytes((cache_ / "features.npy").read_bytes()[:100])
    with pytest.raises(ValueError, match=str(cache_)):
        cached_features(rest, Extract(), "w", 32, cache_)


MANIFESTS = [{"size": ...}, {"fingerprint": ...}]
MANIFESTS += [{"rows": rows} for rows in (..., [], {"a": 1}, {"a": 0, "b": 0}, {"a": "0"})]
MANIFESTS += [{"shape": x} for x in (None, [2], [2, "3"], [10**6, 10**6], [-2, -3])]


@pytest.mark.parametrize("changes", MANIFESTS, ids=str)
def test_bad_manifest(tmp_path, changes):
    problems, cache_ = with_images(tmp_path / "set", 2), tmp_path / "cache"
    cached_features(problems, Extract(), "w", 32, cache_)
    changed = json.loads((cache_ / "manifest.json").read_text()) | changes
    changed = {key: value for key, value in changed.items() if value is not Ellipsis}
    (cache_ / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"manifest.json.*Delete {cache_}"):
        cached_features(problems, Extract(), "w", 32, cache_)


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


BAD_ARRAYS = {
    "an archive": npz,
    "objects": lambda path: np.save(path, np.array([[None]]), allow_pickle=True),
    "wrong type": lambda path: np.save(path, np.zeros((9, 2, 3), np.int16)),
    "one number": lambda path: np.save(path, np.float16(1)),
    "a torn header": lambda path: path.write_bytes(path.read_bytes()[:9] + b"(" * 200),
}


@pytest.mark.parametrize("spoil", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, spoil):
    problems, cache_ = with_images(tmp_path / "set", 2), tmp_path / "cache"
    cached_features(problems, Extract(), "w", 32, cache_)
    spoil(cache_ / "features.npy")
    with pytest.raises(ValueError, match=f"features.npy .*Delete {cache_}"):
        cached_features(problems, Extract(), "w", 32, cache_)
    names = tmp_path / "names.json"
    names.write_text("{}")
    np.save(tmp_path / "resnet.npy", np.zeros((1, 2048), np.float16))
    spoil(tmp_path / "resnet.npy")
    with pytest.raises(ValueError, match="resnet.npy"):
        published_features(tmp_path / "resnet.npy", names)


def test_cached_features_of_siglip_pixels_and_of_no_image(tmp_path):
    problems, extract = with_images(tmp_path / "set", 3), Extract()
    features = cached_features(problems, extract, "w", 28, tmp_path / "cache", pixels=siglip_pixels)
    assert extract.sizes == [(3, 28, 28)] * 4  # squares, whatever the image's shape
    pixels = siglip_pixels(open_image(problems[1].image), 28)
    expected = Extract()([pixels])[0].half().float().numpy()
    np.testing.assert_array_equal(features[problems[1].id], expected)
    none = cached_features(problems[-1:], Extract(), "w", 28, tmp_path / "none")["none"]
    assert none.shape == (2, 3) and not none.any()


def test_published_features(tmp_path):
    names = tmp_path / "name_map.json"
    names.write_text(json.dumps({"11": "0", "12": "2"}))  # mm-cot's values are strings
    rng = np.random.default_rng(0)
    for kind, shape in (("detr", (100, 256)), ("clip", (49, 2048)), ("resnet", (2048,))):
        stored = rng.normal(size=(3, *shape)).astype(np.float16)
        np.save(tmp_path / f"{kind}.npy", stored)
        features = published_features(tmp_path / f"{kind}.npy", names)
        expected = np.repeat(stored[:, None], 512, 1) if kind == "resnet" else stored
        assert features.shape == expected.shape[1:] and features["12"].dtype == np.float32
        np.testing.assert_array_equal(features["12"], expected[2].astype(np.float32))
        assert "13" not in features and not features["13"].any()
        assert features["13"].shape == expected.shape[1:]
    stored = torch.randn(3, 145, 1024)
    torch.save(stored, tmp_path / "vit.pth")
    features = published_features(tmp_path / "vit.pth", names)
    np.testing.assert_array_equal(features["11"], stored[0].numpy())


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_published_features_bad_input(tmp_path):
    names, file = tmp_path / "names.json", tmp_path / "detr.npy"
    np.save(file, np.zeros((3, 100, 256), np.float16))
    for content in ([1], *({"12": row} for row in ("9" * 5000, "²", [0], -1, 3))):
        names.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="names.json: "):
            published_features(file, names)
    names.write_text(json.dumps({"12": 0}))
    np.save(file, np.zeros((3, 577, 768), np.float16))
    with pytest.raises(ValueError, match=r"\(577, 768\).*\(100, 256\)"):
        published_features(file, names)
    with pytest.raises(ValueError, match="vit.npy"):
        published_features(tmp_path / "vit.npy", names)
    with pytest.raises(FileNotFoundError, match="clip.npy"):
        published_features(tmp_path / "clip.npy", names)
    torch.save(Evil(str(tmp_path / "done")), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="vit.pth"):
        published_features(tmp_path / "vit.pth", names)
    assert not (tmp_path / "done").exists()
