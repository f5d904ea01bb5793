"""The teacher and the judge: traces worth learning from, never paid for twice.

A big model thinks aloud about picture questions; its answer is judged; thought, answer and verdict
become a line of a trace file, which train.py learns from. That file is also the cache: the same
command, run again, asks only what is not in it.

Papers: Fine-tune-CoT (Ho et al., arXiv 2212.10071): a big model's reasoning as training data, with
several distinct rationales a question (--diverse). Zero-shot-CoT (Kojima et al., arXiv 2205.11916):
"Let's think step by step" for teachers that do not think of themselves (--zero-shot-cot; here in
one request, not two). STaR (Zelikman et al., arXiv 2203.14465): the gold answer as a hint
(--hint-gold; off by default and recorded, as a thought that was told its end need not lead there).
Rejection sampling (--attempts) asks again until a reply is kept.

Here: what is asked, how a reply becomes a trace, the command line. In support/: clients.py (the
providers), calls.py (many calls, within a limit of money), batches.py (the same by batch APIs),
shaping.py and judging.py (what is kept of a reply), ledger.py (the trace file), summary.py.

Left out on purpose: other providers, tools, conversations, prompt caching, batches for the judge.
"""

import argparse
import asyncio
import functools
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import data
from support import clients, ledger
from support.batches import BATCH_SHARE, Batches
from support.calls import Calls, Halt, at_most, cost, input_tokens
from support.clients import PRICES_OF, Failed, Model, Reply, picture, seen
from support.judging import JUDGE_OUTPUT, ask_judge, rule_verdict, sure
from support.shaping import apart, distinct, graded, length, shape
from support.summary import summary
from support.tokenizing import load_tokenizer
from support.traces import load_traces, training_notice

HERE = Path(__file__).parent
USUAL_OUTPUT = 1500  # tokens a reply, a guess; --dry-run takes the mean of the file if it has any


@dataclass
class Run:
    """A command line, and what was read and opened for it."""

    args: argparse.Namespace
    problems: list
    teacher: Model | None
    judge: Model
    calls: Calls
    traces: ledger.Ledger
    pending: ledger.Ledger | None = None  # paid replies that wait for the judge
    source: dict | None = None  # --from: {problem id: its traces}
    shots: tuple = ()
    tokenizer: object = None


# --- what is asked

STEPS = "Let's think step by step."


def question_text(problem, args, shots=()):
    """What a teacher is sent beside the picture: question, hint, unit and choices as the student
    reads them, and how to end. shots: problems, as worked examples; never the one that is asked."""
    parts = [worked(shot) for shot in shots if shot.id != problem.id][: args.shots]
    parts.append(f"Question: {data.pali_prefix(problem, '').removeprefix(' en ')}")
    if args.hint_gold:
        parts.append(
            f"The answer is known to be {data.pali_suffix(problem)}. Reason towards it from what "
            "the question and the picture say, as if you had not been told, and do not mention it."
        )
    what = "the letter of your choice" if problem.choices else "the answer alone"
    parts.append(f'End your reply with a line of its own: "Answer: " and {what}.')
    return "\n\n".join([*parts, STEPS] if args.zero_shot_cot else parts)


def worked(problem):
    asked = data.pali_prefix(problem, "").removeprefix(" en ")
    return f"Question: {asked}\n{problem.solution}\nAnswer: {data.pali_suffix(problem)}"


def worked_examples(args):
    """Training problems with a solution in an order drawn from the seed, those without a picture
    first (theirs would not be sent); one more than needed, as one may be the problem asked."""
    solved = [problem for problem in data.load(args.data, "train") if problem.solution]
    if len(solved) <= args.shots:
        text = f"{args.data} has {len(solved)} solved training problems: too few for --shots"
        raise ValueError(f"{text} {args.shots}.")
    random.Random(args.seed).shuffle(solved)
    return sorted(solved, key=lambda problem: problem.image is not None)[: args.shots + 1]


def aloud(args):
    """Whether the teacher is to reason in its reply, as it has no thoughts of its own to show."""
    return bool(args.zero_shot_cot or args.shots)


def how_asked(run, attempt):
    """The parameters of a request; the seed only where the provider has one."""
    args = run.args
    how = {"max_output": args.max_output, "thoughts": not aloud(args)}
    how |= {"effort": args.effort, "thinking_budget": args.thinking_budget}
    if run.teacher.provider != "anthropic":
        how["seed"] = args.seed + attempt
    return {name: value for name, value in how.items() if value is not None}


