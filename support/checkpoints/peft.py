"""Adapter files as PEFT writes and reads them: adapter_config.json, adapter_model.safetensors.

Layers are named as transformers 5 or, in older files, 4 names them: the key tables know both.
Reading is strict: a setting that would change the outputs and is not supported, or a tensor that
fits no layer, is an error.
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from support.checkpoints.hub import refuse_other_folders
from support.checkpoints.keys import architecture, file_path, table_of, transformers_path
from support.checkpoints.weights import json_object, listed, opened, write_safetensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of every name in the weight file

NUMBER = int | float
KINDS = {  # of the settings that are obeyed: the type, and that of the parts
    "r": (int, None),
    "lora_alpha": (NUMBER, None),
    "lora_dropout": (NUMBER, None),
    "use_rslora": (bool, None),
    "use_dora": (bool, None),
    "rank_pattern": (dict, int),
    "alpha_pattern": (dict, NUMBER),
    "target_modules": (str | list, str),
    "exclude_modules": (str | list, str),
    "layers_to_transform": (int | list, int),
}
# Settings of adapter_config.json that are let through: those obeyed, those that change nothing, and
# two whose values `refuse_unsupported` looks at. Any other that is set (not null, false or empty)
# may change the outputs: refused.
KNOWN = [
    *KINDS,
    *"""peft_type task_type auto_mapping peft_version revision base_model_name_or_path
    inference_mode megatron_core qalora_group_size runtime_config bias init_lora_weights
    eva_config""".split(),
]
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base too


class Settings(NamedTuple):
    """How one layer is adapted, see `lora.LoRALinear`."""

    r: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool


class Adapter(NamedTuple):
    """One layer's settings, and its tensors by PEFT's names ("lora_A.weight" ...)."""

    settings: Settings
    tensors: dict[str, torch.Tensor]


# ---- Writing -------------------------------------------------------------------------------------


def write(
    model_class: type, adapters: dict[str, Adapter], folder: str | Path, base: str | Path | None
) -> None:
    """Write {our path: Adapter} of a model as PEFT does; layers are named by whole paths, so that
    no other fits. `base` is the base model's Hub id or folder, for the config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {transformers_path(model_class, path): x for path, x in adapters.items()}
    tensors = {
        f"{PREFIX}{name}.{part}": t.cpu()
        for name, adapter in by_name.items()
        for part, t in adapter.tensors.items()
    }
    write_safetensors(tensors, folder / WEIGHTS)
    first = next(iter(by_name.values())).settings
    exact = {f"^{re.escape(name)}": adapter.settings for name, adapter in by_name.items()}
    is_decoder = architecture(model_class) == "PaliGemma"
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_decoder else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base and str(base),
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "bias": "none",
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "rank_pattern": {name: x.r for name, x in exact.items() if x.r != first.r},
        "alpha_pattern": {name: x.alpha for name, x in exact.items() if x.alpha != first.alpha},
        "target_modules": list(by_name),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- Reading -------------------------------------------------------------------------------------


def read(
    model_class: type, shapes: dict[str, tuple[int, int]], folder: str | Path
) -> dict[str, Adapter]:
    """{our path: Adapter} of a PEFT folder, for a model whose layers that can be adapted have the
    weights `shapes`: {our path: (O, I)}.

    Raises FileNotFoundError without the two files, and ValueError for torn ones, for settings that
    are not supported or match no layer, and for tensors that are missing, unexpected, of another
    shape or not finite.
    """
    config, stored = read_files(Path(folder))
    names = names_in_file(model_class, shapes, stored)
    settings = {
        path: layer_settings(config, name)
        for path, name in names.items()
        if is_target(config, name)
    }
    prefixes = {path: f"{PREFIX}{names[path]}." for path in settings}
    # Compared before anything of that size is made: the rank may be any number.
    wanted = {
        prefixes[path] + part: shape
        for path, layer in settings.items()
        for part, shape in adapter_shapes(shapes[path], layer).items()
    }
    if problems := unfit(wanted, stored):
        raise ValueError(
            f"The adapters in {folder} do not fit this {model_class.__name__} and their own "
            f"{CONFIG}. Tensors {problems}."
        )
    refuse_unmatched(config, [names[path] for path in settings], folder)
    adapters = {path: Adapter(layer, {}) for path, layer in settings.items()}
    for path, prefix in prefixes.items():
        for name in filter(lambda name: name.startswith(prefix), stored):  # noqa: B023
            adapters[path].tensors[name.removeprefix(prefix)] = stored[name]
    return adapters


