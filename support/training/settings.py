"""train.py's settings: the flags of its command line, their defaults, and config.json.

A field of these dataclasses is a flag, a key of config.json and an attribute. The values are those
of the papers and of big_vision's configs, as far as they say.
"""

import argparse
import os
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from support import files
from support.dataset.sources import SPLITS
from support.training.presets import PRESETS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEMO_FOLDER = str(files.ROOT / "demo")
VIT = "timm/vit_large_patch32_384.orig_in21k_ft_in1k"
Weighting = Literal["token", "example"]
PER_STAGE = ("weights", "epochs", "keep_epoch", "batch_size", "lr")  # one value, or one a stage


def flag(
    default: Any = MISSING,
    help: str = "",
    heading: str = "",
    least: int = 0,
    demo: Any = None,
    off: str = "",
) -> Any:
    """A field and its flag. `heading` opens a group of --help, `least` is the lowest number allowed
    and `demo` the default with --data demo, where a run may take a few minutes on one core. `off`
    names a flag that switches off what is on."""
    about = {"help": help, "heading": heading, "least": least, "demo": demo, "off": off}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both systems have. A field without a default gets one in each of the two below."""

    model: Literal["mmcot", "paligemma"] = flag(help="the system to train", heading="what to train")
    recipe: str = flag(
        help="mmcot: two-stage, two-stage-e, answer, reason, explain; paligemma: reason, answer"
    )
    ablation: bool = flag(False, "mmcot: Tables 2, 3 and 6; paligemma: what each part is worth")
    data: str = flag("demo", "demo, scienceqa, mathvista, a folder of theirs or a .jsonl", "files")
    weights: tuple[str, ...] = flag(
        help="T5 or PaliGemma folder or Hub id; mmcot takes one for both stages or one each"
    )
    features_cache: str | None = flag(None, "folder for image features")
    out: str = flag("", "run folder (runs/DATA-RECIPE-...)")
    on_error: Literal["stop", "skip"] = flag(
        "stop", "a record, image or trace that cannot be used: stop at it, or skip it"
    )
    test_split: str = flag("test", "the split to decode and score")
    limit: int | None = flag(None, "only the first N problems of each split", least=1)
    epochs: tuple[float, ...] = flag(
        help="mmcot: one number for both stages, or one each; 0 only decodes",
        heading="optimization",
    )
    max_steps: int | None = flag(None, "stop each training after this many steps", least=1)
    batch_size: tuple[int, ...] = flag(
        help="rows that go through the model together on a device, at most; per stage as --epochs",
        least=1,
    )
    accumulate: int = flag(help="batches in an optimizer step, on however many devices", least=1)
    lr: tuple[float, ...] = flag(help="peak learning rate; per stage as --epochs")
    weight_decay: float = flag(help="of matrices")
    weighting: Weighting = flag(
        help="token: mean over a step's tokens; example: mean of its rows' means"
    )
    label_smoothing: float = flag(0.0, "spread this much of the target over the whole vocabulary")
    eval_problems: int = flag(200, "validation problems decoded after an epoch, where one is kept")
    seed: int = flag(42, "of initial weights, order of rows, dropout and sampling")
    max_output: tuple[int, ...] = flag(
        help="new tokens: rationale, answer", heading="decoding", least=1
    )
    eval_batch_size: int = flag(64, "rows decoded together", least=1)
    resume: bool = flag(False, "resume the interrupted run in --out, to the bit", "the process")
    dry_run: bool = flag(
        False, "print parameters, memory, a measured step and the time; write nothing"
    )
    save_every: int | None = flag(None, "steps between saved states (one a minute)", least=1)
    device: str = flag(DEVICE, "cpu, cuda, cuda:1 ...")
    # In the demo one, as the result depends on it; two are 1.5 times as fast on an idle machine.
    threads: int = flag(torch.get_num_threads(), "CPU threads (demo: 1, else all)", least=1, demo=1)
    plain: bool = flag(False, "keep every layer's plain class: no kernels (support/kernels.py)")


@dataclass(frozen=True, kw_only=True)
class MultimodalSettings(Settings):
    """Multimodal-CoT, base model (arXiv 2302.00923)."""

    model: Literal["mmcot"] = "mmcot"
    preset: Literal[*PRESETS] | None = flag(
        None,
        "settings of a published run (support/training/presets.py); flags override them",
        "mmcot: published settings, and which epoch is kept",
    )
    recipe: Literal["two-stage", "two-stage-e", "answer", "reason", "explain"] = "two-stage"
    weights: tuple[str, ...] = flag(("allenai/unifiedqa-t5-base",), demo=(f"{DEMO_FOLDER}/t5",))
    # In the demo rationales take longer to learn than answers.
    epochs: tuple[float, ...] = flag((20.0,), demo=(8.0, 2.0))
    keep_epoch: tuple[Literal["last", "best"], ...] = flag(
        ("last",),
        "best: by ROUGE-L of decoded rationales, or accuracy of answers, on --eval-problems of val",
    )
    batch_size: tuple[int, ...] = flag((8,), demo=(32,))
    accumulate: int = 1
    lr: tuple[float, ...] = flag((5e-5,), demo=(3e-3,))
    weight_decay: float = 0.01
    weighting: Weighting = "token"
    max_output: tuple[int, ...] = flag((512, 64), demo=(64, 16))
    vision: Literal["detr", "vit", "caption", "none"] = flag(
        "detr",
        "image features: DETR's, ViT's, none; caption: none, and --captions scienceqa",
        "mmcot: images",
    )
    vision_weights: str = flag(
        "facebook/detr-resnet-101-dc5",
        f"DETR or ViT, a folder or Hub id ({VIT} if --vision is vit)",
        demo=f"{DEMO_FOLDER}/detr",
    )
    captions: str = flag(
        "none",
        "captions in the context: scienceqa (the data's own captions.json; demo is the same), "
        "instruct (mm-cot's instruct_captions.json, next to it), another such file, or none",
    )
    image_size: int = flag(224, "shorter side for DETR, in pixels", least=1, demo=96)
    features: str | None = flag(None, "published detr.npy, clip.npy, resnet.npy or vit.pth")
    name_map: str | None = flag(None, "name_map.json that goes with --features")
    no_image: Literal["zero", "mask"] = flag(
        "zero", "for a new fusion, problems without an image: see fusion.py"
    )
    stage: Literal["both", "rationale", "answer"] = flag(
        "both", "train one stage", "mmcot: stages and texts"
    )
    stage2_rationales: Literal["gold", "generated"] = flag("gold", "what stage 2 trains on")
    max_input: int = flag(512, "source tokens; longer ones lose their middle", least=1, demo=256)
    faithful_text: bool = flag(False, 'as the original had it: a newline becomes a stray "n"')
    teacher_forced: bool = flag(False, "show the inflated ROUGE-L of teacher-forced rationales too")


@dataclass(frozen=True, kw_only=True)
class PaliGemmaSettings(Settings):
    """PaliGemma 2 that learns a teacher's traces. None of it was tried at full size."""

    model: Literal["paligemma"] = "paligemma"
    recipe: Literal["reason", "answer"] = "reason"
    # mix: it has answered questions.
    weights: tuple[str, ...] = flag(
        ("google/paligemma2-3b-mix-448",), demo=(f"{DEMO_FOLDER}/paligemma",)
    )
    # At most: the best epoch on validation answers is kept.
    epochs: tuple[float, ...] = flag((5.0,), demo=(4.0,))
    # A guess at what a 24 GB GPU holds with checkpointing at 448 pixels.
    batch_size: tuple[int, ...] = flag((4,), demo=(16,))
    accumulate: int = flag(8, demo=1)  # 32 rows a step: 4, as in pali_reason, is noise
    # Of adapters; for --full take 6e-6 (ScienceQA in 2412.03555, Table 14).
    lr: tuple[float, ...] = flag((1e-4,), demo=(4e-3,))
    weight_decay: float = 0.0  # as the published ScienceQA transfer
    weighting: Weighting = flag("example", demo="token")  # big_vision: long texts weigh no more
    max_output: tuple[int, ...] = flag((384, 16), demo=(96, 8))
    traces: str | None = flag(
        None,
        "traces.jsonl, or pali_reason's csv or json; none: the data's own solutions",
        "paligemma: training rows",
        demo="demo",
    )
    keep: Literal["all", "correct", "consistent"] = flag(
        "consistent", "traces to learn from: all, judged correct, or also judged consistent"
    )
    limit_traces: int | None = flag(None, "only the first N of them")
    # Above 0, so that short answers are not forgotten.
    mix: float = flag(0.25, "answer-only rows for each trace", demo=0.0)
    # 62 of pali_reason's 251 are longer; short suits the small (2502.12143).
    max_suffix: int = flag(384, "tokens of a suffix; longer ones are left out", least=1, demo=96)
    shuffle_choices: bool = flag(
        False, "shuffle training rows' choices if no text names their letters"
    )
    layout: Literal["paligemma", "seed"] = flag(
        "paligemma", "seed: BOS after the question, as pali_reason had it"
    )
    eos_in_loss: bool = flag(True, "leave EOS out of the loss", off="--no-eos-loss")
    warmup: float = flag(0.05, "share of the steps; then a cosine to 0", "paligemma: training")
    alone: bool = flag(False, "only this run, without the baselines it must be compared with")
    dtype: Literal["float32", "bfloat16"] | None = flag(
        None, "of frozen weights and compute (bfloat16 on a GPU, else float32)"
    )
    checkpointing: bool = flag(True, "recompute layers in the backward pass", demo=False)
    # "Better for transfer" without (big_vision), arg-max is the same; the demo's had it before.
    final_soft_cap: bool = flag(False, "cap the final logits as in pretraining", demo=True)
    full: bool = flag(False, "train all weights, not adapters", "paligemma: adapters")
    adapter: str | None = flag(None, "start from this adapter, or only decode")
    # Long texts are a new skill: a rank above the usual 8 or 16. The scale alpha / r is 2.
    lora_r: int = flag(32, "rank", least=1, demo=16)
    lora_alpha: float = flag(64.0, "the update is scaled by alpha / r", demo=32.0)
    lora_dropout: float = flag(0.0, "share of the adapters' inputs that are dropped")
    lora_targets: tuple[str, ...] | None = flag(
        None, "module names or paths; no patterns (all projections of the language model)"
    )
    lora_rslora: bool = flag(False, "rsLoRA: scale by alpha / sqrt(r)")
    lora_dora: bool = flag(False, "DoRA: train magnitude and direction apart")
    samples: int = flag(1, "texts per problem; their answers vote", "paligemma: decoding", least=1)
    temperature: float = flag(0.0, "0: greedy")
    loop_stop: bool = flag(True, "let a rationale repeat itself to the end", off="--no-loop-stop")
    force_answer: bool = flag(
        True, 'do not ask a cut rationale for "Answer:"', off="--no-forced-answer"
    )


