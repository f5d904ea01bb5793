"""Runs of train.py --model paligemma on the committed demo checkpoint: files, flags, errors.

They are short: how good the model is matters to no test but the slow one at the end.
"""

import contextlib
import functools
import io
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, scored
from safetensors.torch import load_file
from small_runs import PALIGEMMA, lines_of, plan_of, settings, steps

import data
import eval as evaluation
import lora
import model as backbones
import train
from support.checkpoints.peft import CONFIG, WEIGHTS
from support.dataset import images
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer, plain_ids, special_ids
from support.evaluation import models
from support.files import read_json
from support.training import examples, optim
from support.training.ablations import BASELINES, PALIGEMMA_ABLATION

TEXT = read_json(f"{PALIGEMMA}/config.json")["text_config"]
pytestmark = pytest.mark.usefixtures("read_once")
BASE = "--model paligemma --device cpu".split()
SHORT = [*BASE, *"--limit 24 --max-steps 3 --eval-problems 4 --max-output 40 8".split()]
TINY = [*BASE, *"--limit 8 --max-steps 2 --eval-problems 2 --max-output 8 4 --alone".split()]

Run = namedtuple("Run", "folder out")


def run(folder, *flags, base=TINY):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train.main([*base, "--out", str(folder), *flags])
    return Run(folder, out.getvalue())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PALIGEMMA)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """As a newcomer's run, baselines and all, but short."""
    return run(tmp_path_factory.mktemp("runs") / "run", base=SHORT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "tiny")


def adapter(folder):
    return load_file(folder / WEIGHTS)


# ---- the plan ------------------------------------------------------------------------------------


@pytest.fixture
def planned(tokenizer):
    """Flags -> the plan of a run's training, its rows, its inputs and its model."""

    def make(*flags, n=30):
        chosen = settings("paligemma", "--lora-r", "2", *flags)
        model = models.load_paligemma(chosen)
        splits = {split: data.load("demo", split)[:n] for split in ("train", "val")}
        rows = examples.training_rows(chosen, splits["train"])
        features = models.image_features(chosen, splits["train"] + splits["val"], model)
        inputs = examples.Inputs(splits, tokenizer, features)
        plan = train.plan_tuning(chosen, model, rows, inputs)
        return SimpleNamespace(plan=plan, rows=rows, inputs=inputs, model=model, settings=chosen)

    return make


def test_rows_for_the_validation_loss_are_not_trained_on(planned, tokenizer):
    """Every 20th problem, with all its rows: those of the mix too."""
    got = planned("--mix", "1", "--max-output", "6", "4", n=60)
    ids = list(dict.fromkeys(row.problem.id for row in got.rows))
    held = set(ids[::20])
    assert len(held) == 2 and {row["id"] for row in got.plan.rows} == set(ids) - held
    assert len(got.plan.rows) == 2 * (len(ids) - 2)
    rows = [row for row in got.rows if row.problem.id in held]
    rows = data.pali_examples(rows, tokenizer, got.inputs.features, max_suffix=96)
    assert len(rows) == 4
    loss = optim.mean_loss(got.plan.loss_of, rows, got.settings.batch_size[0])
    assert got.plan.validate(got.plan.loss_of)["val_loss"] == pytest.approx(loss, abs=2e-6)


def test_validation_accuracy_is_of_real_answers(planned, tokenizer, monkeypatch):
    got = planned("--recipe", "answer", "--eval-problems", "12")
    val = got.inputs.splits["val"][:12]
    texts = evaluation.predict([got.model], val, got.settings, tokenizer, got.inputs.features)
    grades = [evaluation.grade(p, x["response"]) for p, x in zip(val, texts, strict=True)]
    modes, predict = [], evaluation.predict

    def spied(models, *rest):
        modes.append(models[0].training)
        return predict(models, *rest)

    monkeypatch.setattr(evaluation, "predict", spied)
    got.model.train()
    accuracy = round(100 * sum(grade.correct for grade in grades) / 12, 2)
    assert got.plan.validate(got.plan.loss_of)["val_accuracy"] == accuracy
    assert modes == [False]  # without dropout
    none = planned("--recipe", "answer", "--eval-problems", "0")
    assert none.plan.validate(none.plan.loss_of).keys() == {"val_loss"}


