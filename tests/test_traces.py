"""data.py for PaliGemma: MathVista, a teacher's traces, the sequence, batches, overlap.

Real files (NANOCOT_DATA): MathVista's testmini, pali_reason's traces, the PaliGemma tokenizer.
"""

import csv
import json
import os
import random
import re
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import gemma
from PIL import Image
from test_data import Extract, picture, pictured, record, scienceqa, zipped

import data
from support import pictures
from support.choices import _ANSWER, LETTERS, final_answer, movable, shuffled
from support.features import Features, cached_features
from support.tokenizing import load_tokenizer, plain_ids, special_ids
from support.traces import load_traces, overlap, training_notice

REAL = Path(os.environ["NANOCOT_DATA"])


def needs(part):
    return pytest.mark.skipif(
        not (REAL / part).exists(), reason=f"no {part} in {REAL}; set NANOCOT_DATA"
    )


needs_mathvista, needs_traces = needs("mathvista"), needs("pali_reason")
needs_tokenizer = needs("tokenizers/paligemma")


@cache
def by_pid():
    return {problem.id: problem for problem in data.load(REAL / "mathvista", "testmini")}


def asked(**changes):
    base = {
        "id": "1",
        "question": "Which is it?",
        "choices": ("rope", "belt", "neither"),
        "answer": "belt",
        "hint": "",
        "image": None,
        "lecture": "",
        "solution": "",
        "meta": {"answer_index": 1},
    }
    return data.Problem(**base | changes)


def trace(thought="It is long.", answer="(C)", correct=True):
    return {"id": "1", "thought": thought, "answer": answer, "verdict": {"correct": correct}}


# --- MathVista ------------------------------------------------------------------------------------


def annotation(pid, **changes):
    base = {
        "question": "How long\r\nis it?",
        "image": f"images/{pid}.jpg",
        "choices": None,
        "unit": "cm",
        "precision": 1.0,
        "answer": "2.5",
        "question_type": "free_form",
        "answer_type": "float",
        "pid": str(pid),
        "metadata": {"split": "testmini", "source": "TextVQA", "skills": ["arithmetic"]},
        "query": "Hint: Give one decimal.\nQuestion: How long\r\nis it? (Unit: cm)",
    }
    return {key: value for key, value in (base | changes).items() if value is not Ellipsis}


def mathvista(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry["pid"]: entry for entry in records}
    (folder / "annot_testmini.json").write_text(json.dumps(entries))
    return folder


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


BAD = [
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


@pytest.mark.parametrize("entry, sentence", BAD)
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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that has MathVista's two files; `hub.asked` are the names it was asked for."""
    png = picture(tmp_path / "a.png").read_bytes()

    def fetch(repo, name, *, repo_type, revision, local_dir):
        assert (repo, repo_type, len(revision)) == ("AI4Math/MathVista", "dataset", 40)
        fetch.asked.append(name)
        if name not in fetch.files:
            raise OSError("no route to host")
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / name).write_bytes(fetch.files[name])
        return str(Path(local_dir) / name)

    problems = {str(pid): annotation(pid) for pid in (1, 301, 352)}
    archive = zipped([(f"images/{pid}.jpg", png) for pid in problems])
    fetch.asked = []
    fetch.files = {"images.zip": archive, "annot_testmini.json": json.dumps(problems).encode()}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path / "cache"))
    return fetch


def test_mathvista_download(hub, tmp_path, capsys):
    annotations = hub.files.pop("annot_testmini.json")
    with pytest.raises(SystemExit, match="MathVista could not be fetched .no route to host"):
        data.main(["mathvista"])
    with pytest.raises(FileNotFoundError, match="python data.py mathvista"):
        data.load("mathvista", "test")  # half a download is no data set
    hub.files["annot_testmini.json"] = annotations
    data.main(["mathvista"])
    assert "train: 1 problems" in capsys.readouterr().out
    assert hub.asked == ["images.zip", "annot_testmini.json", "annot_testmini.json"]
    [problem] = data.load("mathvista", "train")
    assert pictures.open_image(problem.image).size == (40, 30)
    left = sorted(path.name for path in (tmp_path / "cache/mathvista").iterdir())
    assert left == ["annot_testmini.json", "images"]
    hub.files["images.zip"] = b"not a zip"
    with pytest.raises(SystemExit, match="images.zip is not a whole zip file"):
        data.main(["mathvista", "--to", str(tmp_path / "other")])


