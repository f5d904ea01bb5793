"""Files of predictions: ours, and those that other people's evaluation code writes.

`read_predictions` gives a list of {"id", "response"} records whatever the layout (LAYOUTS). Other
keys of a record are kept if the file is ours, else left out.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from support import files
from support.dataset.choices import LETTERS
from support.evaluation.grading import ANSWER, grade

LAYOUTS = """Known layouts:
  JSONL or a JSON list of {"id", "response"}; LLaVA's {"question_id", "text"}
  VLMEvalKit's csv, tsv or JSON list with "index" (or "pid") and "prediction"
  {id: "response"} and MathVista's {id: {"response"}}, where failed calls have an "error"
  ScienceQA's and LLaVA's {"results": {id: index}, "outputs": {id: "response"}}
  LLaVA's {"correct": [...], "incorrect": [...]} of {"question_id", "pred"}
  mm-cot's {"preds": [...], "labels": [...]}, the complete split in its own order."""
IDS = ("id", "pid", "question_id", "index")
TEXTS = ("response", "prediction", "text", "pred")
KINDS = {"id": str, "response": str, "rationale": str | None, "stop": str | None}


def read_predictions(path: str | Path, problems: Sequence = ()) -> list[dict]:
    """[{"id", "response", ...}] of a file in any of LAYOUTS. `problems`: those that the file is
    about, needed where it has no ids. Failed calls are left out, and counted on stderr.

    Raises ValueError naming the line, the problem or the position, and the known layouts."""
    content = files.regular_file(path).read_bytes()
    rows = table_rows(path, content) if Path(path).suffix in (".csv", ".tsv") else None
    if rows is None:
        try:
            whole = files.parsed(content)
        except ValueError:  # several lines, as it should be
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("preds"), list):
            return in_split_order(path, whole["preds"], whole.get("labels", []), problems)
        rows = json_rows(path, whole)
    failed = [where for where, row in rows if isinstance(row, dict) and is_failed(row)]
    if failed:
        some = f"{len(failed)} of {len(rows)} calls failed ({failed[0]} is the first)"
        print(f"{path}: {some}; these are problems without a prediction.", file=sys.stderr)
    kept = [record_of(path, where, row) for where, row in rows if where not in set(failed)]
    return by_position(path, kept, [row for _, row in rows], problems) if not failed else kept


def table_rows(path: str | Path, content: bytes) -> list[tuple[str, dict]]:
    """(where, row) of a csv or tsv file with a header."""
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}.") from None
    csv.field_size_limit(files.MOST_LINE)
    delimiter = "\t" if Path(path).suffix == ".tsv" else ","
    try:
        rows = list(csv.DictReader(text, delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path} is not a complete table ({error}).") from None
    return [(f"row {number}", row) for number, row in enumerate(rows, 2)]


def json_rows(path: str | Path, whole: object) -> list[tuple[str, object]]:
    """(where, record) of a JSON file's content, or of its lines where it is not one value."""
    if isinstance(whole, list):
        return [(f"record {number}", row) for number, row in enumerate(whole, 1)]
    if isinstance(whole, dict) and isinstance(whole.get("results"), dict):
        return list(scienceqa_rows(whole))
    if isinstance(whole, dict) and isinstance(whole.get("incorrect"), list):
        rows = [*(whole["correct"] if isinstance(whole.get("correct"), list) else [])]
        return [(f"record {i}", row) for i, row in enumerate([*rows, *whole["incorrect"]], 1)]
    if isinstance(whole, dict) and whole and not set(IDS) & whole.keys():
        if all(isinstance(row, dict) for row in whole.values()):
            return [(f"problem {i}", {"id": i} | of_the_model(x)) for i, x in whole.items()]
        if all(isinstance(text, str) for text in whole.values()):
            return [(f"problem {i}", {"id": i, "response": x}) for i, x in whole.items()]
        raise ValueError(f"{path} has an unknown layout. {LAYOUTS}")
    return [(where.removeprefix(f"{path}, "), row) for where, row in files.json_lines(path)]


def of_the_model(row: dict) -> dict:
    """What of MathVista's record is the model's: the rest is the problem, and others' verdicts."""
    keys = ("response", "rationale") if row.get("response") else (*TEXTS, "error")
    return {key: row[key] for key in keys if key in row}


def scienceqa_rows(whole: dict) -> Iterator[tuple]:
    """(where, record) of ScienceQA's result file: what the model wrote, else the index read."""
    outputs = whole.get("outputs") if isinstance(whole.get("outputs"), dict) else {}
    for i, index in whole["results"].items():
        letter = LETTERS[index] if type(index) is int and 0 <= index < len(LETTERS) else ""
        yield f"problem {i}", {"id": i, "response": outputs.get(i, letter)}


def is_failed(row: dict) -> bool:
    """Whether a record says that its call failed: an error instead of a response."""
    return bool(row.get("error")) and not row.get("response")


def record_of(path: str | Path, where: str, row: object) -> dict:
    """{"id", "response"} of a record in any layout; a record that has both stays as it is."""
    record = dict(row) if isinstance(row, dict) else {}
    for key, names in (("id", IDS), ("response", TEXTS)):
        name = next((name for name in names if name in record), key)
        value = record.get(name)
        if type(value) is int and (key == "id" or name != key):  # theirs may be numbers
            value = str(value)
        record[key] = value
    for key, kind in KINDS.items():
        if not isinstance(record.get(key), kind):
            found = f"found {json.dumps(row, ensure_ascii=False)[:60]}"
            raise ValueError(f'{path}, {where}: "{key}" must be a string; {found}. {LAYOUTS}')
    ours = isinstance(row, dict) and "id" in row and "response" in row
    return record if ours else {"id": record["id"], "response": record["response"]}


def by_position(
    path: str | Path, records: list[dict], rows: list, problems: Sequence
) -> list[dict]:
    """Records whose "index" counts 0, 1, ... through all problems get the ids of these; their own
    answers, where they have them, must be the gold ones."""
    ids = {problem.id for problem in problems}
    counted = [str(i) for i in range(len(problems))]
    if not problems or [x["id"] for x in records] != counted or ids == set(counted):
        return records
    labels = [str(row.get("answer", "")) if isinstance(row, dict) else "" for row in rows]
    preds = [x["response"] for x in records]
    return in_split_order(path, preds, [f"The answer is ({x})." for x in labels], problems)


def in_split_order(path: str | Path, preds: list, labels: list, problems: Sequence) -> list[dict]:
    """A list without ids, matched to problems by position. Where its labels are answers they must
    be the gold ones, else the split or the order is another."""
    if len(preds) != len(problems):
        found = f"{len(preds)} predictions without ids, for {len(problems)} problems"
        raise ValueError(f"{path} lists {found}; it needs the complete split in its own order.")
    for p, label in zip(problems, labels, strict=False):
        if ANSWER.search(label) and not grade(p, label).correct:
            found = f"{label!r} as the label of problem {p.id}, which has another answer"
            raise ValueError(f"{path} has {found}; it is of another split, or in another order.")
    return [{"id": p.id, "response": text} for p, text in zip(problems, preds, strict=True)]
