"""The demo's teacher and judge: they stand in for Gemini and Claude where there is no network.

The teacher "thinks" about a problem of demo/scenes.py and is right about as often as the Gemini of
pali_reason (72 % of 345 traces). It never looks at a picture: it is told the facts of the scene,
and for some problems it is told one of them wrongly. Nothing it says is random text: `TELL` says
what somebody who saw these facts would state and conclude, and a misread thought is what `TELL`
makes of facts with as few of them changed as lead to another of the choices.

The judge never learns what the teacher did. It parses the thought sentence by sentence (`claims`),
compares every statement with the scene, and the last conclusion with the answer. `claims` takes
any text, so it also tells which statements of a student's own rationale are false.

Left out on purpose: invented objects, wrong general knowledge, doubt and second thoughts. General
knowledge (a lecture, word for word) is no claim about the scene; neither is the conclusion.
"""

import hashlib
import json
import os
import random
import re
import tempfile
from collections import Counter
from itertools import combinations, pairwise, product
from math import prod
from pathlib import Path

from demo.drawing import SPECIES
from demo.scenes import COLOURS, KINDS, NAMES, WORDS
from demo.wording import TOPICS, joined, plural
from support.files import read_json

NAME = "demo"
VERSION = 1  # of the wording; a new one makes traces anew (tests/test_demo_teacher.py pins it)
# What the teacher does and how often. "sound" and "lucky" end in the right answer: 72 %.
SHARES = {
    "sound": 0.62,  # right thought, right answer
    "misread": 0.18,  # one fact misread, and the answer that follows from it
    "slip": 0.06,  # right thought, another answer
    "lucky": 0.10,  # one fact misread, and the right answer all the same
    "loop": 0.04,  # a sentence again and again, no answer
}
OPENINGS = ("Let me look at the {what}.", "I look at the {what}.", "First look at the {what}.")
POLES = {"N": "north", "S": "south"}


# ---- thoughts: what somebody who saw these facts would state, and the choice that follows -------


def _asked(facts, key):
    """The numbers that the question asks for: of some kinds of shapes, or of a bar."""
    return {k: n for k, n in facts[key].items() if n and facts["asked"] in k}


def _extreme(numbers, best=max):
    """The only name with the highest (or lowest) number, else None."""
    top = [name for name, n in numbers.items() if n == best(numbers.values())]
    return top[0] if len(top) == 1 else None


def _chain(facts):
    """The animals of a food chain, each before the one that eats it; () without a chain."""
    order = facts["order"] if "arrow" in facts else ()
    return order if facts.get("arrow") == "right" else order[::-1]


def _magnets(facts):
    b, c = facts["left"][1], facts["right"][0]
    stated = [f"The left magnet has {POLES[b]} on its right."]
    stated += [f"The right magnet has {POLES[c]} on its left."]
    if b == c:
        return [*stated, "The same poles repel."], "repel"
    return [*stated, "Opposite poles attract."], "attract"


def _count(facts):
    kinds = _asked(facts, "shapes")
    stated = [f"The picture shows {_counted(kinds)} and some other shapes."] if kinds else []
    if len(kinds) > 1:
        stated.append(_added(kinds.values()))
    return stated, str(sum(kinds.values()))


def _counted(numbers, noun="{}"):
    return joined(plural(n, noun.format(name)) for name, n in numbers.items())


def _added(numbers):
    return f"{' + '.join(map(str, numbers))} = {sum(numbers)}."


def _compare(facts):
    shapes = facts["shapes"]
    high, *rest = sorted(shapes.values(), reverse=True)
    are = "is" if next(iter(shapes.values())) == 1 else "are"
    result = f"{high} is more than {rest[0]}." if facts["kind"] == "more" else f"{high} is most."
    best = _extreme(shapes)
    return [f"There {are} {_counted(shapes)}.", result], best and f"{best}s"