def request_of(run, problem, attempt):
    """((text, picture, schema, how), the most USD that it can cost)."""
    how, text = how_asked(run, attempt), question_text(problem, run.args, run.shots)
    most = at_most(run.teacher, text, seen(problem.image)[1], how["max_output"])
    return (text, picture(problem), None, how), most


def key_of(run, problem, attempt):
    """The key of a record: of all that the reply depends on."""
    what = [problem.id, ledger.VERSION]
    if run.source:
        trace = run.source[problem.id][attempt]
        what += ["from", trace["thought"], trace["answer"], trace["teacher"]]
    else:
        text = question_text(problem, run.args, run.shots)
        what += [text, run.teacher.spec, seen(problem.image)[0], how_asked(run, attempt), attempt]
    return ledger.digest(what)


def attempts(run, problem):
    """The numbers of the attempts that may be made at a problem."""
    return range(len(run.source[problem.id]) if run.source else run.args.attempts)


def made(run, problem):
    """The problem's records, of this command's flags."""
    records = (run.traces.records.get(key_of(run, problem, a)) for a in attempts(run, problem))
    return [record for record in records if record]


def next_attempt(run, problem):
    """The number of the attempt to make now, or None: enough are kept, or all are made."""
    kept = 0
    for attempt in attempts(run, problem):
        record = run.traces.records.get(key_of(run, problem, attempt))
        if record is None:
            return attempt
        kept += record["kept"] is True
        if kept >= run.args.diverse and not run.source:
            return None
    return None


# --- one question


async def question(run, problem):
    """All attempts at a problem, one after the other, until enough are kept."""
    calls = run.calls
    try:
        while not calls.stop and (attempt := next_attempt(run, problem)) is not None:
            await settle(run, problem, attempt, await reply_to(run, problem, attempt))
            calls.in_a_row = 0
    except Halt:
        return
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise  # the disk is full
        calls.fail(problem.id, error if isinstance(error, Failed) else repr(error))
    calls.progress("asked")


async def reply_to(run, problem, attempt):
    """A Reply from --from, from the pending file, or from the teacher."""
    if run.source:
        trace = run.source[problem.id][attempt]
        said = trace.get("reply") or trace
        stop = trace.get("stop") or "end"
        return Reply(said["thought"], said["answer"], stop, {"input": 0, "output": 0, "cost": 0.0})
    waiting = unjudged(run, key_of(run, problem, attempt))
    return waiting or await ask_teacher(run, problem, attempt)


def unjudged(run, key):
    """The paid Reply that waits for its judge under this key, or None."""
    waiting = run.pending and run.pending.records.get(key)
    return Reply(**waiting["reply"]) if waiting else None


async def ask_teacher(run, problem, attempt):
    """A Reply of the teacher to one attempt at a problem."""
    teacher = run.teacher
    if teacher.provider == "demo":
        return clients.ask_demo(problem, run.args.seed, attempt)
    # In a thread, as shrinking a large picture takes seconds.
    request, most = await asyncio.to_thread(request_of, run, problem, attempt)
    ask = functools.partial(clients.ASK[teacher.provider], teacher.client, teacher.name, *request)
    reply = await run.calls.insist(ask, most, teacher.price)
    return apart(reply) if aloud(run.args) else reply


# --- from the reply to the trace


async def settle(run, problem, attempt, reply):
    """Judge a reply and write its record."""
    key = key_of(run, problem, attempt)
    verdict, used = await judged(run, problem, reply, key)
    old = run.source and run.source[problem.id][attempt]
    if old and old["verdict"]["correct"] is not None:
        verdict |= {"before": {k: old["verdict"][k] for k in ("correct", "consistent", "by")}}
    thought, answer = shape(problem, reply.thought, reply.answer)
    why = dropped(run, problem, thought, verdict)
    record = {"id": problem.id, "question": problem.question, "thought": thought}
    record |= {"answer": answer, "gold": data.pali_suffix(problem), "verdict": verdict}
    record["teacher"] = old["teacher"] if old else run.teacher.spec
    record |= {"usage": reply.usage | ({"judge": used} if used else {}), "key": key}
    record |= {"stop": reply.stop, "attempt": attempt, "hint": run.args.hint_gold}
    record |= {"kept": why is None} | ({"dropped": why} if why else {})
    run.traces.add(record | {"reply": {"thought": reply.thought, "answer": reply.answer}})


