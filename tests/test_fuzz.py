"""Files from strangers: a reader takes what a damaged file holds or refuses it in a sentence.

hypothesis damages one file of a valid set (tests/helpers/damage.py): its bytes, a JSON value, the
header of its tensors, an entry of an archive, its encoding. The reader (tests/helpers/strangers.py)
may then raise ValueError or OSError with a sentence that names a file, within SECONDS and MEMORY,
and runs no code of the file's. Where bad records can be skipped, the good ones survive.
"""

import contextlib
import gc
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
from damage import altered, damaged, dumped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strangers import READERS

import data

SECONDS = 5
MEMORY = 1 << 30  # bytes beyond what the process has before the reader starts
SETTINGS = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@contextlib.contextmanager
def within_limits():
    """No garbage collection: hypothesis's hook in it has no room at the end of a deep recursion."""

    def on_alarm(*_):
        pytest.fail(f"It took over {SECONDS} s.")  # no `except Exception` of a reader catches it

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, on_alarm)
    gc.disable()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        gc.enable()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name, examples, tmp_path, monkeypatch):
    write, read, pattern = READERS[name]
    folder, valid, here = (tmp_path / part for part in ("case", "valid", "here"))
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    write(folder)
    shutil.copytree(folder, valid)
    read(folder)

    @settings(SETTINGS, max_examples=examples)
    @given(st.data())
    def check(draws):
        path = draws.draw(st.sampled_from(sorted(valid.glob(pattern))))
        content = draws.draw(damaged(path))
        shutil.rmtree(folder)
        shutil.copytree(valid, folder)
        (folder / path.relative_to(valid)).write_bytes(content)
        try:
            with within_limits():
                read(folder)
        except (ValueError, OSError) as error:
            message = str(error)
            named = str(folder) in message or "image features of" in message
            assert message.endswith(".") and named
        assert not list(here.iterdir())

    check()


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["scienceqa", "mathvista", "own jsonl"])
def test_good_records_survive_a_bad_one(name, examples, tmp_path):
    files = {"scienceqa": "problems.json", "mathvista": "annot_testmini.json"}
    file = tmp_path / files.get(name, "own.jsonl")
    READERS[name][0](tmp_path)
    where = file if name == "own jsonl" else tmp_path
    good = data.load(where, "trainval")
    content = file.read_bytes()

    @settings(SETTINGS, max_examples=examples)
    @given(st.data())
    def check(draws):
        if name == "own jsonl":
            first, *others = content.splitlines()
            changed = draws.draw(altered(json.loads(first)))
            file.write_bytes(b"\n".join([dumped(changed), *others]))
        else:
            records = json.loads(content)
            records["1"] = draws.draw(altered(records["1"]))
            file.write_text(json.dumps(records))
        skipped = []
        problems = data.load(where, "trainval", skipped)
        assert problems[-2:] == good[-2:]
        assert len(problems) + len(skipped) <= 3  # the changed one may be of another split

    check()