def _cup(facts):
    return [f"The top of the water is at the {facts['level']} line."], f"{facts['level']} ml"


def _bars(facts):
    bars = facts["bars"]
    if facts["kind"] == "height":
        asked = facts["asked"]
        return [f"The top of the {asked} bar is at line {bars[asked]}."], str(bars[asked])
    word, best = ("highest", max) if facts["kind"] == "tallest" else ("lowest", min)
    stated = [f"The bars show {joined(f'{c} {h}' for c, h in bars.items())}."]
    return [*stated, f"The {word} number is {best(bars.values())}."], _extreme(bars, best)


def _groups(facts):
    g, k = facts["rings"], facts["dots"]
    stated = [f"The picture shows {plural(g, 'ring')} with {k} dots in each ring."]
    if facts["kind"] == "product":
        return stated, f"{g} x {k}"
    return [*stated, f"{g} x {k} = {g * k}."], str(g * k)


def _food(facts):
    stated = [f"From left to right the picture shows {joined(facts['order'])}."]
    stated += [f"The arrows point to the {facts['arrow']}."]
    chain, kind = _chain(facts), facts["kind"]
    if kind == "top":
        return [*stated, f"So the top is the {chain[-1]}."], chain[-1]
    asked = facts["asked"]
    pairs = pairwise(chain) if kind == "eaten" else pairwise(chain[::-1])
    answer = dict(pairs).get(asked)
    verb = "is eaten by" if kind == "eaten" else "eats"
    return [*stated, f"So the {asked} {verb} the {answer}."], answer


def _position(facts):
    order, asked = facts["order"], facts["asked"]
    stated = [f"From left to right the picture shows {joined(order)}."]
    if facts["kind"] == "end":
        return stated, order[0 if asked == "left" else -1]
    return stated, "left" if order.index(asked["a"]) < order.index(asked["b"]) else "right"


def _sum(facts):
    blocks = facts["blocks"]
    stated = [f"{facts['name']} has {_counted(blocks, '{} block')}."]
    return [*stated, _added(blocks.values())], str(sum(blocks.values()))


def _word(facts):
    words, asked = facts["words"], facts["asked"]
    stated = [f"{w.capitalize()} is {group}." for w, group in words.items()]
    return stated, next(w for w, group in words.items() if group == asked)


# ---- misreading: all versions of the facts in which `n` of them are different ------------------


def _altered(numbers, values, n):
    for names in combinations(numbers, n):
        for new in product(values, repeat=n):
            if all(numbers[name] != v for name, v in zip(names, new, strict=True)):
                yield numbers | dict(zip(names, new, strict=True))


def _numbers(values, *keys):
    """Facts that are numbers themselves."""
    return lambda f, n: (f | new for new in _altered({key: f[key] for key in keys}, values, n))


def _inside(values, key, part=lambda facts, key: facts[key]):
    """A fact that is a table of numbers, or that part of it which matters."""

    def alter(facts, n):
        for new in _altered(part(facts, key), values, n):
            yield facts | {key: facts[key] | new}

    return alter


def _flip(facts, n):
    return (facts | {side: facts[side][::-1]} for side in ("left", "right"))


def _swap(facts, n):
    """Two of a row taken for each other, or all arrows the wrong way."""
    order = facts["order"]
    for i, j in combinations(range(len(order)), 2):
        new = list(order)
        new[i], new[j] = new[j], new[i]
        yield facts | {"order": new}
    if "arrow" in facts:
        yield facts | {"arrow": "left" if facts["arrow"] == "right" else "right"}


def _resort(facts, n):
    """Two words, each taken for what the other is."""
    words = facts["words"]
    for a, b in combinations(words, 2):
        yield facts | {"words": words | {a: words[b], b: words[a]}}