async def judged(run, problem, reply, key):
    """(verdict, the judge's usage). The rule comes first; a model is asked where the rule is not
    sure of the answer, or finds it right and cannot tell where the thought leads, or always
    (--judge-all). Until it has spoken, the paid reply waits in the pending file."""
    if reply.stop != "end" or not (reply.answer or run.judge.provider == "demo"):
        why = f"{reply.stop}: {reply.why}" if reply.why else reply.stop
        why = "there is no answer" if reply.stop == "end" else why
        return {"correct": False, "consistent": None, "by": "teacher", "why": why}, {}
    grade = graded(problem, reply.answer)
    verdict = rule_verdict(problem, reply.thought, reply.answer)
    unclear = verdict["correct"] and verdict["consistent"] is None and bool(reply.thought)
    final = sure(problem, grade) and not unclear and not run.args.judge_all
    if run.judge.provider == "rule" or (final and run.judge.provider != "demo"):
        return verdict, {}
    if run.pending and key not in run.pending.records:
        run.pending.add({"key": key, "reply": asdict(reply), "usage": reply.usage})
    told, look = (problem, reply.thought, reply.answer), run.args.judge_image
    said, usage = await ask_judge(run.calls, run.judge, *told, look)
    if said is None:
        return verdict | {"why": f"{verdict['why']} ({run.judge.spec} declined to judge)"}, usage
    return said | {"rule": {"correct": verdict["correct"], "how": grade.how}}, usage


def dropped(run, problem, thought, verdict):
    """Why a trace is not for training, or None."""
    args = run.args
    if verdict["by"] == "teacher":
        return verdict["why"]
    if not verdict["correct"]:
        return "not correct"
    if not thought:
        return "no thought"
    if verdict["consistent"] is False:
        return "thought leads elsewhere"
    if verdict.get("picture") is False:
        return "not what the picture shows"
    if args.max_tokens and length(problem, thought, run.tokenizer) > args.max_tokens:
        return f"over {args.max_tokens} tokens"
    others = [record["thought"] for record in made(run, problem) if record["kept"]]
    if len(others) >= args.diverse:
        return "enough are kept"
    return None if distinct(thought, others) else "not distinct"


# --- all of them by batch


async def by_batch(run, problems, batches):
    """Send what has no record, wait, settle what came back; then the next attempts likewise."""
    calls, busy = run.calls, True
    calls.reserved = batches.most()
    try:
        while busy and not calls.stop:
            busy = await one_round(run, open_jobs(run, problems), batches)
    except Failed as error:
        calls.halt(f"a batch cannot be sent or fetched now: {error}")
    except Halt:
        return
    if batches.entries and not calls.stop:
        text = "lists batches sent with other flags; those collect them."
        print(f"{batches.file} {text}", file=sys.stderr)


def open_jobs(run, problems):
    """{key: (problem, attempt)} of what is to be asked now."""
    jobs = {}
    for problem in problems:
        attempt = next_attempt(run, problem)
        if attempt is not None and problem.id not in run.calls.failed:
            jobs[key_of(run, problem, attempt)] = problem, attempt
    return jobs


async def one_round(run, jobs, batches):
    """One attempt at each question, or at as many as --max-cost allows; whether there was any."""
    calls, records, out = run.calls, run.traces.records, batches.keys()

    def request(key):
        return request_of(run, *jobs[key])

    paid_for = run.pending.records if run.pending else {}
    waiting = {key: None for key in jobs if key in paid_for}
    ours = [entry for entry in batches.entries if jobs.keys() & entry["keys"]]
    ours += batches.add((key for key in jobs if key not in out | waiting.keys()), request)
    if jobs and not ours and not waiting:
        calls.halt(f"{calls.money_left()}: too little for another request")
    await settle_all(run, jobs, waiting)
    for entry in ours:
        await batches.send(entry, jobs, request)
    for entry in ours:
        wanted = [key for key in entry["keys"] if key in jobs and key not in records]
        replies, failed = await batches.collect(entry, wanted)
        if aloud(run.args):
            replies = {key: apart(reply) for key, reply in replies.items()}
        calls.failed |= {jobs[key][0].id: why for key, why in failed.items()}
        calls.done += len(failed)
        settled = await settle_all(run, jobs, replies)
        batches.forget(entry, settled | failed.keys() | records.keys())
    return bool(ours or waiting)


