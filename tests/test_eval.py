"""Reading answers, the text scores against the packages that the authors used, the table."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from conftest import scored

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.evaluation.rouge import bleu, rouge_l  # noqa: E402

import data  # noqa: E402
import eval as scoring  # noqa: E402
from support.evaluation import grading, metrics, tables  # noqa: E402

SCIENCEQA = Path(os.environ.get("NANOCOT_DATA", ROOT / "../shared/data")) / "scienceqa"
needs_data = pytest.mark.skipif(
    not (SCIENCEQA / "problems.json").is_file(),
    reason=f"no ScienceQA in {SCIENCEQA}; set NANOCOT_DATA",
)


def problem(id="1", choices=("yes", "no", "maybe"), index=0, answer=None, **other):
    fields = {"hint": "", "image": None, "lecture": "", "solution": "", "meta": {}} | other
    fields["meta"] = {"answer_index": index if choices else None, "caption": ""} | fields["meta"]
    answer = choices[index] if choices else answer
    return data.Problem(id=id, question="?", choices=choices, answer=answer, **fields)


def says(letter):
    return f"The answer is ({letter})."


# --- answers
@pytest.mark.parametrize(
    "response, parsed, how",
    [
        ("The answer is (B).", "B", "letter"),
        ("Solution: it is so. The answer is (B) because", "B", "letter"),
        ("The answer is (D).", None, "letter not among the options"),
        ("The answer is (Z).", None, "letter not among the options"),
        ("The answer is (B). The answer is (B).", None, "several answers"),
        ("The answer is (A). The answer is (B).", None, "several answers"),
        ("The answer is (b).", None, "no answer found"),
        ("the answer is (B).", None, "no answer found"),
        ("(B)", "B", "letter"),  # PaliGemma's forms
        ("no", "B", "choice text"),
        ("Look: A or C.\nAnswer: B", "B", "letter"),
        ("Answer: D", None, "no answer found"),
        ("", None, "no answer found"),
    ],
)
def test_letter_is_read_or_the_parse_failed(response, parsed, how):
    right, wrong = problem(index=1), problem(index=0)
    assert scoring.grade(right, response) == scoring.Grade(parsed == "B", parsed, how)
    assert scoring.grade(wrong, response) == scoring.Grade(False, parsed, how)


def test_the_index_decides_between_choices_of_the_same_text():
    twins = problem(choices=("cat", "cat"), index=1)
    assert scoring.grade(twins, says("B")).correct
    assert not scoring.grade(twins, says("A")).correct
    without_index = problem(choices=("cat", "dog"), index=1, meta={"answer_index": None})
    assert scoring.grade(without_index, says("B")).correct


@pytest.mark.parametrize(
    "gold, response, correct, how",
    [
        ("12", "The answer is 12.", True, "number"),
        ("12", "12 and 3 make 15.\nThe answer is 12.0.", True, "number"),
        ("1,200", "1200", True, "number"),
        ("12", "The answer is 13.", False, "number"),
        ("north pole", "The answer is (North  Pole).", True, "text"),
        ("north pole", "south pole", False, "text"),
        ("12", "twelve", False, "text"),
        ("12", "  \n", False, "no answer found"),
        ("12", "The answer is .", False, "no answer found"),
    ],
)
def test_free_form(gold, response, correct, how):
    verdict = scoring.grade(problem(choices=(), answer=gold), response)
    assert (verdict.correct, verdict.how) == (correct, how)
    assert (verdict.parsed is None) == (how == "no answer found")


def test_faithful_parse_draws_as_the_released_code_does():
    """The released loop, written out with the random module's own state, seeded 42."""
    replies = ["", says("A"), says("Z"), "A? B?", says("A") * 2, says("E"), says("B")]
    problems = [problem(str(i), index=i % 3) for i in range(210)]
    predictions = [{"id": p.id, "response": random.Random(p.id).choice(replies)} for p in problems]
    random.seed(42)
    expected = []
    for p, x in zip(problems, predictions, strict=True):
        found = re.findall(r"The answer is \(([A-Z])\)", x["response"])
        if len(found) == 1 and found[0] in "ABCDE":
            index = "ABCDE".index(found[0])
        else:
            index = random.choice(range(5))
        expected.append(index == p.meta["answer_index"])
    graded = metrics.grade_all(problems, predictions, faithful=True)
    assert [g.correct for *_, g in graded] == expected
    assert any(g.correct and g.parsed is None for *_, g in graded)
    honest = metrics.grade_all(problems, predictions)
    assert not any(g.correct for *_, g in honest if g.parsed is None)
    assert sum(g.correct for *_, g in honest) < sum(expected)


