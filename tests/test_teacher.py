"""teacher.py with the real SDKs against loopback.py: replies, settings, a judge; and offline."""

import os
import re
from pathlib import Path

import loopback
import pytest
from asking import KEY, WIRES, both_wires, questions, wrong
from loopback import gold

import teacher
from support.dataset.traces import load_traces
from support.teachers import providers

REAL = Path(os.environ["NANOCOT_DATA"])
JUDGE = ("gemini", "--judge", WIRES["anthropic"], "--judge-all")


def counts(server, n, kind="ask"):
    return [len(server.sent(f"Q{i}", kind)) for i in range(1, n + 1)]


# --- replies


@both_wires
def test_thoughts_and_answers_are_kept_apart(ask, server, wire):
    questions(ask.folder, 3)
    server.script = {"Q2": {"redacted": True}}
    assert ask(wire)[0] == 0
    keys = "id question thought answer gold verdict teacher usage key stop attempt hint kept reply"
    for i, record in enumerate(sorted(ask.records(), key=lambda record: record["id"]), 1):
        letter = "ABC"[gold(f"Q{i}")]
        thought = loopback.THOUGHTS[1].format(tag=f"Q{i}", letter=letter)
        assert record["reply"] == {"thought": thought, "answer": f"The answer is ({letter})."}
        assert record["answer"] == record["gold"] == letter and record["kept"]
        assert record["verdict"]["correct"] is record["verdict"]["consistent"] is True
        assert (record["stop"], record["attempt"], record["hint"]) == ("end", 0, False)
        assert set(record) == set(keys.split()) and re.fullmatch("[0-9a-f]{64}", record["key"])
        (sent,) = server.sent(f"Q{i}")
        assert sent["images"] == (i == 3) and sent["key"]
        usage = record["usage"]
        assert usage["input"] == len(sent["text"]) // 4 + 258 * (i == 3)
        assert usage["thought"] == len(thought) // 4 < usage["output"]
        price = providers.PRICES[WIRES[wire].partition(":")[2]]
        usd = (usage["input"] * price[0] + usage["output"] * price[1]) / 1e6
        assert usage["cost"] == pytest.approx(usd)
        assert usage["tries"] == 1 and usage["seconds"] > 0
    assert [t["thought"] for t in load_traces(ask.out)] == [r["thought"] for r in ask.records()]


@both_wires
def test_a_reply_without_a_thought_is_kept_as_answer_only(ask, server, wire):
    questions(ask.folder, 2)
    server.think = False
    heads, total, *_ = ask(wire)[1].splitlines()
    for record in ask.records():
        assert record["thought"] == "" and record["verdict"]["correct"] is True
        assert not record["kept"] and record["dropped"] == "no thought"
    table = dict(zip(heads.split(), total.split()[1:], strict=True))
    expected = {"asked": "2", "answered": "2", "thought": "0", "correct": "2", "kept": "0"}
    assert table.items() >= expected.items()


@both_wires
def test_blocked_refused_and_truncated_replies_are_records(ask, server, wire):
    questions(ask.folder, 4)
    stops = ("blocked", "refused", "recitation", "length")
    server.script = {f"Q{i}": {"stop": stop} for i, stop in enumerate(stops, 1)}
    assert ask(wire)[0] == 0
    records = ask.by_id()
    words = ("SAFETY", "SAFETY", "RECITATION", "MAX_TOKENS")
    held = "blocked"
    if wire == "anthropic":
        words = ("refusal", "refusal", "refusal", "max_tokens")
        held = "refused"
    for i, (stop, word) in enumerate(zip(stops, words, strict=True), 1):
        record = records[f"q{i}"]
        verdict = record["verdict"]
        assert record["stop"] == ("length" if stop == "length" else held) and not record["kept"]
        assert verdict["correct"] is False and verdict["consistent"] is None
        assert verdict["by"] == "teacher" and word in verdict["why"]
    ask(wire)
    assert len(server.sent()) == len(ask.records()) == 4


# --- attempts, hints, examples


