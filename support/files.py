"""Files that come from strangers, and files that somebody else may be reading or writing.

Here: a path that is a file and nothing endless; JSON and JSONL with every fault a sentence that
names the file and the line; the checks of a record's fields; a bad record as an error or an entry
of a list; text files that appear whole or not at all; the lock of a file or a folder; checksums,
of a file and of what JSON can say; one line of progress. Only the standard library is used.

Left out on purpose: what the records mean (data.py, traces.py), safetensors (model.py), anything
fetched (downloads.py).
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import stat
import sys
import time
from collections import Counter
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and no folder can be flushed
    fcntl = None

ROOT = Path(__file__).parent.parent  # of the repository: demo/, report.html
MOST_BYTES = 1 << 28  # of a JSON file; all of ScienceQA takes about a tenth
MOST_LINE = 1 << 24  # bytes of a line of JSONL


# --- Reading --------------------------------------------------------------------------------------


def cache_folder():
    """Where downloads and the demo live: $NANOCOT_CACHE, by default ~/.cache/nanocot."""
    return Path(os.environ.get("NANOCOT_CACHE") or Path.home() / ".cache" / "nanocot")


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
                with noted(skipped, f"line {number}"):
                    raise ValueError(f"{where} is not complete JSON ({error}).") from None
                continue
            if line.strip():
                yield where, record


# --- The records in them --------------------------------------------------------------------------


def field(record, key, kind, where, default=None):
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


def inside(folder, relative, where):
    """folder/relative, refused if it leads out of the folder: data files come from strangers."""
    path = os.path.join(folder, relative)  # strings: pathlib takes half of the time to load
    root = os.path.join(os.path.abspath(folder), "")
    if not os.path.join(os.path.abspath(path), "").startswith(root):
        raise ValueError(f"{where}: {relative} is outside {folder}; move it below that folder.")
    return Path(path)


def is_index(text):
    """Whether a text is a number that counts; int() refuses thousands of digits."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def unix_newlines(text):
    """The text, or whatever else it is, with every CR LF a newline."""
    return text.replace("\r\n", "\n") if isinstance(text, str) else text


@contextlib.contextmanager
def noted(skipped, id):
    """A bad record is an error or, where there is a list, an entry (id, reason) of it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if skipped is None:
            raise
        skipped.append((id, str(error)))


def write_skipped(skipped, path):
    """(id, reason) or (id, reason, split) as JSONL, {"id", "reason", "split"?} a line."""
    keys = ("id", "reason", "split")
    rows = [json.dumps(dict(zip(keys, entry, strict=False))) for entry in skipped]
    Path(path).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


# --- Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path, durable=False, **how):
    """A text file to write that appears as `path` when the block ends, whole, or not at all.

    durable  it is on the disk itself then, and so is its name: a power cut takes neither.
    how      errors and newline, as `open` has them. The encoding is UTF-8.
    Until then the text is in path.part, which an error leaves behind. Raises ValueError where
    `path` is a folder.
    """
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8", **how) as file:
        yield file
    if durable:
        flush(part)
    try:
        os.replace(part, path)
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: remove it.") from None
    if durable:
        flush(Path(path).parent)


def write_json(value, path):
    """Whole or not at all, and on the disk itself."""
    with atomic_write(path, durable=True) as file:
        file.write(json.dumps(value, indent=2) + "\n")


def flush(path):
    """To the disk itself, file or folder; Windows cannot."""
    if fcntl:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(handle, busy=None):
    """Lock an open file, or a folder's handle, for one process at a time.

    The kernel lets go of it when the handle is closed, however its process ends.

    busy  what to say if another process has the lock, as a ValueError. Without it that process is
          waited for.
    Returns None, or the OSError of a disk that has no locks, some network disks: whether to go on
    without one is for the caller to say. Windows has none, and nothing is said.
    """
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError:
        raise ValueError(busy) from None
    except OSError as error:
        return error
    return None


def checksum(path, like=None):
    """sha256 of a file, or its git blob id where `like` is one (40 digits)."""
    if like is not None and len(like) == 40:
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value):
    """sha256 of a value as JSON: the key of what was asked, decoded or learned from."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def progress(what, done, total, start, note=""):
    """One line on a terminal with the rate and the time left; nothing into a file or a pipe."""
    if sys.stderr.isatty():
        rate = max(done, 1e-9) / max(time.monotonic() - start, 1e-9)
        left = (total - done) / rate
        text = f"{what}: {done:.0f} of {total:.0f}, {rate:.1f}/s, {left:.0f} s left{note}"
        print(f"\r{text:<60}", end="" if done < total else "\n", file=sys.stderr, flush=True)
