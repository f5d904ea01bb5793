"""teachers/cli.py: settings, the dry run, the closing table."""

import json
import re
from dataclasses import FrozenInstanceError

import pytest
from asking import WIRES, problem, questions

from support.teachers import cli


def test_settings_are_complete_and_frozen():
    settings = cli.parse_args([])
    assert (settings.teacher, settings.attempts, settings.judge_image) == ("demo", 1, True)
    assert cli.parse_args(["--data", "x.jsonl", "--diverse", "3"]).attempts == 3
    assert sorted(vars(settings)) == sorted(name for flags in cli.GROUPS.values() for name in flags)
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1


@pytest.mark.parametrize(
    "flags",
    [
        "--teacher demo",
        "--judge demo",
        "--teacher gemini --batch --from x",
        "--diverse 3 --attempts 2",
        "--effort low --thinking-budget 2000",
        "--thinking-budget 16000",
        "--thinking-budget 300 --max-output 200",
        "--thinking-budget 1000 --teacher anthropic",
        "--from t.jsonl --out ./t.jsonl",
        "--max-tokens 300",
        "--effort max --teacher gemini",
        "--retries 0",
        "--data demo --shots 2",
    ],
)
def test_settings_that_do_not_go_together_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse_args(["--data", "q.jsonl", *flags.split()])
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "--" in error


def test_a_dry_run_sends_nothing_and_needs_no_key(ask, server, monkeypatch):
    questions(ask.folder, 3)
    for name in ("GOOGLE_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name)
    for wire in WIRES:
        code, out, _ = ask(wire, "--dry-run", "--judge", WIRES["anthropic"])
        assert code == 0 and "3 requests" in out and "$" in out
    assert server.log == [] and {file.name for file in ask.folder.iterdir()} == {"q.jsonl", "3.png"}
    reply = {"question": "", "thought": "It is long.", "answer": "A"}
    lines = [{"id": f"q{i}"} | reply for i in (1, 1, 3)]
    (ask.folder / "from.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--from", ask.folder / "from.jsonl", "--dry-run", "--judge", WIRES["anthropic"])
    code, out, _ = ask("gemini", *flags)
    assert code == 0 and "2 questions, 3 replies" in out and "requests" not in out and "$" in out


def record(id, correct, rule=None, **changes):
    thought = changes.pop("thought", "one two three")
    verdict = {"correct": correct, "consistent": correct, "by": "gemini:m", "why": ""}
    verdict |= {"rule": {"correct": rule, "how": "letter"}} if rule is not None else {}
    base = {"id": id, "thought": thought, "answer": "B", "verdict": verdict, "stop": "end"}
    base |= {"usage": {"cost": 0.25, "judge": {"cost": 0.5}}, "kept": bool(correct)}
    return base | {"reply": {"thought": f"so {thought}", "answer": "B"}} | changes


def test_the_closing_table():
    problems = [problem(id="1", image="x.png"), problem(id="2"), problem(id="3")]
    records = [
        record("1", True, rule=True),
        record("1", False, rule=True, dropped="wrong"),
        record("2", True, kept=False, dropped="too long", thought="a b c d e f"),
        record("3", False, thought="", answer="", stop="blocked", dropped="blocked", usage={}),
    ]
    text = cli.trace_table(records, problems, failed=2)
    lines = text.splitlines()
    assert lines[0].split()[3:] == ["thought", "correct", "consistent", "unclear", "kept", "USD"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:4]}
    assert rows["all"] == ["3", "4", "3", "3", "2", "2", "0", "1", "2.2500"]
    assert rows["IMG"] == ["1", "2", "2", "2", "1", "1", "0", "1", "1.5000"]
    stops, dropped, *sizes, judges = lines[4:]
    assert re.findall(r"(\w+) (\d)", stops) == [("end", "3"), ("blocked", "1")] and " 2 " in stops
    assert re.findall(r"(\w+) (\d)", dropped) == [("wrong", "1"), ("long", "1"), ("blocked", "1")]
    numbers = [re.findall(r"\d+", line.rpartition(": ")[2]) for line in sizes]  # with "Answer: B"
    assert numbers == [["6", "90", "9", "9"], ["5", "90", "8", "8"], ["5", "90", "5", "5"]]
    assert re.findall(r"[\d.]+", judges) == ["50.0", "2", "0.000", "1"]