def test_attempts_stop_at_the_first_right_one(ask, server):
    questions(ask.folder, 3)
    server.script = {"Q1": [wrong("Q1"), wrong("Q1")], "Q2": wrong("Q2")}
    ask(attempts=3)
    assert counts(server, 3) == [3, 3, 1]
    kept = [(r["id"], r["attempt"]) for r in ask.records() if r["kept"]]
    assert sorted(kept) == [("q1", 2), ("q3", 0)]
    seeds = {entry["params"]["seed"] for entry in server.sent("Q2")}
    assert len(seeds) == 3  # Gemini has a seed; the same one would bring the same reply
    ask(attempts=3)
    assert len(server.sent()) == 7
    ask(attempts=4)
    assert counts(server, 3) == [3, 4, 1]


def test_diverse_keeps_distinct_rationales(ask, server):
    questions(ask.folder, 1)
    thoughts = [t.format(tag="Q1", letter="ABC"[gold("Q1")]) for t in loopback.THOUGHTS]
    server.script = {"Q1": [{"thought": thoughts[i]} for i in (0, 0, 1, 2)]}
    ask(attempts=4, diverse=2)
    assert [r["kept"] for r in ask.records()] == [True, False, True]
    assert ask.records()[1]["dropped"] == "not distinct" and len(server.sent()) == 3


@both_wires
@pytest.mark.parametrize("batch", [(), ("--batch",)])
def test_hints_and_prompts_are_recorded_and_are_other_questions(ask, server, wire, batch):
    questions(ask.folder, 3, solution="The rope of Q0: is the longest.")
    ask(wire, *batch)
    ask(wire, "--hint-gold", *batch)
    hint = f"answer is known to be {'ABC'[gold('Q1')]}"
    assert [hint in entry["text"] for entry in server.sent("Q1")] == [False, True]
    assert sorted(record["hint"] for record in ask.records()) == [False] * 3 + [True] * 3
    for more in (["--zero-shot-cot"], ["--shots", "1"]):
        ask(wire, *more, *batch)
        sent = server.sent("Q1")[-1]
        record = ask.records()[-1]
        params = sent.get("params", {})
        assert not params.get("thinking") and not params.get("thinkingConfig")
        assert {e["text"].count("Question: ") for e in server.sent()[-3:]} == {len(more)}
        assert ("step by step" in sent["text"]) == (more == ["--zero-shot-cot"])
        if more == ["--zero-shot-cot"]:
            assert record["thought"] and record["kept"] and "answer is" not in record["answer"]


# --- judged by a model


@both_wires
def test_a_judge_fills_the_schema_and_may_look(ask, server, wire):
    questions(ask.folder, 3)
    server.script = {"judge Q1": {"verdict": {"leads_to_answer": False, "why": "It\nwanders."}}}
    for tag in ("judge Q2", "judge Q3"):
        server.script[tag] = {"verdict": {"agrees_with_picture": False}}
    judge = ["--judge", WIRES[wire], "--judge-all"]
    ask("gemini", *judge)
    q1, q2, q3 = (record for _, record in sorted(ask.by_id().items()))
    assert q1["verdict"]["consistent"] is False and not q1["kept"]
    assert q1["verdict"]["why"] == "It wanders."
    assert q2["kept"] and q2["verdict"]["picture"] is None
    assert q3["verdict"]["picture"] is False and not q3["kept"]
    for record in (q1, q2, q3):
        assert record["verdict"]["by"] == WIRES[wire] and record["usage"]["judge"]["cost"] > 0
        assert record["verdict"]["rule"]["correct"] is True
    assert [server.sent(f"Q{i}", "judge")[0]["images"] for i in (1, 2, 3)] == [0, 0, 1]
    assert not (ask.folder / "t.jsonl.pending").exists()
    ask.out.unlink()
    ask("gemini", *judge, "--no-judge-image")
    assert [entry["images"] for entry in server.sent("Q3", "judge")] == [1, 0]


