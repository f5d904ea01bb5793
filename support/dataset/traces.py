"""A teacher's traces, in every form they come in, and whether training leaks into the test.

Here: traces as teacher.py writes them; the files of github.com/axeld5/pali_reason, whose
teacher was Gemini and whose judge was Claude; the pictures that two splits share; what
MathVista (Lu et al., arXiv 2310.02255) may be used for.

Left out on purpose: writing traces (ledger.py), choosing among them (records.py), the row that is
made of one (data.pali_suffix).
"""

import contextlib
import csv
import functools
import hashlib
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.dataset import images as pictures
from support.files import (
    field,
    is_index,
    json_lines,
    noted,
    progress,
    read_json,
    regular_file,
    unix_newlines,
)


def load_traces(path, skipped=None):
    """A teacher's traces: dicts of id, question, thought, answer, gold, verdict and teacher.

    path     Trace JSONL as teacher.py writes it, or a file of github.com/axeld5/pali_reason:
             training.csv, training_correct.csv, training_dict.json and its shorter versions.
    id       the problem's; several traces may have the same one.
    verdict  {"correct", "consistent", "by", "why"}; like gold and teacher, None where not known.
    kept, stop, reply  as teacher.py wrote them, where it did.

    Traces without a thought (a failed call) are left out and counted on stderr; one without an
    answer was cut, or thought in circles. Bad ones are left out and added to the list `skipped`, as
    data.load does it.
    """
    path = Path(path)
    readers = {".csv": _pali_reason_csv, ".json": _pali_reason_json}
    readers[".jsonl"] = functools.partial(json_lines, may_be_torn=True, skipped=skipped)
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a file of traces: they end in {', '.join(readers)}.")
    traces = []
    for where, record in readers[path.suffix](path):
        with noted(skipped, where.rpartition(", ")[2]):
            traces.append(_trace(record, where))
    whole = [trace for trace in traces if trace["thought"].strip()]
    if not whole:
        raise ValueError(f"{path} has no trace with a thought.")
    if len(whole) < len(traces):
        count = f"{len(traces) - len(whole)} of {len(traces)}"
        print(f"{path}: left out {count} traces without a thought.", file=sys.stderr)
    return whole


def traces_of(ids, path, where):
    """{problem id: its traces} of these ids, in the order of the file; ValueError if there is none.

    where  what the problems are, for the sentence. Traces of others are counted on stderr.
    """
    traces, found = load_traces(path), {}
    for trace in (trace for trace in traces if trace["id"] in ids):
        found.setdefault(trace["id"], []).append(trace)
    if not found:
        raise ValueError(f"{path} has no trace of a problem of {where}.")
    others = len(traces) - sum(map(len, found.values()))
    if others:
        print(f"{path}: {others} traces are of no problem here.", file=sys.stderr)
    return found


def _trace(record, where):
    """A checked trace; a text that is null is empty, a verdict that is missing is not known."""
    trace = {"id": str(field(record, "id", str | int, where))}
    for key in ("question", "thought", "answer"):
        trace[key] = unix_newlines(field(record, key, str | None, where) or "")
    for key, kind in (("gold", str | int | float), ("teacher", str)):
        there = record.get(key) is not None
        trace[key] = unix_newlines(field(record, key, kind, where)) if there else None
    verdict = dict.fromkeys(("correct", "consistent", "by", "why"))
    verdict |= field({"verdict": record.get("verdict") or {}}, "verdict", dict, where)
    for key in ("correct", "consistent"):
        if not isinstance(verdict[key], bool | None):
            raise ValueError(f'{where}: "{key}" is {verdict[key]!r}, not true, false or null.')
    for key, kind in (("kept", bool), ("stop", str), ("reply", dict)):  # only teacher.py has them
        if not isinstance(record.get(key, kind()), kind):
            found = f"{record[key]!r:.60}, which is not of type {kind.__name__}"
            raise ValueError(f'{where}: "{key}" is {found}.')
        trace |= {key: record[key]} if key in record else {}
    for key in ("thought", "answer") if "reply" in record else ():
        field(record["reply"], key, str, f"{where}, reply")
    return trace | {"verdict": verdict}


