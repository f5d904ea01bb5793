"""The report: report.html filled in with the answers, curves, attention maps and images of runs.

The template next to this file is the page; its data, made here, is JSON in script elements.
Attention maps come from a second forward pass over what was written. They say where numbers came
from, not why (Jain and Wallace 2019, arXiv 1902.10186).

Axes: B batch, T tokens, U of them written, n of them with a map; P I image positions, F width of
their features, D width, K x G heads, L classes.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
from data import Problem
from fusion import MultimodalT5
from model import DETR, PaliGemma
from support import files
from support.dataset import images
from support.evaluation.decoding import token_texts, with_suffix
from support.evaluation.grading import CUE
from support.evaluation.metrics import axes
from support.evaluation.models import paligemma_inputs
from support.evaluation.tables import Column, differences, heading, report_tables
from support.training.settings import read_config

TEMPLATE = Path(__file__).with_suffix(".html")  # page, style and script
TAGS = ("topic", "category", "task", "grade")  # to filter by, as well as the table's axes
IMAGE_SIDE = 384
CURVE_POINTS = 120
LOGGED = ("loss", "val_loss", "val_accuracy")


# --- the page
def write_report(folder: str | Path, columns: dict[str, Column]) -> None:
    """Write FOLDER/report.html, one file that needs no network: the tables of {name: `Column`}, the
    answers, and from the columns' folders the curves of log.jsonl and the maps of looks.json."""
    problems, blocks = report_problems(columns)
    for i, image in enumerate(report_images(problems)):
        blocks[f"image-{i}"] = image
    payload = {
        "runs": [run_facts(name, column) for name, column in columns.items()],
        "tables": report_tables({name: column.scores for name, column in columns.items()}),
        "compared": differences(columns)[0],
        "problems": problems,
    }
    head, script, tail = re.split(r"<!-- (?:payload|images) -->", TEMPLATE.read_text("utf-8"))
    source = re.search(r"<script>(.*?)</script>", script, re.DOTALL)[1].encode()
    allowed = base64.b64encode(hashlib.sha256(source).digest()).decode()
    head = head.replace("script-src 'unsafe-inline'", f"script-src 'sha256-{allowed}'")
    lone = {"errors": "backslashreplace"}  # half a surrogate pair becomes JSON's escape for it
    with files.atomic_write(Path(folder) / "report.html", newline="\n", **lone) as file:
        file.write(head + data_block("payload", payload) + script)
        file.writelines(data_block(name, value) for name, value in blocks.items())
        file.write(tail)


