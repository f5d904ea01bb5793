"""train.py --model paligemma and eval.py's decoding of it: loss, rows, loop, files, command line.

Runs are short, on the committed demo checkpoint; how good that is matters to no test but the slow
one at the end. What decoding makes of loops, cuts and votes is shown with a stand-in for the model
(`Speaker`) that writes what a test tells it to.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import random
import shutil
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, scored
from safetensors.torch import load_file

import data
import eval as evaluation
import lora
import model as backbones
import train
from demo import scenes, teacher
from support.checkpoints import peft
from support.dataset import images as pictures
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer, plain_ids, special_ids
from support.dataset.traces import load_traces
from support.evaluation import decoding, errors
from support.evaluation import models as loading
from support.files import read_json
from support.training import checks as guards
from support.training import examples as records
from support.training import optim as optimizing
from support.training.ablations import BASELINES, DECODED_AGAIN, PALIGEMMA_ABLATION
from support.training.journal import Journal
from support.training.settings import parse_args

DEMO = str(ROOT / "demo/paligemma")
CONFIG = read_json(f"{DEMO}/config.json")
TEXT = CONFIG["text_config"]
REAL = Path(os.environ["NANOCOT_DATA"])  # see conftest.py
needs_real_traces = pytest.mark.skipif(
    not (REAL / "pali_reason/training_correct.csv").is_file()
    or not (REAL / "mathvista/annot_testmini.json").is_file(),
    reason=f"no pali_reason or no MathVista in {REAL}; set NANOCOT_DATA",
)
pytestmark = pytest.mark.usefixtures("read_once")
GIVEN = "--model paligemma --device cpu".split()
SHORT = [*GIVEN, *"--limit 24 --max-steps 3 --eval-problems 4 --max-output 40 8".split()]
TINY = [*GIVEN, *"--limit 8 --max-steps 2 --eval-problems 2 --max-output 8 4 --alone".split()]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def settings(*flags, **changed):
    given = vars(parse_args([*GIVEN, *flags]))
    return argparse.Namespace(**given | changed)


def adapted(*flags):
    """The demo's model with new adapters, and the settings."""
    args = settings("--lora-r", "4", *flags)
    model = loading.load_paligemma(args)
    with contextlib.redirect_stdout(io.StringIO()):
        train.make_trainable(args, model)
    return model, args


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@functools.cache
def demo_traces():
    return load_traces(records.demo_traces())


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Eight rows of unequal lengths: thoughts and bare letters, with and without a picture."""
    problems = sorted(data.load("demo", "train")[:40], key=lambda p: p.image is not None)
    by_id = {p.id: p for p in problems[:2] + problems[-4:]}
    traces = [t for t in demo_traces() if t["id"] in by_id]
    args = settings()
    rows = [data.TrainRow(by_id[t["id"]], "reason", t) for t in traces]
    rows += [data.TrainRow(row.problem, "answer") for row in rows[:2]]
    model = loading.load_paligemma(args)
    features = loading.image_features(args, list(by_id.values()), model)
    made = data.pali_examples(rows, tokenizer, features, max_suffix=args.max_suffix)
    assert len(made) == 8 and len({len(e["labels"]) for e in made}) > 4
    assert len({"image_features" in e for e in made}) == 2
    return made


# ---- the loss ----------------------------------------------------------------------------------


def random_rows():
    """States, labels with an empty row among them, and the matrix of a head."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 9, 6, generator=generator)
    labels = torch.randint(0, 30, (4, 9), generator=generator)
    for row, start in enumerate((2, 8, 9, 5)):
        labels[row, :start] = -100
    return states, labels, torch.randn(30, 6, generator=generator)


def loss_and_gradients(args):
    """(loss, divisor, gradient of states, of the head), and with how many rows that was called."""
    states, labels, weight = random_rows()
    states.requires_grad_(), weight.requires_grad_()
    calls = []

    def head(some):
        calls.append(len(some))
        return some @ weight.T

    loss, count = train.cross_entropy(head, weight, states, labels, args)
    loss.backward()
    return (loss.detach(), torch.tensor(count), states.grad, weight.grad), calls


@pytest.mark.parametrize("weighting", ["token", "example"])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_loss_in_chunks_is_the_loss_at_once(rows, weighting, monkeypatch):
    args = settings(weighting=weighting, label_smoothing=0.1)
    whole, calls = loss_and_gradients(args)
    assert calls == [12]  # 7 + 1 + 4 supervised tokens, of 36
    monkeypatch.setattr(optimizing, "LOGITS", 30 * rows + 29 if rows > 1 else 7)
    parts, calls = loss_and_gradients(args)
    assert calls == [rows] * (12 // rows)  # once: not again on the way back
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        states, labels, weight = random_rows()
        loss, _ = train.cross_entropy(lambda x: x @ weight.T, weight, states, labels, args)
    torch.testing.assert_close(loss, whole[0], atol=1e-6, rtol=1e-5)


def test_weighting_by_token_and_by_example():
    """By hand: the sum over tokens, or the sum of each row's mean. An empty row is no row."""
    states, labels, weight = random_rows()
    each = F.cross_entropy((states @ weight.T).transpose(1, 2), labels, reduction="none")  # (4, 9)
    (by_token, n, *_), _ = loss_and_gradients(settings())
    assert n == 12 and by_token.item() == pytest.approx(each.sum().item(), rel=1e-6)
    (by_example, n, *_), _ = loss_and_gradients(settings(weighting="example"))
    means = each[0, 2:].mean() + each[1, 8:].mean() + each[3, 5:].mean()
    assert n == 3 and by_example.item() == pytest.approx(means.item(), rel=1e-6)
    window = [[{"labels": row} for row in rows.tolist()] for rows in labels.split(3)]
    assert train.units(window, settings()) == 12
    assert train.units(window, settings(weighting="example")) == 3


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_label_smoothing_is_torchs(weighting):
    states, labels, weight = random_rows()
    logits, labels = (states[:1] @ weight.T).flatten(0, 1), labels[:1].flatten()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)  # ignores -100
    args = settings("--label-smoothing", "0.2", weighting=weighting)
    loss, n = train.cross_entropy(lambda x: x @ weight.T, weight, states[:1], labels[None], args)
    assert loss.item() / n == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_of_the_next_token_and_pads_change_nothing(examples, side):
    model, args = adapted()
    batch = data.pali_collate(examples, side=side)
    labels, seen = batch["labels"], {k: batch[k] for k in batch if k not in ("ids", "labels")}
    logits = model(**seen)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss, n = train.paligemma_loss(model, batch, args)
    assert n == sum(sum(e["token_type_ids"]) for e in examples) == train.units([examples], args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    alone = [train.paligemma_loss(model, data.pali_collate([e]), args)[0] for e in examples]
    assert loss.item() == pytest.approx(sum(alone).item(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["token", "example"])
def test_accumulated_batches_equal_the_big_batch(examples, weighting, monkeypatch):
    """Through the loop itself: the gradients it clips. Unequal lengths, and a last short batch."""

    def gradients(*flags):
        model, args = adapted("--weighting", weighting, *flags)
        seen, clip = [], torch.nn.utils.clip_grad_norm_

        def watch(parameters, limit):
            assert limit == 1.0
            named = model.named_parameters()
            seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            return clip(parameters, limit)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
        log = io.StringIO()
        train.fit(model, examples, lambda model: {}, args, "reason", 1, Journal(log))
        monkeypatch.undo()
        assert len(seen) == 1
        return seen[0], json.loads(log.getvalue())

    whole, said = gradients("--batch-size", "8")
    parts, told = gradients("--batch-size", "3", "--accumulate", "3")
    units = {"token": sum(sum(e["token_type_ids"]) for e in examples), "example": 8}[weighting]
    assert said[f"{weighting}s"] == told[f"{weighting}s"] == units
    assert said["loss"] == pytest.approx(told["loss"], abs=2e-6)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-6, rtol=1e-4)


def test_mean_loss_is_over_all_tokens_or_all_rows(examples):
    for weighting in ("token", "example"):
        model, args = adapted("--batch-size", "3", "--weighting", weighting)
        loss, n = train.paligemma_loss(model.eval(), data.pali_collate(examples), args)
        mean = train.mean_loss(model.train(), examples, args)
        assert mean == pytest.approx(loss.item() / n, rel=1e-5)
        assert not model.training


@pytest.mark.parametrize("flags", [[], ["--lora-dora"], ["--checkpointing"]])
def test_the_base_is_frozen_and_every_adapter_learns(examples, flags):
    model, args = adapted(*flags)
    train.paligemma_loss(model.train(), data.pali_collate(examples), args)[0].backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got and all("lora_" in name for name in got)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert len([name for name in got if "lora_B" in name]) == 7 * TEXT["num_hidden_layers"]
    guards.stop_unless_learning(model)


@pytest.mark.parametrize("how", ["no gradient", "zeros"])
def test_an_adapter_that_is_cut_off_stops_the_run(examples, how, monkeypatch):
    model, args = adapted()
    layer, plain = model.language_model.layers[2].mlp.up_proj, torch.nn.Linear.forward
    times = {"no gradient": None, "zeros": 0.0}[how]
    cut = functools.partial(plain, layer)
    monkeypatch.setattr(
        layer, "forward", lambda x: cut(x) if times is None else cut(x) + times * layer.lora_B(
            layer.lora_A(x))
    )  # fmt: skip
    log = io.StringIO()
    with pytest.raises(RuntimeError, match=r"1 adapters.*layers\.2\.mlp\.up_proj\.lora_B"):
        train.fit(model, examples, lambda model: {}, args, "reason", 1, Journal(log))
    assert log.getvalue() == ""
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)  # no step taken