@pytest.mark.slow
def test_suffixes_that_are_too_long_are_dropped_and_counted(planned, capsys):
    got = planned("--limit-traces", "12")
    lengths = sorted(sum(row["token_type_ids"]) for row in got.plan.rows)
    limit = lengths[-4]  # at least three are over it
    capsys.readouterr()
    fewer = planned("--limit-traces", "12", "--max-suffix", str(limit)).plan.rows
    err = capsys.readouterr().err
    assert sum(length > limit for length in lengths) and f"max_suffix {limit}" in err
    assert f"of {len(got.rows)} rows" in err
    assert all(sum(row["token_type_ids"]) <= limit for row in fewer)
    assert all(row["labels"][-1] == 1 for row in fewer)  # not cut
    with pytest.raises(ValueError, match="0 rows are left.*--max-suffix"):
        planned("--max-suffix", "3")
    with pytest.raises(ValueError, match="1 rows are left, 1 of them"):
        planned("--limit-traces", "1")


def test_the_plan_has_the_settings_of_the_run():
    flags = "--lr 0.5 --weight-decay 0.2 --seed 3 --full --weighting example --label-smoothing 0.1"
    chosen = settings("paligemma", *flags.split())
    plan = plan_of(torch.nn.Linear(1, 1), chosen, [])
    assert plan.loss_of.settings == replace(chosen, epochs=(1,))
    assert plan.loss_of.loss is train.paligemma_loss


# ---- files ---------------------------------------------------------------------------------------


def test_a_run_folder_has_its_files(short, tokenizer):
    trained = "config.json log.jsonl adapter_model.safetensors adapter_config.json tokenizer.json"
    decoded = "predictions.jsonl metrics.json looks.json report.html"
    names = {path.name for path in short.folder.iterdir() if path.is_file()}
    assert names == {*trained.split(), *decoded.split()}
    config = read_json(short.folder / "config.json")
    assert config["seed"] == 42 and config["recipe"] == "reason" and config["max_steps"] == 3
    assert {"versions", "commit", "traces", "lora_r", "samples"} <= config.keys()
    assert read_json(short.folder / CONFIG)["base_model_name_or_path"] == PALIGEMMA
    log = steps((short.folder / "log.jsonl").read_text())
    assert [(x["stage"], x["step"]) for x in log] == [("reason", i) for i in (1, 2, 3)]
    assert {"loss", "lr", "grad_norm", "tokens", "seconds", "val_accuracy"} <= log[-1].keys()
    again = load_tokenizer(short.folder)
    assert again.encode("Answer: B").ids == tokenizer.encode("Answer: B").ids
    assert "<image> x 36" in short.out and "supervised" in short.out


def test_predictions_and_metrics_are_of_the_test_split(short):
    problems = data.load("demo", "test")[:24]
    predictions = lines_of(short.folder / "predictions.jsonl")
    assert [x["id"] for x in predictions] == [p.id for p in problems]
    keys = {"id", "response", "rationale", "stop", "tokens", "correct", "parsed", "how", "kind"}
    assert all(keys <= x.keys() and 0 < x["tokens"] <= 40 + 8 for x in predictions)
    assert {x["stop"] for x in predictions} <= {"eos", "loop", "length", "forced"}
    metrics = read_json(short.folder / "metrics.json")
    right = sum(x["correct"] for x in predictions)
    assert metrics["n"] == 24 and metrics["accuracy"]["avg"] == round(100 * right / 24, 2)
    luck = sum(1 / len(p.choices) for p in problems) / 24
    assert metrics["chance"] == round(100 * luck, 2) and sum(metrics["stop"].values()) == 24