async def settle_all(run, jobs, replies):
    """Settle these jobs' {key: Reply, or None for the one that waits for its judge}; the keys of
    those that were settled before the run stopped."""
    done = set()

    async def one(key):
        problem, attempt = jobs[key]
        try:
            await settle(run, problem, attempt, replies[key] or unjudged(run, key))
        except Halt:
            return
        except (Failed, *clients.UNREADABLE) as error:
            run.calls.failed[problem.id] = str(error)
        done.add(key)
        run.calls.done += 1

    await run.calls.pool(replies, one)
    return done


# --- command line


def planned(run):
    """The problems with something left to ask. One whose picture cannot be read has failed, and is
    none of run.problems any more."""
    left = []
    for problem in run.problems:
        try:
            if next_attempt(run, problem) is not None:
                left.append(problem)
        except Failed as error:
            run.calls.failed[problem.id] = str(error)
    run.problems = [problem for problem in run.problems if problem.id not in run.calls.failed]
    return left


def forecast(run, left):
    """What --dry-run says: requests, tokens, USD. Nothing is sent, and no key is needed."""
    args, teacher, judge, n = run.args, run.teacher, run.judge, len(left)
    broken = f", {len(run.calls.failed)} more have no readable picture" if run.calls.failed else ""
    lines = [f"{args.data}: {len(run.problems)} questions, {n} to be asked{broken}."]
    texts = [(question_text(p, args, run.shots), seen(p.image)[1]) for p in left]
    said = [r for p in run.problems for r in made(run, p) if r["usage"].get("output")]
    usual = sum(r["usage"]["output"] for r in said) / len(said) if said else USUAL_OUTPUT
    guess = f"the mean of {len(said)} replies" if said else "a guess"
    reads = sum(input_tokens(teacher.provider, *text) for text in texts)
    many = f"{n * args.diverse} to {n * args.attempts}" if args.attempts > 1 else n
    lines.append(
        f"{teacher.spec}: {many} requests, {reads:,} tokens in; out {usual:.0f} each ({guess}), "
        f"{args.max_output} at most. {bill(teacher, '--price', n, reads, usual, args)}"
    )
    if judge.provider in clients.ASK:
        some = "" if args.judge_all else "what the rule is not sure of; for all it would be "
        reads = sum(input_tokens(judge.provider, *text) + 600 + round(usual) for text in texts)
        money = bill(judge, "--judge-price", n, reads, 300, args)
        lines.append(f"{judge.spec} judges {some or 'every reply: '}{money}")
    return "\n".join([*lines, f"{args.out} has cost ${run.calls.spent:.4f} so far."])


def bill(model, flag, n, reads, usual, args):
    """The money part of a forecast, in words; `reads`: tokens read in one attempt at all n."""
    if model.price is None:
        return f"No price of {model.name} is known: give {flag} IN OUT."
    most = args.max_output if flag == "--price" else JUDGE_OUTPUT
    share = BATCH_SHARE if args.batch and flag == "--price" else 1.0
    usd = [
        times * cost({"input": reads, "output": n * output}, model.price, share)
        for times, output in ((args.diverse, usual), (args.attempts, most))
    ]
    return f"${usd[0]:.2f} expected, ${usd[1]:.2f} at most (prices of {PRICES_OF})."


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="teacher.py", description=__doc__.split("\n")[0])
    yes_no = argparse.BooleanOptionalAction
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
    add_judging(parser, yes_no)
    add_calls(parser)
    return checked_args(parser, parser.parse_args(argv))


def add_judging(parser, yes_no):
    kept = parser.add_argument_group("what is kept")
    all_ = "ask the judge about every reply, not only where the rule is not sure"
    kept.add_argument("--judge-all", action="store_true", help=all_)
    image = "whether the judge sees the picture (%(default)s)"
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
    if (number := int(text)) < 1:
        raise ValueError
    return number


def checked_args(parser, args):
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


