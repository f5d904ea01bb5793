"""The teacher and the judge: traces worth learning from, never paid for twice.

A big model is asked questions about images and reasons in its reply; its answer is judged; thought,
answer and verdict become a line of a trace file, which train.py learns from. That file is also the
cache: the same command, run again, asks only the questions that are not in it.

Papers: Fine-tune-CoT (Ho et al., arXiv 2212.10071): a big model's reasoning as training data, with
several distinct rationales a question (--diverse). Zero-shot-CoT (Kojima et al., arXiv 2205.11916):
"Let's think step by step" for teachers without thoughts of their own (--zero-shot-cot; here in one
request, not two). STaR (Zelikman et al., arXiv 2203.14465): the gold answer as a hint (--hint-gold;
off by default and recorded, as a thought that knows its end need not lead there). Rejection
sampling (--attempts) asks again until a reply is kept.

Here: the questions, the way from a reply to a trace, the command; the rest is in support/teachers/.
Left out: other providers, tools, conversations, prompt caching, batches for the judge.
"""

import asyncio
import contextlib
import math
import random
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import data
from support import files
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import traces_of, training_notice
from support.evaluation import grading
from support.teachers import cache, filters, providers
from support.teachers.batch_api import Batches, Jobs
from support.teachers.cache import Ledger, close, fingerprint, total_paid
from support.teachers.calls import Calls, Halt, highest_cost
from support.teachers.cli import TeacherSettings, forecast, parse_args, report
from support.teachers.providers import ASK, Failed, Model, Options, Reply, Request


@dataclass
class Run:
    """One command: its settings, and all that was read and opened for it."""

    settings: TeacherSettings
    problems: list[data.Problem]
    teacher: Model | None  # None with --from
    judge: Model
    calls: Calls
    traces: Ledger
    pending: Ledger | None = None  # paid replies that wait for the judge
    source: dict[str, list[dict]] | None = None  # --from: {problem id: its traces}
    shots: tuple[data.Problem, ...] = ()
    tokenizer: object = None


# --- the questions

STEPS = "Let's think step by step."


def question_text(
    problem: data.Problem,
    shots: tuple[data.Problem, ...] = (),
    hint_gold: bool = False,
    zero_shot_cot: bool = False,
) -> str:
    """The text that a teacher is sent together with the image: question, hint, unit and choices as
    the student reads them, and how to end. shots: one more than there are worked examples, as a
    problem is never an example of itself."""
    others = [shot for shot in shots if shot.id != problem.id]
    parts = [worked_example(shot) for shot in others[: len(shots) - 1]]
    parts.append(f"Question: {data.question_lines(problem)}")
    if hint_gold:
        parts.append(
            f"The answer is known to be {data.pali_suffix(problem)}. Reason towards it from what "
            "the question and the picture say, as if you had not been told, and do not mention it."
        )
    ending = "the letter of your choice" if problem.choices else "the answer alone"
    parts.append(f'End your reply with a line of its own: "Answer: " and {ending}.')
    if zero_shot_cot:
        parts.append(STEPS)
    return "\n\n".join(parts)


def worked_example(problem: data.Problem) -> str:
    """A problem with its own solution, in the form of the question and of the reply asked for."""
    question = data.question_lines(problem)
    return f"Question: {question}\n{problem.solution}\nAnswer: {data.pali_suffix(problem)}"


def draw_shots(where: str, shots: int, seed: int) -> tuple[data.Problem, ...]:
    """`shots` + 1 training problems with a solution in an order drawn from the seed, those without
    an image first, as it would not be sent."""
    solved = [problem for problem in data.load(where, "train") if problem.solution]
    if len(solved) <= shots:
        text = f"{where} has {len(solved)} solved training problems"
        raise ValueError(f"{text}: too few for --shots {shots}.")
    random.Random(seed).shuffle(solved)
    return tuple(sorted(solved, key=lambda problem: problem.image is not None)[: shots + 1])


