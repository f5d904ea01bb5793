"""train.py's flags, their defaults, and config.json."""

import json
from dataclasses import asdict, replace
from typing import get_args, get_type_hints

import pytest
from small_runs import PALIGEMMA, settings

import fusion
from support.training.runs import changed_settings, write_config
from support.training.settings import (
    FLAGS,
    SYSTEMS,
    flag_of,
    parse_args,
    read_config,
    read_settings,
)


def refused(flags, capsys):
    """The only line on stderr of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        parse_args(flags.split())
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()  # without the usage
    return line


def test_every_field_has_help_and_choices_are_those_of_the_code():
    assert all(about["help"] for about in FLAGS.values())
    hints = get_type_hints(SYSTEMS["mmcot"])
    assert set(get_args(hints["recipe"])) == set(fusion.RECIPES)
    assert get_args(hints["no_image"]) == fusion.NO_IMAGE


def test_defaults_of_the_demo_and_of_real_data():
    demo = settings("paligemma")
    real = settings("paligemma", "--data", "scienceqa")
    assert demo.weights == (PALIGEMMA,) and demo.traces == "demo"
    assert real.weights == ("google/paligemma2-3b-mix-448",) and real.traces is None
    assert (real.weighting, real.checkpointing, real.final_soft_cap) == ("example", True, False)
    assert settings("paligemma", "--data", "scienceqa", "--mix", "0").mix == 0  # 0 is a value
    assert not settings("paligemma", "--data", "scienceqa", "--no-checkpointing").checkpointing
    for name in ("eos_in_loss", "loop_stop", "force_answer"):
        assert getattr(demo, name) and not getattr(settings("paligemma", flag_of(name)), name)
    for flags, dtype in (([], "bfloat16"), (["--full"], "float32")):
        assert parse_args(["--model", "paligemma", "--device", "cuda", *flags]).dtype == dtype
    assert settings("mmcot", "--epochs", "0", "--weight-decay", "0").epochs == (0.0,)
    assert settings("mmcot", "--ablation").teacher_forced


@pytest.mark.parametrize(
    "flags, named",
    [
        ("mmcot --adapter X --lora-r 8", ["--adapter", "--lora-r"]),
        ("mmcot --no-eos-loss --no-final-soft-cap", ["--no-eos-loss", "--final-soft-cap"]),
        ("paligemma --stage answer --features x", ["--stage", "--features"]),
        ("paligemma --faithful-text --data scienceqa", ["--faithful-text"]),
    ],
)
def test_a_flag_of_the_other_system_is_an_error(flags, named, capsys):
    line = refused(f"--model {flags}", capsys)
    assert all(flag in line for flag in named) and "--data" not in line


@pytest.mark.parametrize(
    "flags",
    ["--batch-size 0", "--accumulate 0", "--max-steps 0", "--limit 0", "--eval-batch-size -1",
     "--epochs -1", "--epochs 3 -2", "--max-output 64 0", "--lr -1", "--lr nan", "--threads 0"],
)  # fmt: skip
def test_low_numbers_are_refused(flags, capsys):
    assert f"{flags.split()[0]} " in refused(f"--model mmcot {flags}", capsys)


@pytest.mark.parametrize(
    "flags, named",
    [
        ("paligemma --recipe two-stage", "reason, answer"),
        ("mmcot --recipe reasons", "two-stage, two-stage-e, answer, reason, explain"),
        ("paligemma --full --adapter x", "--adapter"),
        ("paligemma --full --dtype bfloat16", "float32"),
        ("paligemma --samples 5", "--temperature"),
        ("mmcot --features detr.npy", "--name-map"),
    ],
)
def test_flags_that_do_not_go_together(flags, named, capsys):
    assert named in refused(f"--model {flags}", capsys)


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model, more", [("mmcot", "--epochs 1 2"), ("paligemma", "--lora-r 3")])
def test_settings_come_back_from_a_run_folder(model, more, tmp_path):
    chosen = settings(model, *more.split(), "--resume")
    write_config(chosen, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() - asdict(chosen).keys() == {"versions", "commit"}
    assert "resume" not in config and isinstance(config["epochs"], list)
    assert read_settings(tmp_path) == replace(chosen, resume=False)
    # An older version wrote the flags of both systems, and knew fewer.
    for name in ("samples", "seed", "on_error"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"no_such_flag": None}))
    assert read_settings(tmp_path) == replace(chosen, resume=False)


@pytest.mark.parametrize("more", [{}, {"captions": "instruct"}])
def test_vision_caption_is_no_vision_with_captions(more, tmp_path):
    """As command lines and runs had it before captions had a flag."""
    flags = [x for name, value in more.items() for x in (f"--{name}", value)]
    chosen = settings("mmcot", "--vision", "caption", *flags)
    assert (chosen.vision, chosen.captions) == ("none", more.get("captions", "scienceqa"))
    assert chosen.out == "runs/demo-two-stage-caption"
    write_config(chosen, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vision": "caption"}
    del config["captions"]
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert read_settings(tmp_path) == chosen
    assert changed_settings(replace(chosen, out=str(tmp_path))) == {}
    assert set(changed_settings(settings("mmcot", "--out", str(tmp_path)))) == {
        "vision",
        "captions",
    }


def test_a_folder_that_is_not_a_run(tmp_path):
    assert read_config(tmp_path) == {}
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "mmcot"}')
    assert read_config(tmp_path) == {"model": "mmcot"}
    with pytest.raises(ValueError, match="recipe, data, device, weights"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "t5"}, {"model": ["mmcot"]}, {"recipe": "reasons"}, {"weights": []},
        {"weights": "demo/t5"}, {"epochs": ["1"]}, {"max_output": [1.5]}, {"seed": True},
        {"commit": 7}, {"test_split": "exam"}, {"on_error": "ask"}, {"lr": None}, [], {},
    ],
)  # fmt: skip
def test_a_config_that_train_py_never_writes_is_refused(changed, tmp_path):
    write_config(settings("mmcot"), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changed if changed else changed))
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_config(tmp_path)