# ---- the rows ----------------------------------------------------------------------------------


def rows_of(problems, *flags, **changed):
    return records.training_rows(settings(*flags, **changed), problems)


def verdicts(n):
    """(problem ids, their verdicts) of the first n demo problems, from the file itself."""
    folder = scenes.demo_folder()
    ids = [p.id for p in data.load("demo", "train")[:n]]
    told = {t["id"]: t["verdict"] for t in lines_of(teacher.traces(folder))}
    return ids, [told[i] for i in ids]


@pytest.mark.parametrize("keep", ["all", "correct", "consistent"])
def test_what_is_kept_of_the_demos_traces(keep, capsys):
    ids, judged = verdicts(300)
    good = {
        "all": lambda v: True,
        "correct": lambda v: v["correct"],
        "consistent": lambda v: v["correct"] and v["consistent"],
    }[keep]
    expected = [i for i, verdict in zip(ids, judged, strict=True) if good(verdict)]
    rows = rows_of(data.load("demo", "train")[:300], "--keep", keep)
    assert [p.id for p, *_ in rows] == expected
    assert all(task == "reason" and t["id"] == p.id and suffix for p, task, t, suffix in rows)
    share = len(expected) / 300
    assert {"all": 1, "correct": 0.72, "consistent": 0.62}[keep] == pytest.approx(share, abs=0.06)
    every = len(data.load("demo", "train"))
    told = capsys.readouterr().out
    assert f"{len(expected)} of {every} traces kept ({keep}); {every - 300} are of no" in told


def test_the_default_keeps_what_is_consistent():
    problems = data.load("demo", "train")[:50]
    assert rows_of(problems) == rows_of(problems, "--keep", "consistent")
    assert len(rows_of(problems)) < len(rows_of(problems, "--keep", "correct"))


def own_problems(n=8, **changed):
    """Records of a .jsonl with questions in words that the demo's tokenizer knows."""
    split = ["train"] * (n - 2) + ["val", "test"]
    return [
        {"id": f"p{i}", "question": "Which is most?", "choices": ["red", "blue", "green"],
         "answer": i % 3, "solution": f"So the answer is {('red', 'blue', 'green')[i % 3]}.",
         "split": split[i]} | changed
        for i in range(n)
    ]  # fmt: skip


def own_trace(id, correct=True, consistent=True, answer="red", thought="So it is."):
    verdict = {"correct": correct, "consistent": consistent}
    told = {"id": id, "question": "Which is most?", "thought": thought, "answer": answer}
    return told | {"verdict": verdict}


def test_without_traces_the_datas_own_solutions_are_the_thoughts(tmp_path, capsys):
    records = own_problems()
    records[1]["solution"] = ""
    file = write_lines(tmp_path / "own.jsonl", records)
    problems = data.load(file, "train")
    rows = rows_of(problems, "--data", file, "--weights", DEMO, "--mix", "0")
    assert [p.id for p, *_ in rows] == ["p0", "p2", "p3", "p4", "p5"]
    assert data.pali_suffix(rows[1][0], rows[1][2]) == "So the answer is green.\nAnswer: C"
    assert "5 solutions of the data itself" in capsys.readouterr().out
    with pytest.raises(ValueError, match="No trace is left to learn from"):
        rows_of(problems[1:2], "--data", file, "--weights", DEMO)


@pytest.fixture
def own(tmp_path):
    """(problems, function of traces and flags -> rows) of six problems."""
    file = write_lines(tmp_path / "own.jsonl", own_problems())
    problems = data.load(file, "train")

    def made(traces, *flags):
        path = write_lines(tmp_path / "traces.jsonl", traces)
        return rows_of(problems, "--data", file, "--weights", DEMO, "--traces", path, *flags)

    return problems, made


def test_answer_rows_are_one_for_each_problem_of_the_kept_traces(own):
    """Otherwise the baseline would learn other problems than the run, or some of them twice."""
    problems, made = own
    traces = [own_trace("p1"), own_trace("p1", thought="Look."), own_trace("p2", correct=False)]
    traces += [own_trace("p4"), own_trace("p3", consistent=False)]
    rows = made(traces, "--recipe", "answer")
    assert rows == [(problems[i], "answer", None, True) for i in (1, 4)]
    reasons = made(traces, "--mix", "0")
    assert [(p.id, t["thought"]) for p, _, t, _ in reasons] == [
        ("p1", "So it is."), ("p1", "Look."), ("p4", "So it is.")
    ]  # fmt: skip


@pytest.mark.parametrize("mix, ids", [(0, []), (0.5, [0, 2, 4]), (1, [0, 1, 2, 3, 4, 5])])
def test_answer_only_rows_are_mixed_in_evenly(own, mix, ids):
    problems, made = own
    rows = made([own_trace(p.id) for p in problems], "--mix", str(mix))
    assert [task for _, task, *_ in rows] == ["reason"] * 6 + ["answer"] * len(ids)
    assert rows[6:] == [(problems[i], "answer", None, True) for i in ids]


def test_a_mix_of_more_answers_than_problems_repeats_them(own):
    problems, made = own
    rows = made([own_trace(p.id) for p in problems] * 2, "--mix", "1.5")
    answers = Counter(p.id for p, task, *_ in rows if task == "answer")
    assert len(rows) == 12 + 18 and set(answers.values()) == {3}


def test_limit_traces_counts_kept_ones(own):
    _, made = own
    traces = [own_trace(f"p{i}", correct=i % 2 == 0) for i in range(6)]
    rows = made(traces, "--limit-traces", "2", "--mix", "1")
    assert [(p.id, task) for p, task, *_ in rows] == [
        ("p0", "reason"), ("p2", "reason"), ("p0", "answer"), ("p2", "answer")
    ]  # fmt: skip


def test_traces_of_other_problems_are_counted(own, capsys):
    _, made = own
    made([own_trace("p0"), own_trace("p6"), own_trace("x"), own_trace("p1", correct=False)])
    assert (
        "1 of 4 traces kept (consistent); 2 are of no training problem" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="No trace is left.*--traces, --keep and --data"):
        made([own_trace("p6")])


def test_where_nobody_judged_the_answer_decides(own):
    _, made = own
    traces = [
        own_trace("p0", None, None, "The answer is (A)."),
        own_trace("p1", None, None, "The answer is (A)."),
        own_trace("p2", True, None, "\\boxed{green}"),
        own_trace("p3", True, None, "blue"),
        own_trace("p4", None, True, "blue"),
        own_trace("p5", False, None, "green"),
    ]

    def ids(keep):
        return [p.id for p, *_ in made(traces, "--mix", "0", "--keep", keep)]

    assert ids("all") == [f"p{i}" for i in range(6)]
    assert ids("correct") == ["p0", "p2", "p3", "p4"]
    assert ids("consistent") == ["p0", "p2", "p4"]