def data_block(name: str, value: object) -> str:
    """A script element that is only data, as JSON in which no text can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:  # which a browser's JSON does not know
        value = json.loads(text, parse_constant=str)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def report_problems(columns: dict[str, Column]) -> tuple[list[dict], dict[str, object]]:
    """(problems with the predictions of all columns, {name of a block: attention maps}). A problem
    is the same in two columns if its id and its question are."""
    shown = {}
    blocks = {}
    for number, column in enumerate(columns.values()):
        file = column.folder and column.folder / "looks.json"
        maps = files.read_json(file) if file and os.path.lexists(file) else {}
        if not isinstance(maps, dict):
            raise ValueError(f"{file} has no maps by problem id. Delete it, or decode again.")
        for problem, prediction, grade in column.graded or ():
            key = problem.id, problem.question
            facts = shown.setdefault(key, problem_facts(problem, len(columns)))
            block = f"attention-{len(blocks)}" if problem.id in maps else None
            facts["runs"][number] = prediction | asdict(grade) | {"attention_maps": block}
            if block:
                blocks[block] = maps[problem.id]
    return list(shown.values()), blocks


def problem_facts(problem: Problem, runs: int) -> dict:
    """What the page shows of a problem, with places for the predictions of so many runs."""
    tags = axes(problem)
    for key in TAGS:
        if problem.meta.get(key) and key not in tags:
            tags[key] = [str(problem.meta[key])]
    gold = problem.meta.get("answer_index")
    if problem.choices and gold is None:
        gold = problem.choices.index(problem.answer)
    facts = asdict(problem) | {"gold": gold, "missing": None, "runs": [None] * runs}
    del facts["meta"]
    return facts | {"tags": {key: names for key, names in tags.items() if names}}


def report_images(problems: list[dict]) -> list[str]:
    """The images as data: addresses, equal ones once. "image" of each problem becomes an index
    into that list, or None and "missing" says why."""
    paths = list(dict.fromkeys(facts["image"] for facts in problems if facts["image"]))
    with ThreadPoolExecutor() as threads:  # Pillow releases the lock while it computes
        encoded = dict(zip(paths, threads.map(data_address, paths), strict=True))
    addresses = dict.fromkeys(x for x in encoded.values() if isinstance(x, str))
    index = {address: i for i, address in enumerate(addresses)}
    for facts in problems:
        if image := encoded.get(facts["image"]):
            facts["image"] = index.get(image)
            facts["missing"] = None if image in index else str(image)
    return list(addresses)


def data_address(path: str) -> str | Exception:
    """A small WebP of an image as a data: address, or the error that says why there is none."""
    try:
        image = images.open_image(path)
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80, method=2)
    except (ValueError, OSError) as error:
        return error
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def run_facts(name: str, column: Column) -> dict:
    """A run's name, a line about it, and its curves. The folder of another split in a run has no
    config.json and no log.jsonl: those of the run are used."""
    home = column.folder or Path(name)
    home = home if (home / "config.json").is_file() else home.parent
    config = read_config(home)
    words = [config.get("model"), config.get("recipe"), heading(column.scores)]
    words.append(f"{column.scores['n']} problems")
    words += [f"seed {config['seed']}"] if "seed" in config else []
    words += [f"commit {config['commit'][:8]}"] if config.get("commit") else []
    log = home / "log.jsonl"
    curves = loss_curves(log) if config and os.path.lexists(log) else []
    return {"name": name, "about": " · ".join(filter(None, words)), "curves": curves}


def loss_curves(file: Path) -> list[dict]:
    """[{"stage", "loss", "val_loss", "val_accuracy"}], each a list of [step, value]; the training
    loss as means over a window of steps. A stage that starts again is another curve."""
    stages = []
    last = {"stage": None}
    for where, entry in files.json_lines(file, may_be_torn=True):
        if not is_log_entry(entry):
            raise ValueError(f"{where} is not a line that train.py writes. Delete the file.")
        if "kernel" in entry:  # what was proved before the first step
            continue
        if entry["stage"] != last["stage"] or entry["step"] <= last["step"]:
            stages.append({"stage": entry["stage"]} | {key: [] for key in LOGGED})
        last = entry
        for key in LOGGED:
            if key in entry and math.isfinite(entry[key]):
                stages[-1][key].append([entry["step"], entry[key]])
    for stage in stages:
        loss = stage["loss"]
        width = max(1, len(loss) // CURVE_POINTS)
        windows = [loss[i : i + width] for i in range(0, len(loss), width)]
        means = [(w[len(w) // 2][0], sum(y for _, y in w) / len(w)) for w in windows]
        stage["loss"] = [[x, float(f"{y:.4g}")] for x, y in means]
    return stages


def is_log_entry(entry: object) -> bool:
    """Whether a line of log.jsonl has a stage, a step and only numbers to draw."""
    if not isinstance(entry, dict) or type(entry.get("stage")) is not str or "step" not in entry:
        return False
    drawn = [entry[key] for key in ("step", *LOGGED) if key in entry]
    return all(type(value) in (int, float) for value in drawn)


# --- attention maps of the fusion
@torch.inference_mode()
def fusion_maps(
    models: list[MultimodalT5],
    stages: dict[str, list[dict]],
    objects: dict[str, dict],
    tokenizer: Tokenizer,
    batch_size: int,
) -> dict[str, list[dict]]:
    """{id: [map of each stage]}: what mmcot's fusion did with each token of its source text.

    stages   {"rationale" or "answer": its examples}, a model each
    objects  `detected_objects` of the same problems

    "tokens"     text of each source token
    "gate"       of each token, Eq. 5's lambda, the mean over D: the share of the image in it
    "attention"  of each token, Eq. 4's weights of the 8 positions that get most of it
    "boxes"      [cx, cy, w, h] of those, in 0..1 of the image; none with published features
    "labels"     what DETR calls them, else their numbers; neither without an image
    """
    maps = {problem_id: [] for problem_id in objects}
    for (stage, examples), model in zip(stages.items(), models, strict=True):
        device = next(model.parameters()).device
        for rows in data.batches([len(e["input_ids"]) for e in examples], batch_size):
            batch = data.collate([examples[i] for i in rows])
            ids = batch["input_ids"].to(device)  # (B, T)
            mask = batch["attention_mask"].to(device)  # (B, T)
            H_language = model.t5.encode(ids, mask)  # (B, T, D)
            features = batch["image_features"].to(device)  # (B, P, F)
            _, gate, attention = model.fusion.explain(H_language, features)
            for row, problem_id in enumerate(batch["ids"]):
                real = mask[row].bool()  # (T,), no pads
                weights = attention[row, real]
                # At most 8 positions; none where `objects` has none, as there is no image.
                most = min(8, len(objects[problem_id]["labels"]))
                best = weights.sum(0).topk(most).indices.tolist()
                entry = {
                    "stage": stage,
                    "tokens": token_texts(tokenizer, ids[row, real].tolist(), False),
                    "gate": decimals(gate[row, real].mean(-1)),  # T numbers
                }
                for name, values in objects[problem_id].items():
                    entry[name] = [values[i] for i in best]
                maps[problem_id].append(entry | {"attention": decimals(weights[:, best])})
    return maps


def detected_objects(
    problems: list[Problem], features: Mapping, detr: DETR | None
) -> dict[str, dict]:
    """{id: {"boxes", "labels"}} of the P positions, by DETR's heads on the features that the model
    read; without the `detr` that made these {"labels": their numbers}."""
    objects = {}
    for problem in problems:
        count = features.shape[0] if problem.id in features else 0
        if detr is None:
            objects[problem.id] = {"labels": [f"position {j}" for j in range(count)]}
            continue
        stored = torch.from_numpy(features[problem.id][:count])
        logits, boxes = detr.detect(stored)
        names = detr.config.id2label or {}
        labels = []
        for best in logits.argmax(-1).tolist():
            is_object = best != detr.config.num_labels
            labels.append(names.get(str(best), str(best)) if is_object else "no object")
        objects[problem.id] = {"boxes": decimals(boxes), "labels": labels}
    return objects


def decimals(tensor: torch.Tensor) -> list:
    """Nested lists of numbers with three decimals."""
    return (tensor.double() * 1000).round().div(1000).tolist()


# --- attention maps of PaliGemma
def paligemma_maps(
    model: PaliGemma, examples: list[dict], written: dict[str, list[int]], tokenizer: Tokenizer
) -> dict[str, dict]:
    """{id: `paligemma_map`} over the ids that the model wrote, {id: ids}: decode's own, as the text
    tokenised again may have others. An <image> token that it wrote is left out: it has no image."""
    image = model.config.image_token_index
    maps = {}
    for example in examples:
        if ids := [i for i in written[example["id"]] if i != image]:
            maps[example["id"]] = paligemma_map(model, example, ids, tokenizer)
    return maps


@torch.inference_mode()
def paligemma_map(model: PaliGemma, example: dict, ids: list[int], tokenizer: Tokenizer) -> dict:
    """What the model attended to when it wrote `ids` after a prompt.

    "tokens"  text of each
    "p"       probability of each, given all before it, at temperature 1; low where a cue was forced
    "grid"    [rows, columns] of image patches
    "maps"    {index of a token `worth_a_map`: base64 of rows * columns bytes}: attention to the
              patches, 255 the strongest, from where the token was predicted (one before its own
              place), the mean over the heads of the last third of the layers
    "share"   {index: how much of that attention the image has; the rest is on text}
    """
    device = model.language_model.embed_tokens.weight.device
    batch = data.pali_collate([with_suffix(example, ids)])
    inputs = paligemma_inputs(model, {k: v.to(device) for k, v in batch.items() if k != "ids"})
    is_patch = inputs["input_ids"][0] == model.config.image_token_index  # (T,)
    tokens = token_texts(tokenizer, ids)
    chosen = worth_a_map(tokens) if is_patch.any() else []
    before = len(example["input_ids"]) - 1  # the position that predicts the first id
    rows = torch.tensor([before + i for i in chosen], dtype=torch.long, device=device)  # (n,)
    captured = []

    def watch(module: torch.nn.Module, args: tuple, weights: torch.Tensor) -> None:
        """weights (1, K, G, T, T)"""
        captured.append(weights[0, :, :, rows][..., is_patch].mean((0, 1)).float().cpu())  # (n, I)

    layers = model.language_model.layers
    last = [layer.self_attn.softmax for layer in layers[len(layers) * 2 // 3 :]]
    hooks = [softmax.register_forward_hook(watch) for softmax in last if chosen]
    try:
        states = model.states(**inputs)[0, before:-1]  # (U, D)
    finally:
        for hook in hooks:
            hook.remove()
    p = model.head(states).float().softmax(-1)[torch.arange(len(ids)), ids]  # (U,)
    maps = torch.stack(captured).mean(0) if chosen else torch.zeros(0, 1)  # n x I; 0 x 1 of none
    grey = (maps / maps.amax(1, keepdim=True).clamp(min=1e-9) * 255).round().byte()
    encoded = [base64.b64encode(row.numpy().tobytes()).decode() for row in grey]
    side = model.config.vision.image_size // model.config.vision.patch_size
    return {
        "tokens": tokens,
        "p": decimals(p),
        "grid": [side, side],
        "maps": dict(zip(map(str, chosen), encoded, strict=True)),
        "share": dict(zip(map(str, chosen), decimals(maps.sum(1)), strict=True)),
    }


def worth_a_map(tokens: list[str], most: int = 24) -> list[int]:
    """Indices of tokens that begin a word: first those of the answer line, then numbers, then words
    of four letters and more."""
    text = "".join(tokens)
    ends = list(accumulate(map(len, tokens)))
    answer = text.rfind(CUE) if CUE in text else text.rstrip().rfind("\n") + 1
    rank = {}
    for word in re.finditer(r"\d[\d.,]*\d|\w+", text):
        token = bisect_right(ends, word.start())
        kinds = (word.start() >= answer, word[0][0].isdigit(), len(word[0]) >= 4)
        if any(kinds):
            rank.setdefault(token, kinds.index(True))
    return sorted(sorted(rank, key=rank.get)[:most])