TELL = {  # kind of question: (what is stated and concluded, how it is misread)
    "magnets": (_magnets, _flip),
    "count": (_count, _inside(range(6), "shapes", _asked)),
    **dict.fromkeys(("more", "most"), (_compare, _inside(range(1, 7), "shapes"))),
    "cup": (_cup, _numbers(range(100, 600, 100), "level")),
    **dict.fromkeys(("tallest", "shortest"), (_bars, _inside(range(1, 6), "bars"))),
    "height": (_bars, _inside(range(1, 6), "bars", _asked)),
    **dict.fromkeys(("total", "product"), (_groups, _numbers(range(1, 5), "rings", "dots"))),
    **dict.fromkeys(("eats", "eaten", "top"), (_food, _swap)),
    **dict.fromkeys(("side", "end"), (_position, _swap)),
    "sum": (_sum, _inside(range(1, 9), "blocks")),
    "word": (_word, _resort),
}


def _misread(rng, facts, wrong):
    """What is stated and concluded if as few facts as possible are misread: one of `wrong`."""
    tell, alter = TELL[facts["kind"]]
    for n in (1, 2, 3):  # two or three only where no single one leads to a listed choice
        told = [t for t in map(tell, alter(facts, n)) if t[1] in wrong]
        if told:
            return rng.choice(told)
    raise ValueError(f"No misreading of {facts} leads to one of {wrong}; are these its choices?")


def think(record, facts, seed):
    """The teacher's {"thought", "answer", "kind"} for a problem; the same for the same seed.

    record and facts: a problem of scenes.py and its facts, as problems.json and scenes.json hold
    them. seed: anything that prints. Two pictures can have the same facts, and then the same seed
    brings the same thought: `traces` has one for each problem. The answer is the text of a choice,
    "" if the thought never ends; kind is one of SHARES.
    """
    problem = json.dumps([record["question"], record["choices"], facts], sort_keys=True)
    rng = random.Random(f"{seed}/{problem}")
    (kind,) = rng.choices(list(SHARES), SHARES.values())
    what = "picture" if record["image"] else "words"
    opening = rng.choice(OPENINGS).format(what=what)
    gold = record["choices"][record["answer"]]
    wrong = [c for c in record["choices"] if c != gold]
    if kind in ("misread", "lucky"):
        stated, concluded = _misread(rng, facts, wrong)
    else:
        stated, concluded = TELL[facts["kind"]][0](facts)
    if kind == "loop":
        thought = " ".join([opening, *stated[:1] * rng.randint(6, 10)])
        return {"thought": thought, "answer": "", "kind": kind}
    answer = {"slip": rng.choice(wrong), "lucky": gold}.get(kind, concluded)
    thought = " ".join([opening, *stated, f"So the answer is {concluded}."])
    return {"thought": thought, "answer": answer, "kind": kind}


# ---- claims: a pattern for each kind of statement, and whether the scene bears it out -----------

COLOUR, KIND, BEAST = ("|".join(names) for names in (COLOURS, KINDS, SPECIES))
COUNT = rf"(\d+) (?:({COLOUR}) )?(circle|square|triangle|shape)s?\b"


def _shapes(facts):
    """Kind -> number of shapes, also where their order is what matters."""
    return facts.get("shapes") or Counter(n for n in facts.get("order", ()) if n in KINDS)


def _count_holds(m, facts):
    """3 red circles, 3 red shapes, 3 circles."""
    words = {m[2], m[3]} - {None, "shape"}
    return int(m[1]) == sum(n for k, n in _shapes(facts).items() if words <= set(k.split()))


def _others_hold(m, facts):
    """None of the "other shapes" may be one that the question asks for."""
    if facts["kind"] != "count":
        return None
    named = [{item[2], item[3]} - {None, "shape"} for item in re.finditer(COUNT, m[1])]
    asked = [set(kind.split()) for kind in _asked(facts, "shapes")]
    return all(any(words <= kind for words in named) for kind in asked)


def _more_holds(m, facts):
    high, *rest = sorted(_shapes(facts).values(), reverse=True) or [None]
    return int(m[1]) == high and high not in rest and (m[2] is None or int(m[2]) in rest)


