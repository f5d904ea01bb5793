"""Why answers are right or wrong: pali_reason's kinds by rule, with the evidence in words.

`classify` names one of KINDS for one answer, `classify_all` for many, and `refine` corrects them by
a judge that sees the images. The rules read texts and, where the scene behind an image is
known, as of the demo, the scene: then a statement of the rationale holds or does not.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
from data import Problem
from support import files
from support.dataset.choices import LETTERS
from support.dataset.traces import load_traces
from support.evaluation import grading
from support.evaluation.grading import ANSWER, CUE, Grade, committed, right, squash

KINDS = ("sound", "lucky", "novel", "right", "right thought, wrong answer", "loop", "nonsense",
         "cut off", "no parse", "wrong")  # fmt: skip
Graded = tuple[Problem, dict, Grade]  # a problem, the prediction for it, and its grade
COMMON = frozenset(  # words that do not say what a text is about
    "a an the of to in on at is are was were be been it its this that these those and or but not "
    "no so as by for from with what who which how many much more most there here than then you "
    "your do does did has have had will would can could should one some other let me first look "
    "show shown word answer question image picture user solution because".split()
)


@dataclass(frozen=True)
class Evidence:
    """What the rules find in a rationale: each None, or in words."""

    rationale: str
    loops: str | None  # how it repeats itself
    leaves: str | None  # how it leaves the question
    false: str | None  # a statement of the scene that does not hold
    conclusion: str | None  # the answer it comes to, in its normal form

    def comes_to(self) -> str:
        """The conclusion in words."""
        if self.conclusion:
            return f"the thought comes to {self.conclusion}"
        return "the thought names no answer"


def classify(
    problem: Problem,
    prediction: dict,
    grade: Grade,
    facts: dict | None = None,
    known: set | None = None,
) -> tuple[str, str, str | None]:
    """Why an answer is right or wrong: (one of KINDS, the evidence in words, the answer that the
    rationale comes to, in its normal form, or None).

    facts  what the demo's image shows (see `scene_facts`), else None: then a sound rationale may
           have misread it, and one without a readable answer is believed to support the choice
    known  the `problem_type`s of the training data; None: nobody knows, and nothing is novel
    """
    rationale = rationale_of(prediction)
    # What ended the text before it had an answer of its own:
    stop = prediction.get("forced_after") or (None if grade.parsed else prediction.get("stop"))
    loops = repetition(rationale or prediction["response"])
    if loops is None and stop == "loop":
        loops = "it was cut for a loop"
    statements = scene_statements(rationale, facts)
    evidence = Evidence(
        rationale=rationale,
        loops=loops,
        leaves=off_topic(problem, rationale, facts),
        false=next((f"not so: {text}" for text, holds in statements if not holds), None),
        conclusion=conclusion_of(problem, rationale, facts),
    )
    if grade.correct:
        kind, because = kind_of_right(problem, grade, evidence, facts, known)
    else:
        kind, because = kind_of_wrong(problem, grade, evidence, stop)
    return kind, because, evidence.conclusion


def kind_of_right(
    problem: Problem, grade: Grade, evidence: Evidence, facts: dict | None, known: set | None
) -> tuple[str, str]:
    """(kind, evidence) of a right answer: lucky if its rationale has a flaw, else novel if no
    problem of its type was trained on."""
    if not evidence.rationale:
        return "right", "there is no thought to judge"
    flaw = evidence.loops or evidence.leaves or evidence.false
    if flaw := flaw or unsupported(problem, evidence, grade, facts):
        return "lucky", flaw
    type_ = problem_type(problem)
    if known is not None and type_ is not None and type_ not in known:
        return "novel", f"{evidence.comes_to()}; no {type_} in training"
    if evidence.conclusion:
        return "sound", evidence.comes_to()
    return "sound", "nothing speaks against the thought"


def kind_of_wrong(
    problem: Problem, grade: Grade, evidence: Evidence, stop: str | None
) -> tuple[str, str]:
    """(kind, evidence) of a wrong answer. Those come first that neither a longer budget nor another
    answer line would mend; nonsense is a rationale that leaves the question."""
    if evidence.loops:
        return "loop", evidence.loops
    if evidence.leaves:
        return "nonsense", evidence.leaves
    if stop == "length":
        return "cut off", "the length limit came before the answer"
    if grade.parsed is None:
        return "no parse", grade.how
    if evidence.false:
        return "wrong", evidence.false
    if evidence.conclusion and right(problem, evidence.conclusion):
        return "right thought, wrong answer", evidence.comes_to()
    return "wrong", evidence.comes_to() if evidence.rationale else "the answer is wrong"


# --- the rules
def rationale_of(prediction: dict) -> str:
    """The rationale, or the response without its answer; "" if that is three words at most."""
    rationale = prediction.get("rationale")
    if rationale is None:
        response = prediction.get("response", "")
        rationale = response.rpartition(CUE)[0]
        if not rationale and ANSWER.search(response):
            rationale = ANSWER.sub("", response)
    return rationale.strip() if len(rationale.split()) > 3 else ""


def before_loop(ids: list, times: int = 4, least: int = 24) -> list:
    """The ids, or words, without the loop they end in, one round of it kept; the rule is that of
    `model.looping`."""
    for period in range(1, len(ids) // times + 1):
        start = len(ids) - period
        while start and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= max(times * period, least):
            return ids[: start + period]
    return ids


def repetition(text: str) -> str | None:
    """How a text repeats itself, in words, or None. Of 335 rationales of Gemini none does."""
    words = re.findall(r"\w+", text)
    looped = len(words) - len(before_loop(words))
    if looped:
        return f"its last {looped} words repeat earlier ones"
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n", text) if len(s.split()) > 3]
    repeated = len(sentences) - len(set(sentences))
    if len(sentences) > 5 and 2 * repeated >= len(sentences):
        return f"{repeated} of its {len(sentences)} sentences repeat earlier ones"
    return None


def content_words(*texts: str) -> set[str]:
    """What English texts are about: their words but the common ones, plurals as singulars."""
    words = re.findall(r"[a-z]{2,}", " ".join(texts).casefold())
    return {x.rstrip("s") if len(x) > 3 else x for x in words if x not in COMMON} - COMMON


def off_topic(problem: Problem, rationale: str, facts: dict | None) -> str | None:
    """How a rationale leaves the question, in words, or None."""
    about = content_words(rationale)
    asked = content_words(problem.question, *problem.choices)
    if facts is None:
        # None of 335 rationales of Gemini and 574 solutions of ScienceQA is below that; of those
        # given to another problem 67 and 82 % are.
        if rationale and len(asked) > 3 and len(about & asked) < 0.15 * len(asked):
            return f"next to nothing about {', '.join(sorted(asked)[:5])}"
        return None
    scene = (problem.hint, problem.lecture, problem.solution, json.dumps(facts))
    foreign = about - asked - content_words(*scene)
    if len(foreign) > 1 and len(foreign) >= 0.4 * len(about):
        return f"the question is not about {', '.join(sorted(foreign)[:5])}"
    return None


def scene_statements(rationale: str, facts: dict | None) -> list[tuple[str, bool]]:
    """[(sentence, does it hold)] of a rationale about the demo's scene, no sentence twice."""
    if not facts or not rationale:
        return []
    from demo.judge import claims

    unique = dict(claims(rationale, facts))
    return [(text, holds) for text, holds in unique.items() if holds is not None]


