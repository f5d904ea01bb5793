r"""A short text: which choice, number, list or words it names.

`plain` turns LaTeX, Markdown and other scripts' digits into one notation; `choice_named` and
`value` read one sentence or less. Where in a reply such a sentence stands, and which one counts, is
for grading.py. Numbers are rounded as MathVista's official scorer does (`rounded`).
"""

import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache

from data import Problem
from support.dataset.choices import LETTERS

# How far a sentence commits to what it names: "The answer is ...", "Therefore, ...", any other.
STATED = 2
CONCLUDED = 1
MENTIONED = 0
NO_SUCH_LETTER = "letter not among the options"
NOTHING_READ = "no answer found"
Read = tuple[str | None, str]  # (the answer or None, what it was or why nothing was read)

# --- the forms that a text takes, before anything is looked for in it
MARKS = str.maketrans("۰۱۲۳۴۵۶۷۸۹٠١٢٣٤٥٦٧٨٩٫٬−–—’‘⁄、“”", "01234567890123456789.,---''/,\"\"")
BEFORE_NFKC = [(re.compile(pattern), instead) for pattern, instead in (
    (r"(?<=\d)(?:\{,\}|\\[,!:; ]|[\u2009\u202f])(?=\d{3}(?!\d))", ","),  # 1{,}200  1\,200
    (r"(?<=\d)(?=[¼½¾⅐-⅞])", " "),  # 2½
    (r"[⁰¹²³⁴-⁹⁻]+", lambda m: "^" + m[0]),  # 10⁻³
    (r"(?<=\d) : (?=\d)", ":"),  # 2 : 1
)]  # fmt: skip
LATEX = [(re.compile(pattern), instead) for pattern, instead in (
    (r"\\(?:left|right|displaystyle|quad|[,;:! ])", " "),
    (r"\\(?:text|math|operatorname|mbox)[a-z]*\s*\{([^{}]*)\}", r"\1"),  # \text{cm}
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\(?:degree|circ)\b", "°"),  # 45^\circ
    (r"(?:\\sqrt|√)\s*\{\s*([^{}]*?)\s*\}", r"√\1"),  # \sqrt{3}
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),  # 2\frac{1}{2} is mixed
    (r"\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\1/\2"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2"),
    (r"\\(?:times|cdot)\b", "×"), (r"\\pi\b", "π"), (r"\\approx\b", "≈"), (r"\\([%$#&_])", r"\1"),
    (r"\\f?box(?:ed)?\s*\{([^{}]*)\}", r"⟦\1⟧"),  # \boxed{45°}
    (r"\\[()\[\]]", ""),
)]  # fmt: skip
CHOICES = re.compile(  # the list of choices, repeated line by line: "(A) dog\n(B) cat\n(C) bird"
    r"^[ \t]*\(?A[).:].*\n\s*\(?B[).:].*(?:\n\s*\(?[C-J][).:].*)*", re.MULTILINE)  # fmt: skip
MARKDOWN = re.compile(
    r"\*\*|__|`+|\$|^[ \t]*(?:[-*#>]+"
    r"|\d+[.)](?! *(?i:explanation|reason|because|since)))[ \t]+(?=\S)",
    re.MULTILINE,
)
SIGNS = str.maketrans("", "", "*^{}⟦⟧")
ANYTHING = re.compile(r"[^\s.()\[\]\"',:;*^{}⟦⟧]")  # what `squash` leaves
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=。)|\n")

# --- numbers
AMOUNT = re.compile(  # 1,200  -3.5  .5  6×10^4  1e-3  2 1/2  3√2/2  2/3π
    r"(?<![\w.])([-+]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+)?"
    r"(?:\s?[×x*]\s?10\s?\^\s?\{?([-+]?\d+)\}?|e([-+]?\d+)\b)?(?:(?<=\d)\s(\d{1,2})(?=/\d))?"
    r"\s?(?:√\(?(\d+(?:\.\d+)?)\)?)?\s?(π)?(?:\s?/\s?(\d+(?:\.\d+)?))?\s?(π)?",
    re.ASCII)  # fmt: skip
UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen " \
        "fifteen sixteen seventeen eighteen nineteen".split()  # fmt: skip
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
WORD_VALUES = {word: 20 + 10 * i for i, word in enumerate(TENS)}
WORD_VALUES |= {word: i for i, word in enumerate(UNITS)}
UP_TO_99 = rf"(?:(?:{'|'.join(TENS)})(?:[- ](?:{'|'.join(UNITS[1:10])}))?|(?:{'|'.join(UNITS)}))\b"
UP_TO_999 = rf"(?:(?:{UP_TO_99}|a) hundred(?: (?:and )?{UP_TO_99})?|{UP_TO_99})"
SCALED = r"(?:hundred|thousand|million|billion)\b"
SPELLED = re.compile(  # twenty-five, one hundred and five, two million three hundred, 1.2 million
    rf"\b(?:{UP_TO_999}|(?:a|(?<![\d,.])\d[\d,.]{{0,20}})(?= {SCALED}))"
    rf"(?: {SCALED}(?:,? (?:and )?{UP_TO_999})?)*",
    re.IGNORECASE)  # fmt: skip
PRONOUN = re.compile(  # the one, the largest one, one of them, one can see: no numbers
    r"(?:\b(?:the|this|that|each|every|no|any|which|other|another)"
    r"|\w(?:er|ed|st|nd|rd|th)) one\b|\bone (?:of|another|can|could|has to|must|should)\b",
    re.IGNORECASE)  # fmt: skip
SIGN = re.compile(r"(?<![\d)] )\b(?:minus|negative) (?=\d)", re.IGNORECASE)
NOTHING = re.compile(r"\b(?:is|are|was|were|has|have) no\b|\bnone of\b", re.IGNORECASE)
RANGE = re.compile(  # 5-10, 5 to 10, between 5 and 10, 3:15: not one number
    r"(?<![\w.,])\d+(?:\.\d+)?(?:-|\s?~\s?|:|\s(?:to|or)\s)\d+(?:\.\d+)?(?![\d-])(?!\s*[=≈])"
    r"|\bbetween (?:the )?\d[^.\n]{0,30}? and (?:the )?\d+(?:\.\d+)?")  # fmt: skip
RATIO = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?(?::|\bto\b)\s?(\d+(?:\.\d+)?)")  # 1:2, 1 to 2
OPENS = re.compile(  # begins with a number, within four words, and no operator after it
    r"\s*(?:[^\W\d]+\s){0,3}[-+]?[\d.,]+(?![\d.,]*\s*[-+×÷*/=≈√^])")  # fmt: skip
YEAR = re.compile(r"\b(?:which|what) years?\b|\bwhen\b", re.IGNORECASE)
ASKS = re.compile(r"(?:how many|which|what) (?!is|are|was|were|do)(\w+)", re.IGNORECASE)
GIVES = re.compile(
    r"\b(?:gives?|giving|makes?|making|leaves?|leaving|yields?|equals?|get|obtain|results? in)"
    r"(?: [a-z]+){0,2} (-?[\d,]*\.?\d+)")  # fmt: skip
IS = re.compile(r"\b(?:is|are|was|were|be) (?:[a-z]+ ){0,2}(-?[\d,]*\.?\d+)")

# --- letters and words
LETTER = re.compile(  # (B)  [b]  【B】  option B  B.  B) 140°  B (no)  b
    r"(?!N/A)(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)[\s:]\s*)?"
    r"(?:[(\[【]\s*([A-Za-z])\s*[)\]】]|([a-z])(?=$|[.)])|"
    r"([A-Z])(?=$|[一-鿿])(?![不错錯非])|"  # C正确, but not C不正确
    r"([A-Z])(?=\s*[).:,;/&(]|\s-|\s(?:because|since|as|is|and|or|which|given|for)\b))"
)
ANOTHER = re.compile(
    r"\s*(?:,?\s*(?:and|or)\b|[,&/和或与])\s*[(\[]?([A-Z])(?:[)\]]|(?=$|\s*[.,;]))"
)
NAMED = re.compile(  # (C)  option C  it's C.  so the heaviest must be C.
    r"(?:[(\[【]|\b[Oo]ption )([A-Z])\b|\b(?:[Ii]t(?:'s| is)|must be) ([A-Z])(?=\W*$)"
)
ALONE = re.compile(  # the cube "D", the one labelled D, point D is, cube D.
    r"(?:\"|\b(?:label(?:l?ed)?|marked|letter(?:ed)?|[Pp]oint) )([A-Z])\b|"
    r"(?<![\w'/-])([A-Z])(?=$|[.,;:!])"
)
WORD_AFTER = re.compile(r"[\s).:,(\]-]*(yes|no|true|false)\b", re.IGNORECASE)
DENIED_FIRST = re.compile(  # not A but C; not A, it's C
    r"\b(?:is |are |it's )?not [^.;\n]{1,60}?"
    r"(?:,? but(?: rather)?|[,;] (?:but|rather|instead|it is|it's))(?= )",
    re.IGNORECASE)  # fmt: skip
