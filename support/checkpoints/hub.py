"""Checkpoint folders as on the Hub: finding one, its config.json, building the model, and back.

The model classes are passed in, `load(T5, "allenai/unifiedqa-t5-base")`: what differs between
architectures goes by the name of the class.
"""

import contextlib
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from support import files
from support.checkpoints.keys import architecture
from support.checkpoints.weights import (
    SINGLE,
    head_is_tied,
    headers,
    in_file_names,
    json_object,
    load_weights,
    write_safetensors,
)

# ---- Finding -------------------------------------------------------------------------------------


def resolve(where: str | Path) -> Path:
    """A local folder for a directory, a zip file, or a Hub id: "allenai/unifiedqa-t5-base", and
    with a folder or a zip file inside it, "cooelf/mm-cot/mm-cot-base-ans.zip".

    Raises FileNotFoundError for a missing path or repository, PermissionError for a gated one,
    ConnectionError without network, ValueError for a folder that holds something else.
    """
    path = Path(where)
    if not path.exists():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(/[\w.-]+)*", str(where)):
            raise FileNotFoundError(
                f"{where} is neither a folder with config.json and weights nor a Hub id (org/name)."
            )
        path = download(*str(where).split("/", 2))
    folder = unzipped(path) if path.is_file() and path.suffix == ".zip" else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{where} is neither a folder with config.json nor a zip of one.")
    refuse_other_folders(folder)
    return folder


def download(owner: str, name: str, inside: str = "") -> Path:
    """The local copy of a Hub repository, or of the folder or zip file `inside` it: safetensors, or
    pytorch_model.bin if it has none. A trainer's checkpoint-N folders are left out."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    repository = f"{owner}/{name}"
    folder = f"{inside}/" if inside else ""
    small = [f"{folder}*.json", f"{folder}spiece.model"]
    try:
        if inside.endswith(".zip"):
            return Path(hf_hub_download(repository, inside))
        fetch = partial(snapshot_download, repository, ignore_patterns=[f"{folder}*/*"])
        path = Path(fetch(allow_patterns=[*small, f"{folder}*.safetensors"]), inside)
        if not list(path.glob("*.safetensors")):
            fetch(allow_patterns=[*small, f"{folder}pytorch_model*.bin"])
        return path
    except errors.GatedRepoError as e:
        raise PermissionError(
            f"The Hub repository {repository} is gated: accept its licence on its page, then log "
            "in with `hf auth login` or set HF_TOKEN."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise FileNotFoundError(
            f"The Hub has no repository {repository}, or it is private and no token is set."
        ) from e
    except Exception as e:  # the client raises its HTTP library's own errors when offline
        if inside:  # a path that was mistyped looks the same
            raise FileNotFoundError(
                f"{repository}/{inside} is neither a folder with config.json and weights nor one "
                f"that the Hub gives ({type(e).__name__})."
            ) from e
        raise ConnectionError(
            f"{repository} is not a local folder and the Hub could not be reached "
            f"({type(e).__name__}). Download it elsewhere and pass the folder instead."
        ) from e


def unzipped(archive: Path) -> Path:
    """The folder with config.json in a zip file of weights, unpacked once into the cache."""
    archive = archive.resolve()  # in the Hub's cache, a link to a file named after its content
    state = archive.stat()
    key = files.digest([str(archive), state.st_size, state.st_mtime_ns])[:12]
    folder = files.cache_folder() / "unpacked" / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary, key)
            files.unzip(archive, whole)
            if not folder.is_dir():  # another process may have been first
                os.replace(whole, folder)
    found = sorted(folder.rglob("config.json"), key=lambda path: (len(path.parts), path))
    if not found:
        raise ValueError(f"{archive} has no config.json: it is not a zip of a checkpoint.")
    return found[0].parent  # a trainer's checkpoint-N folders lie deeper


def refuse_other_folders(folder: Path) -> None:
    """ValueError for an adapter, and for a trainer's folder with checkpoint-N folders in it."""
    if (folder / "config.json").exists():
        return
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json_object(adapter).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} is an adapter, not a model: give it as the adapter, and its base model "
            f"({base}) as the weights."
        )
    steps = [path.name for path in folder.glob("checkpoint-*") if path.is_dir()]
    if steps:
        last = max(steps, key=lambda name: (len(name), name))
        raise ValueError(f"{folder} holds checkpoints, not a model: give one, as {folder / last}.")


