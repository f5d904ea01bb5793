"""The providers' batch APIs: half the price, within a day.

OUT.batches.json lists the batches that are out: name, keys, most (USD), id, before. A batch is
written there before it is sent, with the ids that the provider lists then, and again when its id is
known. After a crash between the two it is looked for, by name (Gemini) or as one of this size that
was not there before (Anthropic has no names), and sent again only if it is not found.
"""

import functools
import json
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from data import Problem
from support import files
from support.teachers import providers
from support.teachers.cache import Job
from support.teachers.calls import Halt, cost
from support.teachers.filters import split_reply
from support.teachers.providers import FATAL, UNREADABLE, Failed, Lost, Reply, hide

BATCH_BYTES = {"gemini": 14e6, "anthropic": 150e6}  # the limits are 20 and 256 MB
BATCH_REQUESTS = 10_000
BATCH_SHARE = 0.5  # of the price

# --- the same three steps with each provider


async def list_anthropic(client: object) -> dict[str, int]:
    """{id: number of requests} of the newest batches."""
    newest = (await client.messages.batches.list(limit=100)).data
    return {batch.id: sum(batch.request_counts.to_dict().values()) for batch in newest}


async def list_gemini(client: object) -> dict[str, str]:
    """{id: display name} of the newest batches."""
    newest = (await client.aio.batches.list(config={"page_size": 100})).page
    return {batch.name: batch.display_name for batch in newest}


async def send_anthropic(client: object, name: str, model: str, requests: dict) -> str:
    """The id of a new batch of {key: Request}; Anthropic's have no names."""
    rows = []
    for key, request in requests.items():
        rows.append({"custom_id": key, "params": providers.anthropic_request(model, request)})
    return (await client.messages.batches.create(requests=rows)).id


async def send_gemini(client: object, name: str, model: str, requests: dict) -> str:
    """The id of a new batch of {key: Request}, displayed under this name."""
    from google.genai import types

    rows = []
    for key, request in requests.items():
        arguments = providers.gemini_request(model, request)
        del arguments["model"]
        rows.append(types.InlinedRequest(**arguments, metadata={"key": key}))
    job = await client.aio.batches.create(model=model, src=rows, config={"display_name": name})
    return job.name


async def fetch_anthropic(client: object, id: str) -> tuple[list, str] | None:
    """None while it runs, else ([(key, message or text of an error)], how it ended)."""
    if (await client.messages.batches.retrieve(id)).processing_status != "ended":
        return None
    rows = []
    async for row in await client.messages.batches.results(id):
        if row.result.type == "succeeded":
            rows.append((row.custom_id, row.result.message))
        else:
            rows.append((row.custom_id, hide(f"{row.result.to_dict()}")[:200]))
    return rows, "ended"


async def fetch_gemini(client: object, id: str) -> tuple[list, str] | None:
    """As `fetch_anthropic`; a message is a list of one response."""
    job = await client.aio.batches.get(name=id)
    if not job.done:
        return None
    rows = []
    for row in (job.dest and job.dest.inlined_responses) or []:
        message = [row.response] if row.response else hide(f"{row.error}")[:200]
        rows.append(((row.metadata or {}).get("key"), message))
    return rows, hide(f"{job.state and job.state.name} {job.error or ''}".strip())


@dataclass(frozen=True)
class BatchApi:
    list: Callable
    send: Callable
    fetch: Callable
    parse: Callable  # the Reply in a fetched message


APIS = {
    "anthropic": BatchApi(
        list_anthropic, send_anthropic, fetch_anthropic, providers.anthropic_reply
    ),
    "gemini": BatchApi(list_gemini, send_gemini, fetch_gemini, providers.gemini_reply),
}


# --- sent once, collected once


