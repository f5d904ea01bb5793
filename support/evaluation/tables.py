"""Files of predictions and metrics, and the tables that show metrics side by side: in the terminal,
as markdown, for the report's page, or a line per run; and the difference of two runs in words."""

import json
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from data import Problem
from support import files
from support.dataset.choices import LETTERS
from support.evaluation.errors import KINDS, Graded
from support.evaluation.grading import grade
from support.evaluation.metrics import DETAILS, compare, grade_all, percent
from support.evaluation.predictions import read_predictions

OTHER_ROWS = {  # key of the metrics, or the path to it: the label of its row
    "parse_failures": "parse failures %", "inconclusive": "not conclusive %",
    "rougeL": "ROUGE-L", "bleu1": "BLEU-1", "bleu4": "BLEU-4",
    "consistency": "rationale agrees %", "rationale_words mean": "rationale words",
    "loop_share": "words in loops %", "hallucination false_rationales": "false rationales %",
    "hallucination false_facts": "false facts %",
}  # fmt: skip
SUBJECT = {"data": str, "split": str, "rationale_format": str | None}  # what metrics are about
NEEDED = {  # what tables show of metrics.json; rows without problems are None
    "n": int, "chance": float, "ci95": tuple[float, float], "parse_failures": float,
    "n_by": dict[str, int], "accuracy": dict[str, float | None],
    "chance_by": dict[str, float | None], "ci95_by": dict[str, tuple[float, float] | None],
}  # fmt: skip
OPTIONAL = {  # the same where it is there
    "families": dict[str, float], "axes": dict[str, list[str]], "stop": dict[str, int],
    "failure_modes": dict[str, int], "skipped": dict[str, int],
    "rationale_words": dict[str, float], "hallucination": dict,
    **dict.fromkeys(["rougeL", "rougeL_teacher_forced", "bleu1", "bleu4"], float),
    **dict.fromkeys(["consistency", "loop_share", "inconclusive"], float),
}  # fmt: skip


