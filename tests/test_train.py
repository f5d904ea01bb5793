"""train.py, and eval.py's decoding of run folders: the loss, the loop, the files, the command line.

The tiny runs use the committed demo checkpoints and a few dozen problems; only the slow test at the
end trains the demo as a newcomer would, for half as long.
"""

import argparse
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import eval as evaluation
import fusion
import train
from model import T5, T5Config
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer
from support.training import optim as optimizing
from support.training.journal import Journal
from support.training.settings import MMCOT_DEMO, parse_args

pytestmark = pytest.mark.usefixtures("read_once")
TINY = T5Config(
    vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0
)


def tiny_model(features=True):
    torch.manual_seed(0)
    t5 = T5(TINY)
    t5.init_weights()
    return fusion.MultimodalT5(t5, fusion.GatedFusion(16, 6) if features else None)


def example(name, source, target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "id": name,
        "input_ids": torch.randint(3, 40, (source,), generator=generator).tolist() + [1],
        "labels": torch.randint(3, 40, (target,), generator=generator).tolist() + [1],
        "image_features": torch.randn(5, 6, generator=generator),
    }


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


EXAMPLES = [example(f"q{i}", 4 + 3 * i, 2 + 5 * (i % 3), i) for i in range(6)]


def settings(**changed):
    given = ["--model", "mmcot", "--device", "cpu", "--batch-size", "2", "--epochs", "1"]
    return argparse.Namespace(**vars(parse_args(given)) | changed)


def watched(args):
    return lambda model: {"val_loss": train.mean_loss(model, EXAMPLES, args)}


def gradients(model, windows):
    tokens = sum(len(e["labels"]) for rows in windows for e in rows)
    for rows in windows:
        loss, _ = train.t5_loss(model, data.collate(rows), settings())
        (loss / tokens).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_loss_is_the_plain_cross_entropy_of_the_logits():
    model = tiny_model()
    batch = data.collate(EXAMPLES)
    names = ("input_ids", "attention_mask", "image_features", "decoder_input_ids")
    logits = model(*(batch[k] for k in names))
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    loss, tokens = train.t5_loss(model, batch, settings())
    assert tokens == sum(len(e["labels"]) for e in EXAMPLES)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_changes_neither_loss_nor_gradient():
    """The released code kept pads (id 0) in the labels, and most of its loss was about them."""
    model = tiny_model()
    alone = sum(train.t5_loss(model, data.collate([e]), settings())[0].item() for e in EXAMPLES)
    together = train.t5_loss(model, data.collate(EXAMPLES), settings())[0].item()
    assert together == pytest.approx(alone, rel=1e-5)


def test_accumulated_batches_equal_the_big_batch_with_unequal_lengths():
    """Averaging the batches' averages, as most loops do, weighs short batches too much."""
    whole = gradients(tiny_model(), [EXAMPLES])
    parts = gradients(tiny_model(), [EXAMPLES[:1], EXAMPLES[1:3], EXAMPLES[3:]])
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-6, rtol=1e-4)