def test_the_baselines_are_in_the_table(short):
    folders = {path.name: path for path in short.folder.iterdir() if path.is_dir()}
    assert folders.keys() == {"base", "base--asked-to-reason", "answer-only"}
    rows = [line.split("  ")[0] for line in short.out.splitlines()[-12:]]
    start = rows.index("chance")
    assert rows[start : start + 5] == ["chance", *BASELINES]
    for name, folder in folders.items():
        assert read_json(folder / "metrics.json")["n"] == 24
        config, trained = read_json(folder / "config.json"), name == "answer-only"
        assert config["recipe"] == ("reason" if "reason" in name else "answer")
        assert (folder / WEIGHTS).exists() == (folder / "log.jsonl").exists() == trained
        lines = lines_of(folder / "predictions.jsonl")
        assert all(("rationale" in x) == ("reason" in name) for x in lines)
    one, other = (read_json(f / "config.json") for f in (short.folder, folders["answer-only"]))
    for name in ("lora_r", "epochs", "lr", "max_steps"):
        assert one[name] == other[name]


def test_the_base_is_the_model_as_it_was(short, tokenizer):
    chosen = settings("paligemma", "--recipe", "answer", "--max-output", "40", "8")
    problems = data.load("demo", "test")[:24]
    model = models.load_paligemma(chosen)
    features = models.image_features(chosen, problems, model)
    texts = evaluation.predict([model], problems, chosen, tokenizer, features)
    kept = lines_of(short.folder / "base/predictions.jsonl")
    assert [x["response"] for x in texts] == [x["response"] for x in kept]


@pytest.mark.parametrize("ablation", [False, True])
def test_the_runs_of_a_table_are_shown(ablation, tmp_path, monkeypatch):
    problem = data.load("demo", "val")[0]
    scores = scored([problem], [{"id": problem.id, "response": "A"}])
    ran = []
    monkeypatch.setattr(train, "run_paligemma", lambda chosen, stop: ran.append(chosen) or scores)
    base = [flag for flag in TINY if flag != "--alone"]
    out = run(tmp_path / "all", *(["--ablation"] if ablation else []), base=base).out
    assert [line.out for line in ran].count(str(tmp_path / "all")) == 1
    for name in PALIGEMMA_ABLATION if ablation else BASELINES:
        assert any(line.startswith(name) for line in out.splitlines()[-20:])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tiny, tmp_path):
    again = run(tmp_path / "again").folder
    for name in (WEIGHTS, "predictions.jsonl"):
        assert (again / name).read_bytes() == (tiny.folder / name).read_bytes()
    one, other = adapter(again), adapter(run(tmp_path / "other", "--seed", "7").folder)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


@pytest.mark.slow
def test_decoding_again_gives_the_same_predictions(short, tiny, tmp_path, capsys):
    """A run, and an adapter by itself."""
    folder = run(tmp_path / "decoded", "--adapter", str(tiny.folder), "--epochs", "0").folder
    before = (tiny.folder / "predictions.jsonl").read_bytes()
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert not (folder / WEIGHTS).exists() and not (folder / "log.jsonl").exists()
    for path, limit in ((short.folder, "24"), (folder, "8")):
        before = (path / "predictions.jsonl").read_bytes()
        evaluation.main([str(path), "--decode", "--limit", limit])
        assert (path / "predictions.jsonl").read_bytes() == before
        assert "chance" in capsys.readouterr().out


@pytest.mark.slow
def test_training_starts_from_an_adapter(tiny, tmp_path):
    rank = read_json(tiny.folder / CONFIG)["r"]
    flags = ["--adapter", str(tiny.folder), "--lora-r", str(rank + 3), "--lr", "1e-8"]
    further = run(tmp_path / "further", *flags).folder
    assert read_json(further / CONFIG)["r"] == rank  # the adapter's, not the flag's
    for name, tensor in adapter(further).items():
        torch.testing.assert_close(tensor, adapter(tiny.folder)[name], atol=1e-7, rtol=0)


