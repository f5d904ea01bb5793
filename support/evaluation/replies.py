r"""A reply before it is read: what in it is the reply's own, and where it refuses.

`own_words` leaves out thoughts in tags and what comes after the reply's end, `reply_of` asides
(confidence, sources, lists of other options); `tagged` and `json_answer` find an answer that has a
place of its own. Nothing here knows what an answer is: that is for grading.py.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from data import Problem
from support.evaluation.reading import ANYTHING, SENTENCE, plain, plain_question, words_of


def any_of(*patterns: str, start: str = "", flags: int = re.I | re.M) -> re.Pattern:
    """One expression out of several, each next to an example of what it finds; all begin at
    `start`, which is tried once."""
    return re.compile(f"{start}(?:{'|'.join(patterns)})", flags)


# --- marks in the raw text
THINK = any_of(  # <think> ... </think>, [THINK], ◁think▷
    r"[<\[◁](/?)(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)[>\]▷]",
)
END = any_of(
    r"</?s>|<eos>",
    r"<(?:start|end)_of_turn>|\[/?INST\]",
    r"<\|(?:im_start|im_end|eot_id|eot|end|endoftext|end_of_text|return|start)\|>",
    r"<\|(?:user|assistant)\|>",
)
QUESTION = r"(?:(?:next |new )?(?:question|problem|exercise)|human|user|instruction|q|问题|题目)"
NEXT_QUESTION = any_of(
    rf"^[#*>_ \t-]*{QUESTION}[*_ \t]*[:：]",  # "\n### Human: ..."
    rf"^[#*>_ \t-]*{QUESTION}[*_ \t]*#?\d+[*_ \t]*[:.：)]",  # "\nProblem 2. ..."
    rf"^[#*>_ \t-]*{QUESTION}[*_ \t]*#?\d+[*_ \t]*$",  # "\n## Question 2\n"
    r"(?<=[.!?)\]]) (?:Question|Human|User|Q) ?\d*:",  # "The answer is B. Question: ..."
)
TAG = any_of(
    r"[<\[](?:(?:final|correct)[_ ]?)?(?:answer|ans|choice|option|conclusion)[>\]]",
    r"<\|begin_of_box\|>",
)
TAG_END = re.compile(r"[<\[]/\w+[>\]]|<\|end_of_box\|>")
FIELD = re.compile(  # "answer": "B"  'final_answer': 25  "choice": "C"  "answer": [1, 2]
    r"""["'](?:(?:final|correct|selected|chosen|predicted)[ _-]?)?(answer|choice|option|prediction|
        letter)(?:[ _-]?(?:letter|choice|option|text|value))?["']\s*:\s*
        (?:"((?:[^"\\]|\\.)*)"|'([^'\n]*)'|(\[[^\[\]]*\])|([^\s,}\]{"'\[]+))""",
    re.IGNORECASE | re.VERBOSE)  # fmt: skip

# --- asides in the plain text
SURE = r"(?:confidence|certainty)"
OTHERS = r"(?:not|others?|incorrect|wrong|remaining|alternative|rejected)"
ASIDE = any_of(
    rf"^[^\w\n]*(?:(?:my|overall) )?{SURE}(?: (?:level|score|rating))?"
    r"\s?(?:\([^()\n]*\))?\s?[:=][ \t]*(?:\n[ \t]*)?.*",  # "Confidence: 95%"
    r"^[^\w\n]*(?:sources?|references?|citations?)\s?:.*",  # "Source: a book, page 4"
    rf"[(\[]\s*{SURE}\b[^()\n]*[)\]]",  # "(certainty: high)"
    rf"\bwith (?:\d+ ?%|\w+) {SURE}\b",
    r"\bI(?:'m| am) (?:about |around )?\d+(?:\.\d+)? ?% (?:sure|confident|certain)\b"
    r"(?! (?:that|the|it)\b)[^.\n]*",  # but not "I'm 80% sure that the answer is B"
    rf"^[^\w\n]*(?:why )?(?:the )?{OTHERS}\b[^\n:]{{0,40}}:?[ \t]*"
    r"(?:\n+[ \t]*[-*•(]*[ \t]?[A-J][).:].*)+",  # "Other options:\nA. dog\nD. mouse"
)
EXPLAINS = any_of(  # "B\n\nExplanation: ..."
    r"(?:^|(?<=[.!?)] ))[^\w\n]*(?:explanation|reason(?:ing)?|rationale|justification|proof|steps?)"
    r"\b[^\w\n]*:",
)

