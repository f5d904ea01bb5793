"""Why answers fail and succeed: pali_reason's kinds by rule, with the evidence in words.

`kind` names one of KINDS for one answer, `explained` for many, and `refine` corrects them by a
judge who was shown the pictures. The rules read texts, and where the scene behind a picture is
known, as of the demo, the scene: then a statement of the thought is so, or not so (`stated`).

Left out: a rule that sees a picture; a kind for an answer that nobody can read but the judge.
"""

import json
import re
from pathlib import Path

import data
from support import files
from support.dataset.choices import LETTERS
from support.dataset.traces import load_traces
from support.evaluation.decode_cache import before_loop
from support.evaluation.grading import (
    ANSWER,
    CUE,
    SENTENCE,
    committed,
    normal,
    plain,
    right,
    squash,
)
from support.training.examples import bad_records

KINDS = ("sound", "lucky", "novel", "right", "right thought, wrong answer", "loop", "nonsense",
         "cut off", "no parse", "wrong")  # fmt: skip
COMMON = frozenset(  # words that do not tell what a text is about
    "a an the of to in on at is are was were be been it its this that these those and or but not "
    "no so as by for from with what who which how many much more most there here than then you "
    "your do does did has have had will would can could should one some other let me first look "
    "show shown word answer question image picture user solution because".split()
)


def kind(problem, prediction, grade, facts=None, known=None):
    """Why an answer is right or wrong: (one of KINDS, the evidence in words, the answer that the
    thought comes to, in its normal form, or None).

    facts  what the demo's picture shows (see `scene_facts`), else None
    known  the `problem_type`s of the training data; None: nobody knows, and nothing is novel

    The first that holds. Of right answers:
        right     there is no thought beside the answer
        lucky     the thought goes in circles, leaves the question, says what is not so, or comes
                  to another answer or to none
        novel     nothing of that, and no problem of this type was trained on
        sound     nothing of that
    Of wrong ones, first what neither a longer budget nor another answer line would mend:
        loop      the text was cut for a loop, ends in one, or mostly says what it said before
        nonsense  the thought leaves the question
        cut off   the budget ended before an answer of its own
        no parse  no answer could be read
        right thought, wrong answer: the thought comes to the right one and says nothing false
        wrong     nothing of that

    No rule sees a picture. Without `facts` a sound thought may have misread it, and one that comes
    to no answer that a rule can read is believed to support the choice made. See `refine`.
    """
    thought, forced = thought_of(prediction), prediction.get("forced_after")
    ends = {forced, "" if forced or grade.parsed else prediction.get("stop")}  # without an answer
    circles = in_circles(thought or prediction["response"])
    circles = circles or ("it was cut for a loop" if "loop" in ends else None)
    leaves = leaves_question(problem, thought, facts)
    false = next((f"not so: {said}" for said, holds in stated(thought, facts) if not holds), None)
    end = concluded(problem, thought, facts)
    comes = f"the thought comes to {end}" if end else "the thought names no answer"
    new = known is not None and problem_type(problem) not in {*known, None}
    if grade.correct:
        rules = {
            "right": not thought and "there is no thought to judge",
            "lucky": circles or leaves or false or unsupported(problem, thought, end, grade, facts),
            "novel": new and f"{comes}; no {problem_type(problem)} in training",
            "sound": comes if end else "nothing speaks against the thought",
        }
    else:
        rules = {
            "loop": circles,
            "nonsense": leaves,
            "cut off": "length" in ends and "the budget ended before the answer",
            "no parse": grade.parsed is None and grade.how,
            "right thought, wrong answer": end and not false and right(problem, end) and comes,
            "wrong": false or (comes if thought else "the answer is another"),
        }
    return next((name, why, end) for name, why in rules.items() if why)


# --- the rules
def thought_of(prediction):
    """The rationale, or what a response says beside its answer; "" if that is three words."""
    told, response = prediction.get("rationale"), prediction.get("response", "")
    if told is None:
        told = response.rpartition(CUE)[0]
        told = ANSWER.sub("", response) if not told and ANSWER.search(response) else told
    return told.strip() if len(told.split()) > 3 else ""


def in_circles(text):
    """How a text repeats itself, in words, or None. Of 335 thoughts of Gemini none does."""
    words = re.findall(r"\w+", text)
    if tail := len(words) - len(before_loop(words)):
        return f"its last {tail} words were said before"
    said = [s for s in re.split(r"(?<=[.!?])\s+|\n", text) if len(s.split()) > 3]
    again = len(said) - len(set(said))
    circles = len(said) > 5 and 2 * again >= len(said)
    return f"{again} of its {len(said)} sentences were said before" if circles else None


def content(*texts):
    """What English texts are about: their words but the common ones, plurals as singulars."""
    words = re.findall(r"[a-z]{2,}", " ".join(texts).casefold())
    return {x.rstrip("s") if len(x) > 3 else x for x in words if x not in COMMON} - COMMON


