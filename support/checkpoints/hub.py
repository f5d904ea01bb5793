"""Checkpoint folders as on the Hub: finding one, its config.json, building the model, and back.

The model classes are passed in, `load(T5, "allenai/unifiedqa-t5-base")`: what differs between
architectures goes by the name of the class.

Left out: sharded pickles, folders inside a Hub repository.
"""

import contextlib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from support.checkpoints.keys import architecture, table_of
from support.checkpoints.weights import (
    SINGLE,
    has_weights,
    head_is_tied,
    headers,
    in_file_names,
    json_object,
    load_weights,
    write_safetensors,
)

# ----------------------------------------------------------------------------------------------
# Finding
# ----------------------------------------------------------------------------------------------


def resolve(where: str | Path) -> Path:
    """A local folder for a directory or a Hub id ("allenai/unifiedqa-t5-base").

    Weights are fetched as safetensors; only a repository without any gives its pytorch_model.bin.
    Raises FileNotFoundError for a missing path or repository, PermissionError for a gated one,
    ConnectionError without network, ValueError for a folder that holds something else.
    """
    if Path(where).is_dir():
        folder = Path(where)
    elif Path(where).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(where)):
        raise FileNotFoundError(
            f"{where} is neither a folder with config.json and weights nor a Hub id like org/name."
        )
    else:
        folder = download(str(where))
    refuse_other_folders(folder)
    return folder