class Batches:
    """The batches of a command that are out, in `entries`, as OUT.batches.json lists them; an
    entry's keys are those of the requests still to be collected. run: a Run of teacher.py."""

    def __init__(self, run: object) -> None:
        self.command = run
        self.calls = run.calls
        self.model = run.teacher
        self.api = run.teacher and APIS.get(run.teacher.provider)
        self.file = Path(f"{run.settings.out}.batches.json")
        self.entries = files.read_json(self.file) if self.file.is_file() else []

    def keys(self) -> set[str]:
        return {key for entry in self.entries for key in entry["keys"]}

    def refuse(self, keys: Iterable[str]) -> None:
        """ValueError if some of these are out: asked one by one too, they cost twice."""
        if out := self.keys() & set(keys):
            text = f"{len(out)} of these questions are out in batches: collect them with --batch"
            raise ValueError(f"{self.file}: {text}.")

    def store(self) -> None:
        """Write the list, whole or not at all; an empty one is no file."""
        with files.atomic_write(self.file) as file:
            file.write(json.dumps(self.entries))
        if not self.entries:
            self.file.unlink()

    def add(self, jobs: Iterable[Job]) -> list[dict]:
        """Plan batches of as many of these jobs as --max-cost allows: their entries."""
        calls = self.calls
        entries = []
        room = 0  # bytes
        for job in jobs:
            request, most = self.command.request(job)
            size = len(request.text) + 500
            if request.image:
                size += len(request.image[0]) * 4 / 3  # base64
            most *= BATCH_SHARE
            if calls.spent + calls.reserved + most > calls.limit:
                break
            if size > room or len(entries[-1]["keys"]) == BATCH_REQUESTS:
                name = f"nanocot-{job.key[:24]}"
                entries.append({"name": name, "keys": [], "most": 0.0, "before": None, "id": None})
                room = BATCH_BYTES[self.model.provider]
            entries[-1]["keys"].append(job.key)
            entries[-1]["most"] += most
            room -= size
            calls.reserved += most
        self.entries += entries
        return entries

    async def send(self, entry: dict, jobs: dict[str, Job]) -> None:
        """Make a batch of those of its requests that are still wanted, unless it has an id, or an
        interrupted run made it already."""
        client = self.model.client

        async def ask() -> str:
            listed = await self.api.list(client)
            mark = entry["name"] if self.model.provider == "gemini" else len(entry["keys"])
            if entry["before"] is not None:  # we were about to send it once
                for id in listed:
                    if listed[id] == mark and id not in entry["before"]:
                        return id
            entry["keys"] = [key for key in entry["keys"] if key in jobs]
            entry["before"] = list(listed)
            self.store()
            requests = {key: self.command.request(jobs[key])[0] for key in entry["keys"]}
            if id := await self.api.send(client, entry["name"], self.model.name, requests):
                return id
            raise Lost("the batch has no id")

        if entry["id"] is None:
            entry["id"] = await self.calls.call_with_retries(ask)
            self.store()

    async def ended(self, entry: dict) -> tuple[list, str]:
        """Poll until a batch has ended: ([(key, message or text of an error)], how it ended)."""
        calls = self.calls
        delay = 1.0
        fetch = functools.partial(self.api.fetch, self.model.client, entry["id"])
        fatal = tuple(status for status in FATAL if status != 404)  # 404: no such batch, not model
        while True:
            try:
                ended = await calls.call_with_retries(fetch, fatal=fatal)
            except Failed as error:
                if providers.status_of(error.__cause__) != 404:
                    raise
                return [], "the provider no longer has it"
            if ended is not None:
                return ended
            name = f"batch {entry['id']}"
            files.progress(name, calls.done, calls.total, calls.start, " (waiting)")
            delay = min(60, 1.5 * delay)
            await calls.pause(delay)

    async def collect(self, entry: dict, jobs: dict[str, Job]) -> None:
        """Wait until a batch has ended, settle its replies, forget what is settled or failed."""
        calls = self.calls
        records = self.command.traces.records
        rows, ending = await self.ended(entry)
        calls.reserved -= entry["most"]
        messages = dict(rows)
        replies = {}
        for key in entry["keys"]:
            if key not in jobs or key in records:
                continue
            try:
                replies[key] = self.reply(messages.get(key, f"no reply in its batch, {ending}"))
            except (Failed, Lost, *UNREADABLE) as error:
                calls.failed[jobs[key].problem.id] = str(error)
                calls.done += 1
        await self.settle_all(jobs, replies)
        failed = {key for key, job in jobs.items() if job.problem.id in calls.failed}
        entry["keys"] = [key for key in entry["keys"] if key not in records.keys() | failed]
        self.entries = [entry for entry in self.entries if entry["keys"]]
        self.store()

    def reply(self, message: object) -> Reply:
        """The Reply, paid for; Failed or Lost with why there is none."""
        if isinstance(message, str):
            raise Failed(message)
        reply = self.api.parse(message)
        usd = cost(reply.usage, self.model.price, BATCH_SHARE)
        reply.usage |= {"cost": usd, "seconds": None, "tries": 1}
        self.calls.spent += usd or 0.0
        return split_reply(reply) if self.command.settings.reasons_in_reply else reply

    async def settle_all(self, jobs: dict[str, Job], replies: dict[str, Reply]) -> None:
        async def settle(key: str) -> None:
            await self.command.settle(jobs[key], replies[key])

        pairs = [(jobs[key].problem.id, key) for key in replies]
        await self.calls.pool("judged", pairs, settle)

    async def run(self, problems: Collection[Problem]) -> None:
        """Send what has no record, wait, settle the replies; then the next attempts likewise."""
        calls = self.calls
        calls.reserved = sum(entry["most"] for entry in self.entries)
        busy = True
        try:
            while busy and not calls.stop:
                busy = await self.one_round(self.command.open_jobs(problems))
        except Failed as error:
            calls.halt(f"a batch cannot be sent or fetched now: {error}")
        except Halt:
            return
        if self.entries and not calls.stop:
            text = "lists batches sent with other flags; those collect them."
            print(f"{self.file} {text}", file=sys.stderr)

    async def one_round(self, jobs: dict[str, Job]) -> bool:
        """One attempt at each question, or at as many as --max-cost allows; whether any was."""
        replies = {key: self.command.unjudged(key) for key in jobs}
        waiting = {key: reply for key, reply in replies.items() if reply}
        out = self.keys()
        ours = [entry for entry in self.entries if jobs.keys() & entry["keys"]]
        ours += self.add(job for key, job in jobs.items() if key not in out | waiting.keys())
        if jobs and not ours and not waiting:
            self.calls.halt(f"{self.calls.money_left()}: too little for another request")
        await self.settle_all(jobs, waiting)
        for entry in ours:
            await self.send(entry, jobs)
        for entry in ours:
            await self.collect(entry, jobs)
        return bool(ours or waiting)