# ---- config.json into the dataclasses of sizes ---------------------------------------------------

MODEL_TYPES = {
    "T5": "t5",
    "MultimodalT5": "t5",
    "DETR": "detr",
    "ViT": "vit_large_patch32_384",
    "PaliGemma": "paligemma",
}
VIT_ARGUMENTS = {  # timm's names of sizes: ours
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "patch_size": "patch_size",
}


def read_config(folder: str | Path, *model_types: str) -> dict:
    """config.json of `folder` as a dict; ValueError unless its model_type (in timm's files its
    architecture) is one of these."""
    path = Path(folder) / "config.json"
    config = json_object(path)
    found = config.get("model_type", config.get("architecture"))
    if found not in model_types:
        raise ValueError(
            f"{path} says model_type {found!r:.60}, but "
            f"{' or '.join(map(repr, model_types))} is needed here."
        )
    return config | {"model_type": found}


def from_config(config_class: type, config: dict) -> Any:
    """A dataclass of sizes from a config dict, and the dataclasses inside it from the dicts there.

    Absent fields keep the family's default, and so do null ones, but where the field may be None.
    ValueError for a value of another type, or for sizes no model has: they would take hours to
    build, or be refused by torch in words of its own.
    """
    values = {}
    for field in fields(config_class):
        value = config.get(field.name)
        kind, optional = unwrap(field.type)
        if value is None and not (optional and field.name in config):
            continue
        if is_dataclass(kind) and isinstance(value, dict):
            value = from_config(kind, value)
        if value is not None and not is_sensible(field.name, kind, value):
            raise ValueError(
                f"{field.name} is {value!r:.60}, which no {config_class.__name__} has."
            )
        values[field.name] = value
    made = config_class(**values)
    for sentence, holds in requirements(made).items():
        if not holds:
            raise ValueError(sentence)
    return made


def requirements(c: object) -> dict[str, bool]:
    """{what is wrong if it does not hold: whether it holds} of the sizes of one architecture."""
    kind = type(c).__name__
    if kind == "T5Config":
        buckets = c.relative_attention_num_buckets
        far = c.relative_attention_max_distance
        form = c.feed_forward_proj
        known = form in ("relu", "gated-gelu")
        low = max(c.pad_token_id, c.decoder_start_token_id) < c.vocab_size
        return {
            f"{buckets} position buckets cannot reach {far}.": buckets >= 4 and far > buckets // 2,
            "pad_token_id or decoder_start_token_id is not below vocab_size.": low,
            f"feed_forward_proj {form!r} is not relu or gated-gelu.": known,
        }
    if kind == "DETRConfig":
        stages = c.backbone_kwargs or {}
        layers = stages.get("layers") or (3, 4, 6, 3)
        channels = stages.get("channels") or (64, 128, 256, 512)
        four = len(layers) == len(channels) == 4 and max(*layers, *channels) <= 10_000
        heads = (c.encoder_attention_heads, c.decoder_attention_heads)
        known = "layers" in stages or c.backbone in ("resnet50", "resnet101")
        # 4: sines and cosines of two axes
        even = not any(c.d_model % n for n in (*heads, 4))
        return {
            f"backbone {c.backbone!r} is not known; resnet50 and resnet101 are.": known,
            f"backbone_kwargs {stages!r:.60} are not four stages.": four and sum(layers) <= 256,
            f"d_model {c.d_model} is not a multiple of 4 and of {heads} heads.": even,
        }
    if kind in ("SigLIPConfig", "ViTConfig"):
        even = c.hidden_size % c.num_attention_heads == 0
        return {
            "hidden_size is not a multiple of num_attention_heads.": even,
            "patch_size is larger than image_size.": c.image_size >= c.patch_size,
        }
    if kind == "Gemma2Config":
        heads_fit = c.num_attention_heads % c.num_key_value_heads == 0
        types_fit = not c.layer_types or len(c.layer_types) == c.num_hidden_layers
        positive = c.query_pre_attn_scalar > 0 and c.rope_theta > 0
        return {
            "layer_types does not have an entry for each of num_hidden_layers.": types_fit,
            "num_attention_heads is not a multiple of num_key_value_heads.": heads_fit,
            f"head_dim {c.head_dim} is odd.": c.head_dim % 2 == 0,
            "query_pre_attn_scalar or rope_theta is not above 0.": positive,
        }
    if kind == "PaliGemmaConfig":
        low = max(c.image_token_index, c.pad_token_id) < c.text.vocab_size
        return {"image_token_index or pad_token_id is not below vocab_size.": low}
    return {}


