r"""One reply: what it answers, and whether that is right.

`commitment` reads a reply as a careful person does: the last explicit answer, else what the reply
comes to, else what it mentions. The first pass that finds an answer names it in `Grade.how`:

    in a tag          <answer>B</answer>
    in JSON           {"answer": "B"}
    in words          The answer is B. Option B is correct. Answer: B
    in a box          \boxed{B}; of words and boxes the last counts
    as a line         B. 140°     (the last line or the first, with next to nothing else on it)
    in a conclusion   Therefore, the angle is 140°. Or the last numbers, if after "="
    in own words      Teal is not the minimum.     (of a yes-or-no question)
    in prose          The angle at C is 140°, as its sides are equal.

A reply that cannot be read is a failure, counted and shown, never a guess. See docs/grading.md.
Implements the answer extraction of ScienceQA (Lu et al. 2022, arXiv 2209.09513) as Multimodal-CoT
(Zhang et al. 2023, arXiv 2302.00923) calls it (`published`), and MathVista's comparison (`right`).
"""

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from data import Problem
from support.dataset.choices import LETTERS
from support.evaluation.reading import (
    ANYTHING,
    CONCLUDED,
    DENIES,
    LETTER,
    LITTLE,
    MENTIONED,
    NO_SUCH_LETTER,
    NOTHING_READ,
    SENTENCE,
    Read,
    amounts,
    asks_for,
    distance,
    is_yes_no,
    plain,
    pole,
    read,
    squash,
    squashed,
)
from support.evaluation.replies import (
    EXPLAINS,
    NONE_FITS,
    REFUSES,
    Reply,
    json_answer,
    own_words,
    reply_of,
    tagged,
)

CUE = "Answer:"  # what PaliGemma's last line begins with
ANSWER = re.compile(r"The answer is \(([A-Z])\)")
GUESS_LETTERS = "ABCDE"  # the original's, however many choices a problem has
DOUBTFUL = ("in prose", "in own words")  # an answer is mentioned, not committed to
AT_ODDS = ", not concluded"  # a choice is stated, and the reply comes to something else


@dataclass(frozen=True)
class Grade:
    """`parsed`: the answer in its `normal` form (a letter where there are choices), None if none
    could be read. `how`: what it was, and the pass that read it, or why nothing was read:

    letter, choice text, nearest choice, number, list, text + the pass, as in "letter in words"
    + ", not concluded": the reply comes to another choice, or to none of them
    no answer found, empty answer, refused, several answers, no such choice, letter not among the
    options
    + "; guessed X": what the original scorers make of a failed parse (--faithful-parse)
    """

    correct: bool
    parsed: str | None
    how: str


STOP = re.compile(r"\n|⟧|[。;]|[.!?](?=\s|$)")

# --- where a reply says its answer, or comes to one
SAYS = re.compile(
    r"""\b(?:(?:answer|ans)|(?:correct|right|best|final|closest|my)\s(?:option|choice|pick|guess))\b
        (?:\s(?:letter|value|choice|option))? (?:\s(?:to|for|of)\b[^.:\n()]{0,90}?)? \s*
        (?:\b(?:is|was|(?:would|should|must|will|may|might|could)\sbe)\b(?!n't)
             (?:\s(?:therefore|thus|then|that))?[\s:]*             # The answer is B
         | [:=→]+ | -(?=\s) | (?<=answer)\n)                        # Final answer: B
      | \bI(?:'ll|'d|\swould|\swill)?\s(?:choose|pick|select|go\swith|opt\sfor)\s   # I choose B
      | (?:答案|正确选项|[故应]?[选選][项择項擇]?|答え|정답|답) \s*(?:应该是|是|为|は|은)? \s*:?
      | (?:پاسخ|جواب|گزینه) (?:\s(?:نهایی|صحیح|درست))? \s*:?
      | \b(?:réponse|respuesta|resposta|risposta|antwort|ответ)(?:\s\w+)?
            \s*(?:\b(?:est|es|é|è|ist)\b|:|-)
      | (?=(?:\([A-Z]\)|\boption\s[A-Z]\b) [^.\n()]{0,60}?                # Option B is correct
           \sis\s(?:the\s)?(?:correct|right|best|answer)\b)
      | (?=\b[B-J]\sis\s(?:the\s)?(?:correct|right|best)\b)
      | ⟦                                                                # \boxed{B}, see `plain`
    """,
    re.IGNORECASE | re.VERBOSE,
)
LABEL = re.compile(r"\banswer *(?:: *|\n)", re.IGNORECASE)  # what follows is the answer's part
CONCLUDES = re.compile(  # "Therefore, the angle is 45°."
    r"(?:^|(?<=[.!?] ))[ \t]*(?:(?:and|but) )?(?:therefore|thus|so|hence|in conclusion|"
    r"overall|consequently|finally|∴|因此|所以|故|بنابراین)(?![a-z]| that\b)",
    re.IGNORECASE | re.MULTILINE)  # fmt: skip