SYSTEMS = {"mmcot": MultimodalSettings, "paligemma": PaliGemmaSettings}
FLAGS = {  # {name: about}; a class below the one with the help changes only default and type
    each.name: each.metadata for system in (*SYSTEMS.values(), Settings) for each in fields(system)
}


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Settings:
    """The settings of a command; what has no flag takes the default of --model and --data.
    SystemExit with a sentence on stderr for flags that do not fit the system or each other."""
    parser = make_parser()
    typed = with_tuples(vars(parser.parse_args(argv)))
    system = SYSTEMS[typed["model"]]
    hints = get_type_hints(system)
    if foreign := [flag_of(name) for name in typed if name not in hints]:
        (other,) = SYSTEMS.keys() - {system.model}
        parser.error(f"{', '.join(foreign)}: only --model {other} has this, not {system.model}")
    typed = PRESETS.get(typed.get("preset"), {}) | typed
    defaults = demo_defaults(system) if typed.get("data", "demo") == "demo" else {}
    if typed.get("vision") == "vit":
        defaults["vision_weights"] = VIT  # the demo has none
    settings = system(**defaults | current(typed))
    recipes = get_args(hints["recipe"])
    if settings.recipe not in recipes:
        known = ", ".join(recipes)
        parser.error(f"--model {system.model} has the recipes {known}, not {settings.recipe}")
    stages = 2 if settings.model == "mmcot" else 1
    for name, value in asdict(settings).items():
        if name in PER_STAGE and len(value) > stages:
            parser.error(f"{flag_of(name)} takes {stages} values at most, not {len(value)}")
        least = FLAGS[name]["least"]
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int | float) and not number >= least:  # refuses nan as well
                parser.error(f"{flag_of(name)} must be at least {least}, and is {number}")
    return completed(parser, settings)


