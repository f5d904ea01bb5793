"""Small models, rows and runs for the tests of training, in this process and in others."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from conftest import ROOT
from PIL import Image

import data
import fusion
import train
from model import T5, T5Config
from support.evaluation import models
from support.training.runs import Checkpoints
from support.training.settings import parse_args

PALIGEMMA = str(ROOT / "demo/paligemma")
TINY = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)


def tiny_t5(config=TINY, seed=0):
    """A T5 with a fusion over 5 positions of 6 features."""
    torch.manual_seed(seed)
    t5 = T5(config)
    t5.init_weights()
    return fusion.MultimodalT5(t5, fusion.GatedFusion(16, 6))


def t5_row(i, source=None, target=None):
    generator = torch.Generator().manual_seed(i)
    source = torch.randint(3, 40, (source or 4 + 2 * i,), generator=generator).tolist()
    target = torch.randint(3, 40, (target or 3 + i,), generator=generator).tolist()
    features = torch.randn(5, 6, generator=generator)
    return {"id": f"q{i}", "input_ids": source, "labels": target, "image_features": features}


def settings(system, *flags):
    return parse_args(["--model", system, "--device", "cpu", "--threads", "1", *flags])


def adapted(*flags):
    """The demo's PaliGemma with new adapters, and its settings."""
    chosen = settings("paligemma", "--lora-r", "4", *flags)
    model = models.load_paligemma(chosen)
    with contextlib.redirect_stdout(io.StringIO()):
        train.make_trainable(chosen, model)
    return model, chosen


def loss_of(model, chosen):
    return plan_of(model, chosen, []).loss_of


def plan_of(model, chosen, rows, epochs=1, stage="reason", validate=lambda loss_of: {}):
    chosen = replace(chosen, epochs=(epochs,))
    return train.make_plan(chosen, stage, model, rows, validate)


def fit(*args, **options):
    """(model, log lines) of `plan_of` these, trained; nothing is saved."""
    log = io.StringIO()
    model = train.fit(plan_of(*args, **options), Checkpoints(log))
    return model, steps(log.getvalue())


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def steps(log):
    """The entries of steps in the text of a log; before them are verdicts about kernels."""
    entries = [json.loads(line) for line in log.splitlines()]
    return [entry for entry in entries if entry["step"]]


def without_seconds(log):
    entries = steps(log.read_text())
    assert all(entry.pop("seconds") >= 0 for entry in entries)
    return entries


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- bad records ---------------------------------------------------------------------------------

SMALL = {
    "mmcot": """--model mmcot --device cpu --recipe answer --epochs 1 --batch-size 4 --image-size 32
    --max-output 4 4 --max-input 64 --threads 1 --lr 0.003 --eval-batch-size 8""".split()
    + ["--weights", str(ROOT / "demo/t5"), "--vision-weights", str(ROOT / "demo/detr")],
    "paligemma": """--model paligemma --device cpu --alone --threads 1 --epochs 1 --batch-size 4
    --lora-r 2 --max-output 4 4 --lr 0.003 --weights""".split()
    + [PALIGEMMA],
}


def spoiled_data(folder):
    """A .jsonl of the demo's problems with bad records in every split, and bad images."""
    folder.mkdir()
    records = []
    for split, count in (("train", 7), ("val", 3), ("test", 5)):
        for i, p in enumerate([p for p in data.load("demo", split) if p.image][:count]):
            name = f"{split}{i}"
            shutil.copy(p.image, folder / f"{name}.png")
            record = {"id": name, "question": p.question, "choices": list(p.choices)}
            record |= {"answer": p.answer, "solution": p.solution, "split": split}
            records.append(record | {"image": f"{name}.png"})
    by_id = {x["id"]: x for x in records}
    by_id["train1"]["answer"] = 99
    (folder / "train2.png").unlink()
    (folder / "val0.png").write_bytes((folder / "val1.png").read_bytes()[:-30])
    by_id["test0"]["choices"] = 7
    (folder / "test1.png").write_bytes(b"no picture")
    Image.new("RGB", (1, 90)).save(folder / "test2.png")
    records.insert(3, {"id": "whole"})
    write_lines(folder / "bad.jsonl", records)
    with open(folder / "bad.jsonl", "a") as file:
        file.write("{half a line\n")
    return folder / "bad.jsonl"


# ---- runs in processes of their own --------------------------------------------------------------

MMCOT = """--model mmcot --device cpu --limit 12 --epochs 3 --batch-size 6 --max-output 6 4
    --save-every 1 --stage2-rationales generated""".split()
PALI = """--model paligemma --device cpu --limit 8 --epochs 3 --batch-size 4 --lora-r 2
    --lora-dropout 0.1 --eval-problems 2 --max-output 6 3 --save-every 1""".split()


def started(folder, flags):
    """The id of a forked process that trains; its output goes to FOLDER.out, its error to
    FOLDER.error."""
    folder.mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(folder.with_suffix(".out"), "w") as sys.stdout:
            sys.stderr = sys.stdout
            train.main([*flags, "--out", str(folder)])
            status = 0
    except BaseException as error:
        folder.with_suffix(".error").write_text(repr(error))
    finally:
        os._exit(status)


def ended(pid, after=None):
    """Its exit status; SIGKILL `after` so many seconds, unless it has ended by itself."""
    start = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if after is not None and time.monotonic() - start > after:
            os.kill(pid, signal.SIGKILL)
            after = None
        time.sleep(0.002)


def results(folder):
    """Everything that a run leaves, but what names the folder and the seconds of the log."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "log.jsonl":
            kept[name] = without_seconds(path)
        elif path.is_file() and path.suffix != ".html" and path.name != "config.json":
            kept[name] = path.read_bytes()
    return kept


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)
