"""data.py: the formats byte for byte, the real ScienceQA files, bad input, caches, the download.

ScienceQA's texts are CC BY-NC-SA and are not in this repository. FORMATS holds, for each prompt
format, the start of the sha256 over all problems of NANOCOT_DATA (train, val, test), of the lines
"pid <tab> source <tab> target" as mm-cot's own utils_prompt.build_train_pair made them at commit
8dd4ac0, then " ".join(text.split()) as its utils_data has it. To make them again, run that.
"""

import contextlib
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import struct
import sys
import threading
import time
import zipfile
import zlib
from base64 import b64decode, b64encode
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from support import downloads, files, pictures  # noqa: E402
from support.features import Features, _image_sha, cached_features, published_features  # noqa: E402
from support.files import json_lines, read_json, write_skipped  # noqa: E402
from support.tokenizing import encode, load_tokenizer  # noqa: E402
from support.traces import load_traces  # noqa: E402

REAL = Path(os.environ.get("NANOCOT_DATA", ROOT / "../shared/data"))
SCIENCEQA = REAL / "scienceqa"
needs_data = pytest.mark.skipif(
    not (SCIENCEQA / "problems.json").is_file(),
    reason=f"no ScienceQA in {SCIENCEQA}; set NANOCOT_DATA",
)

GENERATED = "Solution: Look at the  picture.\\nThe ruler\nis longer. Answer: BECAUSE:"
FORMATS = """
QM-A:984933407d34 QM-AL:9133b0a3b15f QM-AE:4c98bdb986d3 QM-ALE:cb3a225f899d QM-AEL:f776f403cb06
QM-LA:5c05bd0f1ed2 QM-EA:de9bf2ec98c9 QM-LEA:d72e8f30cb8b QM-ELA:e0d239094c7a QM-LE:04d9ae333047
QM-E:42e8a26e284e QC-A:961a0a85da2e QC-AL:f8fb689c673e QC-AE:ea0a0a915dbb QC-ALE:aa65632628c1
QC-AEL:e6c97315c032 QC-LA:0f9ade93dade QC-EA:c79861381e29 QC-LEA:3c0f42d2851e QC-ELA:e57adf43b8b6
QC-LE:3d9e104a5a55 QC-E:189b88e1bca5 QCM-A:d560804fd352 QCM-AL:9bd200fe8cf2 QCM-AE:a5445519df2a
QCM-ALE:b50b65a44b04 QCM-AEL:4e3e58da350c QCM-LA:2a6b1722fbe7 QCM-EA:cf4f8fd298db
QCM-LEA:6a379b82b57d QCM-ELA:dee7e5f6ce8f QCM-LE:2a9fd495853b QCM-E:a84b9265855d CQM-A:2cc9639b1330
CQM-AL:4932b7eb24af CQM-AE:98479d98ff58 CQM-ALE:2c0c567fff62 CQM-AEL:05d0fcb97a5f
CQM-LA:d535c22e1e63 CQM-EA:49fd47f04687 CQM-LEA:ee9d3c3f9261 CQM-ELA:9eeb26529e14
CQM-LE:852a3bd380a6 CQM-E:cc31ee26b361 QCMG-A:d9ace7dddd03 QCMG-AL:421dd579c01c
QCMG-AE:8d3af1a70213 QCMG-ALE:1525553d8a6b QCMG-AEL:6c19214591c6 QCMG-LA:2c0e6de7d85c
QCMG-EA:5081bb778048 QCMG-LEA:131d622b685b QCMG-ELA:68d644517bd0 QCMG-LE:ff2178b6d537
QCMG-E:acd1e57ad8fd CQMG-A:8366b6f448da CQMG-AL:796661c27743 CQMG-AE:c7ed6ab92762
CQMG-ALE:0578daf7e09f CQMG-AEL:bd2c7323e2ac CQMG-LA:3604744919fd CQMG-EA:d24edf26f735
CQMG-LEA:03c6d0da802f CQMG-ELA:34173266332b CQMG-LE:1a4ecac6be0b CQMG-E:5a4dd138079e
QCML-A:d931ec6d4c28 QCML-AL:ac621acdf4ba QCML-AE:5d6f92c275e5 QCML-ALE:1419aef753ce
QCML-AEL:b8d242546a5f QCML-LA:9a1c9a218918 QCML-EA:a3ef77eaae9b QCML-LEA:173640364c9d
QCML-ELA:aa9fe0fcd6e9 QCML-LE:e83e1e580dae QCML-E:af3c3b150200 QCME-A:6a31886fcd85
QCME-AL:924e2dd0a724 QCME-AE:3ed828fffe0a QCME-ALE:0ea729fe11de QCME-AEL:3703bb48f40c
QCME-LA:6d028b93e23b QCME-EA:7261d89d8aa6 QCME-LEA:9a0dfb2a1a98 QCME-ELA:deb05d4df0ff
QCME-LE:3b10fd7ce56a QCME-E:ecce5e2e6007 QCMLE-A:0d3346b61f4e QCMLE-AL:e43af0490b82
QCMLE-AE:36d4becf1c12 QCMLE-ALE:2c6864e5a157 QCMLE-AEL:e37f0ffffa6c QCMLE-LA:70e7abdfef76
QCMLE-EA:ee2e70b55c0e QCMLE-LEA:90cc45884cee QCMLE-ELA:ddfc946c042b QCMLE-LE:bb6fbbd39db8
QCMLE-E:db82b32350e4 QCLM-A:d708603591f9 QCLM-AL:012feaf2fd45 QCLM-AE:406182b89ee0
QCLM-ALE:e35005601ffd QCLM-AEL:e8aeff295072 QCLM-LA:73468d987f47 QCLM-EA:4251c42812a3
QCLM-LEA:584e0650bec7 QCLM-ELA:bc1993707ce2 QCLM-LE:f2cf4ec5c754 QCLM-E:c022b55da2b2
QCEM-A:9e9e3f25f985 QCEM-AL:13575a2d2dbd QCEM-AE:2756d59d166d QCEM-ALE:4465c3660db7
QCEM-AEL:2d54862cbf29 QCEM-LA:0108f51eeb5b QCEM-EA:d2d50baf14a6 QCEM-LEA:d7959e0fd2fc
QCEM-ELA:93ba4b59244c QCEM-LE:41ac61488677 QCEM-E:c0b9cc2395d5 QCLEM-A:999a58e08a25
QCLEM-AL:c254fa6b09c0 QCLEM-AE:d63b50f8e825 QCLEM-ALE:b6828c5e27a5 QCLEM-AEL:10e35f91f69f
QCLEM-LA:48501e82d1bb QCLEM-EA:94cca404802d QCLEM-LEA:958dcbfc0370 QCLEM-ELA:8d40dfe2e3ee
QCLEM-LE:b3425d80b08b QCLEM-E:20a2b5013793 QCMA-A:680e1d000cf4 QCMA-AL:24622a987b2c
QCMA-AE:f383032e6a8f QCMA-ALE:4733187f1cc7 QCMA-AEL:f3b861cb90bc QCMA-LA:e43877576e14
QCMA-EA:ea05e274070e QCMA-LEA:9686d72ceade QCMA-ELA:b49ffa8a9d18 QCMA-LE:f8032c324370
QCMA-E:45fe345b3789 QCA-A:a0feb93c57e6 QCA-AL:72ea0873b54f QCA-AE:2100f0064843 QCA-ALE:b161c70c6bea
QCA-AEL:c7d7addf1790 QCA-LA:f5bb810999ae QCA-EA:d39758249447 QCA-LEA:0753d07110b2
QCA-ELA:2659b070888a QCA-LE:794941267c39 QCA-E:89e06c4e0382 QCM-LE+caption:d5ce206374f3
QCMG-A+caption:8eac1eccfaa9 QCMG-A+generated:3ebc0ad510a9 CQMG-A+generated:53c2bb327fee
"""


