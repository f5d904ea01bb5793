"""teachers/batch_api.py with the real SDKs against loopback.py: each batch is sent once and paid
for once, whatever comes between.
"""

import asyncio

import pytest
from asking import WIRES, Killed, both_wires, interrupted, questions

from support.teachers.batch_api import Batches
from support.teachers.calls import Calls
from support.teachers.providers import PRICES


@both_wires
@pytest.mark.slow
def test_a_batch_is_joined_by_id_and_errors_are_asked_again(ask, server, wire):
    questions(ask.folder, 9)
    server.seed, server.script = 3, {"Q3": ["500"], "Q4": ["expired"]}
    code, _, err = ask(wire, "--batch")
    assert code == 0 and len(ask.records()) == 7 and "failed: q3" in err and "failed: q4" in err
    assert ask(wire, "--batch")[0] == 0
    assert len(ask.records()) == 9 and len(server.batches) == 2
    assert [len(server.sent(f"Q{i}")) for i in range(1, 6)] == [1, 1, 2, 2, 1]
    for record in ask.records():
        tag = f"Q{record['id'][1:]}"  # a mix-up would show: other questions, other letters
        assert record["verdict"]["correct"] is True and tag in record["reply"]["thought"]
        usage, price = record["usage"], PRICES[WIRES[wire].partition(":")[2]]
        full = (usage["input"] * price[0] + usage["output"] * price[1]) / 1e6
        assert usage["cost"] == pytest.approx(full / 2)
    assert not (ask.folder / "t.jsonl.batches.json").exists()


@both_wires
@pytest.mark.parametrize("gone", [False, True])
def test_a_batch_is_collected_by_another_process_a_day_later(ask, server, wire, gone):
    questions(ask.folder, 4)
    server.polls = 10**6
    with interrupted(lambda: any(batch["polls"] for batch in server.batches.values())):
        code, _, err = ask(wire, "--batch")
    assert code == 130 and "4 of 4 questions are left" in err
    server.polls = 1
    if gone:  # as batches are after some weeks: it is sent again
        server.batches.clear()
        ask(wire, "--batch")
    assert ask(wire, "--batch")[0] == 0
    assert len(server.batches) == 1 and len(ask.records()) == 4
    assert len(server.sent()) == (8 if gone else 4)


@both_wires
@pytest.mark.parametrize("where", ["answer lost", "before sending", "after sending"])
def test_a_batch_is_not_paid_twice_after_a_crash(ask, server, monkeypatch, wire, where):
    questions(ask.folder, 3)
    server.script = {"batches": ["lost"]} if where == "answer lost" else {}
    stored = Batches.store

    def store(self):
        if any(entry["id"] for entry in self.entries):
            raise Killed  # before the new id is on the disk
        stored(self)
        if where == "before sending":
            raise Killed

    if where != "answer lost":
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Batches, "store", store)
            ask(wire, "--batch")
        assert len(server.batches) == (where == "after sending") and not ask.records()
    assert ask(wire, "--batch")[0] == 0
    assert len(server.batches) == 1 and len(ask.records()) == 3


@both_wires
@pytest.mark.parametrize("status", ["400", "401", "503"])
def test_a_batch_that_is_not_taken_is_an_error_in_words(ask, server, wire, status):
    questions(ask.folder, 2)
    server.script = {"batches": status}
    code, _, err = ask(wire, "--batch", retries=2)
    assert code == 1 and status in err and not server.batches
    server.script = {}
    assert ask(wire, "--batch")[0] == 0 and len(ask.records()) == 2


@both_wires
@pytest.mark.parametrize("fault", ["empty", "html", "malformed", "drip", "503"])
@pytest.mark.slow
def test_batch_calls_that_fail_in_passing_are_tried_again(ask, server, monkeypatch, wire, fault):
    monkeypatch.setattr(Calls, "pause", lambda self, seconds: asyncio.sleep(0))
    questions(ask.folder, 2)
    server.script = {"batches": [fault], "polls": [fault, {}, fault]}
    assert ask(wire, "--batch", timeout=0.2)[0] == 0
    assert len(ask.records()) == 2 and len(server.batches) == 1


@both_wires
def test_a_batch_stays_below_max_cost(ask, server, wire):
    questions(ask.folder, 12)
    flags = ["--batch", "--price", "10", "10", "--max-output", "100"]
    code, _, err = ask(wire, *flags, "--max-cost", "0.006")
    spent = sum(record["usage"]["cost"] for record in ask.records())
    assert code == 0 and "Stopped: --max-cost" in err and 0 < spent <= 0.006
    assert 0 < len(ask.records()) < 12
    assert ask(wire, *flags, "--max-cost", "1")[0] == 0
    assert len(ask.records()) == len(server.sent()) == 12
