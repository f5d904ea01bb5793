"""The providers' batch APIs: half the price, within a day.

OUT.batches.json lists what is out: name, keys, most (USD), id, before. A batch is written there
before it is sent, with the ids that the provider lists then, and again when its id is known. After
a crash between the two it is looked for, by name (Gemini) or as one of this size that was not there
before (Anthropic has no names), and sent again only if it is not found.

A request is known here by its key alone: what it asks comes from teacher.py's `request_of`, and
teacher.py makes of the replies what it makes of all. Left out on purpose: batches for the judge.
"""

import functools
import json
from pathlib import Path

from support import files
from support.teachers.calls import cost
from support.teachers.providers import (
    FATAL,
    UNREADABLE,
    Failed,
    Lost,
    anthropic_reply,
    anthropic_request,
    gemini_reply,
    gemini_request,
    hide,
    status_of,
)

BATCH_BYTES = {"gemini": 14e6, "anthropic": 150e6}  # the limits are 20 and 256 MB
BATCH_REQUESTS = 10_000
BATCH_SHARE = 0.5  # of the price

# --- what each provider calls it


async def anthropic_batches(client):
    """{id: number of requests} of the newest batches."""
    newest = (await client.messages.batches.list(limit=100)).data
    return {batch.id: sum(batch.request_counts.to_dict().values()) for batch in newest}


async def gemini_batches(client):
    """{id: display name} of the newest batches."""
    newest = (await client.aio.batches.list(config={"page_size": 100})).page
    return {batch.name: batch.display_name for batch in newest}


async def anthropic_send(client, name, model, requests):
    """The id of a new batch of {key: request}; Anthropic's have no names."""
    sent = []
    for mark, request in requests.items():
        sent.append({"custom_id": mark, "params": anthropic_request(model, *request)})
    return (await client.messages.batches.create(requests=sent)).id


async def gemini_send(client, name, model, requests):
    """The id of a new batch of {key: request}, displayed under this name."""
    from google.genai import types

    sent = []
    for mark, request in requests.items():
        request = gemini_request(model, *request)
        del request["model"]
        sent.append(types.InlinedRequest(**request, metadata={"key": mark}))
    job = await client.aio.batches.create(model=model, src=sent, config={"display_name": name})
    return job.name


async def anthropic_results(client, id):
    """None while it runs, else ([(key, message or text of an error)], how it ended)."""
    if (await client.messages.batches.retrieve(id)).processing_status != "ended":
        return None
    rows = []
    async for row in await client.messages.batches.results(id):
        good = row.result.type == "succeeded"
        said = row.result.message if good else hide(f"{row.result.to_dict()}")[:200]
        rows.append((row.custom_id, said))
    return rows, "ended"


async def gemini_results(client, id):
    """As `anthropic_results`; a message is a list of one response."""
    job = await client.aio.batches.get(name=id)
    if not job.done:
        return None
    rows = []
    for row in (job.dest and job.dest.inlined_responses) or []:
        said = [row.response] if row.response else hide(f"{row.error}")[:200]
        rows.append(((row.metadata or {}).get("key"), said))
    return rows, hide(f"{job.state and job.state.name} {job.error or ''}".strip())


BATCH = {  # what is there, send, what came of it, the Reply in it
    "anthropic": (anthropic_batches, anthropic_send, anthropic_results, anthropic_reply),
    "gemini": (gemini_batches, gemini_send, gemini_results, gemini_reply),
}


# --- sent once, collected once


class Batches:
    """The batches of a trace file that are out, in `entries`, as OUT.batches.json lists them.

    model, calls  whose batches they are, and the Calls that ask for them
    An entry's keys are those of the requests that are still to be collected.
    """

    def __init__(self, traces, model, calls):
        self.file, self.model, self.calls = Path(f"{traces}.batches.json"), model, calls
        self.entries = files.read_json(self.file) if self.file.is_file() else []

    def keys(self):
        return {key for entry in self.entries for key in entry["keys"]}

    def refuse(self, keys):
        """ValueError if some of these are out: asked one by one too, they cost twice."""
        if sent := self.keys() & set(keys):
            text = f"{len(sent)} of these questions are out in batches: collect them with --batch"
            raise ValueError(f"{self.file}: {text}.")

    def most(self):
        """USD that what is out may cost."""
        return sum(entry["most"] for entry in self.entries)

    def store(self):
        """Write the list, whole or not at all; an empty one is no file."""
        with files.atomic_write(self.file) as file:
            file.write(json.dumps(self.entries))
        if not self.entries:
            self.file.unlink()

    def add(self, keys, request_of):
        """Plan batches of as many of these requests as --max-cost allows: their entries.
        request_of(key): the request, and the USD that it may cost outside of a batch."""
        calls, entries, room = self.calls, [], 0
        for key in keys:
            (text, image, *_), most = request_of(key)
            size = len(text) + (len(image[0]) * 4 / 3 if image else 0) + 500
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

    async def send(self, entry, wanted, request_of):
        """Make a batch of those of its requests that are still wanted, unless it has an id, or an
        interrupted run made it already."""
        model = self.model
        listed, make, *_ = BATCH[model.provider]

        async def ask():
            there = await listed(model.client)
            mark = entry["name"] if model.provider == "gemini" else len(entry["keys"])
            for id in there if entry["before"] is not None else ():
                if there[id] == mark and id not in entry["before"]:
                    return id
            entry["keys"] = [key for key in entry["keys"] if key in wanted]
            entry["before"] = list(there)
            self.store()
            requests = {key: request_of(key)[0] for key in entry["keys"]}
            if id := await make(model.client, entry["name"], model.name, requests):
                return id
            raise Lost("the batch has no id")

        if entry["id"] is None:
            entry["id"] = await self.calls.insist(ask)
            self.store()

    async def collect(self, entry, keys):
        """Wait until a batch has ended: ({key: Reply}, {key: why there is none}) of these keys."""
        rows, how = await self.ended(entry)
        self.calls.reserved -= entry["most"]
        said, replies, failed = dict(rows), {}, {}
        for key in keys:
            try:
                replies[key] = self.reply(said.get(key, f"no reply in its batch, {how}"))
            except (Failed, Lost, *UNREADABLE) as error:
                failed[key] = str(error)
        return replies, failed

    async def ended(self, entry):
        """Poll until a batch has ended: ([(key, what came back)], how it ended)."""
        calls, delay, ended = self.calls, 1.0, None
        _, _, results, _ = BATCH[self.model.provider]
        ask = functools.partial(results, self.model.client, entry["id"])
        while ended is None:
            try:
                ended = await calls.insist(ask, fatal=FATAL[:-1])
            except Failed as error:
                if status_of(error.__cause__) != 404:
                    raise
                return [], "the provider has it no longer"
            if ended is None:
                name = f"batch {entry['id']}"
                files.progress(name, calls.done, calls.total, calls.start, " (waiting)")
                await calls.pause(delay := min(60, 1.5 * delay))
        return ended

    def reply(self, said):
        """The Reply, paid for; Failed or Lost with why there is none."""
        if isinstance(said, str):
            raise Failed(said)
        *_, parse = BATCH[self.model.provider]
        reply = parse(said)
        usd = cost(reply.usage, self.model.price, BATCH_SHARE)
        reply.usage |= {"cost": usd, "seconds": None, "tries": 1}
        self.calls.spent += usd or 0.0
        return reply

    def forget(self, entry, keys):
        """These keys are collected; an entry that has no others is out no longer."""
        entry["keys"] = [key for key in entry["keys"] if key not in keys]
        self.entries = [entry for entry in self.entries if entry["keys"]]
        self.store()