def conclusion_of(problem: Problem, rationale: str, facts: dict | None) -> str | None:
    """The answer that a rationale commits to or, of the demo, the choice in its last sentence.
    (Elsewhere that is no sign: 22 % of ScienceQA's solutions end with a choice that is wrong.)"""
    answer = committed(problem, rationale)
    sentences = [s for s in grading.SENTENCE.split(rationale) if squash(s)]
    if answer is None and facts and sentences:
        answer = committed(problem, f"{CUE} {sentences[-1]}")
    return answer and answer[0]


def unsupported(
    problem: Problem, evidence: Evidence, grade: Grade, facts: dict | None
) -> str | None:
    """How a rationale does not lead to the answer, which is right, in words, or None."""
    if grade.parsed is None:
        return grade.how  # a guess of --faithful-parse
    if evidence.conclusion is not None:
        return None if evidence.conclusion == grade.parsed else evidence.comes_to()
    text = evidence.rationale
    found = re.findall(r"-?\d[\d.,/]*", grading.plain(text))
    numbers = {grading.normal(problem, number) for number in found}
    named = problem.choices or grade.parsed in numbers or grade.parsed in squash(text)
    return None if named and facts is None else "the thought comes to no answer"


# --- what is known about the problems
def problem_type(problem: Problem) -> str | None:
    """What "novel" is about: the demo's family, ScienceQA's skill, MathVista's source, or None."""
    meta = problem.meta
    return meta.get("family") or meta.get("skill") or meta.get("source") or None