@needs_real_traces
def test_what_is_kept_of_the_real_traces():
    """Eight of the 251 that Claude let through do not end in the gold answer."""
    problems = data.load(str(REAL / "mathvista"), "testmini")
    flags = ["--data", str(REAL / "mathvista"), "--mix", "0"]

    def kept(file, *more):
        file = str(REAL / "pali_reason" / file)
        return [t["id"] for *_, t, _ in rows_of(problems, *flags, "--traces", file, *more)]

    every = kept("training_correct.csv", "--keep", "correct")
    consistent = kept("training_correct.csv")
    assert (len(every), len(consistent)) == (251, 243)
    gone = {"20", "35", "107", "126", "140", "226", "255", "337"}  # as in test_traces.py
    assert consistent == [i for i in every if i not in gone]
    unjudged = kept("training.csv")
    assert len(kept("training.csv", "--keep", "all")) == 335
    assert set(consistent) <= set(unjudged) and len(unjudged) < 335


@needs_real_traces
def test_whoever_trains_on_mathvista_is_told(capsys):
    problems = data.load(str(REAL / "mathvista"), "testmini")
    traces = str(REAL / "pali_reason/training_correct.csv")
    rows_of(problems, "--data", str(REAL / "mathvista"), "--traces", traces)
    assert "MathVista is a test set" in capsys.readouterr().err


@pytest.fixture
def tuned(monkeypatch, tokenizer):
    """tune() without its training: flags -> what the loop would have got, and the features."""

    def look(*flags, n=30):
        args = settings("--limit", str(n), "--lora-r", "2", *flags)
        model, given = loading.load_paligemma(args), {}
        problems, val = (data.load("demo", split)[:n] for split in ("train", "val"))
        rows = records.training_rows(args, problems)
        features = loading.image_features(args, problems + val, model)

        def fit(model, examples, validate, args, stage, epochs, log):
            given.update(examples=examples, validate=validate, epochs=epochs, stage=stage)

        monkeypatch.setattr(train, "fit", fit)
        train.tune(args, model, rows, val, tokenizer, features, None)
        given |= {"rows": rows, "val": val, "features": features, "model": model, "args": args}
        return SimpleNamespace(**given)

    return look


def test_rows_for_the_validation_loss_are_not_trained_on(tuned, tokenizer, monkeypatch):
    """Every 20th problem, with all its rows: those of the mix too."""
    got = tuned("--mix", "1", "--max-output", "6", "4", n=60)
    ids = list(dict.fromkeys(p.id for p, *_ in got.rows))
    held = set(ids[::20])
    assert len(held) == 2 and {e["id"] for e in got.examples} == set(ids) - held
    assert len(got.examples) == 2 * (len(ids) - 2)
    rows = [row for row in got.rows if row.problem.id in held]
    rows = data.pali_examples(rows, tokenizer, got.features, max_suffix=got.args.max_suffix)
    assert len(rows) == 4
    loss = train.mean_loss(got.model, rows, got.args)
    assert got.validate(got.model)["val_loss"] == pytest.approx(loss, abs=2e-6)


def test_validation_accuracy_is_of_real_answers(tuned, tokenizer, monkeypatch):
    flags = ("--recipe", "answer", "--eval-problems", "12")
    got = tuned(*flags)
    how = (got.args, tokenizer, got.features)
    told = evaluation.predict([got.model], got.val[:12], *how)
    right = sum(
        evaluation.grade(p, x["response"]).correct for p, x in zip(got.val, told, strict=False)
    )
    modes, predict = [], evaluation.predict

    def spied(models, *rest):
        modes.append(models[0].training)
        return predict(models, *rest)

    monkeypatch.setattr(evaluation, "predict", spied)
    assert got.validate(got.model.train())["val_accuracy"] == round(100 * right / 12, 2)
    assert modes == [False]  # without dropout
    none = tuned("--recipe", "answer", "--eval-problems", "0")
    assert none.validate(none.model).keys() == {"val_loss"}


@pytest.mark.slow
def test_suffixes_that_are_too_long_are_dropped_and_counted(tuned, tokenizer, capsys):
    got = tuned("--limit-traces", "12")
    lengths = sorted(sum(e["token_type_ids"]) for e in got.examples)
    limit = lengths[-4]  # at least three are over it
    over = sum(length > limit for length in lengths)
    capsys.readouterr()
    fewer = tuned("--limit-traces", "12", "--max-suffix", str(limit))
    told = capsys.readouterr().err
    assert over and all(sum(e["token_type_ids"]) <= limit for e in fewer.examples)
    assert f"of {len(got.rows)} rows were left out: over max_suffix {limit}" in told
    assert all(e["labels"][-1] == 1 for e in fewer.examples)  # not cut
    with pytest.raises(ValueError, match="0 rows are left.*--max-suffix"):
        tuned("--max-suffix", "3")
    with pytest.raises(ValueError, match="1 rows are left, 1 of them held back"):
        tuned("--limit-traces", "1")


# ---- the loop ----------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_as_a_cosine():
    args = settings("--warmup", "0.1")
    rates = [train.schedule(step, 100, args) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 1e-3 and rates[100] == pytest.approx(0)
    assert rates[40] == pytest.approx(0.5 * (1 + math.cos(math.pi * 30 / 90)))
    assert train.schedule(0, 1, args) == 1.0  # no division by zero, and a first step
    assert [train.schedule(i, 3, settings("--warmup", "0")) for i in range(3)][0] == 1.0


def fitted(examples, accuracies=None, *flags, epochs=None):
    """(model, log lines, its trained weights at each validation) of a short training."""
    model, args = adapted("--batch-size", "4", *flags)
    seen = []

    def validate(model):
        named = model.named_parameters()
        seen.append({n: p.detach().clone() for n, p in named if p.requires_grad})
        return {} if accuracies is None else {"val_loss": 1.0, "val_accuracy": accuracies.pop(0)}

    log = io.StringIO()
    epochs = epochs or len(accuracies)
    model = train.fit(model, examples, validate, args, "reason", epochs, Journal(log))
    return model, [json.loads(line) for line in log.getvalue().splitlines()], seen


@pytest.mark.parametrize("accuracies, best", [([10, 30, 20], 1), ([30, 10, 30], 2), ([5, 4], 0)])
def test_the_weights_of_the_best_epoch_are_kept(examples, accuracies, best, capsys):
    """Of equal ones the later."""
    model, log, seen = fitted(examples, list(accuracies))
    assert [x["val_accuracy"] for x in log if "val_accuracy" in x] == accuracies
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, seen[best][n]) for n, p in trained.items())
    assert any(not torch.equal(p, seen[best - 1][n]) for n, p in trained.items())
    step = 2 * (best + 1)
    kept = f"after step {step}, validation accuracy {max(accuracies):.2f}"
    assert kept in capsys.readouterr().out and not model.training


def test_each_step_has_its_own_gradient_and_dropout(examples, monkeypatch):
    """At no learning rate to speak of, all steps over the same rows have the same gradient."""
    modes, loss = [], train.paligemma_loss

    def spied(model, *rest):
        modes.append(model.training)
        return loss(model, *rest)

    monkeypatch.setitem(train.LOSS, "paligemma", spied)
    flags = ["--batch-size", "8", "--lr", "1e-12"]
    model, args = adapted(*flags)
    log = io.StringIO()
    train.fit(model, examples, lambda m: m.eval() and {}, args, "reason", 3, Journal(log))
    norms = [json.loads(line)["grad_norm"] for line in log.getvalue().splitlines()]
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3, rel=1e-3)
    assert modes[-3:] == [True] * 3 and not any(modes[:-3])  # before them: see stop_if_it_leaks


def test_without_validation_answers_the_last_weights_stay(examples):
    model, _, seen = fitted(examples, None, epochs=2)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, seen[-1][n]) for n, p in trained.items())