def test_a_question_can_be_asked_of_a_run(short, capsys):
    predictions = {x["id"]: x for x in lines_of(short.folder / "predictions.jsonl")}
    problems = [p for p in data.load("demo", "test")[:24] if not p.hint]
    with_image = next(p for p in problems if p.image)
    for problem in (with_image, next((p for p in problems if not p.image), with_image)):
        flags = [str(short.folder), "--question", problem.question, "--choices", *problem.choices]
        evaluation.main([*flags, *(["--image", problem.image] if problem.image else [])])
        prediction = predictions[problem.id]
        letter = prediction["parsed"]
        choice = f"  ({problem.choices['ABCDE'.index(letter)]})" if letter else ""
        assert capsys.readouterr().out.strip() == (prediction["response"] + choice).strip()
    evaluation.main([str(short.folder), "--question", "What is it?"])
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_adapter_loads_in_peft_and_writes_the_same(short):
    """Our files in other people's libraries: transformers' PaliGemma with PEFT's LoRA."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        PALIGEMMA, attn_implementation="eager"
    )
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    base = theirs.state_dict()[name].clone()
    theirs = peft.PeftModel.from_pretrained(theirs, short.folder).eval()
    _, (ours,), tokenizer = evaluation.load_run(short.folder)
    ours.config = replace(ours.config, eos_token_id=-1)  # on past the end: more to compare
    for problem in [p for p in data.load("demo", "test") if p.image][:3]:
        prefix = data.pali_prefix(problem, "reason")
        row = data.sequence(tokenizer, prefix, image_tokens=ours.config.image_tokens)
        size = ours.config.vision.image_size
        ids = torch.tensor([row["input_ids"]])
        inputs = {
            "input_ids": ids,
            "pixel_values": images.siglip_pixels(images.open_image(problem.image), size)[None],
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "max_new_tokens": 24,
        }
        out = theirs.generate(**inputs, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out[:, ids.shape[1] :].tolist() == ours.generate(**inputs).tolist()
    merged = theirs.merge_and_unload().state_dict()
    assert not torch.equal(merged[name], base)  # it was there


@pytest.mark.slow
def test_full_training_moves_the_image_tower_and_is_decoded_from_its_folder(tmp_path, capsys):
    folder = run(tmp_path / "full", "--full", "--lr", "1e-3", "--no-final-soft-cap").folder
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names and WEIGHTS not in names
    before, after = (
        backbones.PaliGemma.from_pretrained(f).state_dict() for f in (PALIGEMMA, folder)
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    idle = {n for n in same if n.endswith("k_proj.bias")}  # shifts all scores alike: no gradient
    assert same == idle and not any("vision_tower.embeddings" in name for name in same)
    config = read_json(folder / "config.json")
    assert config["recipe"] == "reason" and config["model_type"] == "paligemma"
    predictions = (folder / "predictions.jsonl").read_bytes()
    evaluation.main([str(folder), "--decode", "--limit", "8"])
    assert (folder / "predictions.jsonl").read_bytes() == predictions
    problem = next(p for p in data.load("demo", "test") if p.image)
    evaluation.main([str(folder), "--question", problem.question, "--image", problem.image])
    assert capsys.readouterr().out


@pytest.mark.slow
def test_adapters_on_the_image_tower_read_images_too(tmp_path):
    """The cache is the base's: one trained elsewhere may have changed what the tower sees."""
    target = "vision_tower.encoder.layers.0.self_attn.q_proj"
    folder = run(tmp_path / "tower", "--lora-targets", target, "--lr", "0.5").folder
    assert [key for key in adapter(folder) if "vision_tower" not in key] == []
    assert all(tensor.any() for tensor in adapter(folder).values())
    chosen, (model,), _ = evaluation.load_run(folder)
    problems = [p for p in data.load("demo", "test") if p.image][:2]
    assert isinstance(models.image_features(chosen, problems, model), images.LazyImages)
    plain = models.load_paligemma(chosen)
    assert isinstance(models.image_features(chosen, problems, plain), Features)
    full = replace(chosen, full=True)
    assert isinstance(models.image_features(full, problems, plain), images.LazyImages)