def test_training_notice(tmp_path):
    folder = mathvista(tmp_path / "vista", annotation(1))
    for where in ("mathvista", folder, str(folder)):
        notice = training_notice(where)
        assert "not for training" in notice and "contaminated" in notice
    for where in ("demo", "scienceqa", scienceqa(tmp_path / "qa"), tmp_path / "own.jsonl"):
        assert training_notice(where) == ""


# --- Traces ---------------------------------------------------------------------------------------

VERDICT = {"correct": True, "consistent": False, "by": "rule", "why": "letter"}
LINE = {"id": 7, "question": "q\r\nr", "thought": "t", "answer": "a", "gold": "g"}
LINE |= {"verdict": VERDICT, "teacher": "gemini:x", "usage": {"output": 9}, "key": "ab"}


def lines(path, *records, end="\n"):
    path.write_text("\n".join(map(json.dumps, records)) + end)
    return path


def test_traces_jsonl(tmp_path, capsys):
    unjudged = LINE | {"verdict": None, "gold": None}
    failed = LINE | {"thought": None}
    bare = {key: LINE[key] for key in ("id", "question", "thought", "answer")}
    judged, again, third = load_traces(
        lines(tmp_path / "traces.jsonl", LINE, unjudged, failed, bare)
    )
    assert judged == {
        "id": "7",
        "question": "q\nr",
        "thought": "t",
        "answer": "a",
        "gold": "g",
        "verdict": VERDICT,
        "teacher": "gemini:x",
    }
    unknown = dict.fromkeys(VERDICT)
    assert again == judged | {"gold": None, "verdict": unknown}
    assert third == again | {"teacher": None}
    assert "left out 1 of 4 traces without a thought" in capsys.readouterr().err


def test_traces_of_an_interrupted_teacher(tmp_path, capsys):
    torn = json.dumps(LINE)[:30]
    path = lines(tmp_path / "traces.jsonl", LINE, end="\n" + torn)
    assert len(load_traces(path)) == 1
    assert "traces.jsonl, line 2 was skipped" in capsys.readouterr().err
    path = lines(tmp_path / "traces.jsonl", LINE, LINE, end="")  # whole without a last newline
    assert len(load_traces(path)) == 2 and not capsys.readouterr().err
    for text in (torn + "\n", torn + "\n" + json.dumps(LINE)):
        path.write_text(json.dumps(LINE) + "\n" + text)
        with pytest.raises(ValueError, match="traces.jsonl, line 2 is not complete JSON"):
            load_traces(path)


BAD_TRACES = [
    (LINE | {"verdict": {"correct": "no"}}, "line 1: \"correct\" is 'no', not true, false"),
    (LINE | {"verdict": "yes"}, 'line 1: "verdict" is'),
    (LINE | {"thought": 5}, 'line 1: "thought" is 5'),
    ({key: LINE[key] for key in ("id", "question", "thought")}, 'line 1 has no "answer"'),
    ({**LINE, "id": None}, 'line 1: "id" is None'),
    (LINE | {"thought": " "}, "no trace with a thought"),
    ([], 'line 1 has no "id"'),
]


@pytest.mark.parametrize("entry, sentence", BAD_TRACES)
def test_bad_traces(tmp_path, entry, sentence):
    path = lines(tmp_path / "traces.jsonl", entry)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_traces(path)
    assert str(path) in str(caught.value)


COLUMNS = ("questions", "thoughts", "generated_answers", "true_answers", "indexes", "validity")
ROW = ("q\r\n1", "think\nhard", "(B)", "blue", "41", "yes")


def table(path, *rows, columns=COLUMNS):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_traces_pali_reason(tmp_path, capsys):
    rows = [ROW, (*ROW[:4], "7", "no"), ("q", "", "", "x", "8", "no")]
    first, second = load_traces(table(tmp_path / "a.csv", *rows))
    assert (first["id"], first["question"], first["thought"]) == ("42", "q\n1", "think\nhard")
    assert (first["answer"], first["gold"], first["teacher"][:6]) == ("(B)", "blue", "gemini")
    assert first["verdict"]["correct"] is True and first["verdict"]["by"].startswith("claude")
    assert (second["id"], second["verdict"]["correct"]) == ("8", False)
    assert "left out 1 of 3 traces" in capsys.readouterr().err
    unjudged = table(tmp_path / "b.csv", ROW[:5], columns=COLUMNS[:5])
    [third] = load_traces(unjudged)
    assert third == first | {"verdict": dict.fromkeys(VERDICT)}
    columns = {"prefixes": ["q\r\n1"] * 2, "suffixes": ["Thoughts:\nthink\nhard\nAnswer:\n(B)"] * 2}
    columns["images"] = ["mathvista_images/41.png", "mathvista/images/42.jpg"]  # theirs, and by pid
    (tmp_path / "c.json").write_text(json.dumps(columns))
    assert load_traces(tmp_path / "c.json") == [first | {"gold": None}] * 2


