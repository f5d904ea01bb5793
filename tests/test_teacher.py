"""teacher.py with the real SDKs against loopback.py: what it makes of every kind of reply, of
its flags, of a judge's word; and offline.
"""

import os
import re
from pathlib import Path

import loopback
import pytest
from asking import KEY, WIRES, both_wires, questions, wrong
from loopback import gold

import data
import teacher
from support.dataset.traces import load_traces
from support.teachers import filters, providers

REAL = Path(os.environ["NANOCOT_DATA"])


# --- replies


@both_wires
def test_thoughts_are_told_from_answers(ask, server, wire):
    questions(ask.folder, 3)
    server.script = {"Q2": {"redacted": True}}
    code, out, _ = ask(wire)
    assert code == 0 and "kept" in out
    for i, record in enumerate(sorted(ask.records(), key=lambda record: record["id"]), 1):
        letter = "ABC"[gold(f"Q{i}")]
        thought = loopback.THOUGHTS[1].format(tag=f"Q{i}", letter=letter)
        assert record["reply"] == {"thought": thought, "answer": f"The answer is ({letter})."}
        assert record["answer"] == record["gold"] == letter and record["kept"]
        assert record["verdict"]["correct"] is record["verdict"]["consistent"] is True
        assert (record["stop"], record["attempt"], record["hint"]) == ("end", 0, False)
        (sent,) = server.sent(f"Q{i}")
        assert sent["images"] == (i == 3) and sent["key"]
        usage, thinking = record["usage"], len(thought) // 4
        assert usage["input"] == len(sent["text"]) // 4 + 258 * (i == 3)
        assert usage["thought"] == thinking and usage["output"] > thinking
        price = providers.PRICES[WIRES[wire].partition(":")[2]]
        assert usage["cost"] == pytest.approx(
            (usage["input"] * price[0] + usage["output"] * price[1]) / 1e6
        )
        assert usage["tries"] == 1 and usage["seconds"] > 0


def test_a_record_has_what_the_contract_says(ask, server):
    questions(ask.folder, 1)
    ask()
    keys = "id question thought answer gold verdict teacher usage key stop attempt hint kept reply"
    (record,) = ask.records()
    assert set(record) == set(keys.split()) and re.fullmatch("[0-9a-f]{64}", record["key"])
    assert {"correct", "consistent", "by", "why"} <= set(record["verdict"])
    assert load_traces(ask.out)[0]["thought"] == record["thought"]


@both_wires
def test_a_reply_without_a_thought_is_kept_as_answer_only(ask, server, wire):
    questions(ask.folder, 2)
    server.think = False
    _, out, _ = ask(wire)
    for record in ask.records():
        assert record["thought"] == "" and record["verdict"]["correct"] is True
        assert not record["kept"] and record["dropped"] == "no thought"
    heads, row = (
        next(line.split() for line in out.splitlines() if name in line.split())
        for name in ("questions", "all")
    )
    counts = dict(zip(heads, row[1:], strict=True))
    expected = {"asked": "2", "answered": "2", "thought": "0", "correct": "2", "kept": "0"}
    assert counts.items() >= expected.items()


@both_wires
def test_blocked_refused_and_truncated_replies_are_records(ask, server, wire):
    questions(ask.folder, 4)
    stops = {"Q1": "blocked", "Q2": "refused", "Q3": "recitation", "Q4": "length"}
    server.script = {tag: {"stop": stop} for tag, stop in stops.items()}
    code, *_ = ask(wire)
    assert code == 0
    found = {f"Q{record['id'][1:]}": record for record in ask.records()}
    words = {"gemini": ("SAFETY", "SAFETY", "RECITATION", "MAX_TOKENS")}
    words["anthropic"] = ("refusal", "refusal", "refusal", "max_tokens")
    for (tag, stop), word in zip(stops.items(), words[wire], strict=True):
        verdict, held = found[tag]["verdict"], "blocked" if wire == "gemini" else "refused"
        assert found[tag]["stop"] == ("length" if stop == "length" else held)
        assert verdict["correct"] is False and verdict["consistent"] is None
        assert verdict["by"] == "teacher" and word in verdict["why"] and not found[tag]["kept"]
    ask(wire)
    assert len(server.sent()) == len(ask.records()) == 4


# --- attempts, hints, examples


def test_attempts_stop_at_the_first_right_one(ask, server):
    questions(ask.folder, 3)
    server.script = {"Q1": [wrong("Q1"), wrong("Q1")], "Q2": wrong("Q2")}
    ask(attempts=3)
    assert [len(server.sent(f"Q{i}")) for i in (1, 2, 3)] == [3, 3, 1]
    kept = [(r["id"], r["attempt"]) for r in ask.records() if r["kept"]]
    assert sorted(kept) == [("q1", 2), ("q3", 0)]
    seeds = [entry["params"]["seed"] for entry in server.sent("Q2")]
    assert len(set(seeds)) == 3  # Gemini has a seed; the same one would say the same again
    ask(attempts=3)
    assert len(server.sent()) == 7
    ask(attempts=4)
    assert [len(server.sent(f"Q{i}")) for i in (1, 2, 3)] == [3, 4, 1]