CASE = re.compile(  # "If there are more cars, the answer is A. Otherwise, the answer is B."
    r"\W*(?:if|otherwise|else|assuming|suppos\w+|unless|in case)\b", re.IGNORECASE
)
SUPPOSED = re.compile(r"\b(?:if|unless|assuming|provided that)\b", re.IGNORECASE)
OPENING = re.compile(  # No, Teal is not ...  A: No  Yes it is  By the chart, no, ...
    r"(?:\W*(?:\w\W{1,2})?|[^.,:]{1,60}, )(yes|no|true|false)\b"
    r"(?=\W*$|[,.:;!]| ?-(?!one\b)| (?:it|they|this|that|there)\b)", re.IGNORECASE)  # fmt: skip
VERB = re.compile(r"\b(?:is|are|was|were|has|have|be)\b")


# --- the passes over a plain text
def statement_after(text: str, start: int, end: int | None = None) -> str | None:
    """What stands after a cue, to the end of its sentence; None if the text ends there."""
    rest = text[start : min(start + 1000, end or len(text))].lstrip(" \n\t:⟦")
    if not ANYTHING.search(rest):
        return None
    stop = STOP.search(rest)
    return rest[: stop.end() if stop[0] == "?" else stop.start()] if stop else rest


def statements(problem: Problem, reply: Reply) -> Iterator[tuple[str | None, str, bool]]:
    """(what is stated as the answer, where, whether of one case only), the last first; None of a
    cue with nothing after it. Left out: what is asked, and what the reply says does not fit."""
    matches = list(SAYS.finditer(reply.text))
    words = [m.start() for m in matches if m[0] != "⟦"]
    until = dict(pairwise(words))  # a statement ends where the next one begins
    # A box before the last sentence may hold a step on the way: it comes after all words.
    end = reply.text.rfind(reply.sentences[-1])
    matches.sort(key=lambda m: (m[0] != "⟦" or m.start() >= end, m.start()), reverse=True)
    for m in matches:
        statement = statement_after(reply.text, m.end(), until.get(m.start()))
        if problem.choices and m.start() < reply.unfit:
            continue
        if statement and not is_choice(problem, statement):
            after = reply.text[m.end() :]
            section = m[0].endswith("\n") or after.startswith("\n")
            # "Here is the answer:\n\nThere are 4 cubes. ..." introduces a solution
            introduces = section and VERB.search(statement)
            introduces = introduces and squash(after.lstrip()[len(statement) :])
            if introduces or statement.endswith("?"):
                continue
        before = SENTENCE.split(reply.text[max(0, m.start() - 300) : m.start()])[-1]
        supposed = bool(CASE.match(before) or SUPPOSED.search(statement or ""))
        yield statement, "in a box" if m[0] == "⟦" else "in words", supposed


def first_read(found: Iterable[Read]) -> Read:
    """The first that is an answer, else the first reason that says more than `NOTHING_READ`."""
    failure = NOTHING_READ
    for parsed, how in found:
        if parsed is not None:
            return parsed, how
        failure = how if failure == NOTHING_READ else failure
    return None, failure


def stated(problem: Problem, reply: Reply) -> Read:
    """The last answer in words or in a box; of cases ("If ..., the answer is A") only if all come
    to the same."""
    cases, failure = {}, NOTHING_READ
    for i, (statement, where, supposed) in enumerate(statements(problem, reply)):
        if statement is None and i == 0:
            return None, "empty answer"
        parsed, how = read(problem, statement or "")
        if parsed is not None and not supposed:
            return parsed, f"{how} {where}"
        if parsed is not None:
            cases.setdefault(parsed, f"{how} {where}")
        elif statement and REFUSES.search(statement.lower()):
            return None, "refused"
        elif how in ("several answers", NO_SUCH_LETTER):
            return None, how
        elif how != NOTHING_READ:  # a value that no choice has: an earlier statement may name one
            failure = how
    if len(cases) == 1:
        return next(iter(cases.items()))
    return None, "several answers" if cases else failure