# --- files
def write_graded(folder: str | Path, graded: list[Graded], scores: dict) -> None:
    """Write metrics.json and predictions.jsonl, with "correct", "parsed", "how", "kind" and its
    "because"."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(folder / "metrics.json") as metrics:
        metrics.write(json.dumps(scores, indent=2) + "\n")
        metrics.flush()  # a full disk raises here, before anything is replaced
        # The predictions took hours to decode: they are replaced first.
        with files.atomic_write(folder / "predictions.jsonl") as lines:
            for _, prediction, grade_ in graded:
                line = json.dumps(prediction | asdict(grade_), ensure_ascii=False)
                lines.write(line + "\n")


def write_leaderboard(folder: str | Path, problems: list[Problem]) -> None:
    """Write leaderboard.json, as A-OKVQA's takes it, of a folder's predictions.jsonl, and say so:
    the answers of these problems are not public. What cannot be read is left out."""
    by_id = {p.id: p for p in problems}
    answers = {}
    for row in read_predictions(Path(folder) / "predictions.jsonl"):
        problem = by_id.get(row["id"])
        letter = problem and grade(problem, row["response"]).parsed
        if letter:
            text = problem.choices[LETTERS.index(letter)] if problem.choices else letter
            answers[row["id"]] = {"multiple_choice": text, "direct_answer": text}
    path = Path(folder) / "leaderboard.json"
    files.write_json(answers, path)
    print(f"These answers are not public: {path} has {len(answers)} of {len(by_id)} predictions.")


def graded_folder(
    folder: str | Path,
    problems: list[Problem],
    faithful: bool = False,
    limit: int | None = None,
    strict: bool = False,
) -> list[Graded]:
    """`grade_all` of a folder's predictions.jsonl; with `limit`, of these problems only."""
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    predictions = read_predictions(path)
    if limit:
        ids = {p.id for p in problems}
        predictions = [x for x in predictions if x["id"] in ids]
    try:
        return grade_all(problems, predictions, faithful, partial=True, strict=strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def stored_metrics(folder: str | Path) -> dict:
    """A folder's metrics.json; {} if there is none or it does not say what its numbers are about.
    They may lack what a table shows (an older version wrote them, say): see `read_metrics`."""
    try:
        scores = files.read_json(Path(folder) / "metrics.json")
    except (OSError, ValueError):
        return {}
    known = isinstance(scores, dict) and all_fit(scores, SUBJECT)
    return scores if known else {}


def read_metrics(folder: str | Path) -> dict:
    """A folder's metrics.json; {} also if it lacks what the tables show: it is computed again."""
    scores = stored_metrics(folder)
    if not NEEDED.keys() <= scores.keys() or not all_fit(scores, NEEDED | OPTIONAL):
        return {}
    shares = scores.get("hallucination", {})
    if not all(fits(shares.get(key, 0), float) for key in ("false_rationales", "false_facts")):
        return {}
    rates = scores["accuracy"] | scores.get("families", {})
    shown = {"avg"} | {name for name, n in scores["n_by"].items() if n}
    cells = (rates, scores["chance_by"], scores["ci95_by"])
    complete = all(values.get(name) is not None for values in cells for name in shown)
    return scores if complete and scores["n"] else {}


def all_fit(scores: dict, kinds: dict[str, Any]) -> bool:
    return all(fits(scores[key], kind) for key, kind in kinds.items() if key in scores)


def fits(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type such as dict[str, float | None]; an int is a count."""
    origin = get_origin(kind)
    inner = get_args(kind)
    if origin is UnionType:
        return any(fits(value, x) for x in inner)
    if origin is dict:
        return isinstance(value, dict) and all(fits(x, inner[1]) for x in value.values())
    if origin is list:
        return isinstance(value, list) and all(fits(x, inner[0]) for x in value)
    if origin is tuple:
        same = isinstance(value, list) and len(value) == len(inner)
        return same and all(map(fits, value, inner))
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e15  # which nan is not
    if kind is int:
        return isinstance(value, int) and 0 <= value < 1e15
    return isinstance(value, kind)


# --- tables
def heading(m: dict) -> str:
    """Data set and split in words, "" where they are not known."""
    if not {"data", "split"} <= m.keys():
        return ""
    rule = ", by the published rule" if m.get("strict_parse") else ""
    if m.get("faithful_parse"):
        rule = ", guessing where no answer was found"
    return f"{Path(m['data']).name or m['data']}, {m['split']}{rule}"


def table(columns: dict[str, dict], markdown: bool = False, all_rows: bool = False) -> str:
    """Runs side by side, {name: metrics} -> text: accuracies with their 95 % interval, n and chance
    at the head of the row. Runs over different problems cannot share those: a table each, with data
    set and split above it. `all_rows`: those of the axes DETAILS as well."""
    texts = []
    hidden = {}
    for title, block in same_problems(columns):
        texts += [title] if title else []
        texts.append(align(rows_of(block, all_rows), markdown))
        for m in block.values():
            hidden |= {axis: names for axis, names in m.get("axes", {}).items() if axis in DETAILS}
    if hidden and not all_rows:
        axes = [axis for axis in DETAILS if axis in hidden]
        texts.append(f"(--all-rows: {sum(map(len, hidden.values()))} more, by {', '.join(axes)})")
    return "\n\n".join(texts)


def report_tables(scores: dict[str, dict]) -> list[dict]:
    """As `table`, the rows of DETAILS apart: [{"title", "runs", "rows", "more", "folded"}]."""
    tables = []
    for title, block in same_problems(scores):
        rows = accuracy_rows(block)
        more = more_rows(list(block.values()))
        common = {"title": title, "runs": list(block)}
        kept = [row for row in rows if row["axis"] not in DETAILS]
        tables.append(common | {"rows": kept, "more": more, "folded": False})
        if folded := [row for row in rows if row["axis"] in DETAILS]:
            tables.append(common | {"rows": folded, "more": [], "folded": True})
    return tables


def same_problems(columns: dict[str, dict]) -> list[tuple[str, dict[str, dict]]]:
    """[(title, {name: metrics})]: columns that can share a table."""
    blocks = {}
    for name, m in columns.items():
        key = heading(m), json.dumps([m["n_by"], m["chance_by"]])
        blocks.setdefault(key, {})[name] = m
    return [(title, block) for (title, _), block in blocks.items()]


def accuracy_rows(block: dict[str, dict]) -> list[dict]:
    """The rows of one table that have problems: [{"name", "axis", "n", "chance", "cells": [{"rate",
    "ci95"} of each run]}]."""
    first = next(iter(block.values()))
    axis_of = {name: axis for axis, names in first.get("axes", {}).items() for name in names}
    rows = []
    for name, n in first["n_by"].items():
        if n:
            cells = []
            for m in block.values():
                rate = (m["accuracy"] | m.get("families", {}))[name]
                cells.append({"rate": rate, "ci95": m["ci95_by"][name]})
            row = {"name": name, "axis": axis_of.get(name), "n": n}
            rows.append(row | {"chance": first["chance_by"][name], "cells": cells})
    return rows


def rows_of(block: dict[str, dict], all_rows: bool) -> list[list[str]]:
    """The rows of one table, as lists of strings; those of AXES below the axis' name."""
    names = [name if len(name) <= 20 else ".." + name[-18:] for name in block]
    rows = [["accuracy %", "n", "chance", *names]]
    above = None
    for row in accuracy_rows(block):
        axis = row["axis"]
        if axis in DETAILS and not all_rows:
            continue
        if axis != above:
            rows.append([f"by {axis}", *[""] * (2 + len(block))])
            above = axis
        label = f"  {row['name'].removeprefix(f'{axis}: ')[:27]}" if axis else row["name"][:27]
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(x["rate"], *x["ci95"]) for x in row["cells"]]
        rows.append([label, str(row["n"]), decimal(row["chance"]), *cells])
    more = more_rows(list(block.values()))
    return rows + [[label, "", "", *cells] for label, *cells in more]


def more_rows(runs: list[dict]) -> list[list[str]]:
    """The other rows of these runs, [label, a cell for each]: text scores, stops, skipped records
    (with the least the accuracy can be), and how answers succeed and fail."""
    rows = []
    for path, label in OTHER_ROWS.items():
        values = [reduce(lambda x, key: (x or {}).get(key), path.split(), m) for m in runs]
        if any(x is not None for x in values):
            rows.append([label, *map(decimal, values)])
    for stop in sorted({stop for m in runs for stop in m.get("stop", {})} - {"eos"}):
        rows.append([f"stopped by {stop} %", *(decimal(stop_share(m, stop)) for m in runs)])
    skipped = [m.get("skipped", {}) for m in runs]
    for split in dict.fromkeys(split for counts in skipped for split in counts if counts[split]):
        rows.append([f"skipped, {split}", *(str(counts.get(split, 0)) for counts in skipped)])
    lost = [counts.get(m.get("split"), 0) for counts, m in zip(skipped, runs, strict=True)]
    if any(lost):
        pairs = zip(runs, lost, strict=True)
        rates = [m["accuracy"]["avg"] * m["n"] / (m["n"] + x) for m, x in pairs]
        rows.append(["avg, skipped as wrong", *map(decimal, rates)])
    counts = [m.get("failure_modes", {}) for m in runs]
    rows += [["answers in %", *[""] * len(runs)]] if any(counts) else []
    for kind in KINDS:
        if any(kind in x for x in counts):
            pairs = [(x.get(kind, 0), m["n"]) for x, m in zip(counts, runs, strict=True)]
            rows.append([f"  {kind}", *(f"{percent(c / n):.2f} ({c})" for c, n in pairs)])
    return rows


def decimal(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def stop_share(m: dict, stop: str) -> float:
    """How many texts in a hundred stopped for this reason."""
    return percent(m.get("stop", {}).get(stop, 0) / m["n"])


def align(rows: list[list[str]], markdown: bool) -> str:
    """Rows as text in columns, or as a markdown table; the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    rows = [[pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def runs_table(rows: dict[str, dict]) -> str:
    """Many runs on the same problems, a line each: {name: metrics} -> text. Of two-stage runs the
    ROUGE-L of the decoded rationales, and next to it what teacher forcing would have claimed; of
    PaliGemma's how many texts did not end by themselves."""
    first = next(iter(rows.values()))
    runs = rows.values()
    texts = {"rougeL": "ROUGE-L", "rougeL_teacher_forced": "teacher-forced"}
    texts = {key: title for key, title in texts.items() if any(key in m for m in runs)}
    stops = [x for x in ("loop", "length", "forced") if any(stop_share(m, x) for m in runs)]
    titles = ["run", *texts.values(), "accuracy %", "95 % interval", "no answer %"]
    lines = [titles + [f"{stop} %" for stop in stops]]
    lines.append(["chance", *"-" * len(texts), decimal(first["chance"]), *"-" * (2 + len(stops))])
    for name, m in rows.items():
        line = [name, *(decimal(m.get(key)) for key in texts), decimal(m["accuracy"]["avg"])]
        line += ["{:.2f} - {:.2f}".format(*m["ci95"]), decimal(m["parse_failures"])]
        lines.append(line + [decimal(stop_share(m, stop)) for stop in stops])
    title = f"{heading(first)}: n = {first['n']} problems".removeprefix(": ")
    if skipped := first.get("skipped", {}).get(first.get("split")):
        title += f", {skipped} skipped"
    return f"{title}\n\n{align(lines, False)}"


@dataclass
class Column:
    """A run, or a file of predictions, as a column of the table."""

    scores: dict
    graded: list[Graded] | None = None  # None: its problems are not available
    folder: Path | None = None  # that has just this; None: it was not written


def differences(columns: dict[str, Column]) -> tuple[dict[str, dict], str]:
    """({name: `compare` of that column with the first}, the same in words). Columns that cannot be
    compared are missing in the dict, and the words say why."""
    (first, a), *others = columns.items()
    compared = {}
    lines = []
    for name, b in others:
        try:
            if a.graded is None or b.graded is None:
                raise ValueError("the problems are not available")
            compared[name] = compare(a.graded, b.graded)
            lines.append(f"{name} - {first}: {difference(compared[name], a, b)}")
        except ValueError as error:
            lines.append(f"{name} - {first}: not compared, {error}")
    return compared, "\n".join(lines)


def difference(compared: dict, a: Column, b: Column) -> str:
    """`compare` of the columns a and b in words, which name different splits."""
    points = "{:+.2f} points [{:.2f}, {:.2f}]".format(compared["difference"], *compared["ci95"])
    p = f"= {compared['p']:.3f}" if compared["p"] >= 0.001 else "< 0.001"
    n = f"n = {compared['n']}"
    if compared["n"] < max(len(a.graded), len(b.graded)):
        n += ", those that both answered"
    if heading(a.scores) != heading(b.scores):
        n += f"; {heading(b.scores)} against {heading(a.scores)}"
    return f"{points}, {compared['better']} better, {compared['worse']} worse, McNemar p {p} ({n})"
