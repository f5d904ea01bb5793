"""Files of predictions and metrics, and the tables that show them side by side.

Writes predictions.jsonl and metrics.json; makes of metrics a table in the terminal, as markdown or
for the report's page, a line a run, and the difference of two runs in words.

Left out: how the numbers come about (metrics.py), and the page (report.py).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data import Problem
from support import files
from support.evaluation.errors import KINDS, Graded
from support.evaluation.metrics import DETAILS, compare, grade_all, percent
from support.evaluation.predictions import read_predictions

OTHER_ROWS = {  # key of the metrics, or the path to it: the label of its row
    "parse_failures": "parse failures %", "inconclusive": "not conclusive %",
    "rougeL": "ROUGE-L", "bleu1": "BLEU-1", "bleu4": "BLEU-4",
    "consistency": "rationale agrees %", "rationale_words mean": "rationale words",
    "loop_share": "words in loops %", "hallucination false_rationales": "false rationales %",
    "hallucination false_facts": "false facts %",
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
    subject = {"data": str, "split": str, "rationale_format": str | None}
    known = isinstance(scores, dict)
    known = known and all(isinstance(scores.get(key, ""), subject[key]) for key in subject)
    return scores if known else {}


def read_metrics(folder: str | Path) -> dict:
    """A folder's metrics.json; {} also if it lacks what the tables show: it is computed again."""
    scores = stored_metrics(folder)
    checks = NEEDED | {key: fits for key, fits in OPTIONAL.items() if key in scores}
    if not all(key in scores and fits(scores[key]) for key, fits in checks.items()):
        return {}
    rates = scores["accuracy"] | scores.get("families", {})
    shown = {"avg"} | {name for name, n in scores["n_by"].items() if n}
    cells = (rates, scores["chance_by"], scores["ci95_by"])
    complete = all(values.get(name) is not None for values in cells for name in shown)
    return scores if complete and scores["n"] else {}


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and abs(x) < 1e15  # which nan is not


def is_count(x: object) -> bool:
    return isinstance(x, int) and 0 <= x < 1e15


def is_interval(x: object) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(is_number, x))


def is_names(x: object) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def each(fits: Callable, or_none: bool = False) -> Callable[[object], bool]:
    """A check of a dict's values."""
    return lambda x: (
        isinstance(x, dict)
        and all(fits(value) or (or_none and value is None) for value in x.values())
    )


def is_hallucination(x: object) -> bool:
    shares = ("false_rationales", "false_facts")
    return isinstance(x, dict) and all(is_number(x.get(key, 0)) for key in shares)


NEEDED = {  # what the tables show of metrics.json, and a check of each value
    "n": is_count, "chance": is_number, "ci95": is_interval, "parse_failures": is_number,
    "n_by": each(is_count),  # of rows without problems the others are None
    "accuracy": each(is_number, or_none=True), "chance_by": each(is_number, or_none=True),
    "ci95_by": each(is_interval, or_none=True),
}  # fmt: skip
OPTIONAL = {  # the same where it is there
    "inconclusive": is_number, "families": each(is_number), "axes": each(is_names),
    "stop": each(is_count),
    "failure_modes": each(is_count), "skipped": each(is_count), "rationale_words": each(is_number),
    "hallucination": is_hallucination,
} | dict.fromkeys(
    ("rougeL", "rougeL_teacher_forced", "bleu1", "bleu4", "consistency", "loop_share"), is_number
)  # fmt: skip


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
    if not all_rows:
        for m in columns.values():
            hidden |= {axis: names for axis, names in m.get("axes", {}).items() if axis in DETAILS}
    names = {name for axis in hidden.values() for name in axis}
    for title, block in same_problems(columns):
        if title:
            texts.append(title)
        texts.append(align(rows_of(block, names), markdown))
    if hidden:
        axes = [axis for axis in DETAILS if axis in hidden]
        texts.append(f"(--all-rows: {sum(map(len, hidden.values()))} more, by {', '.join(axes)})")
    return "\n\n".join(texts)


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
    runs = list(block.values())
    axis_of = {name: axis for axis, names in runs[0].get("axes", {}).items() for name in names}
    rows = []
    for name, n in runs[0]["n_by"].items():
        if not n:
            continue
        cells = []
        for m in runs:
            rate = (m["accuracy"] | m.get("families", {}))[name]
            cells.append({"rate": rate, "ci95": m["ci95_by"][name]})
        chance = runs[0]["chance_by"][name]
        row = {"name": name, "axis": axis_of.get(name), "n": n, "chance": chance}
        rows.append(row | {"cells": cells})
    return rows


