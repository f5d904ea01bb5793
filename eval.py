"""Scoring: from what a model said to a table somebody else can check.

Implements
* the answer extraction and the categories of ScienceQA (Lu et al. 2022, arXiv 2209.09513) as
  Multimodal-CoT (Zhang et al. 2023, arXiv 2302.00923) reports them;
* sentence BLEU without smoothing (Papineni et al. 2002) and summary-level ROUGE-L (Lin 2004) in the
  set-based form of the PyPI package `rouge` 1.0.1, both as those authors call them;
* the Wilson (1927) interval of every accuracy, with n and chance beside it; of two runs the paired
  bootstrap interval of the difference (Efron 1979) and McNemar's exact test (1947);
* why answers fail and succeed: pali_reason's kinds by rule (see `kind`), and Multimodal-CoT's test
  for hallucinated rationales wherever the scene behind a picture is known;
* decoding: `predict` turns problems into predictions with a run's models, `evaluate` into a table;
  of PaliGemma with a budget for the rationale, a stop for loops, a forced "Answer:" and the vote of
  several samples (self-consistency, Wang et al. 2022, arXiv 2203.11171);
* what the models looked at (`looks`): gates, attention, token probabilities, of a second pass.

Two rules. A response that cannot be read is a failure, counted and shown, never a guess (the
original's guess is there to be compared with: `--faithful-parse`). A score is about a named set of
problems: missing, unknown and repeated predictions are errors.

Left out: sentence-embedding similarity, which needs one more model to say what ROUGE-L says.

Axes: B pictures or rows, H W S pixels, P I image positions, F D their width; T tokens, U of them
written, n of them with a map, K x G heads, L classes, `resamples` of a bootstrap.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

import data
import fusion
import lora
from model import DETR, PaliGemma, of_all_ranks, rank, resolve, stored_tensors, world
from support import files, pictures
from support.choices import LETTERS
from support.features import Features, cached_features, published_features
from support.tokenizing import load_tokenizer, plain_ids
from support.traces import load_traces

CUE = "Answer:"  # what PaliGemma's last line begins with
ANSWER = re.compile(r"The answer is \(([A-Z])\)")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
AXES = {  # MathVista's, or your own: key of the record, what its rows are called
    "task": "task", "context": "context", "skills": "skill", "answer_type": "answer type",
    "question_type": "question type", "source": "source", "category": "category",
    "language": "language", "grade": "grade",
}  # fmt: skip
PLAIN = ("task", "context", "skills")  # in MathVista's layout their rows have no prefix
DETAILS = ("question type", "source", "category", "language", "grade")  # only with --all-rows
LOOKS = 24  # problems whose looks are kept
GUESS_SEED, GUESS_LETTERS = 42, "ABCDE"  # the original's, however many choices a problem has
OTHER_ROWS = {  # key of the metrics, or the way to it: what its row is called
    "parse_failures": "parse failures %", "rougeL": "ROUGE-L", "bleu1": "BLEU-1", "bleu4": "BLEU-4",
    "consistency": "rationale agrees %", "rationale_words mean": "rationale words",
    "loop_share": "words in loops %", "hallucination false_rationales": "false rationales %",
    "hallucination false_facts": "false facts %",
}  # fmt: skip


# --- one answer
@dataclass(frozen=True)
class Grade:
    """`parsed`: the answer in its `normal` form (a letter where there are choices), None if none
    could be read. `how` it was read, or why not:

    letter, choice text, nearest choice, number, list, text: said as the answer, that is behind
        "Answer:" or "the answer is", in a box, in a conclusion, or as all of a line
    the same + " in prose": in some sentence of the reply; these are the first to doubt
    no answer found, several answers, letter not among the options, no such choice: failed parses
    + "; guessed X": what the original scorers make of a failed parse (--faithful-parse)
    """

    correct: bool
    parsed: str | None
    how: str


# The forms that text takes, before anything is looked for in it.
MARKS = str.maketrans("۰۱۲۳۴۵۶۷۸۹٠١٢٣٤٥٦٧٨٩٫٬−–—’‘⁄、", "01234567890123456789.,---''/,")
LATEX = [(re.compile(a), b) for a, b in (
    (r"\\(?:left|right|displaystyle|quad|[,;:! ])", " "), (r"\{,\}", ","),
    (r"\\(?:text|math|operatorname|mbox)[a-z]*\s*\{([^{}]*)\}", r"\1"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\(?:degree|circ)\b", "°"),
    (r"(?:\\sqrt|√)\s*\{\s*([^{}]*?)\s*\}", r"√\1"),
    (r"\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\1/\2"),
    (r"\\(?:times|cdot)\b", "×"), (r"\\pi\b", "π"), (r"\\approx\b", "≈"), (r"\\([%$#&_])", r"\1"),
    (r"\\f?box(?:ed)?\s*\{([^{}]*)\}", r"⟦\1⟧"), (r"\\[()\[\]]", ""),
)]  # fmt: skip
CHOICES = re.compile(  # the list of them, told again line by line
    r"^[ \t]*\(?A[).:].*\n\s*\(?B[).:].*(?:\n\s*\(?[C-J][).:].*)*", re.MULTILINE)  # fmt: skip
MARKDOWN = re.compile(r"\*\*|__|`+|\$|^[ \t]*(?:[-*#>]+|\d+[.)])[ \t]+(?=\S)", re.MULTILINE)
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=。)|\n")
STOP = re.compile(r"\n|⟧|[。;]|[.!?](?=\s|$)")
# Where a text says its answer, or comes to one, and what it says there.
SAYS = re.compile(
    r"""\b(?:answer|ans|(?:correct|right|best|final|closest)\s(?:option|choice))\b
        (?:\s(?:letter|value|choice|option))? (?:\s(?:to|for|of)\b[^.:\n()]{0,90}?)? \s*
        (?:\b(?:is|was|(?:would|should|must|will|may|might|could)\sbe)\b
             (?:\s(?:therefore|thus|then))?[\s:]*
         | [:=]+ | -(?=\s) | (?<=answer)\n)
      | (?:答案|正确选项|[故应]?选[项择]?) \s*(?:应该是|是|为)? \s*:?
      | (?:پاسخ|جواب|گزینه) (?:\s(?:نهایی|صحیح|درست))? \s*:?
      | (?=(?:\([A-Z]\)|\boption\s[A-Z]\b) [^.\n()]{0,60}?
           \sis\s(?:the\s)?(?:correct|right|best|answer)\b)""",
    re.IGNORECASE | re.VERBOSE,
)
CONCLUDES = re.compile(
    r"(?:^|(?<=[.!?] ))[ \t]*(?:(?:and|but) )?(?:therefore|thus|so|hence|in conclusion|overall|"
    r"consequently|finally|∴|因此|所以|故|بنابراین)(?![a-z])",
    re.IGNORECASE | re.MULTILINE)  # fmt: skip
LETTER = re.compile(
    r"(?!N/A)(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)[\s:]\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)|([a-z])(?=$|[.)])|"
    r"([A-Z])(?=$|\s*[).:,;/&]|\s-|\s(?:because|since|as|is|and|or)\b))")  # fmt: skip
ANOTHER = re.compile(r"\s*(?:,?\s*(?:and|or)\b|[,&/])\s*\(?([A-Z])(?:\)|(?=$|\s*[.,;]))")
NAMED = re.compile(r"(?:\(|\b[Oo]ption )([A-Z])\b")
AMOUNT = re.compile(  # 1,200  -3.5  .5  6×10^4  1e-3  3√2/2  2/3π
    r"(?<![\w.])([-+]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+)?"
    r"(?:\s?×\s?10\s?\^\s?\{?([-+]?\d+)\}?|e([-+]?\d+)\b)?\s?(?:√\(?(\d+(?:\.\d+)?)\)?)?"
    r"\s?(π)?(?:\s?/\s?(\d+(?:\.\d+)?))?\s?(π)?", re.ASCII)  # fmt: skip
OPENS = re.compile(  # with a number within four words, and no operator behind it
    r"\s*(?:[^\W\d]+\s){0,3}[-+]?[\d.,]+(?![\d.,]*\s*[-+×÷*/=≈√^])")  # fmt: skip
FINAL = ("several answers", "no such choice", "letter not among the options")  # of an answer given
ASKS = re.compile(r"(?:how many|which|what) (?!is|are|was|were|do)(\w+)", re.IGNORECASE)
IS = re.compile(r"\b(?:is|are|was|were|be) (?:[a-z]+ ){0,2}(-?[\d,]*\.?\d+)")
VERB = re.compile(r"\b(?:is|are|was|were|has|have|be)\b")
DENIES = re.compile(r"\b(?:not|no|neither|nor|cannot)\b|n't\b", re.IGNORECASE)
REFUSES = re.compile(r"\b(?:sorry|cannot|can't|unable|impossible|not possible)\b", re.IGNORECASE)
LITTLE = set("a an the this there of in on at to by for that than is are was were be do does did "
             "has have can would and or".split())  # fmt: skip
YES_NO = ("yes", "no", "true", "false")
WORDS = {w: float(i) for i, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty".split())}  # fmt: skip


def plain(text):
    """Without LaTeX and Markdown, with ASCII digits; what stood in a \\boxed{} is in ⟦⟧."""
    text = "\n".join(x for x in text.splitlines() if " | " not in x)  # no tables
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda m: "^" + m[0], text)
    text = unicodedata.normalize("NFKC", text).translate(MARKS)
    if "\\" in text or "√" in text:
        for pattern, instead in LATEX:
            text = pattern.sub(instead, text)
    return CHOICES.sub("", MARKDOWN.sub("", text))


def squash(text):
    """What two spellings of one answer have in common."""
    return " ".join(re.sub(r"[*^{}⟦⟧]", "", text).split()).strip(" .()[]\"',:;").casefold()


@lru_cache(maxsize=4096)
def squashed(texts):
    return [squash(plain(text)) for text in texts]


@lru_cache(maxsize=4096)
def amounts(text):
    """The numbers of a plain text, in their order: 1,200, -3.5, 6×10^4, 3√2/2, 2π/3, .5."""
    found = []
    for m in AMOUNT.finditer(text):
        number, *power, root, pi, under, also_pi = m.groups()
        if number or root or pi:
            value = float((number or "1").replace(",", "").replace(" ", ""))
            try:
                value *= 10.0 ** int(power[0] or power[1] or 0) / float(under or 1)
                value *= math.sqrt(float(root or 1)) * (math.pi if pi or also_pi else 1)
            except (OverflowError, ValueError, ZeroDivisionError):
                continue
            found += [value] if math.isfinite(value) else []
    return found


def asks_for(problem):
    """choice | integer | float | list | number | text: what the answer is to be; where the record
    has no answer_type, the gold answer tells."""
    kind = "choice" if problem.choices else problem.meta.get("answer_type")
    if kind in ("choice", "integer", "float", "list", "text"):
        return kind
    gold = plain(problem.answer).strip()
    return "number" if gold and AMOUNT.fullmatch(gold) else "text"


def rounded(problem, value):
    """A number as the official scorer compares it: a float at the record's precision; an integer
    only if it is one."""
    if asks_for(problem) == "float":
        return str(round(value, int(problem.meta.get("precision") or 2)))
    return str(int(value)) if value.is_integer() else f"{value:.9g}"


def normal(problem, answer):
    """One form for all spellings of an answer, so that two can be compared: a letter where there
    are choices (a letter comes before a choice of that text), else a number, a list or a text."""
    read = (pick if problem.choices else value)(problem, plain(answer))
    return squash(plain(answer)) if read[0] is None else read[0]


def right(problem, parsed):
    """Is an answer in its normal form the gold one? Of choices with one text MathVista takes any,
    and ScienceQA the one with the right index."""
    if not problem.choices:
        return parsed == normal(problem, problem.answer)
    index = problem.meta.get("answer_index")
    if index is None or "answer_type" in problem.meta:
        choices = dict(zip(LETTERS, problem.choices, strict=False))
        return choices.get(parsed) == problem.answer
    return parsed == LETTERS[index]


def pick(problem, said, trust=2):
    """(letter or None, how): the choice that a short plain text names. With a trust below 2 it was
    not said as the answer: then a list of letters is none, nor is what a "not" may be about."""
    letters, why = LETTERS[: len(problem.choices)], "no answer found"
    said = said.strip(" \n\t.*\"':⟦⟧")
    named = set(NAMED.findall(said)) & set(letters)
    if trust < 2 and len(named) > 1:
        return None, "several answers"
    if m := LETTER.match(said):
        letter = (m[1] or m[2] or m[3]).upper()
        other = ANOTHER.match(said, m.end())
        if letter in letters:
            several = other and other[1] != letter and other[1] in letters
            return (None, "several answers") if several else (letter, "letter")
        why = "letter not among the options"
    if not named:
        texts, denied = squashed(problem.choices), trust < 2 and DENIES.search(said)
        for how, find in (("choice text", mentioned), ("nearest choice", nearest)):
            hits = [i for i in find(texts, squash(said)) if not denied or texts[i] in YES_NO]
            if len({texts[i] for i in hits}) == 1:
                return letters[hits[0]], how
            if hits:
                return None, "several answers"
        if amounts(said) and all(map(amounts, texts)):
            return None, "no such choice"
        ends = re.findall(r"(?<![\w'/])([A-Z])(?=$|,? and | or )", said) if trust == 2 else ()
        named = set(ends) & set(letters)
    if named:
        return (named.pop(), "letter") if len(named) == 1 else (None, "several answers")
    return None, why


def mentioned(texts, said):
    """Positions of the choices whose words, or whose number, a text names; not those that are only
    a part of another that it names. A program's True is a yes."""
    said = {"true": "yes", "false": "no"}.get(said, said) if "yes" in texts else said
    if said in texts:
        return [texts.index(said)]
    tail = re.split("[=≈]", said)[-1]
    said, hits = tail if amounts(tail) else said, []
    for i, text in enumerate(texts):
        inside = rf"(?a)(?<![\w.,/√^-]){re.escape(text)}(?![\w/√^]|[.,]\d)"
        if text in YES_NO:  # "there are no cubes" is no answer
            inside = rf"(?a)^{text}\b|(?:\b(?:is|be|was)|[,:]) {text}$"
        if text in said and (len(text) > 1 or text.isdigit()) and re.search(inside, said):
            hits.append(i)
    hits = [i for i in hits if not any(texts[i] in texts[j] for j in hits if texts[i] != texts[j])]
    found = {round(x, 6) for x in amounts(said)}
    same = [i for i, t in enumerate(texts) if {round(x, 6) for x in amounts(t)} == found]
    return hits or (same if found else [])


