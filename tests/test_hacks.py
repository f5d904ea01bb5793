"""The five changes of docs/hacking.md: each diff is applied to a copy of the product as it is
printed there, its commands are run, and the change must show in what they write.

A diff is applied by its text, not by line numbers: the lines of a hunk that exist already (" " and
"-") must be in the file exactly once. `python tests/test_hacks.py` lists the hunks that do not fit.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import httpx2
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import data
from demo import scenes
from model import PaliGemma
from support import files
from support.dataset import images as pictures
from support.teachers import providers

HACKING = (ROOT / "docs/hacking.md").read_text()
RECIPES = {part.partition("\n")[0]: part for part in HACKING.split("\n## ")[1:]}
ENCODER, TEACHER, DATA, FUSION, TARGET = RECIPES


@dataclass
class Hunk:
    file: str
    place: str  # the text after @@
    old: list[str] = field(default_factory=list)  # lines that exist
    new: list[str] = field(default_factory=list)  # lines that replace them


def blocks(recipe, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", RECIPES[recipe], re.M | re.S)
    return [text for name, text in fenced if name == language]


def hunks(recipe):
    result = []
    for line in "".join(blocks(recipe, "diff")).splitlines():
        sign = line[:1]
        if line.startswith("--- "):
            file = line[4:]
        elif line.startswith("@@ "):
            result.append(Hunk(file, line[3:]))
        elif sign not in "+- ":
            raise ValueError(f"{recipe}: a diff has the line {line!r}")
        else:
            if sign != "+":
                result[-1].old.append(line[1:])
            if sign != "-":
                result[-1].new.append(line[1:])
    return result


def joined(lines):
    return "".join(f"{line}\n" for line in lines)


def misfits(recipe):
    """A text for each hunk that cannot be applied, with its lines that the file does not have."""
    result = []
    for hunk in hunks(recipe):
        text = (ROOT / hunk.file).read_text()
        times = text.count(joined(hunk.old))
        if times != 1:
            lines = text.splitlines()
            missing = joined(f"  missing: {line}" for line in hunk.old if line not in lines)
            place = f"{recipe}, {hunk.file} @@ {hunk.place}"
            result.append(f"{place}: these lines are there {times} times\n{missing}")
    return "".join(result)


def commands(recipe):
    """[(command, lines that it prints)]."""
    parts = "".join(blocks(recipe, "")).split("$ ")[1:]
    return [(part.splitlines()[0], part.splitlines()[1:]) for part in parts]


@pytest.fixture
def hacked(tmp_path):
    """A function that applies a recipe to a copy of the product and returns the copy's folder."""

    def apply(recipe):
        assert not misfits(recipe), misfits(recipe)
        for path in ("support", "demo", *(p.name for p in ROOT.glob("*.py"))):
            copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
            copy(ROOT / path, tmp_path / path)
        for hunk in hunks(recipe):
            text = (tmp_path / hunk.file).read_text()
            text = text.replace(joined(hunk.old), joined(hunk.new))
            (tmp_path / hunk.file).write_text(text)
        return tmp_path

    return apply


def run(folder, recipe):
    """Run a recipe's commands in the copy; each line printed below one must be in its output."""
    cache = folder / "cache"
    cache.mkdir()
    demo = scenes.demo_folder()  # drawn once, not in each copy
    (cache / demo.name).symlink_to(demo)
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "NANOCOT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    for command, printed in commands(recipe):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line for line in printed if line and line not in lines] == []