def test_training_lowers_the_loss_and_steps_are_counted(examples):
    _, log, seen = fitted(examples, None, epochs=8)
    assert [x["step"] for x in log] == list(range(1, 17)) and len(seen) == 8
    assert sum(x["loss"] for x in log[-2:]) < 0.8 * sum(x["loss"] for x in log[:2])
    assert log[0]["lr"] == log[1]["lr"] == 4e-3 and log[-1]["lr"] < 1e-4
    _, log, seen = fitted(examples, None, "--max-steps", "3", epochs=8)
    assert [x["step"] for x in log] == [1, 2, 3] and len(seen) == 2
    assert log[-1]["lr"] < log[1]["lr"]  # the schedule is that of the steps there are


# ---- runs on the demo --------------------------------------------------------------------------

Run = namedtuple("Run", "folder told")


def run(folder, *flags, base=TINY):
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        train.main([*base, "--out", str(folder), *flags])
    return Run(folder, told.getvalue())


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """As a newcomer's run, baselines and all, but short."""
    return run(tmp_path_factory.mktemp("runs") / "run", base=SHORT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def spied(monkeypatch):
    """What a run gives to training and decoding: flags -> its folder, examples, prompts, model."""

    def spy(folder, *flags):
        given, fit, write = {}, train.fit, decoding.Decoder.continued

        def watched_fit(model, examples, *rest):
            given.update(model=model, examples=examples)
            return fit(model, examples, *rest)

        def watched_write(model, prompts, *rest, **how):
            prompts = list(prompts)
            if not any(sum(x["token_type_ids"]) for x in prompts):  # else: a forced answer
                given["prompts"] = prompts
            return write(model, prompts, *rest, **how)

        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", watched_fit)
            patch.setattr(decoding.Decoder, "continued", watched_write)
            folder, told = run(folder, *flags)
        return SimpleNamespace(folder=folder, told=told, **given)

    return spy


def adapter(folder):
    return load_file(folder / peft.WEIGHTS)


def test_a_run_folder_has_what_the_design_says(short, tokenizer):
    names = "config.json log.jsonl adapter_model.safetensors adapter_config.json tokenizer.json"
    files = {path.name for path in short.folder.iterdir() if path.is_file()}
    scored = "predictions.jsonl metrics.json looks.json report.html"
    assert files == {*names.split(), *scored.split()}
    config = read_json(short.folder / "config.json")
    assert config["seed"] == 42 and config["recipe"] == "reason" and config["max_steps"] == 3
    assert {"versions", "commit", "traces", "lora_r", "samples"} <= config.keys()
    assert read_json(short.folder / peft.CONFIG)["base_model_name_or_path"] == DEMO
    log = lines_of(short.folder / "log.jsonl")
    assert [(x["stage"], x["step"]) for x in log] == [("reason", i) for i in (1, 2, 3)]
    assert {"loss", "lr", "grad_norm", "tokens", "seconds", "val_accuracy"} <= log[-1].keys()
    again = load_tokenizer(short.folder)
    assert again.encode("Answer: B").ids == tokenizer.encode("Answer: B").ids
    assert "<image> x 36" in short.told and "supervised" in short.told


def test_predictions_and_metrics_are_of_the_test_split(short):
    problems = data.load("demo", "test")[:24]
    predictions = lines_of(short.folder / "predictions.jsonl")
    assert [x["id"] for x in predictions] == [p.id for p in problems]
    keys = {"id", "response", "rationale", "stop", "tokens", "correct", "parsed", "how", "kind"}
    assert all(keys <= x.keys() for x in predictions)
    assert {x["stop"] for x in predictions} <= {"eos", "loop", "length", "forced"}
    assert all(0 < x["tokens"] <= 40 + 8 for x in predictions)
    metrics = read_json(short.folder / "metrics.json")
    right = sum(x["correct"] for x in predictions)
    assert metrics["n"] == 24 and metrics["accuracy"]["avg"] == round(100 * right / 24, 2)
    luck = sum(1 / len(p.choices) for p in problems) / 24
    assert metrics["chance"] == round(100 * luck, 2)
    assert sum(metrics["stop"].values()) == 24


def test_the_baselines_stand_beside_it(short):
    folders = {path.name: path for path in short.folder.iterdir() if path.is_dir()}
    assert folders.keys() == {"base", "base--asked-to-reason", "answer-only"}
    rows = [line.split("  ")[0] for line in short.told.splitlines()[-12:]]
    names = ["chance", "base", "base, asked to reason", "answer-only", "distilled"]
    start = rows.index("chance")
    assert rows[start : start + 5] == names
    for name, folder in folders.items():
        assert read_json(folder / "metrics.json")["n"] == 24
        config, trained = read_json(folder / "config.json"), name == "answer-only"
        assert config["recipe"] == ("reason" if "reason" in name else "answer")
        assert (folder / peft.WEIGHTS).exists() == (folder / "log.jsonl").exists() == trained
        told = lines_of(folder / "predictions.jsonl")
        assert all(("rationale" in x) == ("reason" in name) for x in told)
    learned, theirs = ({k: v for k, v in x.items() if k in ("lora_r", "epochs", "lr", "max_steps")}
                       for x in (read_json(f / "config.json")
                                 for f in (short.folder, folders["answer-only"])))  # fmt: skip
    assert learned == theirs


def test_the_base_is_the_model_as_it_was(short, tokenizer):
    args = settings("--recipe", "answer", "--max-output", "40", "8")
    problems = data.load("demo", "test")[:24]
    model = loading.load_paligemma(args)
    features = loading.image_features(args, problems, model)
    told = evaluation.predict([model], problems, args, tokenizer, features)
    kept = lines_of(short.folder / "base/predictions.jsonl")
    assert [x["response"] for x in told] == [x["response"] for x in kept]


@pytest.mark.parametrize(
    "flags, compared",
    [([], True), (["--alone"], False), (["--recipe", "answer"], False), (["--epochs", "0"], False)],
)
def test_only_a_distilled_run_is_compared(flags, compared, monkeypatch, tmp_path):
    """Beside an answer-only run three of the four lines would say the same."""
    ran, scores = [], scored([own_problem()], [{"id": "1", "response": "A"}])
    monkeypatch.setattr(train, "run_paligemma", lambda args: ran.append(args) or scores)
    run(tmp_path, *flags, base=[x for x in TINY if x != "--alone"])
    assert len(ran) == (4 if compared else 1) and ran[-1].out == str(tmp_path)
    if compared:
        assert [args.epochs[0] > 0 for args in ran] == [False, False, True, True]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(tiny, tmp_path):
    again = run(tmp_path / "again").folder
    for name in (peft.WEIGHTS, "predictions.jsonl"):
        assert (again / name).read_bytes() == (tiny.folder / name).read_bytes()
    one, other = adapter(again), adapter(run(tmp_path / "other", "--seed", "7").folder)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


@pytest.mark.slow
def test_decoding_a_run_again_gives_the_same_predictions(short, capsys):
    before = (short.folder / "predictions.jsonl").read_bytes()
    evaluation.main([str(short.folder), "--decode", "--limit", "24"])
    assert (short.folder / "predictions.jsonl").read_bytes() == before
    assert "chance" in capsys.readouterr().out


@pytest.mark.slow
def test_an_adapter_can_be_decoded_by_itself(tiny, tmp_path):
    folder = run(tmp_path / "decoded", "--adapter", str(tiny.folder), "--epochs", "0").folder
    before = (tiny.folder / "predictions.jsonl").read_bytes()
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert not (folder / peft.WEIGHTS).exists() and not (folder / "log.jsonl").exists()
    evaluation.main([str(folder), "--decode", "--limit", "8"])
    assert (folder / "predictions.jsonl").read_bytes() == before


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(tiny, tmp_path):
    rank = read_json(tiny.folder / peft.CONFIG)["r"]
    flags = ["--adapter", str(tiny.folder), "--lora-r", str(rank + 3), "--lr", "1e-8"]
    further = run(tmp_path / "further", *flags).folder
    assert read_json(further / peft.CONFIG)["r"] == rank  # the adapter's, not the flag's
    for name, tensor in adapter(further).items():
        torch.testing.assert_close(tensor, adapter(tiny.folder)[name], atol=1e-7, rtol=0)


def test_a_question_can_be_asked_of_a_run(short, capsys, tokenizer):
    said = {x["id"]: x for x in lines_of(short.folder / "predictions.jsonl")}
    problems = [p for p in data.load("demo", "test")[:24] if not p.hint]
    pictured = next(p for p in problems if p.image)
    for problem in (pictured, next((p for p in problems if not p.image), pictured)):
        asked = [str(short.folder), "--question", problem.question, "--choices", *problem.choices]
        evaluation.main([*asked, *(["--image", problem.image] if problem.image else [])])
        told, prediction = capsys.readouterr().out.strip(), said[problem.id]
        read = prediction["parsed"]
        choice = f"  ({problem.choices['ABCDE'.index(read)]})" if read else ""
        assert told == (prediction["response"] + choice).strip()
    evaluation.main([str(short.folder), "--question", "What is it?"])
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_adapter_loads_in_peft_and_writes_the_same(short, tokenizer):
    """Our files in other people's libraries: transformers' PaliGemma with PEFT's LoRA."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        DEMO, attn_implementation="eager"
    )
    base = theirs.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"].clone()
    theirs = peft.PeftModel.from_pretrained(theirs, short.folder).eval()
    _, (ours,), tokenizer = evaluation.load_run(short.folder)
    ours.config = replace(ours.config, eos_token_id=-1)  # on past the end: more to compare
    for problem in [p for p in data.load("demo", "test") if p.image][:3]:
        prefix = data.pali_prefix(problem, "reason")
        row = data.sequence(tokenizer, prefix, image_tokens=ours.config.image_tokens)
        pixels = pictures.siglip_pixels(
            pictures.open_image(problem.image), ours.config.vision.image_size
        )
        ids = torch.tensor([row["input_ids"]])
        kinds = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        given = {"input_ids": ids, "pixel_values": pixels[None], "max_new_tokens": 24} | kinds
        out = theirs.generate(**given, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out[:, ids.shape[1] :].tolist() == ours.generate(**given).tolist()
    merged = theirs.merge_and_unload().state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name], base)  # it was there


@pytest.mark.slow
def test_full_training_moves_the_image_tower_and_is_decoded_from_its_folder(tmp_path, capsys):
    folder = run(tmp_path / "full", "--full", "--lr", "1e-3", "--no-final-soft-cap").folder
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names and peft.WEIGHTS not in names
    before, after = (backbones.PaliGemma.from_pretrained(f).state_dict() for f in (DEMO, folder))
    same = {name for name in before if torch.equal(before[name], after[name])}
    idle = {n for n in same if n.endswith("k_proj.bias")}  # shifts all scores alike: no gradient
    assert same == idle and not any("vision_tower.embeddings" in name for name in same)
    config = read_json(folder / "config.json")
    assert config["recipe"] == "reason" and config["model_type"] == "paligemma"
    told = (folder / "predictions.jsonl").read_bytes()
    evaluation.main([str(folder), "--decode", "--limit", "8"])
    assert (folder / "predictions.jsonl").read_bytes() == told
    problem = next(p for p in data.load("demo", "test") if p.image)
    evaluation.main([str(folder), "--question", problem.question, "--image", problem.image])
    assert capsys.readouterr().out


def test_full_training_sees_pictures_not_a_cache():
    args = settings("--full")
    model = loading.load_paligemma(args)
    problem = next(p for p in data.load("demo", "train") if p.image)
    features = loading.image_features(args, [problem], model)
    assert isinstance(features, pictures.LazyImages)


@pytest.mark.slow
def test_adapters_on_the_image_tower_see_pictures_too(tmp_path):
    """The cache is the base's: an adapter made elsewhere may have changed what the tower sees."""
    target = "vision_tower.encoder.layers.0.self_attn.q_proj"
    run_ = run(tmp_path / "eyes", "--lora-targets", target, "--lr", "0.5")
    assert [key for key in adapter(run_.folder) if "vision_tower" not in key] == []
    assert all(tensor.any() for tensor in adapter(run_.folder).values())
    config, (model,), _ = evaluation.load_run(run_.folder)
    problems = [p for p in data.load("demo", "test") if p.image][:2]
    seen = loading.image_features(config, problems, model)
    assert isinstance(seen, pictures.LazyImages)
    plain = loading.load_paligemma(config)
    assert isinstance(loading.image_features(config, problems, plain), Features)


# ---- one flag each -----------------------------------------------------------------------------


def test_plain_adapters_are_on_all_seven_projections(tiny):
    keys = {key.split(".")[-3] for key in adapter(tiny.folder)}
    assert keys == set(lora.GEMMA_TARGETS)
    assert not any("magnitude" in key or "vision" in key for key in adapter(tiny.folder))


@pytest.mark.slow
def test_dora(tmp_path):
    folder = run(tmp_path / "dora", "--lora-dora").folder
    moved = {k: t for k, t in adapter(folder).items() if "lora_magnitude_vector" in k}
    assert len(moved) == 7 * TEXT["num_hidden_layers"]
    assert read_json(folder / peft.CONFIG)["use_dora"] is True
    (model,) = evaluation.load_run(folder)[1]
    layers = lora.adapters(model).values()
    assert all((x.lora_magnitude_vector != x.weight.norm(dim=1)).any() for x in layers)


def test_lora_settings_reach_the_adapter(tmp_path):
    flags = "--lora-r 3 --lora-alpha 5 --lora-dropout 0.25 --lora-rslora".split()
    folder = run(tmp_path / "lora", *flags, "--lora-targets", "q_proj", "v_proj").folder
    config = read_json(folder / peft.CONFIG)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.25)
    assert config["use_rslora"] is True and config["use_dora"] is False
    assert {key.split(".")[-3] for key in adapter(folder)} == {"q_proj", "v_proj"}
    assert len(adapter(folder)) == 2 * 2 * TEXT["num_hidden_layers"]


