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

Here: what is asked, how a reply becomes a trace, what a command does. In support/: clients.py (the
providers), calls.py and batches.py (many calls, within a limit of money), shaping.py and judging.py
(what is kept of a reply), ledger.py (the trace file), teacher_flags.py, forecast.py and
trace_table.py (what a command is told, and what it says).

Left out on purpose: other providers, tools, conversations, prompt caching, batches for the judge.
"""

import argparse
import asyncio
import contextlib
import functools
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import data
from support import files
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import traces_of, training_notice
from support.teachers import cache as ledger
from support.teachers import providers as clients
from support.teachers.batch_api import Batches
from support.teachers.calls import Calls, Halt, at_most
from support.teachers.forecast import forecast
from support.teachers.judging import ask_judge, rule_verdict, sure
from support.teachers.providers import Failed, Model, Reply, picture, seen
from support.teachers.shaping import apart, distinct, graded, length, shape
from support.teachers.teacher_flags import parse_args
from support.teachers.trace_table import report


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
    parts.append(f"Question: {data.question_lines(problem)}")
    if args.hint_gold:
        parts.append(
            f"The answer is known to be {data.pali_suffix(problem)}. Reason towards it from what "
            "the question and the picture say, as if you had not been told, and do not mention it."
        )
    what = "the letter of your choice" if problem.choices else "the answer alone"
    parts.append(f'End your reply with a line of its own: "Answer: " and {what}.')
    return "\n\n".join([*parts, STEPS] if args.zero_shot_cot else parts)


def worked(problem):
    """A problem with its own solution, in the form of the question and of the reply asked for."""
    asked = data.question_lines(problem)
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


# --- what was asked already


def key_of(run, problem, attempt):
    """The key of a record: of all that the reply depends on."""
    what = [problem.id, ledger.VERSION]
    if run.source:
        trace = run.source[problem.id][attempt]
        what += ["from", trace["thought"], trace["answer"], trace["teacher"]]
    else:
        text = question_text(problem, run.args, run.shots)
        what += [text, run.teacher.spec, seen(problem.image)[0], how_asked(run, attempt), attempt]
    return files.digest(what)


def attempts(run, problem):
    """The numbers of the attempts that may be made at a problem."""
    return range(len(run.source[problem.id]) if run.source else run.args.attempts)


def made(run, problem):
    """The problem's records, of this command's flags."""
    records = (run.traces.records.get(key_of(run, problem, a)) for a in attempts(run, problem))
    return [record for record in records if record]


def all_made(run):
    """Those of all problems: what the file holds for this command."""
    return [record for problem in run.problems for record in made(run, problem)]


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


async def all_attempts(run, problem):
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
    return unjudged(run, key_of(run, problem, attempt)) or await ask_teacher(run, problem, attempt)


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


# --- a command: before, during, after


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


def prepared(args):
    """The Run of a command line: problems, files, prices. Nothing is connected yet."""
    if notice := training_notice(args.data):
        print(notice, file=sys.stderr)
    problems, source = data.load(args.data, args.split)[: args.limit], None
    if args.source:
        by_id = {problem.id: problem for problem in problems}
        source = traces_of(by_id, args.source, f"{args.data}, split {args.split}")
        problems = [by_id[id] for id in source]
    teacher = clients.parse_spec(args.teacher, clients.TEACHERS, args.price)
    judge = clients.parse_spec(args.judge, clients.JUDGES, args.judge_price)
    sides = {"--price": None if source else teacher, "--judge-price": judge}
    for flag, side in sides.items() if args.max_cost is not None else ():
        if side and side.price is None:
            raise ValueError(f"--max-cost: no price of {side.name} is known; give {flag} IN OUT.")
    shots = worked_examples(args) if args.shots else ()
    folder = args.tokenizer or (args.max_tokens and files.ROOT / "demo/paligemma")
    tokenizer = load_tokenizer(folder) if folder else None
    traces, pending = ledger.Ledger(args.out), Path(f"{args.out}.pending")
    judges = judge.provider in clients.ASK and not source
    pending = ledger.Ledger(pending) if judges or pending.is_file() else None
    waiting = pending.records.values() if pending else ()
    spent = sum(map(ledger.paid, traces.records.values()))
    spent += sum(ledger.paid(r) for r in waiting if r["key"] not in traces.records)
    limit = math.inf if args.max_cost is None else args.max_cost
    calls = Calls(args.concurrency, args.timeout, args.retries, limit, spent)
    asked = None if source else teacher
    return Run(args, problems, asked, judge, calls, traces, pending, source, shots, tokenizer)


def to_price(run, left):
    """What `forecast` prices: each question once; with --from each reply without a verdict."""
    found = []
    for problem in left:
        replies = len(attempts(run, problem)) - len(made(run, problem)) if run.source else 1
        with contextlib.suppress(Failed):  # with --from nobody has looked at the picture yet
            size = seen(problem.image)[1]
            found += [(question_text(problem, run.args, run.shots), size)] * replies
    return found


def close(run):
    """Close the files; the pending one goes when nothing waits in it any more."""
    run.traces.close(delete=not run.traces.records)
    if run.pending:
        run.pending.close(delete=run.pending.records.keys() <= run.traces.records.keys())


def main(argv=None):
    """0: done, or stopped by --max-cost; 130: interrupted; 1: stopped, or all calls failed."""
    args = parse_args(argv)
    run = prepared(args)
    try:
        left = planned(run)
        if args.dry_run:
            return print(forecast(run, to_price(run, left), all_made(run)))
        batches = Batches(args.out, run.teacher, run.calls)
        if not args.batch:
            batches.refuse(open_jobs(run, left))
        run.calls.total = len(left)
        one_by_one = functools.partial(all_attempts, run)
        work = by_batch(run, left, batches) if args.batch else run.calls.pool(left, one_by_one)
        asyncio.run(run.calls.carry_out(filter(None, (run.teacher, run.judge)), work))
        still = sum(next_attempt(run, problem) is not None for problem in run.problems)
        report(run, all_made(run), still)
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