DENIED_LAST = re.compile(  # C, not A; C rather than A
    r"(?<=[\w)])(?:, ?(?:and |but )?not| (?:and|but) not| rather than| instead of) [^,.;\n]*"
)
DENIES = re.compile(r"\b(?:not|never|no|neither|nor|cannot)\b|n't\b", re.IGNORECASE)
REJECTS = re.compile(
    r"\b(?:not|never|neither|nor|cannot|wrong|incorrect|false|eliminated?|ruled? out|"
    r"excluded?)\b|n't\b",
    re.IGNORECASE)  # fmt: skip
CHINESE_POLES = {"是": "yes", "对": "yes", "正确": "yes", "否": "no", "不是": "no", "错误": "no"}
POLES = {"yes": "true", "no": "false", "true": "yes", "false": "no"}
LITTLE = set("a an the this there of in on at to by for that than is are was were be do does did "
             "has have can would and or".split())  # fmt: skip
CLAUSE = re.compile(r"[;()]|,\s|\s(?:and|with|while|whereas|because|since|where|when|as)\s")


# --- a text in plain letters and numbers
def plain(text: str) -> str:
    """Without LaTeX and Markdown, with ASCII digits; what stood in a \\boxed{} is in ⟦⟧."""
    text = "\n".join(line for line in text.splitlines() if " | " not in line)  # no tables
    for pattern, instead in BEFORE_NFKC:
        text = pattern.sub(instead, text)
    text = unicodedata.normalize("NFKC", text).translate(MARKS)
    if "\\" in text or "√" in text:
        for pattern, instead in LATEX:
            text = pattern.sub(instead, text)
    return CHOICES.sub("", MARKDOWN.sub("", text))


@lru_cache(maxsize=4096)
def plain_question(text: str) -> str:
    """`plain`, of a text that many replies are compared with."""
    return plain(text)


def squash(text: str) -> str:
    """What two spellings of one answer have in common."""
    return " ".join(text.translate(SIGNS).split()).strip(" .()[]\"',:;").casefold()


@lru_cache(maxsize=4096)
def squashed(texts: tuple[str, ...]) -> list[str]:
    """`squash`ed choices, which are compared with many sentences."""
    return [squash(plain(text)) for text in texts]


def words_of(text: str) -> set[str]:
    """The words of a text that say what it is about."""
    return set(re.findall(r"\w+", text.casefold())) - LITTLE


@lru_cache(maxsize=4096)
def amounts(text: str) -> list[float]:
    """The numbers of a plain text, in their order: 1,200, -3.5, 6×10^4, 2 1/2, 3√2/2, 2π/3, .5."""
    found = []
    for m in AMOUNT.finditer(text):
        number, *power, part, root, pi, under, also_pi = m.groups()
        if number or root or pi:
            value = float((number or "1").replace(",", "").replace(" ", ""))
            try:
                if part:  # of a mixed number: 2 1/2
                    value += math.copysign(float(part) / float(under or 1), value)
                    under = 1
                value *= 10.0 ** int(power[0] or power[1] or 0) / float(under or 1)
                value *= math.sqrt(float(root or 1)) * (math.pi if pi or also_pi else 1)
            except (OverflowError, ValueError, ZeroDivisionError):
                continue
            if math.isfinite(value):
                found.append(value)
    return found


