"""train.py: the loss, the loop, and the runs of mmcot with their files and command line.

The tiny runs use the committed demo checkpoints and a few dozen problems; only the slow test at the
end trains the demo as a newcomer would, for half as long. PaliGemma's: training/test_tuning.py.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from small_runs import (
    PALIGEMMA,
    TINY,
    adapted,
    fit,
    lines_of,
    loss_of,
    settings,
    steps,
    t5_row,
    tiny_t5,
)

import data
import eval as evaluation
import fusion
import train
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer
from support.evaluation import decoding, models
from support.files import read_json
from support.training import checks, examples, optim

pytestmark = pytest.mark.usefixtures("read_once")
NO_DROPOUT = replace(TINY, dropout_rate=0.0)
ROWS = [t5_row(i, 4 + 3 * i, 2 + 5 * (i % 3)) for i in range(6)]


@pytest.fixture(scope="module")
def pali_rows():
    """Eight rows of unequal lengths: thoughts and bare letters, with and without an image."""
    chosen = settings("paligemma")
    problems = sorted(data.load("demo", "train")[:40], key=lambda p: p.image is not None)
    by_id = {p.id: p for p in problems[:2] + problems[-4:]}
    traces = [t for t in examples.load_traces(examples.demo_traces()) if t["id"] in by_id]
    rows = [data.TrainRow(by_id[t["id"]], "reason", t) for t in traces]
    rows += [data.TrainRow(row.problem, "answer") for row in rows[:2]]
    model = models.load_paligemma(chosen)
    features = models.image_features(chosen, list(by_id.values()), model)
    encoded = data.pali_examples(
        rows, load_tokenizer(PALIGEMMA), features, max_suffix=chosen.max_suffix
    )
    assert len(encoded) == 8 and len({len(row["labels"]) for row in encoded}) > 4
    assert len({"image_features" in row for row in encoded}) == 2
    return encoded


# ---- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_the_plain_cross_entropy_of_the_logits():
    """Padding changes nothing: the released code kept pads (id 0) in the labels, and most of its
    loss was about them."""
    model = tiny_t5(NO_DROPOUT)
    batch = data.collate(ROWS)
    names = ("input_ids", "attention_mask", "image_features", "decoder_input_ids")
    logits = model(*(batch[k] for k in names)).flatten(0, 1)
    expected = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    loss, tokens = train.t5_loss(model, batch)
    assert tokens == sum(len(row["labels"]) for row in ROWS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    alone = sum(train.t5_loss(model, data.collate([row]))[0].item() for row in ROWS)
    assert loss.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemmas_loss_is_of_the_next_token_and_pads_change_nothing(pali_rows, side):
    model, _ = adapted()
    batch = data.pali_collate(pali_rows, side=side)
    logits = model(**{k: batch[k] for k in batch if k not in ("ids", "labels")})[:, :-1]
    labels = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    loss, n = train.paligemma_loss(model, batch)
    assert n == sum(sum(row["token_type_ids"]) for row in pali_rows)
    assert n == optim.units([pali_rows], "token")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    alone = [train.paligemma_loss(model, data.pali_collate([row]))[0] for row in pali_rows]
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_mean_loss_is_over_all_tokens_or_all_rows(pali_rows, weighting):
    model, chosen = adapted("--weighting", weighting)
    loss, n = train.paligemma_loss(model.eval(), data.pali_collate(pali_rows), weighting)
    mean = optim.mean_loss(loss_of(model.train(), chosen), pali_rows, 3)
    assert mean == pytest.approx(loss.item() / n, rel=1e-5)
    assert not model.training


def test_every_parameter_of_mmcot_gets_a_gradient():
    model = tiny_t5()
    train.t5_loss(model, data.collate(ROWS))[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("flags", [[], ["--lora-dora"], ["--checkpointing"]])
def test_the_base_is_frozen_and_every_adapter_learns(pali_rows, flags):
    model, _ = adapted(*flags)
    train.paligemma_loss(model.train(), data.pali_collate(pali_rows))[0].backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned and all("lora_" in name for name in learned)
    assert all("lora_" in name for name in optim.trained(model))
    assert len([name for name in learned if "lora_B" in name]) == 7 * len(
        model.language_model.layers
    )
    checks.stop_unless_learning(model)


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["token", "example"])
@pytest.mark.parametrize("system", ["mmcot", "paligemma"])
def test_accumulated_batches_equal_the_big_batch(system, weighting, pali_rows, monkeypatch):
    """Averaging the batches' averages, as most loops do, weighs short batches too much. Through the
    loop itself: the gradients it clips. Unequal lengths, and a last short batch."""
    rows = ROWS if system == "mmcot" else pali_rows

    def gradients(*flags):
        flags = ["--weighting", weighting, *flags]
        if system == "mmcot":
            model, chosen = tiny_t5(NO_DROPOUT), settings("mmcot", *flags)
        else:
            model, chosen = adapted(*flags)
        clipped, clip = [], torch.nn.utils.clip_grad_norm_

        def watch(parameters, limit):
            assert limit == 1.0
            named = model.named_parameters()
            clipped.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            return clip(parameters, limit)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
            [entry] = fit(model, chosen, rows)[1]
        [gradients] = clipped
        return gradients, entry

    whole, one = gradients("--batch-size", "8", "--accumulate", "1")
    parts, other = gradients("--batch-size", "3", "--accumulate", "3")
    units = {"token": optim.units([rows], "token"), "example": len(rows)}[weighting]
    assert one[f"{weighting}s"] == other[f"{weighting}s"] == units
    assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-6, rtol=1e-4)


def test_training_lowers_the_loss_and_logs_each_step(pali_rows):
    chosen = settings("mmcot", "--batch-size", "3", "--lr", "0.01")
    mean = lambda loss_of: {"val_loss": optim.mean_loss(loss_of, ROWS, 3)}  # noqa: E731
    _, log = fit(tiny_t5(NO_DROPOUT), chosen, ROWS, epochs=20, stage="answer", validate=mean)
    assert [x["step"] for x in log] == list(range(1, 41))
    assert [x["step"] for x in log if "val_loss" in x] == list(range(2, 41, 2))
    assert log[-1]["val_loss"] < 0.5 * log[1]["val_loss"]
    assert log[0]["lr"] == 1e-2 and log[-1]["lr"] == pytest.approx(1e-2 / 40)
    _, log = fit(*adapted("--batch-size", "4"), pali_rows, epochs=8)
    assert sum(x["loss"] for x in log[-2:]) < 0.8 * sum(x["loss"] for x in log[:2])
    assert log[0]["lr"] == log[1]["lr"] == 4e-3 and log[-1]["lr"] < 1e-4
    _, log = fit(*adapted("--batch-size", "4", "--max-steps", "3"), pali_rows, epochs=8)
    assert [x["step"] for x in log] == [1, 2, 3]
    assert log[-1]["lr"] < log[1]["lr"]  # the schedule is that of the steps there are


@pytest.mark.parametrize(
    "accuracies, best", [([10, 30, 20], 1), ([30, 10, 30], 2), ([5, 4], 0), ([None, None], 1)]
)
def test_the_weights_of_the_best_epoch_are_kept(pali_rows, accuracies, best, capsys):
    """Of equal ones the later; without accuracies the last."""
    left, at_epoch = list(accuracies), []

    def validate(loss_of):
        trained = optim.trained(loss_of.model).items()
        at_epoch.append({name: p.detach().clone() for name, p in trained})
        accuracy = left.pop(0)
        return {} if accuracy is None else {"val_loss": 1.0, "val_accuracy": accuracy}

    model, log = fit(*adapted("--batch-size", "4"), pali_rows, len(left), validate=validate)
    assert [x.get("val_accuracy") for x in log[1::2]] == accuracies
    trained = optim.trained(model)
    assert all(torch.equal(p, at_epoch[best][n]) for n, p in trained.items())
    assert any(not torch.equal(p, at_epoch[best - 1][n]) for n, p in trained.items())
    kept = f"after step {2 * (best + 1)}, best in validation"
    assert (kept in capsys.readouterr().out) == (accuracies[0] is not None) and not model.training


def test_each_step_has_its_own_gradient_and_dropout(pali_rows, monkeypatch):
    """At no learning rate to speak of, all steps over the same rows have the same gradient."""
    modes, loss = [], train.paligemma_loss

    def spied(model, *rest):
        modes.append(model.training)
        return loss(model, *rest)

    monkeypatch.setitem(train.LOSS, "paligemma", spied)
    training = (*adapted("--batch-size", "8", "--lr", "1e-12"), pali_rows)
    _, log = fit(*training, epochs=3, validate=lambda loss_of: loss_of.model.eval() and {})
    norms = [x["grad_norm"] for x in log]
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3, rel=1e-3)
    assert modes[-3:] == [True] * 3 and not any(modes[:-3])  # before them: the leak test


# ---- runs of mmcot -------------------------------------------------------------------------------

SHORT = "--model mmcot --device cpu --limit 24 --epochs 3 --max-steps 3".split()


def run(folder, *more):
    train.main([*SHORT, "--out", str(folder), *more])
    return folder


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "run", "--teacher-forced")


def weights(folder):
    model = fusion.MultimodalT5.from_pretrained(folder)
    return torch.cat([p.flatten() for p in model.state_dict().values()])


def test_a_run_folder_has_what_the_design_says(short_run):
    config = read_json(short_run / "config.json")
    assert config["seed"] == 42 and config["recipe"] == "two-stage"
    assert "torch" in config["versions"]
    log = steps((short_run / "log.jsonl").read_text())
    assert [x["stage"] for x in log] == ["rationale"] * 3 + ["answer"] * 3
    metrics = read_json(short_run / "metrics.json")
    assert metrics["n"] == 24 and 0 < metrics["chance"] < 100
    assert {"avg", "NAT", "IMG", "G7-12"} <= metrics["accuracy"].keys()
    predictions = lines_of(short_run / "predictions.jsonl")
    assert len(predictions) == 24
    assert {"id", "response", "rationale", "stop", "tokens", "correct"} <= predictions[0].keys()
    assert 0 < metrics["rougeL"] <= 100 and 0 < metrics["rougeL_teacher_forced"] <= 100


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(short_run, tmp_path):
    again = run(tmp_path / "again")
    for stage in ("rationale", "answer"):
        assert torch.equal(weights(short_run / stage), weights(again / stage))
    predictions = (short_run / "predictions.jsonl").read_bytes()
    assert (again / "predictions.jsonl").read_bytes() == predictions
    other = run(tmp_path / "other", "--seed", "7", "--recipe", "answer")
    assert not torch.equal(weights(short_run / "answer"), weights(other / "answer"))


@pytest.mark.slow
def test_decoding_a_run_again_gives_the_same_predictions(short_run, capsys):
    before = (short_run / "predictions.jsonl").read_bytes()
    evaluation.main([str(short_run), "--decode", "--limit", "24"])
    assert (short_run / "predictions.jsonl").read_bytes() == before
    out = capsys.readouterr().out
    assert "chance" in out and "avg" in out


@pytest.mark.slow
def test_one_stage_can_be_trained_after_the_other(short_run, tmp_path):
    folder = run(tmp_path / "run", "--stage", "rationale")
    assert not (folder / "metrics.json").exists()
    run(folder, "--stage", "answer")
    assert torch.equal(weights(short_run / "answer"), weights(folder / "answer"))
    assert (folder / "metrics.json").exists()


@pytest.mark.slow
def test_text_only_runs_have_no_fusion_and_captions_are_in_the_prompt(tmp_path, capsys):
    plain = run(tmp_path / "plain", "--vision", "none", "--recipe", "answer")
    assert fusion.MultimodalT5.from_pretrained(plain / "answer").fusion is None
    capsys.readouterr()
    run(tmp_path / "captions", "--vision", "caption", "--recipe", "reason")
    source = capsys.readouterr().out.split("supervised")[0]
    problem = data.load("demo", "train")[0]
    assert problem.meta["caption"] and problem.meta["caption"].split()[-1] in source


@pytest.mark.slow
def test_one_output_limit_serves_both_stages(tmp_path):
    folder = run(tmp_path / "run", "--max-output", "20")
    assert max(x["tokens"] for x in lines_of(folder / "predictions.jsonl")) <= 40


def test_own_rationales_come_from_models_that_did_not_train_on_them(monkeypatch):
    trained_on = []

    def plan_stage(settings, stage, inputs):
        trained_on.append({p.id for p in inputs.splits["train"]})
        return len(trained_on) - 1

    def texts(decoder, settings, stage, problems, features):
        ids = [p.id for p in problems]
        assert not trained_on[decoder.model] & set(ids)
        return {i: {"text": f"by {decoder.model}"} for i in ids}

    monkeypatch.setattr(train, "plan_stage", plan_stage)
    monkeypatch.setattr(train, "fit", lambda plan, checkpoints: plan)
    monkeypatch.setattr(decoding.Decoder, "stage_texts", texts)
    monkeypatch.setattr(train, "DecodeCache", lambda folder, models: None)
    problems = data.load("demo", "train")[:9]
    inputs = examples.Inputs({"train": problems}, load_tokenizer(ROOT / "demo/t5"), None)
    rationales = train.own_rationales(settings("mmcot"), inputs, None)
    assert rationales.keys() == {p.id for p in problems} and len(trained_on) == 2
    folds = [sorted(p.id in ids for p in problems[::2]) for ids in trained_on]
    assert all(False in fold and True in fold for fold in folds)  # not every second problem


def test_a_question_can_be_asked_of_a_run(short_run, capsys):
    problem = next(p for p in data.load("demo", "test") if p.image)
    flags = [str(short_run), "--image", problem.image, "--question", problem.question]
    evaluation.main([*flags, "--choices", *problem.choices])
    lines = capsys.readouterr().out.strip().splitlines()
    predictions = {x["id"]: x for x in lines_of(short_run / "predictions.jsonl")}
    if problem.id in predictions and not problem.hint:
        assert lines[0] == predictions[problem.id]["rationale"]
    assert len(lines) == 2


@pytest.mark.slow
def test_errors_are_sentences_without_traceback(tmp_path):
    nowhere = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    command = [sys.executable, "train.py", *SHORT, *nowhere]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    last = ran.stderr.strip().splitlines()[-1]  # one sentence, after the name of the program
    assert last.startswith("train.py: ") and last.endswith(".") and "nowhere" in last
    assert not (tmp_path / "run").exists()


def test_a_fusion_that_cannot_be_saved_is_not_trained(monkeypatch):
    """A hacked layer without a row in the table of names cost a whole stage before the error."""

    class Mixed(fusion.GatedFusion):
        def __init__(self, *args):
            super().__init__(*args)
            self.mix = torch.nn.Linear(2, 2)

    monkeypatch.setattr(fusion, "GatedFusion", Mixed)
    features = Features(torch.zeros(1, 36, 64).numpy(), {})
    with pytest.raises(ValueError, match="fusion.mix.bias, fusion.mix.weight"):
        optim.start_model(str(ROOT / "demo/t5"), features, "zero", 0)


@pytest.mark.slow
def test_the_demo_learns_to_look_at_the_image(tmp_path):
    """The default run in half its epochs: what it has learned then is the same. Without images a
    model can reach about 43 % (see demo/scenes.py)."""
    half = ["--epochs", *(str(epochs / 2) for epochs in settings("mmcot").epochs)]
    train.main(["--model", "mmcot", *half, "--out", str(tmp_path / "run")])
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["n"] >= 300
    assert metrics["accuracy"]["avg"] > 55
    assert metrics["parse_failures"] < 5