def nearest(texts, said):
    """Positions of the choices that a text is but for rounding, or a slip of the pen."""
    values, numbers = amounts(said), [amounts(t) for t in texts]
    if any(numbers):
        pairs = [(i, *x, *values) for i, x in enumerate(numbers) if len(x) == len(values) == 1]
        return [i for i, x, y in pairs if math.isclose(x, y, rel_tol=0.01)]
    slips = [len(t) // 5 for t in texts]
    close = [abs(len(said) - len(t)) <= most for t, most in zip(texts, slips, strict=True)]
    hits = [i for i, t in enumerate(texts) if close[i]]  # and, before the slow look, by letters
    hits = [i for i in hits if (Counter(said) - Counter(texts[i])).total() <= slips[i]]
    return [i for i in hits if distance(said, texts[i]) <= slips[i]]


def distance(a, b):
    """Levenshtein's: how many characters to put in, take out or change."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def value(problem, said, trust=2):
    """(parsed or None, how): the number, list or text that a short plain text names. Of several
    numbers the first, if the text opens with it as the answer, else see `last_of`."""
    kind, found = asks_for(problem), amounts(said)
    if kind == "list":
        inside = re.findall(r"\[([^\[\]]*)\]", said)
        found = amounts(inside[-1]) if inside else found
        told = ", ".join(f"{x:.9g}" for x in found) if inside or len(found) > 1 else None
        return (None, "no answer found") if told is None else (f"[{told}]", "list")
    if trust < 2 or not OPENS.match(said):
        found = last_of(problem, said, trust)
    if kind == "integer" and not found:
        words = re.sub(r"\b(are|is|were|have) no\b", r"\1 zero", said.casefold())
        found = [WORDS[w] for w in re.findall(r"[a-z]+", words) if w in WORDS]
    if kind != "text" and found:
        return rounded(problem, found[0 if trust == 2 else -1]), "number"
    told = squash(said) if trust == 2 and kind in ("number", "text") else ""
    return (told, "text") if told else (None, "no answer found")


def last_of(problem, said, trust):
    """[the number that a sentence ends in], or []: of those behind the last "=" the ones that the
    question does not have; of these rather one of the kind asked for, of the things asked for, or
    behind an "is"."""
    question, tail = plain(problem.question), amounts(re.split("[=≈]", said)[-1])
    if trust == 1 and re.search("[=≈]", said) and len(tail) > 1:
        return []  # a sum not yet made
    found = tail or amounts(said)
    found = [x for x in found if x not in amounts(question)] or (found if trust != 1 else [])
    whole = asks_for(problem) == "integer"
    found = [x for x in found if x.is_integer() == whole] or found
    things = [*ASKS.findall(question), str(problem.meta.get("unit"))]
    thing = "|".join(map(re.escape, things))
    for rather in (rf"(?<![\d.,])(\d+) (?:{thing})\b", rf"\b(?:{thing}) (\d+)", IS):
        these = [x for m in re.findall(rather, said) for x in amounts(m)]
        found = [x for x in found if x in these] or found
    return found[-1:]


def commits(text, sentences=("",)):
    """[(firm, trust, said)]: what a plain text says as its answer, the last first. Trust 2: behind
    words for it, or in a box; 1: a conclusion, or an equation if those are the last numbers.
    `firm`: in words, or in the very last sentence. said: None if the text ends before it."""
    end, last = text.rfind(sentences[-1]), next((x for x in sentences[:-4:-1] if amounts(x)), "")
    found = [(m.start(), m.end(), True, 2) for m in SAYS.finditer(text)]
    found += [(m.start(), m.end(), m.start() >= end, 2) for m in re.finditer("⟦", text)]
    found += [(m.start(), m.start(), m.start() >= end, 1) for m in CONCLUDES.finditer(text)]
    found += [(text.rfind(last), text.rfind(last), False, 1)] if re.search("[=≈]", last) else []
    for _, start, firm, trust in sorted(found, reverse=True):
        rest = text[start : start + 1000].lstrip(" \n\t:⟦")
        yield firm, trust, STOP.split(rest, maxsplit=1)[0] if squash(rest) else None


def implied(problem, sentences):
    """("A", "choice text") where one of the last two sentences has all words of a yes or no
    question, so that a "not" decides; (None, ...) without one."""
    asked = set(re.findall(r"\w+", problem.question.casefold())) - LITTLE
    texts = squashed(problem.choices)
    for x in sentences[:-3:-1] if sorted(texts) == ["no", "yes"] else ():
        if asked <= set(re.findall(r"\w+", x.casefold())) and "question" not in x.casefold():
            word = ("yes", "no")[len(DENIES.findall(x)) % 2]
            return LETTERS[texts.index(word)], "choice text"
    return None, "no answer found"


def by_likeness(problem, sentences):
    """Sentences with numbers first, then those most like the last one of the question; the end of
    a text of more than eight comes before that."""
    *_, asks = [x for x in SENTENCE.split(problem.question) if squash(x)] or [""]
    asked = set(re.findall(r"\w+", asks.casefold()))
    likeness = {x: len(asked & set(re.findall(r"\w+", x.casefold()))) for x in sentences[::-1]}
    likeness |= {x: math.inf for x in sentences[-2:] if len(sentences) > 8}
    return sorted(likeness, key=lambda x: (not amounts(x), -likeness[x]))


def commitment(problem, text, prose=False):
    """(parsed or None, how): the last answer in a text. Where there are choices, one in words or by
    letter comes before one that is only computed, unless the text ends in that; a line of four
    words at most may be all answer. Else the last sentences, and with `prose` all, are searched,
    those most like the question first."""
    text, read = plain(text), pick if problem.choices else value
    lines = [x for x in text.splitlines() if squash(x)]
    sentences = [x for x in SENTENCE.split(text) if squash(x)]
    said = list(commits(text, sentences or [""]))
    if not sentences or said and said[0][2] is None:
        return None, "no answer found"
    last, first = (
        [(False, 2, x) for x in x if len(x.split()) < 5 and not (VERB.search(x) or SAYS.search(x))]
        for x in ((lines[-1], sentences[-1]), (lines[0], sentences[0]))
    )
    reads = [(firm, *read(problem, x, trust)) for firm, trust, x in [*last, *said, *first]]
    if problem.choices:
        reads.sort(key=lambda x: not (x[0] or x[2] == "letter") or x[2] == "no such choice")
    for firm, parsed, how in reads:
        if parsed is not None or firm and how in FINAL:
            return parsed, how
    if REFUSES.search(sentences[0]):
        return None, "no answer found"
    told = by_likeness(problem, sentences if prose else sentences[-3:])
    found = [read(problem, x, 0) for x in told] + [implied(problem, sentences)]
    if len({parsed for parsed, how in found if how == "letter"}) > 1:
        return None, "several answers"
    for parsed, how in sorted(found, key=lambda x: x[1] != "letter"):
        if parsed is not None:
            return parsed, f"{how} in prose"
    if prose and asks_for(problem) in ("number", "text"):
        return squash(lines[-1]), "text in prose"
    whys = [how for *_, how in reads + found if how in FINAL]
    return None, whys[0] if whys else "no answer found"


def committed(problem, text):
    """(parsed, how): the last answer that any text commits to (see `Grade`), in its normal form, or
    None. Sentences that only mention an answer commit to nothing."""
    parsed, how = commitment(problem, text)
    return None if parsed is None or how.endswith("in prose") else (parsed, how)


def agrees(problem, rationale, response):
    """Is the rationale's own last answer the response's? None if one of them has none. What the
    rationale's last sentences only mention may confirm an answer, but not contradict it."""
    (ours, how), (theirs, _) = commitment(problem, rationale), commitment(problem, response, True)
    if ours is None or theirs is None:
        return None
    return ours == theirs or (None if how.endswith("in prose") else False)


def published(problem, response):
    """(letter or None, how) by ScienceQA's rule: exactly one "The answer is (X)", X among the
    choices. Ours: without one, or with an "Answer:" behind it, what follows the last "Answer:", or
    the whole response, if it is a letter or the text of one choice."""
    options, letters = LETTERS[: len(problem.choices)], ANSWER.findall(response)
    if letters and response.rfind(CUE) < [m.start() for m in ANSWER.finditer(response)][-1]:
        if len(letters) == 1 and letters[0] in options:
            return letters[0], "letter"
        return None, ("letter not among the options", "several answers")[len(letters) > 1]
    said, *texts = (" ".join(x.split()).strip(" .()").casefold()
                    for x in (response.rpartition(CUE)[2], *problem.choices))  # fmt: skip
    for how, names in (("letter", list(options.casefold())), ("choice text", texts)):
        if names.count(said) == 1:
            return options[names.index(said)], how
    return None, "no answer found"


def grade(problem, response, guess=None):
    """Grade one response: `published` of choices as in ScienceQA; of MathVista's problems, whose
    records say their answer_type, and of those without choices, the `commitment`, prose included.

    `guess` gives the original scorers' verdict where there are choices. ScienceQA's: exactly one
    "The answer is (A-E)", or one of A-E drawn from this random.Random(42), in prediction order.
    MathVista's: of an unreadable reply the choice nearest to it in edit distance.
    """
    official = "answer_type" in problem.meta
    if guess is None or official or not problem.choices:
        strict = problem.choices and not official
        read = published(problem, response) if strict else commitment(problem, response, True)
        if read[0] is not None or guess is None or not problem.choices:
            return Grade(read[0] is not None and right(problem, read[0]), *read)
        said = next((x for *_, x in commits(plain(response)) if x), response.strip())
        steps = [distance(said[:200], choice) for choice in problem.choices]
        drawn, why = LETTERS[steps.index(min(steps))], read[1]
    else:
        letters = ANSWER.findall(response)
        if len(letters) == 1 and letters[0] in GUESS_LETTERS:
            return Grade(right(problem, letters[0]), letters[0], "letter")
        whys = ("no answer found", "letter not among the options", "several answers")
        drawn, why = guess.choice(GUESS_LETTERS), whys[min(len(letters), 2)]
    return Grade(right(problem, drawn), None, f"{why}; guessed {drawn}")


# --- one rationale
def bleu(candidate, reference, n):
    """Sentence BLEU-n in 0..1 with uniform weights; tokens end at white space and full stops. An
    order without a match counts as the smallest positive float (as in nltk): BLEU-4 of three words
    is next to 0 even if they are the right ones. Without a common word it is 0."""
    said, gold = ([t for t in re.split(r"[\s.]", x) if t] for x in (candidate, reference))
    logs = []
    for order in range(1, n + 1):
        grams = (zip(*(x[i:] for i in range(order)), strict=False) for x in (said, gold))
        ours, theirs = map(Counter, grams)
        hits = sum(min(count, theirs[gram]) for gram, count in ours.items() if gram in theirs)
        if not hits and order == 1:
            return 0.0
        logs.append(math.log(hits / ours.total() if hits else sys.float_info.min))
    brevity = 1.0 if len(said) > len(gold) else math.exp(1 - len(gold) / len(said))
    return brevity * math.exp(math.fsum(x / n for x in logs))


def lcs_words(x, places):
    """The words, as a set, of one longest common subsequence of the word list x and a second, y.

    `places` maps each word of y to its positions, last first. Hunt and Szymanski (1977): ends[k] is
    where the shortest prefix of y ends that has k+1 words in common with x so far; only matching
    pairs cost. Going up from the last row, a word is taken if it stands where that prefix ends: the
    same choice among equals as walking back the full table and shortening y first.
    """
    ends, rows = [], []
    for word in x:
        if word in places:
            for j in places[word]:
                k = bisect_left(ends, j)
                ends[k : k + 1] = [j]
            rows.append((word, ends.copy()))
    found, k = set(), len(ends) - 1
    for word, ends_then in reversed(rows):
        if k >= 0 and ends_then[k] in places[word]:
            found.add(word)
            k -= 1
    return found


def rouge_l(candidate, reference):
    """Summary-level ROUGE-L F in 0..1, equal to `rouge` 1.0.1 in the authors' call.

    Its peculiarities are kept: sentences end at every full stop, the longest common subsequences of
    all pairs of sentences join in one *set* of words, and lengths count distinct words (a blank
    sentence has the word ""). A text without a sentence scores 0; the package raises.
    """
    texts = ([s for s in text.split(".") if s] for text in (candidate, reference))
    said, gold = ([" ".join(s.split()).split(" ") for s in sentences] for sentences in texts)
    if not said or not gold:
        return 0.0
    common, words = set(), [set(ours) for ours in said]
    for theirs in gold:
        places = {}
        for j in reversed(range(len(theirs))):
            places.setdefault(theirs[j], []).append(j)
        for ours, distinct in zip(said, words, strict=True):
            if not common >= places.keys() & distinct:  # else it cannot add a word
                common |= lcs_words(ours, places)
    precision, recall = (len(common) / len(set().union(*x)) for x in (said, gold))
    return 2.0 * precision * recall / (precision + recall + 1e-8)


# --- why answers fail and succeed
KINDS = ("sound", "lucky", "novel", "right", "right thought, wrong answer", "loop", "nonsense",
         "cut off", "no parse", "wrong")  # fmt: skip
COMMON = frozenset(  # words that do not tell what a text is about
    "a an the of to in on at is are was were be been it its this that these those and or but not "
    "no so as by for from with what who which how many much more most there here than then you "
    "your do does did has have had will would can could should one some other let me first look "
    "show shown word answer question image picture user solution because".split()
)


def kind(problem, prediction, grade, facts=None, known=None):
    """Why an answer is right or wrong: (one of KINDS, the evidence in words).

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
    kept = "concludes" in prediction  # by `explained`
    end = prediction["concludes"] if kept else concluded(problem, thought, facts)
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
    return next((name, why) for name, why in rules.items() if why)


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
        scene, thought = (facts or {}).get(p.id), thought_of(x)
        x = x | ({"concludes": concluded(p, thought, scene)} if thought else {})
        name, why = kind(p, x, g, scene, known)
        told.append((p, x | {"kind": name, "because": why}, g))
    return told


def refine(graded, spec, cache):
    """`explained` answers, their kinds corrected by a judge who is shown the picture, a
    `teacher.py --judge` SPEC; its verdicts are kept in the JSONL file `cache`. The judge is asked
    about thoughts, and believed where it finds right what the rule finds right."""
    import teacher  # imports eval

    rows = [i for i, (_, x, _) in enumerate(graded) if thought_of(x) and x["kind"] not in
            ("loop", "cut off", "no parse")]  # fmt: skip
    graded, items = list(graded), []
    for p, x, g in (graded[i] for i in rows):
        letter = LETTERS.find(g.parsed) if p.choices and g.parsed else -1
        items.append((p, thought_of(x), x["response"] if letter < 0 else p.choices[letter]))
    for i, verdict in zip(rows, teacher.judge_many(items, spec, cache), strict=True):
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


def rationale_quality(graded, facts=None):
    """Of `explained` answers {"failure_modes": {kind: n}}; of their thoughts {"consistency": of the
    "n_consistency" that come to an answer those that give it, "rationale_words": {"mean",
    "median"}, "loop_share" of all words, "hallucination"?: see there}; rates in percent."""
    kinds = Counter(x["kind"] for _, x, _ in graded if "kind" in x)
    found = {name: kinds[name] for name in KINDS if name in kinds}
    found = {"failure_modes": found} if kinds else {}
    told = [(p, g, thought) for p, x, g in graded if (thought := thought_of(x))]
    if not told:
        return found
    ends = [(x["concludes"], g.parsed) for _, x, g in graded if x.get("concludes")]
    same = [end == parsed for end, parsed in ends if parsed is not None]
    words = [re.findall(r"\w+", thought) for *_, thought in told]
    looped, counts = sum(len(x) - len(before_loop(x)) for x in words), [len(x) for x in words]
    if same:
        found |= {"consistency": percent(sum(same) / len(same)), "n_consistency": len(same)}
    length = {"mean": round(float(np.mean(counts)), 1), "median": float(np.median(counts))}
    found |= {"rationale_words": length, "loop_share": percent(looped / max(1, sum(counts)))}
    return found | ({"hallucination": hallucination(told, facts)} if facts else {})


def hallucination(told, facts):
    """The paper's test (its section 3) by rule, over all thoughts and those with right and wrong
    answers: "n" thoughts with "stated" facts; percent of thoughts with a false one, of facts."""

    def rates(rows):
        said = [so for row in rows for _, so in row]
        lies = sum(any(not so for _, so in row) for row in rows)
        shares = {"false_rationales": percent(lies / max(1, len(rows)))}
        shares["false_facts"] = percent(said.count(False) / max(1, len(said)))
        return {"n": len(rows), "stated": len(said)} | shares

    rows = [(g.correct, stated(thought, facts.get(p.id))) for p, g, thought in told]
    by = {"right": [row for ok, row in rows if ok], "wrong": [row for ok, row in rows if not ok]}
    return rates([row for _, row in rows]) | {name: rates(rows) for name, rows in by.items()}


# --- many
def percent(share):
    return round(100.0 * share, 2)


def wilson(hits, n, z=1.959963984540054):
    """95 % Wilson score interval of hits / n, in percent: it stays inside 0..100, and does not
    shrink to nothing when all answers, or none, are right."""
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return [percent(max(0.0, centre - half)), percent(min(1.0, centre + half))]


def axes(problem):
    """{axis: the table rows a problem counts in}.

    ScienceQA: subject; TXT has a hint, IMG a picture *of the question* (pictures of the choices do
    not count, as published), NO neither; grades. The demo's family is a row as well. MathVista: its
    task, context and skills by their own names, the others as "source: TQA"; rows of different axes
    never share a name. Your own JSONL: whatever it has of both, all AXES with that prefix.
    """
    meta, found = problem.meta, {}
    mathvista = isinstance(meta.get("skills"), list)
    subject = SUBJECTS.get(str(meta.get("subject")))
    if not mathvista:
        has_image = meta.get("has_image", problem.image is not None)
        kinds = {"TXT": problem.hint, "IMG": has_image, "NO": not problem.hint and not has_image}
        year = re.fullmatch(r"grade(\d+)", str(meta.get("grade")))
        years = ["G1-6" if int(year[1]) <= 6 else "G7-12"] if year else []
        found = {"subject": [subject] if subject else [], "years": years}
        found["modality"] = [name for name, counts in kinds.items() if counts]
        found["family"] = [str(meta["family"])] if meta.get("family") else []
    for key, axis in () if subject else AXES.items():
        values = meta.get(key) if isinstance(meta.get(key), list) else [meta.get(key)]
        before = "" if mathvista and key in PLAIN else f"{axis}: "
        found[axis] = [before + x for x in dict.fromkeys(values) if isinstance(x, str) and x]
    return found


def categories(problem):
    return [name for names in axes(problem).values() for name in names]


def grade_all(problems, predictions, faithful=False, partial=False):
    """[(problem, prediction, Grade)] in prediction order. Raises ValueError on repeated, unknown
    and (unless `partial`) missing ids. `faithful`: with the original's guesses."""
    by_id = {p.id: p for p in problems}
    times = Counter(x["id"] for x in predictions)
    missing = [] if partial and times else by_id.keys() - times
    for fault, ids in (
        ("prediction ids are there more than once", [i for i in times if times[i] > 1]),
        ("prediction ids are of no problem here, check --data and --split", times.keys() - by_id),
        ("problems have no prediction (--partial scores the others)", missing),
    ):
        if ids:
            some = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
            raise ValueError(f"{len(ids)} {fault}: {some} (there are {len(by_id)} problems).")
    guess = random.Random(GUESS_SEED) if faithful else None
    pairs = [(by_id[x["id"]], x) for x in predictions]
    return [(p, x, grade(p, x["response"], guess)) for p, x in pairs]


def tally(graded):
    """n, accuracy, its interval and chance; rates in percent, None where there is nothing."""
    n, hits = len(graded), sum(g.correct for *_, g in graded)
    luck = sum(1 / len(p.choices) for p, *_ in graded if p.choices)
    rates = (percent(hits / n), wilson(hits, n), percent(luck / n)) if n else (None, None, None)
    return dict(zip(("n", "accuracy", "ci95", "chance"), (n, *rates), strict=True))


def rationale_scores(graded, rationale_format, faithful=False):
    """Mean ROUGE-L and BLEU in percent of the rationales against the gold target of their stage; {}
    without rationales. Empty targets do not count. An empty rationale scores 0, but the original
    (`faithful`) leaves it out of ROUGE-L."""
    told = [(x["rationale"], p) for p, x, _ in graded if x.get("rationale") is not None]
    if rationale_format is None:  # a teacher's thought has another form than the gold solution
        return {}
    pairs = [(said, data.prompt(p, rationale_format)[1].strip()) for said, p in told]
    pairs = [(said, gold) for said, gold in pairs if gold]
    if not pairs or not any(p.lecture or p.solution for _, p in told):
        return {}
    rouge = [rouge_l(*pair) for pair in pairs if pair[0] or not faithful]
    means = {f"bleu{n}": sum(bleu(*pair, n) for pair in pairs) / len(pairs) for n in (1, 4)}
    means = {"rougeL": sum(rouge) / max(1, len(rouge))} | means
    return {"n_rationales": len(pairs)} | {name: percent(mean) for name, mean in means.items()}


def metrics(problems, predictions, faithful=False, rationale_format="QCM-LE", partial=False):
    """Score predictions (dicts {"id", "response", "rationale"?, "stop"?}) of exactly these problems
    (`partial`: of some of them). See `metrics_of`; ValueError: see `grade_all`."""
    graded = explained(grade_all(problems, predictions, faithful, partial))
    return metrics_of(graded, faithful, rationale_format)


def metrics_of(graded, faithful=False, rationale_format="QCM-LE", facts=None):
    """The table's numbers of `explained` grades; rates are percentages with two decimals.

    Returns {"n", "accuracy": {"avg", "NAT", ...}, "ci95": [low, high], "chance", "parse_failures",
    "n_rationales"?, "rougeL"?, "bleu1"?, "bleu4"?, what `rationale_quality` says, "families"?,
    "axes"?: {axis: its rows}, "stop"?, "n_by", "ci95_by", "chance_by"}; a category without problems
    is None.
    """
    found = rows_by_axis(graded)
    families = found.pop("family", {})
    details = {axis: found.pop(axis) for axis in AXES.values() if axis in found}
    scienceqa = {name: items for rows in found.values() for name, items in rows.items()}
    groups = {"avg": graded} | {name: scienceqa.get(name, []) for name in CATEGORIES if scienceqa}
    for rows in (families, *details.values()):
        groups |= rows
    by = {name: tally(items) for name, items in groups.items()}
    rates = {name: by[name]["accuracy"] for name in by}
    stops = Counter(x["stop"] for _, x, _ in graded if x.get("stop"))
    return {
        "n": len(graded),
        "accuracy": {name: rate for name, rate in rates.items() if name not in families},
        "ci95": by["avg"]["ci95"],
        "chance": by["avg"]["chance"],
        "parse_failures": percent(sum(g.parsed is None for *_, g in graded) / len(graded)),
        **rationale_scores(graded, rationale_format, faithful),
        **rationale_quality(graded, facts),
        **({"families": {name: rates[name] for name in sorted(families)}} if families else {}),
        **({"axes": {axis: list(rows) for axis, rows in details.items()}} if details else {}),
        **({"stop": dict(sorted(stops.items()))} if stops else {}),
        **{f"{k}_by": {name: t[k] for name, t in by.items()} for k in ("n", "ci95", "chance")},
    }


def rows_by_axis(graded):
    """{axis: {row: its graded}}, the rows of AXES by name: for task and skill the paper's order."""
    found = {}
    for item in graded:
        for axis, names in axes(item[0]).items():
            for name in names:
                found.setdefault(axis, {}).setdefault(name, []).append(item)
    return {a: dict(sorted(x.items())) if a in AXES.values() else x for a, x in found.items()}


def compare(graded_a, graded_b, resamples=10_000, seed=0):
    """Is b better than a, on the problems that both answered? Lists as of `grade_all`.

    Returns {"n", "difference" (b - a, in points), "ci95": [low, high] in points, "better" (only b
    is right), "worse" (only a), "p"}. ci95: paired bootstrap over problems, percentiles. As a
    resampled difference depends only on how often better and worse problems were drawn, these
    counts are drawn at once, from the multinomial distribution they have. p: McNemar's exact test.
    Raises ValueError if they have no problem in common, or if problems of the same id are
    different ones.
    """
    first = {p.id: (p, g.correct) for p, _, g in graded_a}
    common = [(*first[p.id], p, g.correct) for p, _, g in graded_b if p.id in first]
    unlike = [p.id for p, _, q, _ in common if (p.question, p.answer) != (q.question, q.answer)]
    if unlike:
        some = ", ".join(unlike[:5]) + (", ..." if len(unlike) > 5 else "")
        raise ValueError(f"{len(unlike)} problems of the same id are different ones ({some})")
    if not common:
        raise ValueError("they have no problem in common")
    n = len(common)
    better = sum(b and not a for _, a, _, b in common)
    worse = sum(a and not b for _, a, _, b in common)
    shares = [better / n, worse / n, (n - better - worse) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, resamples)  # (resamples, 3)
    ends = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5]).tolist()
    said = {"difference": percent((better - worse) / n), "ci95": [percent(x) for x in ends]}
    return {"n": n} | said | {"better": better, "worse": worse, "p": mcnemar(better, worse)}