@cache
def real(split):
    return data.load(SCIENCEQA, split)


def record(**changes):
    base = {
        "question": "Which  one is\nlonger?",
        "choices": ["the rope", "the belt", "neither"],
        "answer": 1,
        "hint": "Look at both.",
        "image": None,
        "lecture": "Length is how long.\nCompare the ends.\n",
        "solution": "The belt goes further. Answer: see it.\n\nSo it is longer.",
        "subject": "natural science",
        "grade": "grade2",
        "split": "test",
    }
    return {key: value for key, value in (base | changes).items() if value is not Ellipsis}


def scienceqa(folder, records=None, splits=None, captions=None):
    """A small data set in ScienceQA's layout."""
    records = {"1": record()} if records is None else records
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(records))
    (folder / "pid_splits.json").write_text(json.dumps(splits or {"test": list(records)}))
    if captions:
        (folder / "captions.json").write_text(json.dumps({"captions": captions}))
    return folder


def picture(path, size=(40, 30), colour=(200, 30, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


# --- Prompts --------------------------------------------------------------------------------------

QUESTION = "Question: Which one is longer? Context: "
OPTIONS = " Options: (A) the rope (B) the belt (C) neither "
LECTURE = r"Length is how long.\nCompare the ends.\n"
SOLUTION = r"The belt goes further. see it.\n\nSo it is longer."
GOLDEN = [  # format, caption?, generated, and what mm-cot makes of record()
    ("QCM-A", False, None, QUESTION + "Look at both." + OPTIONS + "Answer:", "The answer is (B)."),
    (
        "QCM-LE",
        True,
        None,
        QUESTION + "Look at both. a rope and a belt" + OPTIONS + "Solution:",
        f"Solution: {LECTURE} {SOLUTION}.",
    ),
    (
        "QCMG-A",
        True,
        "Solution: I  see\nit.",
        QUESTION + "Look at both. a rope and a belt" + OPTIONS + "Solution: I see it. Answer:",
        "The answer is (B).",
    ),
    (
        "CQM-ALE",
        False,
        None,
        "Context: Look at both. Question: Which one is longer?" + OPTIONS + "Solution:",
        f"The answer is (B). BECAUSE: {LECTURE} {SOLUTION}",
    ),
    (
        "QCA-LEA",
        False,
        None,
        QUESTION + "Look at both. Answer: The answer is (B). BECAUSE:Solution:",
        f"{LECTURE} {SOLUTION} The answer is (B).",
    ),
]


@pytest.mark.parametrize("fmt, caption, generated, source, target", GOLDEN)
def test_prompt_literal(tmp_path, fmt, caption, generated, source, target):
    folder = scienceqa(tmp_path, captions={"1": "a rope and a belt"})
    [problem] = data.load(folder, "test")
    made = data.prompt(problem, fmt, generated, caption=caption, faithful=True)
    assert made == (source, target)


def test_prompt_empty_parts(tmp_path):
    empty = record(hint="", solution="", lecture="It is so BECAUSE:", answer=0)
    [problem] = data.load(scienceqa(tmp_path, {"1": empty}), "test")
    made = {f: data.prompt(problem, f, faithful=True) for f in ("QCM-LE", "QCM-AE", "QCM-AL")}
    assert made["QCM-LE"] == (
        QUESTION + "N/A" + OPTIONS + "Solution:",
        "Solution: It is so BECAUSE: .",
    )
    assert made["QCM-AE"][1] == "The answer is (A). It is so"  # the original deletes the word
    assert made["QCM-AL"][1] == "The answer is (A). BECAUSE:"


@pytest.mark.slow
@needs_data
def test_prompt_equals_original_on_all_problems():
    goldens = dict(entry.split(":") for entry in FORMATS.split())
    assert len(goldens) == len(data.INPUTS) * len(data.OUTPUTS) + 4
    problems = [problem for split in ("train", "val", "test") for problem in real(split)]
    wrong = []
    for name, golden in goldens.items():
        fmt, _, extra = name.partition("+")
        options = {"caption": {"caption": True}, "generated": {"generated": GENERATED}}
        digest = hashlib.sha256()
        for problem in problems:
            pair = data.prompt(problem, fmt, faithful=True, **options.get(extra, {}))
            digest.update("\t".join((problem.id, *pair)).encode() + b"\n")
        if digest.hexdigest()[:12] != golden:
            wrong.append(name)
    assert not wrong


def test_newlines_become_a_separator(tmp_path):
    [problem] = data.load(scienceqa(tmp_path), "test")
    source, target = data.prompt(problem, "QCM-LE")
    assert target == (
        "Solution: Length is how long. // Compare the ends. "
        "The belt goes further. see it. // So it is longer.."
    )
    assert source == data.prompt(problem, "QCM-LE", faithful=True)[0]


@pytest.mark.slow
@needs_data
def test_separator_is_known_to_t5_and_nowhere_in_scienceqa():
    tokenizer = load_tokenizer(REAL / "tokenizers/t5")
    problems = [problem for problem in real("train") if "\n" in problem.lecture.strip()]
    assert len(problems) > 100
    assert not any("//" in p.lecture + p.solution for p in problems)
    for problem in problems:
        text = data.prompt(problem, "QCM-LE")[1]
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids).count(" // ") == text.count(" // ") > 0
        assert ids.count(2) == tokenizer.encode(text.replace(" // ", " ")).ids.count(2)
        faithful = tokenizer.encode(data.prompt(problem, "QCM-LE", faithful=True)[1]).ids
        assert faithful.count(2) > ids.count(2)  # what the original's backslash costs


def test_many_and_no_choices(tmp_path):
    many = record(choices=list("uvwxyz"), answer=5)
    [problem] = data.load(scienceqa(tmp_path, {"77": many}), "test")
    assert data.prompt(problem, "QCM-A")[1] == "The answer is (F)."
    with pytest.raises(ValueError, match="Problem 77 has 6 choices"):
        data.prompt(problem, "QCM-A", faithful=True)
    (tmp_path / "own.jsonl").write_text('{"id": 3, "question": "How many?", "answer": 12}')
    [problem] = data.load(tmp_path / "own.jsonl", "train")
    assert data.prompt(problem, "QCM-A") == (
        "Question: How many? Context: N/A Answer:",
        "The answer is 12.",
    )
    with pytest.raises(ValueError, match="no prompt format 'QCM-X'"):
        data.prompt(problem, "QCM-X")


# --- Loading --------------------------------------------------------------------------------------


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
    script = (ROOT / "demo/scenes.py").read_bytes()
    assert folder.name == f"demo-{hashlib.sha256(script).hexdigest()[:10]}"


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


OWN = '{"id": "0", "question": "q", "answer": "x"}\n'
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


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_LINE", 1000)
    file = tmp_path / "own.jsonl"
    file.write_text(OWN + '{"id": "' + "a" * 2000)
    with pytest.raises(ValueError, match="line 2 has 1000 bytes or more"):
        data.load(file, "train")
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    file.rename(tmp_path / "large.json")
    with pytest.raises(ValueError, match="large.json has 2052 bytes"):
        read_json(tmp_path / "large.json")


def test_half_an_emoji_goes_through_tokenizers_and_files(tmp_path, spiece):
    file = tmp_path / "own.jsonl"
    question = r'"question": "a \ud83d \ud83d\ude00 \\ud83d"'
    file.write_text(r'{"id": "\ud83d", "answer": "\uDE00", ' + question + "}")
    [problem] = data.load(file, "train")
    assert (problem.id, problem.answer) == ("\ufffd", "\ufffd")
    assert problem.question == "a \ufffd \U0001f600 \\ud83d"  # a whole one, and a backslash, stay
    encode(load_tokenizer(spiece), [problem.question], 50)
    (tmp_path / problem.id).write_text(problem.question, encoding="utf-8")


def places(folder):
    """Paths that are no files: reading most of them would never end."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, target in {"device": "/dev/zero", "loop": "loop", "dangling": "nowhere"}.items():
        (folder / name).symlink_to(target)
    names = ("folder", "pipe", "device", "loop", "dangling", "long" * 100, "nul\0", "dangling/x")
    return [folder / name for name in names]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A pipe, a device, a link to itself ... in place of each kind of file."""
    names, start = tmp_path / "names.json", time.monotonic()
    names.write_text("{}")
    for i, place in enumerate(places(tmp_path)):
        problem = data.Problem("7", "q", (), "a", "", str(place), "", "", {})
        assert [id for id, _ in pictures.unusable([problem])] == ["7"]
        readers = [
            (read_json, place),
            (pictures.open_image, place),
            (_image_sha, problem),
            (downloads.unpack, place, tmp_path, "x"),
            (lambda file: list(json_lines(file)), place),
        ]
        if "\0" not in str(place) and len(place.name) < 99 and place.is_symlink() | place.exists():
            for name in ("a.csv", "a.json", "a.jsonl"):
                moved = tmp_path / f"{i}{name}"
                moved.symlink_to(place)
                readers.append((load_traces, moved))
            for name in ("vit.pth", "detr.npy", "tokenizer.json"):
                (tmp_path / str(i)).mkdir(exist_ok=True)
                (tmp_path / str(i) / name).symlink_to(place)
            readers.append((load_tokenizer, tmp_path / str(i)))
            for name in ("vit.pth", "detr.npy"):
                readers.append((published_features, tmp_path / str(i) / name, names))
        for read, *args in readers:
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                read(*args)
            assert str(tmp_path) in str(caught.value) and str(caught.value).endswith(".")
    assert time.monotonic() - start < 5


def test_unusable_problems(tmp_path):
    whole, torn = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    torn.write_bytes(torn.read_bytes()[:60])
    asked = data.Problem("e", "q", tuple("abcdefghijk"), "a", "", None, "", "", {})
    paths = {"a": whole, "b": torn, "c": tmp_path / "c.png", "d": None}
    problems = [replace(asked, id=i, choices=(), image=p and str(p)) for i, p in paths.items()]
    problems.append(asked)
    assert [id for id, _ in pictures.unusable(problems)] == ["c", "e"]
    told = dict(pictures.unusable(problems, pictures.open_image))
    assert list(told) == ["b", "c", "e"] and "b.png cannot be read" in told["b"]
    assert "c.png does not exist" in told["c"] and "11 choices" in told["e"]


# --- Tokens and batches ---------------------------------------------------------------------------

STRINGS = [
    "Question: Which one is longer? Context: N/A Options: (A) the rope (B) the belt Answer:",
    "  two  spaces,\ttabs\nand\r\nnewlines   ",
    "ﬁne ½ ① full－width Ａ　ｂ é e\u0301 soft\u00adhyphen zero\u200bwidth",
    "emoji 🙂🙂 and 漢字 漢字, {braces} ~ ^ \\n < > _",
    "",
    "x",
    "▁already ▁▁ there",
]


SAID = """Which of these magnets will attract or repel each other when their opposite poles meet?
A longer rope has more mass, so the force between them is weaker. Look at the picture: (A) 12.5
grams; "solid" or liquid? Compare the average kinetic energies of the particles in each sample.
Offspring genotypes, homozygous/heterozygous; George Washington's 1787 voyage - south-west."""
RANDOM = random.Random(0)
SENTENCES = [" ".join(RANDOM.choices(SAID.split(), k=RANDOM.randint(1, 30))) for _ in range(500)]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A sentencepiece model with T5's special ids, trained here."""
    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES + STRINGS[:1]),
        model_prefix=str(folder / "spiece"),
        vocab_size=120,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


