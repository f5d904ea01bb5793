"""The demo's teacher: it stands in for Gemini and Claude where there is no network.

It "thinks" about a problem of demo/scenes.py and is right about as often as the Gemini of
pali_reason (72 % of 345 traces). It never looks at an image: it has the facts of the scene, and for
some problems one of them is wrong. A misread thought is what somebody states who saw facts with as
few changes as lead to another of the choices. demo/judge.py does not know which ones it misread.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise, product
from pathlib import Path

from demo.judge import NAME, POLES, asked_numbers, food_chain, judge
from demo.wording import joined, plural
from support.files import digest, read_json

VERSION = 1  # of the wording, which a test pins; another one replaces old trace files
# What the teacher does, and the share of it. "sound" and "lucky" end in the right answer: 72 %.
SHARES = {
    "sound": 0.62,  # right thought, right answer
    "misread": 0.18,  # one fact misread, and the answer that follows from it
    "slip": 0.06,  # right thought, another answer
    "lucky": 0.10,  # one fact misread, and the right answer all the same
    "loop": 0.04,  # a sentence again and again, no answer
}
OPENINGS = ("Let me look at the {0}.", "I look at the {0}.", "First look at the {0}.")


# ---- thoughts: facts -> (the statements of somebody who saw them, the choice that follows) -------

Stated = tuple[list[str], str | None]


def only_extreme(numbers: dict[str, int], best: Callable = max) -> str | None:
    """The only name with the highest (or lowest) number, else None."""
    top = [name for name, n in numbers.items() if n == best(numbers.values())]
    return top[0] if len(top) == 1 else None


def counted(numbers: dict[str, int], noun: str = "{}") -> str:
    return joined(plural(n, noun.format(name)) for name, n in numbers.items())


def added(numbers: Iterable[int]) -> str:
    return f"{' + '.join(map(str, numbers))} = {sum(numbers)}."


def state_magnets(facts: dict) -> Stated:
    left = facts["left"][1]
    right = facts["right"][0]
    stated = [f"The left magnet has {POLES[left]} on its right."]
    stated += [f"The right magnet has {POLES[right]} on its left."]
    if left == right:
        return [*stated, "The same poles repel."], "repel"
    return [*stated, "Opposite poles attract."], "attract"


def state_count(facts: dict) -> Stated:
    kinds = asked_numbers(facts, "shapes")
    stated = [f"The picture shows {counted(kinds)} and some other shapes."] if kinds else []
    if len(kinds) > 1:
        stated.append(added(kinds.values()))
    return stated, str(sum(kinds.values()))


def state_compare(facts: dict) -> Stated:
    shapes = facts["shapes"]
    high, *rest = sorted(shapes.values(), reverse=True)
    are = "is" if next(iter(shapes.values())) == 1 else "are"
    result = f"{high} is more than {rest[0]}." if facts["kind"] == "more" else f"{high} is most."
    best = only_extreme(shapes)
    return [f"There {are} {counted(shapes)}.", result], best and f"{best}s"


def state_cup(facts: dict) -> Stated:
    return [f"The top of the water is at the {facts['level']} line."], f"{facts['level']} ml"


def state_bars(facts: dict) -> Stated:
    bars = facts["bars"]
    if facts["kind"] == "height":
        asked = facts["asked"]
        return [f"The top of the {asked} bar is at line {bars[asked]}."], str(bars[asked])
    best = max if facts["kind"] == "tallest" else min
    word = "highest" if best is max else "lowest"
    stated = [f"The bars show {joined(f'{c} {h}' for c, h in bars.items())}."]
    return [*stated, f"The {word} number is {best(bars.values())}."], only_extreme(bars, best)


def state_groups(facts: dict) -> Stated:
    rings = facts["rings"]
    dots = facts["dots"]
    stated = [f"The picture shows {plural(rings, 'ring')} with {dots} dots in each ring."]
    if facts["kind"] == "product":
        return stated, f"{rings} x {dots}"
    return [*stated, f"{rings} x {dots} = {rings * dots}."], str(rings * dots)


def state_food(facts: dict) -> Stated:
    stated = [f"From left to right the picture shows {joined(facts['order'])}."]
    stated += [f"The arrows point to the {facts['arrow']}."]
    chain = food_chain(facts)
    if facts["kind"] == "top":
        return [*stated, f"So the top is the {chain[-1]}."], chain[-1]
    asked = facts["asked"]
    verb = "is eaten by"
    if facts["kind"] == "eats":
        verb = "eats"
        chain = chain[::-1]
    answer = dict(pairwise(chain)).get(asked)
    return [*stated, f"So the {asked} {verb} the {answer}."], answer


def state_position(facts: dict) -> Stated:
    order = facts["order"]
    asked = facts["asked"]
    stated = [f"From left to right the picture shows {joined(order)}."]
    if facts["kind"] == "end":
        return stated, order[0 if asked == "left" else -1]
    return stated, "left" if order.index(asked["a"]) < order.index(asked["b"]) else "right"


def state_sum(facts: dict) -> Stated:
    blocks = facts["blocks"]
    stated = [f"{facts['name']} has {counted(blocks, '{} block')}."]
    return [*stated, added(blocks.values())], str(sum(blocks.values()))


def state_word(facts: dict) -> Stated:
    words = facts["words"]
    stated = [f"{w.capitalize()} is {group}." for w, group in words.items()]
    return stated, next(w for w, group in words.items() if group == facts["asked"])


# ---- misreading: (facts, n) -> all versions of the facts in which `n` of them are different ------

Misread = Callable[[dict, int], Iterable[dict]]


def misread_numbers(
    values: Iterable[int], *keys: str, table: str = "", only_asked: bool = False
) -> Misread:
    """Facts that are numbers themselves, or a table of numbers, or what is asked for in it."""

    def misread(facts: dict, n: int) -> Iterator[dict]:
        numbers = {key: facts[key] for key in keys} or facts[table]
        if only_asked:
            numbers = asked_numbers(facts, table)
        for names in combinations(numbers, n):
            for new in product(values, repeat=n):
                if all(numbers[name] != value for name, value in zip(names, new, strict=True)):
                    changed = dict(zip(names, new, strict=True))
                    yield facts | ({table: facts[table] | changed} if table else changed)

    return misread


def misread_poles(facts: dict, n: int) -> Iterator[dict]:
    for side in ("left", "right"):
        yield facts | {side: facts[side][::-1]}


def misread_order(facts: dict, n: int) -> Iterator[dict]:
    """Two of a row taken for each other, or all arrows the wrong way."""
    for i, j in combinations(range(len(facts["order"])), 2):
        order = list(facts["order"])
        order[i], order[j] = order[j], order[i]
        yield facts | {"order": order}
    if "arrow" in facts:
        yield facts | {"arrow": "left" if facts["arrow"] == "right" else "right"}


def misread_words(facts: dict, n: int) -> Iterator[dict]:
    """Two words, each taken for the other's kind."""
    words = facts["words"]
    for a, b in combinations(words, 2):
        yield facts | {"words": words | {a: words[b], b: words[a]}}


