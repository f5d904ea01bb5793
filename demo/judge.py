"""The demo's judge, and which statements of any text hold of a scene.

It parses a thought sentence by sentence (`claims`), compares every statement with the facts of the
scene, and the last conclusion with the answer. `claims` takes any text, so it also finds the false
statements of a student's own rationale. A lecture, word for word, is no claim about the scene.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from math import prod

from demo.drawing import SPECIES
from demo.scenes import COLOURS, KINDS, NAMES, SHAPES, WORDS
from demo.wording import TOPICS

NAME = "demo"
POLES = {"N": "north", "S": "south"}


def asked_numbers(facts: dict, key: str) -> dict[str, int]:
    """The numbers that the question asks for: of some kinds of shapes, or of a bar."""
    return {k: n for k, n in facts[key].items() if n and facts["asked"] in k}


def food_chain(facts: dict) -> Sequence[str]:
    """The animals of a food chain, each before the one that eats it; () without a chain."""
    order = facts["order"] if "arrow" in facts else ()
    return order if facts.get("arrow") == "right" else order[::-1]


COLOUR, KIND, BEAST = ("|".join(names) for names in (COLOURS, KINDS, SPECIES))
CLAIMS = {  # kind of statement: its pattern
    "pole": r"(left|right) magnet has (north|south) on (?:its|the) (left|right)",
    "rule": r"(opposite|same) poles (attract|repel)",
    "count": rf"(\d+) (?:({COLOUR}) )?(circle|square|triangle|shape)s?\b",
    "others": r"^(.*)\bsome other shapes",
    "more": r"(\d+) is (?:the )?(?:more|most)(?: than (\d+))?",
    "level": r"(?:water is at|filled up to|holds) (?:the )?(\d+)",
    "bar": rf"({COLOUR}) (?:bar (?:is at |shows |up to )?(?:line )?)?(\d+)",
    "extreme": r"(highest|lowest) number is (\d+)",
    "rings": r"(\d+) rings?\b",
    "dots": r"(with |ring has |ring of )?(\d+) dots?\b( in each)?",
    "equation": r"(\d+(?: ?[x+] ?\d+)+) ?= ?(\d+)",
    "order": r"from left to right(.*)",
    "arrow": r"arrows? points? to the (left|right)",
    "arrows": rf"arrows? points? from the (?:{BEAST})(?: to the (?:{BEAST}))+",
    "eats": rf"({BEAST}) eats the ({BEAST})",
    "eaten": rf"({BEAST}) is eaten by the ({BEAST})",
    "top": rf"(?:top is|nothing eats) the ({BEAST})",
    "name": rf"({'|'.join(NAMES).lower()}) has\b",
    "blocks": rf"(\d+) ({COLOUR}) blocks?\b",
    "word": rf"(\w+) is ({'|'.join(WORDS)})\b",
}


def true_statements(facts: dict) -> dict[str, set[tuple]]:
    """{kind of statement: what the groups of its pattern hold, numbers as int, where it is true}.
    A statement about things that the scene does not have is in none, and so it is false."""
    true = {kind: set() for kind in CLAIMS if kind not in CHECKS}
    for magnet in {"left", "right"} & facts.keys():
        west, east = facts[magnet]
        true["pole"] |= {(magnet, POLES[west], "left"), (magnet, POLES[east], "right")}
    if true["pole"]:  # the other rule is true, but not of these magnets
        same = facts["left"][1] == facts["right"][0]
        true["rule"] = {("same", "repel") if same else ("opposite", "attract")}
    # Shapes may be there for their order alone.
    shapes = facts.get("shapes") or Counter(n for n in facts.get("order", ()) if n in KINDS)
    for colour, shape in product((None, *COLOURS), (*SHAPES, "shape")):
        words = {colour, shape} - {None, "shape"}
        n = sum(n for kind, n in shapes.items() if words <= set(kind.split()))
        true["count"].add((n, colour, shape))
    high, *rest = sorted(shapes.values(), reverse=True) or [None]
    if high is not None and high not in rest:
        true["more"] = {(high, None), *((high, n) for n in rest)}
    true["level"] = {(facts.get("level"),)}
    bars = facts.get("bars", {})
    true["bar"] = set(bars.items())
    if bars:
        true["extreme"] = {("highest", max(bars.values())), ("lowest", min(bars.values()))}
    rings = facts.get("rings", 0)
    dots = facts.get("dots", 0)
    if rings:
        true["rings"] = {(rings,)}
    for before, after in product((None, "with ", "ring has ", "ring of "), (None, " in each")):
        true["dots"].add((before, dots if before or after else dots * rings, after))
    chain = food_chain(facts)
    true["arrow"] = {(facts.get("arrow"),)}
    true["eaten"] = set(pairwise(chain))
    true["eats"] = {(eater, eaten) for eaten, eater in pairwise(chain)}
    true["top"] = {(animal,) for animal in chain[-1:]}
    true["name"] = {(facts.get("name", "").lower(),)}
    true["blocks"] = {(n, colour) for colour, n in facts.get("blocks", {}).items()}
    true["word"] = {(word.lower(), group) for word, group in facts.get("words", {}).items()}
    return true


def others_hold(match: re.Match, facts: dict) -> bool | None:
    """None of the "other shapes" may be one that the question asks for."""
    if facts["kind"] != "count":
        return None
    counted = re.findall(CLAIMS["count"], match[1])
    named = [{colour, shape} - {"", "shape"} for _, colour, shape in counted]
    asked = [set(kind.split()) for kind in asked_numbers(facts, "shapes")]
    return all(any(words <= kind for words in named) for kind in asked)


def equation_holds(match: re.Match, facts: dict) -> bool:
    """The result is right and the terms are numbers of this scene."""
    terms = sorted(int(n) for n in re.findall(r"\d+", match[1]))
    result = int(match[2])
    if "x" in match[1]:
        factors = sorted([facts.get("rings", 0), facts.get("dots", 0)])
        return prod(terms) == result and terms == factors
    numbers = facts.get("blocks") or {}
    if facts["kind"] == "count":
        numbers = asked_numbers(facts, "shapes")
    return sum(terms) == result and terms == sorted(numbers.values())


def order_holds(match: re.Match, facts: dict) -> bool | None:
    names = re.findall(rf"{KIND}|{BEAST}", match[1])
    return names == list(facts.get("order", ())) if names else None


def arrows_hold(match: re.Match, facts: dict) -> bool:
    """Each animal named is eaten by the next."""
    pairs = set(pairwise(re.findall(BEAST, match[0])))
    return pairs <= set(pairwise(food_chain(facts)))


# Statements that are too many to list; None: not a claim.
CHECKS = {"others": others_hold, "equation": equation_holds}
CHECKS |= {"order": order_holds, "arrows": arrows_hold}
CONCLUSION = re.compile(r"so the answer is\s+([^.\n]+)", re.IGNORECASE)
LECTURE = re.compile("(" + "|".join(re.escape(t.lecture) for t in TOPICS.values()) + ")")
SENTENCE = re.compile(r"[^.?\n]*[^.?\s][^.?\n]*[.?]?")


def claims(thought: str, facts: dict) -> list[tuple[str, bool | None]]:
    """The sentences of any text as (sentence, holds): does it hold of the scene with these facts?

    True, False, or None where nothing is claimed or understood. A sentence with several statements
    holds if all do; a statement about things that the scene does not have is false."""
    true = true_statements(facts)
    rows = []
    for i, part in enumerate(LECTURE.split(thought)):
        if i % 2:  # a lecture; the text between them is at the even places
            rows.append((part, None))
            continue
        for sentence in SENTENCE.findall(part):
            rows.append((sentence.strip(), sentence_holds(sentence, facts, true)))
    return rows


def sentence_holds(sentence: str, facts: dict, true: dict[str, set[tuple]]) -> bool | None:
    text = "" if sentence.endswith("?") else CONCLUSION.sub("", sentence).lower()
    holds = []
    for kind, pattern in CLAIMS.items():
        for match in re.finditer(pattern, text):
            if kind in CHECKS:
                holds.append(CHECKS[kind](match, facts))
            else:
                groups = (int(g) if (g or "").isdecimal() else g for g in match.groups())
                holds.append(tuple(groups) in true[kind])
    holds = [result for result in holds if result is not None]
    return all(holds) if holds else None


def conclusion(thought: str) -> str | None:
    """The name in the last "So the answer is X." of a text."""
    names = CONCLUSION.findall(thought)
    return names[-1].strip() if names else None


def judge(record: dict, facts: dict, thought: str, answer: str) -> dict:
    """A verdict on a trace: {"correct", "consistent", "by", "why"}, the last one a line.

    correct: the answer is the gold choice. consistent: every statement of the thought holds of the
    scene, and it concludes this answer."""
    gold = record["choices"][record["answer"]]
    concluded = conclusion(thought)
    false = [sentence for sentence, holds in claims(thought, facts) if holds is False]
    faults = []
    if answer != gold:
        faults.append(f"The answer is {gold}, not {answer}." if answer else "There is no answer.")
    if false:
        faults.append("Not so: " + " ".join(false))
    if concluded is None:
        faults.append("The thought concludes nothing.")
    elif concluded != answer:
        faults.append(f"The thought concludes {concluded}.")
    consistent = not false and concluded is not None and concluded == answer
    why = " ".join(faults) or "All statements hold and lead to the answer."
    return {"correct": answer == gold, "consistent": consistent, "by": NAME, "why": why}
