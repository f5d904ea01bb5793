"""The built-in benchmark: procedural image questions in ScienceQA's file layout.

Seeded drawings with a multiple-choice question, a lecture, a solution that first describes the
image, and facts that decide every statement of that solution; the same bytes for the same (family,
split, seed, index) and Pillow version. It stands in for ScienceQA (arXiv 2209.09513). The two bar
magnets are the example of a hallucinated rationale in Multimodal-CoT (arXiv 2302.00923, section 3).

Three things hold by construction, and the tests check them:
* Splits are disjoint. A hash of the classes and boxes of an image (without one, of the facts)
  names its split, whatever the seed and question; `problem` draws again until it fits.
* The question alone is worth chance. The choices are drawn first, the answer uniformly among
  them, and only then a scene in which it is right. Only "text" can be answered without an image.
* No two objects of an image have their centres in the same cell of a 6 x 6 grid, there are at
  most 12, and no side is under 12 pixels: a DETR with 36 location-bound queries can read it.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from demo.drawing import MAGNETS, RGB, SIDE, SPECIES, level, render
from demo.wording import PHRASES, TOPICS, joined, plural
from support.files import cache_folder

GRID = 6  # cells a side
CELL = SIDE / GRID
SPLITS = {"train": range(0, 12), "val": range(12, 15), "test": range(15, 20)}  # hash buckets of 20
SIZES = {"train": 8000, "val": 200, "test": 400}

COLOURS = tuple(RGB)
SHAPES = ("circle", "square", "triangle")
KINDS = tuple(f"{c} {s}" for c in COLOURS for s in SHAPES)
NAMES = ("Tom", "Ann", "Ben", "Eva")
WORDS = {"a colour": COLOURS, "a shape": SHAPES, "an animal": SPECIES[1:], "a name": NAMES}
CLASSES = (  # of DETR, in the order of its labels
    "magnet north left", "magnet south left",
    "red circle", "red square", "red triangle", "blue circle", "blue square", "blue triangle",
    "green circle", "green square", "green triangle",
    "yellow circle", "yellow square", "yellow triangle",
    "cup", "water", "red bar", "blue bar", "green bar", "yellow bar",
    "ring of 2 dots", "ring of 3 dots", "ring of 4 dots",
    "grass", "rabbit", "fox", "fish", "bird", "snail", "arrow left", "arrow right",
)  # fmt: skip
HELD_OUT = ("position",)  # known objects, a new type of question: only in test


@dataclass(frozen=True)
class Scene:
    """One problem. `description` says in words everything the image shows, only to pretrain the
    text model on text questions, as UnifiedQA was; the benchmark never holds it."""

    record: dict  # ScienceQA's fields; "image" is "image.png" or None
    image: Image.Image | None  # RGB, 128 x 128
    caption: str  # as of a weak captioner: one wrong detail in 15 % of the images
    facts: dict  # family, kind, answer, and those that decide the solution's statements
    objects: list  # (class name, (x0, y0, x1, y1)) in pixels
    description: str


@dataclass(frozen=True)
class Draft:
    """A problem before it is worded and drawn."""

    kind: str  # key of PHRASES
    choices: list
    answer: int  # an index
    facts: dict
    words: dict  # for the templates, in addition to the facts
    objects: list = field(default_factory=list)
    chart: tuple = ()  # box of the axes of a bar chart; not an object


# ---- families: each takes a random.Random and returns a Draft ----------------------------------


def pick(rng: random.Random, values: Iterable, n: int) -> tuple[list, int]:
    """n choices and the index of the answer: uniform, whatever the scene will be."""
    return rng.sample(list(values), n), rng.randrange(n)


def placed(name: str, cx: float, cy: float, width: int, height: int = 0) -> tuple[str, tuple]:
    """An object and its box (x0, y0, x1, y1) around a centre; a square without a height."""
    height = height or width
    x0 = round(cx - width / 2)
    y0 = round(cy - height / 2)
    return name, (x0, y0, x0 + width, y0 + height)


def draft_magnets(rng: random.Random) -> Draft:
    choices, answer = pick(rng, ("attract", "repel"), 2)
    left = rng.choice(("NS", "SN"))
    right = left if choices[answer] == "attract" else left[::-1]
    w = rng.randint(44, 54)
    h = rng.randint(16, 24)
    gap = rng.randint(4, 10)
    x = rng.randint(30, 34)
    y = rng.randint(26, 100)
    objects = [
        placed(MAGNETS[left], x, y + rng.randint(-3, 3), w, h),
        placed(MAGNETS[right], x + w + gap, y + rng.randint(-3, 3), w, h),
    ]
    poles = ["north" if pole == "N" else "south" for pole in left + right]
    words = dict(zip("abcd", poles, strict=True))
    words["rule"] = "Opposite poles attract." if left == right else "The same poles repel."
    return Draft("magnets", choices, answer, {"left": left, "right": right}, words, objects)


def scatter(rng: random.Random, names: list, cells: list | None = None) -> tuple[list, dict]:
    """Objects, one a cell of the grid, and the words that all shape families use."""
    cells = cells or [divmod(i, GRID) for i in rng.sample(range(GRID * GRID), len(names))]
    objects = []
    for name, cell in zip(names, cells, strict=True):
        cx, cy = ((v + 0.5) * CELL + rng.uniform(-1.5, 1.5) for v in cell)  # stays in its cell
        objects.append(placed(name, cx, cy, rng.randint(13, 17)))
    present = rng.choice(sorted(set(names)))
    absent = rng.choice([k for k in KINDS if k not in names])
    each = joined(f"a {name}" for name in names)
    return objects, {"present": present, "absent": absent, "each": each}


def draft_count(rng: random.Random) -> Draft:
    choices, answer = pick(rng, range(1, 6), rng.choice((3, 4)))
    asked = rng.choice(COLOURS if rng.random() < 0.4 else KINDS)
    matching = [k for k in KINDS if asked in k]
    names = rng.choices(matching, k=choices[answer])
    names += rng.choices([k for k in KINDS if k not in matching], k=rng.randint(2, 4))
    rng.shuffle(names)
    shapes = {k: names.count(k) for k in dict.fromkeys(names)}
    objects, words = scatter(rng, names)
    words["noun"] = f"{asked} shapes" if asked in COLOURS else f"{asked}s"
    words["counted"] = joined(plural(n, k) for k, n in shapes.items())
    words["matching"] = joined(plural(n, k) for k, n in shapes.items() if k in matching)
    return Draft("count", choices, answer, {"shapes": shapes, "asked": asked}, words, objects)


def draft_compare(rng: random.Random) -> Draft:
    kinds, answer = pick(rng, KINDS, rng.choice((2, 2, 3)))
    best = rng.randint(2, 7 - len(kinds))
    counts = [best if i == answer else rng.randint(1, best - 1) for i in range(len(kinds))]
    shapes = dict(zip(kinds, counts, strict=True))
    names = [k for k, n in shapes.items() for _ in range(n)]
    rng.shuffle(names)
    objects, words = scatter(rng, names)
    words["either"] = " or more ".join(f"{k}s" for k in kinds)
    words["counted"] = joined(plural(n, k) for k, n in shapes.items())
    words |= {"best": best, "are": "is" if counts[0] == 1 else "are"}
    choices = [f"{k}s" for k in kinds]
    kind = "more" if len(kinds) == 2 else "most"
    return Draft(kind, choices, answer, {"shapes": shapes}, words, objects)


def draft_cup(rng: random.Random) -> Draft:
    levels, answer = pick(rng, range(100, 600, 100), 4)
    body = rng.randint(44, 52)
    handle = 24
    height = round(5.7 * rng.uniform(14, 17))
    # A line of the grid passes between the centre of the water and that of the cup with its
    # handle: they never share a cell, whatever the level, so the level cannot skew the layout.
    x0 = round(CELL * rng.choice((2, 3)) - body / 2 - rng.uniform(1.5, handle / 2 - 1.5))
    y0 = rng.randint(8, 24)
    cup = (x0, y0, x0 + body + handle, y0 + height)
    water = (x0, round(level(cup, levels[answer])), x0 + body, cup[3])
    objects = [("water", water), ("cup", cup)]
    return Draft("cup", [f"{v} ml" for v in levels], answer, {"level": levels[answer]}, {}, objects)


def draft_bars(rng: random.Random) -> Draft:
    kind = rng.choice(("tallest", "shortest", "height"))
    colours, answer = pick(rng, COLOURS, rng.choice((3, 4)))
    choices = colours
    asked = colours[answer]
    others = [c for c in colours if c != asked]
    if kind == "height":
        choices, answer = pick(rng, range(1, 6), 4)
        rest = [h for h in range(1, 6) if h != choices[answer]]
        heights = [choices[answer], *rng.sample(rest, len(others))]
    else:
        heights = sorted(rng.sample(range(1, 6), len(colours)), reverse=kind == "tallest")
    bars = list(zip([asked, *others], heights, strict=True))
    rng.shuffle(bars)  # from left to right
    facts = {"bars": dict(bars)}
    if kind == "height":
        facts["asked"] = asked
    words = {"n": len(bars), "top": heights[0], "present": rng.choice(colours)}
    words["counted"] = joined(f"{c} {h}" for c, h in bars)
    words["each"] = joined(f"a {c} bar up to line {h}" for c, h in bars)
    step = 24 if len(bars) == 4 else rng.randint(24, 30)  # above CELL: a column of the grid each
    unit = rng.uniform(15.5, 18)
    width = rng.randint(14, 18)
    x = rng.randint(14, 22)
    base = rng.randint(106, 118)
    objects = [
        (f"{c} bar", (x + 5 + i * step, round(base - h * unit), x + 5 + i * step + width, base))
        for i, (c, h) in enumerate(bars)
    ]
    chart = (x, base - 5 * unit, x + 4 + len(bars) * step, base)
    return Draft(kind, choices, answer, facts, words, objects, chart)


def draft_groups(rng: random.Random) -> Draft:
    pairs = [(g, k) for g in range(1, 5) for k in range(2, 5)]
    kind = rng.choice(("total", "product"))
    if kind == "total":
        choices, answer = pick(rng, sorted({g * k for g, k in pairs}), 4)
        g, k = rng.choice([p for p in pairs if p[0] * p[1] == choices[answer]])
    else:
        choices, answer = pick(rng, pairs, rng.choice((3, 4)))
        g, k = choices[answer]
        choices = [f"{a} x {b}" for a, b in choices]
    size = rng.randint(36, 44)
    name = f"ring of {k} dots"
    objects = []
    for cx, cy in rng.sample([(34, 34), (94, 34), (34, 94), (94, 94)], g):
        objects.append(placed(name, cx + rng.randint(-8, 8), cy + rng.randint(-8, 8), size))
    words = {"counted": plural(g, "ring"), "each": joined([f"a {name}"] * g)}
    return Draft(kind, choices, answer, {"rings": g, "dots": k}, words, objects)


def draft_chain(rng: random.Random) -> Draft:
    kind = rng.choice(("eats", "eaten", "top"))
    *choices, asked = rng.sample(SPECIES, 4 if kind == "top" else 3)
    answer = rng.randrange(len(choices))
    right = choices[answer]
    others = [c for i, c in enumerate(choices) if i != answer]
    if kind == "top":
        chain = [*rng.sample(others, 2), right]
    else:  # food and eater are next to each other, the third comes before or after them
        pair = [right, asked] if kind == "eats" else [asked, right]
        chain = rng.choice(([*others, *pair], [*pair, *others]))
    arrow = rng.choice(("left", "right"))
    order = chain if arrow == "right" else chain[::-1]
    names = [order[0], f"arrow {arrow}", order[1], f"arrow {arrow}", order[2]]
    x = rng.randint(15, 17)
    y = rng.randint(20, 104)
    size = rng.randint(23, 26)
    objects = []
    for i, name in enumerate(names):  # centres 24 pixels apart: a column of the grid each
        w, h = (16, 12) if name.startswith("arrow") else (size, size)
        objects.append(placed(name, x + 24 * i, y + rng.randint(-5, 5), w, h))
    facts = {"order": order, "arrow": arrow}
    if kind != "top":
        facts["asked"] = asked
    words = {"start": chain[0], "middle": chain[1], "counted": joined(order)}
    words["each"] = joined(f"an {n}" if n.startswith("arrow") else n for n in names)
    words["present"] = rng.choice(chain)
    words["absent"] = rng.choice([s for s in SPECIES if s not in chain])
    return Draft(kind, choices, answer, facts, words, objects)


def draft_position(rng: random.Random) -> Draft:
    kind = rng.choice(("side", "end"))
    if kind == "side":
        choices, answer = pick(rng, ("left", "right"), 2)
        a, b, other = rng.sample(KINDS, 3)
        order = [a, b] if choices[answer] == "left" else [b, a]
        order.insert(rng.randrange(3), other)
        words = {"a": a, "b": b}
        asked = words
    else:
        choices, answer = pick(rng, KINDS, 3)
        words = {}
        asked = rng.choice(("left", "right"))
        order = rng.sample([c for c in choices if c != choices[answer]], 2)
        order.insert(0 if asked == "left" else 2, choices[answer])
    columns = sorted(rng.sample(range(GRID), 3))
    objects, shared = scatter(rng, order, [(column, rng.randrange(GRID)) for column in columns])
    words = words | shared | {"counted": joined(order)}
    return Draft(kind, choices, answer, {"order": order, "asked": asked}, words, objects)


def draft_text(rng: random.Random) -> Draft:
    if rng.random() < 0.5:
        groups, answer = pick(rng, WORDS, 3)
        choices = [rng.choice(WORDS[g]) for g in groups]
        pairs = dict(zip(choices, groups, strict=True))
        words = {"each": " ".join(f"{w.capitalize()} is {g}." for w, g in pairs.items())}
        return Draft("word", choices, answer, {"words": pairs, "asked": groups[answer]}, words)
    choices, answer = pick(rng, range(2, 10), 4)
    x = rng.randint(1, choices[answer] - 1)
    blocks = dict(zip(rng.sample(COLOURS, 2), (x, choices[answer] - x), strict=True))
    words = {"x": x, "y": choices[answer] - x}
    words["counted"] = joined(plural(n, f"{c} block") for c, n in blocks.items())
    return Draft("sum", choices, answer, {"name": rng.choice(NAMES), "blocks": blocks}, words)


DRAFT = {
    "magnets": draft_magnets, "count": draft_count, "compare": draft_compare, "cup": draft_cup,
    "bars": draft_bars, "groups": draft_groups, "chain": draft_chain, "position": draft_position,
    "text": draft_text,
}  # fmt: skip
FAMILIES = tuple(DRAFT)


# ---- the benchmark -----------------------------------------------------------------------------


def split_of(draft: Draft) -> str:
    """The split an image belongs to, by its objects and their places, not by seed or question."""
    content = sorted(draft.objects) or {k: v for k, v in draft.facts.items() if k != "asked"}
    text = json.dumps(content, sort_keys=True)
    bucket = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) % 20
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def problem(family: str, split: str, seed: int, index: int) -> Scene:
    """Problem `index` of a family in a split, the same one each time.

    Raises ValueError for an unknown family or split, and for a held-out family outside test."""
    if family not in FAMILIES or split not in SPLITS:
        raise ValueError(f"No family {family!r} with split {split!r}: {FAMILIES}, {tuple(SPLITS)}.")
    if family in HELD_OUT and split != "test":
        raise ValueError(f"Family {family!r} is held out: ask for split 'test', not {split!r}.")
    rng = random.Random(f"{family}/{split}/{seed}/{index}")
    draft = DRAFT[family](rng)
    while split_of(draft) != split:
        draft = DRAFT[family](rng)
    return scene(rng, family, split, draft)


def scene(rng: random.Random, family: str, split: str, draft: Draft) -> Scene:
    """Word and draw a draft."""
    topic = TOPICS[draft.kind if family == "text" else family]
    choices = [str(c) for c in draft.choices]
    facts = {"family": family, "kind": draft.kind, **draft.facts, "answer": choices[draft.answer]}

    def fill_in(template: str) -> str:
        return rng.choice(template.split(" | ")).format(**facts | draft.words)

    question, solution = map(fill_in, PHRASES[draft.kind])
    image = render(rng, draft.objects, draft.chart) if draft.objects else None
    hint = fill_in(topic.hint) if image is None or rng.random() < 0.25 else ""
    record = {
        "question": question, "choices": choices, "answer": draft.answer, "hint": hint,
        "image": "image.png" if image else None, "task": "closed choice",
        "grade": f"grade{rng.randint(*topic.grades)}", "subject": topic.subject, "topic": family,
        "category": draft.kind, "skill": topic.skill, "lecture": topic.lecture,
        "solution": solution, "split": split, "family": family,  # the last key is not ScienceQA's
    }  # fmt: skip
    caption = ""
    if image:
        roll = rng.random()
        detail = topic.true if roll < 0.5 else ""
        detail = topic.wrong if roll < 0.15 else detail
        caption = fill_in(f"{rng.choice(topic.caption.split(' | '))} {detail}".strip())
    return Scene(record, image, caption, facts, draft.objects, fill_in(topic.description))


def write(folder: str | Path, sizes: dict[str, int] = SIZES, seed: int = 0) -> None:
    """Write a benchmark in ScienceQA's layout; the families alternate within a split.

    problems.json, pid_splits.json, captions.json, images/{split}/{pid}/image.png as published, and
    scenes.json: pid -> facts. The folder appears whole or not at all. Raises FileExistsError."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fill(Path(temporary, "new"), sizes, seed)
        os.rename(Path(temporary, "new"), folder)


