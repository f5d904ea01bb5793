"""The report: report.html filled in with the answers, curves, looks and pictures of some columns.

The page, its style and its script are the template beside the top level's files; here its payload
is made, JSON in script elements that can hold any text and end none.

Left out: anything that the page loads from elsewhere, and the numbers of its tables
(support/evaluation/tables.py).
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from support import files
from support.dataset import images as pictures
from support.evaluation.metrics import axes
from support.evaluation.tables import differences, heading, report_tables
from support.training.folders import run_config

REPORT = Path(__file__).with_suffix(".html")  # page, style and script
TAGS = ("topic", "category", "task", "grade")  # to filter by, beside the table's axes
PICTURE_SIDE, CURVE_POINTS = 384, 120


def write_report(folder, columns):
    """Write FOLDER/report.html: {name: `Column`} in one file that needs no network. It has their
    tables, of any two the answers side by side, and what lies in their folders: the curves of
    log.jsonl, what the model looked at of looks.json.

    Each picture is in it once, at most 384 pixels a side, and decoded when it is looked at; one
    that cannot be read becomes a sentence. A problem is the same in two columns if its id and its
    question are."""
    shown, looked = report_problems(columns)
    payload = {
        "runs": [run_facts(name, column) for name, column in columns.items()],
        "tables": report_tables({name: column.scores for name, column in columns.items()}),
        "compared": differences(columns)[0],
    }
    blocks = {f"picture-{i}": x for i, x in enumerate(report_pictures(shown))} | looked
    head, script, tail = re.split(r"<!-- (?:payload|pictures) -->", REPORT.read_text("utf-8"))
    only = re.search(r"<script>(.*?)</script>", script, re.DOTALL)[1].encode()
    only = f"'sha256-{base64.b64encode(hashlib.sha256(only).digest()).decode()}'"
    head = head.replace("script-src 'unsafe-inline'", f"script-src {only}")
    half = {"errors": "backslashreplace"}  # half a surrogate pair becomes JSON's escape for it
    with files.atomic_write(Path(folder) / "report.html", newline="\n", **half) as file:
        file.write(head + data_block("payload", payload | {"problems": shown}) + script)
        file.writelines(data_block(name, value) for name, value in blocks.items())
        file.write(tail)


def data_block(name, value):
    """A script element that is only data, as JSON in which no text can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:  # numbers that a browser's JSON has not
        value = json.loads(text, parse_constant=str)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def report_problems(columns):
    """(problems with the predictions of all columns, {name of a block: a look})."""
    shown, blocks = {}, {}
    for number, column in enumerate(columns.values()):
        file = column.folder and column.folder / "looks.json"
        looked = files.read_json(file) if file and os.path.lexists(file) else {}
        if not isinstance(looked, dict):
            raise ValueError(f"{file} has no looks by problem id. Delete it, or decode again.")
        for p, x, g in column.graded or ():
            facts = shown.setdefault((p.id, p.question), problem_facts(p, len(columns)))
            block = f"look-{len(blocks)}" if p.id in looked else None
            facts["runs"][number] = x | asdict(g) | {"look": block}
            if block:
                blocks[block] = looked[p.id]
    return list(shown.values()), blocks


def problem_facts(p, runs):
    """What the page shows of a problem, with places for the predictions of so many runs."""
    tags = axes(p)
    tags |= {key: [str(p.meta[key])] for key in TAGS if p.meta.get(key) and key not in tags}
    gold = p.meta.get("answer_index")
    gold = p.choices.index(p.answer) if p.choices and gold is None else gold
    facts = asdict(p) | {"gold": gold, "missing": None, "runs": [None] * runs}
    del facts["meta"]
    return facts | {"tags": {key: names for key, names in tags.items() if names}}


def report_pictures(shown):
    """The pictures as data: addresses, equal files once; "image" of each problem becomes a place
    in that list, or None and "missing" says why."""

    def small(path):
        try:
            picture = pictures.open_image(path)
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            picture.save(file := io.BytesIO(), "WEBP", quality=80, method=2)
            return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        except (ValueError, OSError) as error:
            return error

    start, made = time.monotonic(), {}
    paths, first = {facts["image"]: None for facts in shown if facts["image"]}, {}
    for path in paths:
        paths[path] = files.checksum(path) if Path(path).is_file() else path
        first.setdefault(paths[path], path)
    with ThreadPoolExecutor() as threads:  # Pillow lets go of the lock while it computes
        for key, picture in zip(first, threads.map(small, first.values()), strict=True):
            made[key] = picture
            files.progress("pictures of the report", len(made), len(first), start)
    places = {key: i for i, key in enumerate(k for k, x in made.items() if isinstance(x, str))}
    for facts in shown:
        if key := paths.get(facts["image"]):
            facts["image"] = places.get(key)
            facts["missing"] = None if key in places else str(made[key])
    return [made[key] for key in places]


def run_facts(name, column):
    """A run's name, a line about it, and its curves. The folder of another split in a run has no
    config.json and no log.jsonl: the run's are its."""
    home = column.folder or Path(name)
    home = home if (home / "config.json").is_file() else home.parent
    config, log = run_config(home), home / "log.jsonl"
    words = [config.get("model"), config.get("recipe"), heading(column.scores)]
    words += [
        f"{column.scores['n']} problems",
        f"seed {config['seed']}" if "seed" in config else "",
    ]
    words += [f"commit {config['commit'][:8]}" if config.get("commit") else ""]
    curves = loss_curves(log) if config and os.path.lexists(log) else []
    return {"name": name, "about": " · ".join(filter(None, words)), "curves": curves}


LOGGED = ("loss", "val_loss", "val_accuracy")


def loss_curves(file):
    """[{"stage", "loss", "val_loss", "val_accuracy"}], each a list of [step, value]; the training
    loss as means over a window of steps. A stage that starts again is another curve."""
    stages, before = [], (None, 0)
    for where, entry in files.json_lines(file, may_be_torn=True):
        told = entry.items() if isinstance(entry, dict) else ()
        numbers = {k for k, v in told if isinstance(v, int | float) and not isinstance(v, bool)}
        named = ("stage", str) in [(k, type(v)) for k, v in told]
        if not named or {"step", *LOGGED} & {k for k, _ in told} - numbers or "step" not in numbers:
            raise ValueError(f"{where} is none that train.py writes. Delete the file.")
        if entry["stage"] != before[0] or entry["step"] <= before[1]:
            stages.append({"stage": entry["stage"]} | {key: [] for key in LOGGED})
        before = entry["stage"], entry["step"]
        for key in stages[-1].keys() & entry.keys() - {"stage"}:
            if math.isfinite(entry[key]):
                stages[-1][key].append([entry["step"], entry[key]])
    for stage in stages:
        loss, width = stage["loss"], max(1, len(stage["loss"]) // CURVE_POINTS)
        windows = [loss[i : i + width] for i in range(0, len(loss), width)]
        means = [(w[len(w) // 2][0], sum(y for _, y in w) / len(w)) for w in windows]
        stage["loss"] = [[x, float(f"{y:.4g}")] for x, y in means]
    return stages