# ---- one flag each -------------------------------------------------------------------------------


def test_plain_adapters_are_on_all_seven_projections(tiny):
    keys = {key.split(".")[-3] for key in adapter(tiny.folder)}
    assert keys == set(lora.GEMMA_TARGETS)
    assert not any("magnitude" in key or "vision" in key for key in adapter(tiny.folder))


@pytest.mark.slow
def test_dora(tmp_path):
    folder = run(tmp_path / "dora", "--lora-dora").folder
    moved = {k: t for k, t in adapter(folder).items() if "lora_magnitude_vector" in k}
    assert len(moved) == 7 * TEXT["num_hidden_layers"]
    assert read_json(folder / CONFIG)["use_dora"] is True
    (model,) = evaluation.load_run(folder)[1]
    layers = lora.adapters(model).values()
    assert all((x.lora_magnitude_vector != x.weight.norm(dim=1)).any() for x in layers)


def test_lora_settings_reach_the_adapter(tmp_path):
    flags = "--lora-r 3 --lora-alpha 5 --lora-dropout 0.25 --lora-rslora".split()
    folder = run(tmp_path / "lora", *flags, "--lora-targets", "q_proj", "v_proj").folder
    config = read_json(folder / CONFIG)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.25)
    assert config["use_rslora"] is True and config["use_dora"] is False
    assert {key.split(".")[-3] for key in adapter(folder)} == {"q_proj", "v_proj"}
    assert len(adapter(folder)) == 2 * 2 * TEXT["num_hidden_layers"]


@pytest.mark.slow
def test_the_final_soft_cap_can_be_off(tiny, tmp_path, monkeypatch):
    logits = []

    def spied(model, batch, *options, loss=train.paligemma_loss):
        logits.append(model.head(1e4 * model.states(**models.paligemma_inputs(model, batch))))
        return loss(model, batch, *options)

    monkeypatch.setitem(train.LOSS, "paligemma", spied)
    folder = run(tmp_path / "uncapped", "--no-final-soft-cap").folder
    assert logits[0].abs().max() > TEXT["final_logit_softcapping"] + 1
    caps = {}
    for path in (folder, tiny.folder):
        (model,) = evaluation.load_run(path)[1]
        caps[path] = model.config.text.final_logit_softcapping
    assert caps == {folder: None, tiny.folder: TEXT["final_logit_softcapping"]}


@pytest.mark.parametrize("layout", ["paligemma", "seed"])
def test_the_layout_is_that_of_training_and_of_decoding(layout, planned, tokenizer):
    got = planned("--layout", layout)
    problems = got.inputs.splits["val"]
    prompts = models.prompt_examples(got.settings, problems, tokenizer, got.inputs.features)
    special, newline = special_ids(tokenizer), plain_ids(tokenizer, "\n")[0]
    for row in got.plan.rows + prompts:
        start = row["token_type_ids"].count(0)
        prefix = [i for i in row["input_ids"][:start] if i != special["image"]]
        assert prefix.count(special["bos"]) == 1 and prefix[-1] == newline
        place = 0 if layout == "paligemma" else len(prefix) - 2
        assert prefix.index(special["bos"]) == place


@pytest.mark.parametrize("flags, last", [([], 1), (["--no-eos-loss"], -100)])
def test_eos_is_always_there_and_in_the_loss_by_default(flags, last, planned):
    for row in planned(*flags).plan.rows:
        assert row["input_ids"][-1] == 1 and row["labels"][-2] == row["input_ids"][-2]
        assert row["labels"][-1] == last


