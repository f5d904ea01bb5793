"""dataset/choices.py: the answer that a teacher's prose ends in, choices in another order."""

import random
import re
import time

import pytest
import torch
from samples import asked, trace

from support.dataset.choices import ANSWER, final_answer, movable, shuffled

PROSE = [  # what a teacher said, and the answer in it: of rope, belt, neither
    ("(B) 3.9", "B"),
    ("B", "B"),
    ("**C**", "C"),
    ("First (A), but no.\nFinal Answer: The final answer is $\\boxed{C}$", "C"),
    ("so $\\boxed{\\text{B}}$.", "B"),
    ("Final Answer: The final answer is **C**", "C"),
    ("The correct answer is **(B)**.\nI hope this helps.", "B"),
    ("Answer:\nB. belt", "B"),
    ("It is not the rope.\n\nBelt", "B"),
    ("The answer is neither.", "C"),
    ("A belt is longer", "A belt is longer"),  # an article is no letter
    ("F", "F"),  # not one of the three
    ("", ""),
]

NUMBERS = [
    ("There are 1,204 objects left.", "integer", "1204"),
    ("The rate is -3", "integer", "-3"),
    ("Rounded: $\\boxed{0.0}$", "float", "0.0"),
    ("I cannot tell.", "integer", "I cannot tell"),
    ("[6, 6, 7]\n", "list", "[6, 6, 7]"),
    ("half of $\\boxed{\\frac{1}{2}}$ ", "text", "\\frac{1}{2}"),
]


@pytest.mark.parametrize("text, answer", PROSE)
def test_final_answer_of_choices(text, answer):
    assert final_answer(asked(), text) == answer


@pytest.mark.parametrize("text, kind, answer", NUMBERS)
def test_final_answer_without_choices(text, kind, answer):
    assert final_answer(asked(choices=(), meta={"answer_type": kind}), text) == answer


@pytest.mark.parametrize(
    "text", [part * 10**5 for part in ("a" * 9, "answer ", "\\text{", "\\boxed{", "answer: ")]
)
def test_final_answer_of_a_line_without_end(text):
    start = time.process_time()
    final_answer(asked(choices=(), meta={}), text)
    assert time.process_time() - start < 2


def test_final_answer_reads_as_the_plain_pattern_does():
    """The pattern that is fast on long lines finds what the one without its ^ finds."""
    plain, rng = re.compile(ANSWER.pattern.removeprefix("^"), re.IGNORECASE), random.Random(0)
    parts = "answer is|Answer:|answer|:| is |\n|\n\n|*| |(A)|x|\r|an".split("|")
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        assert ANSWER.findall(text) == plain.findall(text), text


def test_shuffled_keeps_the_answer():
    twice = asked(choices=("x", "y", "y"), answer="y")
    seen = set()
    for seed in range(50):
        problem = shuffled(twice, torch.Generator().manual_seed(seed))
        assert problem.choices[problem.meta["answer_index"]] == problem.answer == "y"
        assert sorted(problem.choices) == ["x", "y", "y"]
        seen.add((problem.choices, problem.meta["answer_index"]))
    assert len(seen) == 6 and twice.meta == {"answer_index": 1}


MOVABLE = [
    (True, {}, None),
    (True, {}, trace("It is the belt. A rope is not. I think so.")),
    (True, {}, trace("Angle C is in triangle ABC, see point B.")),
    (False, {"choices": ()}, None),
    (False, {"choices": ("A", "B", "C")}, None),
    (False, {"choices": ("AB", "BC", "none of the above")}, None),
    (True, {"choices": ("AB", "BC", "CD")}, None),
    (False, {"question": "Is option B right?"}, None),
    (False, {}, trace("So (B).")),
    (False, {}, trace("Option **B** fits.")),
    (False, {}, trace("The correct option letter is C.")),
    (False, {}, trace("The option letter for 'belt' is B")),
    (False, {}, trace("the answer is B")),
    (False, {}, trace("It is the belt.", correct=False)),
    (False, {}, trace("It is the belt.", correct=None)),
]


@pytest.mark.parametrize("expected, changes, told", MOVABLE)
def test_movable(expected, changes, told):
    assert movable(asked(**changes), told) is expected
