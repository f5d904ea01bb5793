r"""Problems, prompts, batches and pictures: from the files on disk to the tensors of a batch.

Here: one `Problem` record for ScienceQA in its original layout (Lu et al., arXiv 2209.09513),
MathVista's testmini (Lu et al., arXiv 2310.02255), your own JSONL and the built-in demo; a
teacher's traces; the prompt formats of Multimodal-CoT (Zhang et al., arXiv 2302.00923,
github.com/amazon-science/mm-cot), byte for byte; PaliGemma's sequence (Beyer et al., arXiv
2407.07726); tokenizers; padding and bucketing; the input pixels of DETR and SigLIP and a cache for
what they make of them; the published feature files; the downloads.

Left out on purpose: models (`cached_features` is handed a function), scoring (eval.py), parquet
files on the Hub (ScienceQA's has no problem ids, so captions and published features cannot be
joined to it), few-shot prompts.

A problem as problems.json has it, and what `prompt(problem, "QCM-LE")` makes of it:

    "7": {"question": "Will these magnets attract or repel each other?",
          "choices": ["attract", "repel"], "answer": 1, "hint": "Two magnets are shown.",
          "image": "image.png", "lecture": "Poles push or pull.\nLike poles repel.",
          "solution": "Two north poles meet.", "split": "train", "subject": "natural science", ...}

    source  Question: Will these magnets attract or repel each other? Context: Two magnets are
            shown. Options: (A) attract (B) repel Solution:
    target  Solution: Poles push or pull. // Like poles repel. Two north poles meet..

The doubled full stop is the original's. " // " stands for the newline (see `prompt`).

The same problem as a row for PaliGemma (`sequence`) with a trace of a teacher, at 256 image tokens:

    <image><image> ... <image><bos>reason en Will these magnets attract or repel each other?
    Hint: Two magnets are shown.
    Choices: (A) attract (B) repel
    Two north poles face each other, and like poles repel.
    Answer: B<eos>

In the loss are the last two lines, from "Two north" to <eos>.

Axes: B batch, T length, U target length; N pictures, n of them in a batch, each P positions of F
features, for PaliGemma I tokens of D; H W pixels down and across, S both of a square.
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import stat
import string
import struct
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence

# Axes: B batch, T source tokens, U target tokens, P picture positions, F their features, N rows of
# a feature file, H and W pixels; for PaliGemma T tokens of a row, I image tokens of a picture, D
# their width, S pixels a side.

SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest", "testmini")
LETTERS = "ABCDEFGHIJ"
NEWLINE = " // "
MOST_BYTES = 1 << 28  # of a JSON file; all of ScienceQA takes about a tenth
MOST_LINE = 1 << 24  # bytes of a line of JSONL
MOST_TEXT = 100_000  # characters of one text of a problem; the longest seen has 3,076


# --- Problems -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One question of any data set.

    answer  the gold text; of a multiple-choice question, one of `choices`.
    image   a path, or None. ScienceQA: image.png, else choice_0.png, as Multimodal-CoT has it.
    meta    answer_index (None without choices), split, caption ("" if none), has_image, and what
            else the record says (subject, grade, topic, category, skill, task). has_image is what
            the IMG score counts: a picture of the question, not one of the choices.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: str
    hint: str
    image: str | None
    lecture: str
    solution: str
    meta: dict


def load(where, split, skipped=None):
    """The problems of one split, in file order.

    where    a folder in ScienceQA's or MathVista's layout, a .jsonl file, "demo", or "scienceqa" or
             "mathvista" (downloaded).
    skipped  a list: bad records are left out and added to it, as (id, reason). By default the first
             one is the error. (`unusable` has the pictures.)
    Raises FileNotFoundError or ValueError with a sentence that names the file and the problem.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    downloaded = where in ("scienceqa", "mathvista")
    path = cache_folder() / where if downloaded else Path(where)
    if where == "demo":
        path = demo_folder()
    if path.suffix == ".jsonl":
        return _own_jsonl(path, split, skipped)
    if os.path.isfile(path / "problems.json"):
        return _scienceqa(path, split, skipped)
    if os.path.isfile(path / "annot_testmini.json"):
        return _mathvista(path, split, skipped)
    if downloaded:
        raise FileNotFoundError(f"{path} is empty: run `python data.py {where}` to fill it.")
    raise FileNotFoundError(
        f"{path} is neither a folder with problems.json or annot_testmini.json nor a .jsonl file."
    )


def cache_folder():
    """Where downloads and the demo live: $NANOCOT_CACHE, by default ~/.cache/nanocot."""
    return Path(os.environ.get("NANOCOT_CACHE") or Path.home() / ".cache" / "nanocot")


def demo_folder():
    """The demo, drawn at first use. The folder's name has a hash of the script that draws it."""
    from demo import scenes

    script = Path(scenes.__file__).read_bytes()
    folder = cache_folder() / f"demo-{hashlib.sha256(script).hexdigest()[:10]}"
    if not folder.is_dir():
        try:
            scenes.write(folder)  # appears whole or not at all
        except OSError:
            if not folder.is_dir():  # else another run drew it meanwhile: it is the same
                raise
    return folder


def regular_file(path):
    """The path of a file that can be read. What looks like one and has no end is refused unread."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # a loop of links, a name with a NUL, too long a name
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a folder, a pipe or a device where a file is needed.")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read by this user: change its permissions.")
    return Path(path)


def read_json(path):
    """Parsed JSON; a missing or broken file is an error that names it."""
    if (size := os.path.getsize(regular_file(path))) > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes; JSON of over {MOST_BYTES} is not read.")
    try:
        return parsed(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); fetch it again.") from None


def parsed(content):
    """What JSON bytes say. Half a surrogate pair ("\\ud83d", an emoji cut in two), which neither a
    tokenizer nor a file can take, becomes U+FFFD."""
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_distinct)
        if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
            text = re.sub(r"[\ud800-\udfff]", "\ufffd", json.dumps(value, ensure_ascii=False))
            value = json.loads(text, object_pairs_hook=_distinct)
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _distinct(pairs):
    """A JSON object; with one key twice one of the two values would be lost without a word."""
    if len(made := dict(pairs)) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return made


def _field(record, key, kind, where, default=None):
    """record[key], with its type checked; without a default it must be there."""
    if not isinstance(record, dict) or (key not in record and default is None):
        raise ValueError(f'{where} has no "{key}".')
    value = record.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        name = getattr(kind, "__name__", kind)
        raise ValueError(f'{where}: "{key}" is {value!r:.60}, which is not of type {name}.')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{where}: "{key}" is {value}, which is no number to work with.')
    return value


def _inside(folder, relative, where):
    """folder/relative, refused if it leads out of the folder: data files come from strangers."""
    path = os.path.join(folder, relative)  # strings: pathlib takes half of the time to load
    root = os.path.join(os.path.abspath(folder), "")
    if not os.path.join(os.path.abspath(path), "").startswith(root):
        raise ValueError(f"{where}: {relative} is outside {folder}; move it below that folder.")
    return Path(path)


@contextlib.contextmanager
def _noted(skipped, id):
    """A bad record is an error or, where there is a list, an entry (id, reason) of it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if skipped is None:
            raise
        skipped.append((id, str(error)))