def test_diverse_keeps_distinct_rationales(ask, server):
    questions(ask.folder, 1)
    thoughts = [t.format(tag="Q1", letter="ABC"[gold("Q1")]) for t in loopback.THOUGHTS]
    said = [{"thought": thoughts[i]} for i in (0, 0, 1, 2)]
    server.script = {"Q1": said}
    ask(attempts=4, diverse=2)
    assert [r["kept"] for r in ask.records()] == [True, False, True]
    assert ask.records()[1]["dropped"] == "not distinct" and len(server.sent()) == 3


@both_wires
def test_hints_and_prompts_are_recorded_and_are_other_questions(ask, server, wire):
    questions(ask.folder, 2, solution="The rope of Q0: is the longest.")
    ask(wire)
    ask(wire, "--hint-gold")
    told = f"answer is known to be {'ABC'[gold('Q1')]}"
    assert [told in entry["text"] for entry in server.sent("Q1")] == [False, True]
    assert sorted(record["hint"] for record in ask.records()) == [False, False, True, True]
    for more in (["--zero-shot-cot"], ["--shots", "1"]):
        server.log.clear()
        ask(wire, *more)
        sent, record = server.sent("Q1")[0], ask.records()[-1]
        mode = sent["params"].get("thinking") or sent["params"].get("thinkingConfig")
        assert not mode and ("step by step" in sent["text"]) == (more == ["--zero-shot-cot"])
        assert sent["text"].count("Question: ") == len(more)
        if more == ["--zero-shot-cot"]:
            assert record["thought"] and record["kept"] and "answer is" not in record["answer"]


# --- judged by a model


@both_wires
def test_a_judge_fills_the_schema_and_may_look(ask, server, wire):
    questions(ask.folder, 3)
    server.script = {"judge Q1": {"verdict": {"leads_to_answer": False, "why": "It\nwanders."}}}
    server.script |= dict.fromkeys(
        ("judge Q2", "judge Q3"), {"verdict": {"agrees_with_picture": False}}
    )
    judge = ["--judge", WIRES[wire], "--judge-all"]
    ask("gemini", *judge)
    found = ask.by_id()
    assert all(r["verdict"]["by"] == WIRES[wire] for r in found.values())
    assert found["q1"]["verdict"]["consistent"] is False and not found["q1"]["kept"]
    assert found["q1"]["verdict"]["why"] == "It wanders."
    assert found["q2"]["kept"] and found["q2"]["verdict"]["picture"] is None
    assert found["q3"]["verdict"]["picture"] is False and not found["q3"]["kept"]
    for record in found.values():
        assert record["verdict"]["rule"]["correct"] is True and record["usage"]["judge"]["cost"] > 0
    assert [server.sent(f"Q{i}", "judge")[0]["images"] for i in (1, 2, 3)] == [0, 0, 1]
    assert not (ask.folder / "t.jsonl.pending").exists()
    ask.out.unlink()
    ask("gemini", *judge, "--no-judge-image")
    assert [entry["images"] for entry in server.sent("Q3", "judge")] == [1, 0]


def test_the_judge_is_asked_where_the_rule_is_not_sure(ask, server):
    questions(ask.folder, 2)
    server.script = {"Q1": {"text": "I would rather not choose."}}
    server.script["judge Q1"] = {"verdict": {"correct": False}}
    ask("gemini", "--judge", WIRES["anthropic"])
    assert [entry["tag"] for entry in server.sent(kind="judge")] == ["Q1"]
    found = ask.by_id()
    assert found["q2"]["verdict"]["by"] == "rule" and not found["q1"]["kept"]


def test_a_judge_that_says_no_json_is_asked_again(ask, server):
    questions(ask.folder, 2)
    broken = [{"text": "Yes."}, {"text": '{"why": "half'}, {"text": '{"why": "x"}'}]
    server.script = {"judge Q1": broken, "judge Q2": {"stop": "refused"}}
    code, *_ = ask("gemini", "--judge", WIRES["anthropic"], "--judge-all")
    assert code == 0 and [len(server.sent(f"Q{i}", "judge")) for i in (1, 2)] == [4, 1]
    assert len(server.sent()) == 2
    found = ask.by_id()
    assert found["q1"]["verdict"]["by"] == WIRES["anthropic"]
    assert found["q2"]["verdict"]["by"] == "rule" and "declined" in found["q2"]["verdict"]["why"]


