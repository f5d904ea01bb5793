"""support/dataset/traces.py: a teacher's traces, pali_reason's files, images two splits share."""

import csv
import json
import time

import numpy as np
import pytest
from PIL import Image
from samples import (
    REAL,
    annotation,
    asked,
    by_pid,
    mathvista,
    needs,
    needs_mathvista,
    needs_traces,
    scienceqa,
)

import data
from support.dataset.choices import final_answer
from support.dataset.images import open_image
from support.dataset.traces import load_traces, overlap, training_notice


def test_training_notice(tmp_path):
    folder = mathvista(tmp_path / "vista", annotation(1))
    for where in ("mathvista", folder, str(folder)):
        assert "MathVista" in training_notice(where)
    for where in ("demo", "scienceqa", scienceqa(tmp_path / "qa"), tmp_path / "own.jsonl"):
        assert training_notice(where) == ""


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
    path = lines(tmp_path / "traces.jsonl", LINE, unjudged, failed, bare)
    judged, again, third = load_traces(path)
    kept = {key: LINE[key] for key in ("thought", "answer", "gold", "verdict", "teacher")}
    assert judged == {"id": "7", "question": "q\nr"} | kept
    unknown = dict.fromkeys(VERDICT)
    assert again == judged | {"gold": None, "verdict": unknown}
    assert third == again | {"teacher": None}
    assert "1 of 4 traces" in capsys.readouterr().err


def test_traces_of_an_interrupted_teacher(tmp_path, capsys):
    torn = json.dumps(LINE)[:30]
    path = lines(tmp_path / "traces.jsonl", LINE, end="\n" + torn)
    assert len(load_traces(path)) == 1
    assert "traces.jsonl, line 2" in capsys.readouterr().err
    path = lines(tmp_path / "traces.jsonl", LINE, LINE, end="")  # whole without a last newline
    assert len(load_traces(path)) == 2 and not capsys.readouterr().err
    for text in (torn + "\n", torn + "\n" + json.dumps(LINE)):
        path.write_text(json.dumps(LINE) + "\n" + text)
        with pytest.raises(ValueError, match="traces.jsonl, line 2"):
            load_traces(path)


BAD_TRACES = [("correct", {"verdict": {"correct": "no"}}), ("answer", {"reply": {"thought": "t"}})]
BAD_TRACES += [("verdict", {"verdict": value}) for value in ("yes", [1])]
BAD_TRACES += [("id", {"id": value}) for value in (None, True, ...)]
BAD_TRACES += [("gold", {"gold": value}) for value in (["B"], float("nan"))]
OTHERS = {"thought": 5, "answer": ..., "teacher": 5, "kept": "yes", "stop": 5}
BAD_TRACES += [(key, {key: value}) for key, value in OTHERS.items()]


@pytest.mark.parametrize("key, changes", BAD_TRACES)
def test_bad_traces(tmp_path, key, changes):
    entry = {k: v for k, v in (LINE | changes).items() if v is not Ellipsis}
    path = lines(tmp_path / "traces.jsonl", entry)
    with pytest.raises(ValueError, match=f'{path}, line 1.*"{key}"'):
        load_traces(path)


def test_files_without_a_trace(tmp_path):
    for entry in ([], LINE | {"thought": " "}):
        path = lines(tmp_path / "traces.jsonl", entry)
        with pytest.raises(ValueError, match=str(path)):
            load_traces(path)


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
    assert "1 of 3 traces" in capsys.readouterr().err
    unjudged = table(tmp_path / "b.csv", ROW[:5], columns=COLUMNS[:5])
    [third] = load_traces(unjudged)
    assert third == first | {"verdict": dict.fromkeys(VERDICT)}
    columns = {"prefixes": ["q\r\n1"] * 2, "suffixes": ["Thoughts:\nthink\nhard\nAnswer:\n(B)"] * 2}
    columns["images"] = ["mathvista_images/41.png", "mathvista/images/42.jpg"]  # theirs, and by pid
    (tmp_path / "c.json").write_text(json.dumps(columns))
    assert load_traces(tmp_path / "c.json") == [first | {"gold": None}] * 2


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig"))  # the second as Excel saves it
@pytest.mark.parametrize("index", ("9" * 5000, "²", "-1", "", "x"))
def test_evil_positions(tmp_path, index, encoding):
    path = table(tmp_path / "t.csv", ROW)
    text = path.read_bytes().decode()
    path.write_bytes(text.encode(encoding))
    assert load_traces(path)[0]["id"] == "42"
    path.write_bytes(text.replace("41", index).encode(encoding))
    with pytest.raises(ValueError, match='row 1.*"indexes"'):
        load_traces(path)


SUFFIX = "Thoughts:\nt\nAnswer:\nB"
BAD_JSON = [
    ({"suffixes": ["no thoughts"]}, "c.json, entry 1"),
    ({"images": []}, "c.json.*images"),
    ({"images": ...}, 'c.json.*"images"'),
]
# Names without a number, some of which would take a careless pattern for ever.
NAMES = ("a.jpg", "9" * 10**6, "²²", "9." + "a" * 10**6)
BAD_JSON += [({"images": [name]}, "c.json, entry 1") for name in NAMES]


def test_bad_pali_reason(tmp_path):
    start = time.process_time()
    for changes, names in BAD_JSON:
        columns = {"prefixes": ["q"], "suffixes": [SUFFIX], "images": ["images/4.jpg"]} | changes
        columns = {key: value for key, value in columns.items() if value is not Ellipsis}
        (tmp_path / "c.json").write_text(json.dumps(columns))
        with pytest.raises(ValueError, match=names):
            load_traces(tmp_path / "c.json")
    assert time.process_time() - start < 2
    with pytest.raises(ValueError, match='a.csv, row 1.*"indexes"'):
        load_traces(table(tmp_path / "a.csv", ROW[:4], columns=COLUMNS[:4]))
    with pytest.raises(ValueError, match='row 1.*"generated_answers"'):
        load_traces(table(tmp_path / "a.csv", ROW[:2]))
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.csv"):
        load_traces(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="traces.txt"):
        load_traces(tmp_path / "traces.txt")
    for name in ("none.csv", "none.json", "none.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            load_traces(tmp_path / name)


@needs_traces
@needs_mathvista
def test_real_traces(capsys):
    names = ("training.csv", "training_correct.csv", "training_dict.json")
    names += ("truncated_training_dict.json", "truncated_training_dict_v2.json")
    every, kept, listed, short, longer = (load_traces(REAL / "pali_reason" / n) for n in names)
    assert list(map(len, (every, kept, listed, short, longer))) == [335, 251, 251, 32, 100]
    assert "10 of 345 traces" in capsys.readouterr().err
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
    assert "1 of 5 images cannot be read and were not compared" in capsys.readouterr().err
    assert overlap(train, []) == [] and not capsys.readouterr().err


@pytest.mark.slow
@needs("scienceqa/images/test")
def test_overlap_of_real_scienceqa():
    train, test = data.load(REAL / "scienceqa", "val"), data.load(REAL / "scienceqa", "minitest")
    shared = overlap(train, test)
    assert (len(shared), len({id for _, id in shared})) == (3, 3)
    by_id = {problem.id: problem for problem in train + test}
    for pair in shared:
        one, two = (open_image(by_id[id].image) for id in pair)
        assert one.size == two.size and one.tobytes() == two.tobytes()