def test_the_judge_is_asked_where_the_rule_is_not_conclusive(ask, server):
    questions(ask.folder, 2)
    server.script = {"Q1": {"text": "I would rather not choose."}}
    server.script["judge Q1"] = {"verdict": {"correct": False}}
    ask("gemini", "--judge", WIRES["anthropic"])
    assert [entry["tag"] for entry in server.sent(kind="judge")] == ["Q1"]
    records = ask.by_id()
    assert records["q2"]["verdict"]["by"] == "rule" and not records["q1"]["kept"]


def test_a_judge_without_valid_json_is_asked_again(ask, server):
    questions(ask.folder, 3)
    server.script = {"judge Q1": [{"text": "Yes."}, {"text": '{"why": "half'}, {"text": "{}"}]}
    server.script |= {"judge Q2": {"stop": "refused"}}
    # Half a surrogate pair can be judged.
    server.script |= {"Q3": {"thought": "A face \ud83d is drawn.", "text": "\ud83d I pass."}}
    assert ask(*JUDGE)[0] == 0 and counts(server, 3, "judge") == [4, 1, 1]
    assert len(server.sent()) == 3
    judges = {id: record["verdict"]["by"] for id, record in ask.by_id().items()}
    assert judges == {"q1": WIRES["anthropic"], "q2": "rule", "q3": WIRES["anthropic"]}


@pytest.mark.parametrize("status", ["503", "401"])
def test_a_paid_reply_waits_for_its_judge(ask, server, status):
    """Also where a judge that refuses the key stops the run."""
    questions(ask.folder, 8)
    server.script = {"judge *": status}
    code, _, err = ask(*JUDGE, retries=2, concurrency=2)
    pending = ask.folder / "t.jsonl.pending"
    paid = sum(entry["answered"] for entry in server.sent())
    assert code == 1 and status in err and len(pending.read_text().splitlines()) == paid
    assert paid == 8 if status == "503" else 1 <= paid <= 4
    server.script = {}
    assert ask(*JUDGE, retries=2, concurrency=2)[0] == 0
    assert len(server.sent()) == len(ask.records()) == 8 and not pending.exists()


def test_a_judge_that_repeats_a_key_is_quoted_without_it(ask, server):
    questions(ask.folder, 1)
    server.script = {"judge Q1": {"text": f"Not JSON, but {KEY}."}}
    assert "Not JSON, but [GOOGLE_API_KEY]" in ask(*JUDGE, retries=2)[2]


# --- offline


@pytest.mark.slow
def test_the_demo_needs_no_key_and_repeats_itself(ask, monkeypatch):
    for names in providers.KEYS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    files = [ask.folder / "a.jsonl", ask.folder / "b.jsonl"]
    for file in files:
        argv = ["--data", "demo", "--teacher", "demo", "--limit", "20", "--out", str(file)]
        assert teacher.main(argv) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_text().splitlines()) == 20


def test_replies_of_a_trace_file_are_judged_again(ask, server):
    questions(ask.folder, 4)
    server.script = {"Q2": wrong("Q2"), "Q3": {"thought": None}}
    ask()
    old = ask.by_id()
    ask.out = ask.folder / "again.jsonl"
    assert ask("gemini", "--from", ask.folder / "t.jsonl")[0] == 0 and len(server.sent()) == 4
    new = ask.by_id()
    assert set(new) == {"q1", "q2", "q4"}  # load_traces leaves out those without a thought
    for id, record in new.items():
        assert record["verdict"]["before"]["correct"] is old[id]["verdict"]["correct"]
        assert record["reply"] == old[id]["reply"] and record["kept"] == old[id]["kept"]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL} (NANOCOT_DATA)")
def test_real_replies_are_judged_by_the_rule(ask):
    traces = str(REAL / "pali_reason" / "training.csv")
    argv = ["--data", str(REAL / "mathvista"), "--split", "trainval", "--from", traces]
    assert teacher.main([*argv, "--limit", "60", "--out", str(ask.out)]) == 0
    records = ask.records()
    ids = {trace["id"] for trace in load_traces(traces)} & {str(n) for n in range(1, 61)}
    assert {record["id"] for record in records} == ids
    assert all(r["thought"] and r["verdict"]["by"] == "rule" for r in records)
    assert sum(r["verdict"]["correct"] for r in records) / len(records) > 0.6
