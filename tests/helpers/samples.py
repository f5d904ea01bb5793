"""Small data sets that tests write, and where the real ones lie.

Real files (NANOCOT_DATA): ScienceQA, MathVista's testmini, pali_reason's traces, tokenizers.
"""

import io
import json
import os
import random
import struct
import zipfile
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import data

REAL = Path(os.environ["NANOCOT_DATA"])
SCIENCEQA = REAL / "scienceqa"

needs_data = pytest.mark.skipif(
    not (SCIENCEQA / "problems.json").is_file(),
    reason=f"no ScienceQA in {SCIENCEQA}; set NANOCOT_DATA",
)


def needs(part):
    return pytest.mark.skipif(
        not (REAL / part).exists(), reason=f"no {part} in {REAL}; set NANOCOT_DATA"
    )


needs_mathvista, needs_traces = needs("mathvista"), needs("pali_reason")
needs_tokenizer = needs("tokenizers/paligemma")


CORPUS = """Which of these magnets will attract or repel each other when their opposite poles meet?
A longer rope has more mass, so the force between them is weaker. Look at the picture: (A) 12.5
grams; "solid" or liquid? Compare the average kinetic energies of the particles in each sample.
Offspring genotypes, homozygous/heterozygous; George Washington's 1787 voyage - south-west."""
RANDOM = random.Random(0)
SENTENCES = [" ".join(RANDOM.choices(CORPUS.split(), k=RANDOM.randint(1, 30))) for _ in range(500)]

STRINGS = [
    "Question: Which one is longer? Context: N/A Options: (A) the rope (B) the belt Answer:",
    "  two  spaces,\ttabs\nand\r\nnewlines   ",
    "ﬁne ½ ① full－width Ａ　ｂ é e\u0301 soft\u00adhyphen zero\u200bwidth",
    "emoji 🙂🙂 and 漢字 漢字, {braces} ~ ^ \\n < > _",
    "",
    "x",
    "▁already ▁▁ there",
]
OWN = '{"id": "0", "question": "q", "answer": "x"}\n'


@cache
def real(split):
    return data.load(SCIENCEQA, split)


@cache
def by_pid():
    return {problem.id: problem for problem in data.load(REAL / "mathvista", "testmini")}


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


def write_image(path, size=(40, 30), colour=(200, 30, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def with_images(folder, count, start=0):
    """Problems with images of their own, one with another's image, one without."""
    records = {str(i): record(image="image.png") for i in range(start, start + count)}
    for i in range(start, start + count):
        write_image(folder / f"images/test/{i}/image.png", (40 + i % 7, 30), (i % 256, 7, 9))
    records |= {"copy": record(image="image.png"), "none": record()}
    write_image(folder / "images/test/copy/image.png", (40 + start % 7, 30), (start % 256, 7, 9))
    return data.load(scienceqa(folder, records), "test")


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


def asked(**changes):
    fields = dict.fromkeys(("hint", "lecture", "solution"), "") | {"id": "1", "image": None}
    fields |= {"question": "Which is it?", "choices": ("rope", "belt", "neither")}
    fields |= {"answer": "belt", "meta": {"answer_index": 1}}
    return data.Problem(**fields | changes)


def trace(thought="It is long.", answer="(C)", correct=True):
    return {"id": "1", "thought": thought, "answer": answer, "verdict": {"correct": correct}}


def field(number, value):
    """One field of a protobuf message: varint, float or bytes."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def zipped(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for entry, content in entries:
            file.writestr(entry, content)
    return buffer.getvalue()
