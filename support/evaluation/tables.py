"""Files of predictions and metrics, and the tables that show them side by side.

Writes predictions.jsonl and metrics.json; makes of metrics a table in the terminal, as markdown or
for the report's page, a line a run, and the difference of two runs in words.

Left out: how the numbers come about (metrics.py), and the page (report.py).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from support import files
from support.evaluation.errors import KINDS
from support.evaluation.metrics import DETAILS, compare, grade_all, percent
from support.evaluation.predictions import read_predictions

OTHER_ROWS = {  # key of the metrics, or the way to it: what its row is called
    "parse_failures": "parse failures %", "rougeL": "ROUGE-L", "bleu1": "BLEU-1", "bleu4": "BLEU-4",
    "consistency": "rationale agrees %", "rationale_words mean": "rationale words",
    "loop_share": "words in loops %", "hallucination false_rationales": "false rationales %",
    "hallucination false_facts": "false facts %",
}  # fmt: skip


# --- files
def write_graded(folder, graded, scores):
    """Write metrics.json and predictions.jsonl, with "correct", "parsed", "how", "kind" and its
    "because"."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(folder / "metrics.json") as metrics:
        metrics.write(json.dumps(scores, indent=2) + "\n")
        metrics.flush()  # a disk that is full says so before anything is replaced
        with files.atomic_write(folder / "predictions.jsonl") as lines:  # hours of decoding: first
            for _, x, g in graded:
                lines.write(json.dumps(x | asdict(g), ensure_ascii=False) + "\n")


