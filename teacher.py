"""The teacher and the judge: traces worth learning from, never paid for twice.

A big model is asked questions about images and reasons in its reply; its answer is judged; thought,
answer and verdict become a line of a trace file, which train.py learns from. That file is also the
cache: the same command, run again, asks only the questions that are not in it.

Papers: Fine-tune-CoT (Ho et al., arXiv 2212.10071): a big model's reasoning as training data, with
several distinct rationales a question (--diverse). Zero-shot-CoT (Kojima et al., arXiv 2205.11916):
"Let's think step by step" for teachers without thoughts of their own (--zero-shot-cot; here in one
request, not two). STaR (Zelikman et al., arXiv 2203.14465): the gold answer as a hint (--hint-gold;
recorded, as a thought that knows its end need not lead there).
"""

import asyncio
import contextlib
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import data
from support import files
from support.dataset.tokenizers import load_tokenizer
from support.dataset.traces import traces_of, training_notice
from support.evaluation import grading
from support.teachers import cache, filters, providers
from support.teachers.batch_api import Batches
from support.teachers.cache import Job, Ledger, fingerprint
from support.teachers.calls import Calls, highest_cost
from support.teachers.cli import TeacherSettings, forecast, parse_args, report
from support.teachers.providers import ASK, Failed, Model, Options, Reply, Request

# --- the questions

STEPS = "Let's think step by step."


def question_text(
    problem: data.Problem, shots: tuple[data.Problem, ...], hint_gold: bool, zero_shot_cot: bool
) -> str:
    """The text that a teacher is sent together with the image: question, hint, unit and choices as
    the student reads them, and how to end. shots: one more than there are worked examples, as a
    problem is never an example of itself."""
    others = [shot for shot in shots if shot.id != problem.id]
    parts = []
    for shot in others[: len(shots) - 1]:
        answer = f"Answer: {data.pali_suffix(shot)}"
        parts.append(f"Question: {data.question_lines(shot)}\n{shot.solution}\n{answer}")
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


def draw_shots(where: str, shots: int, seed: int) -> tuple[data.Problem, ...]:
    """`shots` + 1 training problems with a solution in an order drawn from the seed, those without
    an image first, as it would not be sent."""
    solved = [problem for problem in data.load(where, "train") if problem.solution]
    if len(solved) <= shots:
        text = f"{where} has {len(solved)} solved training problems"
        raise ValueError(f"{text}: too few for --shots {shots}.")
    random.Random(seed).shuffle(solved)
    return tuple(sorted(solved, key=lambda problem: problem.image is not None)[: shots + 1])


