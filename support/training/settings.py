"""train.py's settings: the flags of its command line, their defaults, and config.json.

A field of these dataclasses is a flag, a key of config.json and an attribute. The values are those
of the papers and of big_vision's configs, as far as they say; `DEMO` has what differs in the
built-in demo, where a run may take a few minutes on one core.
"""

import argparse
import os
import types
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from support import files
from support.dataset.sources import SPLITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_THREADS = torch.get_num_threads()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both systems have. A field without a default gets one in each of the two below."""

    model: Literal["mmcot", "paligemma"]
    recipe: str
    ablation: bool = False
    # files
    data: str = "demo"
    weights: tuple[str, ...]
    features_cache: str | None = None
    out: str = ""  # `parse_args` names one after data and recipe
    on_error: Literal["stop", "skip"] = "stop"
    test_split: str = "test"
    limit: int | None = None
    # optimization
    epochs: tuple[float, ...]
    max_steps: int | None = None
    batch_size: int
    accumulate: int
    lr: float
    weight_decay: float
    weighting: Literal["token", "example"]
    label_smoothing: float = 0.0
    seed: int = 42
    # decoding
    max_output: tuple[int, ...]
    eval_batch_size: int = 64
    # the process
    resume: bool = False
    dry_run: bool = False
    save_every: int | None = None
    device: str = DEVICE
    threads: int = ALL_THREADS
    plain: bool = False  # True: every layer computes by the formula in its class


@dataclass(frozen=True, kw_only=True)
class MultimodalSettings(Settings):
    """Multimodal-CoT, base model (arXiv 2302.00923)."""

    model: Literal["mmcot"] = "mmcot"
    recipe: Literal["two-stage", "answer", "reason", "explain"] = "two-stage"
    weights: tuple[str, ...] = ("allenai/unifiedqa-t5-base",)
    epochs: tuple[float, ...] = (20.0,)
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 5e-5
    weight_decay: float = 0.01
    weighting: Literal["token", "example"] = "token"
    max_output: tuple[int, ...] = (512, 64)
    vision: Literal["detr", "caption", "none"] = "detr"
    vision_weights: str = "facebook/detr-resnet-101-dc5"
    image_size: int = 224
    features: str | None = None
    name_map: str | None = None
    no_image: Literal["zero", "mask"] = "zero"
    stage: Literal["both", "rationale", "answer"] = "both"
    stage2_rationales: Literal["gold", "generated"] = "gold"
    max_input: int = 512
    faithful_text: bool = False
    teacher_forced: bool = False


@dataclass(frozen=True, kw_only=True)
class PaliGemmaSettings(Settings):
    """PaliGemma 2 that learns a teacher's traces. None of it was tried at full size."""

    model: Literal["paligemma"] = "paligemma"
    recipe: Literal["reason", "answer"] = "reason"
    weights: tuple[str, ...] = ("google/paligemma2-3b-mix-448",)  # mix has answered questions
    epochs: tuple[float, ...] = (5.0,)  # at most: the best epoch on validation answers is kept
    batch_size: int = 4  # a guess at what a 24 GB GPU holds with checkpointing at 448 pixels
    accumulate: int = 8  # 32 rows a step: 4, as in pali_reason, is noise
    lr: float = 1e-4  # of adapters; for --full take 6e-6 (ScienceQA in 2412.03555, Table 14)
    weight_decay: float = 0.0  # as the published ScienceQA transfer
    weighting: Literal["token", "example"] = "example"  # as big_vision: long texts weigh no more
    max_output: tuple[int, ...] = (384, 16)
    traces: str | None = None
    keep: Literal["all", "correct", "consistent"] = "consistent"
    limit_traces: int | None = None
    mix: float = 0.25  # so that short answers are not forgotten
    max_suffix: int = 384  # 62 of pali_reason's 251 are longer; short suits the small (2502.12143)
    shuffle_choices: bool = False
    warmup: float = 0.05
    eval_problems: int = 200
    alone: bool = False
    layout: Literal["paligemma", "seed"] = "paligemma"
    eos_in_loss: bool = True
    full: bool = False
    adapter: str | None = None
    lora_r: int = 32  # long texts are a new skill: more than the usual 8 or 16
    lora_alpha: float = 64.0  # a scale of 2
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    lora_rslora: bool = False
    lora_dora: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None  # `parse_args` chooses by the device
    checkpointing: bool = True
    final_soft_cap: bool = False  # "better for transfer" (big_vision); arg-max is the same without
    samples: int = 1
    temperature: float = 0.0
    loop_stop: bool = True
    force_answer: bool = True


