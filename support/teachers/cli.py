"""teacher.py's command line: its settings, the cost of a dry run, the closing table."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import data
from support import files
from support.evaluation import metrics, tables
from support.teachers.batch_api import BATCH_SHARE
from support.teachers.cache import paid
from support.teachers.calls import Calls, cost, input_tokens
from support.teachers.filters import JUDGE_OUTPUT, agreement, suffix_length
from support.teachers.providers import ASK, PRICES_OF, Model

# --- settings


@dataclass(frozen=True)
class TeacherSettings:
    """A command line. `parse_args` fills in the two defaults that depend on other settings."""

    data: str = "demo"  # runs offline, without a key or a download
    split: str = "train"  # the traces are there to be learned from
    limit: int | None = None  # all problems
    teacher: str = ""  # demo for the demo's data, else gemini, which pali_reason's teacher was
    judge: str = "rule"  # free, and agrees with Claude on 243 of pali_reason's 251 traces
    out: str = "traces.jsonl"
    source: str | None = None  # --from, a word that Python keeps for itself
    max_output: int = 16_000  # room for long thoughts; a student learns from some hundreds
    effort: str | None = None  # the model's own default
    thinking_budget: int | None = None  # newer models have --effort instead
    attempts: int | None = None  # as many as --diverse: no reply is replaced
    diverse: int = 1  # as in pali_reason
    hint_gold: bool = False  # a thought written towards a known answer need not lead to it
    zero_shot_cot: bool = False  # today's models think without being asked to
    shots: int = 0  # as above
    seed: int = 0
    judge_all: bool = False  # the rule is free, and conclusive for most answers
    judge_image: bool = True  # without it nobody notices what a thought invents
    max_tokens: int | None = None  # train.py has its own limit
    tokenizer: str | None = None  # words are counted instead
    concurrency: int = 8  # more would meet the providers' rate limits sooner
    timeout: float = 600.0  # seconds; long thoughts take minutes
    retries: int = 6  # waits up to 16 s in all, or as long as the server asks for
    batch: bool = False  # cheaper, but nobody wants to wait a day for a first look
    max_cost: float | None = None  # --dry-run shows the cost first
    dry_run: bool = False
    price: Sequence[float] | None = None  # PRICES, where the model is in it
    judge_price: Sequence[float] | None = None

    @property
    def reasons_in_reply(self) -> bool:
        """Whether the teacher reasons in its reply, as it has no thoughts of its own to show."""
        return bool(self.zero_shot_cot or self.shots)


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number of at least 1")
    return int(text)


TYPES = {"N": count, "INT": int, "S": float, "USD": float, ("IN", "OUT"): float}  # by metavar
CHOICES = {"split": data.SPLITS, "effort": ("low", "medium", "high", "xhigh", "max")}
GROUPS = {  # heading: {setting: (metavar, help)}
    "the questions": {
        "data": ("DIR", "a folder, a .jsonl file, scienceqa, mathvista (%(default)s)"),
        "split": (None, "split to take the problems from (%(default)s)"),
        "limit": ("N", "only the first N problems"),
        "hint_gold": (None, "give the teacher the answer; recorded: it then rationalises"),
        "zero_shot_cot": (None, "for a teacher without thoughts: let it reason in its reply"),
        "shots": ("INT", "the same, with this many worked examples from the training split"),
    },
    "the teacher and its parameters": {
        "teacher": ("SPEC", "gemini[:MODEL], anthropic[:MODEL], demo (the last for its own data)"),
        "source": ("FILE", "no teacher: judge and shape a file's replies (ours, pali_reason's)"),
        "max_output": ("N", "maximum tokens of a reply, thoughts included (%(default)s)"),
        "effort": (None, "how hard to think (the model's default)"),
        "thinking_budget": ("N", "tokens of thought, for older models without --effort"),
        "seed": ("INT", "of the demo, of Gemini's sampling, and of --shots (%(default)s)"),
    },
    "which replies are kept": {
        "attempts": ("N", "ask up to N times, until enough are kept (as many as --diverse)"),
        "diverse": ("N", "keep up to N distinct rationales a question (%(default)s)"),
        "judge": ("SPEC", "rule, gemini[:MODEL], anthropic[:MODEL], demo (%(default)s)"),
        "judge_all": (None, "judge every reply, not only where the rule is not conclusive"),
        "judge_image": (None, "whether the judge sees the image (%(default)s)"),
        "max_tokens": ("N", "keep no trace with a longer suffix, as train.py's --max-suffix"),
        "tokenizer": ("DIR", "the student's, with tokenizer.json (the demo's for the demo)"),
        "out": ("FILE", "traces and cache: the same command resumes it (%(default)s)"),
    },
    "limits of money and time": {
        "dry_run": (None, "print what would be asked and what it would cost; send nothing"),
        "max_cost": ("USD", "stop before the file has cost more than this"),
        "batch": (None, "by the batch API: half the price, up to a day; may be interrupted"),
        "price": (("IN", "OUT"), f"USD per million tokens of the teacher (a table of {PRICES_OF})"),
        "judge_price": (("IN", "OUT"), "the same for the judge"),
        "concurrency": ("N", "calls in flight at once (%(default)s)"),
        "timeout": ("S", "seconds for a whole reply (%(default)s)"),
        "retries": ("N", "maximum requests for one reply (%(default)s)"),
    },
}


def parse_args(argv: list[str] | None = None) -> TeacherSettings:
    """The settings of a command line; SystemExit with a sentence for a wrong one."""
    about = "The teacher and the judge: traces worth learning from, never paid for twice."
    parser = files.Parser(prog="teacher.py", description=about)
    defaults = TeacherSettings()
    for heading, flags in GROUPS.items():
        group = parser.add_argument_group(heading)
        for name, (metavar, text) in flags.items():
            flag = "--from" if name == "source" else "--" + name.replace("_", "-")
            options = {"dest": name, "default": getattr(defaults, name), "help": text}
            if isinstance(options["default"], bool):
                options["action"] = argparse.BooleanOptionalAction
                if not options["default"]:
                    options["action"] = "store_true"
            elif name in CHOICES:
                options["choices"] = CHOICES[name]
            else:
                options |= {"metavar": metavar, "type": TYPES.get(metavar, str)}
                options["nargs"] = 2 if isinstance(metavar, tuple) else None
            group.add_argument(flag, **options)
    settings = TeacherSettings(**vars(parser.parse_args(argv)))
    teacher = settings.teacher or ("demo" if settings.data == "demo" else "gemini")
    attempts = settings.attempts or settings.diverse
    settings = replace(settings, teacher=teacher, attempts=attempts)
    if error := conflict(settings):
        parser.error(error)
    return settings


def conflict(s: TeacherSettings) -> str | None:
    """One sentence on settings that do not go together; None if all do."""
    asks_demo = s.teacher == "demo" and not s.source
    budget = s.thinking_budget or 0
    if s.data != "demo" and (asks_demo or s.judge == "demo"):
        return "--teacher demo and --judge demo know only --data demo"
    if asks_demo and (s.hint_gold or s.reasons_in_reply):
        return "the demo's teacher reads no prompt: no --hint-gold, --zero-shot-cot, --shots"
    if s.batch and (asks_demo or s.source):
        return "--batch needs a teacher with a batch API"
    if s.attempts < s.diverse:
        return "--attempts must not be less than --diverse"
    if s.effort and budget:
        return "--effort or --thinking-budget, not both"
    if budget >= s.max_output:
        return f"--thinking-budget {budget} leaves nothing of --max-output {s.max_output}"
    if 0 < budget < 1024 and s.teacher.startswith("anthropic"):
        return f"--thinking-budget {budget}: Anthropic takes 1024 or more"
    if s.source and Path(s.source).absolute() == Path(s.out).absolute():
        return "--from and --out are the same file"
    if s.max_tokens and s.data != "demo" and not s.tokenizer:
        return "--max-tokens needs the student's --tokenizer to count"
    if s.effort == "max" and s.teacher.startswith("gemini"):
        return "Gemini has no --effort max"
    return None


# --- what a command would cost

USUAL_OUTPUT = 1500  # tokens of a reply: a guess, for a trace file that has none yet
JUDGE_PROMPT = 600  # tokens of its instructions and hints
JUDGE_REPLY = 300  # tokens of a usual verdict


def forecast(
    s: TeacherSettings, teacher: Model | None, judge: Model, questions: list, records: list[dict]
) -> list[str]:
    """Lines for --dry-run: requests, tokens, USD. Two sums of money: the expected one, with replies
    as long as those of the trace file's `records`, and the most, with every attempt made and every
    reply as long as --max-output allows.

    questions  (text, (width, height) of the image or None) of each question to be asked, with
               --from of each reply to be judged
    """
    lines = []
    n = len(questions)
    sizes = [r["usage"]["output"] for r in records if r["usage"].get("output")]
    usual = sum(sizes) / len(sizes) if sizes else USUAL_OUTPUT

    def tokens(model: Model) -> float:
        return sum(input_tokens(model.provider, text, size) for text, size in questions)

    def money(
        model: Model, flag: str, reads: float, usual: float, most: float, share: float = 1.0
    ) -> str:
        if model.price is None:
            return f"The price of {model.name} is not known: give {flag} IN OUT."
        expected = s.diverse * cost({"input": reads, "output": n * usual}, model.price, share)
        highest = s.attempts * cost({"input": reads, "output": n * most}, model.price, share)
        return f"${expected:.2f} expected, ${highest:.2f} at most (prices of {PRICES_OF})."

    if teacher:
        reads = tokens(teacher)
        share = BATCH_SHARE if s.batch else 1.0
        many = f"{n * s.diverse} to {n * s.attempts}" if s.attempts > 1 else n
        guess = f"the mean of {len(sizes)} replies" if sizes else "a guess"
        lines.append(
            f"{teacher.spec}: {many} requests, {reads:,} tokens in; out {usual:.0f} each "
            f"({guess}), {s.max_output} at most. "
            + money(teacher, "--price", reads, usual, s.max_output, share)
        )
    if judge.provider in ASK:
        reads = tokens(judge) + n * (JUDGE_PROMPT + round(usual))
        some = "where the rule is not conclusive; for all it would be "
        some = "every reply: " if s.judge_all else some
        price = money(judge, "--judge-price", reads, JUDGE_REPLY, JUDGE_OUTPUT)
        lines.append(f"{judge.spec} judges {some}{price}")
    return lines


# --- what a trace file holds

COLUMNS = "questions asked answered thought correct consistent unclear kept USD".split()


def trace_table(
    records: list[dict], problems: list[data.Problem], tokenizer: object = None, failed: int = 0
) -> str:
    """The closing text. records: all of a trace file, one per reply (several per question with
    --attempts or --diverse); failed: calls given up in this run, which are no records. A thought is
    "unclear" where nobody could say whether it leads to the answer; the rule often cannot."""
    by_id = {problem.id: problem for problem in problems}
    groups = {}  # axis: {kind of question: records}
    for record in records:
        for axis, names in metrics.axes(by_id[record["id"]]).items():
            for name in names if axis not in metrics.DETAILS else ():
                groups.setdefault(axis, {}).setdefault(name, []).append(record)
    rows = [["", *COLUMNS], row("all", records)]
    for group in groups.values():
        rows += [row(name, some) for name, some in sorted(group.items())]
    stops = Counter(record["stop"] for record in records)
    dropped = Counter(record["dropped"] for record in records if record.get("dropped"))
    lines = [tables.align(rows, False)]
    lines += [f"ended by {listed(stops)}; {failed} calls failed for good (asked again next time)"]
    lines += [f"not kept: {listed(dropped)}"] if dropped else []
    thoughts = [record for record in records if record["thought"]]
    kept = [record for record in thoughts if record["kept"]]
    unit = "tokens" if tokenizer else "words"
    for name, some in (("before shaping", thoughts), ("after", thoughts), ("kept", kept)):
        sizes = []
        for record in some:
            text = (record["reply"] if name == "before shaping" else record)["thought"]
            sizes.append(suffix_length(by_id[record["id"]], text, tokenizer))
        lines += [f"{unit} {name}: {spread(sizes)}"] if sizes else []
    return "\n".join(lines + agreements(records))


def listed(counts: Counter) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.most_common())


def row(name: str, records: list[dict]) -> list[str]:
    """A row of the table: COLUMNS of some records."""
    verdicts = [record["verdict"] for record in records]
    counts = [
        len({record["id"] for record in records}),
        len(records),
        sum(bool(record["answer"]) for record in records),
        sum(bool(record["thought"]) for record in records),
        sum(verdict["correct"] is True for verdict in verdicts),
        sum(verdict["consistent"] is True for verdict in verdicts),
        sum(bool(r["thought"]) and r["verdict"]["consistent"] is None for r in records),
        sum(record["kept"] for record in records),
    ]
    return [name, *map(str, counts), f"{sum(map(paid, records)):.4f}"]


def spread(sizes: Sequence[int]) -> str:
    """Median, 90th percentile (nearest rank) and maximum."""
    sizes = sorted(sizes)
    median = sizes[math.ceil(len(sizes) / 2) - 1]
    p90 = sizes[math.ceil(len(sizes) * 0.9) - 1]
    return f"median {median}, p90 {p90}, max {sizes[-1]}"


def agreements(records: list[dict]) -> list[str]:
    """Lines: the rule against the judge, old verdicts against new ones, and where they differ."""
    lines = []
    for key, names in (("rule", "the rule and the judge"), ("before", "old and new verdicts")):
        pairs = []
        for record in records:
            verdict = record["verdict"]
            if verdict.get(key):
                pairs.append((record["id"], verdict[key]["correct"], verdict["correct"]))
        result = agreement(pairs)
        if result["n"]:
            kappa = "undefined" if result["kappa"] is None else f"{result['kappa']:.3f}"
            share = f"{metrics.percent(result['agreement'])} % of {result['n']}"
            where = ", ".join(result["disagreements"]) or "none"
            lines.append(f"{names} agree on {share}, kappa {kappa}; they differ at: {where}")
    return lines


def report(
    records: list[dict], problems: list[data.Problem], tokenizer: object, calls: Calls, left: int
) -> None:
    """Print the table, the failures, and how to resume the questions that are `left`."""
    if records:
        print(trace_table(records, problems, tokenizer, len(calls.failed)))
    errors = [f"failed: {id}: {why}" for id, why in calls.failed.items()]
    if len(errors) > 10:
        errors[10:] = [f"failed: {len(errors) - 10} more"]
    if calls.lost:
        text = "Replies that never came whole may have been billed too"
        errors.append(f"{text}: ${calls.lost:.4f} at most.")
    if calls.stop:
        many = f"{left} of {len(problems)} questions are left"
        errors.append(f"Stopped: {calls.stop}. {many}; the same command resumes.")
    for line in errors:
        print(line, file=sys.stderr)
