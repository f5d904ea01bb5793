"""teacher.py's command line in this process, against loopback.py: shared by its tests. The fixtures
`server` and `ask` are in conftest.py.
"""

import contextlib
import json
import os
import signal
import threading
import time

import loopback
import pytest
from loopback import gold
from PIL import Image

import data
import teacher

KEY = "dummy-key-4f1d9c7e"
WIRES = {"gemini": "gemini:gemini-3.8-flash", "anthropic": "anthropic:claude-haiku-4-5"}
both_wires = pytest.mark.parametrize("wire", WIRES)


def environment(url):
    urls = dict.fromkeys(("ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL"), url)
    return urls | dict.fromkeys(("ANTHROPIC_API_KEY", "GOOGLE_API_KEY"), KEY) | {"NO_PROXY": "*"}


def questions(folder, count, **more):
    """A data file of that many questions; every third has a picture."""
    records = [loopback.question(i, **more) for i in range(1, count + 1)]
    for i in range(3, count + 1, 3):
        records[i - 1]["image"] = f"{i}.png"
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(folder / f"{i}.png")
    write(folder, records)


def write(folder, records):
    (folder / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


class Killed(BaseException):
    """Stands for a kill: nothing in teacher.py catches it."""


def give_up(*_):
    raise Killed("teacher.py hangs")


class Asker:
    """teacher.py's command line, in this process."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys, self.out = folder, capsys, folder / "t.jsonl"

    def __call__(self, wire="gemini", *flags, **options):
        """(exit code, stdout, stderr); no key may be in them or in any file."""
        argv = ["--data", self.folder / "q.jsonl", "--out", self.out]
        argv += ["--teacher", WIRES.get(wire, wire), *flags]
        for name, value in options.items():
            argv += [f"--{name.replace('_', '-')}", value]
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(60)
        try:
            code = teacher.main([str(word) for word in argv])
        finally:
            signal.alarm(0)
            printed = self.capsys.readouterr()
        assert KEY not in printed.out + printed.err
        for file in self.folder.iterdir():
            assert KEY.encode() not in file.read_bytes(), file
        return code, printed.out, printed.err

    def records(self):
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        return [json.loads(line) for line in lines]

    def by_id(self):
        return {record["id"]: record for record in self.records()}


@contextlib.contextmanager
def interrupted(reached, times=1):
    """SIGINT to this process as soon as `reached()`, from a thread."""
    over = threading.Event()

    def watch():
        while not over.wait(0.005):
            if reached():
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.05)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()


def wrong(tag):
    return {"text": f"The answer is ({'ABC'[(gold(tag) + 1) % 3]})."}


def problem(choices=("rope", "belt", "neither"), answer="belt", meta=(), **changes):
    """A question with choices, of which the answer is one, or without."""
    fields = {"id": "1", "question": "Which of the 3 is longest?", "hint": "", "image": None}
    fields |= {"choices": choices, "answer": answer, "lecture": "", "solution": ""} | changes
    index = choices.index(answer) if choices else None
    return data.Problem(**fields, meta={"answer_index": index} | dict(meta))
