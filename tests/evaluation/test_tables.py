"""tables.py: files of predictions and metrics, and the tables made of them."""

import json
import re

import pytest
from conftest import scored
from graded import graded, problem, says

from support.evaluation import metrics, tables


# --- predictions
@pytest.mark.parametrize(
    "line, key",
    [
        ('{"id": "2", "resp', ""),
        ('["2"]', '"id"'),
        ('{"id": 2.5, "response": "x"}', '"id"'),
        ('{"id": true, "response": "x"}', '"id"'),
        ('{"id": "2"}', '"response"'),
        ('{"id": "2", "response": "x", "rationale": 3}', '"rationale"'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, key):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "1", "response": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 3.*{key}") as error:
        tables.read_predictions(file)
    assert str(file) in str(error.value)


def test_one_line_ids_as_numbers_and_a_file_from_windows(tmp_path):
    file = tmp_path / "p.jsonl"
    x = {"id": "1", "response": "one\u2028two", "rationale": None}
    file.write_text(json.dumps(x, ensure_ascii=False), encoding="utf-8")
    assert tables.read_predictions(file) == [x]
    lines = [{"id": 1, "response": "x"}, {"id": "02", "response": "y"}]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    assert [x["id"] for x in tables.read_predictions(file)] == ["1", "02"]
    file.write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match="line 1 "):
        tables.read_predictions(file)
    file.write_text(json.dumps({"7": {"question": "?", "response": "x"}, "8": {"question": "?"}}))
    with pytest.raises(ValueError, match='p.jsonl, problem 8: "response"'):
        tables.read_predictions(file)


def test_the_released_codes_own_file(tmp_path):
    file = tmp_path / "predictions_ans_test.json"
    problems = [problem("7", index=1), problem("9", index=2)]

    def write(preds, labels):
        file.write_text(json.dumps({"num_fail": 0, "scores": {}, "preds": preds, "labels": labels}))

    write([says("B"), says("A")], [says("B"), says("C")])
    predictions = tables.read_predictions(file, problems)
    assert predictions == [{"id": "7", "response": says("B")}, {"id": "9", "response": says("A")}]
    assert scored(problems, predictions)["accuracy"]["avg"] == 50.0
    for other, words in ((problems[:1], "2 predictions.* 1 problems"), (problems[::-1], "9")):
        with pytest.raises(ValueError, match=words):
            tables.read_predictions(file, other)
    write(["Solution: a", "Solution: b"], ["Solution: a", "Solution: c"])  # of the first stage
    assert [x["response"] for x in tables.read_predictions(file, problems)][1] == "Solution: b"


# --- metrics.json
def mixed():
    """Metrics with all that a table can show."""
    meta = {"family": "dots", "source": "TQA"}
    problems = [problem(str(i), meta=meta, solution="It is so.") for i in range(4)]
    predictions = [{"id": p.id, "response": says("A"), "stop": "loop"} for p in problems]
    for x in predictions:
        x["rationale"] = "It is said to be so."
    more = {"data": "demo", "split": "test", "rationale_format": "QCM-LE"}
    shares = {"false_rationales": 25.0, "false_facts": 12.5}
    more |= {"rougeL_teacher_forced": 90.0, "skipped": {"test": 1}, "hallucination": shares}
    return scored(problems, predictions) | more


def values_in(tree, path=()):
    """The path of every value in nested dicts and lists."""
    yield path
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, value in items:
        yield from values_in(value, (*path, key))


def test_metrics_that_a_table_cannot_show_are_not_read(tmp_path):
    """Every value by turns gone, or of another kind: whatever is still read can be shown."""
    file = tmp_path / "metrics.json"
    complete = mixed()
    assert tables.read_metrics(tmp_path) == {}
    file.write_text(json.dumps(complete))
    assert tables.read_metrics(tmp_path) == complete == tables.stored_metrics(tmp_path)
    refused = 0
    paths = [path for path in values_in(complete) if path]
    for path in paths:
        for value in ("gone", None, [], {}, "x", -1, 10**400, float("nan")):
            damaged = json.loads(json.dumps(complete))
            place = damaged
            for key in path[:-1]:
                place = place[key]
            if value == "gone":
                del place[path[-1]]
            else:
                place[path[-1]] = value
            file.write_text(json.dumps(damaged))
            scores = tables.read_metrics(tmp_path)
            refused += scores == {}
            if scores:
                columns = {"run": scores}
                assert tables.table(columns, all_rows=True) and tables.runs_table(columns)
                assert tables.report_tables(columns)
    assert len(paths) > 60 and 3 * len(paths) < refused < 8 * len(paths)
    for text in ("", "[]", '"x"', '{"data": 3}'):
        file.write_text(text)
        assert tables.read_metrics(tmp_path) == tables.stored_metrics(tmp_path) == {}


# --- tables
def test_table_has_chance_next_to_accuracy_and_fits():
    m = metrics.metrics_of(graded([1, 1, 1, 0, 0, 1, 1, 0]))
    lines = tables.table({"runs/a": m, "runs/" + "long-" * 9 + "b": m, "c": m}).split("\n")
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[2:] == ["n", "chance", "runs/a", "..g-long-long-long-b", "c"]
    avg = next(line for line in lines if line.startswith("avg"))
    assert avg.split() == ["avg", "8", "33.33"] + ["62.50", "[30.57,", "86.32]"] * 3
    assert not any(line.startswith("LAN") for line in lines)  # no such problem
    assert next(x for x in lines if x.startswith("parse")).split()[3:] == ["0.00"] * 3
    assert len({line.rfind("]") for line in lines if "]" in line}) == 1  # aligned


def test_table_in_markdown_and_over_different_problems():
    complete = metrics.metrics_of(graded([1, 0, 1, 0, 1]))
    some = metrics.metrics_of(graded([1, 0, 1, 0]))
    with_rationales = complete | {"rougeL": 90.123, "bleu1": 80.0, "bleu4": 7.0}
    text = tables.table({"a": complete, "b": some, "c": with_rationales}, markdown=True)
    first, second = text.split("\n\n")
    assert "|  a |" not in second and re.search(r"\| avg +\| 4 \|", second)
    assert re.search(r"\| ROUGE-L +\| +\| +\| +- \| +90\.12 \|", first)
    assert first.split("\n")[1].startswith("| ---") and first.split("\n")[1].endswith("-: |")


def test_how_answers_end_stands_below():
    items = graded([1, 1, 0, 0])
    first = metrics.metrics_of(items) | {"failure_modes": {"wrong": 1, "sound": 2, "loop": 1}}
    shares = {"n": 4, "false_rationales": 50.0, "false_facts": 12.5}
    second = first | {"failure_modes": {"sound": 4}, "consistency": 75.0, "hallucination": shares}
    lines = tables.table({"a": first, "b": second, "c": metrics.metrics_of(items)}).splitlines()
    assert [re.split("  +", line.strip()) for line in lines[-7:]] == [
        ["rationale agrees %", "-", "75.00", "-"],
        ["false rationales %", "-", "50.00", "-"],
        ["false facts %", "-", "12.50", "-"],
        ["answers in %"],
        ["sound", "50.00 (2)", "100.00 (4)", "0.00 (0)"],
        ["loop", "25.00 (1)", "0.00 (0)", "0.00 (0)"],
        ["wrong", "25.00 (1)", "0.00 (0)", "0.00 (0)"],
    ]