def text_of(run: Run, problem: data.Problem) -> str:
    s = run.settings
    return question_text(problem, run.shots, s.hint_gold, s.zero_shot_cot)


def reasons_in_reply(settings: TeacherSettings) -> bool:
    """Whether the teacher is to reason in its reply, as it has no thoughts of its own to show."""
    return bool(settings.zero_shot_cot or settings.shots)


def options_of(settings: TeacherSettings, provider: str, attempt: int) -> Options:
    """The parameters of a request; the seed only where the provider has one."""
    return Options(
        max_output=settings.max_output,
        thoughts=not reasons_in_reply(settings),
        effort=settings.effort,
        thinking_budget=settings.thinking_budget,
        seed=None if provider == "anthropic" else settings.seed + attempt,
    )


def request_of(run: Run, problem: data.Problem, attempt: int) -> tuple[Request, float]:
    """The request, and the most USD that it can cost."""
    options = options_of(run.settings, run.teacher.provider, attempt)
    request = Request(text_of(run, problem), providers.image_to_send(problem.image), options)
    size = fingerprint(problem.image)[1]
    return request, highest_cost(run.teacher, request.text, size, options.max_output)


# --- the records that the trace file has already


def key_of(run: Run, problem: data.Problem, attempt: int) -> str:
    """The key of a record: of all that the reply depends on."""
    if run.source:
        trace = run.source[problem.id][attempt]
        parts = ["from", trace["thought"], trace["answer"], trace["teacher"]]
    else:
        options = options_of(run.settings, run.teacher.provider, attempt).chosen()
        sha256, _ = fingerprint(problem.image)
        parts = [text_of(run, problem), run.teacher.spec, sha256, options, attempt]
    return files.digest([problem.id, cache.VERSION, *parts])


def attempts_at(run: Run, problem: data.Problem) -> range:
    """The numbers of the attempts that may be made at a problem."""
    return range(len(run.source[problem.id]) if run.source else run.settings.attempts)


def records_of(run: Run, problem: data.Problem) -> list[dict]:
    """The problem's records, of this command's settings."""
    keys = (key_of(run, problem, attempt) for attempt in attempts_at(run, problem))
    return [run.traces.records[key] for key in keys if key in run.traces.records]


def next_attempt(run: Run, problem: data.Problem) -> int | None:
    """The number of the attempt to make now, or None: enough are kept, or all are made."""
    kept = 0
    for attempt in attempts_at(run, problem):
        record = run.traces.records.get(key_of(run, problem, attempt))
        if record is None:
            return attempt
        kept += record["kept"] is True
        if kept >= run.settings.diverse and not run.source:
            return None
    return None


# --- one question


async def all_attempts(run: Run, problem: data.Problem) -> None:
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


async def reply_to(run: Run, problem: data.Problem, attempt: int) -> Reply:
    """From --from, from the pending file, or from the teacher."""
    if run.source:
        trace = run.source[problem.id][attempt]
        texts = trace.get("reply") or trace
        usage = {"input": 0, "output": 0, "cost": 0.0}
        return Reply(texts["thought"], texts["answer"], trace.get("stop") or "end", usage)
    waiting = unjudged(run.pending, key_of(run, problem, attempt))
    return waiting or await ask_teacher(run, problem, attempt)


def unjudged(pending: Ledger | None, key: str) -> Reply | None:
    """The paid reply that waits for its judge under this key."""
    waiting = pending and pending.records.get(key)
    return Reply(**waiting["reply"]) if waiting else None


async def ask_teacher(run: Run, problem: data.Problem, attempt: int) -> Reply:
    teacher = run.teacher
    if teacher.provider == "demo":
        return providers.ask_demo(problem, run.settings.seed, attempt)
    # In a thread, as shrinking a large image takes seconds.
    request, most = await asyncio.to_thread(request_of, run, problem, attempt)
    ask = partial(ASK[teacher.provider], teacher.client, teacher.name, request)
    reply = await run.calls.call_with_retries(ask, most, teacher.price)
    return filters.split_reply(reply) if reasons_in_reply(run.settings) else reply