# --- one command


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

    def text(self, problem: data.Problem) -> str:
        s = self.settings
        return question_text(problem, self.shots, s.hint_gold, s.zero_shot_cot)

    def options(self, attempt: int) -> Options:
        """The parameters of a request; the seed only where the provider has one."""
        s = self.settings
        seed = None if self.teacher.provider == "anthropic" else s.seed + attempt
        thoughts = not s.reasons_in_reply
        return Options(s.max_output, thoughts, s.effort, s.thinking_budget, seed)

    def request(self, job: Job) -> tuple[Request, float]:
        """The request, and the most USD that it can cost."""
        options = self.options(job.attempt)
        image = job.problem.image
        request = Request(self.text(job.problem), providers.image_to_send(image), options)
        size = fingerprint(image)[1]
        return request, highest_cost(self.teacher, request.text, size, options.max_output)

    def jobs(self, problem: data.Problem) -> Iterator[Job]:
        """The attempts that may be made at a problem; a key has all that the reply depends on.
        Raises Failed for an image that cannot be read."""
        attempts = len(self.source[problem.id]) if self.source else self.settings.attempts
        for attempt in range(attempts):
            if self.source:
                trace = self.source[problem.id][attempt]
                parts = ["from", trace["thought"], trace["answer"], trace["teacher"]]
            else:
                sha256, _ = fingerprint(problem.image)
                options = self.options(attempt).chosen()
                parts = [self.text(problem), self.teacher.spec, sha256, options, attempt]
            yield Job(problem, attempt, files.digest([problem.id, cache.VERSION, *parts]))

    def records(self, problem: data.Problem) -> list[dict]:
        """The problem's records in the trace file, of this command's settings."""
        known = self.traces.records
        return [known[job.key] for job in self.jobs(problem) if job.key in known]

    def next_job(self, problem: data.Problem) -> Job | None:
        """The attempt to make now, or None: enough are kept, or all are made."""
        kept = 0
        for job in self.jobs(problem):
            record = self.traces.records.get(job.key)
            if record is None:
                return job
            kept += record["kept"] is True
            if kept >= self.settings.diverse and not self.source:
                return None
        return None

    def unjudged(self, key: str) -> Reply | None:
        """The paid reply that waits for its judge under this key."""
        waiting = self.pending and self.pending.records.get(key)
        return Reply(**waiting["reply"]) if waiting else None

    # --- one question

    async def all_attempts(self, problem: data.Problem) -> None:
        """All attempts at a problem, one after the other, until enough are kept."""
        while not self.calls.stop and (job := self.next_job(problem)):
            await self.settle(job, await self.reply_to(job))
            self.calls.in_a_row = 0

    async def reply_to(self, job: Job) -> Reply:
        """From --from, from the pending file, or from the teacher."""
        if self.source:
            trace = self.source[job.problem.id][job.attempt]
            texts = trace.get("reply") or trace
            usage = {"input": 0, "output": 0, "cost": 0.0}
            return Reply(texts["thought"], texts["answer"], trace.get("stop") or "end", usage)
        if waiting := self.unjudged(job.key):
            return waiting
        teacher = self.teacher
        if teacher.provider == "demo":
            return providers.ask_demo(job.problem, self.settings.seed, job.attempt)
        # In a thread, as shrinking a large image takes seconds.
        request, most = await asyncio.to_thread(self.request, job)
        ask = partial(ASK[teacher.provider], teacher.client, teacher.name, request)
        reply = await self.calls.call_with_retries(ask, most, teacher.price)
        return filters.split_reply(reply) if self.settings.reasons_in_reply else reply

    async def settle(self, job: Job, reply: Reply) -> None:
        """Judge a reply and write its record."""
        s = self.settings
        problem = job.problem
        verdict, judge_usage = await self.judged(job, reply)
        old = self.source[problem.id][job.attempt] if self.source else None
        if old and old["verdict"]["correct"] is not None:
            before = {name: old["verdict"][name] for name in ("correct", "consistent", "by")}
            verdict["before"] = before
        thought, answer = filters.shape(problem, reply.thought, reply.answer)
        others = [record["thought"] for record in self.records(problem) if record["kept"]]
        why = filters.reason_to_drop(
            problem, thought, verdict, others, s.diverse, s.max_tokens, self.tokenizer
        )
        record = {
            "id": problem.id,
            "question": problem.question,
            "thought": thought,
            "answer": answer,
            "gold": data.pali_suffix(problem),
            "verdict": verdict,
            "teacher": old["teacher"] if old else self.teacher.spec,
            "usage": reply.usage | ({"judge": judge_usage} if judge_usage else {}),
            "key": job.key,
            "stop": reply.stop,
            "attempt": job.attempt,
            "hint": s.hint_gold,
            "kept": why is None,
        }
        if why:
            record["dropped"] = why
        self.traces.add(record | {"reply": {"thought": reply.thought, "answer": reply.answer}})

    async def judged(self, job: Job, reply: Reply) -> tuple[dict, dict]:
        """(verdict, the judge's usage). The rule comes first; a model is asked where it is not
        conclusive on the answer, or finds it right and cannot tell where the thought leads, or
        always (--judge-all). Until its verdict is there, the paid reply waits in `pending`."""
        judge = self.judge
        problem = job.problem
        if reply.stop != "end" or not (reply.answer or judge.provider == "demo"):
            why = "there is no answer"
            if reply.stop != "end":
                why = f"{reply.stop}: {reply.why}" if reply.why else reply.stop
            return {"correct": False, "consistent": None, "by": "teacher", "why": why}, {}
        grade = grading.grade(problem, reply.answer)
        verdict = filters.rule_verdict(problem, reply.thought, reply.answer)
        unclear = verdict["correct"] and verdict["consistent"] is None and bool(reply.thought)
        final = grading.is_conclusive(grade) and not unclear and not self.settings.judge_all
        if judge.provider == "rule" or (final and judge.provider != "demo"):
            return verdict, {}
        if self.pending and job.key not in self.pending.records:
            self.pending.add({"key": job.key, "reply": asdict(reply), "usage": reply.usage})
        look = self.settings.judge_image
        result, usage = await filters.ask_judge(
            self.calls, judge, problem, reply.thought, reply.answer, look
        )
        if result is None:
            return verdict | {"why": f"{verdict['why']} ({judge.spec} declined to judge)"}, usage
        return result | {"rule": {"correct": verdict["correct"], "how": grade.how}}, usage

    # --- all of them

    def open_jobs(self, problems: list[data.Problem]) -> dict[str, Job]:
        """The attempts to make now, by key. A problem whose image cannot be read has failed."""
        jobs = {}
        for problem in problems:
            try:
                job = problem.id not in self.calls.failed and self.next_job(problem)
            except Failed as error:
                self.calls.failed[problem.id] = str(error)
                continue
            if job:
                jobs[job.key] = job
        return jobs

    def close(self) -> None:
        """Close the files; empty traces, and pending replies that are all judged, are deleted."""
        known = self.traces.records
        self.traces.close(delete=not known)
        if self.pending:
            self.pending.close(delete=self.pending.records.keys() <= known.keys())


