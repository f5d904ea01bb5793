"""evaluation/grading.py: what is read out of a reply, and how that compares with others' verdicts.

`python tests/test_grading.py` prints the agreement with MathVista's published verdicts on Bard's
replies and with Claude's on the Gemini answers of pali_reason, and every disagreement.
"""

import csv
import json
import os
import random
import re
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as scoring  # noqa: E402
from support.dataset.choices import LETTERS  # noqa: E402
from support.evaluation import grading  # noqa: E402

REAL = Path(os.environ.get("NANOCOT_DATA", ROOT / "../shared/data"))
BARD = REAL / "mathvista/results/bard/output_bard.json"
GEMINI = REAL / "pali_reason/training.csv"
needs_bard = pytest.mark.skipif(not BARD.is_file(), reason=f"no {BARD}; set NANOCOT_DATA")
needs_gemini = pytest.mark.skipif(not GEMINI.is_file(), reason=f"no {GEMINI}; set NANOCOT_DATA")


def choose(*choices, index=0, question="Which one?", official=True):
    meta = {"answer_index": index} | ({"answer_type": "text"} if official else {})
    return data.Problem("1", question, choices, choices[index], "", None, "", "", meta)


def free(kind, answer="5", question="How many objects are left?", **meta):
    meta |= {"answer_index": None} | ({"answer_type": kind} if kind else {})
    return data.Problem("1", question, (), answer, "", None, "", "", meta)


def kind(how):
    """What was read, without the pass that read it."""
    return re.split(" in | as |, not|; guessed", how)[0]


ANGLES = choose("135°", "140°", "145°", "150°")
YES_NO = choose("Yes", "No", question="Are there fewer buses than cars?")
LEAVES = choose("Acuminate", "Truncate", "Mucronate", "Acute")
FOXES = choose("increase", "decrease", "stay the same")
SALT = choose("Solution A", "Solution B", "neither")
TANGENT = choose(r"\frac { 5 } { 12 }", r"\frac { 12 } { 5 }")
ROOTS = choose("6", r"6 \sqrt { 2 }", r"6 \sqrt { 3 }")
PETS = choose("dog", "cat", "bird")