SYSTEMS = {"mmcot": MultimodalSettings, "paligemma": PaliGemmaSettings}
DEMO = {  # what --data demo changes: small checkpoints, and a few minutes on one core
    "mmcot": {
        "weights": (str(files.ROOT / "demo/t5"),),
        "vision_weights": str(files.ROOT / "demo/detr"),
        "image_size": 96,
        "epochs": (8.0, 2.0),  # rationales take longer to learn than answers
        "lr": 3e-3,
        "batch_size": 32,
        "max_input": 256,
        "max_output": (64, 16),
        "threads": 1,  # the result depends on it; two are 1.5 times as fast on an idle machine
    },
    "paligemma": {
        "weights": (str(files.ROOT / "demo/paligemma"),),
        "traces": "demo",
        "epochs": (4.0,),
        "lr": 4e-3,
        "batch_size": 16,
        "accumulate": 1,
        "weighting": "token",
        "lora_r": 16,
        "lora_alpha": 32.0,  # a scale of 2, as above
        "max_suffix": 96,
        "max_output": (96, 8),
        "mix": 0.0,
        "final_soft_cap": True,  # as this checkpoint was pretrained
        "checkpointing": False,
        "threads": 1,
    },
}
HELP = {  # {heading: {flag: help}}
    "what to train": {
        "model": "the system to train",
        "recipe": "mmcot: two-stage, answer, reason, explain; paligemma: reason, answer",
        "ablation": "mmcot: the paper's Tables 2, 3 and 6; paligemma: what each part buys",
    },
    "files": {
        "data": "demo, scienceqa, mathvista, a folder of theirs or a .jsonl",
        "weights": "T5 or PaliGemma folder or Hub id; mmcot takes one for both stages or one each",
        "features_cache": "folder for image features",
        "out": "run folder (runs/DATA-RECIPE-...)",
        "on_error": "a record, image or trace that cannot be used: stop at it, or do without",
        "test_split": "the split that the table is about",
        "limit": "only the first N problems of each split",
    },
    "optimization": {
        "epochs": "mmcot: for both stages or one each; 0 only decodes",
        "max_steps": "stop each training after so many steps",
        "batch_size": "rows that go through the model together, at most, on a device",
        "accumulate": "batches in an optimizer step, on however many devices",
        "lr": "peak learning rate",
        "weight_decay": "of matrices",
        "weighting": "token: the mean over a step's tokens; example: the mean of each row's mean",
        "label_smoothing": "spread this much of the target over the whole vocabulary",
        "seed": "of initial weights, order of rows, dropout and sampling",
    },
    "decoding": {
        "max_output": "new tokens: rationale, answer",
        "eval_batch_size": "rows decoded together",
    },
    "the process": {
        "resume": "resume the run in --out that was interrupted, to the bit",
        "dry_run": "print parameters, memory, one measured step and the time it would take; "
        "write nothing",
        "save_every": "steps between two saved states (one a minute, at most a twentieth of the "
        "time)",
        "device": "cpu, cuda, cuda:1 ...",
        "threads": "CPU threads (demo: 1, else all)",
        "plain": "keep every layer's plain class: no kernels (support/kernels.py)",
    },
    "mmcot: images": {
        "vision": "what stands for the image",
        "vision_weights": "DETR folder or Hub id",
        "image_size": "shorter side for DETR, in pixels",
        "features": "published detr.npy, clip.npy, resnet.npy or vit.pth",
        "name_map": "name_map.json that goes with --features",
        "no_image": "problems without image, in a new fusion: see fusion.py",
    },
    "mmcot: stages and texts": {
        "stage": "train one stage",
        "stage2_rationales": "what stage 2 trains on",
        "max_input": "source tokens; longer ones lose their middle",
        "faithful_text": 'as the original had it: a newline becomes a stray "n"',
        "teacher_forced": "show the inflated ROUGE-L of teacher-forced rationales as well",
    },
    "paligemma: training rows": {
        "traces": "traces.jsonl, or pali_reason's csv or json; none: the data's own solutions",
        "keep": "traces to learn from: all, judged correct, or also judged consistent",
        "limit_traces": "only the first N of them",
        "mix": "answer-only rows for each trace",
        "max_suffix": "tokens of a suffix; longer ones are left out, never cut",
        "shuffle_choices": "shuffle the choices of training rows where no text names their letters",
        "layout": "seed: BOS after the question, as pali_reason had it",
        "eos_in_loss": "leave EOS out of the loss: shows what that does",
    },
    "paligemma: training": {
        "warmup": "share of the steps; then a cosine to 0",
        "eval_problems": "validation problems decoded each epoch",
        "alone": "only this run, without the baselines it must be compared with",
        "dtype": "of frozen weights and compute (bfloat16 on a GPU, else float32)",
        "checkpointing": "keep only each layer's input, compute it again in the backward pass",
        "final_soft_cap": "cap the final logits as in pretraining",
    },
    "paligemma: adapters": {
        "full": "train all weights, not adapters",
        "adapter": "start from this adapter, or only decode",
        "lora_r": "rank",
        "lora_alpha": "the update is scaled by alpha / r",
        "lora_dropout": "share of the adapters' inputs that are dropped",
        "lora_targets": "module names or paths; no patterns (all projections of the language "
        "model)",
        "lora_rslora": "scale by alpha / sqrt(r)",
        "lora_dora": "magnitude and direction apart",
    },
    "paligemma: decoding": {
        "samples": "texts per problem; their answers vote",
        "temperature": "0: greedy",
        "loop_stop": "let a rationale repeat itself until its budget is spent",
        "force_answer": 'do not give a cut rationale its "Answer:"',
    },
}
OFF = {  # flags that switch off what is on by default
    "eos_in_loss": "--no-eos-loss",
    "loop_stop": "--no-loop-stop",
    "force_answer": "--no-forced-answer",
}
EITHER_WAY = ("checkpointing", "final_soft_cap")  # on in the demo or in real runs, not in both
AT_LEAST_ONE = """max_steps batch_size accumulate max_output eval_batch_size limit threads samples
    image_size max_input max_suffix lora_r save_every""".split()  # others may be 0, none negative


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Settings:
    """The settings of a command; what has no flag takes the default of --model and --data.
    SystemExit with a sentence on stderr for flags that do not fit the system or each other."""
    parser = make_parser()
    typed = with_tuples(vars(parser.parse_args(argv)))
    model = typed["model"]
    system = SYSTEMS[model]
    hints = get_type_hints(system)
    if foreign := [flag_of(name) for name in typed if name not in hints]:
        (other,) = SYSTEMS.keys() - {model}
        parser.error(f"{', '.join(foreign)}: only --model {other} has that, and this is {model}")
    demo = DEMO[model] if typed.get("data", "demo") == "demo" else {}
    settings = system(**demo | typed)
    if settings.recipe not in get_args(hints["recipe"]):
        known = ", ".join(get_args(hints["recipe"]))
        parser.error(f"--model {model} has the recipes {known}, not {settings.recipe}")
    refuse_low_numbers(parser, settings)
    complete = completed_mmcot if model == "mmcot" else completed_paligemma
    return complete(parser, settings)