def unwrap(annotation: object) -> tuple[type, bool]:
    """(float, True) for `float | None`, (tuple, False) for `tuple[int, ...]`."""
    options = [annotation]
    if isinstance(annotation, types.UnionType):
        options = [x for x in typing.get_args(annotation) if x is not types.NoneType]
    return typing.get_origin(options[0]) or options[0], options != [annotation]


def is_sensible(name: str, kind: type, value: object) -> bool:
    """Whether the field `name` of this type can have the value."""
    accepted = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
    if isinstance(value, bool) or not isinstance(value, accepted):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, int | float):
        return True
    least = 0 if kind is float or "token" in name else 1
    if name == "eos_token_id":
        least = -1  # there is none
    return least <= value <= (256 if "layers" in name else 10**7)  # False for NaN


def model_config(model_class: type, config: dict) -> Any:
    """The sizes of a model class (its `config_class`) from the content of config.json."""
    kind = architecture(model_class)
    if kind == "DETR":  # transformers 5 moves the backbone's name
        inner = config.get("backbone_config") or {}
        labels = config.get("id2label")  # whose length says how many classes there are
        config = config | {
            "backbone": config.get("backbone") or inner.get("backbone"),
            "num_labels": len(labels) if labels else None,
        }
    elif kind == "ViT":  # an architecture's name stands for its sizes; others are in model_args
        sizes = config.get("model_args") or {}
        config = {ours: sizes.get(theirs) for theirs, ours in VIT_ARGUMENTS.items()}
        if "embed_dim" in sizes:
            config["intermediate_size"] = int(sizes["embed_dim"] * sizes.get("mlp_ratio", 4))
    elif kind == "PaliGemma":  # the top-level hidden_size is wrong in released files: never read
        text = config.get("text_config") or {}
        if text.get("model_type") != "gemma2":
            raise ValueError(
                f"this is PaliGemma 1 (its text model is {text.get('model_type')!r}, not "
                "'gemma2'): use google/paligemma2-3b-mix-448."
            )
        rotary = text.get("rope_parameters") or {}  # transformers 5
        text = text | {"rope_theta": rotary.get("rope_theta") or text.get("rope_theta")}
        config = config | {"text": text, "vision": config.get("vision_config") or {}}
    return from_config(model_class.config_class, config)


# ---- Building and loading ------------------------------------------------------------------------