def test_tokenizer_from_spiece_equals_sentencepiece(spiece):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    ours = load_tokenizer(spiece)
    for text in STRINGS + SENTENCES:
        assert ours.encode(text).ids == [*theirs.encode(text), 1], text
    assert ours.decode(ours.encode(SENTENCES[0]).ids) == SENTENCES[0]
    assert ours.token_to_id("<extra_id_0>") == 219 and ours.token_to_id("<extra_id_99>") == 120
    assert ours.encode("<extra_id_1> x").ids[0] == 218


def field(number, value):
    """One field of a protobuf message: varint, float or bytes."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_bad_tokenizers(spiece, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor spiece.model"):
        load_tokenizer(tmp_path)
    whole = (spiece / "spiece.model").read_bytes()
    names = [(b"<pad>", 3), (b"</s>", 3), (b"<unk>", 2), ("▁a".encode(), 1)]
    pieces = b"".join(field(1, field(1, n) + field(2, 0.0) + field(3, t)) for n, t in names)
    (tmp_path / "spiece.model").write_bytes(pieces + field(3, field(1, b"identity")))
    assert load_tokenizer(tmp_path).encode("a").ids == [3, 1]
    for broken in (pieces, whole[: len(whole) // 2], whole[:-3], b"", b"<html>not found</html>"):
        (tmp_path / "spiece.model").write_bytes(broken)
        with pytest.raises(ValueError, match="spiece.model is not a tokenizer"):
            load_tokenizer(tmp_path)
    theirs = load_tokenizer(spiece)
    theirs.enable_truncation(5)
    theirs.enable_padding(length=40)
    theirs.save(str(tmp_path / "tokenizer.json"))  # as released checkpoints may have it
    assert len(load_tokenizer(tmp_path).encode("the longer rope has more mass").ids) in range(6, 40)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizers_that_never_end_or_cannot_encode(tmp_path, spiece):
    file = tmp_path / "spiece.model"
    file.write_bytes(b"\xff" * 300_000)
    with pytest.raises(ValueError, match="more than 64 bits"):
        load_tokenizer(tmp_path)
    load_tokenizer(spiece).save(str(tmp_path / "tokenizer.json"))
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    normalizer = {"type": "Precompiled", "precompiled_charsmap": b64encode(b"\xff" * 40).decode()}
    changed = {"model": told["model"] | {"unk_id": None}, "normalizer": normalizer}
    for key, sentence in (("model", "unk_id"), ("normalizer", "table of characters is shorter")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(told | {key: changed[key]}))
        with pytest.raises(ValueError, match=f"tokenizer.json is not .*{sentence}"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    file.write_bytes(field(1, field(1, b"a")) + field(3, field(2, b"\xff" * 40)))
    with pytest.raises(ValueError, match="spiece.model is not a tokenizer"):
        load_tokenizer(tmp_path)


SPECIAL = "</s> <pad> <extra_id_0> <extra_id_99> <<pad> </<pad>s> </s></s> ＜/s>".split()


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_in_a_text_are_text(spiece, text):
    ours = load_tokenizer(spiece)
    [ids] = encode(ours, [f"the rope {text} the belt"], 99)
    special = {ours.token_to_id(name) for name in SPECIAL[:4]}
    assert not special & set(ids[:-1]) and ids[-1] == 1  # its own </s>, at the end
    plain = re.sub("[<＜]", "\N{SNOWMAN}", text)  # another character that is in no piece
    assert ids == encode(ours, [f"the rope {plain} the belt"], 99)[0]


@pytest.mark.slow
@needs_data
def test_tokenizer_from_spiece_equals_real_t5(tmp_path):
    """The real T5 vocabulary, written back as spiece.model, gives the ids of its tokenizer.json."""
    file = json.loads((REAL / "tokenizers/t5/tokenizer.json").read_text())
    model = b""
    for i, (piece, score) in enumerate(file["model"]["vocab"][:32000]):
        kind = {0: 3, 1: 3, 2: 2}.get(i, 1)  # control, control, unknown, normal
        model += field(1, field(1, piece.encode()) + field(2, float(score)) + field(3, kind))
    charsmap = b64decode(file["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    model += field(2, field(3, 1)) + field(3, field(1, b"nmt_nfkc") + field(2, charsmap))
    (tmp_path / "spiece.model").write_bytes(model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours, real_t5 = load_tokenizer(tmp_path), load_tokenizer(REAL / "tokenizers/t5")
    assert ours.get_vocab() == real_t5.get_vocab()
    texts = STRINGS + [text for p in real("val") for text in (p.question, p.hint, p.lecture)]
    for text in texts:
        assert ours.encode(text).ids == [*theirs.encode(text), 1], text
        assert ours.encode(text.rstrip()).ids == real_t5.encode(text.rstrip()).ids, text


def test_encode_keeps_the_cue(spiece, capsys):
    tokenizer = load_tokenizer(spiece)
    short, long = "Answer:", "a very long rationale " * 40 + "Answer:"
    whole = tokenizer.encode(long).ids
    rows = encode(tokenizer, [short, long], 50)
    assert [len(row) for row in rows] == [len(tokenizer.encode(short).ids), 50]
    assert rows[1][:34] == whole[:34] and rows[1][34:] == whole[-16:]
    assert tokenizer.decode(rows[1]).endswith("Answer:") and rows[1][-1] == 1
    assert "1 of 2 texts were cut to 50 tokens" in capsys.readouterr().err
    published = encode(tokenizer, [long], 50, tail=1)[0]
    assert published == whole[:49] + [1]  # right truncation, </s> kept: the cue is gone
    assert encode(tokenizer, [long], 8)[0] == whole[-8:]


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
    config = {"vision": "caption", "faithful_text": False, "max_input": 60, "max_output": [60, 8]}
    whole = tokenizer.encode(data.prompt(problems[0], "QCM-LE", caption=True)[0]).ids
    first, second = data.examples(problems, "QCM-LE", tokenizer, features, None, config)
    assert first["id"] == "1" and first["input_ids"] == whole[:44] + whole[-16:]
    assert len(second["labels"]) == 60 and second["labels"][-1] == 1
    batch = data.collate([first, second])
    np.testing.assert_array_equal(batch["image_features"][0], stored[0].astype(np.float32))
    assert batch["image_features"].dtype == torch.float32 and not batch["image_features"][1].any()
    told = {"1": "Solution: the belt.", "2": "Solution: the rope."}
    config |= {"vision": "none", "faithful_text": True, "max_input": 512}
    first, second = data.examples(problems, "QCMG-A", tokenizer, None, told, config)
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


# --- Pictures and their features ------------------------------------------------------------------


def test_open_image(tmp_path, monkeypatch):
    translucent = picture(tmp_path / "a.png", colour=(10, 20, 30, 0), mode="RGBA")
    assert pictures.open_image(translucent).getpixel((0, 0)) == (10, 20, 30)  # dropped, not blended
    with pytest.raises(FileNotFoundError, match="missing.png does not exist"):
        pictures.open_image(tmp_path / "missing.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:20], b"", b"<html>", b"GIF89a"):
        (tmp_path / "b.png").write_bytes(broken)
        with pytest.raises(ValueError, match="b.png cannot be read"):
            pictures.open_image(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for size in ((40, 30), (400, 300)):  # PIL itself refuses only twice the limit
        with (
            pytest.warns() if size[0] == 40 else pytest.MonkeyPatch.context(),
            pytest.raises(ValueError, match="bomb.png cannot be read .*pixels"),
        ):
            pictures.open_image(picture(tmp_path / "bomb.png", size))


@pytest.mark.parametrize("ending", ("jpg", "png", "webp", "tiff"))
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_upright(tmp_path, ending, orientation):
    """However a phone was held: the red corner, written where that orientation has it, is at the
    top left. 0 and 9 are none."""
    upright = Image.new("RGB", (48, 32))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's Transpose that undoes the camera's
    held = upright
    if orientation in turns:
        held = upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    held.save(path, exif=exif, **({"quality": 100} if ending in ("jpg", "webp") else {}))
    seen = pictures.open_image(path)
    assert seen.size == (48, 32)
    red, black = seen.getpixel((4, 4)), seen.getpixel((40, 28))
    assert red[0] > 200 and max(red[1:]) < 60 and max(black) < 40


def test_a_torn_exif_block_turns_nothing(tmp_path):
    image = Image.new("RGB", (30, 20), (9, 9, 9))
    for block in (b"", b"MM\0*\xff\xff\xff\xff", bytes(40), b"\xff" * 50):
        image.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
        assert pictures.open_image(tmp_path / "a.jpg").size == (30, 20)


def test_odd_pictures(tmp_path):
    red = Image.new("RGB", (16, 12), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    seen = pictures.open_image(tmp_path / "cmyk.jpg").getpixel((3, 3))
    assert max(abs(a - b) for a, b in zip(seen, (255, 0, 0), strict=True)) < 6
    red.convert("P").save(tmp_path / "palette.png", transparency=bytes(256))
    red.quantize(4).save(tmp_path / "still.png")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (16, 12))])
    for name in ("palette.png", "still.png", "moving.gif"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", None)  # nothing to warn of
            assert pictures.open_image(tmp_path / name).getpixel((3, 3)) == (255, 0, 0), name
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "deeper.tiff")
    for name in ("deep.png", "deeper.tiff"):
        grey = np.asarray(pictures.open_image(tmp_path / name))[..., 0]
        np.testing.assert_array_equal(grey, np.arange(256).reshape(16, 16))
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "bits.png")
    assert pictures.open_image(tmp_path / "bits.png").getpixel((2, 2)) == (255, 255, 255)
    Image.fromarray(np.eye(9, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="float.tiff .*floating-point"):
        pictures.open_image(tmp_path / "float.tiff")
    for size in ((1, 1), (10_000, 10)):
        path = picture(tmp_path / "size.png", size)
        assert pictures.siglip_pixels(pictures.open_image(path), 14).shape == (3, 14, 14)


def chunk(kind, content):
    size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return size + kind + content + check


def test_hostile_pictures(tmp_path):
    bomb, path = zlib.compress(bytes(80_000_000)), tmp_path / "a.png"
    whole = picture(path).read_bytes()
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        path.write_bytes(whole[:33] + chunk(kind, head + bomb) + whole[33:])
        with contextlib.suppress(ValueError):  # read without it or refused
            assert pictures.open_image(path).size == (40, 30)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(whole[:8] + chunk(b"IHDR", header) + whole[33:])
    with pytest.raises(ValueError, match="a.png cannot be read .*pixels"):
        pictures.open_image(path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(path)
    with pytest.raises(ValueError, match="cannot identify"):  # not handed to Ghostscript
        pictures.open_image(path)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (53, 760), (760, 333)])
def test_detr_pixels(size):
    """The shape rule of torchvision's Resize(224), ToTensor's scale, ImageNet's normalisation."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    width, height = size
    if width <= height:
        resized = image.resize((224, int(224 * height / width)), Image.BILINEAR)
    else:
        resized = image.resize((int(224 * width / height), 224), Image.BILINEAR)
    expected = np.asarray(resized, np.float32).transpose(2, 0, 1) / 255
    expected = expected - np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
    expected = expected / np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
    pixels = pictures.detr_pixels(image)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.numpy(), expected)


