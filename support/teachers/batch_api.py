"""The providers' batch APIs: half the price, within a day.

OUT.batches.json lists the batches that are out: name, keys, most (USD), id, before. A batch is
written there before it is sent, with the ids that the provider lists then, and again when its id is
known. After a crash between the two it is looked for, by name (Gemini) or as one of this size that
was not there before (Anthropic has no names), and sent again only if it is not found.

A request is known here by its key alone; teacher.py makes the requests, and the traces of their
replies. Left out: batches for the judge.
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
from support.teachers.calls import Calls, Halt, cost
from support.teachers.filters import split_reply
from support.teachers.providers import FATAL, UNREADABLE, Failed, Lost, Model, Reply, hide

BATCH_BYTES = {"gemini": 14e6, "anthropic": 150e6}  # the limits are 20 and 256 MB
BATCH_REQUESTS = 10_000
BATCH_SHARE = 0.5  # of the price

Jobs = dict[str, tuple[Problem, int]]  # {key of the record: (problem, number of the attempt)}

# --- the same four steps with each provider


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
    """The batches of a trace file that are out, in `entries`, as OUT.batches.json lists them.

    model, calls      the teacher, and the Calls that ask it
    reasons_in_reply  whether a thought is to be split off each answer
    An entry's keys are those of the requests that are still to be collected.
    """

    def __init__(
        self, traces: str, model: Model | None, calls: Calls, reasons_in_reply: bool = False
    ) -> None:
        self.file = Path(f"{traces}.batches.json")
        self.model = model
        self.calls = calls
        self.reasons_in_reply = reasons_in_reply
        self.entries = files.read_json(self.file) if self.file.is_file() else []

    def keys(self) -> set[str]:
        return {key for entry in self.entries for key in entry["keys"]}

    def refuse(self, keys: Iterable[str]) -> None:
        """ValueError if some of these are out: asked one by one too, they cost twice."""
        if out := self.keys() & set(keys):
            text = f"{len(out)} of these questions are out in batches: collect them with --batch"
            raise ValueError(f"{self.file}: {text}.")

    def most(self) -> float:
        """The most USD that the batches that are out may cost."""
        return sum(entry["most"] for entry in self.entries)

    def store(self) -> None:
        """Write the list, whole or not at all; an empty one is no file."""
        with files.atomic_write(self.file) as file:
            file.write(json.dumps(self.entries))
        if not self.entries:
            self.file.unlink()

    def add(self, keys: Iterable[str], request_of: Callable) -> list[dict]:
        """Plan batches of as many of these requests as --max-cost allows: their entries.
        request_of(key): the Request, and the USD that it may cost outside of a batch."""
        calls = self.calls
        entries = []
        room = 0  # bytes
        for key in keys:
            request, most = request_of(key)
            size = len(request.text) + 500
            if request.image:
                size += len(request.image[0]) * 4 / 3  # base64
            most *= BATCH_SHARE
            if calls.spent + calls.reserved + most > calls.limit:
                break
            if size > room or len(entries[-1]["keys"]) == BATCH_REQUESTS:
                name = f"nanocot-{key[:24]}"
                entries.append({"name": name, "keys": [], "most": 0.0, "before": None, "id": None})
                room = BATCH_BYTES[self.model.provider]
            entries[-1]["keys"].append(key)
            entries[-1]["most"] += most
            room -= size
            calls.reserved += most
        self.entries += entries
        return entries

    async def send(self, entry: dict, wanted: Collection[str], request_of: Callable) -> None:
        """Make a batch of those of its requests that are still wanted, unless it has an id, or an
        interrupted run made it already."""
        model = self.model
        api = APIS[model.provider]

        async def ask():
            listed = await api.list(model.client)
            mark = entry["name"] if model.provider == "gemini" else len(entry["keys"])
            if entry["before"] is not None:  # we were about to send it once
                for id in listed:
                    if listed[id] == mark and id not in entry["before"]:
                        return id
            entry["keys"] = [key for key in entry["keys"] if key in wanted]
            entry["before"] = list(listed)
            self.store()
            requests = {key: request_of(key)[0] for key in entry["keys"]}
            if id := await api.send(model.client, entry["name"], model.name, requests):
                return id
            raise Lost("the batch has no id")

        if entry["id"] is None:
            entry["id"] = await self.calls.call_with_retries(ask)
            self.store()

    async def collect(self, entry: dict, keys: Iterable[str]) -> tuple[dict, dict]:
        """Wait until a batch has ended: ({key: Reply}, {key: why there is none}) of these keys."""
        rows, ending = await self.ended(entry)
        self.calls.reserved -= entry["most"]
        messages = dict(rows)
        replies = {}
        failed = {}
        for key in keys:
            try:
                replies[key] = self.reply(messages.get(key, f"no reply in its batch, {ending}"))
            except (Failed, Lost, *UNREADABLE) as error:
                failed[key] = str(error)
        return replies, failed

    async def ended(self, entry: dict) -> tuple[list, str]:
        """Poll until a batch has ended: ([(key, message or text of an error)], how it ended)."""
        calls = self.calls
        delay = 1.0
        fetch = functools.partial(APIS[self.model.provider].fetch, self.model.client, entry["id"])
        not_fatal = 404  # the batch is gone, not the model
        fatal = tuple(status for status in FATAL if status != not_fatal)
        while True:
            try:
                ended = await calls.call_with_retries(fetch, fatal=fatal)
            except Failed as error:
                if providers.status_of(error.__cause__) != not_fatal:
                    raise
                return [], "the provider no longer has it"
            if ended is not None:
                return ended
            name = f"batch {entry['id']}"
            files.progress(name, calls.done, calls.total, calls.start, " (waiting)")
            delay = min(60, 1.5 * delay)
            await calls.pause(delay)

    def reply(self, message: object) -> Reply:
        """The Reply, paid for; Failed or Lost with why there is none."""
        if isinstance(message, str):
            raise Failed(message)
        reply = APIS[self.model.provider].parse(message)
        usd = cost(reply.usage, self.model.price, BATCH_SHARE)
        reply.usage |= {"cost": usd, "seconds": None, "tries": 1}
        self.calls.spent += usd or 0.0
        return split_reply(reply) if self.reasons_in_reply else reply

    def forget(self, entry: dict, keys: Collection[str]) -> None:
        """These keys are collected; an entry that has no others is dropped."""
        entry["keys"] = [key for key in entry["keys"] if key not in keys]
        self.entries = [entry for entry in self.entries if entry["keys"]]
        self.store()

    async def run(
        self,
        open_jobs: Callable[[], Jobs],
        unjudged: Callable,
        request_of: Callable,
        settle: Callable,
        records: dict,
    ) -> None:
        """Send what has no record, wait, settle the replies; then the next attempts likewise.

        open_jobs()                       the attempts to make now
        unjudged(key)                     its paid reply that waits for the judge, or None
        request_of(problem, attempt)      the Request, and the USD that it may cost
        settle(problem, attempt, reply)   judges a reply and writes its record into `records`
        """
        calls = self.calls
        calls.reserved = self.most()
        busy = True
        try:
            while busy and not calls.stop:
                busy = await self.one_round(open_jobs(), unjudged, request_of, settle, records)
        except Failed as error:
            calls.halt(f"a batch cannot be sent or fetched now: {error}")
        except Halt:
            return
        if self.entries and not calls.stop:
            text = "lists batches sent with other flags; those collect them."
            print(f"{self.file} {text}", file=sys.stderr)

    async def one_round(
        self, jobs: Jobs, unjudged: Callable, request_of: Callable, settle: Callable, records: dict
    ) -> bool:
        """One attempt at each question, or at as many as --max-cost allows; whether there was any.
        The parameters are those of `run`."""
        calls = self.calls

        def request(key):
            problem, attempt = jobs[key]
            return request_of(problem, attempt)

        replies = {key: unjudged(key) for key in jobs}
        waiting = {key: reply for key, reply in replies.items() if reply}
        out = self.keys()
        ours = [entry for entry in self.entries if jobs.keys() & entry["keys"]]
        ours += self.add((key for key in jobs if key not in out | waiting.keys()), request)
        if jobs and not ours and not waiting:
            calls.halt(f"{calls.money_left()}: too little for another request")
        await self.settle_all(jobs, waiting, settle)
        for entry in ours:
            await self.send(entry, jobs, request)
        for entry in ours:
            wanted = [key for key in entry["keys"] if key in jobs and key not in records]
            replies, failed = await self.collect(entry, wanted)
            calls.failed |= {jobs[key][0].id: why for key, why in failed.items()}
            calls.done += len(failed)
            settled = await self.settle_all(jobs, replies, settle)
            self.forget(entry, settled | failed.keys() | records.keys())
        return bool(ours or waiting)

    async def settle_all(self, jobs: Jobs, replies: dict[str, Reply], settle: Callable) -> set[str]:
        """Settle these jobs' replies; the keys of those settled before the run stopped."""
        settled = set()

        async def settle_one(key):
            problem, attempt = jobs[key]
            try:
                await settle(problem, attempt, replies[key])
            except Halt:
                return
            except (Failed, *UNREADABLE) as error:
                self.calls.failed[problem.id] = str(error)
            settled.add(key)
            self.calls.done += 1

        await self.calls.pool(replies, settle_one)
        return settled