def test_every_parameter_gets_a_gradient():
    model = tiny_model()
    gradients(model, [EXAMPLES])
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_weight_decay_spares_norms_and_everything_called_bias(capsys):
    model = tiny_model()
    optimizer = optimizing.make_optimizer(model, 1e-3, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert "t5.encoder.relative_attention_bias.weight" in spared
    assert "fusion.mha_layer.in_proj_bias" in spared
    assert "t5.encoder.final_layer_norm.weight" in spared
    assert {"t5.shared.weight", "fusion.gate_dense.weight"} <= decayed
    total = sum(p.numel() for p in model.parameters())
    assert f"trainable {total:,} of {total:,} parameters" in capsys.readouterr().out


def test_adamw_is_the_library_s_to_the_bit():
    """Also from a state of three steps; a parameter without a gradient stays as it is."""
    ours, theirs = tiny_model(), tiny_model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizing.make_optimizer(ours, 1e-2, 0.01)
    groups = optimizing.make_optimizer(theirs, 1e-2, 0.01).param_groups
    reference = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(6):
        for model in (ours, theirs):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.sin(p.detach() * (i + step)) if i else None
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = optimizing.make_optimizer(ours, 1e-2, 0.01)
            optimizer.load_state_dict(saved)
        optimizer.step()
        reference.step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_windows_cover_every_example_once_an_epoch():
    args = settings(batch_size=2, accumulate=2)
    generator = torch.Generator().manual_seed(0)
    plan = list(train.windows(EXAMPLES, args, 2, generator))
    assert len(plan) == 4 and [len(w) for w in plan] == [2, 1, 2, 1]
    for epoch in (plan[:2], plan[2:]):
        seen = sorted(e["id"] for window in epoch for rows in window for e in rows)
        assert seen == [f"q{i}" for i in range(6)]
    assert len(list(train.windows(EXAMPLES, args, 0.5, generator))) == 1
    assert list(train.windows(EXAMPLES, args, 0, generator)) == []


def test_a_loss_that_is_not_finite_names_the_records(tmp_path):
    model, args = tiny_model(), settings(batch_size=6)
    with torch.no_grad():
        next(model.fusion.parameters()).fill_(float("nan"))
    with (
        open(tmp_path / "log.jsonl", "w") as log,
        pytest.raises(FloatingPointError, match=r"rationale, step 1: loss nan.*q3.*--lr"),
    ):
        train.fit(model, EXAMPLES, watched(args), args, "rationale", 1, Journal(log))


def test_training_lowers_the_loss_and_logs_each_step(tmp_path):
    args = settings(batch_size=3, lr=1e-2)
    with open(tmp_path / "log.jsonl", "w") as log:
        train.fit(tiny_model(), EXAMPLES, watched(args), args, "answer", 20, Journal(log))
    lines = lines_of(tmp_path / "log.jsonl")
    assert [x["step"] for x in lines] == list(range(1, 41))
    assert lines[-1]["val_loss"] < 0.5 * lines[1]["val_loss"]
    assert lines[0]["lr"] == 1e-2 and lines[-1]["lr"] == pytest.approx(1e-2 / 40)


# ---- runs on the demo --------------------------------------------------------------------------

SHORT = "--model mmcot --device cpu --limit 24 --epochs 3 --max-steps 3".split()


def run(tmp_path, *more, name="run"):
    train.main([*SHORT, "--out", str(tmp_path / name), *more])
    return tmp_path / name


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), "--teacher-forced")


def weights(folder):
    model = fusion.MultimodalT5.from_pretrained(folder)
    return torch.cat([p.flatten() for p in model.state_dict().values()])


def test_a_run_folder_has_what_the_design_says(short_run, capsys):
    config = json.loads((short_run / "config.json").read_text())
    assert (
        config["seed"] == 42 and config["recipe"] == "two-stage" and "torch" in config["versions"]
    )
    log = lines_of(short_run / "log.jsonl")
    assert [x["stage"] for x in log] == ["rationale"] * 3 + ["answer"] * 3
    metrics = json.loads((short_run / "metrics.json").read_text())
    assert metrics["n"] == 24 and 0 < metrics["chance"] < 100
    assert {"avg", "NAT", "IMG", "G7-12"} <= metrics["accuracy"].keys()
    predictions = lines_of(short_run / "predictions.jsonl")
    assert len(predictions) == 24
    assert {"id", "response", "rationale", "stop", "tokens", "correct"} <= predictions[0].keys()
    assert 0 < metrics["rougeL"] <= 100 and 0 < metrics["rougeL_teacher_forced"] <= 100


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(short_run, tmp_path):
    again = run(tmp_path)
    for stage in ("rationale", "answer"):
        assert torch.equal(weights(short_run / stage), weights(again / stage))
    assert (short_run / "predictions.jsonl").read_bytes() == (
        again / "predictions.jsonl"
    ).read_bytes()
    other = run(tmp_path, "--seed", "7", "--recipe", "answer", name="other")
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
    folder = run(tmp_path, "--stage", "rationale")
    assert not (folder / "metrics.json").exists()
    run(tmp_path, "--stage", "answer")
    assert torch.equal(weights(short_run / "answer"), weights(folder / "answer"))
    assert (folder / "metrics.json").exists()


@pytest.mark.slow
def test_text_only_runs_have_no_fusion_and_captions_are_in_the_prompt(tmp_path, capsys):
    plain = run(tmp_path, "--vision", "none", "--recipe", "answer")
    assert fusion.MultimodalT5.from_pretrained(plain / "answer").fusion is None
    capsys.readouterr()
    run(tmp_path, "--vision", "caption", "--recipe", "reason", name="captions")
    source = capsys.readouterr().out.split("supervised")[0]
    problem = data.load("demo", "train")[0]
    assert problem.meta["caption"] and problem.meta["caption"].split()[-1] in source


