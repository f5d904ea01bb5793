"""Files that come from strangers, and files that another process may be reading or writing.

An error in JSON or JSONL is a sentence that names file and line; a bad record is an error or an
entry of a list; what is written appears whole or not at all. Standard library only.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and no folder can be flushed
    fcntl = None

AnyPath = str | Path
ROOT = Path(__file__).parent.parent  # of the repository
MOST_BYTES = 1 << 28  # of a JSON file; all of ScienceQA takes about a tenth
MOST_LINE = 1 << 24  # bytes of a line of JSONL
MOST_EXPANSION = 100  # of a zip file: images and weights hardly shrink, a bomb a thousandfold


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage, which has 20 lines in train.py."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run_command(name: str, main: Callable[[], None]) -> None:
    """`main()`, its errors a line on stderr and exit status 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")


def cache_folder() -> Path:
    """Where downloads and the demo are kept: $NANOCOT_CACHE, by default ~/.cache/nanocot."""
    return Path(os.environ.get("NANOCOT_CACHE") or Path.home() / ".cache" / "nanocot")


def regular_file(path: AnyPath) -> Path:
    """The path of a file that can be read to an end: no folder, pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # a loop of links, a name with a NUL or too long
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a folder, a pipe or a device where a file is needed.")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path} may not be read by this user: change its permissions.")
    return Path(path)


def read_json(path: AnyPath) -> Any:
    """Parsed JSON; a missing or broken file is an error that names it."""
    size = os.path.getsize(regular_file(path))
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes; JSON of over {MOST_BYTES} is not read.")
    try:
        return parsed(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); fetch it again.") from None


def parsed(content: bytes) -> Any:
    """The value of JSON bytes. Half an emoji ("\\ud83d"), which neither a tokenizer nor a file can
    take, becomes U+FFFD."""
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=distinct)
        if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(re.sub(r"[\ud800-\udfff]", "\ufffd", text))
        return value
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def distinct(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object; of a key that occurs twice, one value would be lost silently."""
    result = dict(pairs)
    if len(result) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return result


