r"""A question's choices: their letters, the one a text names, another order of them.

Left out on purpose: grading (grading.py). `final_answer` reads a teacher's prose for training data
that nobody graded.
"""

import dataclasses
import re

import torch

LETTERS = "ABCDEFGHIJ"


def lettered(problem, letters=LETTERS):
    """The choices as "(A) attract (B) repel", "" if there are none."""
    if len(problem.choices) > len(letters):
        raise ValueError(
            f"Problem {problem.id} has {len(problem.choices)} choices: over {letters}."
        )
    return " ".join(f"({letters[i]}) {text}" for i, text in enumerate(problem.choices))


BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# Without ^, which changes no match, a line of n characters without an answer takes n^2 steps.
_ANSWER = re.compile(r"^.*\banswer(?: is|:)[\s*:]*(.+)", re.IGNORECASE | re.MULTILINE)


def final_answer(problem, text):
    r"""What a teacher's prose ends in; of a problem with choices the letter, if it names one.

    Looked for in the last \boxed{}, else behind the last "answer is", else in the last line. This
    is for training data that nobody graded; the grader is in grading.py.
    """
    said = BOXED.findall(text) or _ANSWER.findall(text) or text.strip().splitlines()
    said = said[-1][:10_000] if said else ""  # the next pattern is quadratic in it
    said = re.sub(r"\\text\{(.*?)\}", r"\1", said).strip(" .*$")
    if not problem.choices:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", said.replace(",", ""))
        is_number = problem.meta.get("answer_type") in ("integer", "float")
        return numbers[-1] if is_number and numbers else said
    letters, choices = LETTERS[: len(problem.choices)], [c.lower() for c in problem.choices]
    named = re.findall(rf"\(([{letters}])\)|^([{letters}])(?![^).:,])", said)
    if named:
        return "".join(named[-1])
    return LETTERS[choices.index(said.lower())] if said.lower() in choices else said


_NAMES_AN_OPTION = re.compile(
    r"\([A-J]\)|\b(?i:options?|choices?|answers?|letter)\b[^.\n]{0,30}?\b[A-H]\b|of the above"
)


def movable(problem, trace=None):
    """Whether the choices may change places without making a text wrong.

    Not if one of them is a bare letter or says "of the above"; not if question or thought name an
    option by its letter; not with a trace nobody judged correct, whose own answer may be a letter.
    """
    if not problem.choices or set(problem.choices) & set(LETTERS):
        return False
    if trace and not trace["verdict"]["correct"]:
        return False
    texts = [problem.question, *problem.choices, trace["thought"] if trace else ""]
    return not any(_NAMES_AN_OPTION.search(text) for text in texts)


def shuffled(problem, generator):
    """The problem with its choices in an order drawn from a torch.Generator."""
    order = torch.randperm(len(problem.choices), generator=generator).tolist()
    meta = problem.meta | {"answer_index": order.index(problem.meta["answer_index"])}
    choices = tuple(problem.choices[i] for i in order)
    return dataclasses.replace(problem, choices=choices, meta=meta)