def load(model_class: type, where: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model from a folder or Hub id, in eval mode; strict, see `weights.load_weights`."""
    folder = resolve(where)
    model = build(model_class, folder)
    if architecture(model_class) == "PaliGemma" and not head_is_tied(folder):
        raise ValueError(
            f"{folder} has an lm_head of its own that differs from its embedding; PaliGemma 2 has "
            "one matrix for both. These weights were trained by other code."
        )
    load_weights(model, folder, dtype)
    return model.eval()


def build(model_class: type, folder: str | Path) -> nn.Module:
    """The model that config.json describes, without its numbers, on the meta device.

    What the config cannot tell is read from the weight files if they are there: whether T5's output
    layer is its embedding, and how wide the features of a fusion are.
    """
    kind = architecture(model_class)
    config = read_config(folder, MODEL_TYPES[kind])
    if MODEL_TYPES[kind] != "t5":
        with described(folder):
            return model_class(model_config(model_class, config))
    stored = {}
    with contextlib.suppress(FileNotFoundError):  # there may be no weights yet
        stored = headers(folder)
    tied = head_is_tied(folder) if stored else None
    dense = [stored[name] for name in stored if name.endswith("image_dense.weight")]
    with described(folder):
        if kind == "T5":
            return model_class(model_config(model_class, config), tied)
        t5 = model_class.t5_class(model_config(model_class.t5_class, config), tied)
        if not dense:
            return model_class(t5)
        sizes = (t5.config.d_model, dense[0].shape[1])
        return model_class(t5, model_class.fusion_class(*sizes, config.get("no_image", "zero")))


class Undrawn(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would do to weights that are read from a file next. On the
    meta device that draws nothing, but its first call imports torch's compiler: 2 seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def described(folder: str | Path) -> Iterator[None]:
    """The meta device, where a module takes no memory, to build what config.json describes."""
    try:
        with torch.device("meta"), Undrawn():
            yield
    except ValueError as e:
        raise ValueError(f"{folder}/config.json: {str(e).rstrip('.')}.") from e
    except Exception as e:  # torch's and Python's own, for sizes that do not go together
        raise ValueError(
            f"{folder}/config.json describes no model that can be built ({type(e).__name__}: {e})."
        ) from e


# ---- Saving --------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path) -> None:
    """Write config.json and model.safetensors as the Hub has them; transformers reads both."""
    folder = Path(folder)
    tensors = in_file_names(model)
    config = json.dumps(config_json(model), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, folder / SINGLE)
    (folder / "config.json").write_text(config, encoding="utf-8")


def config_json(model: nn.Module) -> dict:
    """config.json's content for a model, as transformers writes it."""
    kind = architecture(type(model))
    if MODEL_TYPES[kind] == "t5":
        t5 = model if kind == "T5" else model.t5
        fusion = None if kind == "T5" else model.fusion
        config = asdict(t5.config) | {
            "architectures": [f"T5For{'Multimodal' if fusion else 'Conditional'}Generation"],
            "is_encoder_decoder": True,
            "num_decoder_layers": t5.config.decoder_layers,
            "tie_word_embeddings": t5.lm_head is None,  # transformers 4 scales the output by it,
            "scale_decoder_outputs": t5.config.scaled,  # transformers 5 by this
        }
        config |= {"no_image": fusion.no_image} if fusion else {}
    elif kind == "DETR":
        c = model.config
        config = asdict(c) | {
            "architectures": ["DetrForObjectDetection"],
            "use_timm_backbone": True,
            "id2label": c.id2label or {str(i): f"LABEL_{i}" for i in range(c.num_labels)},
        }
        config = {key: value for key, value in config.items() if value is not None}
    elif kind == "ViT":
        c = model.config
        sizes = {theirs: getattr(c, ours) for theirs, ours in VIT_ARGUMENTS.items()}
        sizes["mlp_ratio"] = c.intermediate_size / c.hidden_size
        config = {"architecture": MODEL_TYPES[kind], "num_classes": 0, "model_args": sizes}
    else:
        config = asdict(model.config)
        text = config.pop("text") | {"model_type": "gemma2"}
        text["num_image_tokens"] = model.config.image_tokens
        if not text["layer_types"]:
            del text["layer_types"]
        width = {"projection_dim": text["hidden_size"]}
        vision = {"model_type": "siglip_vision_model", "vision_use_head": False} | width
        config |= width | {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "text_config": text,
            "vision_config": config.pop("vision") | vision,
        }
    return config | {"model_type": MODEL_TYPES[kind]}
