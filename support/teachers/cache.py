"""The trace file, which is also the cache: a record a line, each under the key of its question.

A `Ledger` is only ever appended to, one write a record, so that a kill costs at most the record
being written; what is in it is not asked, and not paid for, again. teacher.py keeps traces in one
and replies that wait for a judge in another, filters.py keeps verdicts.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import data
from support import files
from support.dataset import images
from support.teachers.providers import Failed, hide

VERSION = 1  # of the prompts, a part of every key: after a change of it everything is asked again


@dataclass(frozen=True)
class Job:
    """One attempt at a problem, and the key of its record."""

    problem: data.Problem
    attempt: int
    key: str


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
    """An append-only JSONL file of `records`, {key: record}, of one process at a time.

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
        *lines, last = self.file.read().split(b"\n")
        if last:
            try:
                json.loads(last)
                lines.append(last)
                self.file.write(b"\n")  # only its newline was missing
            except (ValueError, RecursionError):
                self.file.truncate(self.file.tell() - len(last))
                print(f"{path}: its last line, cut off half-way, is dropped.", file=sys.stderr)
        self.records = {}
        for number, line in enumerate(lines, 1):
            if line.strip():
                record = parse_record(line, f"{path}, line {number}")
                self.records.setdefault(record["key"], record)

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
        raise ValueError(f"{where} is not complete JSON ({error}): repair or delete it.") from None
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