@pytest.mark.slow
def test_the_final_soft_cap_can_be_off(tiny, tmp_path, monkeypatch):
    logits = []

    def spied(model, batch, args, loss=train.paligemma_loss):
        logits.append(model.head(1e4 * model.states(**loading.paligemma_inputs(model, batch))))
        return loss(model, batch, args)

    monkeypatch.setitem(train.LOSS, "paligemma", spied)
    folder = run(tmp_path / "uncapped", "--no-final-soft-cap").folder
    assert logits[0].abs().max() > TEXT["final_logit_softcapping"] + 1
    (model,) = evaluation.load_run(folder)[1]
    assert model.config.text.final_logit_softcapping is None
    (model,) = evaluation.load_run(tiny.folder)[1]
    assert model.config.text.final_logit_softcapping == TEXT["final_logit_softcapping"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["paligemma", "seed"])
def test_the_layout_is_that_of_training_and_of_decoding(layout, spied, tmp_path, tokenizer):
    got = spied(tmp_path / "run", "--layout", layout, "--no-forced-answer")
    special, newline = special_ids(tokenizer), plain_ids(tokenizer, "\n")[0]
    for row in got.examples + got.prompts:
        start = row["token_type_ids"].count(0)
        seen = [i for i in row["input_ids"][:start] if i != special["image"]]
        assert seen.count(special["bos"]) == 1 and seen[-1] == newline
        assert seen.index(special["bos"]) == (0 if layout == "paligemma" else len(seen) - 2)


@pytest.mark.slow
@pytest.mark.parametrize("learns", [True, False])
def test_eos_is_always_there_and_in_the_loss_unless_told(learns, spied, tmp_path):
    got = spied(tmp_path / "run", *([] if learns else ["--no-eos-loss"]))
    for row in got.examples:
        assert row["input_ids"][-1] == 1 and row["labels"][-2] == row["input_ids"][-2]
        assert row["labels"][-1] == (1 if learns else -100)


