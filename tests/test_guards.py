"""What stops a run, and what it goes on without: guards in training, bad records, --dry-run."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import fusion
import lora
import model as backbones
import train
from model import T5, T5Config
from support.dataset import images as pictures
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import load_traces
from support.evaluation import models as loading
from support.files import read_json, write_json
from support.training import checks as guards
from support.training import dry_run, folders
from support.training import examples as records
from support.training import optim as optimizing
from support.training.journal import Journal, Stopped, in_use
from support.training.settings import parse_args

TINY = T5Config(
    vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.1
)
PALI = str(ROOT / "demo/paligemma")


def settings(name="mmcot", *flags):
    given = ["--model", name, "--device", "cpu", "--batch-size", "3", "--lr", "0.01", *flags]
    return parse_args(given)


def mmcot():
    torch.manual_seed(0)
    t5 = T5(TINY)
    t5.init_weights()
    return fusion.MultimodalT5(t5, fusion.GatedFusion(16, 6))


def example(i):
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(3, 40, (2, 4 + 2 * i), generator=generator).tolist()
    return {
        "id": f"q{i}",
        "input_ids": ids[0],
        "labels": ids[1][: 3 + i] + [1],
        "image_features": torch.randn(5, 6, generator=generator),
    }


@pytest.fixture(scope="module")
def pali():
    """() -> (the demo's PaliGemma with adapters, its settings, examples of unequal lengths)."""
    args = settings("paligemma", "--lora-r", "2", "--threads", "1")
    problems = data.load("demo", "train")[:3]
    tokenizer = load_tokenizer(PALI)
    verdict = dict.fromkeys(("correct", "consistent"), True)
    rows = [
        data.TrainRow(
            p, "reason", {"thought": "It is so. " * i, "answer": p.answer, "verdict": verdict}
        )
        for i, p in enumerate(problems, 1)
    ]

    def made():
        model = loading.load_paligemma(args)
        with contextlib.redirect_stdout(io.StringIO()):
            train.make_trainable(args, model)
        text, seen = model.config.text, model.config.image_tokens
        generator = torch.Generator().manual_seed(0)
        array = torch.randn(3, seen, text.hidden_size, generator=generator).numpy()
        features = Features(array, {p.id: i for i, p in enumerate(problems)})
        return (
            model,
            args,
            data.pali_examples(rows, tokenizer, features, max_suffix=args.max_suffix),
        )

    return made


@pytest.fixture(params=["mmcot", "paligemma"])
def given(request):
    if request.param == "mmcot":
        return mmcot(), settings(), [example(i) for i in range(3)]
    return request.getfixturevalue("pali")()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fit(model, examples, args, epochs=2):
    log = io.StringIO()
    train.fit(model, examples, lambda model: {}, args, "reason", epochs, Journal(log))
    return [json.loads(line) for line in log.getvalue().splitlines()]


def stopped(error, match, model, examples, args):
    """It stops with that sentence, which names the records, and the weights are as they were."""
    before = weights(model)
    with pytest.raises(error, match=match) as stop:
        fit(model, examples, args)
    assert all(e["id"] in str(stop.value) for e in examples)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


# ---- mask leaks --------------------------------------------------------------------------------


def test_no_guard_fires_on_honest_training(given):
    model, args, examples = given
    assert len(fit(model, examples, args)) == 2


def test_the_leak_test_changes_no_generator_and_no_weight(given):
    model, args, examples = given
    before, state = weights(model), torch.get_rng_state()
    guards.stop_if_it_leaks(train.LossOf(model, args), examples, "reason")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


LEAKS = {}


def leak(name):
    return lambda spoil: LEAKS.setdefault(name, spoil)


@leak("mmcot: a decoder without a causal mask")
def _(patch):
    real = backbones.T5Stack.position_bias

    def seen(self, *rest):
        return real(self, *rest).clamp(min=-1e3).relu()

    patch.setattr(backbones.T5Stack, "position_bias", seen)


@leak("mmcot: a decoder that sees one token ahead")
def _(patch):
    real = backbones.T5Stack.position_bias

    def seen(self, start, end):
        bias = real(self, start, end)
        ahead = torch.ones(bias.shape[-2:]).triu(1).tril(1).bool()
        return bias.masked_fill(ahead, 0.0) if self.is_decoder else bias

    patch.setattr(backbones.T5Stack, "position_bias", seen)


@leak("mmcot: labels as decoder input")
def _(patch):
    real = train.COLLATE["mmcot"]

    def collated(rows):
        batch = real(rows)
        return batch | {"decoder_input_ids": batch["labels"].clamp(min=0)}

    patch.setitem(train.COLLATE, "mmcot", collated)


@leak("paligemma: everything sees everything")
def _(patch):
    def full(valid, suffix, new, window=None):
        return valid[:, None, None, :].expand(-1, 1, new, -1)

    patch.setattr(backbones, "prefix_lm_mask", full)


@leak("paligemma: token types all 0")
def _(patch):
    real = train.COLLATE["paligemma"]
    patch.setitem(
        train.COLLATE,
        "paligemma",
        lambda rows: (b := real(rows)) | {"token_type_ids": b["token_type_ids"] * 0},
    )


@leak("paligemma: labels not shifted")
def _(patch):
    def loss(model, batch, args):
        states = model.states(**loading.paligemma_inputs(model, batch))
        weight = model.language_model.embed_tokens.weight
        return train.cross_entropy(model.head, weight, states, batch["labels"], args)

    patch.setitem(train.LOSS, "paligemma", loss)


@leak("paligemma: one token ahead")
def _(patch):
    real = backbones.prefix_lm_mask

    def ahead(valid, suffix, new, window=None):
        seen = real(valid, suffix, new, window)
        return seen | (torch.ones(seen.shape[-2:]).triu(1).tril(1).bool() & valid[:, None, None, :])

    patch.setattr(backbones, "prefix_lm_mask", ahead)


@leak("mmcot: pads in the loss")
@leak("paligemma: pads in the loss")
def _(patch):
    for name, real in list(train.COLLATE.items()):
        patch.setitem(
            train.COLLATE,
            name,
            lambda rows, real=real: (
                (b := real(rows)) | {"labels": b["labels"].masked_fill(b["labels"] == -100, 0)}
            ),
        )


@leak("mmcot: pads attended to")
@leak("paligemma: pads attended to")
def _(patch):
    patch.setattr(backbones.T5, "mask_bias", lambda self, mask: torch.zeros(len(mask), 1, 1, 1))
    mask = backbones.prefix_lm_mask
    patch.setattr(
        backbones, "prefix_lm_mask", lambda valid, *rest: mask(torch.ones_like(valid), *rest)
    )


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_stops_before_the_first_step(name, pali, monkeypatch):
    model, args, examples = pali() if name.startswith("p") else (mmcot(), settings(), [])
    examples = examples or [example(i) for i in range(3)]
    LEAKS[name](monkeypatch)
    match = "pads take part" if "pads" in name else "the model sees what it shall predict"
    stopped(RuntimeError, match, model, examples, args)


# ---- what does not learn -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_what_is_not_finite_is_named_and_not_learned(given, how, monkeypatch):
    model, args, examples = given
    real = train.LOSS[args.model]

    def loss(model, batch, args):
        value, n = real(model, batch, args)
        bad = examples[1]["id"] in batch["ids"] and model.training
        return (value.sqrt() * 0 + (value - value.detach()).sqrt() if bad else value), n

    if how == "gradient":  # the root of 0 has none
        monkeypatch.setitem(train.LOSS, args.model, loss)
        return stopped(
            FloatingPointError, "gradient norm (nan|inf).*not taken", *given_order(given)
        )
    monkeypatch.setattr(data, "stack_features", lambda rows: torch.stack(
        [torch.as_tensor(e["image_features"]).float() * (1 if e is not examples[1] else torch.nan)
         for e in rows]))  # fmt: skip
    before = weights(model)
    with pytest.raises(FloatingPointError, match="loss nan") as stop:
        fit(model, examples, args)
    assert f", in {examples[1]['id']}. This step was not taken" in str(stop.value)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def given_order(given):
    model, args, examples = given
    return model, examples, args


def test_a_batch_without_a_supervised_token(given):
    model, args, examples = given
    for e in examples:
        e["labels"] = [-100] * len(e["labels"])
    stopped(ValueError, "no token of .* is supervised", model, examples, args)


@pytest.mark.parametrize("how", ["no step", "other tensors", "one tensor"])
def test_weights_that_do_not_change(given, how, monkeypatch):
    model, args, examples = given
    real = train.make_optimizer

    def made(model, *rest):
        optimizer = real(model, *rest)
        for group in optimizer.param_groups:
            if how == "other tensors":
                group["params"] = [p.detach().clone().requires_grad_() for p in group["params"]]
            elif how == "one tensor":
                group["params"] = group["params"][1:]
        if how == "no step":
            optimizer.step = lambda: None
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", made)
    with pytest.raises(RuntimeError, match=r"step [12],.*have a gradient and did not change") as e:
        fit(model, examples, args)
    assert examples[0]["id"] in str(e.value)


def test_a_rate_that_rounds_to_nothing():
    model, args, examples = mmcot(), settings(), [example(i) for i in range(3)]
    with torch.no_grad():
        for p in optimizing.trained(model).values():
            p.add_(1.0)
    args.lr = 1e-9
    with pytest.raises(RuntimeError, match="did not change.*--lr"):
        fit(model, examples, args)
    args.lr = 0.0  # as one wishes
    fit(model, examples, args)


# ---- signals, and a stage alone ----------------------------------------------------------------


def test_a_signal_stops_a_validation_at_once_and_nothing_is_lost(tmp_path):
    """The state before it is there; without the signal the run would end in the same bits."""

    def trained(folder, stops):
        (folder / "last").mkdir(parents=True, exist_ok=True)
        model, args = mmcot(), settings("mmcot", "--save-every", "1", "--batch-size", "1")
        asked = []

        def validate(model):
            asked.append(1)
            if stops:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            return {"val_loss": 1.0}

        rows = [example(i) for i in range(3)]
        log = folder / "log.jsonl"
        with open(log, "r+" if log.exists() else "w+") as file:
            journal = Journal(file, folder / "last", 1)
            train.fit(model, rows, validate, args, "reason", 2, journal)
        return weights(model), asked

    try:
        whole, asked = trained(tmp_path / "whole", False)
        start = time.monotonic()
        with pytest.raises(Stopped), in_use(tmp_path / "run"):
            trained(tmp_path / "run", True)
        assert time.monotonic() - start < 4
        assert (tmp_path / "run/last/1-00000002.json").exists()
        again, resumed = trained(tmp_path / "run", False)
    finally:
        Journal.training = Journal.stopping = False
    assert len(asked) == len(resumed) == 2
    assert all(torch.equal(p, whole[name]) for name, p in again.items())


def test_a_stage_alone_is_complete_without_metrics(tmp_path, monkeypatch):
    flags = ["--model", "mmcot", "--stage", "rationale", "--out", str(tmp_path), "--resume"]
    args = parse_args(flags)
    assert not folders.is_complete(args)
    folders.begin(args)
    (tmp_path / "rationale").mkdir()
    (tmp_path / "rationale/model.safetensors").touch()
    assert not folders.is_complete(args)  # last/ is there
    folders.complete(tmp_path)
    monkeypatch.setattr(train, "run_mmcot", None)
    train.main(flags)
    assert not folders.is_complete(parse_args([*flags[:2], *flags[4:]]))


# ---- bad records -------------------------------------------------------------------------------

MMCOT = """--model mmcot --device cpu --recipe answer --epochs 1 --batch-size 4 --max-output 4 4
    --image-size 32 --max-input 64 --threads 1 --lr 0.003 --eval-batch-size 8""".split()
RUNS = {
    "mmcot": [*MMCOT, "--weights", str(ROOT / "demo/t5")]
    + ["--vision-weights", str(ROOT / "demo/detr")],
    "paligemma": """--model paligemma --device cpu --alone --threads 1 --epochs 1 --batch-size 4
    --lora-r 2 --max-output 4 4 --lr 0.003 --weights""".split()
    + [PALI],
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A .jsonl of the demo's problems with bad records in every split, and bad pictures."""
    folder, lines = tmp_path_factory.mktemp("spoiled"), []
    for split, count in (("train", 7), ("val", 3), ("test", 5)):
        for i, p in enumerate([p for p in data.load("demo", split) if p.image][:count]):
            name = f"{split}{i}"
            shutil.copy(p.image, folder / f"{name}.png")
            record = {"id": name, "question": p.question, "choices": list(p.choices)}
            record |= {"answer": p.answer, "solution": p.solution, "split": split}
            lines.append(record | {"image": f"{name}.png"})
    by_id = {x["id"]: x for x in lines}
    by_id["train1"]["answer"] = 99
    (folder / "train2.png").unlink()
    (folder / "val0.png").write_bytes((folder / "val1.png").read_bytes()[:-30])
    by_id["test0"]["choices"] = 7
    (folder / "test1.png").write_bytes(b"no picture")
    Image.new("RGB", (1, 90)).save(folder / "test2.png")
    lines.insert(3, {"id": "whole"})
    text = "".join(f"{json.dumps(x)}\n" for x in lines)
    (folder / "bad.jsonl").write_text(f"{text}{{half a line\n")
    return folder / "bad.jsonl"


@pytest.mark.parametrize("name", RUNS)
def test_bad_records_are_skipped_and_counted_in_all_splits(name, spoiled, tmp_path, capsys):
    cache = ["--features-cache", str(tmp_path / "cache")]
    flags = [*RUNS[name], "--data", str(spoiled), *cache, "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="train1|whole|line 4"):
        train.main(flags)
    assert not (tmp_path / "run").exists()
    looked, real = [], pictures.open_image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "open_image", lambda path: looked.append(path) or real(path))
        patch.setattr(evaluation, "write_report", lambda *given: None)
        patch.setattr(records, "warn_of_overlap", lambda *given: None)
        train.main([*flags, "--on-error", "skip"])
        assert len(looked) == len(set(looked))  # no picture is decoded twice
    told = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    found = {x["id"]: x["split"] for x in told}
    narrow = {"test2": "test"} if name == "mmcot" else {}
    assert found == narrow | {
        "train1": "train", "train2": "train", "whole": "train", "val0": "val", "test0": "test",
        "test1": "test", "line 17": None,
    }  # fmt: skip
    assert all(len(x["reason"]) > 20 for x in told)
    metrics = read_json(tmp_path / "run/metrics.json")
    left = 5 - 2 - len(narrow)
    assert metrics["n"] == left and metrics["skipped"]["test"] == 5 - left
    assert metrics["skipped"] | {"test": 0, "traces": 0} == {
        "train": 3, "val": 1, "test": 0, "split unknown": 1, "traces": 0
    }  # fmt: skip
    table = capsys.readouterr().out
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert rows["skipped, test"] == [str(5 - left)] and rows["skipped, split unknown"] == ["1"]
    least = metrics["accuracy"]["avg"] * left / 5
    assert float(rows["avg, skipped as wrong"][0]) == pytest.approx(least, abs=0.006)
    again = evaluation.parse_args([str(tmp_path / "run"), "--no-report"])
    assert evaluation.score_run(tmp_path / "run", again).scores == metrics


def test_bad_traces_are_skipped(tmp_path):
    good = {"id": "1", "question": "q", "thought": "So.", "answer": "A"}
    lines = [good, good | {"id": [1]}, good | {"verdict": 3}]
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(f"{json.dumps(x)}\n" for x in lines) + "{\n")
    with pytest.raises(ValueError, match="line 2"):
        load_traces(file)
    skipped = []
    assert len(load_traces(file, skipped)) == 1
    assert [id for id, _ in skipped] == ["line 2", "line 3", "line 4"]


# ---- a dry run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    name, spoiled, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = [*RUNS[name], "--data", str(spoiled), "--on-error", "skip", "--dry-run"]
    train.main(flags)
    told = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    known = {"mmcot": "247,168 parameters trainable, 0 frozen",
             "paligemma": "9,728 parameters trainable, 340,928 frozen"}[name]  # fmt: skip
    assert known in told and "4 bad records would be skipped" in told
    for word in ("weights", "gradients", "AdamW's", "activations", "in all", "one step", "steps:"):
        assert f"{word} " in told, word
    [off] = re.findall(r"estimated ([+-]\d+) %", told)
    assert abs(int(off)) < 25
    monkeypatch.setattr(dry_run, "device_memory", lambda device: (0, 2**30))
    monkeypatch.setattr(dry_run, "timed_step", None)  # not even tried
    monkeypatch.setattr(dry_run, "held", lambda device: 0)
    train.main(flags)
    assert "Not tried:" in capsys.readouterr().out


@pytest.mark.parametrize("rows, checkpointing", [(1, False), (3, False), (3, True)])
def test_the_estimate_counts_what_is_kept(pali, rows, checkpointing):
    """Against each storage that a whole batch keeps; logits and recomputed layers are apart."""
    model, args, examples = pali()
    model.language_model.checkpointing = checkpointing
    same = [examples[0]] * rows
    loss_of = train.LossOf(model, args)
    counted, kept = dry_run.memory(loss_of, same)["activations"], dry_run.saved(loss_of, same)
    if checkpointing:
        model.language_model.checkpointing = False
        assert kept < counted < dry_run.saved(loss_of, same)
    else:
        assert counted == pytest.approx(kept, rel=0.02)


# ---- adapters that match nothing ---------------------------------------------------------------


def test_an_adapter_that_matches_nothing(pali, tmp_path):
    model = pali()[0]
    lora.save(model, tmp_path, PALI)
    config = read_json(tmp_path / "adapter_config.json")

    def loaded(**changed):
        write_json(config | changed, tmp_path / "adapter_config.json")
        args = settings("paligemma", "--adapter", str(tmp_path))
        return loading.load_paligemma(args)

    assert lora.adapters(loaded())
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"{key}.*nowhere.*matches none"):
            loaded(**{key: {"nowhere": 3}})
    with pytest.raises(ValueError, match="unexpected"):
        loaded(target_modules=["nowhere"])
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert load_file(tmp_path / "adapter_model.safetensors") == {}
    with pytest.raises(ValueError, match="nowhere.*matches none"):
        loaded(target_modules=["nowhere"])
    with pytest.raises(ValueError, match="No Linear layer.*nowhere"):
        lora.inject(loading.load_paligemma(settings("paligemma")), targets=["nowhere"])