def prepared(args):
    """The Run of a command line: problems, files, prices. Nothing is connected yet."""
    if notice := training_notice(args.data):
        print(notice, file=sys.stderr)
    problems, source = data.load(args.data, args.split)[: args.limit], None
    if args.source:
        problems, source = replies_in(args, problems)
    teacher = clients.parse_spec(args.teacher, clients.TEACHERS, args.price)
    judge = clients.parse_spec(args.judge, clients.JUDGES, args.judge_price)
    sides = {"--price": None if source else teacher, "--judge-price": judge}
    for flag, side in sides.items() if args.max_cost is not None else ():
        if side and side.price is None:
            raise ValueError(f"--max-cost: no price of {side.name} is known; give {flag} IN OUT.")
    shots = worked_examples(args) if args.shots else ()
    folder = args.tokenizer or (HERE / "demo/paligemma" if args.max_tokens else None)
    tokenizer = load_tokenizer(folder) if folder else None
    traces, pending = ledger.Ledger(args.out), Path(f"{args.out}.pending")
    judges = judge.provider in clients.ASK and not source
    pending = ledger.Ledger(pending) if judges or pending.is_file() else None
    waiting = pending.records.values() if pending else ()
    spent = sum(map(ledger.paid, traces.records.values()))
    spent += sum(ledger.paid(r) for r in waiting if r["key"] not in traces.records)
    limit = math.inf if args.max_cost is None else args.max_cost
    calls = Calls(args.concurrency, args.timeout, args.retries, limit, spent)
    teacher = None if source else teacher
    return Run(args, problems, teacher, judge, calls, traces, pending, source, shots, tokenizer)


def replies_in(args, problems):
    """(problems, {id: traces}) of --from."""
    source, by_id, traces = {}, {p.id: p for p in problems}, load_traces(args.source)
    for trace in (trace for trace in traces if trace["id"] in by_id):
        source.setdefault(trace["id"], []).append(trace)
    if not source:
        where = f"{args.data}, split {args.split}"
        raise ValueError(f"{args.source} has no trace of a problem of {where}.")
    others = len(traces) - sum(map(len, source.values()))
    if others:
        print(f"{args.source}: {others} traces are of no problem here.", file=sys.stderr)
    return [by_id[id] for id in source], source


def close(run):
    """Close the files; the pending one goes when nothing waits in it any more."""
    run.traces.close(delete=not run.traces.records)
    if run.pending:
        run.pending.close(delete=run.pending.records.keys() <= run.traces.records.keys())


def report(run):
    """Print the summary, what failed, and how to go on."""
    calls, records = run.calls, [r for problem in run.problems for r in made(run, problem)]
    if records:
        print(summary(records, run.problems, run.tokenizer, len(calls.failed)))
    for id, why in list(calls.failed.items())[:10]:
        print(f"failed: {id}: {why}", file=sys.stderr)
    if len(calls.failed) > 10:
        print(f"failed: {len(calls.failed) - 10} more", file=sys.stderr)
    if calls.lost:
        text = f"Replies that never came whole may have been billed too: ${calls.lost:.4f} at most."
        print(text, file=sys.stderr)
    if calls.stop:
        left = sum(next_attempt(run, problem) is not None for problem in run.problems)
        many = f"{left} of {len(run.problems)} questions are left"
        text = f"Stopped: {calls.stop}. {many}; the same command goes on with them."
        print(text, file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    run = prepared(args)
    try:
        left = planned(run)
        if args.dry_run:
            return print(forecast(run, left))
        batches = Batches(args.out, run.teacher, run.calls)
        sent = open_jobs(run, left).keys() & batches.keys()
        if sent and not args.batch:
            text = f"{len(sent)} of these questions are out in batches: collect them with --batch"
            raise ValueError(f"{batches.file}: {text}.")
        run.calls.total = len(left)
        one_by_one = functools.partial(question, run)
        work = by_batch(run, left, batches) if args.batch else run.calls.pool(left, one_by_one)
        asyncio.run(run.calls.carry_out(filter(None, (run.teacher, run.judge)), work))
        report(run)
    finally:
        close(run)
    if run.calls.stop.startswith("interrupted"):
        return 130
    fine = not run.calls.stop or run.calls.stop.startswith("--max-cost")
    return 0 if fine and (run.traces.records or not run.calls.failed) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(clients.hide(f"teacher.py: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)
