"""teachers/calls.py with the real SDKs against loopback.py: faults of every kind, Ctrl-C, money."""

import re
import time

import loopback
import pytest
from asking import KEY, WIRES, both_wires, interrupted, questions, write

from support.teachers import calls

# --- faults

PASSING = """429:0 429:ms=20 500 503 529 408 stall drip reset cut short event malformed empty
html nothing""".split()


@both_wires
@pytest.mark.slow
def test_passing_faults_are_tried_again(ask, server, wire):
    questions(ask.folder, len(PASSING))
    server.script = {f"Q{i}": [fault] for i, fault in enumerate(PASSING, 1)}
    begun = time.monotonic()
    code, *_ = ask(wire, concurrency=len(PASSING), timeout=1.5)
    assert code == 0 and time.monotonic() - begun < 20
    found = ask.by_id()
    for i, fault in enumerate(PASSING, 1):
        assert [e["fault"] for e in server.sent(f"Q{i}")] == [fault, None]
        assert found[f"q{i}"]["verdict"]["correct"] and found[f"q{i}"]["usage"]["tries"] == 2
    assert len(ask.records()) == len(PASSING)


def test_no_question_is_asked_more_often_than_retries_say(ask, server):
    questions(ask.folder, 4)
    server.script = {"Q1": "500", "Q2": "malformed", "Q3": "reset"}
    _, _, err = ask(retries=3)
    assert [len(server.sent(f"Q{i}")) for i in range(1, 5)] == [3, 3, 3, 1]
    assert list(ask.by_id()) == ["q4"] and "Traceback" not in err
    failed = re.findall(r"^failed: (q\d): ", err, re.MULTILINE)
    assert sorted(failed) == ["q1", "q2", "q3"]  # in the order of their failing
    assert float(re.search(r"\$([\d.]+) at most", err)[1]) > 0  # 500 is free, half a reply is not
    server.script = {}
    ask(retries=3)
    assert [len(server.sent(f"Q{i}")) for i in range(1, 5)] == [4, 4, 4, 1]
    assert len(ask.records()) == 4


@both_wires
@pytest.mark.parametrize("status", ["400", "413"])
def test_a_request_that_is_refused_fails_alone_and_once(ask, server, wire, status):
    questions(ask.folder, 3)
    server.script = {"Q2": status}
    code, _, err = ask(wire)
    assert len(server.sent("Q2")) == 1 and set(ask.by_id()) == {"q1", "q3"}
    assert f"failed: q2: {status}" in err and code == 0


@both_wires
@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_model_stops_at_once(ask, server, wire, status):
    questions(ask.folder, 12)
    server.script = {"*": status}
    code, _, err = ask(wire, concurrency=2)
    assert code == 1 and not ask.out.exists() and len(server.sent()) <= 2
    assert status in err and err.count("\n") == 1


def test_a_provider_that_is_not_there_ends_the_run(ask, server, monkeypatch):
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    questions(ask.folder, 60)
    for wire in WIRES:
        code, _, err = ask(wire, retries=2)
        assert code == 1 and "20 questions" in err, wire


def test_a_key_in_a_reply_reaches_no_file(ask, server):
    questions(ask.folder, 1)
    server.script = {"Q1": {"thought": f"Their key is {KEY}."}}
    ask()  # which looks for the key
    (record,) = ask.records()
    assert record["reply"]["thought"] == "Their key is [GOOGLE_API_KEY]."


# --- Ctrl-C


def test_ctrl_c_finishes_paid_calls_and_can_be_resumed(ask, server):
    questions(ask.folder, 12)
    server.latency = 0.15
    with interrupted(lambda: len(server.sent()) > 4):
        code, *_ = ask(concurrency=4)
    answered = sum(entry["answered"] for entry in server.sent())
    assert code == 130
    assert 5 <= answered == len(ask.records()) < 12
    server.latency = 0
    assert ask()[0] == 0
    assert len(ask.by_id()) == len(ask.records()) == len(server.sent()) == 12


def test_a_second_ctrl_c_drops_the_calls_under_way(ask, server):
    questions(ask.folder, 4)
    server.script = {"Q2": "stall", "Q3": "stall", "Q4": "stall"}
    begun = time.monotonic()
    with interrupted(lambda: len(server.sent()) == 4 and ask.records(), times=2):
        code, *_ = ask(concurrency=4)
    assert code == 130 and time.monotonic() - begun < 5 and len(ask.records()) == 1


# --- money


def test_max_cost_is_not_passed_and_a_larger_one_goes_on(ask, server):
    questions(ask.folder, 12)
    server.rate, server.faults = 0.3, ["500", "short"]
    flags = {"max_output": 100, "concurrency": 4}
    price = ["--price", "10", "10"]
    counts = []
    for limit in (0.02, 0.03, 1):
        code, _, err = ask("gemini", *price, max_cost=limit, **flags)
        spent = sum(record["usage"]["cost"] for record in ask.records())
        counts.append(len(ask.records()))
        assert code == 0 and spent <= limit
        assert ("--max-cost" in err) == (limit < 1)
    assert 0 < counts[0] < counts[1] < counts[2] == 12
    answered = [entry["tag"] for entry in server.sent() if entry["answered"]]
    assert sorted(answered) == sorted({f"Q{i}" for i in range(1, 13)})


def test_max_cost_counts_calls_under_way_and_stops_only_where_one_more_may_pass_it(ask, server):
    write(ask.folder, [loopback.question(i) for i in range(1, 13)])
    server.latency = 0.05  # without limit all twelve are under way before the first has a cost
    flags = {"max_cost": 0.004, "max_output": 100, "concurrency": 12}
    _, _, err = ask("gemini", "--price", "10", "10", **flags)
    spent = sum(record["usage"]["cost"] for record in ask.records())
    most = float(re.search(r"a call may cost \$(\d+\.\d+)", err)[1])
    assert spent <= 0.004 < spent + most + 1e-4 and len(ask.records()) > 1


@pytest.mark.parametrize(
    "provider, size, image",
    [("anthropic", (300, 200), 80), ("anthropic", None, 0), ("gemini", None, 0)],
)
def test_an_image_counts_by_its_area(provider, size, image):
    """Anthropic: a token for 750 pixels, up to a limit; the text has three characters a token."""
    assert calls.input_tokens(provider, "x" * 300, size) == 100 + image
    largest = calls.IMAGE_TOKENS["anthropic"]
    assert calls.input_tokens("anthropic", "", (4000, 3000)) == largest