@pytest.mark.slow
def test_one_output_limit_serves_both_stages(tmp_path):
    folder = run(tmp_path, "--max-output", "20")
    assert max(x["tokens"] for x in lines_of(folder / "predictions.jsonl")) <= 40


def test_published_features_need_their_map(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", "mmcot", "--features", "detr.npy"])
    assert "--name-map" in capsys.readouterr().err


def test_own_rationales_come_from_models_that_did_not_train_on_them(monkeypatch, tmp_path):
    trained_on = []

    def stage(args, stage, splits, *rest):
        trained_on.append({p.id for p in splits["train"]})
        return len(trained_on) - 1

    def write(decoder, examples, max_new_tokens):
        ids = [example["id"] for example in examples]
        assert not trained_on[decoder.model] & set(ids)
        return {i: {"text": f"by {decoder.model}"} for i in ids}

    monkeypatch.setattr(train, "run_stage", stage)
    monkeypatch.setattr(train.Decoder, "t5_texts", write)
    monkeypatch.setattr(train, "DecodeCache", lambda folder, models: None)
    problems = data.load("demo", "train")[:9]
    tokenizer = load_tokenizer(ROOT / "demo/t5")
    made = train.own_rationales(settings(), {"train": problems}, tokenizer, None, None)
    assert made.keys() == {p.id for p in problems} and len(trained_on) == 2
    folds = [sorted(p.id in ids for p in problems[::2]) for ids in trained_on]
    assert all(False in fold and True in fold for fold in folds)  # not every second problem


def test_a_question_can_be_asked_of_a_run(short_run, capsys):
    problem = next(p for p in data.load("demo", "test") if p.image)
    asked = [str(short_run), "--image", problem.image, "--question", problem.question]
    evaluation.main([*asked, "--choices", *problem.choices])
    lines = capsys.readouterr().out.strip().splitlines()
    predictions = {x["id"]: x for x in lines_of(short_run / "predictions.jsonl")}
    if problem.id in predictions and not problem.hint:
        assert lines[0] == predictions[problem.id]["rationale"]
    assert len(lines) == 2


@pytest.mark.slow
def test_errors_are_sentences_without_traceback(tmp_path):
    nowhere = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    bad = [sys.executable, "train.py", *SHORT, *nowhere]
    told = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 1 and "Traceback" not in told.stderr
    last = told.stderr.strip().splitlines()[-1]  # one sentence, behind the name of the program
    assert last.startswith("train.py: ") and last.endswith(".") and "nowhere" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    ["--batch-size 0", "--accumulate 0", "--max-steps 0", "--limit 0", "--eval-batch-size -1",
     "--epochs -1", "--epochs 3 -2", "--max-output 64 0", "--lr -1", "--lr nan", "--threads 0"],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", "mmcot", *flags.split()])
    assert f"{flags.split()[0]} " in capsys.readouterr().err.splitlines()[-1]
    assert parse_args("--model mmcot --epochs 0 --weight-decay 0".split()).epochs == [0.0]


def test_your_own_data_need_all_three_splits(tmp_path):
    record = {"id": 1, "question": "?", "choices": ["a", "b"], "answer": 0, "split": "train"}
    (tmp_path / "own.jsonl").write_text(json.dumps(record))
    message = r'own.jsonl has no record with "split": "val".* needs problems of train, val, test'
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--data", str(tmp_path / "own.jsonl"))


@pytest.mark.slow
def test_the_demo_learns_to_look_at_the_picture(tmp_path):
    """The default run in half its epochs: what it has learned then is the same. Without pictures a
    model can reach about 43 % (see demo/scenes.py)."""
    half = ["--epochs", *(str(epochs / 2) for epochs in MMCOT_DEMO["epochs"])]
    train.main(["--model", "mmcot", *half, "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n"] >= 300
    assert metrics["accuracy"]["avg"] > 55
    assert metrics["parse_failures"] < 5


def test_a_fusion_that_cannot_be_saved_is_not_trained(monkeypatch):
    """A hacked layer without a row in the table of names cost a whole stage before it was said."""

    class Mixed(fusion.GatedFusion):
        def __init__(self, *args):
            super().__init__(*args)
            self.mix = torch.nn.Linear(2, 2)

    monkeypatch.setattr(fusion, "GatedFusion", Mixed)
    args = parse_args(["--model", "mmcot", "--device", "cpu"])
    features = Features(torch.zeros(1, 36, 64).numpy(), {})
    with pytest.raises(ValueError, match="no row for: fusion.mix.bias, fusion.mix.weight"):
        train.start_model(args, features, 0)