def fill(folder: Path, sizes: dict[str, int], seed: int) -> None:
    problems = {}
    captions = {}
    facts = {}
    splits = {}
    for split, size in sizes.items():
        families = [f for f in FAMILIES if split == "test" or f not in HELD_OUT]
        pids = [str(len(problems) + 1 + i) for i in range(size)]
        splits[split] = pids
        splits[f"mini{split}"] = pids[: max(1, size // 10)]
        for i, pid in enumerate(pids):
            one = problem(families[i % len(families)], split, seed, i)
            problems[pid] = one.record
            facts[pid] = one.facts
            if one.image:
                captions[pid] = one.caption
                path = folder / "images" / split / pid / "image.png"
                path.parent.mkdir(parents=True)
                one.image.save(path, compress_level=1)
    tables = {"problems": problems, "pid_splits": splits, "captions": {"captions": captions}}
    tables["scenes"] = facts
    for name, table in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1), encoding="utf-8")


def demo_folder() -> Path:
    """The demo, drawn at first use. The folder's name has a hash of the scripts that draw it."""
    scripts = [Path(__file__).with_name(f"{name}.py") for name in ("scenes", "drawing", "wording")]
    content = b"".join(script.read_bytes() for script in scripts)
    folder = cache_folder() / f"demo-{hashlib.sha256(content).hexdigest()[:10]}"
    if not folder.is_dir():
        try:
            write(folder)
        except OSError:
            if not folder.is_dir():  # else another run has drawn the same meanwhile
                raise
    return folder