# --- from the reply to the trace


async def settle(run: Run, problem: data.Problem, attempt: int, reply: Reply) -> None:
    """Judge a reply and write its record."""
    key = key_of(run, problem, attempt)
    verdict, judge_usage = await judged(run, problem, reply, key)
    old = run.source[problem.id][attempt] if run.source else None
    if old and old["verdict"]["correct"] is not None:
        verdict["before"] = {name: old["verdict"][name] for name in ("correct", "consistent", "by")}
    thought, answer = filters.shape(problem, reply.thought, reply.answer)
    others = [record["thought"] for record in records_of(run, problem) if record["kept"]]
    s = run.settings
    why = filters.reason_to_drop(
        problem, thought, verdict, others, s.diverse, s.max_tokens, run.tokenizer
    )
    record = {
        "id": problem.id,
        "question": problem.question,
        "thought": thought,
        "answer": answer,
        "gold": data.pali_suffix(problem),
        "verdict": verdict,
        "teacher": old["teacher"] if old else run.teacher.spec,
        "usage": reply.usage | ({"judge": judge_usage} if judge_usage else {}),
        "key": key,
        "stop": reply.stop,
        "attempt": attempt,
        "hint": s.hint_gold,
        "kept": why is None,
    }
    if why:
        record["dropped"] = why
    run.traces.add(record | {"reply": {"thought": reply.thought, "answer": reply.answer}})


async def judged(run: Run, problem: data.Problem, reply: Reply, key: str) -> tuple[dict, dict]:
    """(verdict, the judge's usage). The rule comes first; a model is asked where the rule is not
    conclusive on the answer, or finds it right and cannot tell where the thought leads, or always
    (--judge-all). Until its verdict is there, the paid reply waits in the pending file."""
    judge = run.judge
    if reply.stop != "end" or not (reply.answer or judge.provider == "demo"):
        why = "there is no answer"
        if reply.stop != "end":
            why = f"{reply.stop}: {reply.why}" if reply.why else reply.stop
        return {"correct": False, "consistent": None, "by": "teacher", "why": why}, {}
    grade = grading.grade(problem, reply.answer)
    verdict = filters.rule_verdict(problem, reply.thought, reply.answer)
    unclear = verdict["correct"] and verdict["consistent"] is None and bool(reply.thought)
    final = grading.is_conclusive(grade) and not unclear and not run.settings.judge_all
    if judge.provider == "rule" or (final and judge.provider != "demo"):
        return verdict, {}
    if run.pending and key not in run.pending.records:
        run.pending.add({"key": key, "reply": asdict(reply), "usage": reply.usage})
    result, usage = await filters.ask_judge(
        run.calls, judge, problem, reply.thought, reply.answer, run.settings.judge_image
    )
    if result is None:
        return verdict | {"why": f"{verdict['why']} ({judge.spec} declined to judge)"}, usage
    return result | {"rule": {"correct": verdict["correct"], "how": grade.how}}, usage


def open_jobs(run: Run, problems: list[data.Problem]) -> Jobs:
    """The attempts to make now, by the keys of their records."""
    jobs = {}
    for problem in problems:
        attempt = next_attempt(run, problem)
        if attempt is not None and problem.id not in run.calls.failed:
            jobs[key_of(run, problem, attempt)] = problem, attempt
    return jobs


# --- a command: before, during, after


