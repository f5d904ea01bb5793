"""A teacher's traces, in every form they come in, and whether training leaks into the test.

Traces as teacher.py writes them; the files of github.com/axeld5/pali_reason, whose teacher was
Gemini and whose judge was Claude; the images that two splits share.
"""

import contextlib
import csv
import hashlib
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support import files
from support.dataset.images import open_image
from support.files import field, is_index, noted, read_json, regular_file, unix_newlines


def load_traces(path: str | Path, skipped: list | None = None) -> list[dict]:
    """A teacher's traces: dicts of id, question, thought, answer, gold, verdict and teacher.

    path     JSONL as teacher.py writes it (then also with kept, stop and reply), or pali_reason's
             training.csv, training_correct.csv, training_dict.json and its shorter versions.
    id       the problem's; several traces may have the same one.
    verdict  {"correct", "consistent", "by", "why"}; like gold and teacher, None where not known.

    Traces without a thought (a failed call) are left out and counted on stderr; one without an
    answer was cut, or repeated itself. With a list `skipped`, bad ones are left out and added to
    it, as in data.load. ValueError if no trace is left.
    """
    path = Path(path)
    readers = {
        ".csv": pali_reason_csv,
        ".json": pali_reason_json,
        ".jsonl": lambda path: files.json_lines(path, may_be_torn=True, skipped=skipped),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a file of traces: they end in {', '.join(readers)}.")
    traces = []
    for where, record in readers[path.suffix](path):
        with noted(skipped, where.rpartition(", ")[2]):
            traces.append(checked_trace(record, where))
    kept = [trace for trace in traces if trace["thought"].strip()]
    if not kept:
        raise ValueError(f"{path} has no trace with a thought.")
    if len(kept) < len(traces):
        count = f"{len(traces) - len(kept)} of {len(traces)}"
        print(f"{path}: left out {count} traces without a thought.", file=sys.stderr)
    return kept


def traces_of(ids: Collection[str], path: str | Path, source: str) -> dict[str, list[dict]]:
    """{problem id: its traces} of these ids, in the order of the file; ValueError if there is none.
    Traces of other problems are counted on stderr. `source` names the problems in the error."""
    traces = load_traces(path)
    matches = {}
    for trace in traces:
        if trace["id"] in ids:
            matches.setdefault(trace["id"], []).append(trace)
    if not matches:
        raise ValueError(f"{path} has no trace of a problem of {source}.")
    others = len(traces) - sum(map(len, matches.values()))
    if others:
        print(f"{path}: {others} traces are of no problem here.", file=sys.stderr)
    return matches


OPTIONAL = {"gold": str | int | float, "teacher": str, "stop": str, "reply": dict}


def checked_trace(record: dict, where: str) -> dict:
    """A trace; a text that is null becomes empty, a missing verdict unknown (None)."""
    trace = {"id": str(field(record, "id", str | int, where)), "gold": None, "teacher": None}
    for key in ("question", "thought", "answer"):
        trace[key] = unix_newlines(field(record, key, str | None, where) or "")
    for key, kind in OPTIONAL.items():
        if record.get(key) is not None:
            trace[key] = unix_newlines(field(record, key, kind, where))
    for key in ("thought", "answer") if "reply" in trace else ():
        field(trace["reply"], key, str, f"{where}, reply")
    verdict = dict.fromkeys(("correct", "consistent", "by", "why"))
    verdict |= field({"verdict": record.get("verdict") or {}}, "verdict", dict, where)
    for owner, key in ((verdict, "correct"), (verdict, "consistent"), (record, "kept")):
        if not isinstance(owner.get(key), bool | None):
            raise ValueError(f'{where}: "{key}" is {owner[key]!r:.60}, not true, false or null.')
    if record.get("kept") is not None:
        trace["kept"] = record["kept"]
    return trace | {"verdict": verdict}


GEMINI = "gemini-2.0-flash-thinking-exp"
CLAUDE = "claude-3-5-sonnet-20241022"


def pali_reason_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """pali_reason's CSV; `validity` is Claude's verdict, and only rows it accepted were kept."""
    columns = {
        "question": "questions",
        "thought": "thoughts",
        "answer": "generated_answers",
        "gold": "true_answers",
    }
    try:
        with open(regular_file(path), newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file that can be read ({error}).") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        record = {key: field(row, column, str, where) for key, column in columns.items()}
        index = field(row, "indexes", str, where)
        if not is_index(index):
            raise ValueError(f'{where}: "indexes" is {index[:60]!r}, not a position.')
        record["id"] = int(index) + 1  # positions count from 0, MathVista's ids from 1
        record["teacher"] = GEMINI
        if "validity" in row:
            record["verdict"] = {"correct": row["validity"] == "yes", "by": CLAUDE}
        yield where, record


def pali_reason_json(path: Path) -> Iterator[tuple[str, dict]]:
    """pali_reason's training_dict.json: only traces judged correct. The image's name has the id."""
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
        yield where, record | {"verdict": {"correct": True, "by": CLAUDE}, "teacher": GEMINI}


def overlap(train: Sequence, test: Sequence) -> list[tuple[str, str]]:
    """[(train id, test id), ...] of problems whose images have the same size and RGB pixels.

    So a copy of the file or a lossless one in another format is found; a JPEG copy, a crop or
    another size is not. (Hashes that survive JPEG mistake diagrams for one another: 8 x 8 average
    hashes join 3,717 pairs of 1,060 ScienceQA images, the pixels 179.) Problems may share an image
    and no answer: whether a pair is a leak is for the caller to decide. Images that cannot be read
    are counted on stderr.
    """
    ids = {}
    for id, digest in pixel_hashes(train):
        ids.setdefault(digest, []).append(id)
    return [(one, two) for two, digest in pixel_hashes(test) for one in ids.get(digest, [])]


def pixel_hashes(problems: Sequence) -> list[tuple[str, bytes]]:
    """(id, sha256 of the decoded image) of all problems whose image can be read."""

    def pixel_hash(problem: object) -> bytes | None:
        with contextlib.suppress(OSError, ValueError):
            image = open_image(problem.image)
            return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()

    with_image = [problem for problem in problems if problem.image is not None]
    start = time.monotonic()
    hashes = []
    with ThreadPoolExecutor(4) as pool:
        for count, digest in enumerate(pool.map(pixel_hash, with_image), 1):
            hashes.append(digest)
            files.progress("images", count, len(with_image), start)
    if None in hashes:
        count = f"{hashes.count(None)} of {len(hashes)}"
        print(f"{count} images cannot be read and were not compared.", file=sys.stderr)
    return [(p.id, digest) for p, digest in zip(with_image, hashes, strict=True) if digest]


def training_notice(where: str | Path) -> str:
    """A warning for whoever trains on this data set: a text for MathVista, else ""."""
    if where != "mathvista" and not Path(where, "annot_testmini.json").is_file():
        return ""
    return (
        "MathVista is a test set: its authors license it for testing, not for training. Scores on "
        "testmini of a model trained on part of it are contaminated; report them only for the "
        "problems it was not trained on (split test) and say so. See support/dataset/traces.py."
    )
