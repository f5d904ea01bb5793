"""data.py: the real ScienceQA and MathVista files, your own JSONL, bad input, batches."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from samples import (
    OWN,
    REAL,
    SCIENCEQA,
    annotation,
    by_pid,
    mathvista,
    needs_data,
    needs_mathvista,
    picture,
    pictured,
    real,
    record,
    scienceqa,
)

import data
from support.dataset import images as pictures
from support.dataset.features import Features, cached_features
from support.dataset.tokenizers import encode, load_tokenizer
from support.files import write_skipped


@needs_data
def test_real_scienceqa():
    sizes = {"train": 973, "val": 296, "test": 700, "trainval": 1269}
    sizes |= {"minitrain": 104, "minival": 29, "minitest": 59}
    assert {split: len(data.load(SCIENCEQA, split)) for split in data.SPLITS[:7]} == sizes
    problems = [problem for split in ("train", "val", "test") for problem in real(split)]
    assert sum(p.meta["has_image"] for p in problems) == 1042
    assert sum(p.image is not None and not p.meta["has_image"] for p in problems) == 18
    assert all(p.choices[p.meta["answer_index"]] == p.answer for p in problems)
    raw = json.loads((SCIENCEQA / "problems.json").read_text())[problems[0].id]
    for key in ("question", "hint", "lecture", "solution"):
        assert getattr(problems[0], key) == raw[key]
    for key in ("subject", "grade", "topic", "category", "skill", "task", "split"):
        assert problems[0].meta[key] == raw[key]
    captions = json.loads((SCIENCEQA / "captions.json").read_text())["captions"]
    assert (
        sum(p.meta["caption"] == captions[p.id] != "" for p in problems if p.id in captions) > 900
    )


@pytest.mark.slow
@needs_data
def test_real_images_open():
    paths = [p.image for split in ("train", "val", "test") for p in real(split) if p.image]
    assert len(paths) == 1060
    for path in paths:
        image = pictures.open_image(path)
        assert image.mode == "RGB" and min(image.size) >= 30


def test_choice_image_is_the_fallback(tmp_path):
    records = {"1": record(image="image.png"), "2": record(), "3": record()}
    folder = scienceqa(tmp_path, records)
    picture(folder / "images/test/2/choice_0.png")
    first, second, third = data.load(folder, "test")
    assert first.image == str(folder / "images/test/1/image.png")  # not there: said when opened
    assert second.image == str(folder / "images/test/2/choice_0.png")
    assert third.image is None
    assert [p.meta["has_image"] for p in (first, second, third)] == [True, False, False]


def test_partial_split_is_counted_and_an_empty_one_refused(tmp_path, capsys):
    folder = scienceqa(tmp_path, splits={"test": ["1", "8", "9"], "val": ["8"]})
    assert len(data.load(folder, "test")) == 1
    assert "lacks 2 of the 3 problems of test" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the 1 problems of the split val"):
        data.load(folder, "val")
    with pytest.raises(ValueError, match='pid_splits.json has no "train"'):
        data.load(folder, "train")
    with pytest.raises(ValueError, match="no split 'dev'"):
        data.load(folder, "dev")


BAD = [
    ({"answer": 3}, r'problem 5: "answer" is 3, but there are 3 choices'),
    ({"answer": -1}, r'problem 5: "answer" is -1'),
    ({"answer": True}, r'problem 5: "answer" is True'),
    ({"choices": "the rope"}, r'problem 5: "choices" is .* not of type list'),
    ({"choices": ["a", 2]}, r'problem 5: "choices" is not a list of texts'),
    ({"question": None}, r'problem 5: "question" is None'),
    ({"question": ...}, r'problem 5 has no "question"'),
    ({"lecture": ...}, r'problem 5 has no "lecture"'),
    ({"image": ...}, r'problem 5 has no "image"'),
    ({"hint": 4}, r'problem 5: "hint" is 4'),
    ({"answer": ...}, r'problem 5 has no "answer"'),
    ({"split": "../.."}, r"problem 5: .* is outside"),
]


@pytest.mark.parametrize("changes, sentence", BAD)
def test_bad_record(tmp_path, changes, sentence):
    folder = scienceqa(tmp_path / "set", {"1": record(), "5": record(**changes)})
    with pytest.raises(ValueError, match=sentence) as caught:
        data.load(folder, "test")
    assert str(folder / "problems.json") in str(caught.value)


def test_truncated_json(tmp_path):
    folder = scienceqa(tmp_path)
    text = (folder / "problems.json").read_text()
    (folder / "problems.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="problems.json is not complete JSON"):
        data.load(folder, "test")


def test_places_that_are_no_data_set(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither a folder with problems.json"):
        data.load(tmp_path, "test")
    (tmp_path / "annot_testmini.json").write_text("[]")
    with pytest.raises(ValueError, match="annot_testmini.json: .* not of type dict"):
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
    assert all(p.image is None or pictures.open_image(p.image) for p in first)
    [folder] = tmp_path.glob("demo-*")
    scripts = [ROOT / "demo" / f"{name}.py" for name in ("scenes", "drawing", "wording")]
    digest = hashlib.sha256(b"".join(script.read_bytes() for script in scripts)).hexdigest()
    assert folder.name == f"demo-{digest[:10]}"


def test_own_jsonl(tmp_path):
    picture(tmp_path / "elsewhere/a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/pictures").symlink_to(tmp_path / "elsewhere")  # your links are your business
    lines = [
        {"id": 1, "question": "q", "choices": ["x", "y"], "answer": 1, "image": "pictures/a.png"},
        {"id": "b", "question": "q", "choices": ["x", "y"], "answer": "x", "split": "test"},
        {"id": "c", "question": "q", "answer": "free", "split": "val", "subject": "maths"},
    ]
    file = tmp_path / "set/own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    [a] = data.load(file, "train")
    assert (a.id, a.answer, a.choices, a.meta["answer_index"]) == ("1", "y", ("x", "y"), 1)
    assert a.meta["has_image"] and pictures.open_image(a.image).size == (40, 30)
    [b] = data.load(str(file), "test")
    assert (b.answer, b.meta["answer_index"], b.image, b.hint) == ("x", 0, None, "")
    assert [p.id for p in data.load(file, "trainval")] == ["1", "c"]
    [c] = data.load(file, "val")
    assert (c.answer, c.choices, c.meta["subject"]) == ("free", (), "maths")
    with pytest.raises(ValueError, match='no record with "split": "minitest"'):
        data.load(file, "minitest")


BAD_LINES = [
    ('{"id": 1, "question": "q", "ans', "line 2 is not complete JSON"),
    ('["id"]', 'line 2 has no "id"'),
    ('{"id": 7, "question": "q"}', r'line 2 \(id 7\) has no "answer"'),
    ('{"id": 7, "answer": "x"}', r'line 2 \(id 7\) has no "question"'),
    ('{"id": 7, "question": "q", "choices": ["x"], "answer": "z"}', r'\(id 7\): "answer" is \'z\''),
    ('{"id": 7, "question": "q", "choices": ["x"], "answer": 1}', r'\(id 7\): "answer" is 1'),
    (
        '{"id": 7, "question": "q", "answer": "x", "image": "../a.png"}',
        "line 2: ../a.png is outside",
    ),
    ('{"id": 7, "question": "q", "answer": "x", "image": "/etc/a.png"}', "/etc/a.png is outside"),
    ('{"id": "0", "question": "q", "answer": "x"}', "the id '0' was used before"),
]


@pytest.mark.parametrize("line, sentence", BAD_LINES)
def test_bad_jsonl(tmp_path, line, sentence):
    file = tmp_path / "own.jsonl"
    file.write_text('{"id": "0", "question": "q", "answer": "x"}\n' + line)
    with pytest.raises(ValueError, match=sentence) as caught:
        data.load(file, "train")
    assert str(file) in str(caught.value)


# --- MathVista ------------------------------------------------------------------------------------


def test_mathvista(tmp_path):
    equal = {"choices": ["20 m", "15 m", "15 m"], "answer": "15 m", "unit": None, "precision": None}
    years = {"answer": "[2014, 2016]", "answer_type": "list"}
    pids = {2: {}, 3: equal, 301: years, 351: {}, 352: {"query": "Question: no hint"}}
    records = [annotation(pid, **changes) for pid, changes in pids.items()]
    folder = mathvista(tmp_path, *records)
    picture(folder / "images/2.jpg")
    picture(folder / "images/3.png")
    first, second = data.load(folder, "train")
    assert (first.id, first.question) == ("2", "How long\nis it?")
    assert (first.choices, first.answer, first.hint) == ((), "2.5", "Give one decimal.")
    assert "\r" not in first.meta["query"] and first.meta["answer_index"] is None
    told = {"unit": "cm", "precision": 1.0, "source": "TextVQA", "skills": ["arithmetic"]}
    assert told.items() <= first.meta.items() and first.meta["has_image"]
    assert (second.answer, second.meta["answer_index"]) == ("15 m", 1)
    assert second.image == str(folder / "images/3.png")
    [year] = data.load(folder, "val")
    assert year.answer == "[2014, 2016]"
    with pytest.raises(FileNotFoundError, match="301.jpg does not exist"):
        pictures.open_image(year.image)  # kept, and not a problem without a picture
    assert [p.id for p in data.load(folder, "test")] == ["352"]  # position 350 is in no part
    assert data.load(folder, "test")[0].hint == ""
    ids = {split: [p.id for p in data.load(folder, split)] for split in ("trainval", "testmini")}
    assert ids == {"trainval": ["2", "3", "301"], "testmini": ["2", "3", "301", "351", "352"]}


BAD_MATHVISTA = [
    (annotation(1, query=...), 'problem 1 has no "query"'),
    (annotation(1, metadata=...), 'problem 1 has no "metadata"'),
    (annotation(1, image=None), 'problem 1: "image" is None'),
    (annotation(1, image="../1.jpg"), r"problem 1: \.\./1.jpg is outside"),
    (annotation(1, choices=["a"], answer="b"), "problem 1: \"answer\" is 'b'"),
    (annotation(1, answer=None), 'problem 1: "answer" is None'),
    (annotation("x"), "problem x: the id is not a number"),
    (annotation("9" * 5000), "the id is not a number"),
    (annotation(1, precision=1e9), '"precision" is no number of decimals'),
    (annotation(1, precision="2"), '"precision" is'),
]


@pytest.mark.parametrize("entry, sentence", BAD_MATHVISTA)
def test_bad_mathvista(tmp_path, entry, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        data.load(mathvista(tmp_path, entry), "train")
    assert str(tmp_path / "annot_testmini.json") in str(caught.value)


def test_splits_a_data_set_does_not_have(tmp_path):
    folder = mathvista(tmp_path / "vista", annotation(1))
    with pytest.raises(ValueError, match="no split minitest, only train, val"):
        data.load(folder, "minitest")
    with pytest.raises(ValueError, match="none of the problems of the split test"):
        data.load(folder, "test")
    with pytest.raises(ValueError, match='pid_splits.json has no "testmini"'):
        data.load(scienceqa(tmp_path / "qa"), "testmini")
    (tmp_path / "own.jsonl").write_text('{"id": 3, "question": "How many?", "answer": 12}')
    with pytest.raises(ValueError, match='no record with "split": "testmini"'):
        data.load(tmp_path / "own.jsonl", "testmini")


@needs_mathvista
def test_real_mathvista():
    sizes = {"train": 300, "val": 50, "trainval": 350, "test": 649, "testmini": 1000}
    found = {split: data.load(REAL / "mathvista", split) for split in sizes}
    assert {split: len(problems) for split, problems in found.items()} == sizes
    assert [p.id for p in found["train"] + found["val"]] == [str(i) for i in range(1, 351)]
    assert [p.id for p in found["test"]] == [str(i) for i in range(352, 1001)]
    problems = by_pid().values()
    assert sum(bool(p.choices) for p in problems) == 540
    assert all(p.choices[p.meta["answer_index"]] == p.answer for p in problems if p.choices)
    twice = {p.id: p.meta["answer_index"] for p in problems if len(set(p.choices)) < len(p.choices)}
    assert twice == {"587": 1, "740": 0, "781": 2}
    assert not any("\r" in p.question + p.meta["query"] for p in problems)
    hints = Counter(p.hint[:48] for p in problems)
    assert hints["Please answer the question and provide the corre"] == 540 and len(hints) == 4
    there = [p for p in problems if Path(p.image).is_file()]
    assert len(there) == 248 and all(p.image for p in problems)
    for problem in there[::10]:
        size = pictures.open_image(problem.image).size
        assert size == (problem.meta["img_width"], problem.meta["img_height"])
    with pytest.raises(FileNotFoundError, match="images/27.jpg does not exist"):
        pictures.open_image(by_pid()["27"].image)


# --- Bad input: what the fuzzing of tests/test_fuzz.py found, one by one --------------------------


def deep(depth):
    return b"[" * depth + b"]" * depth


TEXTS = {  # what a file of JSON may hold instead
    "nested too deep": deep(100_000),
    "nested almost too deep": b'{"1": %s}' % deep(900),
    "UTF-16": json.dumps({"1": "é"}).encode("utf-16"),
    "latin-1": '{"1": "é"}'.encode("latin-1"),
    "a surrogate in bytes": b'{"1": "\xed\xa0\x80"}',
    "a key twice": b'{"1": {"question": "a", "question": "b"}}',
    "digits": b'{"1": %s}' % (b"9" * 5000),
    "NUL": b'{"1": "\0"}',
    "a list": b"[1, 2]",
    "empty": b"",
}


@pytest.mark.parametrize("name", ("problems.json", "pid_splits.json", "captions.json"))
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_bad_json(tmp_path, name, content):
    folder = scienceqa(tmp_path, captions={"1": "a"})
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        data.load(folder, "test")
    assert type(caught.value) is ValueError and str(folder / name) in str(caught.value)


def test_a_byte_order_mark_is_fine(tmp_path):
    folder = scienceqa(tmp_path)
    path = folder / "problems.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    (tmp_path / "own.jsonl").write_text(OWN, encoding="utf-8-sig")
    assert data.load(folder, "test") and data.load(tmp_path / "own.jsonl", "train")


EVIL_RECORDS = [
    ({"split": ["test"]}, '"split" is'),
    ({"caption": 5}, '"caption" is 5'),
    ({"answer": float("nan"), "choices": []}, '"answer" is nan, which is no number'),
    ({"answer": 1e999, "choices": []}, '"answer" is inf'),
    ({"question": "a" * 100_001}, "a text has 100001 characters"),
    ({"image": "/etc/passwd"}, "/etc/passwd is outside"),
    ({"id": {"a": 1}}, '"id" is'),
]


@pytest.mark.parametrize("changes, sentence", EVIL_RECORDS)
def test_evil_records_stop_or_are_skipped(tmp_path, changes, sentence):
    file, bad = tmp_path / "own.jsonl", {"id": "bad"} | record(split="train") | changes
    file.write_text(OWN + json.dumps(bad) + '\n{"id": "cut\n' + OWN.replace("0", "1"))
    with pytest.raises(ValueError, match=rf"line 2.*{sentence}"):
        data.load(file, "train")
    skipped = []
    assert [p.id for p in data.load(file, "train", skipped)] == ["0", "1"]
    name = "bad" if "id" not in changes else str(changes["id"])
    assert [id for id, _ in skipped] == [name, "line 3"] and sentence in skipped[0][1]
    write_skipped(skipped, tmp_path / "skipped.jsonl")
    told = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(x["id"], x["reason"]) for x in told] == skipped


def test_bad_records_of_a_folder_are_skipped(tmp_path):
    records = {"1": record(), "2": record(answer=9), "3": []}
    folder, skipped = scienceqa(tmp_path, records), []
    assert [p.id for p in data.load(folder, "test", skipped)] == ["1"]
    assert [id for id, _ in skipped] == ["2", "3"] and "problem 2" in skipped[0][1]
    scienceqa(tmp_path, {"2": record(answer=9)})
    with pytest.raises(ValueError, match='problem 2: "answer" is 9'):  # nothing is left
        data.load(folder, "test", [])


@pytest.mark.parametrize("pids", (["1", "1"], [["1"]], [1], [None], {"1": 1}, "1"))
def test_bad_splits(tmp_path, pids):
    with pytest.raises(ValueError, match="pid_splits.json"):
        data.load(scienceqa(tmp_path, splits={"test": pids}), "test")


def test_half_an_emoji_goes_through_tokenizers_and_files(tmp_path, spiece):
    file = tmp_path / "own.jsonl"
    question = r'"question": "a \ud83d \ud83d\ude00 \\ud83d"'
    file.write_text(r'{"id": "\ud83d", "answer": "\uDE00", ' + question + "}")
    [problem] = data.load(file, "train")
    assert (problem.id, problem.answer) == ("\ufffd", "\ufffd")
    assert problem.question == "a \ufffd \U0001f600 \\ud83d"  # a whole one, and a backslash, stay
    encode(load_tokenizer(spiece), [problem.question], 50)
    (tmp_path / problem.id).write_text(problem.question, encoding="utf-8")


# --- Batches --------------------------------------------------------------------------------------


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
    assert set(data.collate([{"id": "a", "input_ids": [5, 1]}])) == {
        "ids",
        "input_ids",
        "attention_mask",
    }


def test_examples(spiece, tmp_path):
    records = {"1": record(image="image.png"), "2": record(lecture="Long. " * 99)}
    folder = scienceqa(tmp_path, records, captions={"1": "a rope and a belt"})
    problems, tokenizer = data.load(folder, "test"), load_tokenizer(spiece)
    stored = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float16)
    features = Features(stored, {"1": 0})
    limits = {"max_input": 60, "max_output": 60}
    whole = tokenizer.encode(data.prompt(problems[0], "QCM-LE", caption=True)[0]).ids
    first, second = data.examples(problems, "QCM-LE", tokenizer, features, captions=True, **limits)
    assert first["id"] == "1" and first["input_ids"] == whole[:44] + whole[-16:]
    assert len(second["labels"]) == 60 and second["labels"][-1] == 1
    batch = data.collate([first, second])
    np.testing.assert_array_equal(batch["image_features"][0], stored[0].astype(np.float32))
    assert batch["image_features"].dtype == torch.float32 and not batch["image_features"][1].any()
    told = {"1": "Solution: the belt.", "2": "Solution: the rope."}
    limits = {"max_input": 512, "max_output": 8}
    first, second = data.examples(
        problems, "QCMG-A", tokenizer, None, told, faithful=True, **limits
    )
    for problem, example in zip(problems, (first, second), strict=True):
        source, target = data.prompt(problem, "QCMG-A", told[problem.id], faithful=True)
        assert example["input_ids"] == tokenizer.encode(source).ids
        assert example["labels"] == tokenizer.encode(target).ids[:7] + [1]
        assert "image_features" not in example


def test_batches():
    lengths = torch.randint(5, 300, (1003,), generator=torch.Generator().manual_seed(1)).tolist()

    def made(seed):
        return data.batches(lengths, 8, torch.Generator().manual_seed(seed))

    assert made(3) == made(3) != made(4)
    assert sorted(row for batch in made(3) for row in batch) == list(range(1003))
    assert max(map(len, made(3))) == 8 and sum(len(batch) < 8 for batch in made(3)) == 1

    def padded(split):
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in split)

    assert padded(made(3)) < 1.1 * sum(lengths)  # random batches of 8: about 1.75
    one_chunk = data.batches(lengths[:400], 8, torch.Generator().manual_seed(3))
    shortest = [min(lengths[row] for row in batch) for batch in one_chunk]
    assert shortest != sorted(shortest)  # the model does not see all short ones first
    plain = [row for batch in data.batches(lengths, 8) for row in batch]
    assert plain == sorted(range(1003), key=lambda row: lengths[row])
    assert data.batches([], 8) == data.batches([], 8, torch.Generator()) == []


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_features_that_are_not_finite_are_named(tmp_path, bad):
    rows = [{"id": id, "input_ids": [1], "token_type_ids": [0]} for id in "abc"]
    for row, value in zip(rows, (1.0, bad, 2.0), strict=True):
        row["image_features"] = np.full((2, 3), value, np.float16)
    for collate in (data.collate, data.pali_collate):
        with pytest.raises(ValueError, match="not finite: b.$"):
            collate(rows)
    problems = pictured(tmp_path / "set", 1)
    with pytest.raises(ValueError, match="Problem 0: .*not finite"):  # 70000 is more than fp16 has
        huge = [torch.full((2, 3), 70_000.0)]
        cached_features(problems[:1], lambda pixels: huge, "w", 32, tmp_path / "cache")