HEIGHTS = misread_numbers(range(1, 6), table="bars")
RINGS = misread_numbers(range(1, 5), "rings", "dots")
COUNTS = misread_numbers(range(1, 7), table="shapes")
REASONING = {  # kind of question: (its statements and conclusion, how they are misread)
    "magnets": (state_magnets, misread_poles),
    "count": (state_count, misread_numbers(range(6), table="shapes", only_asked=True)),
    **dict.fromkeys(("more", "most"), (state_compare, COUNTS)),
    "cup": (state_cup, misread_numbers(range(100, 600, 100), "level")),
    **dict.fromkeys(("tallest", "shortest"), (state_bars, HEIGHTS)),
    "height": (state_bars, misread_numbers(range(1, 6), table="bars", only_asked=True)),
    **dict.fromkeys(("total", "product"), (state_groups, RINGS)),
    **dict.fromkeys(("eats", "eaten", "top"), (state_food, misread_order)),
    **dict.fromkeys(("side", "end"), (state_position, misread_order)),
    "sum": (state_sum, misread_numbers(range(1, 9), table="blocks")),
    "word": (state_word, misread_words),
}


def misreading(rng: random.Random, facts: dict, wrong: list[str]) -> Stated:
    """Statements and conclusion, one of `wrong`, if as few facts as possible are misread."""
    state, misread = REASONING[facts["kind"]]
    for n in (1, 2, 3):  # two or three only where no single one leads to a listed choice
        stated = [state(changed) for changed in misread(facts, n)]
        usable = [(statements, concluded) for statements, concluded in stated if concluded in wrong]
        if usable:
            return rng.choice(usable)
    raise ValueError(f"No misreading of {facts} leads to one of {wrong}; are these its choices?")