def make_parser() -> argparse.ArgumentParser:
    about = (
        "Training: `python train.py --model mmcot` or `--model paligemma`; each ends in a table."
    )
    # What is not given is not in the namespace: so a flag of the other system is seen.
    parser = argparse.ArgumentParser(
        prog="train.py", description=about, argument_default=argparse.SUPPRESS
    )
    hints = {}
    for system in (PaliGemmaSettings, MultimodalSettings, Settings):
        hints |= get_type_hints(system)
    for heading, flags in HELP.items():
        group = parser.add_argument_group(heading)
        for name, text in flags.items():
            add_flag(group, name, hints[name], text)
    return parser


def add_flag(group: Any, name: str, hint: Any, text: str) -> None:
    """A field's flag, made from its type."""
    if name in OFF:
        group.add_argument(OFF[name], dest=name, action="store_false", help=text)
    elif hint is bool:
        either = argparse.BooleanOptionalAction
        action = either if name in EITHER_WAY else "store_true"
        group.add_argument(flag_of(name), action=action, help=text)
    else:
        kinds = [kind for kind in alternatives(hint) if kind is not types.NoneType]
        is_tuple = get_origin(kinds[0]) is tuple
        kind = get_args(kinds[0])[0] if is_tuple else kinds[0]
        choices = get_args(kind) if get_origin(kind) is Literal else None
        group.add_argument(
            flag_of(name),
            type=str if choices else kind,
            choices=choices,
            nargs="+" if is_tuple else None,
            required=name == "model",
            help=text + default_text(name),
        )


