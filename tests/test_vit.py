"""ViT, the image encoder of Multimodal-CoT's second version, against timm's golden fixture
(tests/helpers/make_fixtures.py), and runs that read images with it."""

import json
import re
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT
from oracle import ATOL
from pairs import close, file_names
from safetensors.torch import load_file
from small_runs import lines_of, settings

import data
import eval as evaluation
import fusion
import train
from model import ViT, ViTConfig
from support import files
from support.checkpoints import hub
from support.checkpoints.keys import VIT_KEYS
from support.dataset.images import open_image, vit_pixels
from support.dataset.tokenizers import load_tokenizer
from support.evaluation.models import stage_examples
from support.files import read_json
from support.training.settings import VIT, read_settings

GOLDEN = json.loads((oracle.FIXTURES / "vit.json").read_text())
OUTPUTS = load_file(oracle.FIXTURES / "vit.safetensors")


def shapes(name):
    """{timm's name: shape} of a whole checkpoint, the classifier included."""
    config = oracle.VIT_CONFIGS[name]
    with torch.device("meta"):
        made = file_names(VIT_KEYS, ViT(hub.model_config(ViT, config)))
    width = made["norm.weight"][0]
    head = {"head.weight": (config["num_classes"], width), "head.bias": (config["num_classes"],)}
    return {name: tuple(shape) for name, shape in (made | head).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def written(case):
        name, faint, _ = oracle.VIT_CASES[case]
        path = tmp_path_factory.mktemp(case)
        weights = oracle.vit_weights(shapes(name), faint)
        return oracle.write_checkpoint(path, oracle.VIT_CONFIGS[name], weights)

    return written


@torch.no_grad()
def states(vit, case):
    return vit.features(oracle.vit_pixels(case))[:, ::4, :: oracle.VIT_CASES[case][2]]


@pytest.mark.parametrize(
    "case", ["tiny", "tiny-faint", pytest.param("released", marks=pytest.mark.slow)]
)
def test_vit_equals_timm(case, folder):
    expected = OUTPUTS[case]
    assert expected.std(dim=1).mean() > 100 * ATOL  # the patches differ
    close(states(ViT.from_pretrained(folder(case)), case), expected)


def test_gelu_and_eps_matter(folder):
    """Otherwise the cases above would not tell."""
    vit = ViT.from_pretrained(folder("tiny"))
    for layer in vit.layers:
        layer.gelu = "tanh"
    assert (states(vit, "tiny") - OUTPUTS["tiny"]).abs().max() > 3 * ATOL
    vit = ViT.from_pretrained(folder("tiny-faint"))
    for norm in (module for module in vit.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.eps = 1e-5
    assert (states(vit, "tiny-faint") - OUTPUTS["tiny-faint"]).abs().max() > 100 * ATOL


@pytest.mark.parametrize("name", oracle.VIT_CONFIGS)
def test_vit_full_shapes_by_key(name):
    found = shapes(name)
    assert oracle.key_patterns(found) == GOLDEN["configs"][name]["keys"]
    elements = sum(torch.Size(shape).numel() for shape in found.values())
    assert elements == GOLDEN["configs"][name]["elements"]
    if name == "released":
        assert hub.model_config(ViT, oracle.VIT_CONFIGS[name]) == ViTConfig()
        assert ViTConfig().patches + 1 == 145  # times 1024, as vit.pth


def test_vit_round_trip(folder, tmp_path):
    vit = ViT.from_pretrained(folder("tiny"))
    vit.save_pretrained(tmp_path)
    again = ViT.from_pretrained(tmp_path)
    assert again.config == vit.config
    assert torch.equal(states(again, "tiny"), states(vit, "tiny"))


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "vit_base_patch32_384"}, {"model_args": {"num_heads": 5}}, {"model_args": 5},
     {"model_args": {"embed_dim": "x"}}, {"model_args": {"depth": 3}}],
)  # fmt: skip
def test_a_vit_config_of_no_model_or_of_another(changes, tmp_path):
    weights = oracle.vit_weights(shapes("tiny"), 1)
    oracle.write_checkpoint(tmp_path, oracle.VIT_CONFIGS["tiny"] | changes, weights)
    with pytest.raises(ValueError, match=str(tmp_path)):
        ViT.from_pretrained(tmp_path)


def test_other_pixels_are_an_error():
    with pytest.raises(ValueError, match="40 x 40"):
        ViT(hub.model_config(ViT, oracle.VIT_CONFIGS["tiny"]))(torch.zeros(1, 3, 40, 48))


@pytest.mark.parametrize("flag", ["--keys", "--summary"])
def test_keys_and_summary(flag, folder):
    command = [sys.executable, "model.py", flag, str(folder("tiny"))]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("blocks.1.attn.qkv.weight" if flag == "--keys" else "(B, 26, 24)") in ran.stdout


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", oracle.IMAGES)
def test_vit_pixels_are_those_of_timms_transform(width, height):
    pixels = vit_pixels(oracle.noise_image(width, height), 40)
    assert pixels.dtype == torch.float32 and pixels.min() >= -1 and pixels.max() <= 1
    grey = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(grey, OUTPUTS[f"image/{width}x{height}"])


