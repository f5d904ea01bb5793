"""train.py --dry-run: what it prints, and that it writes nothing."""

import re

import pytest
from small_runs import PALIGEMMA, SMALL, adapted, loss_of, settings, spoiled_data

import data
import train
from support.dataset.tokenizers import load_tokenizer
from support.evaluation import models
from support.training import dry_run


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_a_dry_run_prints_what_it_takes_and_writes_nothing(
    name, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    spoiled = spoiled_data(tmp_path_factory.mktemp("spoiled") / "data")
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL[name], "--data", str(spoiled), "--on-error", "skip", "--dry-run"]
    train.main(flags)
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    trainable, frozen = {"mmcot": (247_168, 0), "paligemma": (9_728, 340_928)}[name]
    assert f"{trainable:,} parameters trainable, {frozen:,} frozen" in out
    assert "4 bad records" in out
    for word in ("weights", "gradients", "AdamW's", "activations", "in all", "one step", "steps:"):
        assert f"{word} " in out, word
    [off] = re.findall(r"estimated ([+-]\d+) %", out)
    assert abs(int(off)) < 25
    monkeypatch.setattr(dry_run, "device_memory", lambda device: (0, 2**30))
    monkeypatch.setattr(dry_run, "timed_step", None)  # not even tried
    monkeypatch.setattr(dry_run, "held", lambda device: 0)
    train.main(flags)
    assert "one step" not in capsys.readouterr().out


def test_a_dry_run_of_what_only_decodes(capsys):
    train.main("--model paligemma --device cpu --epochs 0 --limit 2 --dry-run".split())
    assert "parameters trainable" not in capsys.readouterr().out


@pytest.mark.parametrize("count, checkpointing", [(1, False), (3, False), (3, True)])
def test_the_estimate_counts_what_is_kept(count, checkpointing):
    """Against each storage that a whole batch keeps; logits and recomputed layers are extra."""
    model, chosen = adapted("--lora-r", "2")
    problems = [p for p in data.load("demo", "train")[:20] if p.image is None][:1]
    trace = {"thought": "It is so. " * 3, "answer": "", "verdict": {"correct": True}}
    rows = data.pali_examples(
        [data.TrainRow(problems[0], "reason", trace)], load_tokenizer(PALIGEMMA), max_suffix=96
    )
    model.language_model.checkpointing = checkpointing
    loss = loss_of(model, chosen)
    counted = dry_run.activations(loss, rows * count)
    kept = dry_run.saved(loss, rows * count)
    if checkpointing:
        model.language_model.checkpointing = False
        assert kept < counted < dry_run.saved(loss, rows * count)
    else:
        assert counted == pytest.approx(kept, rel=0.02)


def test_blank_features_have_the_shape_of_real_ones():
    problems = [p for p in data.load("demo", "train")[:9] if p.image]
    chosen = settings("mmcot")
    assert dry_run.blank_features(chosen, problems).shape == (
        models.image_features(chosen, problems).shape
    )
    model, chosen = adapted()
    assert dry_run.blank_features(chosen, problems, model).shape == (
        models.image_features(chosen, problems, model).shape
    )