@pytest.mark.slow
def test_choices_can_be_shuffled_in_training_rows_only(spied, tmp_path, tokenizer):
    flags = ["--limit", "20", "--keep", "all"]
    plain = spied(tmp_path / "plain", *flags)
    mixed = spied(tmp_path / "mixed", *flags, "--shuffle-choices")
    assert [x["input_ids"] for x in plain.prompts] == [x["input_ids"] for x in mixed.prompts]
    problems, moved = {p.id: p for p in data.load("demo", "train")}, 0
    judged = {t["id"]: t["verdict"]["correct"] for t in demo_traces()}
    for one, other in zip(plain.examples, mixed.examples, strict=True):
        texts = [tokenizer.decode(x["input_ids"]).replace("\n ", "\n") for x in (one, other)]
        choices = texts[1].split("Choices:")[1].split("\n")[0]
        if texts[0].split("Choices:")[1].split("\n")[0] != choices:
            letter = texts[1].split("Answer:")[1].strip()[0]
            gold = problems[one["id"]].answer
            assert f"({letter}) {gold}" in choices and judged[one["id"]]
            moved += 1
    assert moved > 3


@pytest.mark.slow
def test_checkpointing_gives_the_same_adapters(tiny, tmp_path, monkeypatch):
    calls = []
    original = backbones.checkpoint
    monkeypatch.setattr(
        backbones, "checkpoint", lambda *a, **k: calls.append(a[0]) or original(*a, **k)
    )
    folder = run(tmp_path / "again", "--checkpointing").folder
    assert len(calls) == 2 * TEXT["num_hidden_layers"]  # two steps
    for name, tensor in adapter(folder).items():
        torch.testing.assert_close(tensor, adapter(tiny.folder)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_bf16_is_for_frozen_weights_alone(tiny, tmp_path, spied):
    got = spied(tmp_path / "half", "--dtype", "bfloat16")
    dtypes = {(p.requires_grad, p.dtype) for p in got.model.parameters()}
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


def test_defaults_of_the_demo_and_of_real_data():
    demo, real = settings(), settings("--data", "scienceqa")
    assert demo.weights == [DEMO] and demo.traces == "demo"
    assert real.weights == ["google/paligemma2-3b-mix-448"] and real.traces is None
    assert (real.weighting, real.checkpointing, real.final_soft_cap) == ("example", True, False)
    assert settings("--data", "scienceqa", "--mix", "0").mix == 0  # 0 is a value, not "not given"
    assert settings("--data", "scienceqa", "--no-checkpointing").checkpointing is False
    assert real.dtype == "float32" and real.keep == "consistent" and not real.full
    for flags, dtype in (([], "bfloat16"), (["--full"], "float32")):
        assert settings("--device", "cuda", *flags).dtype == dtype


@pytest.mark.parametrize("full", [False, True])
def test_the_ablation_changes_one_thing_at_a_time(full, tmp_path, monkeypatch):
    ran, scores = {}, scored([own_problem()], [{"id": "1", "response": "A"}])

    def ran_one(args):
        ran[Path(args.out).name] = args
        return scores

    monkeypatch.setattr(train, "run_paligemma", ran_one)
    told = run(tmp_path / "all", "--ablation", *(["--full"] if full else [])).told
    assert len(ran) == len(PALIGEMMA_ABLATION) == 11
    main, told = vars(ran["all"]), told.splitlines()[-20:]
    for name, changed in PALIGEMMA_ABLATION.items():
        assert any(line.startswith(name) for line in told)
        folder = "".join(c if c.isalnum() else "-" for c in name) if changed else "all"
        differs = {k: v for k, v in vars(ran[folder]).items() if main[k] != v}
        differs.pop("out", None)
        if name in DECODED_AGAIN:  # --full leaves weights, not an adapter
            own = {"weights": [main["out"]]} if full else {"adapter": main["out"]}
            changed = changed | own
        assert differs == changed
    assert list(ran).index("all") < list(ran).index("vote-of-5")


# ---- decoding, with a stand-in for the model ---------------------------------------------------


class Speaker:
    """Writes what `says(prompt, begun)` returns, token by token through the real loop; `begun` is
    the part of the suffix that is there already. A text that ends in "..." has no <eos>. A list is
    ids."""

    config = SimpleNamespace(
        eos_token_id=1, pad_token_id=0, image_token_index=CONFIG["image_token_index"]
    )
    language_model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.calls = tokenizer, says, []

    def script(self, ids, kinds):
        """The ids that are to be written behind a row's ids."""
        text = self.tokenizer.decode(ids[kinds == 0].tolist())
        said = self.says(text, self.tokenizer.decode(ids[kinds == 1].tolist()))
        if isinstance(said, list):
            return [*said, 1]
        more = range(100, 200) if said.endswith("...") else [1]  # other words, or <eos>
        return plain_ids(self.tokenizer, said.removesuffix("...")) + [*more]

    def generate(self, input_ids, max_new_tokens, attention_mask, token_type_ids, **how):
        rows = []
        for ids, mask, kinds in zip(input_ids, attention_mask, token_type_ids, strict=True):
            ids, kinds = ids[mask.bool()], kinds[mask.bool()]
            rows.append(self.script(ids, kinds))
            self.calls.append((ids.tolist(), kinds.tolist(), max_new_tokens, how["stop_loops"]))
        state = SimpleNamespace(rows=rows, t=0)

        def logits():
            words = torch.tensor([row[state.t] for row in state.rows])
            return 1e6 * F.one_hot(words, TEXT["vocab_size"]).float()

        def keep(alive):
            state.rows = [row for row, stays in zip(state.rows, alive, strict=True) if stays]

        def step(ids, cache):
            state.t += 1
            return logits()

        state.keep = keep
        return backbones.decode(logits(), step, state, max_new_tokens, 1, 0, **how)


def own_problem(id="1", choices=("red", "blue", "green"), index=0, question="Which is most?"):
    meta = {"answer_index": index, "caption": ""}
    return data.Problem(id, question, choices, choices[index], "", None, "", "", meta)


LONG = "There is 1 red circle and 2 blue squares and 3 green triangles and 4 yellow circles and"
LOOP = "I look at the picture. " + "There is 1 red circle and 2 blue squares. " * 8


@pytest.fixture
def heard(tokenizer):
    """(says, flags) -> the prediction of one problem, the calls of the model."""

    def ask(says, *flags):
        speaker = Speaker(tokenizer, says if callable(says) else lambda prompt, begun: says)
        config = settings("--max-output", "30", "4", *flags)
        (told,) = evaluation.predict([speaker], [own_problem()], config, tokenizer, None)
        return told, speaker.calls

    return ask


def test_a_text_that_answers_by_itself_is_left_alone(heard, tokenizer):
    told, calls = heard("Red is most. Answer: A")
    assert told["stop"] == "eos" and len(calls) == 1 and "forced_after" not in told
    ids = plain_ids(tokenizer, "Red is most. Answer: A")
    assert told["tokens"] == len(ids) + 1  # and <eos>
    assert told["response"] == tokenizer.decode(ids)
    assert told["rationale"] == "Red is most." and set(told) == {
        "id", "response", "ids", "rationale", "stop", "tokens"
    }  # fmt: skip
    assert heard("Answer: A")[0]["rationale"] == ""


def test_a_rationale_over_its_budget_is_made_to_answer(heard, tokenizer):
    told, calls = heard(lambda prompt, begun: "B" if begun else LONG + "...", "--max-output", "9")
    ids = plain_ids(tokenizer, LONG)[:9]
    cut, cue = tokenizer.decode(ids), plain_ids(tokenizer, "\nAnswer:")
    assert told["stop"] == "forced" and told["forced_after"] == "length"
    assert told["response"].startswith(f"{cut.rstrip()}\nAnswer:")
    assert told["response"].splitlines()[-1].removeprefix("Answer:").strip(" :") == "B"
    assert told["rationale"] == cut.strip()
    assert told["tokens"] == 9 + 2  # B and <eos>; the cue is not the model's
    (first, _, budget, loops), (second, kinds, after, again) = calls
    assert (budget, after, loops, again) == (9, 9, True, False)
    assert second == first + ids + cue and kinds == [0] * len(first) + [1] * len(ids + cue)
    _, calls = heard(lambda prompt, begun: "B" if begun else LONG + "...")
    assert [call[2] for call in calls] == [30, 4]  # a budget for the rationale, one to answer


def test_a_loop_is_stopped_and_the_answer_is_asked_for_before_it(heard, tokenizer):
    told, calls = heard(lambda prompt, begun: "C" if begun else LOOP, "--max-output", "90", "4")
    assert told["stop"] == "forced" and told["forced_after"] == "loop"
    assert evaluation.grade(own_problem(), told["response"]).parsed == "C"
    assert told["tokens"] < 60 and told["response"].count("red circle") >= 3  # what it really said
    (first, *_), (second, *_) = calls
    begun = tokenizer.decode(second[len(first) :])
    assert begun.count("red circle") == 1 and begun.startswith("I look") and "Answer" in begun


def test_loops_may_go_on(heard):
    says = lambda prompt, begun: "C" if begun else LOOP  # noqa: E731
    told, calls = heard(says, "--no-loop-stop", "--max-output", "60", "4")
    assert told["forced_after"] == "length" and told["tokens"] == 60 + 2
    assert [call[3] for call in calls] == [False, False]


def test_nothing_is_forced_where_that_is_switched_off(heard):
    for says, stop in ((LOOP, "loop"), (LONG + LONG + "...", "length"), ("It is red.", "eos")):
        told, calls = heard(says, "--no-forced-answer", "--max-output", "80", "4")
        if stop == "length":
            told, calls = heard(says, "--no-forced-answer", "--max-output", "20", "4")
        assert told["stop"] == stop and "forced_after" not in told and len(calls) == 1
        assert told["rationale"] == told["response"].strip() and "Answer:" not in told["response"]


def test_an_end_without_an_answer_is_asked_for_one(heard):
    told, _ = heard(lambda prompt, begun: "A" if begun else "It is red.")
    assert told["stop"] == "forced" and told["forced_after"] == "eos"
    assert evaluation.grade(own_problem(), told["response"]).correct


def test_an_answer_run_has_no_rationale_and_a_short_budget(heard):
    told, calls = heard("B", "--recipe", "answer")
    assert set(told) == {"id", "response", "ids", "stop", "tokens"} and told["stop"] == "eos"
    told, calls = heard(LOOP, "--recipe", "answer")
    assert told["stop"] == "length" and told["tokens"] == 4
    assert [call[2:] for call in calls] == [(4, False)]


def test_an_image_token_that_was_said_is_not_shown_again(heard):
    """Sampled, it happens; there would be no features for it."""
    image = CONFIG["image_token_index"]
    told, calls = heard(lambda prompt, begun: "A" if begun else [101, image, 102, image])
    assert told["stop"] == "forced" and told["tokens"] == 5 + 2
    (first, *_), (second, *_) = calls
    assert second[len(first) :][:2] == [101, 102] and image not in second


def test_each_recipe_asks_in_its_own_words(tokenizer):
    for recipe in ("reason", "answer"):
        prompts = []
        speaker = Speaker(tokenizer, lambda p, begun, to=prompts: to.append(p) or "Answer: A")
        config = settings("--recipe", recipe)
        evaluation.predict([speaker], [own_problem()], config, tokenizer, None)
        expected = plain_ids(tokenizer, data.pali_prefix(own_problem(), recipe) + "\n")
        assert plain_ids(tokenizer, prompts[0])[-len(expected) :] == expected


def test_only_cut_rows_are_asked_again_and_each_keeps_its_own(tokenizer):
    """Rows of a batch that end differently, and a last answer for each of them."""
    told_by = {
        "red": "It is red. Answer: A",
        "blue": LONG + "...",
        "green": LOOP,
        "yellow": "It is yellow.",
    }
    answers = {"blue": "B", "green": "C", "yellow": "A"}

    def says(prompt, begun):
        colour = prompt.split("Which is")[1].split("?")[0].strip()
        return answers[colour] if begun else told_by[colour]

    problems = [own_problem(str(i), question=f"Which is {c}?") for i, c in enumerate(told_by)]
    for size in ("1", "3", "64"):
        speaker = Speaker(tokenizer, says)
        config = settings("--eval-batch-size", size, "--max-output", "50", "4")
        told = evaluation.predict([speaker], problems, config, tokenizer, None)
        assert [x["id"] for x in told] == ["0", "1", "2", "3"] and len(speaker.calls) == 7
        assert [x.get("forced_after") for x in told] == [None, "length", "loop", "eos"]
        parsed = [evaluation.grade(problems[0], x["response"]).parsed for x in told]
        assert parsed == ["A", "B", "C", "A"]


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 9, 12])
def test_what_was_written_before_the_loop(period):
    """One round of it is kept. At the token where the detector stops it, and at any later one."""
    start, ids = list(range(100, 105)), list(range(100, 105)) + list(range(period)) * 30
    for longer in (0, 1, period + 1, 25):
        looped = ids[: len(start) + max(4 * period, 24) + longer]
        assert errors.before_loop(looped) == start + list(range(period))
    almost = ids[: len(start) + max(4 * period, 24) - 1]
    assert errors.before_loop(almost) == almost