def _dots_hold(m, facts):
    """3 dots in each ring, each ring has 3 dots, a ring of 3 dots; else the dots in all rings."""
    return int(m[2]) == facts.get("dots", 0) * (1 if m[1] or m[3] else facts.get("rings", 0))


def _equation_holds(m, facts):
    """The result is right and the terms are numbers of this scene."""
    terms = sorted(int(n) for n in re.findall(r"\d+", m[1]))
    if "x" in m[1]:
        seen = [facts.get("rings", 0), facts.get("dots", 0)]
        return prod(terms) == int(m[2]) and terms == sorted(seen)
    seen = facts.get("blocks") or (_asked(facts, "shapes") if facts["kind"] == "count" else {})
    return sum(terms) == int(m[2]) and terms == sorted(seen.values())


def _order_holds(m, facts):
    names = re.findall(rf"{KIND}|{BEAST}", m[1])
    return names == list(facts.get("order", ())) if names else None


def _fed(facts, *animals):
    """Whether each of them is eaten by the next."""
    return all(pair in pairwise(_chain(facts)) for pair in pairwise(animals))


def _rule_holds(m, facts):
    """The rule that these magnets follow: the other one is true, but not of them."""
    return "left" in facts and f"{m[0]}." == _magnets(facts)[0][-1].lower().removeprefix("the ")


BEST = {"highest": max, "lowest": min}
# fmt: off
CLAIMS = [  # (pattern, (its match, facts) -> whether it holds or None); what is not there is false
    (r"(left|right) magnet has (north|south) on (?:its|the) (left|right)",
     lambda m, f: POLES.get(f.get(m[1], "??")[m[3] == "right"]) == m[2]),
    (r"(opposite|same) poles (attract|repel)", _rule_holds),
    (COUNT, _count_holds),
    (r"^(.*)\bsome other shapes", _others_hold),
    (r"(\d+) is (?:the )?(?:more|most)(?: than (\d+))?", _more_holds),
    (r"(?:water is at|filled up to|holds) (?:the )?(\d+)",
     lambda m, f: int(m[1]) == f.get("level")),
    (rf"({COLOUR}) (?:bar (?:is at |shows |up to )?(?:line )?)?(\d+)",
     lambda m, f: int(m[2]) == f.get("bars", {}).get(m[1])),
    (r"(highest|lowest) number is (\d+)",
     lambda m, f: int(m[2]) == BEST[m[1]](f.get("bars", {}).values(), default=None)),
    (r"(\d+) rings?\b", lambda m, f: int(m[1]) == f.get("rings")),
    (r"(with |ring has |ring of )?(\d+) dots?\b( in each)?", _dots_hold),
    (r"(\d+(?: ?[x+] ?\d+)+) ?= ?(\d+)", _equation_holds),
    (r"from left to right(.*)", _order_holds),
    (r"arrows? points? to the (left|right)", lambda m, f: m[1] == f.get("arrow")),
    (rf"arrows? points? from the (?:{BEAST})(?: to the (?:{BEAST}))+",
     lambda m, f: _fed(f, *re.findall(BEAST, m[0]))),
    (rf"({BEAST}) eats the ({BEAST})", lambda m, f: _fed(f, m[2], m[1])),
    (rf"({BEAST}) is eaten by the ({BEAST})", lambda m, f: _fed(f, m[1], m[2])),
    (rf"(?:top is|nothing eats) the ({BEAST})", lambda m, f: [m[1]] == list(_chain(f)[-1:])),
    (rf"({'|'.join(NAMES).lower()}) has\b", lambda m, f: m[1] == f.get("name", "").lower()),
    (rf"(\d+) ({COLOUR}) blocks?\b", lambda m, f: int(m[1]) == f.get("blocks", {}).get(m[2])),
    (rf"(\w+) is ({'|'.join(WORDS)})\b",
     lambda m, f: m[2] == {w.lower(): g for w, g in f.get("words", {}).items()}.get(m[1])),
]
# fmt: on
CONCLUSION = re.compile(r"so the answer is\s+([^.\n]+)", re.IGNORECASE)
LECTURE = re.compile("(" + "|".join(re.escape(t.lecture) for t in TOPICS.values()) + ")")
SENTENCE = re.compile(r"[^.?\n]*[^.?\s][^.?\n]*[.?]?")