def json_lines(file: AnyPath, may_be_torn: bool = False, skipped: list | None = None) -> Iterator:
    """("FILE, line 3", record) of each line that is not blank; skipped: as in `noted`.

    may_be_torn  a last line that breaks off is left out: its writer was interrupted.
    """
    with open(regular_file(file), "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE), b""), 1):
            where = f"{file}, line {number}"
            if len(line) == MOST_LINE:
                raise ValueError(f"{where} has {MOST_LINE} bytes or more: no record is so long.")
            if not line.strip():
                continue
            try:
                record = parsed(line)
            except ValueError as error:
                if may_be_torn and not line.endswith(b"\n"):
                    print(f"{where} was skipped: its writer was interrupted.", file=sys.stderr)
                    return
                with noted(skipped, f"line {number}"):
                    raise ValueError(f"{where} is not complete JSON ({error}).") from None
                continue
            yield where, record


def field(record: Any, key: str, kind: Any, where: AnyPath, default: Any = None) -> Any:
    """record[key], with its type checked; without a default it must be there."""
    if not isinstance(record, dict) or (key not in record and default is None):
        raise ValueError(f'{where} has no "{key}".')
    value = record.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        name = getattr(kind, "__name__", kind)
        raise ValueError(f'{where}: "{key}" is {value!r:.60}, which is not of type {name}.')
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{where}: "{key}" is {value}, which is not a finite number.')
    return value


def inside(folder: AnyPath, relative: str, where: AnyPath) -> Path:
    """folder/relative; ValueError if that leads out of the folder."""
    path = os.path.join(folder, relative)  # strings: pathlib would double the time of loading
    root = os.path.join(os.path.abspath(folder), "")
    if not os.path.join(os.path.abspath(path), "").startswith(root):
        raise ValueError(f"{where}: {relative} is outside {folder}; move it below that folder.")
    return Path(path)


def is_index(text: str) -> bool:
    """Whether a text is a small whole number; int() refuses thousands of digits."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def unix_newlines(text: Any) -> Any:
    """A text with every CR LF a newline; any other value as it is."""
    return text.replace("\r\n", "\n") if isinstance(text, str) else text


@contextlib.contextmanager
def noted(skipped: list | None, id: str) -> Iterator[None]:
    """A bad record inside is an error or, where there is a list, an entry (id, reason) of it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if skipped is None:
            raise
        skipped.append((id, str(error)))


def write_skipped(skipped: list[tuple], path: AnyPath) -> None:
    """(id, reason) or (id, reason, split) as JSONL, {"id", "reason", "split"?} a line."""
    rows = [json.dumps(dict(zip(("id", "reason", "split"), x, strict=False))) for x in skipped]
    Path(path).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def atomic_write(
    path: AnyPath, durable: bool = False, errors: str | None = None, newline: str | None = None
) -> Iterator[TextIO]:
    """A UTF-8 file to write that appears as `path` when the block ends, whole, or not at all: until
    then, and after an error, it is path.part. ValueError where `path` is a folder.

    durable  flushed to the disk, and its name too: a power cut takes neither.
    """
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8", errors=errors, newline=newline) as file:
        yield file
    if durable:
        flush(part)
    try:
        os.replace(part, path)
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: remove it.") from None
    if durable:
        flush(Path(path).parent)


def write_json(value: Any, path: AnyPath) -> None:
    """Durably, whole or not at all."""
    with atomic_write(path, durable=True) as file:
        file.write(json.dumps(value, indent=2) + "\n")


def flush(path: AnyPath) -> None:
    """Flush a file or a folder to the disk; Windows cannot."""
    if fcntl:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(handle: int | TextIO, busy: str | None = None) -> OSError | None:
    """Lock an open file or a folder's handle until it is closed, however the process ends.

    busy  the message of a ValueError if another process has the lock; without it, wait.
    Returns the OSError of a disk without locks, as some network disks are. Windows locks nothing.
    """
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError:
        raise ValueError(busy) from None
    except OSError as error:
        return error
    return None


def checksum(path: AnyPath, like: str | None = None) -> str:
    """sha256 of a file, or its git blob id where `like` is one (40 digits)."""
    if like is not None and len(like) == 40:
        header = b"blob %d\0" % os.path.getsize(path)
        return hashlib.sha1(header + Path(path).read_bytes()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a value as JSON: a key for caches."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def unzip(archive: AnyPath, folder: AnyPath) -> None:
    """Unpack a zip file into a folder.

    Nothing is unpacked, and ValueError says why, if the archive is broken, an entry would leave the
    folder (an absolute path, a drive, "..", a link), or all entries together state over
    MOST_EXPANSION times the archive's size; zipfile gives no entry more than it states.
    """
    size = os.path.getsize(regular_file(archive))
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                link = stat.S_ISLNK(entry.external_attr >> 16)
                if link or re.search(r"^[/\\]|:|(^|[/\\])\.\.([/\\]|$)", entry.filename):
                    raise ValueError(f"{entry.filename!r:.60} would leave the folder")
            if sum(entry.file_size for entry in file.infolist()) > MOST_EXPANSION * size:
                raise ValueError(f"it would unpack to over {MOST_EXPANSION} times its size")
            file.extractall(folder)
    except Exception as error:  # zipfile's, the decompressors', RuntimeError if encrypted
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EIO):
            raise  # not the archive's fault
        raise ValueError(f"{archive} is not a whole zip file ({error}); delete it.") from None


def progress(label: str, done: float, total: float, start: float, note: str = "") -> None:
    """One line on a terminal, with the rate and the time left; nothing into a file or a pipe."""
    if sys.stderr.isatty():
        rate = max(done, 1e-9) / max(time.monotonic() - start, 1e-9)
        text = f"{label}: {done:.0f} of {total:.0f}, {rate:.1f}/s"
        text = f"{text}, {(total - done) / rate:.0f} s left{note}"
        print(f"\r{text:<60}", end="" if done < total else "\n", file=sys.stderr, flush=True)