def test_what_is_no_loop_to_the_detector_stays_whole():
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(300):
        size, words = (
            int(torch.randint(a, b, (), generator=generator)) for a, b in ((0, 60), (1, 4))
        )
        rows = torch.randint(0, words, (1, size), generator=generator)
        loops, ids = bool(backbones.looping(rows)), rows[0].tolist()
        kept = errors.before_loop(ids)
        assert ids[: len(kept)] == kept and (len(kept) < size) == loops
        found += loops
    assert 20 < found < 280


@pytest.mark.slow
def test_batched_equals_single(tokenizer):
    """In fp32, with adapters that make it talk at random, cut rows and forced answers included."""
    model, args = adapted()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.15, generator=generator)
    problems = data.load("demo", "test")[:10]
    features = loading.image_features(args, problems, model)
    told = []
    for size in (1, 4, 64):
        changed = {"eval_batch_size": size, "max_output": [24, 4]}
        config = SimpleNamespace(**vars(args) | changed)
        told.append(evaluation.predict([model.eval()], problems, config, tokenizer, features))
    assert told[0] == told[1] == told[2]
    assert len({x["response"] for x in told[0]}) > 5


# ---- votes -------------------------------------------------------------------------------------


def voted(texts, monkeypatch, **changed):
    """The prediction from five texts, and with which temperature and seed each was asked for."""
    asked = []

    def write(decoder, **options):
        asked.append((decoder.temperature, decoder.seed))
        text = texts[len(asked) - 1]
        told = {"response": text, "rationale": text, "stop": "eos", "tokens": len(asked)}
        return {"1": told}

    monkeypatch.setattr(decoding.Decoder, "paligemma_texts", write)
    monkeypatch.setattr(evaluation, "prompt_examples", lambda *given: [])
    flags = ["--samples", str(len(texts)), "--temperature", "0.7", "--seed", "9"]
    config = SimpleNamespace(**vars(settings(*flags)) | changed)
    (told,) = evaluation.predict([None], [own_problem(index=1)], config, None, None)
    return told, asked


@pytest.mark.parametrize(
    "texts, winner, votes",
    [
        (["x Answer: A", "y Answer: B", "z Answer: B"], 1, {"A": 1, "B": 2}),
        (["x Answer: C", "y Answer: A", "z Answer: B", "w Answer: B", "v Answer: A"], 1,
         {"C": 1, "A": 2, "B": 2}),  # a tie: the one that was there first
        (["nothing", "more", "y Answer: B"], 2, {"B": 1}),  # no answer has no vote
        (["nothing", "Answer: D", "more"], 0, {}),
        (["Answer: B", "blue", "Answer: (B)", "x Answer: A", "x Answer: A"], 0, {"B": 3, "A": 2}),
    ],
)  # fmt: skip
def test_the_most_frequent_answer_wins(texts, winner, votes, monkeypatch):
    told, asked = voted(texts, monkeypatch)
    assert told["response"] == texts[winner] and told["votes"] == votes
    assert told["id"] == "1" and told["stop"] == "eos"
    assert told["tokens"] == sum(range(1, len(texts) + 1))  # what all of them cost
    assert asked == [(0.7, 9 + i) for i in range(len(texts))]
    json.dumps(told)