EVIL_TRACES = [
    {"gold": ["B"]},
    {"teacher": 5},
    {"gold": float("nan")},
    {"verdict": [1]},
    {"id": None},
    {"id": True},
]


@pytest.mark.parametrize("changes", EVIL_TRACES)
def test_evil_traces(tmp_path, changes):
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps({"question": "q"} | trace() | changes))
    with pytest.raises(ValueError, match="traces.jsonl, line 1: "):
        load_traces(file)


@pytest.mark.parametrize("index", ("9" * 5000, "²", "-1", ""))
def test_evil_positions(tmp_path, index):
    names = ("questions", "thoughts", "generated_answers", "true_answers", "indexes")
    for encoding in ("utf-8", "utf-8-sig"):  # as Excel saves it
        with open(tmp_path / "t.csv", "w", newline="", encoding=encoding) as file:
            csv.writer(file).writerows([names, ("q", "t", "a", "B", "7")])
        assert load_traces(tmp_path / "t.csv")[0]["id"] == "8"
    text = (tmp_path / "t.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "t.csv").write_text(text.replace("7", index))
    with pytest.raises(ValueError, match='row 1: "indexes" is'):
        load_traces(tmp_path / "t.csv")


def test_an_image_name_without_end(tmp_path):
    columns = {"prefixes": ["q"], "suffixes": ["Thoughts:\nt\nAnswer:\nB"]}
    start = time.process_time()
    for name in ("9" * 10**6, "²²", "9." + "a" * 10**6):
        (tmp_path / "t.json").write_text(json.dumps(columns | {"images": [name]}))
        with pytest.raises(ValueError, match="t.json, entry 1: .* an image that is not a number"):
            load_traces(tmp_path / "t.json")
    assert time.process_time() - start < 2


def test_bad_pali_reason(tmp_path):
    with pytest.raises(ValueError, match='a.csv, row 1 has no "indexes"'):
        load_traces(table(tmp_path / "a.csv", ROW[:4], columns=COLUMNS[:4]))
    with pytest.raises(ValueError, match="row 2: \"indexes\" is 'x'"):
        load_traces(table(tmp_path / "a.csv", ROW, (*ROW[:4], "x", "yes")))
    with pytest.raises(ValueError, match='row 1: "generated_answers" is None'):
        load_traces(table(tmp_path / "a.csv", ROW[:2]))
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.csv is not a CSV file"):
        load_traces(tmp_path / "a.csv")
    columns = {"prefixes": ["q"], "suffixes": ["no thoughts"], "images": ["images/4.jpg"]}
    for changed, sentence in (
        ({}, "entry 1: no thoughts"),
        ({"suffixes": ["Thoughts:\na\nAnswer:\nb"], "images": ["a.jpg"]}, "entry 1: .* an image"),
        ({"images": []}, "not equally many"),
        ({"images": ...}, 'has no "images"'),
    ):
        changed = {k: v for k, v in (columns | changed).items() if v is not Ellipsis}
        (tmp_path / "c.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=sentence):
            load_traces(tmp_path / "c.json")
    with pytest.raises(ValueError, match="traces.txt is not a file of traces"):
        load_traces(tmp_path / "traces.txt")
    for name in ("none.csv", "none.json", "none.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            load_traces(tmp_path / name)


@needs_traces
@needs_mathvista
def test_real_traces(capsys):
    names = ("training.csv", "training_correct.csv", "training_dict.json")
    names += ("truncated_training_dict.json", "truncated_training_dict_v2.json")
    every, kept, listed, short, longer = (load_traces(REAL / "pali_reason" / n) for n in names)
    assert list(map(len, (every, kept, listed, short, longer))) == [335, 251, 251, 32, 100]
    assert "left out 10 of 345 traces" in capsys.readouterr().err
    for one in every:
        problem = by_pid()[one["id"]]
        assert (one["question"], one["gold"]) == (problem.meta["query"], problem.answer)
    assert listed == [one | {"gold": None} for one in kept]
    assert short == listed[:32] and longer == listed[:100]
    by_id = {one["id"]: one for one in every}
    unknown = {"verdict": dict.fromkeys(VERDICT)}
    assert all(by_id[one["id"]] == one | unknown for one in kept)
    # Eight answers the judge let through are not the gold ones; the grader is eval.py's business.
    wrong = [
        one["id"]
        for one in kept
        if final_answer(by_pid()[one["id"]], one["answer"]) != data.pali_suffix(by_pid()[one["id"]])
    ]
    assert wrong == ["20", "35", "107", "126", "140", "226", "255", "337"]


# --- Prefix and suffix ----------------------------------------------------------------------------


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


PROSE = [  # what a teacher said, and the answer in it: of rope, belt, neither
    ("(B) 3.9", "B"),
    ("B", "B"),
    ("**C**", "C"),
    ("First (A), but no.\nFinal Answer: The final answer is $\\boxed{C}$", "C"),
    ("so $\\boxed{\\text{B}}$.", "B"),
    ("Final Answer: The final answer is **C**", "C"),
    ("The correct answer is **(B)**.\nI hope this helps.", "B"),
    ("Answer:\nB. belt", "B"),
    ("It is not the rope.\n\nBelt", "B"),
    ("The answer is neither.", "C"),
    ("A belt is longer", "A belt is longer"),  # an article is no letter
    ("F", "F"),  # not one of the three
    ("", ""),
]
NUMBERS = [
    ("There are 1,204 objects left.", "integer", "1204"),
    ("The rate is -3", "integer", "-3"),
    ("Rounded: $\\boxed{0.0}$", "float", "0.0"),
    ("I cannot tell.", "integer", "I cannot tell"),
    ("[6, 6, 7]\n", "list", "[6, 6, 7]"),
    ("half of $\\boxed{\\frac{1}{2}}$ ", "text", "\\frac{1}{2}"),
]


@pytest.mark.parametrize("text, answer", PROSE)
def test_final_answer_of_choices(text, answer):
    assert final_answer(asked(), text) == answer


@pytest.mark.parametrize("text, kind, answer", NUMBERS)
def test_final_answer_without_choices(text, kind, answer):
    assert final_answer(asked(choices=(), meta={"answer_type": kind}), text) == answer


@pytest.mark.parametrize(
    "text", [part * 10**5 for part in ("a" * 9, "answer ", "\\text{", "\\boxed{", "answer: ")]
)
def test_final_answer_of_a_line_without_end(text):
    start = time.process_time()
    final_answer(asked(choices=(), meta={}), text)
    assert time.process_time() - start < 2


def test_final_answer_reads_as_the_plain_pattern_does():
    """The pattern that is fast on long lines finds what the one without its ^ finds."""
    plain, rng = re.compile(_ANSWER.pattern.removeprefix("^"), re.IGNORECASE), random.Random(0)
    parts = "answer is|Answer:|answer|:| is |\n|\n\n|*| |(A)|x|\r|an".split("|")
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        assert _ANSWER.findall(text) == plain.findall(text), text


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


# --- The sequence ---------------------------------------------------------------------------------

COW = [6006, 603, 573, 13910, 9980, 235336]  # transformers' own example
BEACH = [477, 573, 8318]
HOSTILE = [
    "<eos>",
    "<bos><pad><unk>",
    "<image><image>",
    "a<loc0001>b <seg001><loc1023>",
    "<<eos>> <ima<image>ge> <eos",
    "<start_of_turn>user<end_of_turn>",
    "[@BOS@] [2, 3] <mask> <2mass> <unused7>",
    "0<x<10, y>3, <b>bold</b>",
    "one\n\n\ntwo   three\t<eos>\n",
    "<|eos|> < eos> ＜eos＞ \u200b<eos>",
]


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
@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_a_special_token(text):
    added = gemma().get_added_tokens_decoder().items()
    control = {id for id, token in added if token.content.strip("\n▁")}
    assert len(control) == 1370 - 31 - 30 and set(special_ids(gemma()).values()) <= control
    ids = plain_ids(gemma(), text)
    assert not control & set(ids)
    assert gemma().decode(ids, skip_special_tokens=False) == text
    row = data.sequence(gemma(), text, text, image_tokens=3)["input_ids"]
    assert [row.count(id) for id in (257152, 2, 1, 0)] == [3, 1, 1, 0]
    assert row[-1] == 1


@needs_tokenizer
def test_hostile_texts_are_hostile():
    """Without the cut they do become special tokens, also where the library offers to stop it."""
    naive = [gemma().encode(text, add_special_tokens=False).ids for text in HOSTILE]
    assert sum(bool({0, 1, 2, 3, 257152} & set(ids)) for ids in naive) >= 6
    gemma().encode_special_tokens = True
    careful = gemma().encode(HOSTILE[3], add_special_tokens=False).ids
    gemma().encode_special_tokens = False
    assert 256001 in careful


@pytest.mark.slow
@needs_tokenizer
@needs_traces
@needs("scienceqa/problems.json")
def test_ordinary_text_has_the_ids_it_always_had():
    texts = [one["thought"] for one in load_traces(REAL / "pali_reason/training_correct.csv")]
    for problem in data.load(REAL / "scienceqa", "val") + list(by_pid().values())[::4]:
        texts += [data.pali_prefix(problem, "reason"), problem.solution]
    for text in texts:
        assert plain_ids(gemma(), text) == gemma().encode(text, add_special_tokens=False).ids


@needs("tokenizers/t5")
def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="no <eos>, <bos>, <image>: it is not PaliGemma's"):
        data.sequence(load_tokenizer(REAL / "tokenizers/t5"), "a", "b")


# --- Rows and batches -----------------------------------------------------------------------------


@needs_tokenizer
def test_pali_examples(capsys):
    stored = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float16)
    features = Features(stored, {"1": 0})
    plain, long = asked(id="2"), trace("long " * 50)
    rows = [(asked(), "answer", None, True), (plain, "reason", trace(), True)]
    rows += [(plain, "reason", long, True), (plain, "reason", None, False)]
    rows += [(replace(plain, question="why " * 50), "answer", None, suffix) for suffix in (1, 0)]
    made = data.pali_examples(rows, gemma(), features, {"max_suffix": 11, "max_prefix": 40})
    said = capsys.readouterr().err
    assert "1 of 6 rows were left out: over max_suffix 11." in said
    assert "1 of 6 rows were left out: over max_prefix 40." in said
    assert [example["id"] for example in made] == ["1", "2", "2", "2"]
    first, second, third, fourth = made
    np.testing.assert_array_equal(first["image_features"], stored[0])
    assert first["input_ids"][:5] == [257152] * 4 + [2] and first["labels"][-2:] == [235305, 1]
    told = "".join(gemma().decode([id]) for id in second["labels"] if id > 1)
    assert told == "It is long.\nAnswer: B" and "image_features" not in second
    assert 257152 not in second["input_ids"] and "labels" not in third
    assert len(fourth["input_ids"]) > 60 and "labels" not in fourth  # a test question is kept
    exact = sum(second["token_type_ids"])
    config = {"max_suffix": exact, "max_prefix": None, "layout": "seed", "eos_in_loss": False}
    [example] = data.pali_examples(rows[1:2], gemma(), None, config)
    assert example["labels"][-1] == -100 and example["input_ids"][-1] == 1
    assert example["input_ids"].index(2) > 1
    assert not data.pali_examples(rows[1:2], gemma(), None, config | {"max_suffix": exact - 1})
    assert "over max_suffix" in capsys.readouterr().err


@needs_tokenizer
def test_shuffled_rows():
    rows = [(asked(), "answer", None, True)] * 40
    rows += [
        (asked(), "reason", trace("Option (B) it is."), True),
        (asked(), "answer", None, False),
    ]
    config = {"max_suffix": 16, "max_prefix": None, "shuffle_choices": True, "seed": 3}

    def texts(**changes):
        made = data.pali_examples(rows, gemma(), None, config | changes)
        return [gemma().decode(example["input_ids"]) for example in made]

    shuffled = texts()
    assert all(re.search(rf"\({text[-1]}\) belt", text) for text in shuffled[:40])
    assert {text[-1] for text in shuffled[:40]} == set("ABC")
    order = "Choices: (A) rope (B) belt (C) neither"
    assert order in shuffled[40] and order in shuffled[41]
    assert shuffled == texts() != texts(seed=4)
    assert set(texts(shuffle_choices=False)[:40]) == {f"answer en Which is it?\n{order}\nB"}


def test_shuffled_keeps_the_answer():
    twice = asked(choices=("x", "y", "y"), answer="y")
    seen = set()
    for seed in range(50):
        problem = shuffled(twice, torch.Generator().manual_seed(seed))
        assert problem.choices[problem.meta["answer_index"]] == problem.answer == "y"
        assert sorted(problem.choices) == ["x", "y", "y"]
        seen.add((problem.choices, problem.meta["answer_index"]))
    assert len(seen) == 6 and twice.meta == {"answer_index": 1}


MOVABLE = [
    (True, {}, None),
    (True, {}, trace("It is the belt. A rope is not. I think so.")),
    (True, {}, trace("Angle C is in triangle ABC, see point B.")),
    (False, {"choices": ()}, None),
    (False, {"choices": ("A", "B", "C")}, None),
    (False, {"choices": ("AB", "BC", "none of the above")}, None),
    (True, {"choices": ("AB", "BC", "CD")}, None),
    (False, {"question": "Is option B right?"}, None),
    (False, {}, trace("So (B).")),
    (False, {}, trace("Option **B** fits.")),
    (False, {}, trace("The correct option letter is C.")),
    (False, {}, trace("The option letter for 'belt' is B")),
    (False, {}, trace("the answer is B")),
    (False, {}, trace("It is the belt.", correct=False)),
    (False, {}, trace("It is the belt.", correct=None)),
]


@pytest.mark.parametrize("expected, changes, told", MOVABLE)
def test_movable(expected, changes, told):
    assert movable(asked(**changes), told) is expected


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
    assert batch["image_features"].tolist() == [features.tolist()]  # one picture, two rows
    right = data.pali_collate(rows, side="right")
    assert "image_features" not in right
    assert right["input_ids"].tolist() == [[9, 2, 5], [2, 6, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert right["labels"].tolist() == [[-100, -100, 5], [-100, 6, -100]]
    assert all(value.dtype == torch.int64 for key, value in right.items() if key != "ids")
    asked_only = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    assert "labels" not in data.pali_collate(asked_only)


# --- Pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (53, 760), (64, 64), (2, 500)])
def test_siglip_pixels(size):
    from transformers import SiglipImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    reference = SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=3)
    pixels = pictures.siglip_pixels(image, 56)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 56, 56)
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    white = pictures.siglip_pixels(Image.new("RGB", (9, 5), "white"), 14)
    assert white.min() == white.max() == 1


def test_cached_features_of_siglip_pixels(tmp_path):
    problems, extract = pictured(tmp_path / "set", 3), Extract()
    features = cached_features(
        problems, extract, "w", 28, tmp_path / "cache", pixels=pictures.siglip_pixels
    )
    assert extract.sizes == [(3, 28, 28)] * 4  # squares, whatever the picture's shape
    pixels = pictures.siglip_pixels(pictures.open_image(problems[1].image), 28)
    expected = Extract()([pixels])[0].half().float().numpy()
    np.testing.assert_array_equal(features[problems[1].id], expected)


def test_overlap(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), dtype=np.uint8)
    image, other = (Image.fromarray(pixels) for pixels in noise)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    image.save(tmp_path / "a.jpg")
    Image.fromarray(noise[0].reshape(30, 20, 3)).save(tmp_path / "turned.png")  # the same bytes
    transparent = image.convert("RGBA")
    transparent.putalpha(7)
    transparent.save(tmp_path / "alpha.png")
    other.save(tmp_path / "other.png")

    def problems(**named):
        return [asked(id=id, image=name and str(tmp_path / name)) for id, name in named.items()]

    train = problems(t1="a.png", t2="other.png", t3=None, t4="a.png")
    test = problems(e1="a.bmp", e2="a.jpg", e3="alpha.png", e4="turned.png", e5=None, e6="no.png")
    expected = [("t1", "e1"), ("t4", "e1"), ("t1", "e3"), ("t4", "e3")]
    assert overlap(train, test) == expected
    assert "1 of 5 pictures cannot be read and were not compared" in capsys.readouterr().err
    assert overlap(train, []) == [] and not capsys.readouterr().err


@pytest.mark.slow
@needs("scienceqa/images/test")
def test_overlap_of_real_scienceqa():
    train, test = data.load(REAL / "scienceqa", "val"), data.load(REAL / "scienceqa", "minitest")
    shared = overlap(train, test)
    assert (len(shared), len({id for _, id in shared})) == (3, 3)
    by_id = {problem.id: problem for problem in train + test}
    for pair in shared:
        one, two = (pictures.open_image(by_id[id].image) for id in pair)
        assert one.size == two.size and one.tobytes() == two.tobytes()


def test_a_trace_that_never_answered_has_no_answer_line(tmp_path):
    cut = LINE | {"answer": "", "verdict": VERDICT | {"correct": False}}
    (trace,) = load_traces(lines(tmp_path / "traces.jsonl", cut))
    problem = data.Problem("7", "q", ("a", "b"), "a", "", None, "", "", {"answer_index": 0})
    assert data.pali_suffix(problem, trace) == "t"