def mcnemar(better, worse):
    """Two-sided: how often a fair coin thrown so many times is at least as lopsided."""
    throws, ways, total = better + worse, 1, 0
    for k in range(min(better, worse) + 1):  # ways: throws over k. Integers: exact, no overflow
        total += ways
        ways = ways * (throws - k) // (k + 1)
    return min(1.0, 2 * total / 2**throws)


# --- files and tables
def read_predictions(path, problems=()):
    """Predictions of a JSONL file, of MathVista's {pid: {"response"}} or of the released code's
    predictions_ans_*.json. Raises ValueError naming the line, the problem or the position."""
    content = files.regular_file(path).read_bytes()
    try:
        whole = files.parsed(content)
    except ValueError:  # several lines, as it should be
        whole = None
    if isinstance(whole, dict) and "preds" in whole:
        return in_split_order(path, whole["preds"], whole.get("labels", []), problems)
    if isinstance(whole, dict) and whole and all(isinstance(x, dict) for x in whole.values()):
        told = [(f"problem {pid}", {"id": pid} | picked(x)) for pid, x in whole.items()]
    else:
        told = [(where.removeprefix(f"{path}, "), x) for where, x in files.json_lines(path)]
    for where, x in told:
        if isinstance(x, dict) and type(x.get("id")) is int:
            x["id"] = str(x["id"])
        texts = {"id": str, "response": str, "rationale": str | None, "stop": str | None}
        for key, kinds in texts.items():
            if not isinstance(x, dict) or not isinstance(x.get(key), kinds):
                found = f"found {json.dumps(x, ensure_ascii=False)[:60]}"
                raise ValueError(f'{path}, {where}: "{key}" must be a string; {found}.')
    return [x for _, x in told]


