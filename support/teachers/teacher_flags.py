"""teacher.py's command line: the flags, and which of them do not go together.

Left out on purpose: configuration files; what only the files tell, as a price that is missing or a
worked example that is, which teacher.py says when it has read them.
"""

import argparse
import os

import data
from support.teachers.providers import PRICES_OF


def parse_args(argv=None):
    """The flags of a command, see `checked_args`; the error of a wrong one is argparse's exit."""
    about = "The teacher and the judge: traces worth learning from, never paid for twice."
    parser = argparse.ArgumentParser(prog="teacher.py", description=about)
    what = parser.add_argument_group("what is asked")
    name = "a folder, a .jsonl file, scienceqa, mathvista (%(default)s)"
    what.add_argument("--data", default="demo", metavar="DIR", help=name)
    what.add_argument("--split", default="train", choices=data.SPLITS, help="(%(default)s)")
    what.add_argument("--limit", type=count, metavar="N", help="only the first N problems")
    who = "gemini[:MODEL], anthropic[:MODEL], demo (demo for the demo's data, else gemini)"
    what.add_argument("--teacher", metavar="SPEC", help=who)
    judge_ = "rule, gemini[:MODEL], anthropic[:MODEL], demo (%(default)s)"
    what.add_argument("--judge", default="rule", metavar="SPEC", help=judge_)
    out = "the trace file, which is also the cache: the same command goes on with it (%(default)s)"
    what.add_argument("--out", default="traces.jsonl", metavar="FILE", help=out)
    again = "ask no teacher: judge and shape the replies in a trace file (ours, pali_reason's) anew"
    what.add_argument("--from", dest="source", metavar="FILE", help=again)
    how = parser.add_argument_group("how it is asked")
    tokens = "most tokens of a reply, thoughts included (%(default)s)"
    how.add_argument("--max-output", type=count, default=16_000, metavar="N", help=tokens)
    levels = ("low", "medium", "high", "xhigh", "max")
    how.add_argument("--effort", choices=levels, help="how hard to think (the model's default)")
    budget = "tokens of thought, for older models that take this instead of --effort"
    how.add_argument("--thinking-budget", type=count, metavar="N", help=budget)
    attempts = "ask up to K times, until enough replies are kept (one, or what --diverse says)"
    how.add_argument("--attempts", type=count, metavar="K", help=attempts)
    diverse = "keep up to D distinct rationales a question (%(default)s)"
    how.add_argument("--diverse", type=count, default=1, metavar="D", help=diverse)
    hint = "tell the teacher the answer; recorded, as such thoughts are rationalisations"
    how.add_argument("--hint-gold", action="store_true", help=hint)
    steps = "for a teacher that does not think of itself: let it reason in its reply"
    how.add_argument("--zero-shot-cot", action="store_true", help=steps)
    shots = "the same, with N worked examples from the training split's own solutions"
    how.add_argument("--shots", type=int, default=0, metavar="N", help=shots)
    seed = "of the demo, of Gemini's sampling, and of --shots (%(default)s)"
    how.add_argument("--seed", type=int, default=0, help=seed)
    add_judging(parser)
    add_calls(parser)
    return checked_args(parser, parser.parse_args(argv))


def add_judging(parser):
    kept = parser.add_argument_group("what is kept")
    all_ = "ask the judge about every reply, not only where the rule is not sure"
    kept.add_argument("--judge-all", action="store_true", help=all_)
    image = "whether the judge sees the picture (%(default)s)"
    yes_no = argparse.BooleanOptionalAction
    kept.add_argument("--judge-image", action=yes_no, default=True, help=image)
    longest = "keep no trace that makes a longer suffix than this, as train.py's --max-suffix"
    kept.add_argument("--max-tokens", type=count, metavar="N", help=longest)
    folder = "the student's tokenizer, a folder with tokenizer.json (the demo's for the demo)"
    kept.add_argument("--tokenizer", metavar="DIR", help=folder)


def add_calls(parser):
    calls = parser.add_argument_group("calls and money")
    at_once = "calls under way at once (%(default)s)"
    calls.add_argument("--concurrency", type=count, default=8, metavar="N", help=at_once)
    total = "seconds for a whole reply (%(default)s)"
    calls.add_argument("--timeout", type=float, default=600.0, metavar="S", help=total)
    most_ = "most requests for one reply (%(default)s)"
    calls.add_argument("--retries", type=count, default=6, metavar="N", help=most_)
    batch = "use the provider's batch API: half the price, up to a day; the command may be stopped"
    calls.add_argument("--batch", action="store_true", help=batch)
    limit = "stop before the file has cost more than this"
    calls.add_argument("--max-cost", type=float, metavar="USD", help=limit)
    dry = "say what would be asked and what it would cost; nothing is sent"
    calls.add_argument("--dry-run", action="store_true", help=dry)
    pair = {"type": float, "nargs": 2, "metavar": ("IN", "OUT")}
    price = f"USD per million tokens of the teacher (a table of {PRICES_OF} for known models)"
    calls.add_argument("--price", **pair, help=price)
    calls.add_argument("--judge-price", **pair, help="the same for the judge")


def count(text):
    """An argparse type: a whole number from 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def checked_args(parser, args):
    """The flags with the defaults that depend on others; an error for what does not go together."""
    args.teacher = args.teacher or ("demo" if args.data == "demo" else "gemini")
    args.attempts = args.attempts or args.diverse
    demo = args.teacher == "demo" and not args.source
    wrong = {
        "--teacher demo and --judge demo know only --data demo": args.data != "demo"
        and (demo or args.judge == "demo"),
        "the demo's teacher reads no prompt: no --hint-gold, --zero-shot-cot, --shots": demo
        and (args.hint_gold or args.zero_shot_cot or args.shots),
        "--batch needs a teacher with a batch API": args.batch and (demo or args.source),
        "--attempts must not be less than --diverse": args.attempts < args.diverse,
        "--effort or --thinking-budget, not both": args.effort and args.thinking_budget,
        "--from and --out are the same file": args.source
        and os.path.abspath(args.source) == os.path.abspath(args.out),
        "--max-tokens needs the student's --tokenizer to count": args.max_tokens
        and args.data != "demo"
        and not args.tokenizer,
        "Gemini has no --effort max": args.effort == "max" and args.teacher.startswith("gemini"),
    }
    for text in (text for text, is_so in wrong.items() if is_so):
        parser.error(text)
    return args