def of_stage(settings: Settings, stage: int) -> Settings:
    """The settings of one training: of what may have a value for each stage, that stage's."""
    named = [name for name in PER_STAGE if hasattr(settings, name)]
    values = {name: (getattr(settings, name) * 2)[stage : stage + 1] for name in named}
    return replace(settings, **values)


def demo_defaults(system: type[Settings]) -> dict:
    """What --data demo changes: small checkpoints, and a few minutes on one core."""
    values = {each.name: each.metadata.get("demo") for each in fields(system)}
    return {name: value for name, value in values.items() if value is not None}


def make_parser() -> argparse.ArgumentParser:
    """A flag for each field, made from its type."""
    parser = files.Parser(
        prog="train.py",
        description="Training: `python train.py --model mmcot` or `--model paligemma`; "
        "each ends in a table.",
        argument_default=argparse.SUPPRESS,  # so that a flag of the other system is seen
    )
    hints = {}
    for system in (*SYSTEMS.values(), Settings):
        hints |= get_type_hints(system)
    for name, about in FLAGS.items():
        if about["heading"]:
            group = parser.add_argument_group(about["heading"])
        hint = hints[name]
        if types.NoneType in get_args(hint):
            hint = get_args(hint)[0]  # of X | None
        if hint is bool:
            # One that the demo has otherwise needs both --NAME and --no-NAME.
            either = about["demo"] is not None
            action = argparse.BooleanOptionalAction if either else "store_true"
            action = "store_false" if about["off"] else action
            group.add_argument(flag_of(name), dest=name, action=action, help=about["help"])
            continue
        is_tuple = get_origin(hint) is tuple
        kind = get_args(hint)[0] if is_tuple else hint
        is_choice = get_origin(kind) is Literal
        group.add_argument(
            flag_of(name),
            type=str if is_choice else kind,
            choices=get_args(kind) if is_choice else None,
            nargs="+" if is_tuple else None,
            required=name == "model",
            help=about["help"] + default_text(name),
        )
    return parser