def broken_off(reply: Reply) -> bool:
    """Does a line of several sentences end in the middle of one? It has not come to its answer."""
    line = reply.lines[-1].rstrip()
    return len([x for x in SENTENCE.split(line) if ANYTHING.search(x)]) > 1 and line[-1].isalnum()


def is_choice(problem: Problem, line: str) -> bool:
    """Is a line the text of a choice, with its letter or without?"""
    without_letter = re.sub(r"^\W*[A-J][).:\]]", "", line)
    return bool({squash(line), squash(without_letter)} & set(squashed(problem.choices)))


def bare_line(problem: Problem, line: str) -> bool:
    """Is a line nothing but an answer: a choice, or four words without a verb?"""
    few = len(line.split()) < 5 and not VERB.search(line) and not line.rstrip().endswith("?")
    return is_choice(problem, line) or few and not SAYS.search(line)


def lined(problem: Problem, reply: Reply) -> Read:
    """An answer that is all of a line: before an explanation, the last one, the first one. A yes or
    no that a reply begins with is one."""
    before, *explained = EXPLAINS.split(reply.text, maxsplit=1)
    lines = [x for x in before.splitlines() if ANYTHING.search(x)][-1:] if explained else []
    lines += [reply.lines[-1], reply.sentences[-1], reply.lines[0], reply.sentences[0]]
    lines.sort(key=lambda line: not is_choice(problem, line))
    failure = NOTHING_READ
    for line in lines:
        if bare_line(problem, line) and reply.text.rfind(line) > reply.refused:
            parsed, how = read(problem, line)
            if how == "letter" and reply.sentences[1:] and not LETTER.match(line.strip(" \t*\"'⟦")):
                continue  # the last words of a text: "... shows B"
            if parsed is not None:
                return parsed, f"{how} as a line"
            failure = how if failure == NOTHING_READ else failure
    first = reply.sentences[0]
    if read(problem, first)[1] == NO_SUCH_LETTER and not VERB.search(first):  # a made-up choice
        return None, NO_SUCH_LETTER
    if is_yes_no(problem) and reply.refused < 0 and (opening := OPENING.match(first)):
        return pole(squashed(problem.choices), opening[1]), "choice text as a line"
    return None, failure


def concluded(problem: Problem, reply: Reply) -> Read:
    """The last conclusion, or equation if it has the last numbers, after any refusal."""
    last = next((x for x in reply.sentences[:-4:-1] if amounts(x)), "")
    starts = [m.start() for m in CONCLUDES.finditer(reply.text)]
    if reply.refused < 0 and re.search("[=≈]", last):
        starts.append(reply.text.rfind(last))
    failure = NOTHING_READ
    for start in sorted(starts, reverse=True):
        statement = statement_after(reply.text, start) if start > reply.refused else None
        if statement and not statement.endswith("?"):
            parsed, how = read(problem, statement, CONCLUDED)
            if parsed is not None:
                return parsed, f"{how} in a conclusion"
            failure = how if how != NOTHING_READ else failure
    return None, failure


def stems(text: str) -> list[str]:
    """The words of a text in their order, "intersects" as "intersect"."""
    words = [x for x in re.findall(r"\w+", text.casefold()) if x not in LITTLE | {"not", "no"}]
    return [re.sub(r"(?<=\w{3})(?:es|s|ed)$", "", x) for x in words]


def implied(problem: Problem, reply: Reply) -> Read:
    """The yes or no of a sentence that has the words of the question in their order, so that a
    "not" decides: "Teal is not the minimum." """
    if not is_yes_no(problem) or reply.refused >= 0:
        return None, NOTHING_READ
    asked = stems(problem.question)
    for sentence in reversed(reply.sentences):
        if sentence.endswith("?") or re.search(r"\b(?:if|whether|question)\b", sentence):
            continue
        clause = re.split(r"[,;:]|\b(?:as|because|since|which|but)\b", sentence)[0]
        for part in (clause, sentence):
            words = iter(stems(part))
            if asked and all(word in words for word in asked):
                word = ("yes", "no")[len(DENIES.findall(part)) % 2]
                return pole(squashed(problem.choices), word), "choice text in own words"
    return None, NOTHING_READ


