"""data.py: where `load` looks, examples, batches; PaliGemma's prefix, suffix and sequence."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, gemma
from samples import (
    REAL,
    asked,
    by_pid,
    needs_mathvista,
    needs_tokenizer,
    needs_traces,
    record,
    scienceqa,
    trace,
)

import data
from data import TrainRow
from support.dataset.choices import LETTERS
from support.dataset.features import Features
from support.dataset.images import open_image
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import load_traces

# --- Problems -------------------------------------------------------------------------------------


def test_places_without_a_data_set(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="problems.json"):
        data.load(tmp_path, "test")
    (tmp_path / "annot_testmini.json").write_text("[]")
    with pytest.raises(ValueError, match="annot_testmini.json"):
        data.load(tmp_path, "test")
    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="python data.py scienceqa"):
        data.load("scienceqa", "test")
    scienceqa(tmp_path / "cache/scienceqa")
    assert len(data.load("scienceqa", "test")) == 1


def test_demo_is_drawn_once(tmp_path, monkeypatch):
    from demo import scenes

    draw, calls = scenes.write, []
    small = {"train": 4, "val": 2, "test": 4}
    monkeypatch.setattr(scenes, "write", lambda folder: (calls.append(1), draw(folder, small)))
    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path))
    first, again = data.load("demo", "train"), data.load("demo", "train")
    assert first == again and len(first) == 4 and len(calls) == 1
    assert all(p.image is None or open_image(p.image) for p in first)
    [folder] = tmp_path.glob("demo-*")
    scripts = [ROOT / "demo" / f"{name}.py" for name in ("scenes", "drawing", "wording")]
    digest = hashlib.sha256(b"".join(script.read_bytes() for script in scripts)).hexdigest()
    assert folder.name == f"demo-{digest[:10]}"


# --- Tokens and batches ---------------------------------------------------------------------------


def test_examples(spiece, tmp_path):
    records = {"1": record(image="image.png"), "2": record(lecture="Long. " * 99)}
    folder = scienceqa(tmp_path, records, captions={"1": "a rope and a belt"})
    problems, tokenizer = data.load(folder, "test"), load_tokenizer(spiece)
    stored = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float16)
    features = Features(stored, {"1": 0})
    source = tokenizer.encode(data.prompt(problems[0], "QCM-LE", caption=True)[0]).ids
    limits = {"max_input": 60, "max_output": 60}
    first, second = data.examples(problems, "QCM-LE", tokenizer, features, captions=True, **limits)
    assert first["id"] == "1" and first["input_ids"] == source[:44] + source[-16:]
    assert len(second["labels"]) == 60 and second["labels"][-1] == 1
    batch = data.collate([first, second])
    np.testing.assert_array_equal(batch["image_features"][0], stored[0].astype(np.float32))
    assert batch["image_features"].dtype == torch.float32 and not batch["image_features"][1].any()
    written = {"1": "Solution: the belt.", "2": "Solution: the rope."}
    limits = {"max_input": 512, "max_output": 8, "faithful": True}
    pair = data.examples(problems, "QCMG-A", tokenizer, None, written, **limits)
    for problem, example in zip(problems, pair, strict=True):
        source, target = data.prompt(problem, "QCMG-A", written[problem.id], faithful=True)
        assert example["input_ids"] == tokenizer.encode(source).ids
        assert example["labels"] == tokenizer.encode(target).ids[:7] + [1]
        assert "image_features" not in example
    with pytest.raises(KeyError):  # a missing rationale is not replaced by the gold one
        data.examples(problems, "QCMG-A", tokenizer, None, {"1": ""}, **limits)


def test_collate():
    rows = [
        {"id": "a", "input_ids": [5, 6, 1], "labels": [7, 1]},
        {"id": "b", "input_ids": [8, 1], "labels": [9, 0, 9, 1]},
    ]
    features = np.arange(6, dtype=np.float32).reshape(2, 3)
    batch = data.collate([row | {"image_features": features} for row in rows])
    assert batch["ids"] == ["a", "b"]
    assert batch["input_ids"].tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100, -100], [9, 0, 9, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 1, 0], [0, 9, 0, 9]]
    assert batch["image_features"].shape == (2, 2, 3)
    assert batch["image_features"].dtype == torch.float32
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "labels"))
    prompt_only = data.collate([{"id": "a", "input_ids": [5, 1]}])
    assert set(prompt_only) == {"ids", "input_ids", "attention_mask"}


def test_batches():
    lengths = torch.randint(5, 300, (1003,), generator=torch.Generator().manual_seed(1)).tolist()

    def epoch(seed, lengths=lengths):
        return data.batches(lengths, 8, torch.Generator().manual_seed(seed))

    assert epoch(3) == epoch(3) != epoch(4)
    assert sorted(row for batch in epoch(3) for row in batch) == list(range(1003))
    assert max(map(len, epoch(3))) == 8 and sum(len(batch) < 8 for batch in epoch(3)) == 1
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in epoch(3))
    assert padded < 1.1 * sum(lengths)  # random batches of 8: about 1.75
    shortest = [min(lengths[row] for row in batch) for batch in epoch(3, lengths[:400])]
    assert shortest != sorted(shortest)  # one chunk: all short ones do not come first
    plain = [row for batch in data.batches(lengths, 8) for row in batch]
    assert plain == sorted(range(1003), key=lambda row: lengths[row])
    assert data.batches([], 8) == data.batches([], 8, torch.Generator()) == []


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_features_that_are_not_finite_are_named(bad):
    rows = [{"id": f"p{i}", "input_ids": [1], "token_type_ids": [0]} for i in range(3)]
    for row, value in zip(rows, (1.0, bad, 2.0), strict=True):
        row["image_features"] = np.full((2, 3), value, np.float16)
    for collate in (data.collate, data.pali_collate):
        with pytest.raises(ValueError) as caught:
            collate(rows)
        assert re.findall(r"p\d", str(caught.value)) == ["p1"]


# --- PaliGemma ------------------------------------------------------------------------------------


def test_prefix(tmp_path):
    assert data.pali_prefix(asked(choices=()), "answer") == "answer en Which is it?"
    full = asked(hint="Look.\nTwice.", meta={"unit": "cm"})
    assert data.pali_prefix(full, "reason") == (
        "reason en Which is it?\nHint: Look.\nTwice.\nUnit: cm\n"
        "Choices: (A) rope (B) belt (C) neither"
    )
    [problem] = data.load(scienceqa(tmp_path, {"1": record(hint="")}), "test")
    assert data.pali_prefix(problem, "answer") == (
        "answer en Which  one is\nlonger?\nChoices: (A) the rope (B) the belt (C) neither"
    )
    with pytest.raises(ValueError, match="Problem 1 .*11"):
        data.pali_prefix(asked(choices=tuple("abcdefghijk")), "answer")


def test_suffix():
    free = asked(choices=(), answer="2.5 cm", meta={"answer_index": None})
    assert (data.pali_suffix(asked()), data.pali_suffix(free)) == ("B", "2.5 cm")
    judged = trace("It is long.\n\nSo long.\n")
    assert data.pali_suffix(asked(), judged) == "It is long.\n\nSo long.\nAnswer: B"
    for unsure in (False, None):
        assert data.pali_suffix(asked(), trace(correct=unsure)) == "It is long.\nAnswer: C"
    assert data.pali_suffix(free, trace(answer="3 cm", correct=None)).endswith("\nAnswer: 3 cm")
    assert data.pali_suffix(asked(), trace(answer="", correct=False)) == "It is long."


@needs_traces
@needs_mathvista
def test_suffixes_of_unjudged_real_traces_end_in_an_answer():
    for one in load_traces(REAL / "pali_reason/training.csv"):
        problem = by_pid()[one["id"]]
        last = data.pali_suffix(problem, one).split("\n")[-1].removeprefix("Answer: ")
        if problem.choices:
            assert last in LETTERS[: len(problem.choices)]
        elif problem.meta["answer_type"] in ("integer", "float"):
            assert float(last) is not None
        else:
            assert re.fullmatch(r"\[[\d, ]+\]", last)


COW = [6006, 603, 573, 13910, 9980, 235336]  # transformers' own example
BEACH = [477, 573, 8318]


@needs_tokenizer
def test_golden_ids():
    question, answer = "Where is the cow standing?", "on the beach"
    row = data.sequence(gemma(), question, answer, image_tokens=4)
    assert row["input_ids"] == [257152] * 4 + [2, *COW, 108, *BEACH, 1]
    assert row["token_type_ids"] == [0] * 12 + [1] * 4
    assert row["labels"] == [-100] * 12 + [*BEACH, 1]
    prompt_only = data.sequence(gemma(), question, image_tokens=4)
    assert prompt_only == {"input_ids": row["input_ids"][:12], "token_type_ids": [0] * 12}
    seed = data.sequence(gemma(), question, answer, 2, layout="seed")
    assert seed["input_ids"] == [257152] * 2 + [*COW, 2, 108, *BEACH, 1]
    unstopped = data.sequence(gemma(), question, answer, eos_in_loss=False)
    assert unstopped["input_ids"] == [2, *COW, 108, *BEACH, 1]
    assert unstopped["labels"] == [-100] * 8 + [*BEACH, -100]
    with pytest.raises(ValueError, match="'sead'"):
        data.sequence(gemma(), question, layout="sead")


@needs_tokenizer
def test_newline_is_tokenised_on_its_own():
    row = data.sequence(gemma(), "Why?\n", "\nB")["input_ids"]  # 109 is two newlines in one
    assert row[-5:] == [108, 108, 108, 235305, 1]


@needs_tokenizer
def test_pali_examples(capsys):
    stored = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float16)
    features = Features(stored, {"1": 0})
    plain = asked(id="2")
    rows = [
        TrainRow(asked(), "answer"),
        TrainRow(plain, "reason", trace()),
        TrainRow(plain, "reason", trace("long " * 50)),
        TrainRow(plain, "reason", has_suffix=False),
        TrainRow(replace(plain, question="why " * 50), "answer", has_suffix=False),
    ]
    examples = data.pali_examples(rows, gemma(), features, max_suffix=11)
    assert "1 of 5 rows were left out: over max_suffix 11." in capsys.readouterr().err
    assert [example["id"] for example in examples] == ["1", "2", "2", "2"]
    first, second, third, fourth = examples
    np.testing.assert_array_equal(first["image_features"], stored[0])
    assert first["input_ids"][:5] == [257152] * 4 + [2] and first["labels"][-2:] == [235305, 1]
    target = "".join(gemma().decode([id]) for id in second["labels"] if id > 1)
    assert target == "It is long.\nAnswer: B" and "image_features" not in second
    assert 257152 not in second["input_ids"] and "labels" not in third
    assert len(fourth["input_ids"]) > 60 and "labels" not in fourth  # a test question is kept
    exact = sum(second["token_type_ids"])
    seed = {"layout": "seed", "eos_in_loss": False}
    [example] = data.pali_examples(rows[1:2], gemma(), max_suffix=exact, **seed)
    assert example["labels"][-1] == -100 and example["input_ids"][-1] == 1
    assert example["input_ids"].index(2) > 1
    assert not data.pali_examples(rows[1:2], gemma(), max_suffix=exact - 1, **seed)


@needs_tokenizer
def test_shuffled_rows():
    rows = [TrainRow(asked(), "answer")] * 40
    rows += [TrainRow(asked(), "reason", trace("Option (B) it is."))]
    rows += [TrainRow(asked(), "answer", has_suffix=False)]

    def texts(shuffle_choices=True, seed=3):
        flags = {"shuffle_choices": shuffle_choices, "seed": seed}
        examples = data.pali_examples(rows, gemma(), max_suffix=16, **flags)
        return [gemma().decode(example["input_ids"]) for example in examples]

    shuffled = texts()
    assert all(re.search(rf"\({text[-1]}\) belt", text) for text in shuffled[:40])
    assert {text[-1] for text in shuffled[:40]} == set("ABC")
    order = "Choices: (A) rope (B) belt (C) neither"
    assert order in shuffled[40] and order in shuffled[41]
    assert shuffled == texts() != texts(seed=4)
    assert set(texts(shuffle_choices=False)[:40]) == {f"answer en Which is it?\n{order}\nB"}


def test_pali_collate():
    features = np.arange(6, dtype=np.float16).reshape(2, 3)
    rows = [
        {"id": "a", "input_ids": [9, 2, 5], "token_type_ids": [0, 0, 1], "labels": [-100, -100, 5]},
        {"id": "b", "input_ids": [2, 6], "token_type_ids": [0, 1], "labels": [-100, 6]},
    ]
    batch = data.pali_collate([rows[0] | {"image_features": features}, rows[1]], pad_id=7)
    assert batch["ids"] == ["a", "b"]
    assert batch["input_ids"].tolist() == [[9, 2, 5], [7, 2, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5], [-100, -100, 6]]
    assert batch["image_features"].dtype == torch.float32
    assert batch["image_features"].tolist() == [features.tolist()]  # one image, two rows
    right = data.pali_collate(rows, side="right")
    assert "image_features" not in right
    assert right["input_ids"].tolist() == [[9, 2, 5], [2, 6, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["labels"].tolist() == [[-100, -100, 5], [-100, 6, -100]]
    assert all(value.dtype == torch.int64 for key, value in right.items() if key != "ids")
    prompts = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    assert "labels" not in data.pali_collate(prompts)
