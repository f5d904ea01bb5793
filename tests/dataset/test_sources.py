"""support/dataset/sources.py, its readers: real ScienceQA and MathVista, your own JSONL, bad input.

A bad record is an error that names the file, the problem and the key, or an entry of `skipped`.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from samples import (
    OWN,
    REAL,
    SCIENCEQA,
    annotation,
    by_pid,
    mathvista,
    needs_data,
    needs_mathvista,
    real,
    record,
    scienceqa,
    write_image,
)

import data
from support.dataset.images import open_image
from support.dataset.sources import SPLITS
from support.dataset.tokenizers import encode, load_tokenizer
from support.files import write_skipped


def refused(where, split, *words, error=ValueError):
    """Loading raises `error`, and its message has these names and numbers."""
    with pytest.raises(error) as caught:
        data.load(where, split)
    assert type(caught.value) is error
    for word in words:
        assert str(word) in str(caught.value)


# --- ScienceQA ------------------------------------------------------------------------------------


@needs_data
def test_real_scienceqa():
    sizes = {"train": 973, "val": 296, "test": 700, "trainval": 1269}
    sizes |= {"minitrain": 104, "minival": 29, "minitest": 59}
    assert {split: len(data.load(SCIENCEQA, split)) for split in SPLITS[:7]} == sizes
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
    captioned = [p for p in problems if p.meta["caption"] == captions.get(p.id, "") != ""]
    assert len(captioned) > 900


@pytest.mark.slow
@needs_data
def test_real_images_open():
    paths = [p.image for split in ("train", "val", "test") for p in real(split) if p.image]
    assert len(paths) == 1060
    for path in paths:
        image = open_image(path)
        assert image.mode == "RGB" and min(image.size) >= 30


def test_choice_image_is_the_fallback(tmp_path):
    records = {"1": record(image="image.png"), "2": record(), "3": record()}
    folder = scienceqa(tmp_path, records)
    write_image(folder / "images/test/2/choice_0.png")
    first, second, third = data.load(folder, "test")
    assert first.image == str(folder / "images/test/1/image.png")  # missing: reported when opened
    assert second.image == str(folder / "images/test/2/choice_0.png")
    assert third.image is None
    assert [p.meta["has_image"] for p in (first, second, third)] == [True, False, False]


def test_partial_split_is_counted_and_an_empty_one_refused(tmp_path, capsys):
    folder = scienceqa(tmp_path, splits={"test": ["1", "8", "9"], "val": ["8"]})
    assert len(data.load(folder, "test")) == 1
    assert "2 of the 3 problems of test" in capsys.readouterr().err
    refused(folder, "val", folder, '"val"')
    refused(folder, "train", "pid_splits.json", '"train"')
    refused(folder, "testmini", "pid_splits.json", '"testmini"')
    refused(folder, "dev", "'dev'")


BAD = [("answer", value) for value in (3, -1, True, ...)] + [("question", None), ("hint", 4)]
BAD += [(key, ...) for key in ("question", "lecture", "image")]
BAD += [("choices", "the rope"), ("choices", ["a", 2])]


@pytest.mark.parametrize("key, value", [*BAD, ("split", "../..")])
def test_bad_record(tmp_path, key, value):
    folder = scienceqa(tmp_path / "set", {"1": record(), "5": record(**{key: value})})
    name = f'"{key}"' if key != "split" else "../../5"  # which leads out of the folder
    refused(folder, "test", folder / "problems.json", "problem 5", name)


@pytest.mark.parametrize("pids", (["1", "1"], [["1"]], [1], [None], {"1": 1}, "1"))
def test_bad_splits(tmp_path, pids):
    refused(scienceqa(tmp_path, splits={"test": pids}), "test", "pid_splits.json")


def test_bad_records_of_a_folder_are_skipped(tmp_path):
    records = {"1": record(), "2": record(answer=9), "3": []}
    folder, skipped = scienceqa(tmp_path, records), []
    assert [p.id for p in data.load(folder, "test", skipped)] == ["1"]
    assert [id for id, _ in skipped] == ["2", "3"] and "problem 2" in skipped[0][1]
    scienceqa(tmp_path, {"2": record(answer=9)})
    with pytest.raises(ValueError, match='problem 2: "answer"'):  # nothing is left
        data.load(folder, "test", [])


# --- Your own JSONL -------------------------------------------------------------------------------


def test_own_jsonl(tmp_path):
    write_image(tmp_path / "elsewhere/a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/images").symlink_to(tmp_path / "elsewhere")  # your links are your business
    lines = [
        {"id": 1, "question": "q", "choices": ["x", "y"], "answer": 1, "image": "images/a.png"},
        {"id": "b", "question": "q", "choices": ["x", "y"], "answer": "x", "split": "test"},
        {"id": "c", "question": "q", "answer": "free", "split": "val", "subject": "maths"},
    ]
    file = tmp_path / "set/own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    [a] = data.load(file, "train")
    assert (a.id, a.answer, a.choices, a.meta["answer_index"]) == ("1", "y", ("x", "y"), 1)
    assert a.meta["has_image"] and open_image(a.image).size == (40, 30)
    [b] = data.load(str(file), "test")
    assert (b.answer, b.meta["answer_index"], b.image, b.hint) == ("x", 0, None, "")
    assert [p.id for p in data.load(file, "trainval")] == ["1", "c"]
    [c] = data.load(file, "val")
    assert (c.answer, c.choices, c.meta["subject"]) == ("free", (), "maths")
    for split in ("minitest", "testmini"):
        refused(file, split, file, split)


LINE = '{"id": 7, "question": "q", "answer": "x"'
BAD_LINES = [
    (LINE[:20], "line 2"),
    ('["id"]', '"id"'),
    ('{"id": 7, "question": "q"}', '(id 7) has no "answer"'),
    ('{"id": 7, "answer": "x"}', '(id 7) has no "question"'),
    (LINE + ', "choices": ["y"]}', "(id 7): \"answer\" is 'x'"),
    ('{"id": 7, "question": "q", "choices": ["x"], "answer": 1}', '(id 7): "answer" is 1'),
    (LINE + ', "image": "../a.png"}', "../a.png"),
    (LINE + ', "image": "/etc/a.png"}', "/etc/a.png"),
    (OWN, "'0'"),
]


@pytest.mark.parametrize("line, names", BAD_LINES)
def test_bad_jsonl(tmp_path, line, names):
    file = tmp_path / "own.jsonl"
    file.write_text(OWN + line)
    refused(file, "train", file, "line 2", names)


EVIL = [
    ("split", ["test"]),
    *(("split", name) for name in ("", "tets", "trainval", None)),
    ("caption", 5),
    ("answer", float("nan")),
    ("answer", 1e999),
    ("question", "a" * 100_001),
    ("image", "/etc/passwd"),
    ("id", {"a": 1}),
]


@pytest.mark.parametrize("key, value", EVIL)
def test_evil_records_stop_or_are_skipped(tmp_path, key, value):
    file = tmp_path / "own.jsonl"
    bad = {"id": "bad"} | record(split="train", choices=[], answer="x") | {key: value}
    file.write_text(OWN + json.dumps(bad) + '\n{"id": "cut\n' + OWN.replace("0", "1"))
    names = {"question": "100001", "image": "/etc/passwd"}
    refused(file, "train", file, "line 2", names.get(key, f'"{key}"'))
    skipped = []
    assert [p.id for p in data.load(file, "train", skipped)] == ["0", "1"]
    assert [id for id, _ in skipped] == ["bad" if key != "id" else str(value), "line 3"]
    assert names.get(key, f'"{key}"') in skipped[0][1]
    write_skipped(skipped, tmp_path / "skipped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in rows] == skipped


def test_half_an_emoji_passes_through_tokenizers_and_files(tmp_path, spiece):
    file = tmp_path / "own.jsonl"
    question = r'"question": "a \ud83d \ud83d\ude00 \\ud83d"'
    file.write_text(r'{"id": "\ud83d", "answer": "\uDE00", ' + question + "}")
    [problem] = data.load(file, "train")
    assert (problem.id, problem.answer) == ("\ufffd", "\ufffd")
    assert problem.question == "a \ufffd \U0001f600 \\ud83d"  # a whole one, and a backslash, stay
    encode(load_tokenizer(spiece), [problem.question], 50)
    (tmp_path / problem.id).write_text(problem.question, encoding="utf-8")


# --- MathVista ------------------------------------------------------------------------------------


def test_mathvista(tmp_path):
    equal = {"choices": ["20 m", "15 m", "15 m"], "answer": "15 m", "unit": None, "precision": None}
    years = {"answer": "[2014, 2016]", "answer_type": "list"}
    pids = {2: {}, 3: equal, 301: years, 351: {}, 352: {"query": "Question: no hint"}}
    records = [annotation(pid, **changes) for pid, changes in pids.items()]
    folder = mathvista(tmp_path, *records)
    write_image(folder / "images/2.jpg")
    write_image(folder / "images/3.png")
    first, second = data.load(folder, "train")
    assert (first.id, first.question) == ("2", "How long\nis it?")
    assert (first.choices, first.answer, first.hint) == ((), "2.5", "Give one decimal.")
    assert "\r" not in first.meta["query"] and first.meta["answer_index"] is None
    meta = {"unit": "cm", "precision": 1.0, "source": "TextVQA", "skills": ["arithmetic"]}
    assert meta.items() <= first.meta.items() and first.meta["has_image"]
    assert (second.answer, second.meta["answer_index"]) == ("15 m", 1)
    assert second.image == str(folder / "images/3.png")
    [year] = data.load(folder, "val")
    assert year.answer == "[2014, 2016]"
    with pytest.raises(FileNotFoundError, match="301.jpg"):
        open_image(year.image)  # kept, and not a problem without an image
    [test] = data.load(folder, "test")  # position 350 is in no part
    assert (test.id, test.hint) == ("352", "")
    ids = {split: [p.id for p in data.load(folder, split)] for split in ("trainval", "testmini")}
    assert ids == {"trainval": ["2", "3", "301"], "testmini": ["2", "3", "301", "351", "352"]}
    refused(folder, "minitest", "minitest")
    refused(mathvista(tmp_path / "one", annotation(1)), "test", tmp_path / "one", "test")


BAD_MATHVISTA = [
    (annotation(1, query=...), '"query"'),
    (annotation(1, metadata=...), '"metadata"'),
    (annotation(1, image=None), '"image"'),
    (annotation(1, image="../1.jpg"), "../1.jpg"),
    (annotation(1, choices=["a"], answer="b"), '"answer"'),
    (annotation(1, answer=None), '"answer"'),
    (annotation("x"), "problem x"),
    (annotation("9" * 5000), "problem 999"),
    (annotation(1, precision=1e9), '"precision"'),
    (annotation(1, precision="2"), '"precision"'),
]


@pytest.mark.parametrize("entry, name", BAD_MATHVISTA)
def test_bad_mathvista(tmp_path, entry, name):
    file = tmp_path / "annot_testmini.json"
    problem = f"problem {entry['pid']:.60}"
    refused(mathvista(tmp_path, entry), "train", file, problem, name)


@needs_mathvista
def test_real_mathvista():
    sizes = {"train": 300, "val": 50, "trainval": 350, "test": 649, "testmini": 1000}
    parts = {split: data.load(REAL / "mathvista", split) for split in sizes}
    assert {split: len(problems) for split, problems in parts.items()} == sizes
    assert [p.id for p in parts["train"] + parts["val"]] == [str(i) for i in range(1, 351)]
    assert [p.id for p in parts["test"]] == [str(i) for i in range(352, 1001)]
    problems = by_pid().values()
    assert sum(bool(p.choices) for p in problems) == 540
    assert all(p.choices[p.meta["answer_index"]] == p.answer for p in problems if p.choices)
    twice = {p.id: p.meta["answer_index"] for p in problems if len(set(p.choices)) < len(p.choices)}
    assert twice == {"587": 1, "740": 0, "781": 2}
    assert not any("\r" in p.question + p.meta["query"] for p in problems)
    hints = Counter(p.hint[:48] for p in problems)
    assert hints["Please answer the question and provide the corre"] == 540 and len(hints) == 4
    with_file = [p for p in problems if Path(p.image).is_file()]
    assert len(with_file) == 248 and all(p.image for p in problems)
    for problem in with_file[::10]:
        size = open_image(problem.image).size
        assert size == (problem.meta["img_width"], problem.meta["img_height"])
    with pytest.raises(FileNotFoundError, match="images/27.jpg"):
        open_image(by_pid()["27"].image)


# --- Any file of JSON -----------------------------------------------------------------------------


TEXTS = {  # in place of a file of JSON
    "cut": b'{"1": {"quest',
    "nested too deep": b"[" * 100_000 + b"]" * 100_000,
    "nested almost too deep": b'{"1": %s%s}' % (b"[" * 900, b"]" * 900),
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
    refused(folder, "test", folder / name)


def test_a_byte_order_mark_is_fine(tmp_path):
    folder = scienceqa(tmp_path)
    path = folder / "problems.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    (tmp_path / "own.jsonl").write_text(OWN, encoding="utf-8-sig")
    assert data.load(folder, "test") and data.load(tmp_path / "own.jsonl", "train")


def test_captions_of_other_files(tmp_path):
    records = {"1": record(), "2": record(image="image.png")}
    folder = scienceqa(tmp_path, records, {"test": ["1", "2"]}, captions={"2": "a rope"})
    write_image(folder / "images/test/2/image.png")
    file = folder / "instruct_captions.json"
    for captions in ("scienceqa", "demo", "none"):
        texts = [p.meta["caption"] for p in data.load(folder, "test", captions=captions)]
        assert texts == ["", "a rope"]
    with pytest.raises(FileNotFoundError, match=file.name):
        data.load(folder, "test", captions="instruct")
    file.write_text('{"captions": {"2": "a belt", "3": "a cup"}}')
    for captions in ("instruct", file):
        texts = [p.meta["caption"] for p in data.load(folder, "test", captions=captions)]
        assert texts == ["", "a belt"]


@pytest.mark.parametrize(
    "text", ["[]", '{"2": "a belt"}', '{"captions": {"2": ["a belt"]}}', '{"captions": {"3": "a"}}']
)
def test_files_without_captions_of_these_problems(text, tmp_path):
    folder = scienceqa(tmp_path, {"2": record(image="image.png")}, {"test": ["2"]})
    write_image(folder / "images/test/2/image.png")
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="other.json"):
        data.load(folder, "test", captions=tmp_path / "other.json")
