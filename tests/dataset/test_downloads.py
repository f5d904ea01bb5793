"""support/dataset/sources.py, its downloads: broken connections, checksums, evil archives."""

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from samples import SCIENCEQA, annotation, needs_data, record, scienceqa, write_image, zipped

import data
from support import files
from support.dataset import sources
from support.dataset.images import open_image


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files` with Range; hangs up half-way through names in `drops`, that many times."""

    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        server.log.append((name, self.headers.get("Range")))
        if name not in server.files:
            self.send_error(404)
            return
        content, start = server.files[name], 0
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.drops[name]:
            server.drops[name] -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.drops, running.log, running.ranges = {}, Counter(), [], True
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def host_scienceqa(server, folder):
    """A ScienceQA of three problems on the server; the table of its addresses."""
    splits = ("train", "val", "test")
    records = {str(i): record(split=split, image="image.png") for i, split in enumerate(splits)}
    scienceqa(folder, records, {split: [str(i)] for i, split in enumerate(splits)}, {"0": "a rope"})
    for name in ("problems.json", "pid_splits.json", "captions.json"):
        server.files[name] = (folder / name).read_bytes()
    server.files["instruct_captions.json"] = b'{"captions": {"0": "The image features a rope."}}'
    png = write_image(folder / "a.png").read_bytes()
    for i, split in enumerate(splits):
        server.files[f"{split}.zip"] = zipped([(f"{split}/{i}/image.png", png)])
    sha = hashlib.sha256(server.files["problems.json"]).hexdigest()
    table = {name: [f"{server.url}/{name}", None] for name in server.files}
    return table | {"problems.json": [f"{server.url}/problems.json", sha]}


def test_download_command(server, tmp_path, capsys):
    table = host_scienceqa(server, tmp_path / "host")
    (tmp_path / "table.json").write_text(json.dumps(table))
    server.drops["train.zip"] = 2
    argv = ["scienceqa", "--to", str(tmp_path / "to"), "--addresses", str(tmp_path / "table.json")]
    data.main(argv)
    out = capsys.readouterr().out
    assert "train: 1 problems" in out and "test: 1 problems" in out
    sha = hashlib.sha256(server.files["val.zip"]).hexdigest()
    assert f"val.zip has sha256 {sha}" in out and "problems.json has" not in out
    [problem] = data.load(tmp_path / "to", "train")
    assert open_image(problem.image).size == (40, 30) and problem.meta["caption"] == "a rope"
    ranges = [asked for name, asked in server.log if name == "train.zip"]
    assert len(ranges) == 3 and ranges[0] is None
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in ranges[1:]]
    size = len(server.files["train.zip"])
    assert starts == [size // 2, size // 2 + (size - size // 2) // 2]
    [problem] = data.load(tmp_path / "to", "train", captions="instruct")
    assert problem.meta["caption"] == "The image features a rope."
    left = sorted(path.name for path in (tmp_path / "to").iterdir())
    known = ["captions.json", "images", "instruct_captions.json", "pid_splits.json"]
    assert left == [*known, "problems.json"]
    assert sorted(p.name for p in (tmp_path / "to/images").iterdir()) == ["test", "train", "val"]
    asked = len(server.log)
    data.main(argv)
    assert len(server.log) == asked  # all there: nothing is fetched again


def test_a_later_run_resumes_the_download(server, tmp_path):
    server.files["big"] = os.urandom(3_000_000)
    server.drops["big"] = 99
    path = tmp_path / "big"
    with pytest.raises(ConnectionError, match="/big .*1500000 .*3000000"):
        sources.download(f"{server.url}/big", path, attempts=1)
    assert not path.exists() and (tmp_path / "big.part").stat().st_size == 1_500_000
    server.drops["big"] = 0
    sources.download(f"{server.url}/big", path)
    assert path.read_bytes() == server.files["big"] and server.log[-1][1] == "bytes=1500000-"
    server.ranges = False  # the server sends the whole file again
    server.drops["big"] = 1
    sources.download(f"{server.url}/big", path)
    assert path.read_bytes() == server.files["big"]
    server.ranges = True
    server.files["big"] = b"0123456789"
    for part in (b"0123456789", b"0123456789 and more"):  # complete, and stale
        (tmp_path / "big.part").write_bytes(part)
        sources.download(f"{server.url}/big", path)
        assert path.read_bytes() == server.files["big"]
    assert list(tmp_path.iterdir()) == [path]


def test_download_checksums(server, tmp_path):
    server.files["a"] = b"hello"
    right = hashlib.sha1(b"blob 5\0hello").hexdigest()  # what git hash-object says
    assert right == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    sources.download(f"{server.url}/a", tmp_path / "a", right)
    for wrong, found in (("0" * 40, right), ("0" * 64, hashlib.sha256(b"hello").hexdigest())):
        with pytest.raises(ValueError, match=f"/a .*{found}.*{wrong}"):
            sources.download(f"{server.url}/a", tmp_path / "b", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@needs_data
def test_recorded_checksums_are_of_the_original_files():
    for name, local in (("pid_splits.json", "pid_splits_full.json"), ("captions.json",) * 2):
        checksum = sources.SCIENCEQA[name][1]
        assert files.checksum(SCIENCEQA / local, checksum) == checksum


def test_download_errors_are_sentences(server, tmp_path):
    with pytest.raises(ConnectionError, match="/gone .*404.*--addresses"):
        sources.download(f"{server.url}/gone", tmp_path / "gone")
    assert len(server.log) == 1  # not asked for again
    table = tmp_path / "table.json"
    argv = ["scienceqa", "--to", str(tmp_path), "--addresses", str(table)]
    free = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    free.server_close()
    url = f"http://127.0.0.1:{free.server_port}/problems.json"
    table.write_text(json.dumps({"problems.json": [url, None]}))
    with pytest.raises(SystemExit, match="problems.json .*refused"):
        data.main(argv)


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


def encrypted():
    whole = bytearray(zipped([("train/a", b"x")]))
    for start in (6, whole.index(b"PK\1\2") + 8):  # the flag, in both of its places
        whole[start] |= 1
    return bytes(whole)


WHOLE = zipped([("train/1/image.png", b"x" * 1000)])
OUTSIDE = ["../evil", "train/../../evil", "/tmp/evil", r"C:\evil", r"train\..\..\evil"]
BAD_ZIPS = {name: zipped([("train/1/image.png", b"x"), (name, b"x")]) for name in OUTSIDE}
BAD_ZIPS |= {
    "a link": zipped([(link("train/l"), b"/etc")]),
    "a bomb": zipped([("train/a", bytes(10**7))], zipfile.ZIP_DEFLATED),
    "a folder in place of a file": zipped([("train/a", b"x"), ("train/a/b", b"x")]),
    "a file in place of the folder": zipped([("train", b"x")]),
    "a name too long": zipped([("train/" + "a" * 300, b"x")]),
    "no name": zipped([(zipfile.ZipInfo(""), b"x")]),
    "another folder": zipped([("val/1/image.png", b"x")]),
    "a password": encrypted(),
    "cut": WHOLE[:500],
    "changed": WHOLE.replace(b"x" * 1000, b"y" * 1000),
}


@pytest.mark.parametrize("content", BAD_ZIPS.values(), ids=BAD_ZIPS)
def test_a_bad_zip_unpacks_nothing(tmp_path, content):
    archive, folder = tmp_path / "a/train.zip", tmp_path / "a/b"
    folder.mkdir(parents=True)
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="train.zip"):
        sources.unpack(archive, folder, "train")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "train.zip"]


TABLES = [[], {"../../x.json": ["http://x", None]}, {"val.zip": [5, None]}, {"val.zip": ["x", 5]}]
TABLES += [{"val.zip": "http://x"}]


@pytest.mark.parametrize("table", TABLES)
def test_bad_addresses(tmp_path, table):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    with pytest.raises(SystemExit, match="table.json: "):
        data.main(["scienceqa", "--to", str(tmp_path / "set"), "--addresses", str(file)])
    assert not (tmp_path / "set").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that has MathVista's two files; `hub.asked` are the names it was asked for."""
    png = write_image(tmp_path / "a.png").read_bytes()

    def fetch(repo, name, *, repo_type, revision, local_dir):
        assert (repo, repo_type, len(revision)) == ("AI4Math/MathVista", "dataset", 40)
        fetch.asked.append(name)
        if name not in fetch.files:
            raise OSError("no route to host")
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / name).write_bytes(fetch.files[name])
        return str(Path(local_dir) / name)

    problems = {str(pid): annotation(pid) for pid in (1, 301, 352)}
    archive = zipped([(f"images/{pid}.jpg", png) for pid in problems])
    fetch.asked = []
    fetch.files = {"images.zip": archive, "annot_testmini.json": json.dumps(problems).encode()}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path / "cache"))
    return fetch


def test_mathvista_download(hub, tmp_path, capsys):
    annotations = hub.files.pop("annot_testmini.json")
    with pytest.raises(SystemExit, match="MathVista .*no route to host"):
        data.main(["mathvista"])
    with pytest.raises(FileNotFoundError, match="python data.py mathvista"):
        data.load("mathvista", "test")  # half a download is no data set
    hub.files["annot_testmini.json"] = annotations
    data.main(["mathvista"])
    assert "train: 1 problems" in capsys.readouterr().out
    assert hub.asked == ["images.zip", "annot_testmini.json", "annot_testmini.json"]
    [problem] = data.load("mathvista", "train")
    assert open_image(problem.image).size == (40, 30)
    left = sorted(path.name for path in (tmp_path / "cache/mathvista").iterdir())
    assert left == ["annot_testmini.json", "images"]
    hub.files["images.zip"] = b"not a zip"
    with pytest.raises(SystemExit, match="images.zip"):
        data.main(["mathvista", "--to", str(tmp_path / "other")])


# --- A-OKVQA --------------------------------------------------------------------------------------


def test_aokvqa_fetches_its_files_and_only_the_images_they_use(server, tmp_path, monkeypatch):
    entry = {"question_id": "q", "question": "What?", "choices": ["a", "b"], "image_id": 139}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for split in ("train", "val", "test"):
            answer = {} if split == "test" else {"correct_choice_idx": 1}
            content = json.dumps([entry | answer | {"question_id": f"{split}{i}"} for i in "12"])
            info = tarfile.TarInfo(f"./aokvqa_v1p0_{split}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
        evil = tarfile.TarInfo("../outside.json")
        archive.addfile(evil)
    server.files["aokvqa.tar.gz"] = buffer.getvalue()
    image = write_image(tmp_path / "a.jpg").read_bytes()
    for split in ("train", "val", "test"):
        server.files[f"{split}2017/000000000139.jpg"] = image
    server.drops["val2017/000000000139.jpg"] = 1
    folder = tmp_path / "aokvqa"
    fetch = partial(sources.download_aokvqa, folder, f"{server.url}/aokvqa.tar.gz", server.url)
    fetch()
    assert [p.answer for p in data.load(folder, "val")] == ["b", "b"]
    assert open_image(data.load(folder, "test")[0].image).size == (40, 30)
    assert not (tmp_path / "outside.json").exists()
    asked = len(server.log)
    fetch()
    assert len(server.log) == asked  # all there


def test_a_broken_archive_of_aokvqa(server, tmp_path):
    server.files["x"] = b"no archive"
    with pytest.raises(ValueError, match="aokvqa_v1p0.tar.gz"):
        sources.download_aokvqa(tmp_path, f"{server.url}/x", server.url)