def picked(record):
    """What of MathVista's official record is the model's: the rest is the problem."""
    return {key: record[key] for key in ("response", "rationale") if key in record}


def in_split_order(path, preds, labels, problems):
    """The released code's list without ids, matched to problems by position. Where its labels are
    answers they must be the gold ones, else the split or the order is another."""
    if len(preds) != len(problems):
        found = f"{len(preds)} predictions without ids, for {len(problems)} problems"
        raise ValueError(f"{path} lists {found}; it needs the complete split in its own order.")
    for p, label in zip(problems, labels, strict=False):
        if ANSWER.search(label) and not grade(p, label).correct:
            found = f"{label!r} as the label of problem {p.id}, which has another answer"
            raise ValueError(f"{path} has {found}; it is of another split, or in another order.")
    return [{"id": p.id, "response": said} for p, said in zip(problems, preds, strict=True)]


def write_graded(folder, graded, scores):
    """Write metrics.json and predictions.jsonl, with "correct", "parsed", "how", "kind" and its
    "because"."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "predictions.jsonl.part"  # what took hours to decode is never half there
    with open(part, "w", encoding="utf-8") as file:
        for _, x, g in graded:
            file.write(json.dumps(x | asdict(g), ensure_ascii=False) + "\n")
    more = folder / "metrics.json.part"
    more.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for file in (part, more):
        try:
            file.replace(file.with_suffix(""))
        except IsADirectoryError:
            raise ValueError(f"{file.with_suffix('')} is a folder: remove it.") from None


def about(where, split, rationale_format, faithful=False):
    """What metrics are of: they say so in metrics.json and at the head of the table."""
    of = {"data": str(where), "split": split, "rationale_format": rationale_format}
    return of | ({"faithful_parse": True} if faithful else {})


def assess(graded, of, config=None, judge=None, cache=None):
    """(metrics, graded with kinds) of what `grade_all` gives: the one way, whether it was decoded
    just now, before, or elsewhere. `of`: see `about`; `config`: of the run, if it is one's."""
    facts = scene_facts(of["data"])
    graded = explained(graded, facts, known_types(config) if config else None)
    if judge:
        graded = refine(graded, judge, cache)
    scores = metrics_of(graded, "faithful_parse" in of, of["rationale_format"], facts)
    return scores | of, graded


def heading(m):
    """Data set and split in words, "" where they are not known."""
    guessed = ", guessing where no answer was found" if m.get("faithful_parse") else ""
    return f"{Path(m['data']).name or m['data']}, {m['split']}{guessed}" if "data" in m else ""


def table(columns, markdown=False, all_rows=False):
    """Runs side by side, {name: metrics} -> text: accuracies with their 95 % interval, n and chance
    at the head of the row. Runs over different problems cannot share those: a table each, with data
    set and split above it. `all_rows`: those of the axes DETAILS as well."""
    texts, hidden = [], {}
    for m in columns.values():
        found = m.get("axes", {})
        hidden |= {axis: found[axis] for axis in DETAILS if axis in found and not all_rows}
    for title, block in same_problems(columns):
        rows = rows_of(block, {name for names in hidden.values() for name in names})
        texts += [title] * bool(title) + [align(rows, markdown)]
    if hidden:
        texts.append(f"(--all-rows: {sum(map(len, hidden.values()))} more, by {', '.join(hidden)})")
    return "\n\n".join(texts)


def same_problems(columns):
    """[(title, {name: metrics})]: columns that can share a table."""
    blocks = {}
    for name, m in columns.items():
        key = heading(m), json.dumps([m["n_by"], m["chance_by"]])
        blocks.setdefault(key, {})[name] = m
    return [(title, block) for (title, _), block in blocks.items()]


def rows_of(block, hidden=()):
    """The rows of one table, as lists of strings; those of AXES below the axis' name."""
    runs = list(block.values())
    names = [name if len(name) <= 20 else ".." + name[-18:] for name in block]
    rows, above = [["accuracy %", "n", "chance", *names]], None
    axis_of = {name: axis for axis, found in runs[0].get("axes", {}).items() for name in found}
    for name, n in runs[0]["n_by"].items():
        if not n or name in hidden:
            continue
        rates = [(m["accuracy"] | m.get("families", {}))[name] for m in runs]
        cis = [", ".join(f"{end:.2f}" for end in m["ci95_by"][name]) for m in runs]
        cells = [f"{rate:.2f} [{ci}]" for rate, ci in zip(rates, cis, strict=True)]
        if (axis := axis_of.get(name)) != above:
            rows.append([f"by {axis}", *[""] * (2 + len(runs))])
        above, label = axis, "  " * bool(axis) + name.removeprefix(f"{axis}: ")[:27]
        rows.append([label, str(n), f"{runs[0]['chance_by'][name]:.2f}", *cells])
    return rows + [[label, "", "", *cells] for label, *cells in more_rows(runs)]


def more_rows(runs):
    """What else the metrics of these runs have, [label, a cell for each]: text scores, stops, and
    how answers succeed and fail."""
    rows = []
    for way, label in OTHER_ROWS.items():
        found = list(runs)
        for key in way.split():
            found = [m and m.get(key) for m in found]
        if any(x is not None for x in found):
            rows.append([label, *("-" if x is None else f"{x:.2f}" for x in found)])
    for stop in sorted({stop for m in runs for stop in m.get("stop", {})} - {"eos"}):
        shares = [percent(m.get("stop", {}).get(stop, 0) / m["n"]) for m in runs]
        rows.append([f"stopped by {stop} %", *(f"{x:.2f}" for x in shares)])
    lost = [m.get("skipped", {}) for m in runs]
    for split in dict.fromkeys(split for found in lost for split in found if found[split]):
        rows.append([f"skipped, {split}", *(str(found.get(split, 0)) for found in lost)])
    if any(lost):  # the least the accuracy can be
        asked = [m["n"] + m.get("skipped", {}).get(m.get("split"), 0) for m in runs]
        rates = [m["accuracy"]["avg"] * m["n"] / n for m, n in zip(runs, asked, strict=True)]
        if asked != [m["n"] for m in runs]:
            rows.append(["avg, skipped as wrong", *(f"{rate:.2f}" for rate in rates)])
    kinds = [m.get("failure_modes", {}) for m in runs]
    rows += [["answers in %", *[""] * len(runs)]] * any(kinds)
    for kind in [kind for kind in KINDS if any(kind in found for found in kinds)]:
        counts = [(found.get(kind, 0), m["n"]) for found, m in zip(kinds, runs, strict=True)]
        rows.append([f"  {kind}", *(f"{percent(c / n):.2f} ({c})" for c, n in counts)])
    return rows