CHOICES = [  # problem, reply, letter (None: no answer), how
    # letters
    *((ANGLES, said, "B", "letter") for said in (
        "(B)", "B", "B.", "b", "(b)", "b) 140°", "option B", "Option: B", "**B**", "B. 140°",
        "Answer: B", "Answer:\nB", "answer - B", "Final answer: (B) 140°", "Final Answer\n\nB",
        r"\boxed{B}", r"Final Answer: The final answer is $\boxed{\text{B}}$",
        "The correct option is (B)", "The correct option letter is B, which stands for 140°.",
        "The correct answer is option (B), 140°.", "The best choice would be (B).",
        "Option B is the correct answer.", "The answer to the question is: **B**",
        "It could be (A). But as the sum is 180, the correct answer might be (B).",
        "B\n\nExplanation: all angles together are 180°, half of that is 90°.",
        "Choices:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°\n\nAnswer: (B) 140°",
        "The answer is (A). No, wait. The answer is (B).",  # the last counts
        "The answer is B. A is too small, and (C) is incorrect.",
        "答案是B", "答案：（B）", "故选：Ｂ。", "正确选项是 (B)。", "پاسخ: B", "گزینه صحیح (B)",
    )),
    (ANGLES, "That is half of 280 degrees, which is option B.", "B", "letter"),
    (ANGLES, "B is correct.", "B", "letter"),
    (ANGLES, "The angle is (D) 150°. Bisectors halve the angles.", "D", "letter"),
    # several, none, another
    *((ANGLES, said, None, "several answers") for said in (
        "The answer is (A) or (B).", "A, B", "(A) and (C)", "The answer is both A and B.",
        "(A) 135° (B) 140° (C) 145° (D) 150°", "The answer is 135° or 140°.",
    )),
    *((ANGLES, said, None, "no answer found") for said in ("", " \n ", ".")),
    *((ANGLES, said, None, "empty answer") for said in (
        "Answer:", "The answer is (B).\nAnswer:",
    )),
    *((ANGLES, said, None, "refused") for said in (
        "I'm sorry, I cannot see it.", "As an AI I need the picture.",
        "I cannot answer that. An angle of 140° would be obtuse.",
        "I see no picture. The choices are:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°",
    )),
    (ANGLES, "The answer is (E).", None, "letter not among the options"),
    *((YES_NO, said, None, "letter not among the options") for said in (  # PaliGemma's own choices
        "(C) Yes, but not as many\n(D) No, but as many", "(c) no", "(C) Yes and buses",
        "(C) Yes\n(D) No",
    )),
    (ANGLES, "(E) 140°", "B", "choice text"),
    *((choose("P", "Q", "R", "S"), said, "B", "letter") for said in (  # Q is no label
        "The answer is Q.", "Q", "(Q)", "\\boxed{Q}", "Therefore, the answer is point Q.",
        "Point Q is the highest.", "The answer is B.",
    )),
    (ANGLES, "The answer is 92.5 degrees.", None, "no such choice"),
    # what a choice says
    *((ANGLES, said, "C", "choice text") for said in (
        "145", "145°", "The answer is 145 degrees.", "∠BOC = 180° - 35° = 145°", r"$145^\circ$",
        r"Thus $\angle BOC = \boxed{145^{\circ}}$.", "因此，∠BOC的度数是145°。",
    )),
    (ANGLES, "Angle A is 110 degrees. So angle BOC is 145 degrees.", "C", "choice text"),
    *((YES_NO, said, "B", "choice text") for said in (
        "No", "no.", "The answer is no.", "So the answer is: **No**", "False\n",
    )),
    (YES_NO, "Yes, there are fewer buses.", "A", "choice text"),
    (YES_NO, "There are no buses, so the answer is yes.", "A", "choice text"),
    (YES_NO, "There are no cars in the picture.", None, "no answer found"),
    (YES_NO, "I count 3 and 2. There are not fewer buses than cars.", "B", "choice text"),
    (FOXES, "The foxes would most likely decrease.", "B", "choice text"),
    (FOXES, "Therefore, the number of foxes will stay the same.", "C", "choice text"),
    (PETS, "It is neither a dog nor a bird.", None, "no answer found"),
    (SALT, "The answer is Solution B.", "B", "choice text"),
    (SALT, "(A) Solution A", "A", "letter"),
    (TANGENT, "tan X = 12/5", "B", "choice text"),
    (TANGENT, r"The answer is $\dfrac{12}{5}$.", "B", "choice text"),
    (ROOTS, r"The answer is $6\sqrt{3}$", "C", "choice text"),
    (ROOTS, "x = 6√2", "B", "choice text"),
    (choose("20海里", "20√{2}海里"), "20√2海里", "B", "choice text"),
    (choose("2cm2", "1cm2"), "1 cm²", "B", "choice text"),
    (choose("(0, 0)", "(-1, 0)", "(2, 0)"), "The answer is (-1, 0).", "B", "choice text"),
    (choose("11-15", "0-5"), "The answer is 0–5.", "B", "choice text"),
    (choose("Jul '21", "Jun '21"), "Jun ’21", "B", "choice text"),
    # a slip of the pen, or of rounding
    (LEAVES, "mucronat", "C", "nearest choice"),
    (LEAVES, "The answer is Trunkate.", "B", "nearest choice"),
    (LEAVES, "The answer is palmate.", None, "no answer found"),
    (choose("4.62", "5.66"), "The answer is 5.65 cm.", "B", "nearest choice"),
    # a letter that is stated holds, whatever is computed after it
    (ANGLES, r"The answer is (B). \boxed{145} would be wrong. I hope this helps.", "B", "letter"),
    (ANGLES, "The answer is (B). Half of it is 70.\nTherefore, it is 145°.", "B", "letter"),
]  # fmt: skip