def _problem(id, record, where, image, caption=""):
    """A checked Problem; the record's other keys go to meta."""
    choices = tuple(_field(record, "choices", list, where, []))
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'{where}: "choices" is not a list of texts.')
    answer, index = _field(record, "answer", str | int | float, where), None
    if choices:
        index = choices.index(answer) if answer in choices else answer
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise ValueError(
                f'{where}: "answer" is {answer!r}, but there are {len(choices)} choices: '
                "it must be one of their texts or an index that counts from 0."
            )
        answer = choices[index]
    meta = {key: value for key, value in record.items() if key not in Problem.__dataclass_fields__}
    meta |= {"answer_index": index, "has_image": record.get("image") is not None}
    texts = [_field(record, key, str, where, "") for key in ("hint", "lecture", "solution")]
    question = _field(record, "question", str, where)
    for key in ("split", "caption"):
        _field(meta, key, str, where, "")
    longest = max(map(len, [question, str(answer), *choices, *texts]))
    if longest > MOST_TEXT:
        raise ValueError(f"{where}: a text has {longest} characters; {MOST_TEXT} are the most.")
    return Problem(
        id=id,
        question=question,
        choices=choices,
        answer=str(answer),
        hint=texts[0],
        image=None if image is None else str(image),
        lecture=texts[1],
        solution=texts[2],
        meta={"split": "train", "caption": caption} | meta,
    )


def _scienceqa(folder, split, skipped=None):
    file, splits = folder / "problems.json", folder / "pid_splits.json"
    records, captions = _field({"problems": read_json(file)}, "problems", dict, file), {}
    pids = _field(read_json(splits), split, list, splits)
    if not all(isinstance(pid, str) for pid in pids) or len(set(pids)) < len(pids):
        raise ValueError(f"{splits}: {split} is not a list of different problem ids.")
    if (folder / "captions.json").is_file():
        captions = read_json(folder / "captions.json")
        captions = _field(captions, "captions", dict, folder / "captions.json")
    problems, found = [], [pid for pid in pids if pid in records]
    for pid in found:
        with _noted(skipped, pid):
            record, where = records[pid], f"{file}, problem {pid:.60}"
            for key in ("choices", "hint", "image", "lecture", "solution", "subject", "grade"):
                _field(record, key, object, where)  # null is checked below, where it is wrong
            pictures = f"images/{_field(record, 'split', str, where)}/{pid}"
            image = _inside(folder, pictures, where) / "image.png"
            if record["image"] is None:  # the choices may still have pictures
                image = image.with_name("choice_0.png")
                image = image if os.path.isfile(image) else None
            caption = _field(captions, pid, str, folder / "captions.json", "")
            problems.append(_problem(pid, record, where, image, caption))
    missing = len(pids) - len(found)
    if not problems:
        none = f"{file} has none of the {missing} problems of the split {split}."
        raise ValueError(skipped[0][1] if skipped else none)
    if missing:
        print(f"{file} lacks {missing} of the {len(pids)} problems of {split}.", file=sys.stderr)
    return problems


_MATHVISTA = {  # split: positions in testmini. pali_reason trained on 0..349, tested on 351..999
    "train": range(300),
    "val": range(300, 350),
    "trainval": range(350),
    "test": range(351, 1000),
    "testmini": range(1000),
}


def _mathvista(folder, split, skipped=None):
    """MathVista (Lu et al., arXiv 2310.02255): the 1,000 testmini problems, the only public ones.

    hint is the first line of `query`: what the answer should look like. The image is the file the
    annotation names, or else images/{pid}.jpg or .png; without any, opening it is the error.
    """
    file = folder / "annot_testmini.json"
    if split not in _MATHVISTA:
        raise ValueError(f"{file} has no split {split}, only {', '.join(_MATHVISTA)}.")
    problems, records = [], read_json(file)
    for pid, record in _field({"pids": records}, "pids", dict, file).items():
        where = f"{file}, problem {pid:.60}"
        with _noted(skipped, pid):
            if not _is_index(pid):
                raise ValueError(f"{where}: the id is not a number that counts from 1.")
            if int(pid) - 1 not in _MATHVISTA[split]:
                continue
            image = _inside(folder, _field(record, "image", str, where), where)
            others = [folder / "images" / f"{pid}{ending}" for ending in (".jpg", ".png")]
            image = next((path for path in (image, *others) if os.path.isfile(path)), image)
            record = {key: _unix(value) for key, value in record.items()}
            hint = _field(record, "query", str, where).partition("\n")[0]
            record |= _field(record, "metadata", dict, where)
            record |= {"choices": record.get("choices") or []}
            record["hint"] = hint.removeprefix("Hint: ") if hint.startswith("Hint: ") else ""
            del record["metadata"]  # its fields are in the record now
            known = {key: value for key, value in record.items() if value is not None}
            if not 0 <= _field(known, "precision", int | float, where, 0) < 9:
                raise ValueError(f'{where}: "precision" is no number of decimals.')
            problems.append(_problem(pid, record, where, image))
    if not problems:
        none = f"{file} has none of the problems of the split {split}."
        raise ValueError(skipped[0][1] if skipped else none)
    return problems