def read_files(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The checked settings of adapter_config.json, and {name: tensor}, of a PEFT folder; the names
    without what torch.compile and DataParallel put into them."""
    config = folder / CONFIG
    if not config.is_file():
        refuse_other_folders(folder)
    settings = json_object(config)
    refuse_unsupported(settings, config)
    settings = {key: value for key, value in settings.items() if value is not None}
    check_settings(settings, config)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder / WEIGHTS} does not exist. (PEFT makes it of an old adapter_model.bin.)"
        )
    with opened(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    clean = {name.replace("_orig_mod.", "").removeprefix("module."): name for name in tensors}
    return settings, {name: tensors[stored] for name, stored in clean.items()}


def unfit(wanted: dict[str, list[int]], stored: dict[str, torch.Tensor]) -> str:
    """What does not fit the {name: shape} wanted: numbers and first names; "" if all is well."""
    shapes = {name: list(t.shape) for name, t in stored.items()}
    other = {x for x in wanted.keys() & stored.keys() if shapes[x] != wanted[x]}
    problems = {
        "missing": wanted.keys() - stored.keys(),
        "unexpected": stored.keys() - wanted.keys(),
        "of another shape": {f"{x}: file {shapes[x]}, model {wanted[x]}" for x in other},
        "without finite floating-point numbers": {
            name
            for name, t in stored.items()
            if not t.is_floating_point() or not t.float().isfinite().all()
        },
    }
    return listed(problems)


def adapter_shapes(shape: tuple[int, int], settings: Settings) -> dict[str, list[int]]:
    """{part: shape} of the tensors that adapt a weight (O, I)."""
    outputs, inputs = shape
    shapes = {"lora_A.weight": [settings.r, inputs], "lora_B.weight": [outputs, settings.r]}
    return shapes | ({"lora_magnitude_vector": [outputs]} if settings.dora else {})


def names_in_file(model_class: type, paths: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """{our path: path in the file} of all layers that can be adapted. One that the file lacks is
    called as transformers 5 does if any other is, else as the Hub's weight files do."""
    table = table_of(model_class)
    theirs = {}
    for key in stored:
        name = key.removeprefix(PREFIX).partition(".lora_")[0]
        ours = (table.to_ours(f"{name}.weight") or "").removesuffix(".weight")
        if ours in paths:
            theirs[ours] = name
    newer = any(transformers_path(model_class, path) == name for path, name in theirs.items())
    spelled = transformers_path if newer else file_path
    return {path: theirs.get(path) or spelled(model_class, path) for path in paths}


# ---- Settings ------------------------------------------------------------------------------------


def refuse_unsupported(config: dict, path: Path) -> None:
    """ValueError if the adapter_config.json at `path` asks for what is not done here."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {config.get('peft_type')!r:.60}, not 'LORA'.")
    refused = {k: v for k, v in config.items() if v and k not in KNOWN}
    for key, allowed in (("bias", ("none",)), ("init_lora_weights", HARMLESS_INITS)):
        if config.get(key, allowed[0]) not in allowed:
            refused[key] = config[key]
    if not config.get("target_modules"):
        refused["target_modules"] = config.get("target_modules")
    if refused:
        asked = ", ".join(f"{name} = {value!r}" for name, value in refused.items())
        raise ValueError(
            f"{path} needs what is not supported here: {asked}. Only LoRA, rsLoRA and DoRA on "
            "named Linear layers are: merge this adapter with PEFT and load the merged model."
        )


def check_settings(config: dict, path: Path) -> None:
    """ValueError for a setting of another type than PEFT writes, and for a pattern that could be
    matched for ever: patterns come with the file, and Python's engine backtracks."""
    for key, (kind, part) in KINDS.items():
        value = config.get(key)
        parts = value.values() if isinstance(value, dict) else value
        parts = parts if part and isinstance(value, dict | list) else ()
        if key in config and not (is_a(value, kind) and all(is_a(x, part) for x in parts)):
            raise ValueError(f"{path}: {key} is {value!r:.60}, which has the wrong type.")
    if not 0 <= config.get("lora_dropout", 0) < 1:
        raise ValueError(f"{path}: lora_dropout is {config['lora_dropout']}, not in [0, 1).")
    modules = [config.get("target_modules"), config.get("exclude_modules")]
    patterns = [x for x in modules if x and isinstance(x, str)]
    for pattern in [*patterns, *config.get("rank_pattern", ()), *config.get("alpha_pattern", ())]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"{path}: {pattern!r:.60} is no pattern ({e}).") from e
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 5:
            raise ValueError(f"{path}: {pattern!r:.60} has more repetitions than are matched here.")


def is_a(value: object, kind: type) -> bool:
    """Whether a JSON value is of this type: True is no number here, and NaN is none either."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return kind is bool and isinstance(value, bool)
    return not isinstance(value, float) or math.isfinite(value)


def matches(pattern: str, name: str) -> bool:
    """As PEFT matches the keys of rank_pattern and alpha_pattern: to the end of a name."""
    return bool(re.match(rf"(.*\.)?({pattern})$", name))


def refuse_unmatched(config: dict, names: list[str], folder: str | Path) -> None:
    """ValueError for targets, ranks or alphas of which none fits a layer: the defaults would be
    used in their place. If only some do not, that is printed (PEFT warns too)."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key, {})
        unknown = [p for p in patterns if not any(matches(p, name) for name in names)]
        message = f"{folder}: {key} {unknown!r:.60} matches none of the adapted layers."
        if unknown and len(unknown) == len(patterns):
            raise ValueError(f"{message} Was the adapter made for another model?")
        if unknown:
            print(message, file=sys.stderr)
    if not names:
        targets = f"{config['target_modules']!r:.60}"
        raise ValueError(f"{folder}: target_modules {targets} matches none of the layers here.")


def layer_settings(config: dict, name: str) -> Settings:
    """The settings of the layer that a file calls `name`; patterns match ends of names."""

    def of_layer(key: str, default: float) -> float:
        patterns = config.get(key, {}).items()
        return next((value for pattern, value in patterns if matches(pattern, name)), default)

    return Settings(
        r=of_layer("rank_pattern", config.get("r", 8)),
        alpha=of_layer("alpha_pattern", config.get("lora_alpha", 8)),
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )


def is_target(config: dict, name: str) -> bool:
    """Whether PEFT, with this `config`, adapts the layer that a file calls `name`."""

    def fits(rule: str | list[str]) -> bool:
        if isinstance(rule, str):
            return rule == "all-linear" or bool(re.fullmatch(rule, name))
        return any(name == entry or name.endswith(f".{entry}") for entry in rule)

    targets = config["target_modules"]
    layers = config.get("layers_to_transform")
    if fits(config.get("exclude_modules", [])) or not fits(targets):
        return False
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return True
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return bool(index) and int(index[1]) in ([layers] if isinstance(layers, int) else layers)