def test_a_paid_reply_waits_for_its_judge(ask, server):
    questions(ask.folder, 3)
    server.script = {"judge *": "503"}
    judge = ["--judge", WIRES["anthropic"], "--judge-all", "--retries", "2"]
    code, _, err = ask("gemini", *judge)
    pending = ask.folder / "t.jsonl.pending"
    assert code == 1 and len(pending.read_text().splitlines()) == 3 and "failed: q1" in err
    server.script = {}
    assert ask("gemini", *judge)[0] == 0
    assert len(server.sent()) == 3 and len(server.sent(kind="judge")) == 9
    assert len(ask.records()) == 3 and not pending.exists()


def test_a_judge_that_repeats_a_key_is_quoted_without_it(ask, server):
    questions(ask.folder, 1)
    server.script = {"judge Q1": {"text": f"Not JSON, but {KEY}."}}
    _, _, err = ask("gemini", "--judge", WIRES["anthropic"], "--judge-all", "--retries", "2")
    assert "failed: q1: " in err and "Not JSON, but [GOOGLE_API_KEY]" in err


def test_half_a_surrogate_pair_in_a_reply_can_be_judged(ask, server):
    questions(ask.folder, 1)
    server.script = {"Q1": {"thought": "A face \ud83d is drawn.", "text": "\ud83d I pass."}}
    assert ask("gemini", "--judge", WIRES["anthropic"], "--judge-all")[0] == 0
    assert ask.records()[0]["verdict"]["by"] == WIRES["anthropic"]


def test_a_judge_that_refuses_the_key_stops_the_run_and_loses_no_reply(ask, server):
    questions(ask.folder, 8)
    server.script = {"judge *": "401"}
    judge = ["--judge", WIRES["anthropic"], "--judge-all", "--concurrency", "2"]
    code, _, err = ask("gemini", *judge)
    paid = sum(entry["answered"] for entry in server.sent())
    assert code == 1 and "Stopped: the provider refuses: 401" in err and 1 <= paid <= 4
    server.script = {}
    assert ask("gemini", *judge)[0] == 0
    assert len(server.sent()) == len(ask.records()) == 8


def test_judge_many_goes_on_with_its_cache(ask, server, tmp_path):
    questions(ask.folder, 3)
    problems = data.load(ask.folder / "q.jsonl", "train")
    items = [(problem, "It is long.", problem.answer) for problem in problems]
    server.script = {"judge Q2": "500"}
    calls = {"spec": WIRES["gemini"], "cache": tmp_path / "j.jsonl", "retries": 2}
    first = filters.judge_many(items, **calls)
    assert [verdict["correct"] for verdict in first] == [True, None, True]
    server.script = {}
    second = filters.judge_many(items, **calls)
    assert [verdict["correct"] for verdict in second] == [True] * 3
    assert [len(server.sent(f"Q{i}", "judge")) for i in (1, 2, 3)] == [1, 3, 1]


# --- offline


@pytest.mark.slow
def test_the_demo_teacher_says_the_same_every_time(ask, monkeypatch):
    for names in providers.KEYS.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    files = [ask.folder / "a.jsonl", ask.folder / "b.jsonl"]
    for file in files:
        argv = ["--data", "demo", "--teacher", "demo", "--limit", "20", "--out", str(file)]
        assert (teacher.main(argv) or 0) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_text().splitlines()) == 20


def test_replies_of_a_trace_file_are_judged_anew(ask, server):
    questions(ask.folder, 4)
    server.script = {"Q2": wrong("Q2"), "Q3": {"thought": None}}
    ask()
    old, asked = ask.by_id(), len(server.sent())
    ask.out = ask.folder / "again.jsonl"
    code, *_ = ask("gemini", "--from", ask.folder / "t.jsonl")
    assert code == 0 and len(server.sent()) == asked
    new = ask.by_id()
    assert set(new) == {"q1", "q2", "q4"}  # load_traces leaves out what has no thought
    for id, record in new.items():
        assert record["verdict"]["before"]["correct"] is old[id]["verdict"]["correct"]
        assert record["reply"] == old[id]["reply"] and record["kept"] == old[id]["kept"]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL} (NANOCOT_DATA)")
def test_real_replies_are_judged_by_the_rule(ask):
    traces = str(REAL / "pali_reason" / "training.csv")
    argv = ["--data", str(REAL / "mathvista"), "--split", "trainval", "--from", traces]
    assert (teacher.main([*argv, "--limit", "60", "--out", str(ask.out)]) or 0) == 0
    records, there = ask.records(), {trace["id"] for trace in load_traces(traces)}
    assert {record["id"] for record in records} == there & {str(n) for n in range(1, 61)}
    assert all(r["thought"] and r["verdict"]["by"] == "rule" for r in records)
    assert sum(r["verdict"]["correct"] for r in records) / len(records) > 0.6