def align(rows, markdown):
    """Rows as text in columns, or as a markdown table; the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    rows = [[pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(rows):
    """Many runs on the same problems, a line each: {name: metrics} -> text. Of two-stage runs the
    ROUGE-L of the decoded rationales, and beside it what teacher forcing would have claimed; of
    PaliGemma's how many texts did not end by themselves."""
    first = next(iter(rows.values()))
    columns = {"run": {name: name for name in rows} | {"chance": "chance"}}
    for key, title in (("rougeL", "ROUGE-L"), ("rougeL_teacher_forced", "teacher-forced")):
        columns[title] = {name: f"{m[key]:.2f}" for name, m in rows.items() if key in m}
    columns["accuracy %"] = {name: f"{m['accuracy']['avg']:.2f}" for name, m in rows.items()}
    columns["accuracy %"]["chance"] = f"{first['chance']:.2f}"
    interval = "{:.2f} - {:.2f}".format
    columns["95 % interval"] = {name: interval(*m["ci95"]) for name, m in rows.items()}
    columns["no answer %"] = {name: f"{m['parse_failures']:.2f}" for name, m in rows.items()}
    for stop in ("loop", "length", "forced"):
        shares = {
            name: percent(m.get("stop", {}).get(stop, 0) / m["n"]) for name, m in rows.items()
        }
        columns[f"{stop} %"] = {
            name: f"{x:.2f}" for name, x in shares.items() if any(shares.values())
        }
    columns = {title: cells for title, cells in columns.items() if cells}
    lines = [[column.get(name, "-") for column in columns.values()] for name in ["chance", *rows]]
    title = f"{heading(first)}: n = {first['n']} problems".removeprefix(": ")
    if lost := first.get("skipped", {}).get(first.get("split")):
        title += f", {lost} skipped"
    return f"{title}\n\n{align([list(columns), *lines], False)}"


@dataclass
class Column:
    """A run, or a file of predictions, as a column of the table."""

    scores: dict
    graded: list | None = None  # None: its problems are not at hand
    folder: Path | None = None  # that has just this; None: what is shown was not written


def differences(columns):
    """({name: what `compare` says of that column against the first}, the same in words). Columns
    that cannot be compared are left out of the first, and the words say why."""
    (first, a), *others = columns.items()
    compared, words = {}, []
    for name, b in others:
        try:
            if a.graded is None or b.graded is None:
                raise ValueError("the problems are not at hand")
            compared[name] = c = compare(a.graded, b.graded)
            words.append(f"{name} - {first}: {difference(c, a, b)}")
        except ValueError as error:
            words.append(f"{name} - {first}: not compared, {error}")
    return compared, "\n".join(words)


def difference(c, a, b):
    """`compare`'s word on the columns a and b, in words. Never silent on different splits."""
    points = "{:+.2f} points [{:.2f}, {:.2f}]".format(c["difference"], *c["ci95"])
    p = f"= {c['p']:.3f}" if c["p"] >= 0.001 else "< 0.001"
    n = f"n = {c['n']}"
    if c["n"] < max(len(a.graded), len(b.graded)):
        n += ", those that both answered"
    if heading(a.scores) != heading(b.scores):
        n += f"; {heading(b.scores)} against {heading(a.scores)}"
    return f"{points}, {c['better']} better, {c['worse']} worse, McNemar p {p} ({n})"


# --- decoding a run
def bad_records(config):
    """The list that a run's bad records go to with --on-error skip; None: the first is an error."""
    return [] if config.get("on_error") == "skip" else None


def image_features(config, problems, model=None, skipped=None):
    """The run's `Features` for these problems, or None if it looks at no pictures.

    Published feature files are used as they are. Otherwise DETR is loaded only if a picture is not
    in the cache, and sees one size at a time: padding would change its output. A PaliGemma `model`
    makes its own, projected; they are not kept where its image tower is trained or adapted. With a
    list `skipped`, problems whose picture cannot be used go there, as (id, reason).
    """
    inside = [p.startswith("language_model.") for p in lora.adapters(model)] if model else []
    if model is not None and (config["full"] or not all(inside)):
        side, tokens = model.config.vision.image_size, model.config.image_tokens
        if skipped is not None:
            skipped += pictures.unusable(problems, pictures.open_image)
        return pictures.Pictures(problems, side, tokens)
    if model is None and config["vision"] != "detr":
        return None
    if model is None and config["features"]:
        return published_features(config["features"], config["name_map"])
    folder = resolve(config["weights"][0] if model else config["vision_weights"])
    fingerprint = checkpoint_hash(folder) + (f"-{dtype_name(model)}" if model else "")
    extract, pixels, size = eyes(config, model)
    cache = config["features_cache"] or files.cache_folder() / "features" / f"{fingerprint}-{size}"
    return cached_features(problems, extract, fingerprint, size, cache, pixels, skipped)


def eyes(config, model=None):
    """(list of pixels -> list of features, picture -> pixels, size): PaliGemma's own, or DETR's."""
    if model is not None:
        return paligemma_extractor(model), pictures.siglip_pixels, model.config.vision.image_size
    extract = feature_extractor(resolve(config["vision_weights"]), config["device"])
    return extract, pictures.detr_pixels, config["image_size"]


def dtype_name(model):
    return str(model.language_model.embed_tokens.weight.dtype).removeprefix("torch.")


def paligemma_extractor(model):
    """list of (3, S, S) -> list of (I, D), projected: what takes the places of <image> tokens."""

    @torch.inference_mode()
    def extract(pixels):
        device = model.multi_modal_projector.linear.weight.device
        stacked = torch.stack(pixels).to(device)  # (B, 3, S, S)
        return list(model.image_features(stacked).float().cpu())

    return extract