NUMBERS = [  # kind, reply, parsed (None: no answer), how
    *(("integer", said, "5", "number") for said in (
        "5", "5.", "5.0", "$5", "5 objects", "**5**", "```\n5\n```", "#### 5", "5\n\nAs 8 - 3 = 5.",
        "The answer is 5.", "The answer is: 5", "So, the total is $5.", "8 - 3 = 5", "x = 5",
        "Answer: 5\nExplanation: 8 - 3 = 5", r"Thus we have $\boxed{5}$ objects.", "Five", "۵",
        "First guess: the answer is 6. No, wait. The answer is 5.", "پاسخ: ۵", "答案：５",
        "There are 8 objects. Subtract 3 balls. Therefore, there are 5 objects.", "Answer: 5%",
        "Count them: 3 cubes and 2 spheres. So the total is 3 + 2 = 5 objects.",
    )),
    *(("integer", said, "5", "number") for said in (
        "There are 5 objects left.", "There are five objects left.",
        "The image shows 5 objects left after removing 3 balls.",
        "After the subtraction, there are 5 objects left in the image, including 2 cubes.",
        "There are 8 objects at first. 3 of them are balls. There are 5 objects left.",
    )),
    ("integer", "There are no objects left.", "0", "number"),
    ("integer", r"\boxed{1{,}204}", "1204", "number"),
    ("integer", "The answer is −3.", "-3", "number"),
    ("integer", "The answer is 3.4", "3.4", "number"),  # no integer: not cut to one
    *(("integer", said, None, "no answer found") for said in ("", "None", "3/0", "9" * 5000)),
    ("integer", "Answer:\n", None, "empty answer"),
    *(("integer", said, None, "refused") for said in (
        "I cannot tell.", "I'm sorry, but I see no image.",
        "I cannot answer that. A function is odd if it passes (0, 0).",
    )),
    ("float", "d ≈ 1.18 cm", "1.2", "number"),
    ("float", r"$d = \boxed{1.2 \text{ cm}}$", "1.2", "number"),
    ("float", r"The answer is \frac{1}{2}.", "0.5", "number"),
    ("float", "The answer is 131,253.55 dollars", "131253.5", "number"),
    ("float", "6 × 10² N", "600.0", "number"),
    ("float", r"$6.7 \times 10^{-11}$", "0.0", "number"),
    ("list", "The years are [2014, 2016].", "[2014, 2016]", "list"),
    ("list", "Answer: 2014 and 2016", "[2014, 2016]", "list"),
    ("list", "Answer: 2014", None, "no answer found"),
    (None, "Answer: 5.0", "5", "number"),  # without an answer_type the gold answer tells
    (None, "Answer: five", "5", "number"),
]  # fmt: skip


@pytest.mark.parametrize("problem, reply, letter, how", CHOICES)
def test_what_is_read_where_there_are_choices(problem, reply, letter, how):
    got = scoring.grade(problem, reply)
    assert (got.parsed, kind(got.how), got.correct) == (letter, how, letter == "A")


@pytest.mark.parametrize("answer_type, reply, parsed, how", NUMBERS)
def test_what_is_read_without_choices(answer_type, reply, parsed, how):
    got = scoring.grade(free(answer_type, precision=1), reply)
    assert (got.parsed, kind(got.how), got.correct) == (parsed, how, parsed == "5")


@pytest.mark.parametrize(
    "question, reply, parsed",
    [
        ("How many were liked by more than 7 people?", "3 were liked by more than 7 people.", "3"),
        ("What is f(4)?", "The value of f(4) is 16.", "16"),
        ("In which week was it highest?", "So the highest were 300 grams in week 3.", "3"),
        ("What is the age gap?", "Born in 1940 and 1949. Therefore, the gap is 9 years.", "9"),
        ("What is the largest bar?", "The largest is bar one. It has a value of 10.", "10"),
    ],
)  # fmt: skip
def test_which_of_several_numbers(question, reply, parsed):
    assert scoring.grade(free("integer", question=question), reply).parsed == parsed


def test_gold_answers_and_their_equals():
    assert scoring.grade(free("float", "0.21", precision=2), "0.2145").correct
    assert not scoring.grade(free("float", "0.21", precision=2), "0.2").correct
    assert scoring.grade(free("list", "[2014, 2016]"), "[2014, 2016.0]").correct
    assert scoring.grade(free(None, "2.5 cm"), "Answer: 2.5  cm.").correct
    twins = choose("9", "18", "18", index=2)  # MathVista compares the text, ScienceQA the index
    assert scoring.grade(twins, "Answer: 18").correct and scoring.grade(twins, "(B)").correct
    named = choose("(c)", "(a)", "(b)")  # a letter is a letter first, as the official scorer has it
    assert scoring.grade(named, "(c)").parsed == "C"


def test_one_grader_and_the_published_rule_by_flag():
    for said in ("The correct answer is (B).", r"\boxed{B}", "B because it is so", "It is blue."):
        scienceqa = choose("red", "blue", index=1, official=False)
        assert scoring.grade(scienceqa, said, strict=True).parsed is None
        assert scoring.grade(scienceqa, said).correct
        assert scoring.grade(choose("red", "blue", index=1), said, strict=True).correct