def claims(thought, facts):
    """The sentences of any text as (sentence, holds): does it hold of the scene with these facts?

    True, False, or None where nothing is claimed or understood. A sentence with several statements
    holds if all do; a statement about what the scene does not have is false."""
    found = []
    for i, part in enumerate(LECTURE.split(thought)):
        if i % 2:  # a lecture; the text between them is at the even places
            found.append((part, None))
        else:
            found += [(s.strip(), _holds(s, facts)) for s in SENTENCE.findall(part)]
    return found


def _holds(sentence, facts):
    text = "" if sentence.endswith("?") else CONCLUSION.sub("", sentence).lower()
    holds = [check(m, facts) for pattern, check in CLAIMS for m in re.finditer(pattern, text)]
    holds = [h for h in holds if h is not None]
    return all(holds) if holds else None


def conclusion(thought):
    """What the last "So the answer is X." of a text names, or None."""
    names = CONCLUSION.findall(thought)
    return names[-1].strip() if names else None


def judge(record, facts, thought, answer):
    """A verdict on a trace: {"correct", "consistent", "by", "why"}, the last one a line.

    correct: the answer is the gold choice. consistent: every statement of the thought holds of the
    scene, and it concludes this answer."""
    gold, said = record["choices"][record["answer"]], conclusion(thought)
    correct, faults = answer == gold, []
    if not correct:
        faults.append(f"The answer is {gold}, not {answer}." if answer else "There is no answer.")
    false = [sentence for sentence, holds in claims(thought, facts) if holds is False]
    if false:
        faults.append("Not so: " + " ".join(false))
    if said is None:
        faults.append("The thought concludes nothing.")
    elif said != answer:
        faults.append(f"The thought concludes {said}.")
    consistent = not false and said is not None and said == answer
    why = " ".join(faults) or "All statements hold and lead to the answer."
    return {"correct": correct, "consistent": consistent, "by": NAME, "why": why}


# ---- the trace file ----------------------------------------------------------------------------


def _key(pid, seed):
    return hashlib.sha256(json.dumps([pid, NAME, VERSION, seed]).encode()).hexdigest()


def _trace(pid, record, facts, seed):
    told = think(record, facts, f"{seed}/{pid}")  # other pictures may have the same facts
    thought, answer = told["thought"], told["answer"]
    gold = record["choices"][record["answer"]]
    verdict = judge(record, facts, thought, answer)
    trace = {"id": pid, "question": record["question"], "thought": thought, "answer": answer}
    trace |= {"gold": gold, "verdict": verdict, "teacher": NAME, "usage": {}}
    return trace | {"key": _key(pid, seed)}


def traces(folder, seed=0):
    """Path of traces.jsonl in a folder of scenes.write: a judged trace for each train problem.

    Written at the first call, whole or not at all; later the path is returned at once. A file by
    another VERSION or with another seed is replaced. Raises FileNotFoundError for other folders."""
    folder = Path(folder)
    path, pids = folder / "traces.jsonl", read_json(folder / "pid_splits.json")["train"]
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            if json.loads(file.readline() or "{}").get("key") == _key(pids[0], seed):
                return path
    problems, facts = (read_json(folder / f"{name}.json") for name in ("problems", "scenes"))
    lines = [json.dumps(_trace(pid, problems[pid], facts[pid], seed)) for pid in pids]
    handle, temporary = tempfile.mkstemp(prefix=".traces.", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
