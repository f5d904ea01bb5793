"""The trace file, which is also the cache: a record a line, each under the key of what was asked.

`Ledger` is such a file. It is only ever appended to, one write a record, so that a kill costs at
most the record being written; what is in it is not asked, and not paid for, again. The keys are
`files.digest`'s. teacher.py keeps traces and replies that wait for a judge in it, judging.py
verdicts.

A trace: what the student shall write, and in "reply" the teacher's own words.

    {"id": "7", "question": "Will these magnets ...?", "thought": "Two north poles face each other,
     and like poles repel.", "answer": "B", "gold": "B", "verdict": {"correct": true, "consistent":
     true, "by": "rule", "why": ...}, "teacher": "gemini:...", "usage": {"input": 711, "output":
     342, "cost": 0.0018, ...}, "key": ..., "stop": "end", "attempt": 0, "hint": false, "kept":
     true, "reply": {"thought": ..., "answer": ...}}

Left out on purpose: an index, and files of more than one process at a time.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from support import files
from support.teachers.providers import hide

VERSION = 1  # of the prompts, in every key: another one asks everything anew


class Ledger:
    """An append-only JSONL file, a record a line, each with its own "key"; one process at a time.

    records  {key: record} of what the file holds.
    A last line that its writer never finished is cut off. Raises ValueError for a file in use or a
    line that is no record, FileNotFoundError if there is no such folder.
    """

    def __init__(self, path):
        self.path, folder = Path(path), Path(path).absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} for {self.path.name}: make it.")
        if os.path.lexists(path):
            files.regular_file(path)  # a pipe would be waited for
        self.file = open(path, "a+b")  # noqa: SIM115 (held until close)
        in_use = f"{path} is in use by another process: wait for it, or write elsewhere."
        files.lock(self.file, in_use)  # some network disks cannot lock, and it goes on
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        lines += self.finished(lines.pop())
        places = [(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
        self.records = {}
        for record in (record_of(line, where) for where, line in places):
            self.records.setdefault(record["key"], record)

    def finished(self, torn):
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

    def add(self, record):
        """One write, flushed: a kill before it loses the record, a kill after it nothing."""
        self.file.write(hide(json.dumps(record)).encode() + b"\n")
        self.file.flush()
        self.records[record["key"]] = record

    def close(self, delete=False):
        if delete:
            self.path.unlink()
        self.file.close()


def record_of(line, where):
    """The record of a line, or a ValueError that names the line."""
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
    raise ValueError(f"{where} is no record of teacher.py: mend or delete it, or write elsewhere.")


def paid(record):
    """USD that a record cost, its judge included; what has no known price counts nothing."""
    usage = record.get("usage", {})
    return sum(0.0 + (part.get("cost") or 0) for part in (usage, usage.get("judge") or {}))