def flag_of(name: str) -> str:
    return FLAGS[name]["off"] or f"--{name.replace('_', '-')}"


def default_text(name: str) -> str:
    """ " (42)": a flag's default for its help; two where the systems differ."""
    shown = []
    for system in SYSTEMS.values():
        value = getattr(system, name, None)
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value or "")
        if text and text not in shown and name not in ("model", "recipe", "threads"):
            shown.append(text)
    return f" ({' or '.join(shown)})" if shown else ""


def completed(parser: argparse.ArgumentParser, settings: Settings) -> Settings:
    """With the defaults that depend on other settings, which must go together."""
    s = settings
    if s.model == "mmcot":
        if bool(s.features) != bool(s.name_map):
            parser.error("--features FILE and --name-map name_map.json go together")
        parts = (s.vision, "none" if s.captions == "none" else "caption")
        kind = "-".join(part for part in parts if part != "none") or "none"
        changed = {"teacher_forced": s.teacher_forced or s.ablation}  # a row of its table
    else:
        if s.full and s.adapter:
            parser.error("--full trains all weights, --adapter starts from an adapter: not both")
        if s.samples > 1 and s.temperature == 0:
            parser.error("--samples needs a --temperature above 0: greedy texts are all the same")
        if s.full and s.dtype == "bfloat16":
            parser.error("--full trains in float32: steps of 1e-5 are lost in bfloat16's 8 bits")
        kind = "paligemma"
        half = s.device.startswith("cuda") and not s.full
        changed = {"dtype": s.dtype or ("bfloat16" if half else "float32")}
    out = s.out or f"runs/{Path(s.data).stem}-{s.recipe}-{kind}"
    return replace(s, out=out, **changed)


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
    if config["model"] not in list(SYSTEMS):  # a list: what is read may have no hash
        raise ValueError(f"{file}: there is no model {config['model']!r:.40}.")
    config = current(config)
    hints = get_type_hints(SYSTEMS[config["model"]])
    hints |= {"commit": str | None, "test_split": Literal[*SPLITS]}
    for name in hints.keys() & config.keys():
        if not fits(config[name], hints[name]):
            text = f"{name} is {config[name]!r:.60}, which train.py never writes."
            raise ValueError(f"{file}: {text}")
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
    names = {each.name for each in fields(system)}
    return system(**with_tuples({name: x for name, x in config.items() if name in names}))


def current(values: dict) -> dict:
    """Settings as they are spelled now: "--vision caption" has become --captions, and what had one
    number has one for each stage."""
    if values.get("vision") == "caption":
        values = {"captions": "scienceqa"} | values | {"vision": "none"}
    single = [name for name in PER_STAGE if type(values.get(name)) in (int, float)]
    return values | {name: [values[name]] for name in single}


def with_tuples(values: dict) -> dict:
    """Lists of a command line or a JSON file as tuples, which a frozen dataclass can have."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a field's type."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        return isinstance(value, list) and value != [] and all(fits(x, parts[0]) for x in value)
    if hint is float:
        return type(value) in (int, float)  # not bool, which is an int
    return type(value) is hint