def _is_index(text):
    """Whether a text is a number that counts; int() refuses thousands of digits."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def _unix(text):
    """The text, or whatever else it is, with every CR LF a newline."""
    return text.replace("\r\n", "\n") if isinstance(text, str) else text


def training_notice(where):
    """What to tell somebody who trains on this data set: a text for MathVista, else ""."""
    if where != "mathvista" and not Path(where, "annot_testmini.json").is_file():
        return ""
    return (
        "MathVista is a test set: its authors license it for testing, not for training. Scores on "
        "testmini of a model trained on part of it are contaminated; report them only for the "
        "problems it was not trained on (split test) and say so. See data.overlap."
    )


def _own_jsonl(file, split, skipped=None):
    """Your own data, one JSON object a line.

        {"id": "a1", "question": "Which is longer?", "choices": ["rope", "belt"], "answer": 0,
         "image": "pictures/a1.jpg", "hint": "", "lecture": "", "solution": "", "split": "test"}

    Required: id, question, answer. `answer` is one of the choices' texts or an index; without
    choices, any text. `image` is relative to the file and below its folder. Without `split` a
    record is training data. Other keys (caption, subject, grade) go to meta.
    """
    wanted = ("train", "val") if split == "trainval" else (split,)
    problems, seen = [], set()
    for where, record in json_lines(file, skipped=skipped):
        told = record if isinstance(record, dict) else {}
        elsewhere = told.get("split", "train") in [x for x in SPLITS if x not in wanted]
        bad = [] if elsewhere and skipped is not None else skipped  # it is skipped there
        with _noted(bad, str(told.get("id") or where.rpartition(", ")[2])):
            id = str(_field(record, "id", str | int, where))
            if id in seen:
                raise ValueError(f"{where}: the id {id[:60]!r} was used before.")
            seen.add(id)
            image = record.get("image")
            if image is not None:
                image = _inside(file.parent, _field(record, "image", str, where), where)
            problems.append(_problem(id, record, f"{where} (id {id:.60})", image))
    problems = [problem for problem in problems if problem.meta["split"] in wanted]
    if not problems:
        none = f'{file} has no record with "split": "{split}" (the default is "train").'
        raise ValueError(skipped[0][1] if skipped else none)
    return problems


def json_lines(file, may_be_torn=False, skipped=None):
    """(where, record) of each line; may_be_torn: a last line without its end is left out."""
    with open(regular_file(file), "rb") as lines:
        for number in itertools.count(1):
            where, line = f"{file}, line {number}", lines.readline(MOST_LINE)
            if not line:
                return
            if len(line) == MOST_LINE:
                raise ValueError(f"{where} has {MOST_LINE} bytes or more: no record is so long.")
            try:
                record = parsed(line) if line.strip() else None
            except ValueError as error:
                if may_be_torn and not line.endswith(b"\n"):
                    print(f"{where} was skipped: its writer was interrupted.", file=sys.stderr)
                    return
                with _noted(skipped, f"line {number}"):
                    raise ValueError(f"{where} is not complete JSON ({error}).") from None
                continue
            if line.strip():
                yield where, record


def unusable(problems, look=None):
    """[(problem id, reason)] of the problems that cannot be asked, in their order.

    look  what has to be possible with a picture's path, by default only to read the file:
          `open_image` decodes it whole.
    """
    look, start, reasons = look or regular_file, time.monotonic(), []

    def reason(problem):
        try:
            _options(problem)
            problem.image is None or look(problem.image)
        except (OSError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        for problem, why in zip(problems, pool.map(reason, problems), strict=True):
            reasons.append((problem.id, why))
            progress("problems", len(reasons), len(problems), start)
    return [pair for pair in reasons if pair[1] is not None]


def write_skipped(skipped, path):
    """(id, reason) or (id, reason, split) as JSONL, {"id", "reason", "split"?} a line."""
    keys = ("id", "reason", "split")
    rows = [json.dumps(dict(zip(keys, entry, strict=False))) for entry in skipped]
    Path(path).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def load_traces(path, skipped=None):
    """A teacher's traces: dicts of id, question, thought, answer, gold, verdict and teacher.

    path     Trace JSONL as teacher.py writes it, or a file of github.com/axeld5/pali_reason:
             training.csv, training_correct.csv, training_dict.json and its shorter versions.
    id       the problem's; several traces may have the same one.
    verdict  {"correct", "consistent", "by", "why"}; like gold and teacher, None where not known.
    kept, stop, reply  as teacher.py wrote them, where it did.

    Traces without a thought (a failed call) are left out and counted on stderr; one without an
    answer was cut, or thought in circles. Bad ones are left out and added to the list `skipped`, as
    `load` does it.
    """
    path = Path(path)
    readers = {".csv": _pali_reason_csv, ".json": _pali_reason_json}
    readers[".jsonl"] = functools.partial(json_lines, may_be_torn=True, skipped=skipped)
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a file of traces: they end in {', '.join(readers)}.")
    traces = []
    for where, record in readers[path.suffix](path):
        with _noted(skipped, where.rpartition(", ")[2]):
            traces.append(_trace(record, where))
    whole = [trace for trace in traces if trace["thought"].strip()]
    if not whole:
        raise ValueError(f"{path} has no trace with a thought.")
    if len(whole) < len(traces):
        count = f"{len(traces) - len(whole)} of {len(traces)}"
        print(f"{path}: left out {count} traces without a thought.", file=sys.stderr)
    return whole


def _trace(record, where):
    """A checked trace; a text that is null is empty, a verdict that is missing is not known."""
    trace = {"id": str(_field(record, "id", str | int, where))}
    for key in ("question", "thought", "answer"):
        trace[key] = _unix(_field(record, key, str | None, where) or "")
    for key, kind in (("gold", str | int | float), ("teacher", str)):
        there = record.get(key) is not None
        trace[key] = _unix(_field(record, key, kind, where)) if there else None
    verdict = dict.fromkeys(("correct", "consistent", "by", "why"))
    verdict |= _field({"verdict": record.get("verdict") or {}}, "verdict", dict, where)
    for key in ("correct", "consistent"):
        if not isinstance(verdict[key], bool | None):
            raise ValueError(f'{where}: "{key}" is {verdict[key]!r}, not true, false or null.')
    for key, kind in (("kept", bool), ("stop", str), ("reply", dict)):  # only teacher.py has them
        if not isinstance(record.get(key, kind()), kind):
            found = f"{record[key]!r:.60}, which is not of type {kind.__name__}"
            raise ValueError(f'{where}: "{key}" is {found}.')
        trace |= {key: record[key]} if key in record else {}
    for key in ("thought", "answer") if "reply" in record else ():
        _field(record["reply"], key, str, f"{where}, reply")
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
        record = {ours: _field(row, theirs, str, where) for ours, theirs in names.items()}
        if not _is_index(record["index"]):
            raise ValueError(f'{where}: "indexes" is {record["index"][:60]!r}, not a position.')
        verdict = {"correct": row["validity"] == "yes", "by": _CLAUDE} if "validity" in row else {}
        id = int(record["index"]) + 1  # positions count from 0, MathVista's ids from 1
        yield where, record | {"id": id, "verdict": verdict, "teacher": _GEMINI}


def _pali_reason_json(path):
    """pali_reason's training_dict.json: only what was judged correct. The image tells the id."""
    columns = read_json(path)
    lists = [_field(columns, key, list, path) for key in ("prefixes", "suffixes", "images")]
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
            image = open_image(problem.image)
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


# --- Prompts --------------------------------------------------------------------------------------
# A format is INPUT-OUTPUT. Question, Context (hint and caption), Multiple options, Generated
# rationale, Lecture, Explanation (the solution), Answer.

INPUTS = {
    "QM": "{question} {options}",
    "QC": "{question} {context}",
    "QCM": "{question} {context} {options}",
    "CQM": "{context} {question} {options}",
    "QCMG": "{question} {context} {options} {rationale}",
    "CQMG": "{context} {question} {options} {rationale}",
    "QCML": "{question} {context} {options} BECAUSE: {lecture}",
    "QCME": "{question} {context} {options} BECAUSE: {solution}",
    "QCMLE": "{question} {context} {options} BECAUSE: {lecture} {solution}",
    "QCLM": "{question} {context} BECAUSE: {lecture} {options}",
    "QCEM": "{question} {context} BECAUSE: {solution} {options}",
    "QCLEM": "{question} {context} BECAUSE: {lecture} {solution} {options}",
    "QCMA": "{question} {context} {options} Answer: {answer}",
    "QCA": "{question} {context} Answer: {answer} BECAUSE:",  # no space before the cue (sic)
}
OUTPUTS = {
    "A": "{answer}",
    "AL": "{answer} BECAUSE: {solution}",  # AL and AE are swapped in the original too
    "AE": "{answer} BECAUSE: {lecture}",
    "ALE": "{answer} BECAUSE: {lecture} {solution}",
    "AEL": "{answer} BECAUSE: {solution} {lecture}",
    "LA": "{lecture} {answer}",
    "EA": "{solution} {answer}",
    "LEA": "{lecture} {solution} {answer}",
    "ELA": "{solution} {lecture} {answer}",
    "LE": "Solution: {lecture} {solution}.",  # the extra full stop too
    "E": "Solution: {solution}",
}


def prompt(problem, fmt, generated=None, caption=False, faithful=False):
    """(source, target): the two texts of a training pair, as mm-cot's utils_prompt.py has them.

    fmt        a key of INPUTS, a hyphen, a key of OUTPUTS: "QCM-LE", "QCMG-A".
    generated  the rationale for G, with its "Solution:"; None puts in the gold one.
    caption    whether the context includes the picture's caption.
    faithful   The original turns a newline of lecture or solution into a backslash and an n, of
               which T5 sees <unk> and "n" ("...light.nThe..."). By default it is " // " here, one
               T5 piece that is nowhere in ScienceQA, so decoded text can be split at it. That is
               the only difference; all other white space becomes single spaces either way.

    A problem without choices has no options, and its answer reads "The answer is 12."
    """
    inputs, _, outputs = fmt.partition("-")
    if inputs not in INPUTS or outputs not in OUTPUTS:
        known = f"{' '.join(INPUTS)} - {' '.join(OUTPUTS)}"
        raise ValueError(f"There is no prompt format {fmt!r}; the parts are {known}.")
    letters = LETTERS[:5] if faithful else LETTERS
    options = _options(problem, letters)
    lecture, solution = _one_line(problem.lecture, faithful), _one_line(problem.solution, faithful)
    index = problem.meta.get("answer_index")
    answer = problem.answer if index is None else f"({letters[index]})"
    context = f"{problem.hint} {problem.meta.get('caption', '') if caption else ''}".strip()
    parts = {
        "question": f"Question: {problem.question}",
        "context": f"Context: {context or 'N/A'}",
        "options": f"Options: {options}" if options else "",
        "rationale": f"Solution: {lecture} {solution}" if generated is None else generated,
        "lecture": lecture,
        "solution": solution,
        "answer": f"The answer is {answer}.",
    }
    cue = "Answer:" if outputs == "A" else "Solution:"
    source = INPUTS[inputs].format_map(parts) + (cue if inputs == "QCA" else f" {cue}")
    target = OUTPUTS[outputs].format_map(parts)
    if target.endswith("BECAUSE:"):  # where a solution ends so, the original deletes the word
        target = target.replace("BECAUSE:", "")
    return " ".join(source.split()), " ".join(target.replace("Answer:", "").split())