def leaves_question(problem, thought, facts):
    """How a thought leaves the question, in words, or None. Where the scene is known: 40 % of what
    it is about is neither there nor in the problem's texts. Else: it has less than 15 % of what
    question and choices are about, if that is four words (of 335 thoughts of Gemini and 574
    solutions of ScienceQA none; given to another problem, 67 and 82 % of them)."""
    said, asked = content(thought), content(problem.question, *problem.choices)
    if facts is None:
        left = thought and len(asked) > 3 and len(said & asked) < 0.15 * len(asked)
        return f"next to nothing about {', '.join(sorted(asked)[:5])}" if left else None
    texts = (problem.hint, problem.lecture, problem.solution, json.dumps(facts))
    foreign = said - asked - content(*texts)
    left = len(foreign) > 1 and len(foreign) >= 0.4 * len(said)
    return f"the question is not about {', '.join(sorted(foreign)[:5])}" if left else None


def stated(thought, facts):
    """[(sentence, does it hold)]: what a thought says of the demo's scene, nothing twice."""
    if not facts or not thought:
        return []
    from demo.teacher import claims

    return [(said, so) for said, so in dict(claims(thought, facts)).items() if so is not None]


def concluded(problem, thought, facts):
    """What a thought comes to: what it commits to, or of the demo the choice in its last sentence.
    (Elsewhere that is no sign: 22 % of ScienceQA's solutions end with a choice that is wrong.)"""
    end, said = committed(problem, thought), [s for s in SENTENCE.split(thought) if squash(s)]
    if end is None and facts and said:
        end = committed(problem, f"{CUE} {said[-1]}")
    return end and end[0]


def unsupported(problem, thought, end, grade, facts):
    """How a thought does not lead to the right answer given, in words, or None."""
    if grade.parsed is None:
        return grade.how  # a guess of --faithful-parse
    if end is not None:
        return None if end == grade.parsed else f"the thought comes to {end}"
    numbers = {normal(problem, number) for number in re.findall(r"-?\d[\d.,/]*", plain(thought))}
    named = problem.choices or grade.parsed in numbers or grade.parsed in squash(thought)
    return None if named and facts is None else "the thought comes to no answer"


# --- what is known about the problems, and many answers
def problem_type(problem):
    """What "novel" is about: the demo's family, ScienceQA's skill, MathVista's source, or None."""
    names = (problem.meta.get(key) for key in ("family", "skill", "source"))
    return next(filter(None, names), None)


def known_types(config):
    """`problem_type`s of a run's training problems, of PaliGemma's those in its trace file; None
    where nothing was trained or the data are not at hand."""
    if not any(config.get("epochs", ())) and not config.get("adapter"):
        return None
    try:
        bad, traces = bad_records(config), config.get("traces")
        problems = data.load(config["data"], "train", bad)
        if traces and Path(traces).is_file():
            ids = {trace["id"] for trace in load_traces(traces, bad)}
            problems = [p for p in problems if p.id in ids]
    except (OSError, ValueError):
        return None
    return {problem_type(p) for p in problems}


def scene_facts(where):
    """{id: facts} of the demo, or of a folder like it; {} of other data."""
    path = (data.demo_folder() if where == "demo" else Path(where)) / "scenes.json"
    return files.read_json(path) if path.is_file() else {}


def explained(graded, facts=None, known=None):
    """What `grade_all` gives, with "kind", "because" and what the thought "concludes" in each
    prediction."""
    told = []
    for p, x, g in graded:
        name, why, end = kind(p, x, g, (facts or {}).get(p.id), known)
        comes = {"concludes": end} if thought_of(x) else {}
        told.append((p, x | comes | {"kind": name, "because": why}, g))
    return told


def refine(graded, judge):
    """`explained` answers, their kinds corrected by a judge who is shown the picture: a function of
    (problem, thought, answer) items that gives a verdict of each, as `judging.judge_many` does. It
    is asked about thoughts, and believed where it finds right what the rule finds right."""
    rows = [i for i, (_, x, _) in enumerate(graded) if thought_of(x) and x["kind"] not in
            ("loop", "cut off", "no parse")]  # fmt: skip
    graded, items = list(graded), []
    for p, x, g in (graded[i] for i in rows):
        letter = LETTERS.find(g.parsed) if p.choices and g.parsed else -1
        items.append((p, thought_of(x), x["response"] if letter < 0 else p.choices[letter]))
    for i, verdict in zip(rows, judge(items), strict=True):
        p, x, g = graded[i]
        leads, seen, name = verdict["consistent"], verdict.get("picture"), None
        if verdict["correct"] is g.correct and g.correct:
            good = "novel" if x["kind"] == "novel" else "sound"
            name = "lucky" if leads is False or seen is False else good if leads else None
        elif verdict["correct"] is g.correct and leads is False and seen:
            name = "right thought, wrong answer"
        if name and name != x["kind"]:
            why = f"{verdict['why']} ({verdict['by']})"
            graded[i] = p, x | {"kind": name, "because": why}, g
    return graded