# --- text scores
def rouge_of_the_package(candidate, reference):
    rouge = pytest.importorskip("rouge").Rouge(metrics=["rouge-l"])
    try:  # hypothesis and reference are exchanged in the authors' call
        return rouge.get_scores(reference, candidate, avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


def bleu_of_the_package(candidate, reference, n):
    score = pytest.importorskip("nltk.translate.bleu_score").sentence_bleu
    said, gold = ([t for t in re.split(r"\s|\.", x) if t] for x in (candidate, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score([gold], said, (1 / n,) * n)


def assert_equal_to_the_packages(candidate, reference):
    expected = rouge_of_the_package(candidate, reference)
    assert abs(rouge_l(candidate, reference) - expected) < 1e-9, (candidate, reference)
    for n in (1, 2, 4):
        expected = bleu_of_the_package(candidate, reference, n)
        assert math.isclose(bleu(candidate, reference, n), expected, rel_tol=1e-9)


def perturbed(text, rng):
    """Drop, copy and move words, and break sentences: about a third of the text."""
    words = text.split(" ")
    for _ in range(rng.randint(0, 1 + len(words) // 3)):
        i = rng.randrange(len(words))
        edits = ([], [rng.choice(words)], [".", words[i]], [words[i], rng.choice(words)])
        words[i : i + 1] = rng.choice(edits) or ([words[i]] if len(words) == 1 else [])
    return " ".join(words)


@pytest.mark.slow
@needs_data
def test_scores_equal_the_packages_on_real_solutions():
    rng = random.Random(0)
    problems = [p for p in data.load(SCIENCEQA, "test") if p.solution][::3]
    targets = [data.prompt(p, "QCM-E")[1] for p in problems]
    pairs = [(perturbed(x, rng), x) for x in targets] + [(rng.choice(targets), x) for x in targets]
    assert len(pairs) > 300
    for pair in pairs:
        assert_equal_to_the_packages(*pair)


@pytest.mark.slow
def test_scores_equal_the_packages_on_small_alphabets():
    """Few words and many sentences: here equally long common subsequences differ in their words."""
    rng = random.Random(1)
    for _ in range(2000):
        words = "abcdefgh"[: rng.choice((2, 3, 5, 8))] + " ."
        marks = [rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(0, 60))]
        half = rng.randint(0, len(marks))
        assert_equal_to_the_packages("".join(marks[:half]), "".join(marks[half:]))


ODD = ["", ".", "...", " ", ". .", "a", "a.", "a. ", "\n", "ein Wort", "été. 中 文 .",
       "x\xad\u2003y", "\U0001f9f2 attracts \U0001f9f2. \U0001f9f2", "the " * 60]  # fmt: skip


@pytest.mark.parametrize("candidate", ODD)
def test_odd_texts_get_a_score_and_the_package_one(candidate):
    for reference in ODD:
        assert_equal_to_the_packages(candidate, reference)
        if not candidate.strip(". ") or not reference.strip(". "):
            assert bleu(candidate, reference, 4) == 0.0
    if not candidate.strip("."):
        assert rouge_l(candidate, "a b. c") == 0.0 == rouge_l("a b", candidate)


# --- metrics
def small_set():
    """Eight problems, one prediction each; A is the right letter and five get it."""
    meta = [
        {"subject": "natural science", "grade": "grade1", "has_image": True},
        {"subject": "natural science", "grade": "grade6", "has_image": False},
        {"subject": "natural science", "grade": "grade7", "has_image": True},
        {"subject": "social science", "grade": "grade12", "has_image": False},
        {"subject": "social science", "grade": "grade2", "has_image": False},
        {"subject": "social science", "grade": "grade2", "has_image": False},
        {"subject": "social science", "grade": "grade2", "has_image": False},
        {"subject": "social science", "grade": "grade2", "has_image": False},
    ]
    hints = ["read this", "read this", "", "", "", "", "", ""]
    sizes = [2, 2, 4, 4, 4, 4, 4, 4]
    problems = [problem(f"p{i}", tuple("wxyz"[:n]), 0, hint=h, meta=m, image="choice_0.png")
                for i, (n, h, m) in enumerate(zip(sizes, hints, meta, strict=True))]  # fmt: skip
    replies = [says("A"), says("B"), says("A"), "dunno", says("A"), says("A"), says("A"), says("B")]
    return problems, [{"id": p.id, "response": r} for p, r in zip(problems, replies, strict=True)]


def test_metrics_by_hand():
    got = scored(*small_set())
    assert got["n"] == 8 and got["accuracy"]["avg"] == 62.5
    assert got["chance"] == 31.25  # (2 / 2 + 6 / 4) / 8
    assert got["parse_failures"] == 12.5
    assert got["ci95"] == [30.57, 86.32]
    by = got["n_by"], got["accuracy"], got["chance_by"]
    assert {name: tuple(x[name] for x in by) for name in by[0]} == {
        "avg": (8, 62.5, 31.25),
        "NAT": (3, 66.67, 41.67),
        "SOC": (5, 60.0, 25.0),
        "LAN": (0, None, None),
        "TXT": (2, 50.0, 50.0),
        "IMG": (2, 100.0, 37.5),  # a picture of a choice is not an IMG problem
        "NO": (5, 60.0, 25.0),
        "G1-6": (6, 66.67, 33.33),
        "G7-12": (2, 50.0, 25.0),
    }
    assert "rougeL" not in got and "families" not in got and "stop" not in got
    assert json.loads(json.dumps(got)) == got


def test_families_stops_and_free_form_chance():
    problems = [problem(str(i), meta={"family": f}) for i, f in enumerate(("dots", "cup", "cup"))]
    problems.append(problem("3", choices=(), answer="5"))
    replies = [says("A"), says("B"), says("A"), "The answer is 5."]
    stops = ["eos", "length", "eos", None]
    predictions = [{"id": str(i), "response": r, "stop": s}
                   for i, (r, s) in enumerate(zip(replies, stops, strict=True))]  # fmt: skip
    got = scored(problems, predictions)
    assert got["families"] == {"cup": 50.0, "dots": 100.0}
    assert got["stop"] == {"eos": 2, "length": 1}
    assert got["chance"] == 25.0  # three thirds and a zero, of four


@needs_data
def test_categories_equal_a_count_on_the_raw_file():
    """The published definitions, applied to problems.json itself with random answers."""
    problems = data.load(SCIENCEQA, "test")
    raw = json.loads((SCIENCEQA / "problems.json").read_text())
    rng = random.Random(2)
    picks = {p.id: rng.randrange(len(p.choices)) for p in problems}
    predictions = [{"id": i, "response": says("ABCDE"[pick])} for i, pick in picks.items()]
    tests = {
        "NAT": lambda r: r["subject"] == "natural science",
        "SOC": lambda r: r["subject"] == "social science",
        "LAN": lambda r: r["subject"] == "language science",
        "TXT": lambda r: bool(r["hint"]),
        "IMG": lambda r: bool(r["image"]),
        "NO": lambda r: not r["hint"] and not r["image"],
        "G1-6": lambda r: r["grade"] in [f"grade{g}" for g in range(1, 7)],
        "G7-12": lambda r: r["grade"] in [f"grade{g}" for g in range(7, 13)],
        "avg": lambda r: True,
    }
    got = scored(problems, predictions)["accuracy"]
    for name, counts in tests.items():
        hits = [pick == raw[i]["answer"] for i, pick in picks.items() if counts(raw[i])]
        assert f"{got[name]:.2f}" == f"{100 * sum(hits) / len(hits):.2f}", name


def published_problems(labels):
    """({category: are its labels known of all 4,241}, the test split) from all that is there of
    ScienceQA; of a problem that is not, only the published label and whether it has a caption."""
    records = json.loads((SCIENCEQA / "problems.json").read_text())
    rest = SCIENCEQA / "problems_partial.json.gz"
    records |= json.loads(gzip.decompress(rest.read_bytes())) if rest.is_file() else {}
    splits = SCIENCEQA / "pid_splits_full.json"
    pids = json.loads((splits if splits.is_file() else SCIENCEQA / "pid_splits.json").read_text())
    pictured = json.loads((SCIENCEQA / "captions.json").read_text())["captions"]
    problems, fields = [], dict.fromkeys(("subject", "grade", "hint"), True)
    for pid, label in zip(pids["test"], labels, strict=True):
        record, gold = records.get(pid, {}), "ABCDE".index(grading.ANSWER.search(label)[1])
        fields = {k: known and record.get(k) is not None for k, known in fields.items()}
        meta = {k: record.get(k) for k in fields} | {"has_image": pid in pictured}
        choices = tuple(record.get("choices") or "vwxyz")
        problems.append(problem(pid, choices, gold, hint=record.get("hint") or "", meta=meta))
    needs = ["subject"] * 3 + ["hint", None, "hint"] + ["grade"] * 2
    known = {c: fields.get(x, True) for c, x in zip(metrics.CATEGORIES, needs, strict=True)}
    return known | {"avg": True}, problems


@needs_data
@pytest.mark.skipif(
    "NANOCOT_PUBLISHED" not in os.environ,
    reason="set NANOCOT_PUBLISHED to a folder of mm-cot's predictions_ans_test.json of stage 2",
)
def test_published_predictions_keep_their_scores_to_two_decimals(tmp_path):
    names = "natural social language has_text has_image no_context grade_1_6 grade_7_12".split()
    names = dict(zip(metrics.CATEGORIES, names, strict=True)) | {"avg": "average"}
    files = sorted(Path(os.environ["NANOCOT_PUBLISHED"]).rglob("*.json"))
    files = [file for file in files if "answer" in json.loads(file.read_text()).get("scores", {})]
    assert files
    for file in files:
        told = json.loads(file.read_text())
        known, problems = published_problems(told["labels"])
        graded = metrics.grade_all(problems, tables.read_predictions(file, problems), True)
        got = metrics.metrics_of(graded, True)["accuracy"]
        for category in [name for name, complete in known.items() if complete]:
            official = told["scores"]["answer"][f"acc_{names[category]}"]
            assert f"{got[category]:.2f}" == official, (file, category)
        verdicts = told.get("per_question_correct", {})
        assert {p.id: g.correct for p, _, g in graded} == verdicts or not verdicts
        equal = [name for name, complete in known.items() if complete]
        print(f"{file}: n = {len(graded)}, equal in {', '.join(equal)}")


def test_wilson_against_published_values():
    """Newcombe (1998), Statistics in Medicine 17, Table I, method 3: four (hits, n)."""
    assert metrics.wilson(81, 263) == [25.53, 36.62]
    assert metrics.wilson(15, 148) == [6.24, 16.05]
    assert metrics.wilson(0, 20) == [0.0, 16.11]
    assert metrics.wilson(1, 29) == [0.61, 17.18]
    assert metrics.wilson(20, 20) == [83.89, 100.0]


def test_rationales_are_scored_against_the_target_of_their_stage():
    problems = [problem(str(i), lecture="Poles push.", solution=s) for i, s in enumerate("ab")]
    gold = data.prompt(problems[0], "QCM-LE")[1]
    predictions = [{"id": "0", "response": "", "rationale": gold},
                   {"id": "1", "response": "", "rationale": ""}]  # fmt: skip
    got = scored(problems, predictions)
    assert (got["rougeL"], got["bleu1"], got["bleu4"], got["n_rationales"]) == (50, 50, 50, 2)
    faithful = scored(problems, predictions, faithful=True)
    assert (faithful["rougeL"], faithful["bleu1"]) == (100, 50)  # their ROUGE-L skips empty ones
    short = scored(problems, predictions, rationale_format="QCM-E")
    assert 0 < short["rougeL"] < 50
    nothing_to_compare = [problem("0"), problem("1")]
    assert "rougeL" not in scored(nothing_to_compare, predictions)


def test_empty_targets_do_not_count(monkeypatch):
    problems = [problem(str(i), solution=s) for i, s in enumerate(("", "a b c d"))]
    predictions = [{"id": p.id, "response": "", "rationale": "a b c d"} for p in problems]
    monkeypatch.setattr(data, "prompt", lambda p, fmt: ("", p.solution))
    got = scored(problems, predictions)
    assert (got["n_rationales"], got["rougeL"], got["bleu4"]) == (1, 100, 100)
    assert "rougeL" not in scored(problems[:1], predictions[:1])


@pytest.mark.parametrize(
    "ids, message",
    [
        (["p0", "p1", "p0"], r"1 prediction ids are there more than once: p0 \(there are 2 prob"),
        (["p0", "p1", "p9"], "1 prediction ids are of no problem here.*: p9"),
        (["p0"], "1 problems have no prediction.*: p1"),
        ([], "2 problems have no prediction.*: p0, p1"),
    ],
)
def test_predictions_must_be_of_these_problems(ids, message):
    problems = [problem("p0"), problem("p1")]
    predictions = [{"id": i, "response": says("A")} for i in ids]
    with pytest.raises(ValueError, match=message):
        scored(problems, predictions)
    if ids == ["p0"]:
        assert scored(problems, predictions, partial=True)["n"] == 1
    else:
        with pytest.raises(ValueError, match=message):
            scored(problems, predictions, partial=True)


# --- files
@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "2", "resp', "line 3 is not complete JSON"),
        ('["2"]', 'line 3: "id" must be a string'),
        ('{"id": 2.5, "response": "x"}', 'line 3: "id" must be a string'),
        ('{"id": true, "response": "x"}', 'line 3: "id" must be a string'),
        ('{"id": "2"}', 'line 3: "response" must be a string'),
        ('{"id": "2", "response": "x", "rationale": 3}', 'line 3: "rationale" must be a string'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "1", "response": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        tables.read_predictions(file)
    assert str(file) in str(error.value)


def test_a_file_of_one_line_and_a_line_separator_inside_a_text(tmp_path):
    file = tmp_path / "p.jsonl"
    x = {"id": "1", "response": "one\u2028two", "rationale": None}
    file.write_text(json.dumps(x, ensure_ascii=False), encoding="utf-8")
    assert tables.read_predictions(file) == [x]


def test_ids_as_numbers_and_a_file_from_windows(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"id": 1, "response": "x"}, {"id": "02", "response": "y"}]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    assert [x["id"] for x in tables.read_predictions(file)] == ["1", "02"]
    file.write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match="line 1 is not complete JSON .it is no text in UTF-8"):
        tables.read_predictions(file)


def test_mathvistas_official_file(tmp_path):
    """{pid: the whole record with "response"}: what the model said is taken, and nothing else."""
    file, record = tmp_path / "output_m.json", {"question": "?", "answer": "3", "extraction": "3"}
    file.write_text(json.dumps({"7": record | {"response": "It is 3."}}))
    assert tables.read_predictions(file) == [{"id": "7", "response": "It is 3."}]
    file.write_text(json.dumps({"7": record | {"response": "x"}, "8": record}))
    with pytest.raises(ValueError, match='output_m.json, problem 8: "response" must be a string'):
        tables.read_predictions(file)


def test_the_released_codes_own_file(tmp_path):
    file = tmp_path / "predictions_ans_test.json"
    problems = [problem("7", index=1), problem("9", index=2)]

    def write(preds, labels):
        file.write_text(json.dumps({"num_fail": 0, "scores": {}, "preds": preds, "labels": labels}))

    write([says("B"), says("A")], [says("B"), says("C")])
    got = tables.read_predictions(file, problems)
    assert got == [{"id": "7", "response": says("B")}, {"id": "9", "response": says("A")}]
    assert scored(problems, got)["accuracy"]["avg"] == 50.0
    with pytest.raises(ValueError, match="2 predictions without ids, for 1 problems"):
        tables.read_predictions(file, problems[:1])
    with pytest.raises(ValueError, match="label of problem 9.*another split, or in another order"):
        tables.read_predictions(file, problems[::-1])
    write(["Solution: a", "Solution: b"], ["Solution: a", "Solution: c"])  # of the first stage
    assert [x["response"] for x in tables.read_predictions(file, problems)][1] == "Solution: b"


# --- tables and command line
def test_table_has_chance_beside_accuracy_and_fits():
    m = scored(*small_set())
    lines = tables.table({"runs/a": m, "runs/" + "long-" * 9 + "b": m, "c": m}).split("\n")
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[2:] == ["n", "chance", "runs/a", "..g-long-long-long-b", "c"]
    avg = next(line for line in lines if line.startswith("avg"))
    assert avg.split() == ["avg", "8", "31.25"] + ["62.50", "[30.57,", "86.32]"] * 3
    assert not any(line.startswith("LAN") for line in lines)  # no such problem
    assert next(x for x in lines if x.startswith("parse")).split()[3:] == ["12.50"] * 3
    assert len({line.rfind("]") for line in lines if "]" in line}) == 1  # aligned


def test_table_in_markdown_and_over_different_problems():
    problems, predictions = small_set()
    all_of_them = scored(problems, predictions)
    some = scored(problems, predictions[:4], partial=True)
    with_rationales = all_of_them | {"rougeL": 90.123, "bleu1": 80.0, "bleu4": 7.0}
    text = tables.table({"a": all_of_them, "b": some, "c": with_rationales}, markdown=True)
    first, second = text.split("\n\n")
    assert "|  a |" not in second and re.search(r"\| avg +\| 4 \|", second)
    assert re.search(r"\| ROUGE-L +\| +\| +\| +- \| +90\.12 \|", first)
    assert first.split("\n")[1].startswith("| ---") and first.split("\n")[1].endswith("-: |")


def write_own_data(folder, n=4):
    record = {"question": "?", "choices": ["a", "b"], "split": "test"}
    lines = [{"id": f"q{i}", "answer": i % 2} | record for i in range(n)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    replies = [says("A"), says("B"), says("B"), "hm"]
    predictions = [{"id": f"q{i}", "response": replies[i], "mine": i} for i in range(n)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, predictions)))
    return ["--predictions", str(folder / "p.jsonl"), "--data", str(folder / "own.jsonl")]


def test_command_line_grades_a_file_and_shows_runs(tmp_path, capsys):
    scoring.main([*write_own_data(tmp_path), "--out", str(tmp_path / "runs/x")])
    printed = capsys.readouterr().out
    assert re.search(r"^avg +4 +50\.00 +50\.00 \[15\.00, 85\.00\]$", printed, re.M)
    graded = (tmp_path / "runs/x/predictions.jsonl").read_text().splitlines()
    assert json.loads(graded[2]) == {
        "id": "q2", "response": says("B"), "mine": 2,
        "correct": False, "parsed": "B", "how": "letter", "kind": "wrong",
        "because": "the answer is another",
    }  # fmt: skip
    assert [json.loads(x)["kind"] for x in graded] == ["right", "right", "wrong", "no parse"]
    assert json.loads((tmp_path / "runs/x/metrics.json").read_text())["parse_failures"] == 25.0
    scoring.main([str(tmp_path / "runs/x"), str(tmp_path / "runs/x") + "/"])
    assert len(re.findall(r"50\.00 \[15\.00, 85\.00\]", capsys.readouterr().out)) >= 2
    with pytest.raises(FileNotFoundError, match="no run folder: it has no config.json"):
        scoring.main([str(tmp_path)])


@pytest.mark.slow
def test_command_line_errors_are_sentences(tmp_path):
    arguments = write_own_data(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"id": "q0", "response": "x"}\n{"id": ')
    command = [sys.executable, ROOT / "eval.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert re.match(r"eval\.py: .*p\.jsonl, line 2 is not complete JSON", run.stderr)
    for wrong in ([], ["run", *arguments], ["--predictions", "x"], ["run", "--data", "x"]):
        with pytest.raises(SystemExit):
            scoring.parse_args(wrong)


@pytest.mark.slow
def test_speed():
    """10,000 answers within 10 s, and the rationales of a ScienceQA test split in a few more."""
    rng = random.Random(3)
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(rng.choice(words) + "." * (rng.random() < 0.07) for _ in range(100))
             for _ in range(1000)]  # fmt: skip
    problems = [problem(str(i), solution=texts[i % 1000]) for i in range(10_000)]
    predictions = [{"id": p.id, "response": says("A")} for p in problems]
    start = time.process_time()
    scored(problems, predictions)
    assert time.process_time() - start < 10
    start = time.process_time()
    for x in predictions[:1000]:
        x["rationale"] = perturbed(texts[int(x["id"])], rng)
    assert scored(problems, predictions)["n_rationales"] == 1000
    assert time.process_time() - start < 10