def by_likeness(problem: Problem, sentences: list[str]) -> list[str]:
    """Sentences with numbers first, then those most like the last one of the question; the end of
    a text of more than eight comes before that."""
    *_, asks = [x for x in SENTENCE.split(problem.question) if squash(x)] or [""]
    asked = set(re.findall(r"\w+", asks.casefold()))
    likeness = {x: len(asked & set(re.findall(r"\w+", x.casefold()))) for x in sentences[::-1]}
    likeness |= {x: math.inf for x in sentences[-2:] if len(sentences) > 8}
    return sorted(likeness, key=lambda x: (not amounts(x), -likeness[x]))


def mentioned(problem: Problem, sentences: list[str]) -> Read:
    """What sentences mention, a letter rather than anything else; two letters are none."""
    sentences = [x for x in sentences if not x.endswith("?")]
    found = [read(problem, x, MENTIONED) for x in by_likeness(problem, sentences)]
    if len({parsed for parsed, how in found if how == "letter"}) > 1:
        return None, "several answers"
    parsed, how = first_read(sorted(found, key=lambda x: x[1] != "letter"))
    return parsed, how if parsed is None else f"{how} in prose"


def commitment(problem: Problem, text: str, prose: bool = False) -> Read:
    """The answer of a reply. With `prose` all its sentences are searched in the end, else the last
    three."""
    text = own_words(problem, text)
    for inside, where in ((tagged(text), "in a tag"), (json_answer(text), "in JSON")):
        if inside is not None:
            parsed, how = commitment(problem, inside, prose=True)
            return parsed, how if parsed is None else f"{re.split(' in | as ', how)[0]} {where}"
    reply = reply_of(problem, text)
    if not reply.sentences:
        return None, NOTHING_READ
    parsed, how = stated(problem, reply)
    if parsed is not None:
        return parsed, how + AT_ODDS if at_odds(problem, reply, parsed) else how
    if problem.choices and reply.unfit >= 0:
        return choice_like(problem, NONE_FITS, "no such choice")
    if how == "refused":
        return choice_like(problem, REFUSES, how)
    if how != NOTHING_READ:
        return None, how
    if (parts := LABEL.split(reply.text))[1:]:
        reply = reply_of(problem, parts[-1])
    return unstated(problem, reply, prose)


def unstated(problem: Problem, reply: Reply, prose: bool) -> Read:
    """The answer that a reply comes to or mentions, where it states none."""
    found = first_read(search(problem, reply) for search in (lined, concluded, implied))
    if found[0] is None and reply.refused >= 0:
        return choice_like(problem, REFUSES, "refused")
    if found[0] is None and not broken_off(reply):
        sentences = reply.sentences if prose else reply.sentences[-3:]
        found = first_read([found, mentioned(problem, sentences)])
    if prose and found == (None, NOTHING_READ) and asks_for(problem) in ("number", "text"):
        return squash(reply.lines[-1]), "text in prose"
    return found


def at_odds(problem: Problem, reply: Reply, parsed: str) -> bool:
    """Does a reply come to another choice than it states, or to a value that no choice has?"""
    if not problem.choices:
        return False
    end, how = concluded(problem, reply)
    return how == "no such choice" or end not in (None, parsed)


def choice_like(problem: Problem, pattern: re.Pattern, failure: str) -> Read:
    """The one choice that says what a reply says: "cannot be determined", "none of the above"."""
    pairs = zip(LETTERS, problem.choices, strict=False)
    hits = [letter for letter, text in pairs if pattern.search(text.lower())]
    return (hits[0], "choice text in words") if len(hits) == 1 else (None, failure)


def committed(problem: Problem, text: str) -> tuple[str, str] | None:
    """(parsed, how): the answer that any text commits to (see `Grade`), in its normal form, or
    None. Sentences that only mention an answer commit to nothing."""
    parsed, how = commitment(problem, text)
    return None if parsed is None or how.endswith(DOUBTFUL) else (parsed, how)


def agrees(problem: Problem, rationale: str, response: str) -> bool | None:
    """Is the rationale's own last answer the response's? None if one of them has none. What the
    rationale's last sentences only mention may confirm an answer, but not contradict it."""
    ours, how = commitment(problem, rationale)
    theirs, _ = commitment(problem, response, True)
    if ours is None or theirs is None:
        return None
    if ours == theirs:
        return True
    return None if how.endswith(DOUBTFUL) else False