def test_detr_pixels_of_a_sliver():
    with pytest.raises(ValueError, match="2 x 101 pixels: too narrow"):
        pictures.detr_pixels(Image.new("RGB", (2, 101)))
    assert pictures.detr_pixels(Image.new("RGB", (2, 100)), 4).shape == (3, 200, 4)


class Extract:
    """A stand-in for DETR: three numbers of the picture, (2, 3); counts what it is asked."""

    def __init__(self, fail_after=None):
        self.sizes, self.fail_after = [], fail_after

    def __call__(self, pixels):
        if self.fail_after is not None and len(self.sizes) >= self.fail_after:
            raise KeyboardInterrupt
        self.sizes += [tuple(p.shape) for p in pixels]
        return [torch.stack([p.mean((1, 2)), p.amax((1, 2))]) for p in pixels]  # (2, 3)


def pictured(folder, count, start=0):
    """Problems with pictures of their own, one with another's picture, one without."""
    records = {str(i): record(image="image.png") for i in range(start, start + count)}
    for i in range(start, start + count):
        picture(folder / f"images/test/{i}/image.png", (40 + i % 7, 30), (i % 256, 7, 9))
    records |= {"copy": record(image="image.png"), "none": record()}
    picture(folder / "images/test/copy/image.png", (40 + start % 7, 30), (start % 256, 7, 9))
    return data.load(scienceqa(folder, records), "test")


