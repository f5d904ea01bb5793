"""The trace file, which is also the cache: a record a line, each under the key of its question.

`Ledger` is such a file. It is only ever appended to, one write a record, so that a kill costs at
most the record being written; what is in it is not asked, and not paid for, again. teacher.py keeps
traces in one and replies that wait for a judge in another, filters.py verdicts.

A trace: what the student shall write, and in "reply" the teacher's own words.

    {"id": "7", "question": "Will these magnets ...?", "thought": "Two north poles face each other,
     and like poles repel.", "answer": "B", "gold": "B", "verdict": {"correct": true, "consistent":
     true, "by": "rule", "why": ...}, "teacher": "gemini:...", "usage": {"input": 711, "output":
     342, "cost": 0.0018, ...}, "key": ..., "stop": "end", "attempt": 0, "hint": false, "kept":
     true, "reply": {"thought": ..., "answer": ...}}

Left out: an index, and files of more than one process at a time.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
from pathlib import Path

from PIL import Image

from support import files
from support.dataset import images
from support.teachers.providers import Failed, hide

VERSION = 1  # of the prompts, a part of every key: after a change of it everything is asked again


@functools.cache
def fingerprint(path: Path | None) -> tuple[str, tuple[int, int]] | tuple[None, None]:
    """(sha256 of an image's file, (width, height)); (None, None) without one. Raises Failed."""
    if path is None:
        return None, None
    try:
        body = files.regular_file(path).read_bytes()
        with Image.open(io.BytesIO(body), formats=images.FORMATS) as image:
            return hashlib.sha256(body).hexdigest(), image.size
    except Exception as error:  # PIL's can be almost anything
        why = getattr(error, "strerror", None) or "it is not an image"
        raise Failed(f"The image {path} cannot be read ({why}).") from None


class Ledger:
    """An append-only JSONL file, a record a line, each with its own "key"; one process at a time.

    records  {key: record} of what the file holds.
    A last line that its writer never finished is cut off. Raises ValueError for a file in use or a
    line that is not a record, FileNotFoundError if there is no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} for {self.path.name}: make it.")
        if os.path.lexists(path):
            files.regular_file(path)  # a pipe would be waited for
        self.file = open(path, "a+b")  # noqa: SIM115 (held until close)
        in_use = f"{path} is in use by another process: wait for it, or write elsewhere."
        files.lock(self.file, in_use)  # some network disks cannot lock: not an error
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        lines += self.finished(lines.pop())
        self.records = {}
        for number, line in enumerate(lines, 1):
            if line.strip():
                record = parse_record(line, f"{path}, line {number}")
                self.records.setdefault(record["key"], record)

    def finished(self, torn: bytes) -> list[bytes]:
        """Mend the end of the file; [the last line] if only its newline was missing."""
        if not torn:
            return []
        try:
            json.loads(torn)
        except (ValueError, RecursionError):
            self.file.truncate(self.file.tell() - len(torn))
            print(f"{self.path}: its last line, cut off half-way, is dropped.", file=sys.stderr)
            return []
        self.file.write(b"\n")
        return [torn]

    def add(self, record: dict) -> None:
        """One write, flushed: a kill before it loses the record, a kill after it nothing."""
        self.file.write(hide(json.dumps(record)).encode() + b"\n")
        self.file.flush()
        self.records[record["key"]] = record

    def close(self, delete: bool = False) -> None:
        if delete:
            self.path.unlink()
        self.file.close()


def parse_record(line: bytes, where: str) -> dict:
    """The record in a line, or a ValueError that names the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not complete JSON ({error}): mend or delete it.") from None
    if isinstance(record, dict) and isinstance(record.get("key"), str):
        parts = [record.get(key, {}) for key in ("usage", "verdict", "reply")]
        if all(isinstance(part, dict) for part in parts):
            with contextlib.suppress(TypeError, AttributeError):
                paid(record)
                return record
    raise ValueError(f"{where} is not one of teacher.py's: delete it, or write elsewhere.")


def paid(record: dict) -> float:
    """USD that a record cost, its judge included; 0 for what has no known price."""
    usage = record.get("usage", {})
    judge = usage.get("judge") or {}
    return 0.0 + (usage.get("cost") or 0) + (judge.get("cost") or 0)


def total_paid(traces: Ledger, pending: Ledger | None) -> float:
    """USD of the traces, and of the paid replies that still wait for their judge."""
    records = list(traces.records.values())
    for key, record in pending.records.items() if pending else ():
        if key not in traces.records:
            records.append(record)
    return sum(map(paid, records))


def close(traces: Ledger, pending: Ledger | None) -> None:
    """Close both files; an empty one, and pending replies that are all judged, are deleted."""
    traces.close(delete=not traces.records)
    if pending:
        pending.close(delete=pending.records.keys() <= traces.records.keys())