def graded_folder(folder, problems, faithful=False, limit=None):
    """`grade_all` of what is in a folder's predictions.jsonl; with `limit`, of these problems."""
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    predictions, ids = read_predictions(path), {p.id for p in problems}
    predictions = [x for x in predictions if x["id"] in ids or not limit]
    try:
        return grade_all(problems, predictions, faithful, partial=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def metrics_then(folder, whole=True):
    """What metrics.json says; {} if there is none, or none that can be read: it is made anew; if
    `whole`, also where no table can be made of it. If not, it may only say what it is about."""
    try:
        then = files.read_json(folder / "metrics.json")
        named = all(isinstance(then.get(key, ""), str) for key in ("data", "split"))
        if whole:
            table({"": then}, all_rows=True), runs_table({"": then}), report_tables({"": then})
        return then if named and isinstance(then.get("rationale_format"), str | None) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return {}


# --- tables
def heading(m):
    """Data set and split in words, "" where they are not known."""
    guessed = ", guessing where no answer was found" if m.get("faithful_parse") else ""
    return f"{Path(m['data']).name or m['data']}, {m['split']}{guessed}" if "data" in m else ""


def table(columns, markdown=False, all_rows=False):
    """Runs side by side, {name: metrics} -> text: accuracies with their 95 % interval, n and chance
    at the head of the row. Runs over different problems cannot share those: a table each, with data
    set and split above it. `all_rows`: those of the axes DETAILS as well."""
    texts, hidden = [], {}
    for m in columns.values():
        found = m.get("axes", {})
        hidden |= {axis: found[axis] for axis in DETAILS if axis in found and not all_rows}
    for title, block in same_problems(columns):
        rows = rows_of(block, {name for names in hidden.values() for name in names})
        texts += [title] * bool(title) + [align(rows, markdown)]
    if hidden:
        texts.append(f"(--all-rows: {sum(map(len, hidden.values()))} more, by {', '.join(hidden)})")
    return "\n\n".join(texts)


def same_problems(columns):
    """[(title, {name: metrics})]: columns that can share a table."""
    blocks = {}
    for name, m in columns.items():
        key = heading(m), json.dumps([m["n_by"], m["chance_by"]])
        blocks.setdefault(key, {})[name] = m
    return [(title, block) for (title, _), block in blocks.items()]


def rows_of(block, hidden=()):
    """The rows of one table, as lists of strings; those of AXES below the axis' name."""
    runs = list(block.values())
    names = [name if len(name) <= 20 else ".." + name[-18:] for name in block]
    rows, above = [["accuracy %", "n", "chance", *names]], None
    axis_of = {name: axis for axis, found in runs[0].get("axes", {}).items() for name in found}
    for name, n in runs[0]["n_by"].items():
        if not n or name in hidden:
            continue
        rates = [(m["accuracy"] | m.get("families", {}))[name] for m in runs]
        cis = [", ".join(f"{end:.2f}" for end in m["ci95_by"][name]) for m in runs]
        cells = [f"{rate:.2f} [{ci}]" for rate, ci in zip(rates, cis, strict=True)]
        if (axis := axis_of.get(name)) != above:
            rows.append([f"by {axis}", *[""] * (2 + len(runs))])
        above, label = axis, "  " * bool(axis) + name.removeprefix(f"{axis}: ")[:27]
        rows.append([label, str(n), f"{runs[0]['chance_by'][name]:.2f}", *cells])
    return rows + [[label, "", "", *cells] for label, *cells in more_rows(runs)]


def more_rows(runs):
    """What else the metrics of these runs have, [label, a cell for each]: text scores, stops, and
    how answers succeed and fail."""
    rows = []
    for way, label in OTHER_ROWS.items():
        found = list(runs)
        for key in way.split():
            found = [m and m.get(key) for m in found]
        if any(x is not None for x in found):
            rows.append([label, *("-" if x is None else f"{x:.2f}" for x in found)])
    for stop in sorted({stop for m in runs for stop in m.get("stop", {})} - {"eos"}):
        shares = [stopped(m, stop) for m in runs]
        rows.append([f"stopped by {stop} %", *(f"{x:.2f}" for x in shares)])
    lost = [m.get("skipped", {}) for m in runs]
    for split in dict.fromkeys(split for found in lost for split in found if found[split]):
        rows.append([f"skipped, {split}", *(str(found.get(split, 0)) for found in lost)])
    if any(lost):  # the least the accuracy can be
        asked = [m["n"] + m.get("skipped", {}).get(m.get("split"), 0) for m in runs]
        rates = [m["accuracy"]["avg"] * m["n"] / n for m, n in zip(runs, asked, strict=True)]
        if asked != [m["n"] for m in runs]:
            rows.append(["avg, skipped as wrong", *(f"{rate:.2f}" for rate in rates)])
    kinds = [m.get("failure_modes", {}) for m in runs]
    rows += [["answers in %", *[""] * len(runs)]] * any(kinds)
    for kind in [kind for kind in KINDS if any(kind in found for found in kinds)]:
        counts = [(found.get(kind, 0), m["n"]) for found, m in zip(kinds, runs, strict=True)]
        rows.append([f"  {kind}", *(f"{percent(c / n):.2f} ({c})" for c, n in counts)])
    return rows


def stopped(m, stop):
    """How many in a hundred texts ended so."""
    return percent(m.get("stop", {}).get(stop, 0) / m["n"])


def align(rows, markdown):
    """Rows as text in columns, or as a markdown table; the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    rows = [[pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def runs_table(rows):
    """Many runs on the same problems, a line each: {name: metrics} -> text. Of two-stage runs the
    ROUGE-L of the decoded rationales, and beside it what teacher forcing would have claimed; of
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
        shares = {name: stopped(m, stop) for name, m in rows.items()}
        columns[f"{stop} %"] = {
            name: f"{x:.2f}" for name, x in shares.items() if any(shares.values())
        }
    columns = {title: cells for title, cells in columns.items() if cells}
    lines = [[column.get(name, "-") for column in columns.values()] for name in ["chance", *rows]]
    title = f"{heading(first)}: n = {first['n']} problems".removeprefix(": ")
    if lost := first.get("skipped", {}).get(first.get("split")):
        title += f", {lost} skipped"
    return f"{title}\n\n{align([list(columns), *lines], False)}"


@dataclass
class Column:
    """A run, or a file of predictions, as a column of the table."""

    scores: dict
    graded: list | None = None  # None: its problems are not at hand
    folder: Path | None = None  # that has just this; None: what is shown was not written


def differences(columns):
    """({name: what `compare` says of that column against the first}, the same in words). Columns
    that cannot be compared are left out of the first, and the words say why."""
    (first, a), *others = columns.items()
    compared, words = {}, []
    for name, b in others:
        try:
            if a.graded is None or b.graded is None:
                raise ValueError("the problems are not at hand")
            compared[name] = c = compare(a.graded, b.graded)
            words.append(f"{name} - {first}: {difference(c, a, b)}")
        except ValueError as error:
            words.append(f"{name} - {first}: not compared, {error}")
    return compared, "\n".join(words)


def difference(c, a, b):
    """`compare`'s word on the columns a and b, in words. Never silent on different splits."""
    points = "{:+.2f} points [{:.2f}, {:.2f}]".format(c["difference"], *c["ci95"])
    p = f"= {c['p']:.3f}" if c["p"] >= 0.001 else "< 0.001"
    n = f"n = {c['n']}"
    if c["n"] < max(len(a.graded), len(b.graded)):
        n += ", those that both answered"
    if heading(a.scores) != heading(b.scores):
        n += f"; {heading(b.scores)} against {heading(a.scores)}"
    return f"{points}, {c['better']} better, {c['worse']} worse, McNemar p {p} ({n})"


def report_tables(scores):
    """As `table`, the rows of DETAILS apart: [{"title", "runs", "rows", "more", "folded"}]."""
    tables = []
    for title, block in same_problems(scores):
        runs, kept, folded = list(block.values()), [], []
        axis_of = {row: axis for axis, rows in runs[0].get("axes", {}).items() for row in rows}
        for name, n in runs[0]["n_by"].items():
            rates = [(m["accuracy"] | m.get("families", {})).get(name) for m in runs]
            ends, axis = [m["ci95_by"][name] for m in runs], axis_of.get(name)
            cells = [{"rate": x, "ci95": y} for x, y in zip(rates, ends, strict=True)]
            row = {"name": name, "axis": axis, "n": n, "chance": runs[0]["chance_by"][name]}
            if n:
                (folded if axis in DETAILS else kept).append(row | {"cells": cells})
        said = {"title": title, "runs": list(block)}
        tables.append(said | {"rows": kept, "more": more_rows(runs), "folded": False})
        tables += [said | {"rows": folded, "more": [], "folded": True}] if folded else []
    return tables