# --- the grade
def normal(problem: Problem, answer: str) -> str:
    """One form for all spellings of an answer, so that two can be compared: a letter where there
    are choices (a letter comes before a choice of that text), else a number, a list or a text."""
    parsed, _ = read(problem, plain(answer))
    return squash(plain(answer)) if parsed is None else parsed


def right(problem: Problem, parsed: str | None) -> bool:
    """Is an answer in its normal form the gold one? Of choices with one text MathVista takes any,
    and ScienceQA the one with the right index."""
    if not problem.choices:
        return parsed == normal(problem, problem.answer)
    index = problem.meta.get("answer_index")
    if index is None or "answer_type" in problem.meta:
        choices = dict(zip(LETTERS, problem.choices, strict=False))
        return choices.get(parsed) == problem.answer
    return parsed == LETTERS[index]


def published(problem: Problem, response: str) -> Read:
    """The answer by ScienceQA's rule: exactly one "The answer is (X)", X among the
    choices. Ours: without one, or with an "Answer:" after it, what follows the last "Answer:", or
    the whole response, if it is a letter or the text of one choice."""
    options = LETTERS[: len(problem.choices)]
    matches = list(ANSWER.finditer(response))
    if matches and response.rfind(CUE) < matches[-1].start():
        if len(matches) > 1:
            return None, "several answers"
        letter = matches[0][1]
        return (letter, "letter") if letter in options else (None, NO_SUCH_LETTER)
    statement, *texts = (" ".join(x.split()).strip(" .()").casefold()
                    for x in (response.rpartition(CUE)[2], *problem.choices))  # fmt: skip
    for how, names in (("letter", list(options.casefold())), ("choice text", texts)):
        if names.count(statement) == 1:
            return options[names.index(statement)], how
    return None, NOTHING_READ


def grade(
    problem: Problem, response: str, guess: random.Random | None = None, strict: bool = False
) -> Grade:
    """Grade one response by its `commitment`, prose included.

    strict  choices of problems without an answer_type by ScienceQA's `published` rule
    guess   the original scorers' verdict where there are choices. ScienceQA's: exactly one "The
            answer is (A-E)", or one of A-E drawn from this random.Random(42), in prediction order.
            MathVista's: of an unreadable reply the choice nearest to it in edit distance
    """
    scienceqa = bool(problem.choices) and "answer_type" not in problem.meta
    if scienceqa and guess is not None:
        letters = ANSWER.findall(response)
        if len(letters) == 1 and letters[0] in GUESS_LETTERS:
            return Grade(right(problem, letters[0]), letters[0], "letter")
        failures = (NOTHING_READ, NO_SUCH_LETTER, "several answers")
        drawn, how = guess.choice(GUESS_LETTERS), failures[min(len(letters), 2)]
        return Grade(right(problem, drawn), None, f"{how}; guessed {drawn}")
    if scienceqa and strict:
        parsed, how = published(problem, response)
    else:
        parsed, how = commitment(problem, response, prose=True)
    if parsed is None and guess is not None and problem.choices:
        statement = last_statement(plain(response)) or response.strip()
        steps = [distance(statement[:200], choice) for choice in problem.choices]
        drawn = LETTERS[steps.index(min(steps))]
        return Grade(right(problem, drawn), None, f"{how}; guessed {drawn}")
    return Grade(parsed is not None and right(problem, parsed), parsed, how)


def last_statement(text: str) -> str | None:
    """What stands after the last cue or conclusion of a plain text."""
    matches = [m for pattern in (SAYS, CONCLUDES) for m in pattern.finditer(text)]
    for m in sorted(matches, key=lambda m: m.start(), reverse=True):
        start = m.start() if m.re is CONCLUDES else m.end()
        if statement := statement_after(text, start):
            return statement
    return None


def is_conclusive(grade: Grade) -> bool:
    """Whether the rule's verdict is final; if not, a judge should be asked: nothing was
    read, or only the nearest choice, or a sentence in passing, or a text that is not the gold text
    but may mean the same. Measured: tests/test_grading.py."""
    doubtful = grade.how.startswith(("nearest", "list", "text")) and not grade.correct
    weak = grade.how.endswith((*DOUBTFUL, AT_ODDS))
    return grade.parsed is not None and not doubtful and not weak
