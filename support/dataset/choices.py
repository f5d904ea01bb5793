r"""A problem's choices: their letters, the one a text names, another order of them.

`problem` is a data.Problem, which this file cannot import: data.py imports it.
"""

import dataclasses
import re
from typing import Any

import torch

LETTERS = "ABCDEFGHIJ"


def lettered(problem: Any, letters: str = LETTERS) -> str:
    """The choices as "(A) attract (B) repel", "" if there are none."""
    if len(problem.choices) > len(letters):
        raise ValueError(
            f"Problem {problem.id} has {len(problem.choices)} choices: over {letters}."
        )
    return " ".join(f"({letters[i]}) {text}" for i, text in enumerate(problem.choices))


BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# Without ^, which changes no match, a line of n characters without an answer takes n^2 steps.
ANSWER = re.compile(r"^.*\banswer(?: is|:)[\s*:]*(.+)", re.IGNORECASE | re.MULTILINE)


def final_answer(problem: Any, text: str) -> str:
    r"""What a teacher's prose ends in; of a problem with choices the letter, if it names one.

    Looked for in the last \boxed{}, else after the last "answer is", else in the last line. This
    is for training data that nobody graded; the grader is in grading.py.
    """
    endings = BOXED.findall(text) or ANSWER.findall(text) or text.strip().splitlines()
    answer = endings[-1][:10_000] if endings else ""  # the next pattern is quadratic in it
    answer = re.sub(r"\\text\{(.*?)\}", r"\1", answer).strip(" .*$")
    if not problem.choices:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
        is_number = problem.meta.get("answer_type") in ("integer", "float")
        return numbers[-1] if is_number and numbers else answer
    letters = LETTERS[: len(problem.choices)]
    choices = [choice.lower() for choice in problem.choices]
    named = re.findall(rf"\(([{letters}])\)|^([{letters}])(?![^).:,])", answer)
    if named:
        return "".join(named[-1])
    return LETTERS[choices.index(answer.lower())] if answer.lower() in choices else answer


NAMES_AN_OPTION = re.compile(
    r"\([A-J]\)|\b(?i:options?|choices?|answers?|letter)\b[^.\n]{0,30}?\b[A-H]\b|of the above"
)


def movable(problem: Any, trace: dict | None = None) -> bool:
    """Whether the choices may change places without making a text wrong.

    Not if one of them is a bare letter or says "of the above"; not if question or thought name an
    option by its letter; not with a trace nobody judged correct, whose own answer may be a letter.
    """
    if not problem.choices or set(problem.choices) & set(LETTERS):
        return False
    if trace and not trace["verdict"]["correct"]:
        return False
    texts = [problem.question, *problem.choices, trace["thought"] if trace else ""]
    return not any(NAMES_AN_OPTION.search(text) for text in texts)


def shuffled(problem: Any, generator: torch.Generator) -> Any:
    """The problem with its choices in an order drawn from a torch.Generator."""
    order = torch.randperm(len(problem.choices), generator=generator).tolist()
    meta = problem.meta | {"answer_index": order.index(problem.meta["answer_index"])}
    choices = tuple(problem.choices[i] for i in order)
    return dataclasses.replace(problem, choices=choices, meta=meta)
