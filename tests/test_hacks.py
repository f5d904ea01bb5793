"""The recipes of README.md's "How to hack it": each is made in a copy of the product as it is
printed there, its commands are run, and the change must show in what they leave.

A diff is applied by what it says, not by line numbers: of each hunk the lines that are there (" "
and "-") must be found in the file exactly once.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import httpx2
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import data
from model import PaliGemma
from support import files
from support.dataset import images as pictures
from support.teachers import providers as clients

RECIPES = {
    part.partition("\n")[0]: part
    for part in re.search(
        r"^## How to hack it\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S
    )[1].split("\n### ")[1:]
}
ENCODER, TEACHER, DATA, FUSION, TARGET = RECIPES


def blocks(recipe, kind):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", RECIPES[recipe], re.M | re.S)
    return [text for name, text in fenced if name == kind]


def hunks(recipe):
    """[(file, lines that are there, lines that take their place)]."""
    found = []
    for block in blocks(recipe, "diff"):
        for line in block.splitlines():
            if line.startswith("--- "):
                file = line[4:]
            elif line.startswith("@@"):
                found.append((file, [], []))
            else:
                sign, text = line[:1], line[1:]
                assert sign in "+- "
                _, old, new = found[-1]
                old += [text] if sign != "+" else []
                new += [text] if sign != "-" else []
    return found


def commands(recipe):
    """[(command, lines that it prints)]."""
    parts = "".join(blocks(recipe, "")).split("$ ")[1:]
    return [(part.splitlines()[0], part.splitlines()[1:]) for part in parts]


@pytest.fixture
def hacked(tmp_path):
    """A function that makes a recipe in a copy of the product, which it returns."""

    def make(recipe):
        for path in ("support", "demo", *(p.name for p in ROOT.glob("*.py"))):
            copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
            copy(ROOT / path, tmp_path / path)
        for file, old, new in hunks(recipe):
            text = (tmp_path / file).read_text()
            old, new = ("\n".join(lines) + "\n" for lines in (old, new))
            assert text.count(old) == 1, f"{recipe}: not once in {file}:\n{old}"
            (tmp_path / file).write_text(text.replace(old, new))
        return tmp_path

    return make


def run(folder, recipe):
    """Run a recipe's commands in the copy; each line of the README must be in what they print."""
    cache = folder / "cache"
    cache.mkdir()
    demo = data.demo_folder()  # drawn once, not in each copy
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


def test_there_are_the_five_that_were_asked_for():
    words = ("encoder", "teacher", "data", "fusion", "LoRA")
    assert all(word in name for name, word in zip(RECIPES, words, strict=True))
    assert all(commands(recipe) for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_code_in_ten_lines_that_keep_its_style(recipe, hacked):
    folder = hacked(recipe)
    replaced = 0
    for _, old, new in hunks(recipe):
        added = [line for line in new if line and line not in old]
        replaced += max(len(added), sum(line not in new for line in old))
    assert replaced <= 10
    files = {str(folder / file) for file, *_ in hunks(recipe)}
    for check in (["check"], ["format", "--check"]) if files else ():
        config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
        subprocess.run([sys.executable, "-m", "ruff", *check, *config, *files], check=True)


@pytest.mark.slow
def test_another_vision_encoder(hacked):
    folder = hacked(ENCODER)
    run(folder, ENCODER)
    (cache,) = (folder / "cache/features").iterdir()
    problem = data.load("demo", "train")[0]
    row = json.loads((cache / "manifest.json").read_text())["rows"][files.checksum(problem.image)]
    made = torch.from_numpy(np.load(cache / "features.npy")[row]).float()
    model = PaliGemma.from_pretrained(ROOT / "demo/paligemma")
    pixels = pictures.siglip_pixels(pictures.open_image(problem.image), 96)
    with torch.inference_mode():
        torch.testing.assert_close(
            made, model.image_features(pixels[None])[0], atol=1e-2, rtol=1e-2
        )


class Ollama(http.server.BaseHTTPRequestHandler):
    """What docs.ollama.com/api/generate describes, with one answer to everything."""

    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        said = {"response": "Answer: B", "thinking": "I look. So it is B.", "done": True}
        said |= {"done_reason": "stop", "prompt_eval_count": 70, "eval_count": 9}
        body = json.dumps(said).encode()
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
    monkeypatch.setattr(Ollama, "asked", [])
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_another_teacher(hacked, ollama):
    folder = hacked(TEACHER)
    file = folder / "support/teachers/providers.py"
    here = f"127.0.0.1:{ollama.server_port}"
    file.write_text(file.read_text().replace("localhost:11434", here))
    run(folder, TEACHER)
    problems = {p.id: p for p in data.load("demo", "train")[:3]}
    records = [json.loads(line) for line in (folder / "ollama.jsonl").read_text().splitlines()]
    assert {record["id"] for record in records} == problems.keys() and len(Ollama.asked) == 3
    for record in records:
        assert record["teacher"] == "ollama:qwen3-vl" and record["usage"]["output"] == 9
        assert record["thought"] == "I look. So it is B."
        assert record["kept"] is (record["gold"] == "B")
    assert any(record["kept"] for record in records)
    seen = [len(body["images"]) for body in Ollama.asked]
    assert sum(seen) == sum(p.image is not None for p in problems.values()) > 0
    assert all(body["options"]["num_predict"] == 16_000 for body in Ollama.asked)


@pytest.mark.parametrize("status, again", ((404, False), (429, True), (503, True)))
def test_the_faults_of_a_provider_without_an_sdk_are_known(status, again):
    """A recipe only says `raise_for_status`: a model that is not there ends the run."""
    request = httpx2.Request("POST", "http://localhost:11434/api/generate")
    answer = httpx2.Response(status, request=request)
    with pytest.raises(httpx2.HTTPStatusError) as caught:
        answer.raise_for_status()
    assert clients.status_of(caught.value) == status
    assert (clients.retry_after(caught.value, 1) is not None) is again


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
        learned = [w for name, w in saved.items() if part in name and "lora_B" in name]
        assert learned and all(w.any() for w in learned), part