@pytest.mark.parametrize(
    "reply, how",
    [
        ("The answer is A.<answer>B</answer>", "letter in a tag"),
        ('{"answer": "B", "confidence": 0.9}', "letter in JSON"),
        (r"So $\boxed{140^\circ}$.", "choice text in a box"),
        ("The answer is B. It is half of 280°.", "letter in words"),
        ("B. 140°", "letter as a line"),
        ("Half of it is 70°. Therefore, the angle is 140°.", "choice text in a conclusion"),
        ("The angle at C is 140°, as its sides are equal.", "choice text in prose"),
        ("The answer is B.\n\nTherefore, the angle is 145°.", "letter in words, not concluded"),
        ("The angle cannot be determined.", "refused"),
        ("It is 80°. None of the options is correct.", "no such choice"),
    ],
)
def test_how_names_the_pass(reply, how):
    got = scoring.grade(ANGLES, reply)
    assert got.how == how and got.parsed == (None if " " not in how or "no " in how else "B")


def test_the_official_guess_is_the_nearest_choice_and_draws_nothing():
    dice = random.Random(42)
    got = scoring.grade(YES_NO, "N/A", dice)
    assert got == grading.Grade(False, None, "no answer found; guessed B")
    assert scoring.grade(ANGLES, "The answer is 115.", dice).how == "no such choice; guessed A"
    assert scoring.grade(ANGLES, "Answer: B", dice).parsed == "B"
    assert scoring.grade(free("integer"), "N/A", dice).how == "no answer found"
    assert dice.random() == random.Random(42).random()


def test_normal_committed_and_agrees():
    assert grading.normal(ANGLES, "145 degrees") == grading.normal(ANGLES, "(C)") == "C"
    assert grading.normal(free("float", precision=1), "1.24") == "1.2"
    assert grading.normal(free("text"), " North  Pole. ") == "north pole"
    assert grading.committed(PETS, "A dog barks. So the answer is cat.")[0] == "B"
    assert grading.committed(PETS, "There is a cat beside the tree.") is None
    assert grading.committed(PETS, "So, the dog is not it.") is None
    assert grading.agrees(PETS, "I look at it. So the answer is cat.", "(B)") is True
    assert grading.agrees(PETS, "I look at it. So the answer is cat.", "Answer: bird") is False
    assert grading.agrees(PETS, "I look at it.", "(B)") is None
    assert grading.agrees(PETS, "So the answer is cat.", "") is None
    # what is only mentioned at the end confirms, but does not contradict
    assert grading.agrees(PETS, "The animal is a cat.", "(B)") is True
    assert grading.agrees(PETS, "The animal is a cat.", "(C)") is None
    count = free("integer")
    assert grading.agrees(count, "10 - 4 = 6\nMinus one more: 6 - 1 = 5", "5") is True
    assert grading.agrees(count, "10 - 4 = 6\nMinus one more: 6 - 1 = 5", "6") is False


def test_unjudged_traces_are_graded_as_prose():
    from support.training import examples as records

    trace = {"verdict": {"correct": None}, "answer": "The correct answer is **(A)**, a dog.\n"}
    assert records.holds(trace, choose("dog", "cat", official=False), "correct")
    assert not records.holds(trace, choose("dog", "cat", index=1, official=False), "correct")
    assert records.holds(
        trace | {"answer": "There are 5 objects left."}, free("integer"), "correct"
    )
    assert not records.holds(trace | {"answer": ""}, free("integer"), "correct")


READINGS = {"letter", "choice text", "nearest choice", "number", "list", "text"}
FAILURES = {"no answer found", "empty answer", "refused", "several answers", "no such choice",
            "letter not among the options"}  # fmt: skip
PASSES = ("a tag", "JSON", "a box", "words", "a line", "a conclusion", "own words", "prose")
PIECES = st.sampled_from([*"ABz(){}[]$\\.,:=√/%-0123456789\n °۵Ⅷ²½", r"\boxed{", r"\frac{1}{",
    "Answer:", "The answer is", "so", "e9", "10^", "⟦", "答案", " or ", "no "])  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join)), st.randoms())
def test_no_text_raises_and_every_how_is_of_the_vocabulary(text, dice):
    kinds = (free(kind, precision=1) for kind in ("integer", "float", "list", None))
    for problem in (ANGLES, YES_NO, TANGENT, choose("a", "b", official=False), *kinds):
        for got in (scoring.grade(problem, text), scoring.grade(problem, text, dice)):
            what, *where = re.split(" in | as |, not concluded|; guessed .", got.how)
            assert what in (FAILURES if got.parsed is None else READINGS)
            assert got.parsed is None or where[0] in PASSES
            assert got.parsed is not None or not got.correct or "guessed" in got.how
        read = grading.committed(problem, text)
        if read and problem.choices:
            assert read[0] in LETTERS[: len(problem.choices)]
        assert grading.agrees(problem, text, text) in (True, None)