def spelled_value(match: re.Match) -> str:
    """The digits of a number in words that SPELLED found; a pronoun "one" stays."""
    around = match.string[max(0, match.start() - 9) : match.end() + 8]
    if match[0].casefold() == "one" and PRONOUN.search(around):
        return match[0]
    total = current = 0.0
    for word in re.findall(r"[a-z]+|\d[\d,.]*", match[0].casefold()):
        if word[0].isdigit():
            current = (amounts(word) or [0])[0]
        elif word == "hundred":
            current = 100 * (current or 1)
        elif word in SCALES:
            total += SCALES[word] * (current or 1)
            current = 0.0
        else:
            current += WORD_VALUES.get(word, 0)  # "a" and "and" are worth nothing
    return f"{total + current:.12g}" if math.isfinite(total + current) else match[0]


def in_digits(text: str, scaled: bool = True) -> str:
    """A plain text, its numbers in words as digits: "minus twenty-five" is -25, and unless scales
    are units, "1.2 million" 1200000."""
    text = SPELLED.sub(lambda m: spelled_value(m) if scaled or m[0][0].isalpha() else m[0], text)
    return SIGN.sub("-", text)


def affirmed(text: str) -> str:
    """A sentence without the alternative it denies: C of "not A but C", "C, not A"."""
    return DENIED_LAST.sub("", DENIED_FIRST.sub(" ", text))


# --- what is asked for
def asks_for(problem: Problem) -> str:
    """choice | integer | float | list | number | text: what the answer should be; where the record
    has no answer_type, the gold answer decides."""
    kind = "choice" if problem.choices else problem.meta.get("answer_type")
    if kind in ("choice", "integer", "float", "list", "text"):
        return kind
    gold = plain_question(problem.answer).strip()
    return "number" if gold and AMOUNT.fullmatch(gold) else "text"


def rounded(problem: Problem, value: float) -> str:
    """A number as the official scorer compares it: a float at the record's precision; an integer
    only if it is one."""
    if asks_for(problem) == "float":
        return str(round(value, int(problem.meta.get("precision") or 2)))
    return str(int(value)) if value.is_integer() else f"{value:.9g}"


def read(problem: Problem, text: str, trust: int = STATED) -> Read:
    """What a short plain text names."""
    return (choice_named if problem.choices else value)(problem, text, trust)


# --- which choice
def is_yes_no(problem: Problem) -> bool:
    """Are the choices yes and no, or true and false?"""
    return sorted(squashed(problem.choices)) in (["no", "yes"], ["false", "true"])


def pole(texts: list[str], word: str) -> str:
    """The letter of the choice that a yes or no means; a program's True is a yes."""
    word = word.casefold()
    return LETTERS[texts.index(word if word in texts else POLES[word])]


def choice_named(problem: Problem, statement: str, trust: int) -> Read:
    """The choice that a short plain text names. What was not stated as the
    answer names none by a list of letters, nor by what a "not" may be about."""
    letters = LETTERS[: len(problem.choices)]
    texts = squashed(problem.choices)
    meant = {x: x for x in letters}  # of the choices P, Q and R, "Q" is the second
    meant |= {x.upper(): y for x, y in zip(texts, letters, strict=False) if x.upper() not in meant}
    statement = affirmed(statement).strip(" \n\t.*\"':⟦⟧")
    whole = squash(statement)
    denied = re.match(r"(?:not|neither|nor)\b", statement, re.IGNORECASE) and whole not in texts
    if trust == STATED and denied:
        return None, NOTHING_READ
    if is_yes_no(problem) and whole in CHINESE_POLES:
        return pole(texts, CHINESE_POLES[whole]), "choice text"
    if len(whole) > 1 and texts.count(whole) == 1:
        return letters[texts.index(whole)], "choice text"
    named = {meant.get(a or b) for a, b in NAMED.findall(statement)} - {None}
    if trust < STATED and len(named) > 1:
        return None, "several answers"
    if m := LETTER.match(statement):
        letter = meant.get((m[1] or m[2] or m[3] or m[4]).upper())
        if letter is None:  # "(E) decrease" names the text; "(C) Yes" is a made-up choice
            text = squash(statement[m.end() :])
            if texts.count(text) == 1 and not is_yes_no(problem):
                return letters[texts.index(text)], "choice text"
            return None, NO_SUCH_LETTER
        after = WORD_AFTER.match(statement, m.end())
        if after and is_yes_no(problem):  # "A: No": the word is the answer
            return pole(texts, after[1]), "choice text"
        other = ANOTHER.match(statement, m.end())
        if other and other[1] in letters and other[1] != letter:
            return None, "several answers"
        if trust < STATED and REJECTS.search(statement):
            return None, NOTHING_READ
        return letter, "letter"
    if trust < STATED and REJECTS.search(statement):
        named = set()
    elif all(len(text) == 1 for text in texts):  # choices that are letters: the cube "D"
        named |= {meant.get(a or b) for a, b in ALONE.findall(statement)} - {None}
    if not named:
        found = text_named(texts, statement, trust)
        if found != (None, NOTHING_READ):
            return found
        if trust == STATED:
            ends = re.findall(r"(?<![\w'/])([A-Z])(?=$|,? and | or )", statement)
            named = {meant[x] for x in ends if x in meant}
    if len(named) > 1:
        return None, "several answers"
    return (named.pop(), "letter") if named else (None, NOTHING_READ)