def test_choices_can_be_shuffled_in_training_rows(planned, tokenizer):
    plain, mixed = (planned("--keep", "all", *x).plan.rows for x in ([], ["--shuffle-choices"]))
    problems, moved = {p.id: p for p in data.load("demo", "train")}, 0
    traces = examples.load_traces(examples.demo_traces())
    judged = {t["id"]: t["verdict"]["correct"] for t in traces}
    for one, other in zip(plain, mixed, strict=True):
        texts = [tokenizer.decode(x["input_ids"]).replace("\n ", "\n") for x in (one, other)]
        before, choices = (text.split("Choices:")[1].split("\n")[0] for text in texts)
        if before != choices:
            letter = texts[1].split("Answer:")[1].strip()[0]
            gold = problems[one["id"]].answer
            assert f"({letter}) {gold}" in choices and judged[one["id"]]
            moved += 1
    assert moved > 3


@pytest.mark.slow
def test_checkpointing_gives_the_same_adapters(tiny, tmp_path, monkeypatch):
    calls = []
    original = backbones.checkpoint

    @functools.wraps(original)
    def counted(layer, *args, **options):
        calls.append(layer)
        return original(layer, *args, **options)

    monkeypatch.setattr(backbones, "checkpoint", counted)
    folder = run(tmp_path / "again", "--checkpointing").folder
    assert len(calls) == 2 * TEXT["num_hidden_layers"]  # two steps
    for name, tensor in adapter(folder).items():
        torch.testing.assert_close(tensor, adapter(tiny.folder)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_bf16_is_for_frozen_weights_alone(tiny, tmp_path, monkeypatch):
    fitted, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda *args: fitted.append(fit(*args)) or fitted[0])
    got = run(tmp_path / "half", "--dtype", "bfloat16")
    dtypes = {(p.requires_grad, p.dtype) for p in fitted[0].parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    one, other = adapter(tiny.folder), adapter(got.folder)
    assert all(tensor.dtype == torch.float32 for tensor in other.values())
    distance = sum((one[k] - other[k]).norm() for k in one) / sum(one[k].norm() for k in one)
    assert 0 < distance < 0.5  # rounded, and not another run
    (model,) = evaluation.load_run(got.folder)[1]
    assert model.language_model.embed_tokens.weight.dtype == torch.bfloat16
    before = (got.folder / "predictions.jsonl").read_bytes()
    evaluation.main([str(got.folder), "--decode", "--limit", "8"])
    assert (got.folder / "predictions.jsonl").read_bytes() == before


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--limit", "2", "--keep", "consistent", "--limit-traces", "0"], "No trace"),
        (["--traces", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--lora-targets", "no_proj"], "no_proj"),
        (["--weights", str(ROOT / "demo/t5")], "t5"),
        (["--test-split", "exam"], "exam"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_a_run_that_cannot_start_leaves_nothing(flags, named, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=named):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_machine_names_the_device(tiny, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "run"))
    config = read_json(folder / "config.json") | {"device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda'"):
        evaluation.main([str(folder), "--decode"])
    evaluation.main([str(folder), "--decode", "--device", "cpu", "--limit", "2"])


def test_paligemma_1_is_refused(tmp_path):
    shutil.copytree(PALIGEMMA, tmp_path / "first")
    config = read_json(f"{PALIGEMMA}/config.json")
    config["text_config"]["model_type"] = "gemma"
    (tmp_path / "first/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PaliGemma 1"):
        run(tmp_path / "run", "--weights", str(tmp_path / "first"))
    assert not (tmp_path / "run").exists()


# ---- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_learns_to_reason(tmp_path, monkeypatch):
    """The default run, in three of its four epochs and with one of its baselines: `short` above
    has all of them."""
    lines = {name: BASELINES[name] for name in ("base", "distilled")}
    monkeypatch.setattr("support.training.ablations.BASELINES", lines)
    train.main(["--model", "paligemma", "--epochs", "3", "--out", str(tmp_path / "run")])
    metrics = read_json(tmp_path / "run/metrics.json")
    base = read_json(tmp_path / "run/base/metrics.json")
    assert metrics["n"] == base["n"] >= 300
    assert metrics["accuracy"]["avg"] >= base["accuracy"]["avg"] + 15
    assert metrics["parse_failures"] < 5
