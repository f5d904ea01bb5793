"""PaliGemma's rows in data.py: prefix and suffix, the sequence, batches."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import gemma
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
from support.dataset.choices import LETTERS
from support.dataset.features import Features
from support.dataset.traces import load_traces


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
    with pytest.raises(ValueError, match="Problem 1 has 11 choices"):
        data.pali_prefix(asked(choices=tuple("abcdefghijk")), "answer")


def test_suffix():
    free = asked(choices=(), answer="2.5 cm", meta={"answer_index": None})
    assert (data.pali_suffix(asked()), data.pali_suffix(free)) == ("B", "2.5 cm")
    judged = trace("It is long.\n\nSo long.\n")
    assert data.pali_suffix(asked(), judged) == "It is long.\n\nSo long.\nAnswer: B"
    assert data.pali_suffix(asked(), trace(correct=False)) == "It is long.\nAnswer: C"
    assert data.pali_suffix(asked(), trace(correct=None)) == "It is long.\nAnswer: C"
    assert data.pali_suffix(free, trace(answer="3 cm", correct=None)).endswith("\nAnswer: 3 cm")


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
    asked_only = data.sequence(gemma(), question, image_tokens=4)
    assert asked_only == {"input_ids": row["input_ids"][:12], "token_type_ids": [0] * 12}
    seed = data.sequence(gemma(), question, answer, 2, layout="seed")
    assert seed["input_ids"] == [257152] * 2 + [*COW, 2, 108, *BEACH, 1]
    unstopped = data.sequence(gemma(), question, answer, eos_in_loss=False)
    assert unstopped["input_ids"] == [2, *COW, 108, *BEACH, 1]
    assert unstopped["labels"] == [-100] * 8 + [*BEACH, -100]
    with pytest.raises(ValueError, match="no layout 'sead'"):
        data.sequence(gemma(), question, layout="sead")


@needs_tokenizer
def test_newline_is_tokenised_on_its_own():
    row = data.sequence(gemma(), "Why?\n", "\nB")["input_ids"]  # 109 is two newlines in one
    assert row[-5:] == [108, 108, 108, 235305, 1]


@needs_tokenizer
def test_pali_examples(capsys):
    stored = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float16)
    features = Features(stored, {"1": 0})
    plain, long = asked(id="2"), trace("long " * 50)
    rows = [data.TrainRow(asked(), "answer"), data.TrainRow(plain, "reason", trace())]
    rows += [data.TrainRow(plain, "reason", long), data.TrainRow(plain, "reason", None, False)]
    wordy = replace(plain, question="why " * 50)
    rows += [data.TrainRow(wordy, "answer", None, suffix) for suffix in (True, False)]
    examples = data.pali_examples(rows, gemma(), features, max_suffix=11, max_prefix=40)
    printed = capsys.readouterr().err
    assert re.search("^1 of 6 .*max_suffix 11", printed, re.M)
    assert re.search("^1 of 6 .*max_prefix 40", printed, re.M)
    assert [example["id"] for example in examples] == ["1", "2", "2", "2"]
    first, second, third, fourth = examples
    np.testing.assert_array_equal(first["image_features"], stored[0])
    assert first["input_ids"][:5] == [257152] * 4 + [2] and first["labels"][-2:] == [235305, 1]
    text = "".join(gemma().decode([id]) for id in second["labels"] if id > 1)
    assert text == "It is long.\nAnswer: B" and "image_features" not in second
    assert 257152 not in second["input_ids"] and "labels" not in third
    assert len(fourth["input_ids"]) > 60 and "labels" not in fourth  # a test question is kept
    exact = sum(second["token_type_ids"])
    seed = {"layout": "seed", "eos_in_loss": False}
    [example] = data.pali_examples(rows[1:2], gemma(), max_suffix=exact, **seed)
    assert example["labels"][-1] == -100 and example["input_ids"][-1] == 1
    assert example["input_ids"].index(2) > 1
    assert not data.pali_examples(rows[1:2], gemma(), max_suffix=exact - 1, **seed)
    assert "max_suffix" in capsys.readouterr().err


@needs_tokenizer
def test_shuffled_rows():
    rows = [data.TrainRow(asked(), "answer")] * 40
    rows += [
        data.TrainRow(asked(), "reason", trace("Option (B) it is.")),
        data.TrainRow(asked(), "answer", None, False),
    ]
    config = {"max_suffix": 16, "shuffle_choices": True, "seed": 3}

    def texts(**changes):
        examples = data.pali_examples(rows, gemma(), **config | changes)
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
    asked_only = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    assert "labels" not in data.pali_collate(asked_only)