def prepare(settings: TeacherSettings) -> Run:
    """The Run of a command: problems, files, prices. Nothing is connected yet."""
    s = settings
    if notice := training_notice(s.data):
        print(notice, file=sys.stderr)
    problems = data.load(s.data, s.split)[: s.limit]
    source = None
    if s.source:
        by_id = {problem.id: problem for problem in problems}
        source = traces_of(by_id, s.source, f"{s.data}, split {s.split}")
        problems = [by_id[id] for id in source]
    teacher = providers.parse_spec(s.teacher, providers.TEACHERS, s.price)
    teacher = None if source else teacher
    judge = providers.parse_spec(s.judge, providers.JUDGES, s.judge_price)
    if s.max_cost is not None:
        for flag, model in (("--price", teacher), ("--judge-price", judge)):
            if model and model.price is None:
                text = f"--max-cost: no price of {model.name} is known"
                raise ValueError(f"{text}; give {flag} IN OUT.")
    shots = draw_shots(s.data, s.shots, s.seed) if s.shots else ()
    folder = s.tokenizer or (s.max_tokens and files.ROOT / "demo/paligemma")
    tokenizer = load_tokenizer(folder) if folder else None
    traces = Ledger(s.out)
    pending = Path(f"{s.out}.pending")
    asks_judge = judge.provider in ASK and not source
    pending = Ledger(pending) if asks_judge or pending.is_file() else None
    limit = math.inf if s.max_cost is None else s.max_cost
    calls = Calls(s.concurrency, s.timeout, s.retries, limit, total_paid(traces, pending))
    return Run(s, problems, teacher, judge, calls, traces, pending, source, shots, tokenizer)


def unfinished(run: Run) -> list[data.Problem]:
    """The problems with something left to ask. One whose image cannot be read has failed, and is
    dropped from run.problems."""
    left = []
    for problem in run.problems:
        try:
            if next_attempt(run, problem) is not None:
                left.append(problem)
        except Failed as error:
            run.calls.failed[problem.id] = str(error)
    run.problems = [problem for problem in run.problems if problem.id not in run.calls.failed]
    return left


def dry_run(run: Run, left: list[data.Problem], records: list[dict]) -> None:
    """Print what would be asked, and what it would cost."""
    s = run.settings
    questions = []
    for problem in left:
        replies = 1  # each question is counted once, with --from each reply without a verdict
        if run.source:
            replies = len(attempts_at(run, problem)) - len(records_of(run, problem))
        with contextlib.suppress(Failed):  # with --from nobody has looked at the image yet
            questions += [(text_of(run, problem), fingerprint(problem.image)[1])] * replies
    task = "to be asked" if run.teacher else f"replies of {s.source} to be judged"
    failed = len(run.calls.failed)
    broken = f", {failed} more have no readable image" if failed else ""
    print(f"{s.data}: {len(run.problems)} questions, {len(questions)} {task}{broken}.")
    for line in forecast(s, run.teacher, run.judge, questions, records):
        print(line)
    print(f"{s.out} has cost ${run.calls.spent:.4f} so far.")


def all_records(run: Run) -> list[dict]:
    """The trace file's records of this command."""
    return [record for problem in run.problems for record in records_of(run, problem)]


def main(argv: list[str] | None = None) -> int:
    """0: done, or stopped by --max-cost; 130: interrupted; 1: stopped, or all calls failed."""
    settings = parse_args(argv)
    run = prepare(settings)
    calls = run.calls
    try:
        left = unfinished(run)
        if settings.dry_run:
            dry_run(run, left, all_records(run))
            return 0
        batches = Batches(settings.out, run.teacher, calls, reasons_in_reply(settings))
        calls.total = len(left)
        if settings.batch:
            work = batches.run(
                partial(open_jobs, run, left),
                partial(unjudged, run.pending),
                partial(request_of, run),
                partial(settle, run),
                run.traces.records,
            )
        else:
            batches.refuse(open_jobs(run, left))
            work = calls.pool(left, partial(all_attempts, run))
        asyncio.run(calls.run(filter(None, (run.teacher, run.judge)), work))
        still = sum(next_attempt(run, problem) is not None for problem in run.problems)
        report(all_records(run), run.problems, run.tokenizer, calls, still)
    finally:
        close(run.traces, run.pending)
    if calls.stop.startswith("interrupted"):
        return 130
    fine = not calls.stop or calls.stop.startswith("--max-cost")
    return 0 if fine and (run.traces.records or not calls.failed) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(providers.hide(f"teacher.py: {error}"))
    except KeyboardInterrupt:
        sys.exit(130)