def known_types(where: str, traces: str | None = None, skip_bad: bool = False) -> set | None:
    """`problem_type`s of the training problems of a data set, with `traces` of those in that file;
    None where they are not available. `skip_bad`: bad records are left out (--on-error skip)."""
    bad = [] if skip_bad else None
    try:
        problems = data.load(where, "train", bad)
        if traces and Path(traces).is_file():
            ids = {trace["id"] for trace in load_traces(traces, bad)}
            problems = [p for p in problems if p.id in ids]
    except (OSError, ValueError):
        return None
    return {problem_type(p) for p in problems}


def scene_facts(where: str) -> dict[str, dict]:
    """{id: facts} of the demo, or of a folder like it; {} of other data."""
    from demo.scenes import demo_folder  # late: only the demo needs it

    path = (demo_folder() if where == "demo" else Path(where)) / "scenes.json"
    return files.read_json(path) if path.is_file() else {}


# --- many answers
def classify_all(
    graded: list[Graded], facts: dict[str, dict] | None = None, known: set | None = None
) -> list[Graded]:
    """`grade_all`'s, with "kind", "because" and what the rationale "concludes" in predictions."""
    classified = []
    for problem, prediction, grade in graded:
        scene = (facts or {}).get(problem.id)
        kind, because, conclusion = classify(problem, prediction, grade, scene, known)
        if rationale_of(prediction):
            prediction = prediction | {"concludes": conclusion}
        classified.append((problem, prediction | {"kind": kind, "because": because}, grade))
    return classified


def refine(graded: list[Graded], judge: Callable[[list], list[dict]]) -> list[Graded]:
    """Answers of `classify_all`, their kinds corrected by a judge that sees the image, as
    `filters.judge_many`. It is asked about rationales that came to an end."""
    items = {}
    for i, (problem, prediction, grade) in enumerate(graded):
        rationale = rationale_of(prediction)
        if rationale and prediction["kind"] not in ("loop", "cut off", "no parse"):
            letter = LETTERS.find(grade.parsed) if problem.choices and grade.parsed else -1
            answer = prediction["response"] if letter < 0 else problem.choices[letter]
            items[i] = problem, rationale, answer
    refined = list(graded)
    for i, verdict in zip(items, judge(list(items.values())), strict=True):
        problem, prediction, grade = graded[i]
        kind = refined_kind(prediction["kind"], grade.correct, verdict)
        if kind != prediction["kind"]:
            because = f"{verdict['why']} ({verdict['by']})"
            refined[i] = problem, prediction | {"kind": kind, "because": because}, grade
    return refined


def refined_kind(kind: str, correct: bool, verdict: dict) -> str:
    """The kind after a judge's verdict, which is believed where it agrees about the answer. It says
    whether the rationale leads there ("consistent") and agrees with the image ("picture")."""
    leads = verdict["consistent"]
    agrees = verdict.get("picture")
    if verdict["correct"] is not correct:
        return kind
    if correct and (leads is False or agrees is False):
        return "lucky"
    if correct and leads:
        return "novel" if kind == "novel" else "sound"
    if not correct and leads is False and agrees:
        return "right thought, wrong answer"
    return kind
