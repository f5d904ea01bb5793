"""The built-in benchmark: procedural picture questions in ScienceQA's file layout.

Seeded drawings (128 x 128 RGB) with a multiple-choice question, a lecture, a solution that first
says what is seen, and facts that decide every statement of that solution. Unlimited, and the same
bytes for the same (family, split, seed, index) and Pillow version. It stands in for ScienceQA
(arXiv 2209.09513) where nothing can be downloaded. The two bar magnets are the example of a
hallucinated rationale in Multimodal-CoT (arXiv 2302.00923, section 3).

Three things hold by construction, and tests/test_scenes.py checks them:
* Splits are disjoint. A hash of the classes and boxes of a picture (without one, of the facts)
  names its split, whatever the seed and question; `problem` draws again until it fits.
* The question alone is worth chance. The choices are drawn first, the answer uniformly among
  them, and only then a scene in which it is right. Only "text" can be answered without a picture.
* No two objects of a picture have their centres in the same cell of a 6 x 6 grid, there are at
  most 12, and no side is under 12 pixels: a DETR with 36 location-bound queries can read it.

Left out on purpose: photographs, clutter, occlusion, free-form answers, natural language variety.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIDE, GRID, SCALE = 128, 6, 2  # pixels; cells a side; supersampling while drawing
CELL = SIDE / GRID
SPLITS = {"train": range(0, 12), "val": range(12, 15), "test": range(15, 20)}  # hash buckets of 20
SIZES = {"train": 8000, "val": 200, "test": 400}

# fmt: off
RGB = {"red": (214, 48, 48), "blue": (48, 88, 214), "green": (44, 160, 74),
       "yellow": (240, 200, 40)}
COLOURS, SHAPES = tuple(RGB), ("circle", "square", "triangle")
KINDS = tuple(f"{c} {s}" for c in COLOURS for s in SHAPES)
SPECIES = ("grass", "rabbit", "fox", "fish", "bird", "snail")
NAMES = ("Tom", "Ann", "Ben", "Eva")
WORDS = {"a colour": COLOURS, "a shape": SHAPES, "an animal": SPECIES[1:], "a name": NAMES}
MAGNETS = {"NS": "magnet north left", "SN": "magnet south left"}  # poles from left to right
CLASSES = (*MAGNETS.values(), *KINDS, "cup", "water", *(f"{c} bar" for c in COLOURS),
           *(f"ring of {k} dots" for k in (2, 3, 4)), *SPECIES, "arrow left", "arrow right")
HELD_OUT = ("position",)  # known objects, a new type of question: only in test


class Topic(NamedTuple):
    """What is constant in a family. ` | ` separates paraphrases; {words} come from the scene."""

    subject: str
    grades: tuple  # first and last
    skill: str
    lecture: str
    hint: str  # with a picture: general knowledge, for one problem in four
    description: str = ""
    caption: str = ""
    true: str = ""  # details the caption may add
    wrong: str = ""


NAT, SOC, LAN = "natural science", "social science", "language science"
SHAPES_TEXT = ("The picture shows {counted} on a plain background. | "
               "There are some shapes in the picture: {each}.",
               "some coloured shapes | a group of shapes on a table",
               "with a {present}", "with a {absent}")
TOPICS = {  # a family, or a kind of text problem
    "magnets": Topic(
        NAT, (7, 12), "Predict what magnets do", "Opposite poles attract. The same poles repel.",
        "A magnet has a north pole and a south pole.",
        "The left magnet has {a} on its left and {b} on its right. "
        "The right magnet has {c} on its left and {d} on its right. | "
        "Two magnets from left to right. The first has {a} then {b}. The second has {c} then {d}.",
        "two bar magnets on a table | a picture of two magnets",
        "with red and blue ends", "with green ends"),
    "count": Topic(
        NAT, (1, 2), "Count shapes", "To count shapes, look at each one and count it once.",
        "A shape can have any colour and any size.", *SHAPES_TEXT),
    "compare": Topic(
        NAT, (1, 4), "Compare numbers", "To compare, count each kind. The higher number is more.",
        "A shape can have any colour and any size.", *SHAPES_TEXT),
    "cup": Topic(
        NAT, (3, 6), "Read a measuring cup",
        "The line at the top of the water tells how much it is.",
        "A measuring cup has a scale in ml.",
        "The picture shows a measuring cup. The water is at the {level} line. | "
        "A cup has a scale from 100 to 500 ml and is filled up to {level}.",
        "a measuring cup on a table | a glass cup with water", "with a handle", "full of milk"),
    "bars": Topic(
        SOC, (4, 9), "Read a bar chart", "In a bar chart, the top of a bar shows its number.",
        "A class had a vote for the best colour.",
        "A bar chart from left to right shows the numbers {counted}. | A chart has {each}.",
        "a bar chart | a bar chart with {n} bars", "and a {present} bar", "and a black line"),
    "groups": Topic(
        NAT, (3, 5), "Multiply equal groups",
        "With equal groups, multiply the rings by the dots in each ring.",
        "A ring is drawn around each group of dots.",
        "The picture shows {counted} and each ring has {dots} dots in it. | "
        "In the picture are these groups: {each}.",
        "dots in rings | a picture of rings", "on a plain background", "with squares in it"),
    "chain": Topic(
        NAT, (5, 10), "Read a food chain", "An arrow points from the food to the one that eats it.",
        "In this story anything can eat anything.",
        "A food chain from left to right: {counted}. The arrows point to the {arrow}. | "
        "From left to right the picture shows {each}.",
        "a drawing of a food chain | some drawings in a row",
        "with a {present}", "with a {absent}"),
    "position": Topic(
        NAT, (1, 3), "Find the place of a shape", "To find a shape, look from left to right.",
        "A shape can have any colour and any size.",
        "From left to right the picture shows {counted}.", *SHAPES_TEXT[1:]),
    "sum": Topic(
        NAT, (1, 8), "Add two numbers", "To know how many in all, add the numbers.",
        "{name} has {counted}.", "{name} has {counted}. The blocks are all in one box."),
    "word": Topic(
        LAN, (1, 12), "Sort words", "Words can be sorted by what they name.", "",
        "{each} These are the words."),
}
# kind: questions and solution
PHRASES = {
    "magnets": ("Will these magnets attract or repel each other? | What will the two magnets do? | "
                "Do the two magnets attract or repel?",
                "The left magnet has {b} on its right. "
                "The right magnet has {c} on its left. {rule}"),
    "count": ("How many {noun} are there? | How many {noun} are in the picture?",
              "The picture shows {matching} and some other shapes. So the answer is {answer}."),
    "more": ("Are there more {either}? | Which shape is there more of?",
             "There {are} {counted}. {best} is more. So the answer is {answer}."),
    "most": ("Which shape is there most of? | Which kind of shape is the most common?",
             "There {are} {counted}. {best} is most. So the answer is {answer}."),
    "cup": ("How much water is in the measuring cup? | How much water does the cup hold?",
            "The top of the water is at the {level} line. So the answer is {answer}."),
    "tallest": ("Which bar is the tallest? | Which colour has the highest number?",
                "The bars show {counted}. The highest number is {top}. So the answer is {answer}."),
    "shortest": ("Which bar is the shortest? | Which colour has the lowest number?",
                 "The bars show {counted}. The lowest number is {top}. So the answer is {answer}."),
    "height": ("How high is the {asked} bar? | What number does the {asked} bar show?",
               "The top of the {asked} bar is at line {top}. So the answer is {answer}."),
    "total": ("How many dots are there in all? | How many dots are in the picture?",
              "The picture shows {counted} with {dots} dots in each ring. "
              "{rings} x {dots} = {answer}. So the answer is {answer}."),
    "product": ("Which product shows the dots? | Which product gives the number of dots?",
                "The picture shows {counted} with {dots} dots in each ring. "
                "So the answer is {answer}."),
    "eats": ("What does the {asked} eat? | What is the food of the {asked}?",
             "The arrow points from the {answer} to the {asked}. "
             "So the {asked} eats the {answer}."),
    "eaten": ("What eats the {asked}? | The {asked} is eaten by which one?",
              "The arrow points from the {asked} to the {answer}. "
              "So the {asked} is eaten by the {answer}."),
    "top": ("What is at the top of the food chain? | Which one is not eaten by anything?",
            "The arrows point from the {start} to the {middle} to the {answer}. "
            "Nothing eats the last. So the top is the {answer}."),
    "side": ("Is the {a} left or right of the {b}? | Where is the {a}, left or right of the {b}?",
             "From left to right the picture shows {counted}. So the answer is {answer}."),
    "end": ("Which shape is the first from the {asked}? | Which shape is at the {asked} end?",
            "From left to right the picture shows {counted}. So the answer is {answer}."),
    "sum": ("How many blocks does {name} have? | How many blocks does {name} have in all?",
            "{name} has {counted}. {x} + {y} = {answer}. So the answer is {answer}."),
    "word": ("Which word is {asked}? | Find the word for {asked}.",
             "{each} So the answer is {answer}."),
}
# fmt: on


@dataclass(frozen=True)
class Scene:
    """One problem. `description` says in words all that the picture shows. It is there only to
    pretrain the text model on text questions, as UnifiedQA was; the benchmark never holds it."""

    record: dict  # ScienceQA's fields; "image" is "image.png" or None
    image: Image.Image | None  # RGB, 128 x 128
    caption: str  # what a weak captioner would say; one wrong detail in 15 % of the pictures
    facts: dict  # family, kind, answer, and what decides the statements of the solution
    objects: list  # (class name, (x0, y0, x1, y1)) in pixels
    description: str


@dataclass(frozen=True)
class Draft:
    """A problem before it is worded and drawn."""

    kind: str  # key of PHRASES
    choices: list
    answer: int
    facts: dict
    words: dict  # for the templates, beside the facts
    objects: list = field(default_factory=list)
    chart: tuple = ()  # box of the axes of a bar chart; not an object


# ---- families: each takes a random.Random and returns a Draft ----------------------------------


def _pick(rng, values, n):
    """n choices and the index of the answer: uniform, whatever the scene will be."""
    return rng.sample(list(values), n), rng.randrange(n)


def _plural(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _join(items, last=" and "):
    *most, end = items
    return ", ".join(most) + last + end if most else end


def _object(name, cx, cy, size, height=None):
    height = height or size
    x0, y0 = round(cx - size / 2), round(cy - height / 2)
    return name, (x0, y0, x0 + size, y0 + height)


def _magnets(rng):
    choices, answer = _pick(rng, ("attract", "repel"), 2)
    left = rng.choice(("NS", "SN"))
    right = left if choices[answer] == "attract" else left[::-1]
    w, h, gap = rng.randint(44, 54), rng.randint(16, 24), rng.randint(4, 10)
    x, y = rng.randint(30, 34), rng.randint(26, 100)
    objects = [
        _object(MAGNETS[left], x, y + rng.randint(-3, 3), w, h),
        _object(MAGNETS[right], x + w + gap, y + rng.randint(-3, 3), w, h),
    ]
    words = dict(zip("abcd", ({"N": "north", "S": "south"}[p] for p in left + right), strict=True))
    words["rule"] = "Opposite poles attract." if left == right else "The same poles repel."
    return Draft("magnets", choices, answer, {"left": left, "right": right}, words, objects)


def _scatter(rng, names, cells=None):
    """Objects, one a cell of the grid, and the words that all shape families use."""
    cells = cells or [divmod(i, GRID) for i in rng.sample(range(GRID * GRID), len(names))]
    objects = []
    for name, cell in zip(names, cells, strict=True):
        centre = ((v + 0.5) * CELL + rng.uniform(-1.5, 1.5) for v in cell)  # stays in its cell
        objects.append(_object(name, *centre, rng.randint(13, 17)))
    present = rng.choice(sorted(set(names)))
    absent = rng.choice([k for k in KINDS if k not in names])
    each = _join(f"a {name}" for name in names)
    return objects, {"present": present, "absent": absent, "each": each}


def _count(rng):
    choices, answer = _pick(rng, range(1, 6), rng.choice((3, 4)))
    asked = rng.choice(COLOURS if rng.random() < 0.4 else KINDS)
    matching = [k for k in KINDS if asked in k]
    names = rng.choices(matching, k=choices[answer])
    names += rng.choices([k for k in KINDS if k not in matching], k=rng.randint(2, 4))
    rng.shuffle(names)
    shapes = {k: names.count(k) for k in dict.fromkeys(names)}
    objects, words = _scatter(rng, names)
    words["noun"] = f"{asked} shapes" if asked in COLOURS else f"{asked}s"
    words["counted"] = _join(_plural(n, k) for k, n in shapes.items())
    words["matching"] = _join(_plural(n, k) for k, n in shapes.items() if k in matching)
    return Draft("count", choices, answer, {"shapes": shapes, "asked": asked}, words, objects)


def _compare(rng):
    kinds, answer = _pick(rng, KINDS, rng.choice((2, 2, 3)))
    best = rng.randint(2, 7 - len(kinds))
    counts = [best if i == answer else rng.randint(1, best - 1) for i in range(len(kinds))]
    shapes = dict(zip(kinds, counts, strict=True))
    names = [k for k, n in shapes.items() for _ in range(n)]
    rng.shuffle(names)
    objects, words = _scatter(rng, names)
    words["either"] = " or more ".join(f"{k}s" for k in kinds)
    words["counted"] = _join(_plural(n, k) for k, n in shapes.items())
    words |= {"best": best, "are": "is" if counts[0] == 1 else "are"}
    choices, kind = [f"{k}s" for k in kinds], "more" if len(kinds) == 2 else "most"
    return Draft(kind, choices, answer, {"shapes": shapes}, words, objects)


def _level(cup, ml):
    """The y of a line of the scale; `cup` is the box of the cup, handle included."""
    return cup[3] - ml / 100 * (cup[3] - cup[1]) / 5.7


def _cup(rng):
    levels, answer = _pick(rng, range(100, 600, 100), 4)
    body, handle, height = rng.randint(44, 52), 24, round(5.7 * rng.uniform(14, 17))
    # A line of the grid passes between the centre of the water and that of the cup with its
    # handle: they never share a cell, whatever the level, so the level cannot skew the layout.
    x0 = round(CELL * rng.choice((2, 3)) - body / 2 - rng.uniform(1.5, handle / 2 - 1.5))
    y0 = rng.randint(8, 24)
    cup = (x0, y0, x0 + body + handle, y0 + height)
    water = (x0, round(_level(cup, levels[answer])), x0 + body, cup[3])
    objects = [("water", water), ("cup", cup)]
    return Draft("cup", [f"{v} ml" for v in levels], answer, {"level": levels[answer]}, {}, objects)


def _bars(rng):
    kind = rng.choice(("tallest", "shortest", "height"))
    colours, answer = _pick(rng, COLOURS, rng.choice((3, 4)))
    choices, asked = colours, colours[answer]
    others = [c for c in colours if c != asked]
    if kind == "height":
        choices, answer = _pick(rng, range(1, 6), 4)
        rest = [h for h in range(1, 6) if h != choices[answer]]
        heights = [choices[answer], *rng.sample(rest, len(others))]
    else:
        heights = sorted(rng.sample(range(1, 6), len(colours)), reverse=kind == "tallest")
    bars = list(zip([asked, *others], heights, strict=True))
    rng.shuffle(bars)  # from left to right
    facts = {"bars": dict(bars)} | ({"asked": asked} if kind == "height" else {})
    words = {"n": len(bars), "top": heights[0], "present": rng.choice(colours)}
    words["counted"] = _join(f"{c} {h}" for c, h in bars)
    words["each"] = _join(f"a {c} bar up to line {h}" for c, h in bars)
    step = 24 if len(bars) == 4 else rng.randint(24, 30)  # above CELL: a column of the grid each
    unit, width = rng.uniform(15.5, 18), rng.randint(14, 18)
    x, base = rng.randint(14, 22), rng.randint(106, 118)
    objects = [
        (f"{c} bar", (x + 5 + i * step, round(base - h * unit), x + 5 + i * step + width, base))
        for i, (c, h) in enumerate(bars)
    ]
    chart = (x, base - 5 * unit, x + 4 + len(bars) * step, base)
    return Draft(kind, choices, answer, facts, words, objects, chart)


def _groups(rng):
    pairs = [(g, k) for g in range(1, 5) for k in range(2, 5)]
    kind = rng.choice(("total", "product"))
    if kind == "total":
        choices, answer = _pick(rng, sorted({g * k for g, k in pairs}), 4)
        g, k = rng.choice([p for p in pairs if p[0] * p[1] == choices[answer]])
    else:
        choices, answer = _pick(rng, pairs, rng.choice((3, 4)))
        (g, k), choices = choices[answer], [f"{a} x {b}" for a, b in choices]
    size, name = rng.randint(36, 44), f"ring of {k} dots"
    centres = rng.sample([(34, 34), (94, 34), (34, 94), (94, 94)], g)
    objects = [_object(name, *(v + rng.randint(-8, 8) for v in c), size) for c in centres]
    words = {"counted": _plural(g, "ring"), "each": _join([f"a {name}"] * g)}
    return Draft(kind, choices, answer, {"rings": g, "dots": k}, words, objects)


def _chain(rng):
    kind = rng.choice(("eats", "eaten", "top"))
    *choices, asked = rng.sample(SPECIES, 4 if kind == "top" else 3)
    answer = rng.randrange(len(choices))
    right, others = choices[answer], [c for i, c in enumerate(choices) if i != answer]
    if kind == "top":
        chain = [*rng.sample(others, 2), right]
    else:  # food and eater are next to each other, the third comes before or after them
        pair = [right, asked] if kind == "eats" else [asked, right]
        chain = rng.choice(([*others, *pair], [*pair, *others]))
    arrow = rng.choice(("left", "right"))
    order = chain if arrow == "right" else chain[::-1]
    names = [order[0], f"arrow {arrow}", order[1], f"arrow {arrow}", order[2]]
    x, y, size = rng.randint(15, 17), rng.randint(20, 104), rng.randint(23, 26)
    objects = []
    for i, name in enumerate(names):  # centres 24 pixels apart: a column of the grid each
        w, h = (16, 12) if name.startswith("arrow") else (size, size)
        objects.append(_object(name, x + 24 * i, y + rng.randint(-5, 5), w, h))
    facts = {"order": order, "arrow": arrow} | ({} if kind == "top" else {"asked": asked})
    words = {"start": chain[0], "middle": chain[1], "counted": _join(order)}
    words["each"] = _join(f"an {n}" if n.startswith("arrow") else n for n in names)
    words["present"] = rng.choice(chain)
    words["absent"] = rng.choice([s for s in SPECIES if s not in chain])
    return Draft(kind, choices, answer, facts, words, objects)


def _position(rng):
    kind = rng.choice(("side", "end"))
    if kind == "side":
        choices, answer = _pick(rng, ("left", "right"), 2)
        a, b, other = rng.sample(KINDS, 3)
        order = [a, b] if choices[answer] == "left" else [b, a]
        order.insert(rng.randrange(3), other)
        asked = words = {"a": a, "b": b}
    else:
        choices, answer = _pick(rng, KINDS, 3)
        asked, words = rng.choice(("left", "right")), {}
        order = rng.sample([c for c in choices if c != choices[answer]], 2)
        order.insert(0 if asked == "left" else 2, choices[answer])
    columns = sorted(rng.sample(range(GRID), 3))
    objects, shared = _scatter(rng, order, [(column, rng.randrange(GRID)) for column in columns])
    words = words | shared | {"counted": _join(order)}
    return Draft(kind, choices, answer, {"order": order, "asked": asked}, words, objects)


def _text(rng):
    if rng.random() < 0.5:
        groups, answer = _pick(rng, WORDS, 3)
        choices = [rng.choice(WORDS[g]) for g in groups]
        pairs = dict(zip(choices, groups, strict=True))
        words = {"each": " ".join(f"{w.capitalize()} is {g}." for w, g in pairs.items())}
        return Draft("word", choices, answer, {"words": pairs, "asked": groups[answer]}, words)
    choices, answer = _pick(rng, range(2, 10), 4)
    x = rng.randint(1, choices[answer] - 1)
    blocks = dict(zip(rng.sample(COLOURS, 2), (x, choices[answer] - x), strict=True))
    words = {"x": x, "y": choices[answer] - x}
    words["counted"] = _join(_plural(n, f"{c} block") for c, n in blocks.items())
    return Draft("sum", choices, answer, {"name": rng.choice(NAMES), "blocks": blocks}, words)


DRAFT = {"magnets": _magnets, "count": _count, "compare": _compare, "cup": _cup, "bars": _bars,
         "groups": _groups, "chain": _chain, "position": _position, "text": _text}  # fmt: skip
FAMILIES = tuple(DRAFT)


# ---- drawing: boxes come in pixels and are scaled up; the picture is reduced at the end ---------

# fmt: off
INK, WHITE, LEAF, BEAK = (50, 50, 56), (250, 250, 250), (70, 170, 60), (245, 170, 30)
FUR, PINK, FOX, SEA = (150, 150, 160), (240, 170, 180), (232, 120, 36), (40, 170, 190)
SKY, SHELL, SKIN = (140, 80, 190), (150, 90, 50), (222, 190, 130)
# Animals as (method of ImageDraw, colour, points in fractions of the box).
PICTOGRAMS = {
    "grass": [("polygon", LEAF, p) for p in (
        (.1, 1, 0, .25, .3, 1), (.25, 1, .3, 0, .5, 1), (.4, 1, .55, .15, .65, 1),
        (.55, 1, .85, .05, .8, 1), (.7, 1, 1, .4, .95, 1))],
    "rabbit": [("ellipse", FUR, (0, .5, .75, 1)), ("ellipse", FUR, (.5, .3, 1, .75)),
               ("ellipse", FUR, (.5, 0, .68, .5)), ("ellipse", FUR, (.74, 0, .92, .5)),
               ("ellipse", PINK, (.55, .08, .63, .4)), ("ellipse", PINK, (.79, .08, .87, .4)),
               ("ellipse", WHITE, (0, .65, .18, .85)), ("ellipse", INK, (.8, .45, .88, .53))],
    "fox": [("polygon", FOX, (.02, 0, .4, .3, .05, .55)),
            ("polygon", FOX, (.98, 0, .6, .3, .95, .55)),
            ("polygon", FOX, (.05, .35, .95, .35, .5, 1)),
            ("polygon", WHITE, (.08, .42, .36, .52, .48, .95)),
            ("polygon", WHITE, (.92, .42, .64, .52, .52, .95)),
            ("ellipse", INK, (.28, .42, .38, .52)), ("ellipse", INK, (.62, .42, .72, .52)),
            ("ellipse", INK, (.42, .84, .58, 1))],
    "fish": [("polygon", SEA, (0, .2, .35, .5, 0, .8)), ("ellipse", SEA, (.2, .2, 1, .8)),
             ("polygon", SEA, (.45, .25, .6, 0, .75, .25)),
             ("polygon", SEA, (.45, .75, .6, 1, .7, .75)),
             ("ellipse", WHITE, (.72, .34, .9, .52)), ("ellipse", INK, (.78, .4, .86, .48))],
    "bird": [("polygon", BEAK, (.8, .15, 1, .27, .8, .38)),
             ("line", INK, (.42, .75, .42, 1)), ("line", INK, (.58, .75, .58, 1)),
             ("polygon", SKY, (0, .35, .3, .5, .15, .7)), ("ellipse", SKY, (.1, .3, .8, .85)),
             ("ellipse", SKY, (.5, 0, .9, .45)), ("ellipse", WHITE, (.25, .42, .6, .68)),
             ("ellipse", INK, (.7, .14, .78, .22))],
    "snail": [("ellipse", SKIN, (0, .72, 1, 1)), ("ellipse", SKIN, (.75, .4, 1, .95)),
              ("line", INK, (.82, .45, .76, .12)), ("line", INK, (.92, .45, .98, .12)),
              ("ellipse", SHELL, (.05, .1, .78, .88)), ("ellipse", SKIN, (.19, .26, .63, .73)),
              ("ellipse", SHELL, (.3, .38, .52, .61))],
}
# fmt: on


@cache
def _font(size):
    return ImageFont.load_default(size * SCALE)


def _tint(rng, rgb, by=14):
    return tuple(min(255, max(0, v + rng.randint(-by, by))) for v in rgb)


def _magnet(draw, rng, name, box, line):
    x0, y0, x1, y1 = box
    middle = (x0 + x1) / 2
    poles = "NS" if name == MAGNETS["NS"] else "SN"
    for pole, a, b in zip(poles, (x0, middle), (middle, x1), strict=True):
        fill = _tint(rng, RGB["red" if pole == "N" else "blue"])
        draw.rectangle((a, y0, b, y1), fill, INK, line)
        draw.text(((a + b) / 2, (y0 + y1) / 2), pole, WHITE, _font(12), anchor="mm")


def _shape(draw, rng, name, box, line):
    x0, y0, x1, y1 = box
    colour, shape = name.split()
    fill = _tint(rng, RGB[colour])
    if shape == "circle":
        draw.ellipse(box, fill, INK, line)
    elif shape == "triangle":
        draw.polygon(((x0, y1), (x1, y1), ((x0 + x1) / 2, y0)), fill, INK, line)
    else:  # a square or a bar
        draw.rectangle(box, fill, INK, line)


def _water(draw, rng, name, box, line):
    draw.rectangle(box, _tint(rng, (120, 190, 240)))


def _measure(draw, rng, name, box, line):
    x0, y0, x1, y1 = box
    body, h = x1 - 24 * SCALE, y1 - y0
    draw.arc((body - 20 * SCALE, y0 + h / 6, x1, y0 + 3 * h / 4), -90, 90, INK, 4 * SCALE)
    draw.line((x0, y0, x0, y1, body, y1, body, y0), INK, line + 1)
    for ml in range(100, 600, 100):
        y = _level(box, ml)
        draw.line((x0, y, x0 + 12 * SCALE, y), INK, line)
        draw.text((x0 + 15 * SCALE, y), str(ml), INK, _font(10), anchor="lm")


def _axes(draw, box, line):
    x0, y0, x1, y1 = box
    for i in range(6):
        y = y1 - i * (y1 - y0) / 5
        draw.line((x0, y, x1, y), (176, 176, 184), 1)
        draw.text((x0 - 3 * SCALE, y), str(i), INK, _font(10), anchor="rm")
    draw.line((x0, y0, x0, y1, x1, y1), INK, line)


def _ring(draw, rng, name, box, line):
    x0, y0, x1, y1 = box
    draw.ellipse(box, None, INK, line)
    k, turn, r = int(name.split()[2]), rng.uniform(0, math.tau), rng.randint(4, 5) * SCALE
    for i in range(k):
        angle, reach = turn + math.tau * i / k, (x1 - x0) / 4.2
        x = (x0 + x1) / 2 + math.cos(angle) * reach
        y = (y0 + y1) / 2 + math.sin(angle) * reach
        draw.ellipse((x - r, y - r, x + r, y + r), _tint(rng, RGB["blue"], 30))


def _arrow(draw, rng, name, box, line):
    x0, y0, x1, y1 = box
    tail, tip = (x0, x1) if name == "arrow right" else (x1, x0)
    y, neck = (y0 + y1) / 2, (tail + tip) / 2
    draw.line((tail, y, neck, y), INK, (2 + line) * SCALE)
    draw.polygon(((neck, y0), (neck, y1), (tip, y)), INK)


def _pictogram(draw, rng, name, box, line):
    x0, y0, x1, y1 = box
    shift = rng.randint(-12, 12)
    for method, rgb, points in PICTOGRAMS[name]:
        xy = [
            p * (y1 - y0) + y0 if i % 2 else p * (x1 - x0) + x0  # x and y take turns
            for i, p in enumerate(points)
        ]
        fill = INK if rgb == INK else tuple(min(255, v + shift) for v in rgb)
        getattr(draw, method)(xy, fill, **({"width": line + 1} if method == "line" else {}))


PAINTERS = {"magnet": _magnet, "ring": _ring, "arrow": _arrow, "cup": _measure, "water": _water}
PAINTERS |= dict.fromkeys(SPECIES, _pictogram) | dict.fromkeys(COLOURS, _shape)


def _render(rng, draft):
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), _tint(rng, (246, 245, 240), 8))
    draw, line = ImageDraw.Draw(image), rng.randint(2, 3)
    if draft.chart:
        _axes(draw, [v * SCALE for v in draft.chart], line)
    for name, box in draft.objects:
        PAINTERS[name.split()[0]](draw, rng, name, [v * SCALE for v in box], line)
    return image.reduce(SCALE)


# ---- the benchmark -----------------------------------------------------------------------------


def _split_of(draft):
    """The split a picture belongs to, by what it shows and where, not by seed or question."""
    content = sorted(draft.objects) or {k: v for k, v in draft.facts.items() if k != "asked"}
    text = json.dumps(content, sort_keys=True)
    bucket = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) % 20
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def _caption(rng, topic):
    roll = rng.random()
    detail = topic.wrong if roll < 0.15 else topic.true if roll < 0.5 else ""
    return f"{rng.choice(topic.caption.split(' | '))} {detail}".strip()


def problem(family, split, seed, index):
    """Problem `index` of a family in a split: a Scene, the same one each time.

    Raises ValueError for an unknown family or split, and for a held-out family outside test."""
    if family not in FAMILIES or split not in SPLITS:
        raise ValueError(f"No family {family!r} with split {split!r}: {FAMILIES}, {tuple(SPLITS)}.")
    if family in HELD_OUT and split != "test":
        raise ValueError(f"Family {family!r} is held out: ask for split 'test', not {split!r}.")
    rng = random.Random(f"{family}/{split}/{seed}/{index}")
    draft = DRAFT[family](rng)
    while _split_of(draft) != split:
        draft = DRAFT[family](rng)
    return _scene(rng, family, split, draft)


def _scene(rng, family, split, draft):
    """Word and draw a draft."""
    topic = TOPICS[draft.kind if family == "text" else family]
    choices = [str(c) for c in draft.choices]
    facts = {"family": family, "kind": draft.kind, **draft.facts, "answer": choices[draft.answer]}

    def say(template):
        return rng.choice(template.split(" | ")).format(**facts | draft.words)

    question, solution = map(say, PHRASES[draft.kind])
    image = _render(rng, draft) if draft.objects else None
    hint = say(topic.hint) if image is None or rng.random() < 0.25 else ""
    record = {
        "question": question, "choices": choices, "answer": draft.answer, "hint": hint,
        "image": "image.png" if image else None, "task": "closed choice",
        "grade": f"grade{rng.randint(*topic.grades)}", "subject": topic.subject, "topic": family,
        "category": draft.kind, "skill": topic.skill, "lecture": topic.lecture,
        "solution": solution, "split": split, "family": family,  # the last key is not ScienceQA's
    }  # fmt: skip
    caption = say(_caption(rng, topic)) if image else ""
    return Scene(record, image, caption, facts, draft.objects, say(topic.description))


def write(folder, sizes=SIZES, seed=0):
    """Write a benchmark in ScienceQA's layout; the families take turns within a split.

    problems.json, pid_splits.json, captions.json, images/{split}/{pid}/image.png as published, and
    scenes.json: pid -> facts. The folder appears whole or not at all. Raises FileExistsError."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _fill(temporary, sizes, seed)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder, sizes, seed):
    problems, captions, scenes, splits = {}, {}, {}, {}
    for split, size in sizes.items():
        families = [f for f in FAMILIES if split == "test" or f not in HELD_OUT]
        pids = splits[split] = [str(len(problems) + 1 + i) for i in range(size)]
        splits[f"mini{split}"] = pids[: max(1, size // 10)]
        for i, pid in enumerate(pids):
            scene = problem(families[i % len(families)], split, seed, i)
            problems[pid], scenes[pid] = scene.record, scene.facts
            if scene.image:
                captions[pid] = scene.caption
                path = folder / "images" / split / pid / "image.png"
                path.parent.mkdir(parents=True)
                scene.image.save(path, compress_level=1)
    tables = {"problems": problems, "pid_splits": splits, "captions": {"captions": captions}}
    for name, table in (tables | {"scenes": scenes}).items():
        (folder / f"{name}.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
