"""One answer: what a reply says, and whether that is right.

Implements the answer extraction of ScienceQA (Lu et al. 2022, arXiv 2209.09513) as Multimodal-CoT
(Zhang et al. 2023, arXiv 2302.00923) calls it (`published`), the comparison of MathVista's official
scorer (`rounded`, `right`), and a reader of free text for all other replies (`commitment`): every
form of an answer, a letter, the text of a choice, a number or a list, becomes one (`normal`).

A response that cannot be read is a failure, counted and shown, never a guess. The original's guess
is there to be compared with (`grade`'s `guess`).

Left out: a model that reads the answer out, as MathVista's authors have one; whether the words that
lead to an answer are true (support/evaluation/errors.py).
"""

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from support.dataset.choices import LETTERS

CUE = "Answer:"  # what PaliGemma's last line begins with
ANSWER = re.compile(r"The answer is \(([A-Z])\)")
GUESS_LETTERS = "ABCDE"  # the original's, however many choices a problem has


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
NUMBER_WORDS = {w: float(i) for i, w in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty".split())}  # fmt: skip


# --- a text in plain letters and numbers
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
    """`squash`ed choices, which are compared with many sentences."""
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


# --- one form for all spellings of an answer
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
    read = (choice_named if problem.choices else value)(problem, plain(answer))
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


# --- what a short text names
def choice_named(problem, said, trust=2):
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
        found = [NUMBER_WORDS[w] for w in re.findall(r"[a-z]+", words) if w in NUMBER_WORDS]
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


# --- what a long text comes to
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
    text, read = plain(text), choice_named if problem.choices else value
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


# --- the grade
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