def test_pictures_of_one_size_go_through_the_model_together(tmp_path):
    extract = Extract()
    cached_features(pictured(tmp_path / "set", 40), extract, "w", 32, tmp_path / "cache")
    assert len(set(extract.sizes[1:])) == 7  # sizes that take turns in the file
    assert len(list(itertools.groupby(extract.sizes[1:]))) == 7


def test_features_are_computed_once(tmp_path):
    problems, cache_ = pictured(tmp_path / "set", 5), tmp_path / "cache"
    extract = Extract()
    features = cached_features(problems, extract, "weights-1", 32, cache_)
    assert len(extract.sizes) == 1 + 5  # one to learn the shape, then each distinct picture
    assert set(extract.sizes[1:]) == {(3, 32, 32 * (40 + i) // 30) for i in range(5)}
    for problem in problems:
        assert (problem.id in features) == (problem.id != "none")
        assert features[problem.id].dtype == np.float32 and features[problem.id].shape == (2, 3)
        if problem.image:
            pixels = pictures.detr_pixels(pictures.open_image(problem.image), 32)
            expected = extract([pixels])[0].half().float().numpy()
            np.testing.assert_array_equal(features[problem.id], expected)
    assert not features["none"].any() and not features["never heard of"].any()
    np.testing.assert_array_equal(features["copy"], features["0"])
    stored = np.load(cache_ / "features.npy", mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape == (5, 2, 3)
    manifest = json.loads((cache_ / "manifest.json").read_text())
    assert (manifest["fingerprint"], manifest["size"]) == ("weights-1", 32)
    sha = hashlib.sha256((tmp_path / "set/images/test/0/image.png").read_bytes()).hexdigest()
    assert manifest["shape"] == [2, 3] and sha in manifest["rows"]
    again = cached_features(problems, Extract(fail_after=0), "weights-1", 32, cache_)
    np.testing.assert_array_equal(again["3"], features["3"])


def test_feature_cache_of_another_checkpoint_or_size(tmp_path):
    problems = pictured(tmp_path / "set", 2)
    cached_features(problems, Extract(), "weights-1", 32, tmp_path / "cache")
    for other in (("weights-2", 32), ("weights-1", 48)):
        with pytest.raises(ValueError, match="checkpoint weights-1 at size 32") as caught:
            cached_features(problems, Extract(), *other, tmp_path / "cache")
        for word in (other[0], f"size {other[1]}", str(tmp_path / "cache"), "--features-cache"):
            assert word in str(caught.value)


def test_feature_cache_resumes_and_grows(tmp_path):
    problems, cache_ = pictured(tmp_path / "set", 80), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        cached_features(problems, Extract(fail_after=40), "w", 32, cache_)
    assert len(json.loads((cache_ / "manifest.json").read_text())["rows"]) == 64  # two chunks
    extract = Extract()
    first = cached_features(problems, extract, "w", 32, cache_)
    assert len(extract.sizes) == 16
    more = problems + pictured(tmp_path / "more", 3, start=100)[:3]
    extract = Extract()
    grown = cached_features(more, extract, "w", 32, cache_)
    assert len(extract.sizes) == 3
    fresh = cached_features(more, Extract(), "w", 32, tmp_path / "fresh")
    for problem in more:
        np.testing.assert_array_equal(grown[problem.id], fresh[problem.id])
    np.testing.assert_array_equal(first["79"], fresh["79"])
    assert not list(cache_.glob("*.part"))


def test_feature_cache_with_two_writers(tmp_path):
    problems, extract, made = pictured(tmp_path / "set", 40), Extract(), []

    def slow(pixels):
        time.sleep(0.05)
        return extract(pixels)

    def work():
        made.append(cached_features(problems, slow, "w", 32, tmp_path / "cache"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(extract.sizes) == 41
    for problem in problems:
        np.testing.assert_array_equal(made[0][problem.id], made[2][problem.id])


def test_feature_cache_bad_input(tmp_path):
    problems, cache_ = pictured(tmp_path / "set", 3), tmp_path / "cache"
    broken = tmp_path / "set/images/test/1/image.png"
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(ValueError, match=f"Problem 1: The image {broken} cannot be read"):
        cached_features(problems, Extract(), "w", 32, cache_)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match="Problem 1: .*does not exist"):
        cached_features(problems, Extract(), "w", 32, cache_)
    rest = [problem for problem in problems if problem.id != "1"]

    def infinite(pixels):
        return [torch.full((2, 3), float("inf")) for _ in pixels]

    with pytest.raises(ValueError, match=r"Problem \w+: the features of its image are not finite"):
        cached_features(rest, infinite, "w", 32, cache_)
    cached_features(rest, Extract(), "w", 32, cache_)
    (cache_ / "features.npy").write_bytes((cache_ / "features.npy").read_bytes()[:100])
    with pytest.raises(ValueError, match=f"Delete {cache_}"):
        cached_features(rest, Extract(), "w", 32, cache_)


MANIFESTS = [
    {"size": ...},
    {"fingerprint": ...},
    {"rows": ...},
    {"rows": []},
    {"rows": {"a": 1}},
    {"rows": {"a": 0, "b": 0}},
    {"rows": {"a": "0"}},
    {"shape": None},
    {"shape": [2]},
    {"shape": [2, "3"]},
    {"shape": [10**6, 10**6]},
    {"shape": [-2, -3]},
]


@pytest.mark.parametrize("changes", MANIFESTS)
def test_bad_manifest(tmp_path, changes):
    problems, cache_ = pictured(tmp_path / "set", 2), tmp_path / "cache"
    cached_features(problems, Extract(), "w", 32, cache_)
    changed = json.loads((cache_ / "manifest.json").read_text()) | changes
    changed = {key: value for key, value in changed.items() if value is not Ellipsis}
    (cache_ / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"manifest.*Delete {cache_}"):
        cached_features(problems, Extract(), "w", 32, cache_)


def npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


BAD_ARRAYS = {
    "an archive": npz,
    "objects": lambda path: np.save(path, np.array([[None]]), allow_pickle=True),
    "wrong type": lambda path: np.save(path, np.zeros((9, 2, 3), np.int16)),
    "one number": lambda path: np.save(path, np.float16(1)),
    "a torn header": lambda path: path.write_bytes(path.read_bytes()[:9] + b"(" * 200),
}


@pytest.mark.parametrize("spoil", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays(tmp_path, spoil):
    problems, cache_ = pictured(tmp_path / "set", 2), tmp_path / "cache"
    cached_features(problems, Extract(), "w", 32, cache_)
    spoil(cache_ / "features.npy")
    with pytest.raises(ValueError, match=f"features.npy .*Delete {cache_}"):
        cached_features(problems, Extract(), "w", 32, cache_)
    names = tmp_path / "names.json"
    names.write_text("{}")
    np.save(tmp_path / "resnet.npy", np.zeros((1, 2048), np.float16))
    spoil(tmp_path / "resnet.npy")
    with pytest.raises(ValueError, match="resnet.npy (is not a feature file|has .* rows of)"):
        published_features(tmp_path / "resnet.npy", names)


@pytest.mark.parametrize("names", ([1], {"1": "9" * 5000}, {"1": "²"}, {"1": [0]}, {"1": -1}))
def test_bad_name_map(tmp_path, names):
    np.save(tmp_path / "resnet.npy", np.zeros((1, 2048), np.float16))
    (tmp_path / "names.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="names.json: "):
        published_features(tmp_path / "resnet.npy", tmp_path / "names.json")


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


def test_features_without_any_picture(tmp_path):
    problems = data.load(scienceqa(tmp_path / "set"), "test")
    features = cached_features(problems, Extract(), "w", 32, tmp_path / "cache")
    assert features["1"].shape == (2, 3) and not features["1"].any()


def test_published_features(tmp_path):
    names = tmp_path / "name_map.json"
    names.write_text(json.dumps({"11": "0", "12": "2"}))  # mm-cot's values are strings
    rng = np.random.default_rng(0)
    for kind, shape in (("detr", (100, 256)), ("clip", (49, 2048)), ("resnet", (2048,))):
        stored = rng.normal(size=(3, *shape)).astype(np.float16)
        np.save(tmp_path / f"{kind}.npy", stored)
        features = published_features(tmp_path / f"{kind}.npy", names)
        expected = np.repeat(stored[:, None], 512, 1) if kind == "resnet" else stored
        assert features.shape == expected.shape[1:] and features["12"].dtype == np.float32
        np.testing.assert_array_equal(features["12"], expected[2].astype(np.float32))
        assert "13" not in features and not features["13"].any()
        assert features["13"].shape == expected.shape[1:]
    stored = torch.randn(3, 145, 1024)
    torch.save(stored, tmp_path / "vit.pth")
    features = published_features(tmp_path / "vit.pth", names)
    np.testing.assert_array_equal(features["11"], stored[0].numpy())


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_published_features_bad_input(tmp_path):
    names, file = tmp_path / "name_map.json", tmp_path / "detr.npy"
    names.write_text(json.dumps({"11": 0, "12": 3}))
    np.save(file, np.zeros((3, 100, 256), np.float16))
    with pytest.raises(ValueError, match="12 has row 3, but .*detr.npy has 3 rows"):
        published_features(file, names)
    np.save(file, np.zeros((3, 577, 768), np.float16))
    with pytest.raises(ValueError, match=r"rows of \(577, 768\), not \(100, 256\)"):
        published_features(file, names)
    with pytest.raises(ValueError, match="vit.npy is none of detr.npy, clip.npy"):
        published_features(tmp_path / "vit.npy", names)
    with pytest.raises(FileNotFoundError, match="clip.npy does not exist"):
        published_features(tmp_path / "clip.npy", names)
    torch.save(Evil(str(tmp_path / "done")), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="vit.pth is not a feature file"):
        published_features(tmp_path / "vit.pth", names)
    assert not (tmp_path / "done").exists()


# --- The download ---------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files` with Range; hangs up half-way through names in `drops`, that many times."""

    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        server.log.append((name, self.headers.get("Range")))
        if name not in server.files:
            self.send_error(404)
            return
        content, start = server.files[name], 0
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.drops[name]:
            server.drops[name] -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.drops, running.log, running.ranges = {}, Counter(), [], True
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def zipped(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for entry, content in entries:
            file.writestr(entry, content)
    return buffer.getvalue()


def host_scienceqa(server, folder):
    """A ScienceQA of three problems on the server; the table of its addresses."""
    splits = ("train", "val", "test")
    records = {str(i): record(split=split, image="image.png") for i, split in enumerate(splits)}
    scienceqa(folder, records, {split: [str(i)] for i, split in enumerate(splits)}, {"0": "a rope"})
    for name in ("problems.json", "pid_splits.json", "captions.json"):
        server.files[name] = (folder / name).read_bytes()
    png = picture(folder / "a.png").read_bytes()
    for i, split in enumerate(splits):
        server.files[f"{split}.zip"] = zipped([(f"{split}/{i}/image.png", png)])
    sha = hashlib.sha256(server.files["problems.json"]).hexdigest()
    table = {name: [f"{server.url}/{name}", None] for name in server.files}
    return table | {"problems.json": [f"{server.url}/problems.json", sha]}


def test_download_command(server, tmp_path, capsys):
    table = host_scienceqa(server, tmp_path / "host")
    (tmp_path / "table.json").write_text(json.dumps(table))
    server.drops["train.zip"] = 2
    argv = ["scienceqa", "--to", str(tmp_path / "to"), "--addresses", str(tmp_path / "table.json")]
    data.main(argv)
    said = capsys.readouterr().out
    assert "train: 1 problems" in said and "test: 1 problems" in said
    sha = hashlib.sha256(server.files["val.zip"]).hexdigest()
    assert f"val.zip has sha256 {sha}" in said and "problems.json has" not in said
    [problem] = data.load(tmp_path / "to", "train")
    assert (
        pictures.open_image(problem.image).size == (40, 30) and problem.meta["caption"] == "a rope"
    )
    ranges = [asked for name, asked in server.log if name == "train.zip"]
    assert len(ranges) == 3 and ranges[0] is None
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in ranges[1:]]
    size = len(server.files["train.zip"])
    assert starts == [size // 2, size // 2 + (size - size // 2) // 2]
    left = sorted(path.name for path in (tmp_path / "to").iterdir())
    assert left == ["captions.json", "images", "pid_splits.json", "problems.json"]
    assert sorted(p.name for p in (tmp_path / "to/images").iterdir()) == ["test", "train", "val"]
    asked = len(server.log)
    data.main(argv)
    assert len(server.log) == asked  # all there: nothing is fetched again


def test_download_goes_on_in_a_later_run(server, tmp_path):
    server.files["big"], path = os.urandom(3_000_000), tmp_path / "big"
    server.drops["big"] = 99
    with pytest.raises(ConnectionError, match="connection was lost after .* of 3000000 bytes"):
        downloads.download(f"{server.url}/big", path, attempts=1)
    assert not path.exists() and (tmp_path / "big.part").stat().st_size == 1_500_000
    server.drops.clear()
    downloads.download(f"{server.url}/big", path)
    assert path.read_bytes() == server.files["big"] and server.log[-1][1] == "bytes=1500000-"
    assert not (tmp_path / "big.part").exists()


def test_download_from_a_server_without_range(server, tmp_path):
    server.files["big"], server.ranges = os.urandom(100_000), False
    server.drops["big"] = 1
    downloads.download(f"{server.url}/big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == server.files["big"]


def test_download_of_a_part_that_is_whole_or_stale(server, tmp_path):
    server.files["big"] = b"0123456789"
    for part in (b"0123456789", b"0123456789 and more"):
        (tmp_path / "big.part").write_bytes(part)
        downloads.download(f"{server.url}/big", tmp_path / "big")
        assert (tmp_path / "big").read_bytes() == server.files["big"]


def test_download_checksums(server, tmp_path):
    server.files["a"] = b"hello"
    right = hashlib.sha1(b"blob 5\0hello").hexdigest()  # what git hash-object says
    assert right == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    downloads.download(f"{server.url}/a", tmp_path / "a", right)
    for wrong in ("0" * 40, "0" * 64):
        with pytest.raises(ValueError, match=f"/a has checksum .*, not {wrong}"):
            downloads.download(f"{server.url}/a", tmp_path / "b", wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@needs_data
def test_recorded_checksums_are_of_the_original_files():
    for name, local in (("pid_splits.json", "pid_splits_full.json"), ("captions.json",) * 2):
        checksum = downloads.SCIENCEQA[name][1]
        assert files.checksum(SCIENCEQA / local, checksum) == checksum


def test_download_errors_are_sentences(server, tmp_path):
    with pytest.raises(ConnectionError, match="/gone could not be fetched .*404.*--addresses"):
        downloads.download(f"{server.url}/gone", tmp_path / "gone")
    assert len(server.log) == 1  # not asked for again
    table = tmp_path / "table.json"
    argv = ["scienceqa", "--to", str(tmp_path), "--addresses", str(table)]
    table.write_text(json.dumps({"val.zip": f"{server.url}/val.zip"}))
    with pytest.raises(SystemExit, match="table.json: val.zip is not .address, checksum or null."):
        data.main(argv)
    free = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    free.server_close()
    url = f"http://127.0.0.1:{free.server_port}/problems.json"
    table.write_text(json.dumps({"problems.json": [url, None]}))
    with pytest.raises(SystemExit, match="problems.json could not be fetched .*refused"):
        data.main(argv)


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        "../evil",
        "train/../../evil",
        "/tmp/evil",
        "C:\\evil",
        "train\\..\\..\\evil",
        link("train/l"),
    ],
)
def test_evil_zip(tmp_path, entry):
    archive, folder = tmp_path / "a/train.zip", tmp_path / "a/b"
    folder.mkdir(parents=True)
    archive.write_bytes(zipped([("train/1/image.png", b"x"), (entry, b"/etc")]))
    with pytest.raises(ValueError, match="train.zip .* would leave the folder"):
        downloads.unpack(archive, folder, "train")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "train.zip"]


BAD_ZIPS = {
    "a bomb": ([("train/a", bytes(10**7))], "over 100 times its size"),
    "a folder in place of a file": ([("train/a", b"x"), ("train/a/b", b"x")], "not a whole zip"),
    "a file in place of the folder": ([("train", b"x")], "no folder train"),
    "a name too long": ([("train/" + "a" * 300, b"x")], "not a whole zip"),
    "no name": ([("", b"x")], "not a whole zip"),
}


@pytest.mark.parametrize("entries, sentence", BAD_ZIPS.values(), ids=BAD_ZIPS)
def test_hostile_zip(tmp_path, entries, sentence):
    archive = tmp_path / "train.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name or zipfile.ZipInfo(""), content)
    with pytest.raises(ValueError, match=f"train.zip .*{sentence}"):
        downloads.unpack(archive, tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train.zip"]


def test_a_zip_with_a_password(tmp_path):
    archive = tmp_path / "train.zip"
    whole = bytearray(zipped([("train/a", b"x")]))
    for start in (6, whole.index(b"PK\1\2") + 8):  # the flag, in both of its places
        whole[start] |= 1
    archive.write_bytes(whole)
    with pytest.raises(ValueError, match="train.zip is not a whole zip file .*encrypted"):
        downloads.unpack(archive, tmp_path, "train")


TABLES = [[], {"../../x.json": ["http://x", None]}, {"val.zip": [5, None]}, {"val.zip": ["x", 5]}]


@pytest.mark.parametrize("table", TABLES)
def test_bad_addresses(tmp_path, table):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    with pytest.raises(SystemExit, match="table.json: "):
        data.main(["scienceqa", "--to", str(tmp_path / "set"), "--addresses", str(file)])
    assert not (tmp_path / "set").exists()


def test_broken_zip(tmp_path):
    archive = tmp_path / "train.zip"
    whole = zipped([("train/1/image.png", b"x" * 1000), ("val/1/image.png", b"x")])
    archive.write_bytes(whole)
    with pytest.raises(ValueError, match="train.zip has no folder test"):
        downloads.unpack(archive, tmp_path, "test")
    for broken in (whole[:500], whole.replace(b"x" * 1000, b"y" * 1000)):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match="train.zip is not a whole zip file"):
            downloads.unpack(archive, tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train.zip"]