def rows_of(block: dict[str, dict], hidden: set[str]) -> list[list[str]]:
    """The rows of one table, as lists of strings; those of AXES below the axis' name."""
    runs = list(block.values())
    names = [name if len(name) <= 20 else ".." + name[-18:] for name in block]
    rows = [["accuracy %", "n", "chance", *names]]
    above = None
    for row in accuracy_rows(block):
        if row["name"] in hidden:
            continue
        axis = row["axis"]
        if axis != above:
            rows.append([f"by {axis}", *[""] * (2 + len(runs))])
            above = axis
        label = f"  {row['name'].removeprefix(f'{axis}: ')[:27]}" if axis else row["name"][:27]
        cells = [
            f"{cell['rate']:.2f} [{', '.join(f'{end:.2f}' for end in cell['ci95'])}]"
            for cell in row["cells"]
        ]
        rows.append([label, str(row["n"]), f"{row['chance']:.2f}", *cells])
    return rows + [[label, "", "", *cells] for label, *cells in more_rows(runs)]


def more_rows(runs: list[dict]) -> list[list[str]]:
    """The other rows of these runs, [label, a cell for each]: text scores, stops, skipped records,
    and how answers succeed and fail."""
    rows = []
    for path, label in OTHER_ROWS.items():
        values = list(runs)
        for key in path.split():
            values = [None if value is None else value.get(key) for value in values]
        if any(x is not None for x in values):
            rows.append([label, *("-" if x is None else f"{x:.2f}" for x in values)])
    for stop in sorted({stop for m in runs for stop in m.get("stop", {})} - {"eos"}):
        rows.append([f"stopped by {stop} %", *(f"{stop_share(m, stop):.2f}" for m in runs)])
    return rows + skipped_rows(runs) + kind_rows(runs)


def skipped_rows(runs: list[dict]) -> list[list[str]]:
    """How many records were skipped, and the least the accuracy can be."""
    skipped = [m.get("skipped", {}) for m in runs]
    rows = []
    for split in dict.fromkeys(split for counts in skipped for split in counts if counts[split]):
        rows.append([f"skipped, {split}", *(str(counts.get(split, 0)) for counts in skipped)])
    asked = [m["n"] + m.get("skipped", {}).get(m.get("split"), 0) for m in runs]
    if asked != [m["n"] for m in runs]:
        rates = [m["accuracy"]["avg"] * m["n"] / n for m, n in zip(runs, asked, strict=True)]
        rows.append(["avg, skipped as wrong", *(f"{rate:.2f}" for rate in rates)])
    return rows


def kind_rows(runs: list[dict]) -> list[list[str]]:
    """The share and count of each kind of right and wrong answers."""
    counts = [m.get("failure_modes", {}) for m in runs]
    rows = [["answers in %", *[""] * len(runs)]] if any(counts) else []
    for kind in KINDS:
        if any(kind in x for x in counts):
            pairs = [(x.get(kind, 0), m["n"]) for x, m in zip(counts, runs, strict=True)]
            rows.append([f"  {kind}", *(f"{percent(c / n):.2f} ({c})" for c, n in pairs)])
    return rows


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
    columns = {"run": {name: name for name in rows} | {"chance": "chance"}}
    for key, title in (("rougeL", "ROUGE-L"), ("rougeL_teacher_forced", "teacher-forced")):
        columns[title] = {name: f"{m[key]:.2f}" for name, m in rows.items() if key in m}
    columns["accuracy %"] = {name: f"{m['accuracy']['avg']:.2f}" for name, m in rows.items()}
    columns["accuracy %"]["chance"] = f"{first['chance']:.2f}"
    interval = "{:.2f} - {:.2f}".format
    columns["95 % interval"] = {name: interval(*m["ci95"]) for name, m in rows.items()}
    columns["no answer %"] = {name: f"{m['parse_failures']:.2f}" for name, m in rows.items()}
    for stop in ("loop", "length", "forced"):
        shares = {name: stop_share(m, stop) for name, m in rows.items()}
        if any(shares.values()):
            columns[f"{stop} %"] = {name: f"{x:.2f}" for name, x in shares.items()}
    columns = {title: cells for title, cells in columns.items() if cells}
    lines = [[column.get(name, "-") for column in columns.values()] for name in ["chance", *rows]]
    title = f"{heading(first)}: n = {first['n']} problems".removeprefix(": ")
    if skipped := first.get("skipped", {}).get(first.get("split")):
        title += f", {skipped} skipped"
    return f"{title}\n\n{align([list(columns), *lines], False)}"


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
    counts = f"{compared['better']} better, {compared['worse']} worse"
    return f"{points}, {counts}, McNemar p {p} ({n})"


def report_tables(scores: dict[str, dict]) -> list[dict]:
    """As `table`, the rows of DETAILS apart: [{"title", "runs", "rows", "more", "folded"}]."""
    tables = []
    for title, block in same_problems(scores):
        rows = accuracy_rows(block)
        kept = [row for row in rows if row["axis"] not in DETAILS]
        folded = [row for row in rows if row["axis"] in DETAILS]
        more = more_rows(list(block.values()))
        common = {"title": title, "runs": list(block)}
        tables.append(common | {"rows": kept, "more": more, "folded": False})
        if folded:
            tables.append(common | {"rows": folded, "more": [], "folded": True})
    return tables