def _options(problem, letters=LETTERS):
    """The choices as "(A) attract (B) repel", "" if there are none."""
    if len(problem.choices) > len(letters):
        raise ValueError(
            f"Problem {problem.id} has {len(problem.choices)} choices: over {letters}."
        )
    return " ".join(f"({letters[i]}) {text}" for i, text in enumerate(problem.choices))


def _one_line(text, faithful):
    if faithful:
        return text.replace("\n", "\\n")
    return NEWLINE.join(line.strip() for line in text.split("\n") if line.strip())


# --- Tokens and batches ---------------------------------------------------------------------------


def load_tokenizer(folder):
    """A checkpoint's tokenizer.json; where there is only spiece.model (UnifiedQA), T5's from it."""
    file = Path(folder, "tokenizer.json")
    if not file.exists():
        file = Path(folder, "spiece.model")
    if not file.exists():
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor spiece.model.")
    read = Tokenizer.from_file if file.suffix == ".json" else _t5_tokenizer
    try:
        content = regular_file(file).read_bytes()
        for found in re.finditer(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"', content):
            _check_charsmap(base64.b64decode(found[1]))
        tokenizer = read(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()  # then a trial: some can be read and not used
        tokenizer.decode(tokenizer.encode(f"{string.printable} ½ é 中").ids)
    except BaseException as error:  # tokenizers raises bare Exceptions, and panics, which are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file} is not a tokenizer that can be read ({error!r}).") from None
    return tokenizer


def _t5_tokenizer(file):
    """T5's tokenizer from a sentencepiece Unigram model: its pieces, then <extra_id_99> ... _0.

    ModelProto: field 1, repeated, a piece {1 text, 2 score}; 3 the normalizer {2 charsmap}.
    """
    vocabulary, charsmap = [], None
    for number, value in _protobuf(Path(file).read_bytes()):
        if number == 1:
            piece = dict(_protobuf(value))
            vocabulary.append((piece[1].decode(), struct.unpack("<f", piece[2])[0]))
        elif number == 3:
            charsmap = dict(_protobuf(value)).get(2, b"")
    if charsmap is None:
        raise ValueError("it has no normalizer: the file is cut off")
    if charsmap:
        _check_charsmap(charsmap)
    ids = {text: i for i, (text, _) in enumerate(vocabulary)}
    extras = [f"<extra_id_{i}>" for i in reversed(range(100))]
    vocabulary += [(extra, 0.0) for extra in extras]
    clean = [normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]
    clean = [normalizers.Precompiled(charsmap), *clean] if charsmap else clean
    tokenizer = Tokenizer(models.Unigram(vocabulary, ids["<unk>"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(clean)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *extras])
    return tokenizer


def _check_charsmap(content):
    """The tokenizers library believes the size at its start: asked for gigabytes, it aborts."""
    if struct.unpack_from("<I", content)[0] > len(content) - 4:
        raise ValueError("its table of characters is shorter than it says")


def _protobuf(data):
    """(field number, value) pairs of one protobuf message: int for a varint, otherwise bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("it has a number of more than 64 bits")

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[at : at + size]
        at += size


_NO_TAGS = dict.fromkeys(map(ord, "<\N{FULLWIDTH LESS-THAN SIGN}\N{SMALL LESS-THAN SIGN}"), "⟨")


def encode(tokenizer, texts, max_length, tail=16):
    """Token ids of each text, at most max_length with the </s> the tokenizer appends.

    A text that is too long loses tokens before its last `tail`: a source keeps its cue "Answer:",
    a target its end. tail=1 is the original's truncation, which keeps </s> only. How many texts
    were cut is said on stderr.

    No text holds a special token: T5's tokenizers find "</s>" and "<extra_id_0>" anywhere, as added
    tokens and as pieces. Where one came of it, the text is read again with another character for
    "<"; T5 has a piece for neither, so what was "<" is <unk> either way and the rest spelled out.
    """
    tail = min(tail, max_length)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    added = tokenizer.get_added_tokens_decoder().items()
    special = {id for id, token in added if token.content.startswith("<")}
    special -= {tokenizer.token_to_id("<unk>")}
    for i, row in enumerate(rows):
        if not special.isdisjoint(row[:-1]):
            rows[i] = tokenizer.encode(texts[i].translate(_NO_TAGS)).ids
    cut = [row[: max_length - tail] + row[-tail:] if len(row) > max_length else row for row in rows]
    count = sum(len(row) > max_length for row in rows)
    if count:
        print(f"{count} of {len(rows)} texts were cut to {max_length} tokens.", file=sys.stderr)
    return cut


def examples(problems, fmt, tokenizer, features, generated, config):
    """Dicts {"id", "input_ids", "labels", "image_features"?} of problems in one prompt format.

    features   `Features`, or None for a text-only run.
    generated  {id: rationale} that G stands for; None puts in the gold ones.
    config     a run's flags: vision ("caption" puts captions into the context), faithful_text (in
               `prompt`, and truncation as the original has it), max_input, max_output (one limit,
               or one a stage).
    """
    pairs = [
        prompt(
            problem,
            fmt,
            None if generated is None else generated[problem.id],
            caption=config["vision"] == "caption",
            faithful=config["faithful_text"],
        )
        for problem in problems
    ]
    longest = config["max_output"][-1 if "G" in fmt else 0]
    tail = 1 if config["faithful_text"] else 16
    made = []
    sources = encode(tokenizer, [source for source, _ in pairs], config["max_input"], tail)
    targets = encode(tokenizer, [target for _, target in pairs], longest, tail)
    for problem, source, target in zip(problems, sources, targets, strict=True):
        example = {"id": problem.id, "input_ids": source, "labels": target}
        if features is not None:
            example["image_features"] = features.stored(problem.id)  # (P, F), read in collate
        made.append(example)
    return made


def collate(examples, pad_id=0):
    """A batch of {"id", "input_ids", "labels"?, "image_features"?} dicts, padded on the right.

    Returns ids (list of str), input_ids and attention_mask (B, T); with labels also labels (B, U),
    -100 at pads so that none is in the loss, and decoder_input_ids (B, U), the labels one to the
    right behind T5's start token, which is its pad; with features also image_features (B, P, F),
    float32.
    """

    def column(key):
        return [torch.as_tensor(example[key]) for example in examples]

    rows = column("input_ids")
    batch = {
        "ids": [example["id"] for example in examples],
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),  # (B, T)
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if "labels" in examples[0]:
        labels = pad_sequence(column("labels"), batch_first=True, padding_value=-100)  # (B, U)
        shifted = torch.nn.functional.pad(labels, (1, -1), value=pad_id)
        batch["labels"] = labels
        batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, pad_id)
    if "image_features" in examples[0]:
        batch["image_features"] = _stacked(examples)  # (B, P, F)
    return batch


def _stacked(examples):
    """The rows' features or pixels as one float32 tensor; NaN would silently become everything."""
    stacked = np.stack([example["image_features"] for example in examples])
    stacked = torch.from_numpy(stacked).float()
    if math.isfinite(stacked.sum()):  # far less work than isfinite of each number
        return stacked
    finite = stacked.flatten(1).isfinite().all(dim=1).tolist()
    if not all(finite):
        bad = ", ".join(e["id"] for e, fine in zip(examples, finite, strict=True) if not fine)
        raise ValueError(f"The picture features of these problems are not finite: {bad}.")
    return stacked


def batches(lengths, batch_size, generator=None, chunk=50):
    """Row numbers, one list a batch, rows of like length together so that little is padding.

    With a torch.Generator: shuffled, sorted by length within every `chunk` batches, then the
    batches shuffled. Without: sorted by length, for decoding. Deterministic either way.
    """

    def split(rows, size):
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    if generator is None:
        return split(sorted(range(len(lengths)), key=lambda row: lengths[row]), batch_size)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    made = []
    for rows in split(order, chunk * batch_size):
        made += split(sorted(rows, key=lambda row: lengths[row]), batch_size)
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


# --- PaliGemma ------------------------------------------------------------------------------------
# A row (Beyer et al., arXiv 2407.07726). Image and prefix see each other, the suffix is causal, the
# loss is on suffix and <eos>:
#
#     <image> x I   <bos>   prefix   "\n"   suffix   <eos>


def pali_prefix(problem, task):
    """What PaliGemma reads beside the picture: task ("answer" or "reason") and question, then a
    line each for what the problem has of Hint, Unit (MathVista) and Choices."""
    parts = {
        "Hint": problem.hint,
        "Unit": problem.meta.get("unit"),
        "Choices": _options(problem),
    }
    told = [f"{name}: {text}" for name, text in parts.items() if text]
    return "\n".join([f"{task} en {problem.question}", *told])


def pali_suffix(problem, trace=None):
    """What PaliGemma is to write: the letter, or the text of a problem without choices.

    With a trace (see `load_traces`) its thought comes first, and the last line is "Answer: B". The
    gold answer stands there if the trace was judged correct, else what the teacher itself said; if
    it said nothing there is no such line.
    """
    index = problem.meta.get("answer_index")
    gold = problem.answer if index is None else LETTERS[index]
    if trace is None:
        return gold
    answer = gold if trace["verdict"]["correct"] else final_answer(problem, trace["answer"])
    return f"{trace['thought'].strip()}\nAnswer: {answer}" if answer else trace["thought"].strip()


_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# Without ^, which changes no match, a line of n characters without an answer takes n^2 steps.
_ANSWER = re.compile(r"^.*\banswer(?: is|:)[\s*:]*(.+)", re.IGNORECASE | re.MULTILINE)


def final_answer(problem, text):
    r"""What a teacher's prose ends in; of a problem with choices the letter, if it names one.

    Looked for in the last \boxed{}, else behind the last "answer is", else in the last line. This
    is for training data that nobody graded; support/grading.py has the grader.
    """
    said = _BOXED.findall(text) or _ANSWER.findall(text) or text.strip().splitlines()
    said = said[-1][:10_000] if said else ""  # the next pattern is quadratic in it
    said = re.sub(r"\\text\{(.*?)\}", r"\1", said).strip(" .*$")
    if not problem.choices:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", said.replace(",", ""))
        is_number = problem.meta.get("answer_type") in ("integer", "float")
        return numbers[-1] if is_number and numbers else said
    letters, choices = LETTERS[: len(problem.choices)], [c.lower() for c in problem.choices]
    named = re.findall(rf"\(([{letters}])\)|^([{letters}])(?![^).:,])", said)
    if named:
        return "".join(named[-1])
    return LETTERS[choices.index(said.lower())] if said.lower() in choices else said


_TAG = re.compile(r"<(?=[^<>\s]+>)|\[(?=@BOS@\])")


def plain_ids(tokenizer, text):
    """Token ids of a text in which nothing is a special token, whatever it looks like.

    Gemma's added tokens (<eos>, <image>, <loc0001>, <seg001>, <b>, [@BOS@] ...) are found in any
    text, whether they are marked special or not. So the text is cut behind the first character of
    all that has their form: no piece holds a whole one, and together they decode to the text.
    """
    cuts = [0, *(match.end() for match in _TAG.finditer(text)), len(text)]
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    return [id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False).ids]


def special_ids(tokenizer):
    """{"pad", "eos", "bos", "image"}: ids, looked up by name. ValueError if one is missing."""
    ids = {name: tokenizer.token_to_id(f"<{name}>") for name in ("pad", "eos", "bos", "image")}
    missing = ", ".join(f"<{name}>" for name, id in ids.items() if id is None)
    if missing:
        raise ValueError(f"This tokenizer has no {missing}: it is not PaliGemma's.")
    return ids


def sequence(tokenizer, prefix, suffix=None, image_tokens=0, layout="paligemma", eos_in_loss=True):
    """One row: {"input_ids", "token_type_ids", "labels"}, lists of T; without suffix no labels.

    token_type_ids  0 through the newline (all of it sees itself), 1 for suffix and <eos> (causal).
    labels          the ids of suffix and <eos>, -100 before them; not shifted.
    layout          "seed" puts <bos> behind the prefix, as pali_reason did.
    eos_in_loss     False keeps <eos> in the row but out of the loss, so nothing teaches to stop.

    The newline is tokenised on its own: no neighbour changes its id. A training row ends in its
    only <eos>, since no text can hold one (`plain_ids`).
    """
    if layout not in ("paligemma", "seed"):
        raise ValueError(f"There is no layout {layout!r}; there are paligemma and seed.")
    ids = special_ids(tokenizer)
    text = plain_ids(tokenizer, prefix)
    text = [ids["bos"], *text] if layout == "paligemma" else [*text, ids["bos"]]
    seen = [ids["image"]] * image_tokens + text + plain_ids(tokenizer, "\n")
    if suffix is None:
        return {"input_ids": seen, "token_type_ids": [0] * len(seen)}
    told = plain_ids(tokenizer, suffix)
    return {
        "input_ids": [*seen, *told, ids["eos"]],
        "token_type_ids": [0] * len(seen) + [1] * (len(told) + 1),
        "labels": [-100] * len(seen) + told + [ids["eos"] if eos_in_loss else -100],
    }


def pali_examples(rows, tokenizer, features, config):
    """Dicts {"id", "input_ids", "token_type_ids", "labels"?, "image_features"?} for `pali_collate`.

    rows      (problem, task, trace or None, whether to give a suffix), one a row.
    features  `Features` of I positions, or None for a run without pictures. A problem without a
              picture has no image tokens.
    config    a run's flags: max_suffix (tokens, with <eos>), max_prefix (tokens; None: any),
              layout and eos_in_loss (see `sequence`), shuffle_choices with seed (see `shuffled`).

    A training row that is too long is left out and counted on stderr, never cut. Rows without a
    suffix have no limit: a test without its long questions would be another test.
    """
    generator = torch.Generator().manual_seed(config.get("seed", 0))
    how = {key: config[key] for key in ("layout", "eos_in_loss") if key in config}
    limits = {"max_prefix": config.get("max_prefix"), "max_suffix": config["max_suffix"]}
    made, left_out = [], dict.fromkeys(limits, 0)
    for problem, task, trace, has_suffix in rows:
        if has_suffix and config.get("shuffle_choices") and movable(problem, trace):
            problem = shuffled(problem, generator)
        pictured = features is not None and problem.id in features
        tokens = features.shape[0] if pictured else 0
        suffix = pali_suffix(problem, trace) if has_suffix else None
        example = sequence(tokenizer, pali_prefix(problem, task), suffix, tokens, **how)
        told = sum(example["token_type_ids"])
        seen = len(example["input_ids"]) - told - tokens - 2  # without <bos> and newline
        long = {"max_prefix": seen, "max_suffix": told}
        over = [k for k, limit in limits.items() if limit is not None and long[k] > limit]
        if over and has_suffix:
            left_out[over[0]] += 1
            continue
        stored = {"image_features": features.stored(problem.id)} if pictured else {}  # (I, D)
        made.append({"id": problem.id} | example | stored)
    for limit, count in left_out.items():
        if count:
            text = f"{count} of {len(rows)} rows were left out: over {limit} {limits[limit]}."
            print(text, file=sys.stderr)
    return made


def pali_collate(examples, pad_id=0, side="left"):
    """A batch of `pali_examples`, padded on the left or the right.

    Returns ids (list of str); input_ids, attention_mask (0 at pads), token_type_ids and, where the
    rows have suffixes, labels (-100 at pads), (B, T); image_features (n, I, D), float32, of the n
    rows with a picture, in their order, or (`Pictures`) pixel_values (n, 3, S, S); no such key if n
    is 0.
    """

    def padded(rows, value=0):
        rows = [torch.as_tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    rows = [example["input_ids"] for example in examples]
    batch = {
        "ids": [example["id"] for example in examples],
        "input_ids": padded(rows, pad_id),  # (B, T)
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "token_type_ids": padded([example["token_type_ids"] for example in examples]),
    }
    if "labels" in examples[0]:
        batch["labels"] = padded([example["labels"] for example in examples], -100)
    if pictured := [example for example in examples if "image_features" in example]:
        seen = _stacked(pictured)  # n x I x D, or n x 3 x S x S
        batch["image_features" if seen.ndim == 3 else "pixel_values"] = seen
    return batch


_NAMES_AN_OPTION = re.compile(
    r"\([A-J]\)|\b(?i:options?|choices?|answers?|letter)\b[^.\n]{0,30}?\b[A-H]\b|of the above"
)


def movable(problem, trace=None):
    """Whether the choices may change places without making a text wrong.

    Not if one of them is a bare letter or says "of the above"; not if question or thought name an
    option by its letter; not with a trace nobody judged correct, whose own answer may be a letter.
    """
    if not problem.choices or set(problem.choices) & set(LETTERS):
        return False
    if trace and not trace["verdict"]["correct"]:
        return False
    texts = [problem.question, *problem.choices, trace["thought"] if trace else ""]
    return not any(_NAMES_AN_OPTION.search(text) for text in texts)


def shuffled(problem, generator):
    """The problem with its choices in an order drawn from a torch.Generator."""
    order = torch.randperm(len(problem.choices), generator=generator).tolist()
    meta = problem.meta | {"answer_index": order.index(problem.meta["answer_index"])}
    choices = tuple(problem.choices[i] for i in order)
    return dataclasses.replace(problem, choices=choices, meta=meta)


# --- Pictures and their features ------------------------------------------------------------------


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # an EPS would start Ghostscript
_ONE_LARGE = threading.Lock()  # a picture takes up to 9 bytes a pixel while it is decoded


def open_image(path):
    """The picture in RGB, upright.

    As in the original, alpha is dropped and not blended, and of an animation the first frame is
    taken. The EXIF note of how a phone was held is obeyed, as every viewer does; the original does
    not, but no picture of ScienceQA or MathVista that was seen has one. 16 bits of grey are scaled
    to 8, where PIL would make all but the darkest white.
    Raises FileNotFoundError, or ValueError for a file that is no whole picture and for one of over
    Image.MAX_IMAGE_PIXELS (89 million), which is not decoded.
    """
    try:
        with Image.open(regular_file(path), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            with _ONE_LARGE if pixels > 1 << 24 else contextlib.nullcontext():
                return _upright_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {path} does not exist.") from None
    except Exception as error:  # a broken file makes PIL's decoders raise almost anything
        raise ValueError(f"The image {path} cannot be read ({error}).") from None


def _upright_rgb(image):
    image.load()
    with contextlib.suppress(Exception):  # a torn EXIF block turns nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image) >> 8  # (H, W)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)  # dropped, without PIL's advice to keep it
    return image.convert("RGB")


def detr_pixels(image, size=224):
    """What Multimodal-CoT shows DETR: float32 (3, H, W), the shorter side `size`, no crop.

    PIL's bilinear filter, which antialiases; the long side rounded down; ImageNet mean and
    deviation. Not the 800/1333 pixels of DETR's own preprocessor, which is for detection.
    """
    short, long = sorted(image.size)
    if long > 50 * short:
        raise ValueError(f"{image.width} x {image.height} pixels: too narrow to resize")
    image = image.resize([size * side // short for side in image.size], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255  # (3, H, W)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def siglip_pixels(image, size):
    """What PaliGemma shows SigLIP: float32 (3, S, S) in [-1, 1], whatever the picture's shape.

    PIL's bicubic filter, which antialiases, on 8 bits. transformers 5 resizes with torchvision by
    default, which differs by at most 2 of 255 grey levels.
    """
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255  # (3, S, S)
    return (pixels - 0.5) / 0.5


class Features:
    """Picture features on disk: `features[id]` is float32 (P, F), zeros without a picture.

    Zeros are the published behaviour; `id in features` says whether there is a picture.
    """

    def __init__(self, array, rows):
        self.array, self.rows, self.shape = array, rows, array.shape[1:]  # (N, P, F), {id: row}
        self.zeros = np.zeros(self.shape, array.dtype)

    def __contains__(self, id):
        return id in self.rows

    def __getitem__(self, id):
        return np.array(self.stored(id), np.float32)  # (P, F)

    def stored(self, id):
        """The row (P, F) as it is on disk, fp16 as a rule, and not read before it is used."""
        return self.array[self.rows[id]] if id in self.rows else self.zeros


class Pictures:
    """In place of `Features` where the image tower is trained too: pixels, decoded at each use."""

    def __init__(self, problems, side, tokens):
        self.paths = {p.id: p.image for p in problems if p.image is not None}
        self.side, self.shape = side, (tokens,)

    def __contains__(self, id):
        return id in self.paths

    def stored(self, id):
        return Picture(self.paths[id], self.side)


@dataclass(frozen=True)
class Picture:
    """A file that is read when numpy asks for it: float32 (3, S, S)."""

    path: str
    side: int

    def __array__(self, dtype=None, copy=None):
        return siglip_pixels(open_image(self.path), self.side).numpy()


def cached_features(problems, extract, fingerprint, size, folder, pixels=detr_pixels, skipped=None):
    """Features of every distinct picture of `problems`, computed once and kept in `folder`.

    extract      list of (3, H, W) tensors -> list of (P, F) tensors. It gets up to 32 pictures of
                 mixed sizes and must not pad them together: pads change DETR's output.
    pixels       what makes a tensor of a picture: detr_pixels or siglip_pixels.
    fingerprint  a hash of the checkpoint. A cache of another one, or another size, is refused.
    skipped      a list: problems whose picture cannot be used have no features and are added to it,
                 as (id, reason). By default the first one is the error.

    The folder holds features.npy, fp16 (N, P, F), read by memory map, and manifest.json:
    {"fingerprint", "size", "shape": [P, F], "rows": {sha256 of the image file: row}}. Only rows in
    the manifest count, so an interrupted run is resumed, and new pictures are added at the end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictured, shas = [], []
    for problem in (problem for problem in problems if problem.image is not None):
        with _noted(skipped, problem.id):
            shas.append(_image_sha(problem))
            pictured.append(problem)
    with _locked(folder):
        manifest = _feature_manifest(folder, fingerprint, size)
        if manifest["shape"] is None:
            manifest["shape"] = list(extract([torch.zeros(3, size, size)])[0].shape)
        images = dict(zip(shas, pictured, strict=True))
        todo = [item for item in images.items() if item[0] not in manifest["rows"]]
        todo.sort(key=lambda item: _aspect(item[1]))  # equal sizes share a batch of `extract`
        array = _feature_array(folder, manifest, len(manifest["rows"]) + len(todo))
        _save_manifest(array, manifest, folder)
        skips = skipped is not None
        bad = _extract_into(array, manifest, todo, extract, pixels, folder, skips)
    rows = {}
    for problem, sha in zip(pictured, shas, strict=True):
        if sha in manifest["rows"]:
            rows[problem.id] = manifest["rows"][sha]
        else:
            skipped.append((problem.id, bad[sha]))
    return Features(np.load(folder / "features.npy", mmap_mode="r"), rows)


def _aspect(problem):
    """Width over height; 0 for a file that is no picture, which is said when it is decoded."""
    try:
        with Image.open(problem.image, formats=FORMATS) as image:
            return image.width / image.height
    except Exception:
        return 0.0


def _image_sha(problem):
    try:
        return _checksum(regular_file(problem.image))
    except (OSError, ValueError) as error:
        raise type(error)(f"Problem {problem.id}: the image {error}") from None


@contextlib.contextmanager
def _locked(folder):
    """One writer at a time; a second run waits, then finds the work done."""
    with open(folder / "lock", "w") as file:
        with contextlib.suppress(ImportError, OSError):  # Windows, some network disks: no lock
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _feature_manifest(folder, fingerprint, size):
    file = folder / "manifest.json"
    if not file.exists():
        return {"fingerprint": fingerprint, "size": size, "shape": None, "rows": {}}
    try:
        manifest = read_json(file)
        shape = _field(manifest, "shape", list, file)
        rows = list(_field(manifest, "rows", dict, file).values())
        whole = all(type(x) is int for x in rows + shape) and sorted(rows) == list(range(len(rows)))
        if not whole or len(shape) != 2 or min(shape) < 1 or math.prod(shape) > 10**8:
            raise ValueError(f"{file} does not say which picture is in which row.")
        _field(manifest, "fingerprint", str, file), _field(manifest, "size", int, file)
    except ValueError as error:
        raise ValueError(f"{error} Delete {folder}.") from None
    if (manifest["fingerprint"], manifest["size"]) != (fingerprint, size):
        raise ValueError(
            f"The feature cache {folder} was made by checkpoint {manifest['fingerprint']} at size "
            f"{manifest['size']}, but this run has checkpoint {fingerprint} at size {size}. Delete "
            f"{folder} or name another folder with --features-cache."
        )
    return manifest


def _feature_array(folder, manifest, count):
    """features.npy (N, P, F) open for writing with N >= count; grown by copying if need be."""
    file, shape, old = folder / "features.npy", tuple(manifest["shape"]), np.zeros(0)
    if manifest["rows"]:
        try:
            old = np.load(regular_file(file), mmap_mode="r+")
            fits = old.dtype == np.float16 and old.shape[1:] == shape
        except Exception as error:  # numpy's reader of headers raises almost anything
            raise ValueError(f"{file} cannot be read ({error}). Delete {folder}.") from None
        if not fits or len(old) < len(manifest["rows"]):
            raise ValueError(f"{file} does not fit its manifest. Delete {folder}.")
        if len(old) >= count:
            return old
    temporary = folder / "features.npy.part"
    array = np.lib.format.open_memmap(temporary, "w+", np.float16, (max(count, 1), *shape))
    array[: len(old)] = old.reshape(-1, *shape)
    os.replace(temporary, file)
    return array


def _extract_into(array, manifest, todo, extract, pixels, folder, skips, chunk=32):
    """Add the features of each (sha, problem) of todo; {sha: why not} where that `skips`."""
    start, bad = time.monotonic(), {}
    decoded = _decoded([problem for _, problem in todo], manifest["size"], pixels, skips)
    for first in range(0, len(todo), chunk):
        items = [(*item, next(decoded)) for item in todo[first : first + chunk]]
        bad |= {sha: seen for sha, _, seen in items if isinstance(seen, str)}
        whole = [item for item in items if item[0] not in bad]
        made = extract([seen for *_, seen in whole]) if whole else []
        for (sha, problem, _), features in zip(whole, made, strict=True):
            features = features.detach().cpu().half()  # fp16 ends at 65504
            if not torch.isfinite(features).all():
                bad[sha] = f"Problem {problem.id}: the features of its image are not finite."
                if skips:
                    continue
                raise ValueError(bad[sha])
            array[len(manifest["rows"])] = features.numpy()  # (P, F)
            manifest["rows"][sha] = len(manifest["rows"])
        _save_manifest(array, manifest, folder)
        progress("images", first + len(items), len(todo), start)
    return bad


def _decoded(problems, size, pixels, skips, ahead=64):
    """The problems' pixels in order, where it `skips` the reason of those that cannot be had; a few
    threads decode at most `ahead` pictures in advance."""

    def decode(problem):
        try:
            return pixels(open_image(problem.image), size)
        except (OSError, ValueError) as error:
            reason = f"Problem {problem.id}: {error}"
            if skips:
                return reason
            raise ValueError(reason) from None

    with ThreadPoolExecutor(4) as pool:
        queue = deque()
        for problem in problems:
            queue.append(pool.submit(decode, problem))
            if len(queue) == ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _save_manifest(array, manifest, folder):
    array.flush()  # first the rows, then the list that says they are there
    temporary = folder / "manifest.json.part"
    temporary.write_text(json.dumps(manifest))
    os.replace(temporary, folder / "manifest.json")


def progress(what, done, total, start, note=""):
    """One line on a terminal with the rate and the time left; nothing into a file or a pipe."""
    if sys.stderr.isatty():
        rate = max(done, 1e-9) / max(time.monotonic() - start, 1e-9)
        left = (total - done) / rate
        text = f"{what}: {done:.0f} of {total:.0f}, {rate:.1f}/s, {left:.0f} s left{note}"
        print(f"\r{text:<60}", end="" if done < total else "\n", file=sys.stderr, flush=True)


PUBLISHED = {
    "detr.npy": (100, 256),
    "clip.npy": (49, 2048),
    "resnet.npy": (2048,),
    "vit.pth": (145, 1024),
}


def published_features(path, name_map):
    """The feature files of cooelf/vision_features (PUBLISHED), memory-mapped, by problem id.

    name_map  mm-cot's name_map.json, {problem id: row}. It includes the problems whose only
              pictures are the choices'. resnet.npy has one vector a picture, used 512 times.
    """
    path = Path(path)
    rows = _field({"names": read_json(name_map)}, "names", dict, name_map)
    if path.name not in PUBLISHED:  # vit.npy is another model's: (11208, 577, 768)
        raise ValueError(f"{path} is none of {', '.join(PUBLISHED)}, which the checkpoints read.")
    regular_file(path)
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        else:
            mmap = zipfile.is_zipfile(path)
            array = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap).numpy()
        shape, kind = array.shape[1:], array.dtype.kind
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not a feature file ({why}).") from None
    if shape != PUBLISHED[path.name] or kind != "f":
        needed = f"{PUBLISHED[path.name]}, of floats"
        raise ValueError(f"{path} has {array.dtype} rows of {shape}, not {needed}.")
    for id, row in rows.items():
        if not _is_index(str(row)) or int(row) >= len(array):
            found = f"{id:.60} has row {row!s:.60}"
            raise ValueError(f"{name_map}: {found}, but {path} has {len(array)} rows.")
    if path.name == "resnet.npy":
        array = np.broadcast_to(array[:, None, :], (len(array), 512, 2048))  # no copy
    return Features(array, {id: int(row) for id, row in rows.items()})


# --- Download: python data.py scienceqa, python data.py mathvista ---------------------------------

_REPOSITORY = "https://raw.githubusercontent.com/lupantech/ScienceQA"
_COMMIT = "2cbf8318e07b9ece895bb2ae605e71e38d623264"
_IMAGES = "https://scienceqa.s3.us-west-1.amazonaws.com/images"
SCIENCEQA = {  # file: address, checksum (a git blob id or a sha256; None: nobody recorded one yet)
    "problems.json": (
        f"{_REPOSITORY}/{_COMMIT}/data/scienceqa/problems.json",
        "3920b762556abfbfa001f298c9740c36d4e041e1",
    ),
    "pid_splits.json": (
        f"{_REPOSITORY}/{_COMMIT}/data/scienceqa/pid_splits.json",
        "bde005092576ebebfed08087879ff774fcd75b62",
    ),
    "captions.json": (
        f"{_REPOSITORY}/{_COMMIT}/data/captions.json",
        "38726c2097b97e73b95582857c95de225f6682a8",
    ),
    "train.zip": (f"{_IMAGES}/train.zip", None),
    "val.zip": (f"{_IMAGES}/val.zip", None),
    "test.zip": (f"{_IMAGES}/test.zip", None),
}


def download(url, path, checksum=None, attempts=5):
    """Fetch url into path by way of path.part, where a later call goes on (HTTP Range).

    Raises ConnectionError, or ValueError for a wrong checksum. path appears only when complete.
    """
    part = Path(f"{path}.part")
    for attempt in range(1, attempts + 1):
        try:
            _fetch(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 0)
            if attempt == attempts or (400 <= code < 500 and code != 416):
                advice = "Try again later, or give another address with --addresses."
                raise ConnectionError(f"{url} could not be fetched ({error}). {advice}") from None
            if code == 416:  # the part is longer than the file, or was whole: start again
                part.unlink(missing_ok=True)
            time.sleep(attempt / 2)
    found = _checksum(part, checksum)
    if checksum is None:
        print(f"{path.name} has sha256 {found}; there is none on record to compare it with.")
    elif found != checksum:
        part.unlink()
        raise ValueError(f"{url} has checksum {found}, not {checksum}; what came was deleted.")
    os.replace(part, path)


def _fetch(url, part):
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        length = reply.headers.get("Content-Length", "0")
        total = have + (int(length) if length.isdecimal() else 0)
        start, first = time.monotonic(), have
        with open(part, "ab" if have else "wb") as file:
            while block := reply.read(1 << 20):
                have += file.write(block)
                progress(f"{part.stem}, MB", (have - first) / 1e6, (total - first) / 1e6, start)
    if have < total:  # http.client is silent about it
        raise ConnectionError(f"the connection was lost after {have} of {total} bytes")


def _checksum(path, like=None):
    """sha256 of a file, or its git blob id where `like` is one (40 digits)."""
    if like is not None and len(like) == 40:
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive, folder, top):
    """Unzip the archive's folder `top` as folder/top.

    An entry that would leave the folder (an absolute path, a drive, "..", a symbolic link) is
    refused, and so are entries that unpack to `most` times the archive's size (pictures hardly
    shrink; a bomb says a thousand times, and no entry gets more than it says). Then nothing is
    unpacked.
    """
    size, most = os.path.getsize(regular_file(archive)), 100
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            with zipfile.ZipFile(archive) as file:
                for entry in file.infolist():
                    name = PurePosixPath(entry.filename.replace("\\", "/"))
                    leaves = name.is_absolute() or ".." in name.parts or ":" in entry.filename
                    if leaves or stat.S_ISLNK(entry.external_attr >> 16):
                        raise ValueError(f"{entry.filename!r:.60} would leave the folder")
                if sum(entry.file_size for entry in file.infolist()) > most * size:
                    raise ValueError(f"it would unpack to over {most} times its size")
                file.extractall(temporary)
        except Exception as error:  # zipfile's, the decompressors', RuntimeError if encrypted
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EIO):
                raise  # not the archive's fault
            raise ValueError(f"{archive} is not a whole zip file ({error}); delete it.") from None
        if not Path(temporary, top).is_dir():
            raise ValueError(f"{archive} has no folder {top}.")
        os.replace(Path(temporary, top), Path(folder, top))


def download_mathvista(folder):
    """MathVista's testmini and all 6,141 pictures (0.9 GB) from the Hub into `folder`."""
    from huggingface_hub import hf_hub_download

    folder = Path(folder)
    fetch = functools.partial(
        hf_hub_download,
        "AI4Math/MathVista",
        repo_type="dataset",
        revision="2b6ad69445fbb5695c9b165475e8decdbeb97747",
        local_dir=folder,
    )
    try:
        if not (folder / "images").is_dir():
            unpack(fetch("images.zip"), folder, "images")
            (folder / "images.zip").unlink()
        fetch("annot_testmini.json")  # last: with it the folder counts as MathVista
    except ValueError:
        raise  # a broken archive, said by unpack
    except Exception as error:  # the client raises its HTTP library's own errors when offline
        raise ConnectionError(f"AI4Math/MathVista could not be fetched ({error}).") from None


def download_scienceqa(folder, addresses):
    """ScienceQA into `folder`, in the layout `load` reads; addresses is a table like SCIENCEQA."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, (url, checksum) in addresses.items():
        path, images = folder / name, folder / "images" / Path(name).stem
        if images.is_dir():
            continue
        if not path.is_file():
            download(url, path, checksum)
        if path.suffix == ".zip":
            unpack(path, images.parent, images.name)
            path.unlink()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Download a data set from its authors' hosts.")
    parser.add_argument("name", choices=["scienceqa", "mathvista"], help="the data set")
    parser.add_argument("--to", metavar="DIR", help="folder (default: what --data NAME reads)")
    where = 'JSON {"train.zip": [address, checksum or null], ...} that replaces built-in addresses'
    parser.add_argument("--addresses", metavar="FILE", help=f"scienceqa: {where}")
    args = parser.parse_args(argv)
    folder = Path(args.to) if args.to else cache_folder() / args.name
    try:
        file = args.addresses
        changed = _field({"table": read_json(file)}, "table", dict, file) if file else {}
        for name, entry in changed.items():
            if name not in SCIENCEQA:
                raise ValueError(f"{file}: {name:.60} is none of {', '.join(SCIENCEQA)}.")
            pair = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if not isinstance(pair[0], str) or not isinstance(pair[1], str | None):
                raise ValueError(f"{file}: {name} is not [address, checksum or null].")
        if args.name == "mathvista":
            download_mathvista(folder)
        else:
            download_scienceqa(folder, SCIENCEQA | changed)
        for split in SPLITS[:3]:
            print(f"{split}: {len(load(folder, split))} problems")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
