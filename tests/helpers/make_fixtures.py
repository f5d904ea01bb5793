"""Make the golden fixtures: the reference's outputs on the oracle's seeded weights.

PaliGemma needs the tests' packages (tests/requirements.txt) and no more:

    python tests/helpers/make_fixtures.py paligemma

DETR and ViT need timm, which needs a torchvision that fits torch, and the CPU build of torch has
none on the index. So they run in an environment of their own (the CUDA wheels work without a GPU;
note the three `=`):

    python -m venv /tmp/oracle
    /tmp/oracle/bin/pip install torch===2.13.0 torchvision==0.28.0 timm transformers==5.23.0
    /tmp/oracle/bin/python tests/helpers/make_fixtures.py detr
    /tmp/oracle/bin/python tests/helpers/make_fixtures.py vit

Each writes tests/fixtures/NAME.safetensors (outputs) and NAME.json (versions, key listings, weight
fingerprints). Running it again gives the same numbers up to the platform's rounding (about 1e-6;
PaliGemma's, whose weights are sharper, 2e-5).
"""

import json
import sys
import tempfile
from pathlib import Path

import oracle
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file


def write_fixture(name, outputs, record):
    oracle.FIXTURES.mkdir(exist_ok=True)
    save_file(outputs, oracle.FIXTURES / f"{name}.safetensors", {"format": "pt"})
    (oracle.FIXTURES / f"{name}.safetensors").chmod(0o644)
    (oracle.FIXTURES / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


# ---- DETR ---------------------------------------------------------------------------------------


def register_resnet(name, layers, channels):
    """A narrower resnet50 under a timm name of its own.

    transformers 4 passes `backbone_kwargs` to timm; transformers 5 drops them without a word, and
    a registered name is the only way in.
    """
    from timm.models import register_model
    from timm.models.resnet import resnet50

    def entry(pretrained=False, **kwargs):
        return resnet50(pretrained, layers=tuple(layers), channels=tuple(channels), **kwargs)

    entry.__name__ = entry.__qualname__ = name
    register_model(entry)


def reference(case_config):
    """HF's DetrForObjectDetection for a config of oracle.DETR_CONFIGS, with seeded weights."""
    config = dict(oracle.DETR_CONFIGS[case_config])
    backbone = config.pop("backbone_kwargs", None)
    if backbone:
        config["backbone"] = case_config.replace("-", "_")
        register_resnet(config["backbone"], **backbone)
    hf = transformers.DetrForObjectDetection(transformers.DetrConfig.from_dict(config)).eval()
    names, config_5x = saved(hf)
    to_hub = {oracle.detr_layout_c(name): name for name in names}
    state = hf.state_dict()
    weights = oracle.seeded_weights({to_hub[name]: t.shape for name, t in state.items()})
    hf.load_state_dict({name: weights[to_hub[name]] for name in state})
    return hf, weights, config_5x


def saved(hf):
    """(tensor names, config.json) as transformers' own save_pretrained writes them (layout A)."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            return list(file.keys()), json.loads(Path(folder, "config.json").read_text())


@torch.no_grad()
def detr():
    import timm

    versions = {m.__name__: m.__version__ for m in (torch, transformers, timm)}
    record, outputs = {"versions": versions, "configs": {}}, {}
    for config_name in oracle.DETR_CONFIGS:
        hf, weights, config_5x = reference(config_name)
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        entry = record["configs"][config_name] = {
            "tensors": len(shapes),
            "elements": sum(tensor.numel() for tensor in weights.values()),
            "fingerprint": oracle.fingerprint(weights),
        }
        if not config_name.startswith("tiny"):
            entry["keys"] = oracle.key_patterns(shapes)
            entry["config_5x"] = config_5x  # as transformers 5.x saves it
        for case, (config, _, _, wanted, stride) in oracle.DETR_CASES.items():
            if config != config_name:
                continue
            pixels, mask = oracle.detr_inputs(case)
            out = hf(pixels, pixel_mask=mask)
            results = dict(features=out.last_hidden_state, logits=out.logits, boxes=out.pred_boxes)
            for name in wanted:
                outputs[f"{case}/{name}"] = results[name][:, ::stride].contiguous().clone()
            exact = hf.double()(pixels.double(), pixel_mask=mask).last_hidden_state
            hf.float()
            rounding = (exact - out.last_hidden_state).abs().max().item()
            spread = out.last_hidden_state.std(dim=1).mean().item()
            print(f"{case}: fp32 against fp64 {rounding:.1e}, spread over queries {spread:.2f}")
    write_fixture("detr", outputs, record)


# ---- ViT ----------------------------------------------------------------------------------------


@torch.no_grad()
def vit():
    """forward_features and, of three images, what the transform for evaluation makes of them."""
    import timm
    from timm.data import create_transform, resolve_data_config

    versions = {m.__name__: m.__version__ for m in (torch, timm)}
    record, outputs = {"versions": versions, "configs": {}}, {}
    for case, (config_name, faint, stride) in oracle.VIT_CASES.items():
        config = oracle.VIT_CONFIGS[config_name]
        sizes = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        reference = timm.create_model(config["architecture"], **sizes).eval()
        shapes = {name: list(tensor.shape) for name, tensor in reference.state_dict().items()}
        weights = oracle.vit_weights(shapes, faint)
        reference.load_state_dict(weights)
        record["configs"][config_name] = {
            "keys": oracle.key_patterns(shapes),
            "elements": sum(tensor.numel() for tensor in weights.values()),
        }
        pixels = oracle.vit_pixels(case)
        states = reference.forward_features(pixels)
        outputs[case] = states[:, ::4, ::stride].contiguous().clone()
        exact = reference.double().forward_features(pixels.double())
        print(f"{case}: fp32 against fp64 {(exact - states).abs().max():.1e}, {states.std():.2f}")
        del reference
    data_config = resolve_data_config({}, model=timm.create_model("vit_large_patch32_384"))
    record["transform"] = {name: data_config[name] for name in ("crop_pct", "interpolation")}
    transform = create_transform(**data_config | {"input_size": (3, 40, 40)})
    for width, height in oracle.IMAGES:
        pixels = transform(oracle.noise_image(width, height))
        outputs[f"image/{width}x{height}"] = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
    write_fixture("vit", outputs, record)


# ---- PaliGemma ----------------------------------------------------------------------------------


@torch.no_grad()
def paligemma():
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    _, hf = oracle.tiny_paligemma()
    weights = {name: p.detach() for name, p in oracle.paligemma_stored(hf).items()}
    outputs, record = {}, {"versions": versions, "fingerprint": oracle.fingerprint(weights)}
    for case, options in oracle.PALIGEMMA_CASES.items():
        batch = oracle.paligemma_batch(**options)
        out = hf(**batch)
        valid = batch["attention_mask"].bool()
        outputs[f"{case}/logits"] = out.logits * valid[..., None]
        outputs[f"{case}/loss"] = out.loss
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        exact = hf.double()(**double).logits
        hf.float()
        rounding = (exact - out.logits)[valid].abs().max().item()
        print(f"{case}: fp32 against fp64 {rounding:.1e}, spread {out.logits[valid].std():.2f}")
    pixels = oracle.paligemma_batch()["pixel_values"]
    images = hf.get_image_features(pixels)
    outputs |= {"patches": images.last_hidden_state, "features": images.pooler_output}
    _, speaker = oracle.tiny_paligemma(**oracle.SPEAKER)
    batch = oracle.paligemma_batch(**oracle.PROMPTS)
    del batch["labels"]
    ids = speaker.generate(**batch, max_new_tokens=oracle.STEPS, do_sample=False)
    outputs["ids"] = ids[:, batch["input_ids"].shape[1] :].contiguous()
    write_fixture("paligemma", {k: v.contiguous().clone() for k, v in outputs.items()}, record)


if __name__ == "__main__":
    {"detr": detr, "vit": vit, "paligemma": paligemma}[sys.argv[1]]()