def test_there_are_five():
    words = ("encoder", "teacher", "data", "fusion", "LoRA")
    assert all(word in name for name, word in zip(RECIPES, words, strict=True))
    assert all(commands(recipe) for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_ten_lines_and_keeps_the_style(recipe, hacked):
    folder = hacked(recipe)
    changed = 0
    for hunk in hunks(recipe):
        added = [line for line in hunk.new if line and line not in hunk.old]
        changed += max(len(added), sum(line not in hunk.new for line in hunk.old))
    assert changed <= 10
    paths = {str(folder / hunk.file) for hunk in hunks(recipe)}
    for check in (["check"], ["format", "--check"]) if paths else ():
        config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
        subprocess.run([sys.executable, "-m", "ruff", *check, *config, *paths], check=True)


@pytest.mark.slow
def test_another_vision_encoder(hacked):
    folder = hacked(ENCODER)
    run(folder, ENCODER)
    (cache,) = (folder / "cache/features").iterdir()
    problem = data.load("demo", "train")[0]
    row = json.loads((cache / "manifest.json").read_text())["rows"][files.checksum(problem.image)]
    cached = torch.from_numpy(np.load(cache / "features.npy")[row]).float()
    model = PaliGemma.from_pretrained(ROOT / "demo/paligemma")
    pixels = pictures.siglip_pixels(pictures.open_image(problem.image), 96)
    with torch.inference_mode():
        features = model.image_features(pixels[None])[0]
    torch.testing.assert_close(cached, features, atol=1e-2, rtol=1e-2)


class Ollama(http.server.BaseHTTPRequestHandler):
    """What docs.ollama.com/api/generate describes, with one answer to everything."""

    requests = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        reply = {"response": "Answer: B", "thinking": "I look. So it is B.", "done": True}
        reply |= {"done_reason": "stop", "prompt_eval_count": 70, "eval_count": 9}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def ollama(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ollama)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Ollama, "requests", [])
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_another_teacher(hacked, ollama):
    folder = hacked(TEACHER)
    file = folder / "support/teachers/providers.py"
    address = f"127.0.0.1:{ollama.server_port}"
    file.write_text(file.read_text().replace("localhost:11434", address))
    run(folder, TEACHER)
    problems = {p.id: p for p in data.load("demo", "train")[:3]}
    records = [json.loads(line) for line in (folder / "ollama.jsonl").read_text().splitlines()]
    assert {record["id"] for record in records} == problems.keys() and len(Ollama.requests) == 3
    for record in records:
        assert record["teacher"] == "ollama:qwen3-vl" and record["usage"]["output"] == 9
        assert record["thought"] == "I look. So it is B."
        assert record["kept"] is (record["gold"] == "B")
    assert any(record["kept"] for record in records)
    images = [len(body["images"]) for body in Ollama.requests]
    assert sum(images) == sum(p.image is not None for p in problems.values()) > 0
    assert all(body["options"]["num_predict"] == 16_000 for body in Ollama.requests)


@pytest.mark.parametrize("status, retried", ((404, False), (429, True), (503, True)))
def test_the_errors_of_a_provider_without_an_sdk_are_known(status, retried):
    """The recipe only calls `raise_for_status`: a missing model must end the run."""
    request = httpx2.Request("POST", "http://localhost:11434/api/generate")
    response = httpx2.Response(status, request=request)
    with pytest.raises(httpx2.HTTPStatusError) as caught:
        response.raise_for_status()
    assert providers.status_of(caught.value) == status
    assert (providers.retry_after(caught.value, 1) is not None) is retried


@pytest.mark.slow
def test_your_own_data(hacked):
    folder = hacked(DATA)
    (folder / "mine.jsonl").write_text(blocks(DATA, "json")[0])
    run(folder, DATA)
    predictions = (folder / "runs/mine-two-stage-detr/predictions.jsonl").read_text()
    assert [json.loads(line)["id"] for line in predictions.splitlines()] == ["q4"]


@pytest.mark.slow
def test_another_fusion(hacked):
    folder = hacked(FUSION)
    run(folder, FUSION)
    saved = load_file(folder / "runs/addition/answer/model.safetensors")
    assert any("mha_layer" in name for name in saved)
    assert not any("gate_dense" in name for name in saved)
    looks = json.loads((folder / "runs/addition/looks.json").read_text())
    assert {x for looked in looks.values() for look in looked for x in look["gate"]} == {1.0}


@pytest.mark.slow
def test_another_lora_target(hacked):
    folder = hacked(TARGET)
    run(folder, TARGET)
    saved = load_file(folder / "runs/tower/adapter_model.safetensors")
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        weights = [w for name, w in saved.items() if part in name and "lora_B" in name]
        assert weights and all(w.any() for w in weights), part


if __name__ == "__main__":
    sys.exit("".join(map(misfits, RECIPES)) or None)