_GEMINI, _CLAUDE = "gemini-2.0-flash-thinking-exp", "claude-3-5-sonnet-20241022"


def _pali_reason_csv(path):
    """pali_reason's CSV; `validity` is Claude's word, and only the rows it accepted were kept."""
    names = {"question": "questions", "thought": "thoughts", "answer": "generated_answers"}
    names |= {"gold": "true_answers", "index": "indexes"}
    try:
        with open(regular_file(path), newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file that can be read ({error}).") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        record = {ours: field(row, theirs, str, where) for ours, theirs in names.items()}
        if not is_index(record["index"]):
            raise ValueError(f'{where}: "indexes" is {record["index"][:60]!r}, not a position.')
        verdict = {"correct": row["validity"] == "yes", "by": _CLAUDE} if "validity" in row else {}
        id = int(record["index"]) + 1  # positions count from 0, MathVista's ids from 1
        yield where, record | {"id": id, "verdict": verdict, "teacher": _GEMINI}


def _pali_reason_json(path):
    """pali_reason's training_dict.json: only what was judged correct. The image tells the id."""
    columns = read_json(path)
    lists = [field(columns, key, list, path) for key in ("prefixes", "suffixes", "images")]
    if len({len(column) for column in lists}) != 1:
        raise ValueError(f"{path}: prefixes, suffixes and images are not equally many.")
    for number, (prefix, suffix, image) in enumerate(zip(*lists, strict=True), 1):
        where = f"{path}, entry {number}"
        parts = re.fullmatch(r"Thoughts:\n(.*)\nAnswer:\n(.*)", str(suffix), re.DOTALL)
        named = re.search(r"(mathvista_images/)?([0-9]{1,9})\.\w{1,9}$", str(image))
        if not parts or not named:
            raise ValueError(f"{where}: no thoughts and answer, or an image that is not a number.")
        id = int(named[2]) + (named[1] is not None)  # the original's own folder counts from 0
        record = {"id": id, "question": prefix, "thought": parts[1], "answer": parts[2]}
        yield where, record | {"verdict": {"correct": True, "by": _CLAUDE}, "teacher": _GEMINI}


def overlap(train, test):
    """[(train id, test id), ...] of problems whose pictures are the same pixel by pixel.

    Hashed are size and decoded RGB pixels, so a copy of the file and a lossless copy in another
    format are found; a JPEG copy, a crop or another size is not. (Hashes that survive JPEG take
    diagrams for one another: 8 x 8 average hashes join 3,717 pairs of 1,060 ScienceQA pictures, the
    pixels 179.) Problems may share a picture and no answer, as many of ScienceQA do: whether a pair
    is a leak is for the caller to say. Pictures that cannot be read are counted on stderr.
    """
    ids = {}
    for id, pixels in _pixel_hashes(train):
        ids.setdefault(pixels, []).append(id)
    return [(seen, id) for id, pixels in _pixel_hashes(test) for seen in ids.get(pixels, [])]


def _pixel_hashes(problems):
    """(id, sha256 of the decoded picture) of all problems whose picture can be read."""

    def pixels(problem):
        with contextlib.suppress(OSError, ValueError):
            image = pictures.open_image(problem.image)
            return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()

    pictured, made = [problem for problem in problems if problem.image is not None], []
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for problem, sha in zip(pictured, pool.map(pixels, pictured), strict=True):
            made.append((problem.id, sha))
            progress("pictures", len(made), len(pictured), start)
    readable = [pair for pair in made if pair[1] is not None]
    if len(readable) < len(made):
        count = f"{len(made) - len(readable)} of {len(made)}"
        print(f"{count} pictures cannot be read and were not compared.", file=sys.stderr)
    return readable


def training_notice(where):
    """What to tell somebody who trains on this data set: a text for MathVista, else ""."""
    if where != "mathvista" and not Path(where, "annot_testmini.json").is_file():
        return ""
    return (
        "MathVista is a test set: its authors license it for testing, not for training. Scores on "
        "testmini of a model trained on part of it are contaminated; report them only for the "
        "problems it was not trained on (split test) and say so. See dataset/traces.py, overlap."
    )
