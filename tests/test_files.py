"""support/files.py: what is no file, what has no end; files written whole, and locks."""

import errno
import os
import threading
import time

import pytest
from samples import OWN

import data
from support import files
from support.dataset import images as pictures
from support.dataset import sources
from support.dataset.features import image_hash, published_features
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import load_traces
from support.files import json_lines, read_json


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_LINE", 1000)
    file = tmp_path / "own.jsonl"
    file.write_text(OWN + '{"id": "' + "a" * 2000)
    with pytest.raises(ValueError, match="line 2 has 1000 bytes or more"):
        data.load(file, "train")
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    file.rename(tmp_path / "large.json")
    with pytest.raises(ValueError, match="large.json has 2052 bytes"):
        read_json(tmp_path / "large.json")


def places(folder):
    """Paths that are no files: reading most of them would never end."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    for name, target in {"device": "/dev/zero", "loop": "loop", "dangling": "nowhere"}.items():
        (folder / name).symlink_to(target)
    names = ("folder", "pipe", "device", "loop", "dangling", "long" * 100, "nul\0", "dangling/x")
    return [folder / name for name in names]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """A pipe, a device, a link to itself ... in place of each kind of file."""
    names, start = tmp_path / "names.json", time.monotonic()
    names.write_text("{}")
    for i, place in enumerate(places(tmp_path)):
        problem = data.Problem("7", "q", (), "a", "", str(place), "", "", {})
        assert [id for id, _ in pictures.unusable([problem])] == ["7"]
        readers = [
            (read_json, place),
            (pictures.open_image, place),
            (image_hash, problem),
            (sources.unpack, place, tmp_path, "x"),
            (lambda file: list(json_lines(file)), place),
        ]
        if "\0" not in str(place) and len(place.name) < 99 and place.is_symlink() | place.exists():
            for name in ("a.csv", "a.json", "a.jsonl"):
                moved = tmp_path / f"{i}{name}"
                moved.symlink_to(place)
                readers.append((load_traces, moved))
            for name in ("vit.pth", "detr.npy", "tokenizer.json"):
                (tmp_path / str(i)).mkdir(exist_ok=True)
                (tmp_path / str(i) / name).symlink_to(place)
            readers.append((load_tokenizer, tmp_path / str(i)))
            for name in ("vit.pth", "detr.npy"):
                readers.append((published_features, tmp_path / str(i) / name, names))
        for read, *args in readers:
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                read(*args)
            assert str(tmp_path) in str(caught.value) and str(caught.value).endswith(".")
    assert time.monotonic() - start < 5


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
        pytest.raises(ValueError, match="folder is a folder: remove it."),
        files.atomic_write(tmp_path / "folder") as file,
    ):
        file.write("whole")
    assert (tmp_path / "folder.part").read_text() == "whole"  # it can still be had


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


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    def none(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with open(tmp_path / "a", "w") as file:
        assert files.lock(file, "busy").errno == files.lock(file).errno == errno.ENOLCK