def text_named(texts: list[str], statement: str, trust: int) -> Read:
    """The choice whose text, or number, a plain text contains, else the
    nearest one."""
    letters = LETTERS[: len(texts)]
    denied = trust < STATED and DENIES.search(statement)
    for how, find in (("choice text", mentioned), ("nearest choice", nearest)):
        hits = [i for i in find(texts, squash(statement)) if not denied or texts[i] in POLES]
        if len({texts[i] for i in hits}) == 1:
            return letters[hits[0]], how
        if hits:
            return None, "several answers"
    if amounts(statement) and all(map(amounts, texts)):
        return None, "no such choice"
    return None, NOTHING_READ


def mentioned(texts: list[str], statement: str) -> list[int]:
    """Positions of the choices whose words, or whose number, a text names; not those that are only
    a part of another that it names."""
    if statement in POLES and POLES[statement] in texts and statement not in texts:
        statement = POLES[statement]
    if statement in texts:
        return [texts.index(statement)]
    tail = re.split("[=≈]", statement)[-1]
    statement = tail if amounts(tail) else statement
    product = re.search(r"\d ?[×x*] ?\d", statement)  # "4 x 4" is no 4
    hits = []
    for i, text in enumerate(texts):
        if product and text.isdigit():
            continue
        inside = rf"(?a)(?<![\w.,/√^-]){re.escape(text)}(?![\w/√^]|[.,]\d)"
        if text in POLES:  # "there are no cubes" and "no cubes are" are no answers
            word = text if POLES[text] in texts else f"(?:{text}|{POLES[text]})"
            inside = rf"^{word}(?=\W|$)(?! [a-z]+ (?:is|are)\b)|(?:\b(?:is|be|was)|[,:]) {word}$"
        elif text not in statement or len(text) == 1 and not text.isdigit():
            continue
        if re.search(inside, statement):
            hits.append(i)
    hits = [i for i in hits if not any(texts[i] in texts[j] for j in hits if texts[i] != texts[j])]
    found = {round(x, 6) for x in amounts(in_digits(statement))}
    same = [i for i, t in enumerate(texts) if {round(x, 6) for x in amounts(in_digits(t))} == found]
    return hits or (same if found and not product else [])


