"""Small problems, answers and grades for the tests of the evaluation wing."""

import json
import os
from pathlib import Path

import pytest

import data
import eval as evaluation
from support.evaluation.grading import Grade

REAL = Path(os.environ["NANOCOT_DATA"])
SCIENCEQA = REAL / "scienceqa"
MATHVISTA = REAL / "mathvista"
needs_scienceqa = pytest.mark.skipif(
    not (SCIENCEQA / "problems.json").is_file(),
    reason=f"no ScienceQA in {SCIENCEQA}; set NANOCOT_DATA",
)
needs_mathvista = pytest.mark.skipif(
    not (MATHVISTA / "annot_testmini.json").is_file(),
    reason=f"no MathVista in {MATHVISTA}; set NANOCOT_DATA",
)


def problem(id="1", choices=("yes", "no", "maybe"), index=0, answer=None, **other):
    fields = {"hint": "", "image": None, "lecture": "", "solution": "", "meta": {}} | other
    fields["meta"] = {"answer_index": index if choices else None, "caption": ""} | fields["meta"]
    answer = choices[index] if choices else answer
    return data.Problem(id=id, question="?", choices=choices, answer=answer, **fields)


def says(letter):
    return f"The answer is ({letter})."


def graded(outcomes, **other):
    """What `grade_all` returns, of one problem for each outcome."""
    grades = {True: Grade(True, "A", ""), False: Grade(False, "B", "")}
    pairs = ((problem(str(i), **other), grades[bool(x)]) for i, x in enumerate(outcomes))
    return [(p, {"id": p.id, "response": ""}, g) for p, g in pairs]


def own_data(folder, split="test", n=8, name="own.jsonl", **more):
    """Adds n problems with two choices to a JSONL file; its path."""
    with open(folder / name, "a", encoding="utf-8") as file:
        for i in range(n):
            record = {"id": f"{split}q{i}", "question": "?", "choices": ["a", "b"], "answer": i % 2}
            file.write(json.dumps(record | {"split": split} | more) + "\n")
    return folder / name


def graded_run(folder, name, letters, split="test", source="own.jsonl", *flags):
    """A folder of predictions of `own_data` that eval.py graded; its path as text."""
    file = folder / f"{name}-predictions.jsonl"
    lines = [{"id": f"{split}q{i}", "response": says(x)} for i, x in enumerate(letters)]
    file.write_text("\n".join(map(json.dumps, lines)))
    where = ["--predictions", str(file), "--data", str(folder / source), "--split", split]
    evaluation.main([*where, "--out", str(folder / name), *flags])
    return str(folder / name)