def test_the_released_model_is_read_in_the_middle_of_an_image():
    assert GOLDEN["transform"] == {"crop_pct": 1.0, "interpolation": "bicubic"}
    image = oracle.noise_image(300, 200)
    assert vit_pixels(image, 384).shape == (3, 384, 384)
    with pytest.raises(ValueError, match="2 x 101"):
        vit_pixels(image.resize((2, 101)), 4)


# ---- runs ----------------------------------------------------------------------------------------

TINY = ViTConfig(24, 36, 2, 3, image_size=48, patch_size=16)
SHORT = """--model mmcot --vision vit --captions demo --limit 8 --epochs 1 --max-steps 1
    --batch-size 4 --max-output 6 4 --device cpu""".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a random ViT for the demo."""
    torch.manual_seed(0)
    vit = ViT(TINY)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    vit.save_pretrained(folder := tmp_path_factory.mktemp("vit"))
    return folder


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory):
    """A short run of the demo with it, and with captions."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--vision-weights", str(encoder), "--features-cache", str(folder / "cache")]
    train.main([*SHORT, *flags, "--out", str(folder / "run")])
    return folder / "run"


def test_a_run_reads_vits_features_and_captions(run, encoder, capsys):
    problem = next(p for p in data.load("demo", "test") if p.image)
    chosen = read_settings(run)
    source = stage_examples(chosen, [problem], "QCM-LE", load_tokenizer(run / "answer"), None)
    expected = data.prompt(problem, "QCM-LE", caption=True)[0]
    assert problem.meta["caption"] in expected
    tokenizer = load_tokenizer(run / "answer")
    assert tokenizer.decode(source[0]["input_ids"]) == expected
    fused = fusion.MultimodalT5.from_pretrained(run / "rationale").fusion
    assert fused.image_dense.in_features == 24
    manifest = read_json(run.parent / "cache/manifest.json")
    assert manifest["shape"] == [10, 24] and manifest["size"] == 48
    assert re.fullmatch("[0-9a-f]{12}", manifest["fingerprint"])
    row = manifest["rows"].get(files.checksum(problem.image))
    pixels = vit_pixels(open_image(problem.image), 48)
    with torch.inference_mode():
        exact = ViT.from_pretrained(encoder).features(pixels[None])[0]
    cached = torch.from_numpy(np.load(run.parent / "cache/features.npy")[row]).float()
    torch.testing.assert_close(cached, exact, atol=2e-3, rtol=2e-3)
    assert len(lines_of(run / "predictions.jsonl")) == 8


def test_an_image_can_be_asked_about(run, capsys):
    problem = next(p for p in data.load("demo", "test") if p.image)
    asked = ["--image", problem.image, "--question", problem.question]
    evaluation.main([str(run), *asked, "--choices", *problem.choices])
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


def test_a_cache_of_another_encoder_is_refused(run):
    flags = ["--vision", "detr", "--features-cache", str(run.parent / "cache")]
    with pytest.raises(ValueError, match="of checkpoint .* at size"):
        train.main([*SHORT, *flags, "--out", str(run.parent / "other")])


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_features_of_another_width_are_refused_at_the_start(dry, run, monkeypatch):
    """In the second stage's checkpoint: the first, which has no fusion, is not even loaded."""
    monkeypatch.setattr(train, "plan_stage", None)
    both = ["--weights", str(ROOT / "demo/t5"), str(run / "answer"), "--vision", "detr"]
    with pytest.raises(ValueError, match=" 24, .* 64"):
        train.main([*SHORT, *both, *dry, "--out", str(run.parent / "other")])
    assert not (run.parent / "other").exists()


def test_published_features_of_another_width_are_refused(run, tmp_path):
    np.save(tmp_path / "clip.npy", np.zeros((2, 49, 2048), np.float16))
    (tmp_path / "name_map.json").write_text('{"1": 0}')
    published = ["--features", str(tmp_path / "clip.npy")]
    published += ["--name-map", str(tmp_path / "name_map.json"), "--weights", str(run / "answer")]
    with pytest.raises(ValueError, match=" 24, .*clip.npy .* 2048"):
        train.main([*SHORT, *published, "--out", str(tmp_path / "run")])


def test_vision_weights_are_those_of_the_kind():
    assert settings("mmcot", "--vision", "vit").vision_weights == VIT
    assert settings("mmcot", "--vision", "vit", "--vision-weights", "x").vision_weights == "x"
    assert settings("mmcot", "--vision", "none").vision_weights.endswith("detr")
    real = settings("mmcot", "--data", "scienceqa", "--captions", "instruct", "--vision", "vit")
    assert real.vision_weights == VIT and real.out == "runs/scienceqa-two-stage-vit-caption"