def flag_of(name: str) -> str:
    return OFF.get(name, f"--{name.replace('_', '-')}")


def default_text(name: str) -> str:
    """ " (42)": a flag's default for its help; two where the systems differ."""
    shown = []
    for system in SYSTEMS.values():
        value = getattr(system, name, None)
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value or "")
        if text and text not in shown and name not in ("model", "recipe", "threads"):
            shown.append(text)
    return f" ({' or '.join(shown)})" if shown else ""


def refuse_low_numbers(parser: argparse.ArgumentParser, settings: Settings) -> None:
    for name, value in asdict(settings).items():
        least = 1 if name in AT_LEAST_ONE else 0
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int | float) and not number >= least:  # refuses nan as well
                parser.error(f"{flag_of(name)} must be at least {least}, and is {number}")


def completed_mmcot(
    parser: argparse.ArgumentParser, settings: MultimodalSettings
) -> MultimodalSettings:
    if bool(settings.features) != bool(settings.name_map):
        parser.error("--features FILE and --name-map name_map.json go together")
    return replace(
        settings,
        out=settings.out or default_out(settings, settings.vision),
        teacher_forced=settings.teacher_forced or settings.ablation,  # a row of its table
    )


def completed_paligemma(
    parser: argparse.ArgumentParser, settings: PaliGemmaSettings
) -> PaliGemmaSettings:
    if settings.full and settings.adapter:
        parser.error("--full trains all weights, --adapter starts from an adapter: not both")
    if settings.samples > 1 and settings.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy texts are all the same")
    if settings.full and settings.dtype == "bfloat16":
        parser.error("--full trains in float32: steps of 1e-5 are lost in bfloat16's 8 bits")
    half = settings.device.startswith("cuda") and not settings.full
    return replace(
        settings,
        out=settings.out or default_out(settings, "paligemma"),
        dtype=settings.dtype or ("bfloat16" if half else "float32"),
    )


def default_out(settings: Settings, last: str) -> str:
    return f"runs/{Path(settings.data).stem}-{settings.recipe}-{last}"


# ---- config.json ---------------------------------------------------------------------------------


def read_config(folder: str | Path) -> dict:
    """A run folder's config.json; {} if it has none. ValueError for one that train.py never wrote.
    A key that a run of an older version lacks is no fault here."""
    file = Path(folder) / "config.json"
    if not os.path.lexists(file):
        return {}
    config = files.read_json(file)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} is not a run folder: train.py did not write its config.json.")
    if config["model"] not in list(SYSTEMS):
        raise ValueError(f"{file}: there is no model {config['model']!r:.40}.")
    hints = get_type_hints(SYSTEMS[config["model"]]) | {"commit": str | None}
    for name in hints.keys() & config.keys():
        if not fits(config[name], hints[name]):
            raise ValueError(
                f"{file}: {name} is {config[name]!r:.60}, which train.py never writes."
            )
    if config.get("test_split", "test") not in SPLITS:
        raise ValueError(f"{file}: there is no split {config['test_split']!r:.40}.")
    return config


def read_settings(folder: str | Path) -> Settings:
    """The settings of a run folder. FileNotFoundError if it has no config.json, ValueError as
    `read_config` or where that lacks what every run has. Fields of later versions are as by
    default."""
    config = read_config(folder)
    if not config:
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json.")
    needed = ("recipe", "data", "device", "weights")
    if lacks := [name for name in needed if name not in config]:
        raise ValueError(f"{folder}/config.json has no {', '.join(lacks)}: it cannot decode.")
    system = SYSTEMS[config["model"]]
    names = {field.name for field in fields(system)}
    return system(**with_tuples({name: x for name, x in config.items() if name in names}))


def with_tuples(values: dict) -> dict:
    """Lists of a command line or a JSON file as tuples, which a frozen dataclass can have."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def alternatives(hint: Any) -> tuple:
    """The types of `X | None`, or the one there is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a field's type."""
    if len(kinds := alternatives(hint)) > 1:
        return any(fits(value, kind) for kind in kinds)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        part = get_args(hint)[0]
        return isinstance(value, list) and value != [] and all(fits(x, part) for x in value)
    if hint is float:
        return type(value) in (int, float)  # not bool, which is an int
    return type(value) is hint
