"""What is kept of a teacher's reply: the thought, as a student shall learn to write it.

`shape` takes out what a student should not learn: markdown, headings without content, the teacher's
talk about the task and to itself, a last line of its own. LaTeX stays, as the questions are written
in it; so do "- " and "1. " before a line: one may be a minus, the other is what "step 1" refers to.
`apart` finds the thought of a teacher that reasons in its answer, `length` counts what is left,
`distinct` tells whether two thoughts are two (--diverse), `graded` reads the answer.

Left out on purpose: a model that rewrites thoughts. All here is by rule, and pure.
"""

import re
from dataclasses import replace

import data
from support.dataset.choices import BOXED
from support.dataset.tokenizers import plain_ids
from support.evaluation import grading

EMPTY_WORDS = set(  # a heading of nothing but these says nothing about the problem
    "a about all alternative an analysis analyze analyzing and answer approach by calculation "
    "check checking choices computation conclusion correct double final find for formulation given "
    "goal identify in information initial internal it key let matching mental monologue of options "
    "our plan pre problem process provided question reasoning recall result s selection solution "
    "solve solving step steps summary task the thinking thought to understand understanding "
    "verification verify walkthrough we what with".split()
)
HEADING = re.compile(
    r"#{1,6} (.+)|(?:\d+[.)] )?\*\*(?:\d+[.)] )?([^*]+)\*\*:?|((?:Thinking|Thought) [Pp]rocess:)"
)
RULED_OFF = re.compile(r"-{3,}|\*{3,}|_{3,}|```\w*")
MARKUP = (
    (re.compile(r"(?<![\w)*])(\*{1,3})(?=[^\s*])([^*\n]*[^\s*])\1(?![\w(*])"), r"\2"),  # no 2*x*y
    (re.compile(r"`([^`\n]+)`"), r"\1"),
    (BOXED, r"\1"),
    (re.compile(r"^#{1,6} ", re.MULTILINE), ""),
    (re.compile(r"^[*•] ", re.MULTILINE), "- "),
)
TALK = re.compile(  # how a sentence begins that is about the task, or about the teacher's own text
    r"(?:- )?(?:the user (?:wants|asks|is asking|would like|needs)\b"
    r"|the (?:question|prompt|hint|task) (?:requires|wants|asks for|suggests that the answer "
    r"should be) an? (?:integer|floating-point)"
    r"|the final (?:answer|value) (?:should|must|needs to) be (?:an integer|provided|given)"
    r"|let(?:'s| me) (?:think[.,:]|think (?:step|about (?:this|it))|break [^.]*\bdown\b)"
    r"|here(?:'s| is) (?:a|my|the) (?:thinking|thought) process|(?:okay|ok|hmm|alright)[.,:]*$"
    r"|(?:the|all|my|both) (?:[\w,]+ )*?"
    r"(?:answer|steps|calculations?|reasoning|solution|approach) (?:[\w,]+ )*?"
    r"(?:seems?|looks?|appears?|are) (?:[\w,]+ )*?(?:correct|consistent|logical|robust|sound)\b)"
)
NEWS = re.compile(  # what such a sentence may say all the same: a number, a relation, a reason
    r"\d+(?:[.,]\d+)*|[=<>≈≠]|\bimpl(?:ies|ying)\b"
    r"|\b(?:given|since|because|so|thus|therefore|which means|shows?|however|but)\b"
)
BETWEEN_SENTENCES = re.compile(r"(?<=[.?!:])( )(?=[A-Z\"'(*$\\∠△])")
LABEL = re.compile(r"(?:the )?(?:final |correct )?answer ?: ?", re.IGNORECASE)


def apart(reply):
    """The reply of a teacher that reasons in its answer: what stands before the line or sentence
    of its last "Answer:" or "answer is" is the thought."""
    found = list(re.finditer(r"\banswer(?:\W{0,3}:| is\b)", reply.answer, re.IGNORECASE))
    at = found[-1].start() if found else 0
    cut = max(reply.answer.rfind("\n", 0, at), reply.answer.rfind(". ", 0, at)) + 1
    thought = reply.answer[:cut].strip() if found else reply.answer
    return replace(reply, thought=thought, answer=reply.answer[cut:].strip())


def shape(problem, thought, answer):
    """(thought, answer) as the student gets them: of the thought what reasons, of the answer the
    letter or short text that it commits to. Pure; what it has made it leaves as it is.

    No line of the thought begins with "Answer:", which `data.pali_suffix` writes once, from the
    gold answer. A thought that is nothing but talk stays, without its marks.
    """
    last = LABEL.sub("", (unmarked(answer).splitlines() or [""])[-1])
    said = graded(problem, answer).parsed or graded(problem, last).parsed or last
    told = " ".join([problem.question, problem.hint, *problem.choices]).lower()
    new, facts = thought, set(NEWS.findall(told))
    while (old := new) and (new := without_talk(old, facts)) != old:
        pass  # what one mark hid may be another, and talk may stand before an answer line
    return new or unmarked(thought), said


def without_talk(thought, facts):
    """A thought without headings, answer lines and sentences of talk; `facts`: the question's."""
    lines = []
    for line in thought.splitlines():
        heading = HEADING.fullmatch(line := " ".join(line.split()))
        if heading and set(re.findall(r"\w+", heading[heading.lastindex].lower())) <= EMPTY_WORDS:
            continue
        parts = BETWEEN_SENTENCES.split(unmarked(line))  # sentence, blank, sentence ...
        line = "".join("" if is_talk(part, facts) else part for part in parts).strip()
        if label := LABEL.match(line):
            line = line[label.end() :]
            if "=" not in line and len(line.split()) <= 5:
                continue
        lines.append(line.replace(grading.CUE, grading.CUE.lower()))
    return "\n".join(filter(None, lines))


def is_talk(sentence, facts):
    """About the task or to itself, and without a number or a relation that the question lacks."""
    text = sentence.lower()
    return TALK.match(text) is not None and set(NEWS.findall(text)) <= facts


def unmarked(text):
    """The text without markdown's marks, rules and blank lines; \\boxed{} is its content."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line and not RULED_OFF.fullmatch(line))
    for mark, inside in MARKUP:
        text = mark.sub(inside, text)
    return text


def length(problem, thought, tokenizer=None):
    """Tokens of all that a student writes for a thought: thought, answer line and <eos>, as
    train.py's --max-suffix counts them; without a tokenizer its words."""
    trace = {"thought": thought, "verdict": {"correct": True}}
    text = data.pali_suffix(problem, trace)
    return len(plain_ids(tokenizer, text)) + 1 if tokenizer else len(text.split())


def word_grams(text, n=3):
    """The runs of n words of a text, as a set; of a shorter text the one run that it is."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def distinct(thought, others, share=0.6):
    """Whether a thought is another one than each of `others` (--diverse): it shares less than
    `share` of the runs of three words that the shorter of the two has. The same sentences in
    another order are the same thought; a question quoted in both adds few such runs."""
    ours = word_grams(thought)
    others = map(word_grams, others)
    return all(len(ours & other) < share * min(len(ours), len(other)) for other in others)


def graded(problem, answer):
    """grading.py's Grade. Where it reads one form only (ScienceQA), a teacher may use any other."""
    grade, said = grading.grade(problem, answer), grading.committed(problem, answer)
    if grade.parsed is None and said:
        return replace(grading.grade(problem, said[0]), how=said[1])
    return grade