def prepare(s: TeacherSettings) -> Run:
    """The Run of a command: problems, files, prices. Nothing is connected yet."""
    if notice := training_notice(s.data):
        print(notice, file=sys.stderr)
    problems = data.load(s.data, s.split)[: s.limit]
    if not data.has_answers(problems):
        text = f"The answers of {s.data}'s {s.split} are not public"
        raise ValueError(f"{text}, so nothing can be judged: take another --split.")
    teacher = providers.parse_spec(s.teacher, providers.TEACHERS, s.price)
    source = None
    if s.source:
        teacher = None
        by_id = {problem.id: problem for problem in problems}
        source = traces_of(by_id, s.source, f"{s.data}, split {s.split}")
        problems = [by_id[id] for id in source]
    judge = providers.parse_spec(s.judge, providers.JUDGES, s.judge_price)
    for flag, model in (("--price", teacher), ("--judge-price", judge)):
        if s.max_cost is not None and model and model.price is None:
            text = f"--max-cost: the price of {model.name} is not known"
            raise ValueError(f"{text}; give {flag} IN OUT.")
    shots = draw_shots(s.data, s.shots, s.seed) if s.shots else ()
    folder = s.tokenizer or (s.max_tokens and files.ROOT / "demo/paligemma")
    tokenizer = load_tokenizer(folder) if folder else None
    traces = Ledger(s.out)
    pending = Path(f"{s.out}.pending")
    asks_judge = judge.provider in ASK and not source
    pending = Ledger(pending) if asks_judge or pending.is_file() else None
    limit = math.inf if s.max_cost is None else s.max_cost
    records = (pending.records if pending else {}) | traces.records
    spent = sum(map(cache.paid, records.values()))
    calls = Calls(s.concurrency, s.timeout, s.retries, limit, spent)
    return Run(s, problems, teacher, judge, calls, traces, pending, source, shots, tokenizer)


def dry_run(run: Run, left: list[data.Problem], records: list[dict]) -> None:
    """Print what would be asked, and what it would cost."""
    s = run.settings
    questions = []
    for problem in left:
        replies = 1  # each question is counted once, with --from each reply without a verdict
        if run.source:
            replies = len(run.source[problem.id]) - len(run.records(problem))
        with contextlib.suppress(Failed):  # with --from nobody has looked at the image yet
            questions += [(run.text(problem), fingerprint(problem.image)[1])] * replies
    task = "to be asked" if run.teacher else f"replies of {s.source} to be judged"
    failed = len(run.calls.failed)
    broken = f", {failed} more have no readable image" if failed else ""
    print(f"{s.data}: {len(run.problems)} questions, {len(questions)} {task}{broken}.")
    for line in forecast(s, run.teacher, run.judge, questions, records):
        print(line)
    print(f"{s.out} has cost ${run.calls.spent:.4f} so far.")


def main(argv: list[str] | None = None) -> int:
    """0: done, or stopped by --max-cost; 130: interrupted; 1: stopped, or all calls failed."""
    settings = parse_args(argv)
    run = prepare(settings)
    calls = run.calls
    try:
        jobs = run.open_jobs(run.problems)
        run.problems = [problem for problem in run.problems if problem.id not in calls.failed]
        left = [job.problem for job in jobs.values()]

        def records() -> list[dict]:
            return [record for problem in run.problems for record in run.records(problem)]

        if settings.dry_run:
            dry_run(run, left, records())
            return 0
        batches = Batches(run)
        calls.total = len(left)
        if settings.batch:
            work = batches.run(left)
        else:
            batches.refuse(jobs)
            pairs = [(problem.id, problem) for problem in left]
            work = calls.pool("asked", pairs, run.all_attempts)
        asyncio.run(calls.run(filter(None, (run.teacher, run.judge)), work))
        still = sum(run.next_job(problem) is not None for problem in run.problems)
        report(records(), run.problems, run.tokenizer, calls, still)
    finally:
        run.close()
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