def download(repository: str) -> Path:
    """The local copy of a Hub repository; errors as in `resolve`."""
    from huggingface_hub import errors, snapshot_download

    small = ["*.json", "spiece.model"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*small, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(repository, allow_patterns=[*small, "pytorch_model.bin"])
        return folder
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
        raise ConnectionError(
            f"{repository} is not a local folder and the Hub could not be reached "
            f"({type(e).__name__}). Download it elsewhere and pass the folder instead."
        ) from e


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


# ----------------------------------------------------------------------------------------------
# config.json into the dataclasses of sizes
# ----------------------------------------------------------------------------------------------

MODEL_TYPES = {"T5": "t5", "MultimodalT5": "t5", "DETR": "detr", "PaliGemma": "paligemma"}


def read_config(folder: str | Path, *model_types: str) -> dict:
    """config.json of `folder` as a dict; ValueError unless its model_type is one of these."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a checkpoint folder needs its config.json."
        )
    config = json_object(path)
    if config.get("model_type") not in model_types:
        raise ValueError(
            f"{path} says model_type {config.get('model_type')!r:.60}, but "
            f"{' or '.join(map(repr, model_types))} is needed here: these weights belong to "
            "another architecture."
        )
    return config


def from_config(config_class: type, config: dict):
    """A dataclass of sizes from a config dict, and the dataclasses inside it from the dicts there.

    Absent fields keep the family's default, and so do null ones, but where the field may be None.
    ValueError for a value of another type, or a size no model has: it would take hours to build.
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
    return config_class(**values)


def checked(config: object):
    """A config, if its sizes and those of the configs in it go together; else a ValueError."""
    for field in fields(config):
        if is_dataclass(getattr(config, field.name)):
            checked(getattr(config, field.name))
    for holds, sentence in size_checks(config):
        if not holds:
            raise ValueError(sentence)
    return config


def size_checks(c: object) -> list[tuple[bool, str]]:
    """(whether it holds, what is wrong if not) of the sizes of one architecture: what torch would
    refuse later in words of its own, or take hours to build."""
    kind = type(c).__name__
    if kind == "T5Config":
        buckets = c.relative_attention_num_buckets
        far = c.relative_attention_max_distance
        form = c.feed_forward_proj
        low = max(c.pad_token_id, c.decoder_start_token_id) < c.vocab_size
        return [
            (
                buckets >= 4 and far > buckets // 2,
                f"{buckets} position buckets cannot reach {far}.",
            ),
            (low, "pad_token_id or decoder_start_token_id is not below vocab_size."),
            (
                form in ("relu", "gated-gelu"),
                f"feed_forward_proj {form!r} is not relu or gated-gelu.",
            ),
        ]
    if kind == "DETRConfig":
        stages = c.backbone_kwargs or {}
        layers = stages.get("layers") or (3, 4, 6, 3)
        channels = stages.get("channels") or (64, 128, 256, 512)
        four = len(layers) == len(channels) == 4 and max(*layers, *channels) <= 10_000
        heads = (c.encoder_attention_heads, c.decoder_attention_heads)
        even = not any(c.d_model % n for n in (*heads, 4))  # 4: sines, cosines, two axes
        known = "layers" in stages or c.backbone in ("resnet50", "resnet101")
        return [
            (known, f"backbone {c.backbone!r} is not known; resnet50 and resnet101 are."),
            (four and sum(layers) <= 256, f"backbone_kwargs {stages!r:.60} are not four stages."),
            (even, f"d_model {c.d_model} is not a multiple of 4 and of {heads} heads."),
        ]
    if kind == "SigLIPConfig":
        even = c.hidden_size % c.num_attention_heads == 0
        return [
            (even, "hidden_size is not a multiple of num_attention_heads."),
            (c.image_size >= c.patch_size, "patch_size is larger than image_size."),
        ]
    if kind == "Gemma2Config":
        even = c.num_attention_heads % c.num_key_value_heads == 0 and c.head_dim % 2 == 0
        types_fit = not c.layer_types or len(c.layer_types) == c.num_hidden_layers
        positive = c.query_pre_attn_scalar > 0 and c.rope_theta > 0
        return [
            (types_fit, "layer_types does not have an entry for each of num_hidden_layers."),
            (
                even,
                "num_attention_heads is no multiple of num_key_value_heads, or head_dim is odd.",
            ),
            (positive, "query_pre_attn_scalar or rope_theta is not above 0."),
        ]
    if kind == "PaliGemmaConfig":
        low = max(c.image_token_index, c.pad_token_id) < c.text.vocab_size
        return [(low, "image_token_index or pad_token_id is not below vocab_size.")]
    return []


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


def model_config(model_class: type, config: dict):
    """The sizes of a model class (its `config_class`) from the content of config.json."""
    kind = architecture(model_class)
    if kind == "DETR":
        config = detr_fields(config)
    elif kind == "PaliGemma":
        config = paligemma_fields(config)
    return from_config(model_class.config_class, config)


def detr_fields(config: dict) -> dict:
    """transformers 5 moves the backbone's name into `backbone_config`, and the number of classes is
    only there as the length of `id2label`."""
    inner = config.get("backbone_config") or {}
    return config | {
        "backbone": config.get("backbone") or inner.get("backbone"),
        "num_labels": len(config["id2label"]) if config.get("id2label") else None,
    }


def paligemma_fields(config: dict) -> dict:
    """The top-level hidden_size is wrong or absent in released files and is never read. ValueError
    for PaliGemma 1, which has the same model_type."""
    text = config.get("text_config") or {}
    if text.get("model_type") != "gemma2":
        raise ValueError(
            f"this is PaliGemma 1 (its text model is {text.get('model_type')!r}, not 'gemma2'). "
            "Its norms and attention differ; use google/paligemma2-3b-mix-448."
        )
    rotary = text.get("rope_parameters") or {}  # transformers 5
    text = text | {"rope_theta": rotary.get("rope_theta") or text.get("rope_theta")}
    return config | {"text": text, "vision": config.get("vision_config") or {}}


# ----------------------------------------------------------------------------------------------
# Building and loading
# ----------------------------------------------------------------------------------------------


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
    stored = headers(folder) if kind in ("T5", "MultimodalT5") and has_weights(folder) else {}
    tied = head_is_tied(folder) if stored else None
    with described(folder):
        if kind == "T5":
            return model_class(checked(model_config(model_class, config)), tied)
        if kind == "MultimodalT5":
            t5_class = model_class.t5_class
            t5 = t5_class(checked(model_config(t5_class, config)), tied)
            table = table_of(model_class)
            shapes = {table.to_ours(name): header.shape for name, header in stored.items()}
            if "fusion.image_dense.weight" not in shapes:
                return model_class(t5)
            feature_dim = shapes["fusion.image_dense.weight"][1]
            no_image = config.get("no_image", "zero")
            fusion = model_class.fusion_class(t5.config.d_model, feature_dim, no_image)
            return model_class(t5, fusion)
        return model_class(checked(model_config(model_class, config)))


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


# ----------------------------------------------------------------------------------------------
# Saving
# ----------------------------------------------------------------------------------------------


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
    if kind == "T5":
        return t5_json(model, "T5ForConditionalGeneration")
    if kind == "DETR":
        return detr_json(model.config)
    if kind == "PaliGemma":
        return paligemma_json(model.config)
    if model.fusion is None:
        return t5_json(model.t5, "T5ForConditionalGeneration")
    config = t5_json(model.t5, "T5ForMultimodalGeneration")
    return config | {"no_image": model.fusion.no_image}


def t5_json(t5: nn.Module, architecture_name: str) -> dict:
    """The output scaling is spelled for readers of transformers 4 and of transformers 5."""
    return asdict(t5.config) | {
        "model_type": "t5",
        "architectures": [architecture_name],
        "is_encoder_decoder": True,
        "num_decoder_layers": t5.config.decoder_layers,
        "tie_word_embeddings": t5.lm_head is None,
        "scale_decoder_outputs": t5.config.scaled,
    }


def detr_json(sizes) -> dict:
    labels = {str(i): f"LABEL_{i}" for i in range(sizes.num_labels)}
    config = asdict(sizes) | {
        "model_type": "detr",
        "architectures": ["DetrForObjectDetection"],
        "use_timm_backbone": True,
        "id2label": sizes.id2label or labels,
    }
    return {key: value for key, value in config.items() if value is not None}


def paligemma_json(sizes) -> dict:
    text = asdict(sizes.text) | {"model_type": "gemma2", "num_image_tokens": sizes.image_tokens}
    if not text["layer_types"]:
        del text["layer_types"]
    width = sizes.text.hidden_size
    vision = asdict(sizes.vision) | {
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        "projection_dim": width,
    }
    config = asdict(sizes) | {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "projection_dim": width,
    }
    del config["text"], config["vision"]
    return config