def think(record: dict, facts: dict, seed: object) -> dict:
    """The teacher's {"thought", "answer", "kind"} for a problem, by its record and facts in
    problems.json and scenes.json; the same for the same seed, which is anything that prints. Two
    images can have the same facts, and then the same seed brings the same thought. The answer is
    the text of a choice, "" if the thought never ends; kind is one of SHARES."""
    problem = json.dumps([record["question"], record["choices"], facts], sort_keys=True)
    rng = random.Random(f"{seed}/{problem}")
    (kind,) = rng.choices(list(SHARES), SHARES.values())
    opening = rng.choice(OPENINGS).format("picture" if record["image"] else "words")
    gold = record["choices"][record["answer"]]
    wrong = [choice for choice in record["choices"] if choice != gold]
    if kind in ("misread", "lucky"):
        stated, concluded = misreading(rng, facts, wrong)
    else:
        stated, concluded = REASONING[facts["kind"]][0](facts)
    if kind == "loop":
        thought = " ".join([opening, *stated[:1] * rng.randint(6, 10)])
        return {"thought": thought, "answer": "", "kind": kind}
    answer = {"slip": rng.choice(wrong), "lucky": gold}.get(kind, concluded)
    thought = " ".join([opening, *stated, f"So the answer is {concluded}."])
    return {"thought": thought, "answer": answer, "kind": kind}


# ---- the trace file ----------------------------------------------------------------------------


def traces(folder: str | Path, seed: int = 0) -> Path:
    """Path of traces.jsonl in a folder of scenes.write: a judged trace for each train problem.

    Written at the first call, whole or not at all; later the path is returned at once. A file by
    another VERSION or with another seed is replaced. Raises FileNotFoundError for other folders."""
    folder = Path(folder)
    path = folder / "traces.jsonl"
    ids = read_json(folder / "pid_splits.json")["train"]
    keys = {id: digest([id, NAME, VERSION, seed]) for id in ids}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            if json.loads(file.readline() or "{}").get("key") == keys[ids[0]]:
                return path
    problems = read_json(folder / "problems.json")
    scenes = read_json(folder / "scenes.json")
    # In a folder of its own, as another process may be writing them too.
    with tempfile.TemporaryDirectory(prefix=".traces.", dir=folder) as temporary:
        made = Path(temporary) / path.name
        with made.open("w", encoding="utf-8") as file:
            for id, key in keys.items():
                trace = make_trace(id, problems[id], scenes[id], seed)
                file.write(json.dumps(trace | {"key": key}) + "\n")
        made.replace(path)
    return path


def make_trace(id: str, record: dict, facts: dict, seed: int) -> dict:
    reply = think(record, facts, f"{seed}/{id}")  # other images may have the same facts
    return {
        "id": id,
        "question": record["question"],
        "thought": reply["thought"],
        "answer": reply["answer"],
        "gold": record["choices"][record["answer"]],
        "verdict": judge(record, facts, reply["thought"], reply["answer"]),
        "teacher": NAME,
        "usage": {},
    }