# --- refusals, of lower case
CANNOT = (
    r"(?:cannot|can't|can not|couldn't|could not|unable to|impossible to|not possible to|"
    r"(?:difficult|hard) to|"
    r"(?:not|n't) able to|no way (?:to|of))(?: \w+)?"
)
FIND = (
    r"(?:determine|tell|say|know|answer|give|provide|identify|infer|access|process|help|assist|"
    r"analy[sz]e|conclude|decide|display|confirm|calculate|find|solve|choose|count|estimate)"
)
FOUND = r"(?:determined|answered|told|known|identified|inferred|calculated|found|said)"
DATA = r"(?:information|context|data|details?)"
IMAGE = r"(?:image|picture|figure|chart|graph|photo|diagram)s?"
REFUSES = any_of(
    r"(?:sorry|as an ai)\b",
    rf"{CANNOT} {FIND}(?:ing)?\b",  # it is impossible to determine
    rf"{CANNOT} be (?:\w+ )?{FOUND}\b",  # cannot be determined
    r"(?:i|we)(?: \w+)? (?:cannot|can't|can not|am unable to|am not able to)(?: \w+)? "
    r"(?:see|view|have access)\b",  # I cannot see the image
    rf"(?:i|we) (?:don't|do not)(?: \w+)? (?:know|see|have (?:access|enough|the {IMAGE}))\b",
    rf"(?:not|\w+n't|without|in)\s(?:\w+ ){{0,3}}(?:enough|sufficient) (?:\w+ )?{DATA}\b",
    rf"insufficient {DATA}\b",
    rf"(?:more|additional) (?:\w+ )?{DATA} (?:(?:is|are|would be) )?(?:needed|required|to)\b",
    r"not (?:specified|given|mentioned|stated|provided) in the\b",
    rf"no {IMAGE}\b[^.\n]{{0,20}}\b(?:provided|attached|available|shown|given|here)\b",
    rf"i (?:(?:would )?need|(?:see|have|received) no)\b[^.\n]{{0,20}} (?:{IMAGE}|{DATA})\b",
    r"(?:please|could you|can you) (?:\w+ )?(?:provide|describe|upload|share|attach|send)\b",
    r"无法(?:确定|判断|回答)",
    start=r"(?:\b|(?=无法))",
    flags=0,
)
NONE_FITS = any_of(
    r"(?<![a-j][).:] )\bnone of (?:the|these)(?! other| rest| remaining) (?:\w+ ){0,2}?"
    r"(?:options?|choices?|answers?|above)\b",  # none of the options is correct
    r"\bnot (?:\w+ )?(?:among|in|one of) the (?:\w+ )?(?:options|choices|answers)\b",
    r"\bno (?!other)(?:\w+ )?(?:option|choice) (?:that )?(?:\w+ )?(?:match|fit|is correct)",
    r"\b(?:do|does)(?:n't| not) (?:match|fit|correspond to) any\b",
    flags=0,
)


# --- what is the reply's own
def own_words(problem: Problem, text: str) -> str:
    """The raw reply without thoughts in tags and without what follows its end: a token that ends a
    turn, or an invented next question. The problem's own question, repeated, ends nothing."""
    text = text.rpartition("<|channel|>final<|message|>")[2]
    first, *rest = THINK.split(text)  # text, "/" or "", text, ...
    shown = [after for mark, after in zip(rest[::2], rest[1::2], strict=True) if mark]
    if not rest or not rest[0]:
        shown.insert(0, first)
    if rest and not rest[-2] and (tag := TAG.search(rest[-1])):  # an answer ends an open thought
        shown.append(rest[-1][tag.start() :])
    turns = [turn for turn in END.split("\n".join(shown)) if turn.strip()]
    text = re.sub(r"\A\s*(?:assistant|model)\s*\n", "", turns[0]) if turns else ""
    asked = words_of(problem.question)
    for m in NEXT_QUESTION.finditer(text):
        own = words_of(text[m.end() : m.end() + 2 * len(problem.question) + 50])
        if re.search(r"\w", text[: m.start()]) and len(asked & own) < 0.8 * len(asked):
            return text[: m.start()]
    return text


def without_asides(problem: Problem, text: str) -> str:
    """A plain text without confidence, sources, lists of other options and sentences that repeat
    the question."""
    text = ASIDE.sub("", text)
    for sentence in SENTENCE.split(plain_question(problem.question)):
        if len(sentence.split()) > 2 and len(sentence) < 500:
            whole = rf"(?:^|(?<=[.!?。]\s)|(?<=。)){re.escape(sentence.strip())}(?=\s|$)"
            text = re.sub(whole, "", text, flags=re.MULTILINE) if sentence.strip() in text else text
    return text


def tagged(text: str) -> str | None:
    """What the last answer tag that holds anything holds, None without one."""
    for m in reversed(list(TAG.finditer(text))):
        inside = TAG_END.split(text[m.end() :], maxsplit=1)[0]
        if inside.strip():
            return inside
    return None


def json_answer(text: str) -> str | None:
    """What the last answer field of a JSON object says, "" for null, None without one."""
    if "{" not in text:
        return None
    fields = [m.groups("") for m in FIELD.finditer(text)]
    fields = [x for x in fields if x[0].casefold() == "answer"] or fields
    if not fields:
        return None
    answer = "".join(fields[-1][1:]).replace("\\\\", "\\").replace('\\"', '"')
    return "" if answer in ("null", "None") else answer


# --- a plain reply
@dataclass(frozen=True)
class Reply:
    """A plain reply, and the positions after which an answer counts; -1: it counts anywhere."""

    text: str

    @cached_property
    def lines(self) -> list[str]:
        return [x for x in self.text.splitlines() if ANYTHING.search(x)]

    @cached_property
    def sentences(self) -> list[str]:
        return [x for x in SENTENCE.split(self.text) if ANYTHING.search(x)]

    @cached_property
    def refused(self) -> int:
        """Position of its last refusal."""
        return max((m.start() for m in REFUSES.finditer(self.text.lower())), default=-1)

    @cached_property
    def unfit(self) -> int:
        """Position of its last statement that no choice fits."""
        return max((m.start() for m in NONE_FITS.finditer(self.text.lower())), default=-1)


def reply_of(problem: Problem, text: str) -> Reply:
    return Reply(without_asides(problem, plain(text)))