def checkpoint_hash(folder):
    """Twelve hex digits over the weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted({path for path, _ in stored_tensors(folder).values()}):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def feature_extractor(folder, device):
    """list of (3, H, W) -> list of (P, F), the model loaded at the first call."""
    loaded = []

    @torch.inference_mode()
    def extract(pixels):
        if not loaded:
            model = DETR.from_pretrained(folder).to(device, memory_format=torch.channels_last)
            loaded.append(model)
        made = [None] * len(pixels)
        sizes = Counter(tuple(p.shape) for p in pixels)
        for size in sizes:
            rows = [i for i, p in enumerate(pixels) if tuple(p.shape) == size]
            stacked = torch.stack([pixels[i] for i in rows]).to(device)  # (B, 3, H, W)
            for i, features in zip(rows, loaded[0].features(stacked).cpu(), strict=True):
                made[i] = features  # (P, F)
        return made

    return extract


def in_batches(examples, batch_size, label, collate=data.collate, dealt=True):
    """Collated batches of like lengths, with progress on a terminal as they are used up. Under
    torchrun those of this process (see `model.of_all_ranks`), unless they are not to be dealt."""
    start, done = time.monotonic(), 0
    order = data.batches([len(e["input_ids"]) for e in examples], batch_size)
    order = order[rank() :: world()] if dealt else order
    total = sum(map(len, order))
    for rows in order:
        yield collate([examples[i] for i in rows])
        done += len(rows)
        if total > 1:
            files.progress(label, done, total, start)


def gist(tensor, block=16384):
    """Bytes that tell trained weights apart: the sum, as 64-bit integers, of each 16 KiB, and what
    is left over. It is made where the tensor is, at the memory's speed; SHA-256 of all bytes of a
    3B model takes ten seconds, at every evaluation, and nobody here is out to deceive."""
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:  # as some tensors of a mapped file begin
        flat = flat.clone()
    step = block // flat.element_size()
    whole = len(flat) // step * step
    sums = flat[:whole].view(torch.int64).view(-1, block // 8).sum(1)
    return b"".join(bytes(t.cpu().view(torch.uint8).numpy()) for t in (sums, flat[whole:]))


class Part:
    """predictions.part.jsonl: the batches that are decoded already, a line each, so that who was
    interrupted goes on where he was. A batch is known by the weights, by how it is decoded and by
    its ids: what another model left behind is never taken for this one's, and the result is, to
    the bit, that of decoding at once. A torn last line is dropped. Under torchrun each process
    writes a file of its own, and reads all."""

    def __init__(self, folder, models):
        name = f"predictions.part{rank() or ''}.jsonl"
        self.path, self.done = Path(folder) / name, {}
        digest = hashlib.sha256()
        for model in models:
            for tensor in model.state_dict().values():
                digest.update(gist(tensor))
        self.models = digest.hexdigest()
        for path in Path(folder).glob("predictions.part*.jsonl"):
            whole, lines = 0, path.read_bytes().splitlines(keepends=True)
            for line in lines:
                try:
                    key, told = json.loads(line)
                except (ValueError, TypeError):
                    break
                self.done[key], whole = told, whole + len(line) * line.endswith(b"\n")
            if lines and path == self.path:
                os.truncate(path, whole)

    def batch(self, what, decode, *given):
        """What `decode(*given)` returns, a dict fit for JSON; from the file if that has it. `what`
        says which batch it is, and how it is decoded."""
        key = hashlib.sha256(json.dumps([self.models, what]).encode()).hexdigest()
        if key not in self.done:
            self.done[key] = decode(*given)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.done[key]]) + "\n")
        return self.done[key]

    def remove(self):
        for path in self.path.parent.glob("predictions.part*.jsonl"):
            path.unlink()


def predict(models, problems, config, tokenizer, features, on_token=None):
    """Decode problems with a run's models: one, or rationale and answer. Predictions in order; of
    PaliGemma with their "ids". `on_token` is as in `model.decode`, and hears no votes. With a
    `Part` as config["part"], batches that it has are not decoded again."""
    if config["model"] == "paligemma":
        return paligemma_predict(models[0], problems, config, tokenizer, features, on_token)
    formats = fusion.RECIPES[config["recipe"]]
    lengths, how = config["max_output"], {"on_token": on_token, "part": config.get("part")}

    def make_batches(generated=None):
        fmt = formats[0] if generated is None else formats[-1]
        examples = data.examples(problems, fmt, tokenizer, features, generated, config)
        return in_batches(examples, config["eval_batch_size"], f"{fmt} decoded")

    if len(formats) == 2:
        limits = (lengths[0], lengths[-1])
        told = fusion.two_stage(*models, make_batches, tokenizer, limits, **how)
    else:
        texts = fusion.write(models[0], make_batches(), tokenizer, lengths[0], **how)
        told = {i: {"response": t.pop("text")} | t for i, t in texts.items()}
    return [{"id": p.id} | told[p.id] for p in problems]


# --- decoding PaliGemma: rationale and answer in one text
def paligemma_predict(model, problems, config, tokenizer, features, on_token=None):
    """Predictions in order. With config["samples"] > 1 each is the first of several sampled texts
    that gives the answer most of them give (self-consistency, arXiv 2203.11171); "votes" has all.
    A text without a readable answer has no vote."""
    if config["samples"] == 1:
        how = (config["temperature"], config["seed"], on_token)
        told = paligemma_write(model, problems, config, tokenizer, features, *how)
        return [{"id": p.id} | told[p.id] for p in problems]
    runs = []
    for sample in range(config["samples"]):
        seed = config["seed"] + sample
        heat = config["temperature"]
        runs.append(paligemma_write(model, problems, config, tokenizer, features, heat, seed))
    predictions = []
    for p in problems:
        parsed = [grade(p, run[p.id]["response"]).parsed for run in runs]
        votes = Counter(x for x in parsed if x is not None)
        best = votes.most_common(1)[0][0] if votes else None
        chosen = runs[parsed.index(best)][p.id]
        tokens = sum(run[p.id]["tokens"] for run in runs)
        predictions.append({"id": p.id} | chosen | {"tokens": tokens, "votes": dict(votes)})
    return predictions


def paligemma_write(
    model, problems, config, tokenizer, features, temperature=0.0, seed=0, on_token=None
):
    """{id: {"response", "ids", "rationale"?, "stop", "tokens"}}.

    A reasoning run has a budget for the rationale, and a detector for one that repeats itself. A
    text that does not get to its "Answer:" by itself is given that word and goes on from there, at
    most the answer's budget: its stop is "forced", and "forced_after" says what came before. "ids"
    are those the answer was written behind, and the answer's: of a loop, one round.
    """
    task, budgets = config["recipe"], config["max_output"]
    how = (temperature, seed, on_token)
    rows = [(p, task, None, False) for p in problems]
    examples = {e["id"]: e for e in data.pali_examples(rows, tokenizer, features, config)}
    reasons = task == "reason"
    loops = reasons and config["loop_stop"]
    first = budgets[0] if reasons else budgets[-1]
    told = continued(model, examples.values(), tokenizer, config, first, loops, how)
    if reasons and config["force_answer"]:
        cue = plain_ids(tokenizer, f"\n{CUE}")
        image = model.config.image_token_index  # has it said one, no picture belongs to it
        cut = {i: before_loop(t["ids"]) for i, t in told.items() if CUE not in t["response"]}
        cut = {i: [x for x in ids if x != image] for i, ids in cut.items()}
        more = [prolonged(examples[i], ids + cue) for i, ids in cut.items()]
        forced = continued(model, more, tokenizer, config, budgets[-1], False, how)
        for i, answer in forced.items():
            before = told[i]
            response = f"{before['response'].rstrip()}\n{CUE}{answer['response']}"
            tokens = before["tokens"] + answer["tokens"]
            stops = {"stop": "forced", "forced_after": before["stop"]}
            ids = cut[i] + cue + answer["ids"]
            told[i] = before | {"response": response, "ids": ids, "tokens": tokens} | stops
    for t in told.values():
        if reasons:
            before, cue, rest = t["response"].rpartition(CUE)
            t["rationale"] = (before if cue else rest).strip()
    return told


def paligemma_inputs(model, batch):
    """What `PaliGemma.states` takes of a batch of `data.pali_collate`; of pictures that are not
    cached (--full) the features are computed here, with gradient."""
    names = ("input_ids", "attention_mask", "token_type_ids", "image_features")
    given = {name: batch[name] for name in names if name in batch}
    if "pixel_values" in batch:
        given["image_features"] = model.image_features(batch["pixel_values"])  # (n, I, D)
    return given


def continued(model, examples, tokenizer, config, budget, loops, how):
    """{id: {"response", "ids", "stop", "tokens"}}: what the model writes behind each example."""
    device, told = model.language_model.embed_tokens.weight.device, []
    examples, part = list(examples), config.get("part")
    for batch in in_batches(examples, config["eval_batch_size"], "decoded", data.pali_collate):
        heat, seed, on_token = how
        what = [budget, loops, heat, seed, batch["ids"], batch["input_ids"].tolist()]
        # Seeded by what the batch is: a sample is the same whatever was decoded before it.
        seed = int.from_bytes(hashlib.sha256(json.dumps(what).encode()).digest()[:6], "big")
        draw = {"temperature": heat, "generator": torch.Generator(device).manual_seed(seed)}
        given = (model, batch, tokenizer, budget, loops, draw | {"on_token": on_token})
        told.append(part.batch(what, continue_batch, *given) if part else continue_batch(*given))
    return of_all_ranks(told)


def continue_batch(model, batch, tokenizer, budget, loops, how):
    device, told = model.language_model.embed_tokens.weight.device, {}
    ids = batch.pop("ids")
    batch = paligemma_inputs(model, {k: v.to(device) for k, v in batch.items()})
    new_ids, stops = model.write(max_new_tokens=budget, stop_loops=loops, **batch, **how)
    for problem_id, row, stop in zip(ids, new_ids.tolist(), stops, strict=True):
        ends = [i for i in (model.config.eos_token_id, model.config.pad_token_id) if i in row]
        row = row[: min(map(row.index, ends))] if ends else row
        text = tokenizer.decode(row, skip_special_tokens=True)
        tokens = len(row) + (stop == "eos")
        told[problem_id] = {"response": text, "ids": row, "stop": stop, "tokens": tokens}
    return told


def prolonged(example, ids):
    """A prompt with some of its suffix written already."""
    types = example["token_type_ids"] + [1] * len(ids)
    return example | {"input_ids": example["input_ids"] + ids, "token_type_ids": types}


def before_loop(ids, times=4, least=24):
    """The ids without the loop they end in, one round of it kept; the rule is model.looping's."""
    for period in range(1, len(ids) // times + 1):
        start = len(ids) - period
        while start and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= max(times * period, least):
            return ids[: start + period]
    return ids


def teacher_forced_rouge(model, problems, config, tokenizer, features):
    """ROUGE-L of arg-max logits that read the gold rationale: what the first published commands
    scored, and stage 2 then read. Shown to be compared with; nothing here uses these texts."""
    examples = data.examples(problems, "QCM-LE", tokenizer, features, None, config)
    batches = in_batches(examples, config["eval_batch_size"], "teacher-forced")
    texts = fusion.teacher_forced(model, batches, tokenizer)
    graded = [(p, {"rationale": texts[p.id]}, None) for p in problems]
    return rationale_scores(graded, "QCM-LE")["rougeL"]


def evaluate(folder, models, problems, config, tokenizer, features, how):
    """Decode, grade, write predictions.jsonl and metrics.json into the run folder; the metrics.

    `how` has the flags faithful_parse, teacher_forced, looks and report, and what was skipped,
    {split: count} or None. Interrupted decoding is gone on with (see `Part`). Under torchrun all
    processes decode, and the first one writes."""
    part = Part(folder, models)
    written = predict(models, problems, config | {"part": part}, tokenizer, features)
    predictions = [{k: v for k, v in x.items() if k != "ids"} for x in written]
    graded = grade_all(problems, predictions, how.faithful_parse)
    fmt = target_format(config)
    of = about(config["data"], config["test_split"], fmt, how.faithful_parse)
    scores, graded = assess(graded, of, config)
    if how.teacher_forced and len(models) == 2:
        scores["rougeL_teacher_forced"] = teacher_forced_rouge(
            models[0], problems, config, tokenizer, features
        )
    if how.skipped is not None:
        scores["skipped"] = how.skipped
    if rank():
        return scores
    write_graded(folder, graded, scores)
    some = (problems[: how.looks], written[: how.looks])
    seen = looks(config, models, *some, tokenizer, features) if how.looks else {}
    (Path(folder) / "looks.json").write_text(json.dumps(seen) + "\n", encoding="utf-8")
    if how.report:
        write_report(folder, {str(folder): Column(scores, graded, Path(folder))})
    part.remove()
    return scores


def target_format(config):
    """A teacher's thought, which PaliGemma learns, has another form than the gold solution."""
    return "QCM-LE" if config["model"] == "mmcot" else None


# --- what the model looked at
# A second pass over what was written anyway: nothing here is part of decoding. Attention says where
# numbers came from, not why an answer was given (Jain and Wallace 2019, arXiv 1902.10186).
def looks(config, models, problems, predictions, tokenizer, features):
    """What the models looked at: {id: look}, JSON. See `fusion_looks` and `paligemma_look`.

    `predictions` as `predict` gave them for these problems: of PaliGemma with their "ids". Empty
    for models that see no pictures."""
    if config["model"] == "paligemma":
        return paligemma_looks(models[0], problems, predictions, config, tokenizer, features)
    return fusion_looks(models, problems, predictions, config, tokenizer, features)


@torch.inference_mode()
def fusion_looks(models, problems, predictions, config, tokenizer, features):
    """{id: [look of each stage]}: what mmcot's fusion did with each token of its source text.

    "stage"      "rationale" or "answer", whose source has the rationale that was written
    "tokens"     text of each source token
    "gate"       of each token, Eq. 5's lambda, the mean over D: the share of the picture in it
    "attention"  of each token, Eq. 4's weights of the 8 positions that get most of it
    "boxes"      [cx, cy, w, h] of those, in 0..1 of the picture; none with published features
    "labels"     what DETR calls them, else their numbers

    A problem without a picture has a gate, and nothing that is attended to."""
    if features is None:
        return {}
    generated = {x["id"]: x.get("rationale") for x in predictions}
    objects, found = detected(config, problems, features), {p.id: [] for p in problems}
    stages, formats = fusion.stage_names(config["recipe"]), fusion.RECIPES[config["recipe"]]
    for stage, fmt, model in zip(stages, formats, models, strict=True):
        told = generated if "G" in fmt else None
        examples = data.examples(problems, fmt, tokenizer, features, told, config)
        label = f"{stage} looked at"
        for batch in in_batches(examples, config["eval_batch_size"], label, dealt=False):
            names = ("input_ids", "attention_mask", "image_features")
            ids, mask, pictures = (batch[name].to(config["device"]) for name in names)
            _, gate, attention = model.fusion.explain(model.t5.encode(ids, mask), pictures)
            for row, i in enumerate(batch["ids"]):
                real = mask[row].bool()  # (T,), no pads
                tokens = spelled(tokenizer, ids[row, real].tolist(), skip=False)
                lam = decimals(gate[row, real].mean(-1))  # T numbers
                look = {"stage": stage, "tokens": tokens, "gate": lam}
                found[i].append(look | strongest(attention[row, real], objects[i]))
    return found


def strongest(attention, objects, most=8):
    """Attention (T, P) to the `most` positions that get most of it, and what these are."""
    count = len(next(iter(objects.values())))
    best = attention.sum(0).topk(min(most, count)).indices.tolist()
    kept = {name: [values[i] for i in best] for name, values in objects.items()}
    return kept | {"attention": decimals(attention[:, best])}


def detected(config, problems, features):
    """{id: {"boxes", "labels"}} of the P positions, by DETR's two heads on the features that the
    model saw; of published features, whose DETR is not here, {"labels": their numbers}."""
    P = {p.id: features.shape[0] if p.id in features else 0 for p in problems}
    if config["features"]:
        return {i: {"labels": [f"position {j}" for j in range(n)]} for i, n in P.items()}
    detr, found = DETR.from_pretrained(resolve(config["vision_weights"])), {}
    names = (detr.config.id2label or {}).get
    for i, n in P.items():
        logits, boxes = detr.detect(torch.from_numpy(features[i][:n]))  # (..., L + 1), (..., 4)
        best, nothing = logits.argmax(-1).tolist(), detr.config.num_labels
        labels = ["no object" if j == nothing else names(str(j), str(j)) for j in best]
        found[i] = {"boxes": decimals(boxes), "labels": labels}
    return found


def decimals(tensor):
    """Nested lists, of three decimals."""
    return (tensor.double() * 1000).round().div(1000).tolist()


@torch.inference_mode()
def paligemma_looks(model, problems, predictions, config, tokenizer, features):
    """{id: `paligemma_look`} over the ids the model wrote: decode's own, as the text tokenised
    again may have others. Of a loop that was cut they have one round, as the model had when it
    answered. An <image> token that it said is left out: no picture is behind it."""
    written = {x["id"]: [i for i in x["ids"] if i != model.config.image_token_index]
               for x in predictions}  # fmt: skip
    rows = [(p, config["recipe"], None, False) for p in problems if written[p.id]]
    examples = data.pali_examples(rows, tokenizer, features, config)
    start, found = time.monotonic(), {}
    for done, example in enumerate(examples, 1):
        found[example["id"]] = paligemma_look(model, example, written[example["id"]], tokenizer)
        files.progress("looked at", done, len(examples), start)
    return found


@torch.inference_mode()  # also because only then the softmax is called
def paligemma_look(model, example, ids, tokenizer):
    """What the model had in mind when it wrote `ids` behind a prompt.

    "tokens"  text of each
    "p"       probability of each, given all before it, at temperature 1; low where a cue was forced
    "grid"    [rows, columns] of picture patches
    "maps"    {index of a token: base64 of rows * columns bytes}: from where it was predicted (one
              before its own place), attention to the patches, the mean over the heads of the last
              third of the layers; 255 is the strongest. For the tokens of `worth_a_map`
    "share"   {index: how much of that attention the picture has; the rest is on text}
    """
    device, start = model.language_model.embed_tokens.weight.device, len(example["input_ids"])
    batch = data.pali_collate([prolonged(example, ids)])
    given = paligemma_inputs(model, {k: v.to(device) for k, v in batch.items() if k != "ids"})
    patches = (given["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]  # (I,)
    tokens, seen = spelled(tokenizer, ids), []
    chosen = worth_a_map(tokens) if len(patches) else []
    rows = torch.tensor([start - 1 + i for i in chosen], dtype=torch.long, device=device)  # (n,)

    def watch(module, args, weights):  # (1, K, G, T, T)
        seen.append(weights[0, :, :, rows][..., patches].mean((0, 1)).float().cpu())  # (n, I)

    layers = model.language_model.layers
    last = [layer.self_attn.softmax for layer in layers[len(layers) * 2 // 3 :]]
    hooks = [softmax.register_forward_hook(watch) for softmax in last if chosen]
    try:
        states = model.states(**given)[0, start - 1 : -1]  # (U, D)
    finally:
        for hook in hooks:
            hook.remove()
    p = model.head(states).float().softmax(-1)[torch.arange(len(ids)), ids]  # (U,)
    maps = torch.stack(seen).mean(0) if chosen else torch.zeros(0, 1)  # n x I; 0 x 1 of none
    grey = (maps / maps.amax(1, keepdim=True).clamp(min=1e-9) * 255).round().byte()
    drawn = [base64.b64encode(row.numpy().tobytes()).decode() for row in grey]
    side = model.config.vision.image_size // model.config.vision.patch_size
    return {
        "tokens": tokens,
        "p": decimals(p),
        "grid": [side, side],
        "maps": dict(zip(map(str, chosen), drawn, strict=True)),
        "share": dict(zip(map(str, chosen), decimals(maps.sum(1)), strict=True)),
    }


def worth_a_map(tokens, most=24):
    """Indices of tokens that begin a word: first those of the answer line, then numbers, then words
    of four letters and more."""
    text, ends = "".join(tokens), list(accumulate(map(len, tokens)))
    answer = text.rfind(CUE) if CUE in text else text.rstrip().rfind("\n") + 1
    ranked = {}
    for word in re.finditer(r"\d[\d.,]*\d|\w+", text):
        kinds = (word.start() >= answer, word[0][0].isdigit(), len(word[0]) >= 4)
        if any(kinds):
            ranked.setdefault(bisect_right(ends, word.start()), kinds.index(True))
    return sorted(sorted(ranked, key=ranked.get)[:most])


def speller(tokenizer, skip=True):
    """A function that takes ids one by one and gives the text each adds: whole characters, "" while
    one is incomplete. (tokenizers.decoders.DecodeStream raises on bytes that are no UTF-8.)"""
    ids, shown = [], 0

    def spell(id):
        nonlocal shown
        ids.append(id)
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        piece, shown = text[shown:], len(text)
        return piece

    return spell


def spelled(tokenizer, ids, skip=True):
    return list(map(speller(tokenizer, skip), ids))


# --- run folders
def check_device(device):
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"There is no device {device!r} that this torch can use: try --device cpu."
        )


def load_run(folder, device=None):
    """(config, models, tokenizer) of a run folder."""
    folder = Path(folder)
    config = run_config(folder)
    if not config:
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json.")
    if lacks := sorted({"recipe", "data", "device", "weights"} - config.keys()):
        raise ValueError(f"{folder}/config.json has no {', '.join(lacks)}: it cannot decode.")
    config["device"] = device or config["device"]
    check_device(config["device"])
    if config["model"] == "paligemma":
        where = resolve(config["weights"][0])
        return config, [load_paligemma(config, folder)], load_tokenizer(where)
    stages = [folder / name for name in fusion.stage_names(config["recipe"])]
    models = [fusion.MultimodalT5.from_pretrained(s).to(config["device"]) for s in stages]
    return config, models, load_tokenizer(stages[0])


def load_paligemma(config, folder=None):
    """The base model of a run and, if its folder has them, the adapter or weights trained there."""
    trained = folder is not None and (folder / "model.safetensors").is_file()
    where = folder if trained else config["weights"][0]
    model = PaliGemma.from_pretrained(where, getattr(torch, config["dtype"]))
    if folder is not None and (folder / "adapter_model.safetensors").is_file():
        lora.load(model, folder)
    elif config["adapter"]:
        lora.load(model, config["adapter"])
    if not config["final_soft_cap"]:
        text = replace(model.config.text, final_logit_softcapping=None)
        model.config = replace(model.config, text=text)
    return model.to(config["device"]).eval()


def score_run(folder, args):
    """The `Column` of a run folder on --split (by default the run's own). Another split gets a
    folder in the run's.

    The run's models decode if they have not, or with --decode. What was decoded before is graded
    anew, so that all columns are read by the same rules; with --limit the first N problems are, and
    nothing is written. Where the problems, or the predictions, are not at hand the metrics are
    those of then.
    """
    folder = Path(folder)
    config = run_config(folder)
    own = config.get("test_split") or metrics_then(folder, False).get("split", "test")
    split = args.split or own
    out = folder if split == own else folder / split
    there = (out / "predictions.jsonl").is_file() or metrics_then(out)
    if decodes := args.decode or args.teacher_forced or not there:
        decode_run(folder, out, split, args)
    then, shown_only = metrics_then(out, False), not decodes and (args.limit or args.faithful_parse)
    faithful = args.faithful_parse or not config and then.get("faithful_parse", False)
    where = config.get("data") or then.get("data", "(no data named)")
    fmt = target_format(config) if config else then.get("rationale_format")
    try:
        problems = data.load(where, split, bad_records(config))
        graded = graded_folder(out, problems[: args.limit], faithful, args.limit)
    except FileNotFoundError as error:
        if shown_only or not metrics_then(out):
            raise
        print(f"{out}: shown as graded then, as now {error}", file=sys.stderr)
        return Column(then)
    if not args.limit and len(graded) < len(problems):
        some = f"{len(graded)} of the {len(problems)} problems of {split}"
        print(f"{out} has predictions of {some}.", file=sys.stderr)
    of = about(where, split, fmt, faithful)
    scores, graded = assess(graded, of, config, args.judge, out / "judge.jsonl")
    if (before := metrics_then(out)).get("n") == scores["n"]:  # what predictions do not say
        kept = ("rougeL_teacher_forced", "skipped")
        scores |= {key: before[key] for key in kept if key in before}
    if not shown_only and scores != then:
        write_graded(out, graded, scores)
    return Column(scores, graded, None if shown_only else out)


def metrics_then(folder, whole=True):
    """What metrics.json says; {} if there is none, or none that can be read: it is made anew; if
    `whole`, also where no table can be made of it. If not, it may only say what it is about."""
    try:
        then = files.read_json(folder / "metrics.json")
        named = all(isinstance(then.get(key, ""), str) for key in ("data", "split"))
        if whole:
            table({"": then}, all_rows=True), summary({"": then}), report_tables({"": then})
        return then if named and isinstance(then.get("rationale_format"), str | None) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return {}


RUN_FLAGS = {  # of a run's config.json, what is read here
    "model": str, "recipe": str, "data": str, "test_split": str, "device": str, "weights": list,
    "epochs": list, "seed": int, "max_output": list, "eval_batch_size": int, "commit": str | None,
    "traces": str | None, "adapter": str | None, "on_error": str | None,
}  # fmt: skip
PARTS = {"weights": str, "epochs": int | float, "max_output": int}  # of those that are lists


def run_config(folder):
    """A run folder's config.json; {} if it has none. ValueError for one that train.py never wrote.
    A flag that a run of an older version lacks is no fault here."""
    file = Path(folder) / "config.json"
    if not os.path.lexists(file):
        return {}
    config = files.read_json(file)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} is no run folder: its config.json is none of train.py's.")
    for key in RUN_FLAGS.keys() & config.keys():
        value, part = config[key], PARTS.get(key)
        fits = isinstance(value, RUN_FLAGS[key]) and not isinstance(value, bool)
        if not fits or part and not (value and all(isinstance(x, part) for x in value)):
            raise ValueError(f"{file}: {key} is {value!r:.60}, which train.py never writes.")
    known = {"mmcot": fusion.RECIPES, "paligemma": ("reason", "answer")}
    recipes = known.get(config["model"], ())
    if not recipes or config.get("recipe", "answer") not in recipes:
        kind = f"{config['model']!r:.40} with recipe {config.get('recipe')!r:.40}"
        raise ValueError(f"{file}: there is no model {kind}.")
    if config.get("test_split", "test") not in data.SPLITS:
        raise ValueError(f"{file}: there is no split {config['test_split']!r:.40}.")
    return config


def graded_folder(folder, problems, faithful=False, limit=None):
    """`grade_all` of what is in a folder's predictions.jsonl; with `limit`, of these problems."""
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    predictions, ids = read_predictions(path), {p.id for p in problems}
    predictions = [x for x in predictions if x["id"] in ids or not limit]
    try:
        return grade_all(problems, predictions, faithful, partial=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def decode_run(folder, out, split, args):
    """Decode a split with the models of a run folder; `evaluate` writes what it gives to `out`."""
    config, models, tokenizer = load_run(folder, args.device)
    bad = bad_records(config)
    problems = data.load(config["data"], split, bad)[: args.limit]
    model = models[0] if config["model"] == "paligemma" else None
    features = image_features(config, problems, model, bad)
    lost = bad and {id for id, _ in bad}
    problems = [p for p in problems if not bad or p.id not in lost]
    how = argparse.Namespace(**vars(args) | {"report": False})  # `main` writes it, of all columns
    how.skipped = None if bad is None else {split: len(bad)}
    evaluate(out, models, problems, config | {"test_split": split}, tokenizer, features, how)


def ask(folder, args):
    """One question about one picture (or none) in the terminal, the text as it is written. Why it
    stopped is said on stderr, unless it came to its end by itself."""
    choices = tuple(args.choices or ())
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices are too many: the letters are {LETTERS}.")
    picture = pictures.open_image(args.image) if args.image else None
    config, models, tokenizer = load_run(folder, args.device)
    model = models[0] if config["model"] == "paligemma" else None
    meta = {"answer_index": 0, "caption": ""}  # unknown: only the unused target has it
    problem = data.Problem("asked", args.question, choices, "", "", args.image, "", "", meta)
    features = asked_features(config, models, picture)
    if picture and features is None:
        print("(this run looks at no pictures)", file=sys.stderr)
    show = printer(tokenizer, f"\n{CUE}" if model else "\n")
    told = predict(models, [problem], config, tokenizer, features, show)[0]
    if config.get("samples", 1) > 1:  # several texts with a vote each, of which this one was chosen
        print(told["response"], end="")
    read = grade(problem, told["response"]).parsed if choices else None
    print(f"  ({choices[LETTERS.index(read)]})" if read else "", flush=True)
    if told["stop"] == "forced":
        print(f"(stopped: {told['forced_after']}; then made to answer)", file=sys.stderr)
    elif told["stop"] != "eos":
        print(f"(stopped: {told['stop']})", file=sys.stderr)


def asked_features(config, models, picture):
    """`Features` of the problem "asked"; None for a model that sees no picture."""
    paligemma = config["model"] == "paligemma"
    if picture is None:
        seen = None if paligemma else models[-1].fusion
        width = seen and seen.image_dense.in_features
        return width and Features(np.zeros((1, 1, width), np.float16), {})
    if not paligemma and config["vision"] != "detr":
        return None
    if not paligemma and config["features"]:
        raise ValueError(
            f"This run learned from published features ({config['features']}): there is no model "
            "here that makes them of another picture. Ask without --image."
        )
    extract, pixels, size = eyes(config, models[0] if paligemma else None)
    made = extract([pixels(picture, size)])[0][None].half().numpy()  # (1, P, F), as cached
    return Features(made, {"asked": 0})


def printer(tokenizer, between):
    """An `on_token` for one row: prints each text as it is written, and `between` before the next.
    White space at the end of a text is not printed."""
    spell, held = None, ""

    def on_token(t, ids):
        nonlocal spell, held
        if t == 0:
            print(between if spell else "", end="")
            spell, held = speller(tokenizer), ""
        text = held + spell(ids.item())
        held = text[len(text.rstrip()) :]
        print(text.rstrip(), end="", flush=True)

    return on_token


# --- the report
REPORT = Path(__file__).parent / "report.html"  # the template: page, style and script
TAGS = ("topic", "category", "task", "grade")  # to filter by, beside the table's axes
PICTURE_SIDE, CURVE_POINTS = 384, 120


def write_report(folder, columns):
    """Write FOLDER/report.html: {name: `Column`} in one file that needs no network. It has their
    tables, of any two the answers side by side, and what lies in their folders: the curves of
    log.jsonl, what the model looked at of looks.json.

    Each picture is in it once, at most 384 pixels a side, and decoded when it is looked at; one
    that cannot be read becomes a sentence. A problem is the same in two columns if its id and its
    question are."""
    shown, looked = report_problems(columns)
    payload = {
        "runs": [run_facts(name, column) for name, column in columns.items()],
        "tables": report_tables({name: column.scores for name, column in columns.items()}),
        "compared": differences(columns)[0],
    }
    blocks = {f"picture-{i}": x for i, x in enumerate(report_pictures(shown))} | looked
    head, script, tail = re.split(r"<!-- (?:payload|pictures) -->", REPORT.read_text("utf-8"))
    only = re.search(r"<script>(.*?)</script>", script, re.DOTALL)[1].encode()
    only = f"'sha256-{base64.b64encode(hashlib.sha256(only).digest()).decode()}'"
    head = head.replace("script-src 'unsafe-inline'", f"script-src {only}")
    part = Path(folder) / "report.html.part"
    half = {"errors": "backslashreplace"}  # half a surrogate pair becomes JSON's escape for it
    with open(part, "w", encoding="utf-8", newline="\n", **half) as file:
        file.write(head + data_block("payload", payload | {"problems": shown}) + script)
        file.writelines(data_block(name, value) for name, value in blocks.items())
        file.write(tail)
    part.replace(Path(folder) / "report.html")


def data_block(name, value):
    """A script element that is only data, as JSON in which no text can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:  # numbers that a browser's JSON has not
        value = json.loads(text, parse_constant=str)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def report_problems(columns):
    """(problems with the predictions of all columns, {name of a block: a look})."""
    shown, blocks = {}, {}
    for number, column in enumerate(columns.values()):
        file = column.folder and column.folder / "looks.json"
        looked = files.read_json(file) if file and os.path.lexists(file) else {}
        if not isinstance(looked, dict):
            raise ValueError(f"{file} has no looks by problem id. Delete it, or decode again.")
        for p, x, g in column.graded or ():
            facts = shown.setdefault((p.id, p.question), problem_facts(p, len(columns)))
            block = f"look-{len(blocks)}" if p.id in looked else None
            facts["runs"][number] = x | asdict(g) | {"look": block}
            if block:
                blocks[block] = looked[p.id]
    return list(shown.values()), blocks


def problem_facts(p, runs):
    """What the page shows of a problem, with places for the predictions of so many runs."""
    tags = axes(p)
    tags |= {key: [str(p.meta[key])] for key in TAGS if p.meta.get(key) and key not in tags}
    gold = p.meta.get("answer_index")
    gold = p.choices.index(p.answer) if p.choices and gold is None else gold
    facts = asdict(p) | {"gold": gold, "missing": None, "runs": [None] * runs}
    del facts["meta"]
    return facts | {"tags": {key: names for key, names in tags.items() if names}}


def report_pictures(shown):
    """The pictures as data: addresses, equal files once; "image" of each problem becomes a place
    in that list, or None and "missing" says why."""

    def small(path):
        try:
            picture = pictures.open_image(path)
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            picture.save(file := io.BytesIO(), "WEBP", quality=80, method=2)
            return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        except (ValueError, OSError) as error:
            return error

    start, made = time.monotonic(), {}
    paths, first = {facts["image"]: None for facts in shown if facts["image"]}, {}
    for path in paths:
        known = Path(path).is_file()
        paths[path] = hashlib.sha256(Path(path).read_bytes()).digest() if known else path
        first.setdefault(paths[path], path)
    with ThreadPoolExecutor() as threads:  # Pillow lets go of the lock while it computes
        for key, picture in zip(first, threads.map(small, first.values()), strict=True):
            made[key] = picture
            files.progress("pictures of the report", len(made), len(first), start)
    places = {key: i for i, key in enumerate(k for k, x in made.items() if isinstance(x, str))}
    for facts in shown:
        if key := paths.get(facts["image"]):
            facts["image"] = places.get(key)
            facts["missing"] = None if key in places else str(made[key])
    return [made[key] for key in places]


def run_facts(name, column):
    """A run's name, a line about it, and its curves. The folder of another split in a run has no
    config.json and no log.jsonl: the run's are its."""
    home = column.folder or Path(name)
    home = home if (home / "config.json").is_file() else home.parent
    config, log = run_config(home), home / "log.jsonl"
    words = [config.get("model"), config.get("recipe"), heading(column.scores)]
    words += [
        f"{column.scores['n']} problems",
        f"seed {config['seed']}" if "seed" in config else "",
    ]
    words += [f"commit {config['commit'][:8]}" if config.get("commit") else ""]
    curves = loss_curves(log) if config and os.path.lexists(log) else []
    return {"name": name, "about": " · ".join(filter(None, words)), "curves": curves}


LOGGED = ("loss", "val_loss", "val_accuracy")


def loss_curves(file):
    """[{"stage", "loss", "val_loss", "val_accuracy"}], each a list of [step, value]; the training
    loss as means over a window of steps. A stage that starts again is another curve."""
    stages, before = [], (None, 0)
    for where, entry in files.json_lines(file, may_be_torn=True):
        told = entry.items() if isinstance(entry, dict) else ()
        numbers = {k for k, v in told if isinstance(v, int | float) and not isinstance(v, bool)}
        named = ("stage", str) in [(k, type(v)) for k, v in told]
        if not named or {"step", *LOGGED} & {k for k, _ in told} - numbers or "step" not in numbers:
            raise ValueError(f"{where} is none that train.py writes. Delete the file.")
        if entry["stage"] != before[0] or entry["step"] <= before[1]:
            stages.append({"stage": entry["stage"]} | {key: [] for key in LOGGED})
        before = entry["stage"], entry["step"]
        for key in stages[-1].keys() & entry.keys() - {"stage"}:
            if math.isfinite(entry[key]):
                stages[-1][key].append([entry["step"], entry[key]])
    for stage in stages:
        loss, width = stage["loss"], max(1, len(stage["loss"]) // CURVE_POINTS)
        windows = [loss[i : i + width] for i in range(0, len(loss), width)]
        means = [(w[len(w) // 2][0], sum(y for _, y in w) / len(w)) for w in windows]
        stage["loss"] = [[x, float(f"{y:.4g}")] for x, y in means]
    return stages


def report_tables(scores):
    """As `table`, the rows of DETAILS apart: [{"title", "runs", "rows", "more", "folded"}]."""
    tables = []
    for title, block in same_problems(scores):
        runs, kept, folded = list(block.values()), [], []
        axis_of = {row: axis for axis, rows in runs[0].get("axes", {}).items() for row in rows}
        for name, n in runs[0]["n_by"].items():
            rates = [(m["accuracy"] | m.get("families", {})).get(name) for m in runs]
            ends, axis = [m["ci95_by"][name] for m in runs], axis_of.get(name)
            cells = [{"rate": x, "ci95": y} for x, y in zip(rates, ends, strict=True)]
            row = {"name": name, "axis": axis, "n": n, "chance": runs[0]["chance_by"][name]}
            if n:
                (folded if axis in DETAILS else kept).append(row | {"cells": cells})
        said = {"title": title, "runs": list(block)}
        tables.append(said | {"rows": kept, "more": more_rows(runs), "folded": False})
        tables += [said | {"rows": folded, "more": [], "folded": True}] if folded else []
    return tables


# --- command line
def score_file(args):
    """The `Column` of --predictions on --data; the graded file goes to --out."""
    split = args.split or "test"
    problems = data.load(args.data, split)
    predictions = read_predictions(args.predictions, problems)
    if args.limit:
        problems = problems[: args.limit]
        ids = {p.id for p in problems}
        predictions = [x for x in predictions if x["id"] in ids]
    graded = grade_all(problems, predictions, args.faithful_parse, args.partial)
    cache = Path(args.out or Path(args.predictions).parent) / "judge.jsonl"
    of = about(args.data, split, args.rationale_format, args.faithful_parse)
    scores, graded = assess(graded, of, None, args.judge, cache)
    if args.out:
        write_graded(args.out, graded, scores)
    return Column(scores, graded, args.out and Path(args.out))


def positive(text):
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.split("\n")[0])
    runs = parser.add_argument_group("runs")
    runs.add_argument("runs", nargs="*", metavar="RUN", help="run folders, shown side by side")
    again = "decode even if the run has its predictions already"
    runs.add_argument("--decode", action="store_true", help=again)
    forced = "also score the arg-max of teacher-forced logits, as the first published commands did"
    runs.add_argument("--teacher-forced", action="store_true", help=forced)
    runs.add_argument("--limit", type=positive, metavar="N", help="only the first N problems")
    looked = "of the first N decoded problems keep what the model looked at (%(default)s; 0: off)"
    runs.add_argument("--looks", type=int, default=LOOKS, metavar="N", help=looked)
    runs.add_argument("--device", help="cpu or cuda; the run's own by default")
    one = parser.add_argument_group("one question to a run")
    one.add_argument("--question", metavar="TEXT", help="ask this instead of scoring")
    one.add_argument("--image", metavar="FILE", help="the picture it is about")
    one.add_argument("--choices", nargs="+", metavar="TEXT", help="the answers to choose from")
    file = parser.add_argument_group("anybody's predictions")
    lines = "JSONL with id and response, MathVista's {pid: {response}} or mm-cot's own file"
    file.add_argument("--predictions", metavar="FILE", help=lines)
    file.add_argument("--data", metavar="DIR", help="the problems they answer: a folder or a name")
    file.add_argument("--split", help="split to score (a run's own, else test)")
    file.add_argument("--out", metavar="DIR", help="write graded predictions and metrics.json here")
    file.add_argument("--partial", action="store_true", help="accept problems without prediction")
    how = parser.add_argument_group("scoring")
    guess = "guess among A-E what cannot be read, as the original did"
    how.add_argument("--faithful-parse", action="store_true", help=guess)
    gold = "prompt format whose target rationales are compared with (%(default)s)"
    how.add_argument("--rationale-format", default="QCM-LE", metavar="FORMAT", help=gold)
    judge = "model that looks why answers fail and succeed (as teacher.py --judge), or demo"
    how.add_argument("--judge", metavar="SPEC", help=judge)
    how.add_argument("--markdown", action="store_true", help="print the table as markdown")
    rows = "also the table's rows by source, question type, category, language and grade"
    how.add_argument("--all-rows", action="store_true", help=rows)
    report = "write no report.html into the first run's folder, or --out"
    how.add_argument("--no-report", dest="report", action="store_false", help=report)
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.predictions) or bool(args.data) != bool(args.predictions):
        parser.error("give run folders, or --predictions FILE together with --data DIR")
    asks = any(x is not None for x in (args.question, args.image, args.choices))
    if asks and (not args.question or len(args.runs) != 1):
        parser.error("--image and --choices go with --question TEXT, which is asked of one RUN")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.question:
        return ask(args.runs[0], args)
    columns = {run: score_run(run, args) for run in args.runs}
    if args.predictions:
        columns[args.predictions] = score_file(args)
    scores = {name: column.scores for name, column in columns.items()}
    print(table(scores, args.markdown, args.all_rows))
    if words := differences(columns)[1]:
        print(f"\n{words}")
    folder = next(iter(columns.values())).folder
    if args.report and folder:  # nothing is written of what was only shown
        write_report(folder, columns)
        print(f"\nto read on: {folder / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