@pytest.mark.slow
def test_sampling_follows_seed_and_temperature(tokenizer):
    model = loading.load_paligemma(settings())
    problems = data.load("demo", "test")[:4]
    features = loading.image_features(settings(), problems, model)

    def told(*flags):
        config = settings("--max-output", "12", "4", *flags)
        return evaluation.predict([model], problems, config, tokenizer, features)

    def responses(*flags):
        return [x["response"] for x in told(*flags)]

    votes = ["--samples", "3", "--temperature", "3"]
    first = told(*votes, "--seed", "1")
    assert first == told(*votes, "--seed", "1")
    assert all(sum(x["votes"].values()) <= 3 for x in first)
    greedy, hot = responses(), ["--temperature", "3"]
    assert responses("--seed", "5") == greedy != responses(*hot)
    assert responses(*hot, "--seed", "5") == responses(*hot, "--seed", "5")
    assert responses(*hot, "--seed", "5") != responses(*hot, "--seed", "6")
    assert responses("--temperature", "1e-6") == greedy
    assert any(len(x["votes"]) > 1 or sum(x["votes"].values()) < 3 for x in first)


# ---- reading PaliGemma's answers ---------------------------------------------------------------


@pytest.mark.parametrize(
    "response, parsed, how",
    [
        ("It is so.\nAnswer: B", "B", "letter"),
        ("It is so.\n Answer: B", "B", "letter"),
        ("Answer: (B)", "B", "letter"),
        ("Answer: (B).", "B", "letter"),
        ("Answer: b", "B", "letter"),
        ("Answer: blue", "B", "choice text"),
        ("Answer:  Dark   Blue. ", "C", "choice text"),
        ("B", "B", "letter"),
        (" (b) ", "B", "letter"),
        ("blue", "B", "choice text"),
        ("Answer: A\nNo.\nAnswer: B", "B", "letter"),  # the last counts
        ("Answer: B\nAnswer:", None, "no answer found"),
        ("Answer: D", None, "no answer found"),
        ("Answer: A or B", None, "no answer found"),
        ("Answer: B because", None, "no answer found"),
        ("It is blue.", None, "no answer found"),
        ("answer: B", None, "no answer found"),
        ("Answer:", None, "no answer found"),
    ],
)
def test_paligemmas_forms_are_read(response, parsed, how):
    problem = own_problem(choices=("red", "blue", "dark  blue"), index=1)
    assert evaluation.grade(problem, response) == evaluation.Grade(parsed == "B", parsed, how)


def test_two_equal_texts_are_not_read_as_a_choice():
    twins = own_problem(choices=("cat", "Cat.", "dog"), index=1)
    assert evaluation.grade(twins, "Answer: cat").parsed is None
    assert evaluation.grade(twins, "Answer: dog").parsed == "C"
    assert evaluation.grade(twins, "Answer: B").correct
    named = own_problem(choices=("B", "A"), index=0)  # a letter is a letter first
    assert evaluation.grade(named, "Answer: B").parsed == "B"
    assert not evaluation.grade(named, "Answer: B").correct


def test_multimodal_cots_own_form_comes_first():
    problem = own_problem(index=1)
    assert evaluation.grade(problem, "Answer: A. The answer is (B).").parsed == "B"
    assert evaluation.grade(problem, "The answer is (A). The answer is (B).").parsed is None
    assert evaluation.grade(problem, "The answer is (D).").parsed is None


def test_an_answer_line_behind_it_is_the_last_word():
    problem = own_problem(index=1)
    assert evaluation.grade(problem, "So: The answer is (A).\nAnswer: B").parsed == "B"
    assert evaluation.grade(problem, "The answer is (D).\nAnswer: B").parsed == "B"
    assert evaluation.grade(problem, "The answer is (B).\nAnswer:").parsed is None


def test_the_original_guess_knows_nothing_of_these_forms():
    problem = own_problem(index=1)
    for response in ("Answer: B", "B", "blue"):
        read = evaluation.grade(problem, response, random.Random(42))
        assert read.parsed is None and read.how == "no answer found; guessed A"


@pytest.mark.parametrize(
    "response, correct",
    [("Answer: 4", True), ("It is 5.\nAnswer: 4.0", True), ("Answer: 5", False)],
)
def test_answers_without_choices(response, correct):
    problem = data.Problem("1", "?", (), "4", "", None, "", "", {"answer_index": None})
    assert evaluation.grade(problem, response).correct == correct


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--limit", "2", "--keep", "consistent", "--limit-traces", "0"], "No trace is left"),
        (["--traces", "nowhere.jsonl"], r"^nowhere\.jsonl does not exist\.$"),
        (["--adapter", "nowhere"], "nowhere.*does not exist"),
        (["--lora-targets", "no_proj"], "fits.*no_proj"),
        (["--weights", str(ROOT / "demo/t5")], "t5"),
        (["--test-split", "exam"], "exam"),
        (["--device", "cuda"], "no device 'cuda'.*--device cpu"),
    ],
)
def test_a_run_that_cannot_start_says_why_and_leaves_nothing(
    flags, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=sentence):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_machine_names_the_device(tiny, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "run"))
    config = read_json(folder / "config.json") | {"device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no device 'cuda'"):
        evaluation.main([str(folder), "--decode"])
    evaluation.main([str(folder), "--decode", "--device", "cpu", "--limit", "2"])


def test_paligemma_1_is_refused(tmp_path):
    shutil.copytree(DEMO, tmp_path / "first")
    config = read_json(f"{DEMO}/config.json")
    config["text_config"]["model_type"] = "gemma"
    (tmp_path / "first/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="first.*PaliGemma 1"):
        run(tmp_path / "run", "--weights", str(tmp_path / "first"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--recipe", "two-stage"], "--model paligemma knows the recipes reason, answer"),
        (["--full", "--adapter", "x"], "not both"),
        (["--samples", "5"], "--temperature above 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args([*GIVEN, *flags])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.fixture
def pictured(tmp_path):
    """A .jsonl whose problems have pictures; of those named the file is missing."""
    source = next(p.image for p in data.load("demo", "train") if p.image)

    def made(*missing):
        records = own_problems()
        for record in records:
            record["image"] = f"{record['id']}.png"
            if record["id"] not in missing:
                shutil.copy(source, tmp_path / record["image"])
        file = write_lines(tmp_path / "own.jsonl", records)
        flags = ["--data", file, "--weights", DEMO, "--max-suffix", "90", "--batch-size", "4"]
        return [*flags, "--features-cache", str(tmp_path / "cache"), "--epochs", "1"]

    return made


def test_a_missing_training_picture_stops_the_run_or_is_skipped(pictured, tmp_path):
    flags = pictured("p3")
    with pytest.raises(FileNotFoundError, match=r"p3\.png"):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
    told = run(tmp_path / "run", *flags, "--on-error", "skip").told
    assert "skipped: 1 of train;" in told and "6 solutions" in told
    [line] = lines_of(tmp_path / "run/skipped.jsonl")
    assert line["id"] == "p3" and line["split"] == "train" and "p3.png" in line["reason"]
    lines = lines_of(tmp_path / "run/log.jsonl")
    assert sum(x["examples"] for x in lines) == 4  # p0 is held back, p3 left out
    assert read_json(tmp_path / "run/metrics.json")["n"] == 1


def test_no_picture_at_all_is_no_silent_run_of_the_base(pictured, tmp_path):
    flags = pictured(*(f"p{i}" for i in range(6)))
    with pytest.raises(ValueError, match=r"No problem of train is left.*p0\.png"):
        run(tmp_path / "run", *flags, "--on-error", "skip")
    assert not (tmp_path / "run").exists()


def test_pictures_that_are_trained_on_and_tested_are_counted(pictured, tmp_path):
    told = run(tmp_path / "run", *pictured()).told
    assert "1 of 1 test problems show a picture that is trained on (p7)" in told


# ---- the demo ----------------------------------------------------------------------------------


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