# --- against the published verdicts -------------------------------------------------------------


@cache
def mathvista():
    return {problem.id: problem for problem in data.load(REAL / "mathvista", "testmini")}


@cache
def bard(faithful=False):
    """[(problem, record, Grade, official verdict)]"""
    records, dice = json.loads(BARD.read_text()), random.Random(42) if faithful else None
    rows = [(mathvista()[i], x) for i, x in records.items()]
    return [(p, x, scoring.grade(p, x["response"], dice), x["true_false"]) for p, x in rows]


@cache
def gemini():
    """The same of Gemini's answers; Claude's verdict is whether the trace was kept."""
    csv.field_size_limit(10**9)
    with (
        open(GEMINI, newline="") as file,
        open(GEMINI.with_stem("training_correct"), newline="") as kept,
    ):
        rows, kept = list(csv.DictReader(file)), {x["indexes"] for x in csv.DictReader(kept)}
    rows = [(mathvista()[str(int(x["indexes"]) + 1)], x) for x in rows]
    return [(p, x, scoring.grade(p, x["generated_answers"]), x["indexes"] in kept) for p, x in rows]


def agreement(rows):
    return sum(grade.correct == verdict for *_, grade, verdict in rows) / len(rows)


@needs_bard
def test_mathvistas_verdicts_on_bard():
    rows = bard()
    assert len(rows) == 1000 and agreement(rows) >= 0.97
    assert abs(sum(grade.correct for *_, grade, _ in rows) / 10 - 34.8) <= 1.0
    refused = [grade for _, x, grade, _ in rows if x["response"].startswith("Sorry, I can't help")]
    assert len(refused) > 50 and all(grade.parsed is None for grade in refused)


@needs_bard
def test_mathvistas_verdicts_with_the_official_guess():
    rows = bard(faithful=True)
    assert agreement(rows) >= 0.985
    assert abs(sum(grade.correct for *_, grade, _ in rows) / 10 - 34.8) <= 0.3


@needs_gemini
def test_claudes_verdicts_on_gemini():
    assert len(gemini()) == 345 and agreement(gemini()) >= 0.97


# Claude's verdicts, each read with problem and reply: of these the gold answer is on our side.
# 20, 35, 140, 255: the reply states another letter than the gold one; 107, 226, 337: the letter of
# another choice than "quarter"; 126: it says 10, and gold is 9.
WRONG_VERDICTS = "20 35 107 126 140 226 255 337".split()


@needs_bard
@needs_gemini
def test_what_is_conclusive_is_right():
    """At least 99.5 % on others' verdicts, those apart that are wrong themselves."""
    rows = bard() + [row for row in gemini() if row[0].id not in WRONG_VERDICTS]
    final = [row for row in rows if grading.is_conclusive(row[2])]
    assert agreement(final) >= 0.995 and len(final) > 0.75 * len(rows)


@needs_gemini
def test_the_thoughts_of_kept_traces_agree_with_their_answers():
    kept = [(p, x) for p, x, _, verdict in gemini() if verdict]
    said = [grading.agrees(p, x["thoughts"], x["generated_answers"]) for p, x in kept]
    assert said.count(True) > 170 and said.count(False) <= 5


@pytest.mark.slow
@needs_bard
def test_ten_thousand_in_ten_seconds():
    start = time.process_time()
    for p, x, *_ in bard() * 10:
        scoring.grade(p, x["response"])
    assert time.process_time() - start < 10


def show(name, rows, text):
    score = 100 * sum(grade.correct for *_, grade, _ in rows) / len(rows)
    print(f"{name}: {agreement(rows):.1%} of {len(rows)} verdicts are ours; score {score:.1f}")
    final = [row for row in rows if grading.is_conclusive(row[2])]
    print(f"  {len(final) / len(rows):.1%} are conclusive, of these agree {agreement(final):.2%}")
    for p, x, grade, verdict in rows:
        if grade.correct != verdict:
            ours = f"ours {grade.parsed} ({grade.how})"
            theirs = f"theirs {'right' if verdict else 'wrong'}"
            print(f"  {p.id}: {ours}, gold {p.answer!r}, {theirs}; ends {x[text][-60:]!r}")


if __name__ == "__main__":
    show("Bard, MathVista's own verdicts", bard(), "response")
    show("  with the official guess", bard(faithful=True), "response")
    show("Gemini, Claude's verdicts", gemini(), "generated_answers")
