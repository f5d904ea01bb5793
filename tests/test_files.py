"""support/files.py: special files, endless lines, files written whole, locks."""

import errno
import os
import threading
import time

import pytest
from samples import OWN

import data
from support import files
from support.dataset import images, sources
from support.dataset.features import image_hash, published_features
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import load_traces
from support.files import json_lines, read_json


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_LINE", 1000)
    file = tmp_path / "own.jsonl"
    file.write_text(OWN + '{"id": "' + "a" * 2000)
    with pytest.raises(ValueError, match="line 2.*1000"):
        data.load(file, "train")
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    file.rename(tmp_path / "large.json")
    with pytest.raises(ValueError, match="large.json.*2052"):
        read_json(tmp_path / "large.json")


def special(folder, name):
    """A path that is not a file: reading most of them would never end."""
    path = folder / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": name, "dangling": "nowhere"}[name])
    return path


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling"])
def test_a_special_file_is_refused_by_every_reader(tmp_path, kind):
    place, names, start = special(tmp_path, kind), tmp_path / "names.json", time.monotonic()
    names.write_text("{}")
    problem = data.Problem("7", "q", (), "a", "", str(place), "", "", {})
    assert [id for id, _ in images.unusable([problem])] == ["7"]
    readers = [(image_hash, problem), (sources.unpack, place, tmp_path, "x")]
    readers += [(read, place) for read in (read_json, images.open_image, read_lines)]
    for name in ("a.csv", "a.json", "a.jsonl", "vit.pth", "detr.npy", "tokenizer.json"):
        (tmp_path / name).symlink_to(place)
    readers += [(load_traces, tmp_path / name) for name in ("a.csv", "a.json", "a.jsonl")]
    readers += [(published_features, tmp_path / name, names) for name in ("vit.pth", "detr.npy")]
    for read, *arguments in [*readers, (load_tokenizer, tmp_path)]:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            read(*arguments)
        assert str(tmp_path) in str(caught.value)
    assert time.monotonic() - start < 5


def read_lines(file):
    return list(json_lines(file))


@pytest.mark.parametrize("name", ["long" * 100, "nul\0", "file/x"])
def test_an_impossible_path_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    for read in (read_json, images.open_image, read_lines):
        with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
            read(tmp_path / name)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    for durable in (False, True):
        with files.atomic_write(path, durable, newline="\r\n") as file:
            file.write(f"é {durable}\n")
            assert path.exists() == durable  # the first one, until the block ends
        assert path.read_bytes() == f"é {durable}\r\n".encode()
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_bytes() == "é True\r\n".encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.part"]
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(ValueError, match="folder"),
        files.atomic_write(tmp_path / "folder") as file,
    ):
        file.write("whole")
    assert (tmp_path / "folder.part").read_text() == "whole"  # it is not lost


def test_one_process_at_a_time(tmp_path):
    def opened():
        return os.open(tmp_path, os.O_RDONLY)  # a folder; a file's handle is no other

    first, second, third = opened(), opened(), opened()
    assert files.lock(first, "busy") is None
    with pytest.raises(ValueError, match="^busy$"):
        files.lock(second, "busy")
    waiting = threading.Thread(target=files.lock, args=(second,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    os.close(first)
    waiting.join(5)
    assert not waiting.is_alive()
    with pytest.raises(ValueError, match="^busy$"):
        files.lock(third, "busy")
    os.close(second)
    assert files.lock(third, "busy") is None
    os.close(third)


def test_a_disk_without_locks_is_reported(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with open(tmp_path / "a", "w") as file:
        assert files.lock(file, "busy").errno == files.lock(file).errno == errno.ENOLCK