def nearest(texts: list[str], statement: str) -> list[int]:
    """Positions of the choices that a text is but for rounding, or a slip of the pen."""
    values, numbers = amounts(statement), [amounts(t) for t in texts]
    if any(numbers):
        pairs = [(i, *x, *values) for i, x in enumerate(numbers) if len(x) == len(values) == 1]
        return [i for i, x, y in pairs if math.isclose(x, y, rel_tol=0.01)]
    slips = [len(t) // 5 for t in texts]
    close = [abs(len(statement) - len(t)) <= most for t, most in zip(texts, slips, strict=True)]
    hits = [i for i, t in enumerate(texts) if close[i]]  # and, before the slow look, by letters
    hits = [i for i in hits if (Counter(statement) - Counter(texts[i])).total() <= slips[i]]
    return [i for i in hits if distance(statement, texts[i]) <= slips[i]]


def distance(a: str, b: str) -> int:
    """Levenshtein's: how many characters to put in, take out or change."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            changed = left + (x != y)
            left = row[j]
            row[j] = min(left + 1, row[j - 1] + 1, changed)
    return row[-1]


# --- which number, list or text
def value(problem: Problem, statement: str, trust: int) -> Read:
    """The number, list or text that a short plain text names. Of several
    numbers the first, if the text opens with it as the answer, else see `last_of`."""
    kind = asks_for(problem)
    statement = affirmed(statement)
    if trust == STATED and re.match(r"\W*(?:not|neither)\b", statement, re.IGNORECASE):
        return None, NOTHING_READ
    if kind == "list":
        inside = re.findall(r"\[([^\[\]]*)\]", statement)
        asked = amounts(plain_question(problem.question))
        found = amounts(inside[-1]) if inside else [x for x in amounts(statement) if x not in asked]
        if inside or len(found) > 1:
            return f"[{', '.join(f'{x:.9g}' for x in found)}]", "list"
        return None, NOTHING_READ
    if kind != "text":
        found, failure = numbers(problem, statement, trust)
        if found:
            return rounded(problem, found[0] if trust == STATED else found[-1]), "number"
        if failure:
            return None, failure
    text = squash(statement) if trust == STATED and kind in ("number", "text") else ""
    return (text, "text") if text else (None, NOTHING_READ)


def numbers(problem: Problem, statement: str, trust: int) -> tuple[list[float], str]:
    """(the numbers of a text that may be the answer, why there are none or "")."""
    # A chart may count in millions: only an integer without a unit is given in full.
    scaled = asks_for(problem) == "integer" and not re.search(SCALED, problem.question)
    statement = in_digits(statement, scaled)
    if re.search(r"\bratio\b", problem.question, re.IGNORECASE):
        statement = RATIO.sub(lambda m: str(float(m[1]) / (float(m[2]) or math.inf)), statement)
    if re.search(r"\bhow many\b|\bnumber of\b", problem.question, re.IGNORECASE):
        statement = NOTHING.sub("is 0", statement)
    single = RANGE.sub(" ", statement)
    if amounts(statement) and not amounts(single):
        return [], "several answers"
    if trust < STATED or not OPENS.match(single):
        return last_of(problem, single, trust), ""
    return amounts(single), ""


def last_of(problem: Problem, statement: str, trust: int) -> list[float]:
    """[the number that a sentence ends in], or []: of those after the last "=" the ones that the
    question does not have; of these rather one of the kind asked for, of the things asked for, in
    the clause most like the question, or after an "is"."""
    question = plain_question(problem.question)
    asked = amounts(in_digits(question))
    tail = amounts(re.split("[=≈]", statement)[-1])
    if trust == CONCLUDED and re.search("[=≈]", statement) and len(set(tail) - set(asked)) > 1:
        return []  # a sum not yet made
    every = tail or amounts(statement)
    found = [x for x in every if x not in asked] or (every if trust != CONCLUDED else [])
    whole = asks_for(problem) == "integer"
    found = [x for x in found if x.is_integer() == whole] or found
    things = [*ASKS.findall(question), str(problem.meta.get("unit"))]
    thing = "|".join(map(re.escape, things))
    asks = [x for x in SENTENCE.split(question) if "?" in x] or [question]
    about = words_of(asks[-1]) - {x.casefold() for x in things}
    clauses = [x for x in CLAUSE.split(statement) if set(amounts(x)) & set(found)]
    likeness = [len(about & words_of(x)) for x in clauses]
    most = max([*likeness, 1])
    like = [x for x, n in zip(clauses, likeness, strict=True) if n == most]
    for rather in (
        re.findall(r"\b[12]\d{3}\b", statement) if YEAR.search(question) else [],
        re.findall(rf"\b(?:{thing}) (\d+)", statement),
        like if len(like) == 1 else [],
        re.findall(rf"(?<![\d.,])(?<!out of )(\d+) (?:{thing})\b", statement),
        GIVES.findall(statement),
        like,
        IS.findall(statement),
    ):
        these = [x for text in rather for x in amounts(text)]
        found = [x for x in found if x in these] or found
    return found[-1:]
