"""The demo's sentences: topics, questions, solutions, lectures, hints, descriptions and captions.

`TOPICS` has the constant part of a family of demo/scenes.py, `PHRASES` question and solution of
each kind. All are templates: " | " separates paraphrases, and {words} come from the scene. The
fields of a topic are those of ScienceQA's records (arXiv 2209.09513), with a description of the
image. demo/judge.py can decide every sentence.
"""

from collections.abc import Iterable
from typing import NamedTuple


def plural(n: int, noun: str) -> str:
    """1 red circle, 2 red circles."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def joined(items: Iterable[str], last: str = " and ") -> str:
    """Items in a row: a, b and c."""
    *most, end = items
    return ", ".join(most) + last + end if most else end


class Topic(NamedTuple):
    """The constant part of a family."""

    subject: str
    grades: tuple  # first and last
    skill: str
    lecture: str
    hint: str  # with an image: general knowledge, for one problem in four
    description: str = ""
    caption: str = ""
    true: str = ""  # details the caption may add
    wrong: str = ""


# fmt: off
NAT = "natural science"
SOC = "social science"
LAN = "language science"
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
