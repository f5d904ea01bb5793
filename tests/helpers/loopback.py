"""A teacher on 127.0.0.1 that costs nothing: it speaks the wire formats of anthropic 2.12.0 and
google-genai 3.4.0, answers by rule, keeps a log of its requests, and fails on demand.

A question has a tag in its text ("Q17"); `question(17)` makes one, and both sides compute its right
answer, so that no table is shared. The step that a request gets is decided by
    script  {tag: [step, ...]}: one step a request, then the default; {tag: step}: always. "*" is
            every tag, "judge Q17" the judge's requests, "batches" the making of batches, "polls"
            the looks at one ("lost": made, but the reply is lost). A step is a fault's name or a
            dict over the reply's fields (thought, text, stop, redacted).
    rate    this share of the other requests gets a fault of `faults`, the same ones with every
            run (a hash of seed, tag and count), but none after the `most`-th request of a tag.
Faults: a status ("500", "429", "429:2" with Retry-After: 2, "429:ms=40", "429:date=3", Gemini's
"429:delay=2"), stall (never answers), drip (a byte every 0.2 s), reset, cut (half a reply, then a
reset), short (half a stream, properly ended), event (an error in a stream), malformed, empty, html,
nothing (no candidate, no content block). Errors repeat the key they were sent, as some servers do.

As a process (`python loopback.py`) it prints its port, hands out its log at GET /log and
takes attributes at POST /configure. Left out: TLS, compression, and everything unused here.
"""

import asyncio
import hashlib
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from email.utils import formatdate

CHOICES = 3
THOUGHTS = (  # distinct in the sense of --diverse
    "Laid side by side in {tag}, option {letter} reaches furthest. The answer is ({letter}).",
    "I measure each thing of {tag} from its left end; one is long. So the answer is ({letter}).",
    "Two of the three that {tag} names end early and one is left: the answer is ({letter}).",
)
STOPS = {  # ours: (Anthropic's stop_reason, Gemini's finishReason)
    "end": ("end_turn", "STOP"),
    "length": ("max_tokens", "MAX_TOKENS"),
    "refused": ("refusal", "SAFETY"),
    "blocked": ("refusal", "SAFETY"),
    "recitation": ("refusal", "RECITATION"),
    "nothing": ("end_turn", "STOP"),
}


def share(*seed):
    """A number in [0, 1) that depends on `seed` and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8]) / 2**64


def gold(tag):
    return int(share("gold", tag) * CHOICES)


def question(number, **more):
    """A record of own-JSONL data whose right answer the server knows."""
    texts = [f"{thing} {number}" for thing in ("rope", "belt", "cord")]
    record = {"id": f"q{number}", "question": f"Q{number}: which of these is the longest?"}
    return record | {"choices": texts, "answer": gold(f"Q{number}")} | more


@dataclass
class Asked:
    """One request for one reply, whichever wire it came on."""

    wire: str
    text: str
    images: int
    schema: dict | None
    thinks: bool
    stream: bool
    params: dict

    @property
    def kind(self):
        return "judge" if self.schema else "ask"

    @property
    def tag(self):
        return ([""] + re.findall(r"\bQ\d+(?=:)", self.text))[-1]  # worked examples come first


def either(record, name, default=None):
    """record[name], spelled in snake_case or in camelCase."""
    camel = re.sub(r"_(.)", lambda m: m[1].upper(), name)
    return (record or {}).get(name, (record or {}).get(camel, default))


def read_anthropic(body):
    texts, images = [], 0
    for message in body["messages"]:
        blocks = message["content"]
        for block in [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks:
            texts.append(block.get("text", ""))
            images += block["type"] == "image"
    thinks = (body.get("thinking") or {}).get("display") == "summarized"  # else there is no text
    schema = ((body.get("output_config") or {}).get("format") or {}).get("schema")
    params = {key: value for key, value in body.items() if key != "messages"}
    text, stream = "\n".join(texts), bool(body.get("stream"))
    return Asked("anthropic", text, images, schema, thinks, stream, params)


def read_gemini(body, stream=False):
    parts = [part for turn in body["contents"] for part in turn["parts"]]
    text = "\n".join(part.get("text", "") for part in parts)
    images = sum(either(part, "inline_data") is not None for part in parts)
    config = either(body, "generation_config", {})
    schema = either(config, "response_json_schema") or either(config, "response_schema")
    thinks = bool(either(either(config, "thinking_config"), "include_thoughts"))
    return Asked("gemini", text, images, schema, thinks, stream, config)


def filled(schema, images, over):
    """An instance of a flat JSON schema: true, a text, null where it may be and nothing is seen."""
    values = {}
    for name, field in schema["properties"].items():
        value = "The reasoning says so." if field.get("type") == "string" else True
        values[name] = None if "anyOf" in field and not images else value
    return json.dumps(values | over)


# --- the two wire formats


def anthropic_message(reply, model):
    content = []
    if reply["thought"] is not None:
        content.append({"type": "thinking", "thinking": reply["thought"], "signature": "c2ln"})
    if reply["redacted"]:
        content.append({"type": "redacted_thinking", "data": "cmVkYWN0ZWQ="})
    if reply["text"] is not None:
        content.append({"type": "text", "text": reply["text"]})
    usage = {"input_tokens": reply["input"], "output_tokens": reply["output"] + reply["thinking"]}
    usage["output_tokens_details"] = {"thinking_tokens": reply["thinking"]}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": model}
    stop = {"stop_reason": STOPS[reply["stop"]][0], "stop_sequence": None}
    if stop["stop_reason"] == "refusal":
        stop["stop_details"] = {"type": "refusal", "category": "bio", "explanation": None}
    return head | {"content": content, "usage": usage} | stop


def anthropic_events(message):
    """The same message as server-sent events, each text in two pieces."""
    stop = {key: message[key] for key in message if key.startswith("stop_")}
    start = message | {"content": [], "stop_reason": None}
    start["usage"] = message["usage"] | {"output_tokens": 1}
    events = [{"type": "message_start", "message": start}]
    for index, block in enumerate(message["content"]):
        at = {"index": index}
        field = block["type"]  # which is also the name of the text's field
        text = block.get(field)
        empty = block if text is None else block | {field: ""}
        events.append({"type": "content_block_start", "content_block": empty} | at)
        half = len(text or "") // 2
        for piece in () if text is None else (text[:half], text[half:]):
            delta = {"type": f"{field}_delta", field: piece}
            events.append({"type": "content_block_delta", "delta": delta} | at)
        events.append({"type": "content_block_stop"} | at)
    events.append({"type": "message_delta", "delta": stop, "usage": message["usage"]})
    return [*events, {"type": "message_stop"}]


def gemini_parts(reply):
    parts = [{"text": reply["thought"], "thought": True}]
    parts += [{"text": reply["text"], "thoughtSignature": "c2ln"}]
    return [part for part in parts if part["text"] is not None]


def gemini_reply(reply, model, parts=None, last=True):
    """A whole reply; or the chunk of a stream that has these parts."""
    usage = {"promptTokenCount": reply["input"], "candidatesTokenCount": reply["output"]}
    usage |= {"thoughtsTokenCount": reply["thinking"], "totalTokenCount": sum(usage.values())}
    body = {"modelVersion": model, "responseId": "r1"} | ({"usageMetadata": usage} if last else {})
    if reply["stop"] == "blocked":
        return body | {"promptFeedback": {"blockReason": "SAFETY"}}
    if reply["stop"] == "nothing":
        return body
    parts = gemini_parts(reply) if parts is None else parts
    candidate = {"content": {"role": "model", "parts": parts}, "index": 0}
    candidate |= {"finishReason": STOPS[reply["stop"]][1]} if last else {}
    return body | {"candidates": [candidate]}


def gemini_events(reply, model):
    """The same reply as chunks: all but the last have a part each, the last says how it ended."""
    chunks = [gemini_reply(reply, model, [part], last=False) for part in gemini_parts(reply)]
    return [*chunks, gemini_reply(reply, model, [{"text": ""}])]


# --- the server


class Loopback:
    """Attributes may be changed while it runs; `log` holds a dict per request, oldest first."""

    def __init__(self, **attributes):
        vars(self).update(latency=0.0, think=True, seed=0, rate=0.0, most=3, faults=["500"])
        vars(self).update(script={}, polls=1, log=[], batches={}, counts={})
        vars(self).update(attributes)

    def reset(self, **attributes):
        self.__init__(port=self.port, loop=self.loop, **attributes)

    def start(self):
        """Serve from a thread of its own; returns the base url."""
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        opened = asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=256)
        server = asyncio.run_coroutine_threadsafe(opened, self.loop).result()
        self.port = server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{self.port}"

    def sent(self, tag=None, kind="ask"):
        """The log's requests for replies, of one question or of all."""
        return [e for e in self.log if e["kind"] == kind and tag in (None, e["tag"])]

    def count(self, kind, tag):
        """The number of this request among those of its question, from 1."""
        self.counts[kind, tag] = self.counts.get((kind, tag), 0) + 1
        return self.counts[kind, tag]

    def asked_for(self, asked, entry):
        """(fault or None, reply) for one request for a reply, which is noted in its entry."""
        count = self.count(asked.kind, asked.tag)
        step = self.step(asked.kind, asked.tag, count)
        fault = step if isinstance(step, str) else None
        over = {"stop": "nothing"} if step == "nothing" else {} if fault else step
        entry |= {"kind": asked.kind, "tag": asked.tag, "fault": fault, "images": asked.images}
        entry |= {"text": asked.text, "params": asked.params, "stream": asked.stream}
        return fault, self.reply(asked, count, over)

    def step(self, kind, tag, count):
        """What request number `count` (from 1) of a question gets: a fault's name or a dict."""
        for name in (tag, "*") if kind == "ask" else (f"judge {tag}", "judge *"):
            steps = self.script.get(name)
            if isinstance(steps, str | dict):
                return steps
            if steps and len(steps) >= count:
                return steps[count - 1]
        if count <= self.most and share(self.seed, "fault", kind, tag, count) < self.rate:
            return self.faults[int(share(self.seed, "which", kind, tag, count) * len(self.faults))]
        return {}

    def reply(self, asked, count, over):
        """The fields of a reply: thought, text, stop, redacted, and counts of tokens."""
        reply = {"thought": None, "stop": "end", "redacted": False}
        if asked.schema:
            reply["text"] = filled(asked.schema, asked.images, over.get("verdict", {}))
        else:
            letter = "ABC"[gold(asked.tag)]
            thought = THOUGHTS[count % len(THOUGHTS)].format(tag=asked.tag, letter=letter)
            reply["thought"] = thought if asked.thinks and self.think else None
            aloud = thought + "\n" if not asked.thinks and "step by step" in asked.text else ""
            reply["text"] = f"{aloud}The answer is ({letter})."
        reply |= {key: value for key, value in over.items() if key != "verdict"}
        if reply["stop"] in ("blocked", "nothing", "refused", "recitation"):
            reply |= {"thought": None, "text": None}
        sizes = {"input": asked.text, "output": reply["text"], "thinking": reply["thought"]}
        sizes = {key: len(text or "") // 4 for key, text in sizes.items()}
        return reply | sizes | {"input": sizes["input"] + 258 * asked.images}

    async def connection(self, reader, writer):
        try:
            keep = True
            while keep:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.strip().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                key = re.search(r"(?i)^(?:authorization: bearer|x-goog-api-key:) (.*)$", head, re.M)
                line = Line(self, reader, writer, key and key[1].strip())
                keep = await self.route(line, method, path, json.loads(body or b"{}"))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def route(self, line, method, path, body):
        model = path.partition("/models/")[2].partition(":")[0]
        if path == "/log":
            return await line.send(self.log)
        if path == "/configure":
            vars(self).update(body)
            return await line.send({})
        entry = {"kind": "other", "tag": "", "t": time.time(), "method": method, "path": path}
        self.log.append(entry | {"key": line.key is not None, "answered": False, "fault": None})
        if path == "/v1/messages":
            return await self.ask(line, read_anthropic(body), body["model"])
        if ":generateContent" in path or ":streamGenerateContent" in path:
            return await self.ask(line, read_gemini(body, ":stream" in path), model)
        if "batch" in path:
            return await self.batch(line, method, path, body, model)
        return await line.fault("404", "anthropic", [b""])

    async def ask(self, line, asked, model):
        """Answer one question, or fail at it."""
        entry = self.log[-1]
        fault, reply = self.asked_for(asked, entry)
        if asked.wire == "anthropic":
            whole = anthropic_message(reply, model)
            events = anthropic_events(whole) if asked.stream else [whole]
        else:
            events = gemini_events(reply, model) if asked.stream else [gemini_reply(reply, model)]
        pieces = [line.event(event) if asked.stream else json.dumps(event) for event in events]
        pieces = [piece.encode() for piece in pieces]
        if fault not in ("stall", "reset", "drip"):
            await asyncio.sleep(self.latency)
        try:
            if fault and fault != "nothing":
                return await line.fault(fault, asked.wire, pieces, asked.stream)
            entry["answered"] = fault is None  # and paid for, whether or not anybody still listens
            return await line.send(pieces, stream=asked.stream)
        finally:
            entry["end"] = time.time()

    async def batch(self, line, method, path, body, model):
        """Make, list, look at a batch, or hand out its results, in a shuffled order."""
        wire = "anthropic" if "/messages/" in path else "gemini"
        name = re.search(r"batches/(\w+)", path)
        if method == "POST" and name is None:
            return await self.make_batch(line, wire, body, model)
        if name is None:
            shown = [self.shown(b) for b in self.batches.values() if b["wire"] == wire]
            key = "data" if wire == "anthropic" else "operations"
            return await line.send({key: shown[::-1], "has_more": False})
        batch = self.batches.get(name[1])
        step = "404" if batch is None else self.step("ask", "polls", self.count("ask", "polls"))
        if isinstance(step, str):
            return await line.fault(step, wire, [b""])
        if path.endswith("/results"):
            lines = [json.dumps(result) for result in batch["results"]]
            return await line.send([("\n".join(lines) + "\n").encode()], "application/x-jsonl")
        batch["polls"] += 1
        return await line.send(self.shown(batch))

    async def make_batch(self, line, wire, body, model):
        number, results = len(self.batches) + 1, []
        step = self.step("ask", "batches", self.count("ask", "batches"))
        if isinstance(step, str) and step != "lost":
            return await line.fault(step, wire, [b""])
        if wire == "anthropic":
            items = [(i["custom_id"], i["params"], read_anthropic) for i in body["requests"]]
        else:
            inlined = either(either(body["batch"], "input_config")["requests"], "requests")
            items = [(i.get("metadata"), i["request"], read_gemini) for i in inlined]
        for mark, request, read in items:
            model = request.get("model", model)
            results.append(self.one_of_batch(line, mark, read(request), model))
        random.Random(self.seed).shuffle(results)
        name = either(body.get("batch"), "display_name", "")
        batch = {"id": f"b{number}", "wire": wire, "polls": 0, "results": results, "name": name}
        self.batches[batch["id"]] = batch
        if step == "lost":  # made, but the client never hears of it
            return await line.fault("reset", wire, [b""])
        return await line.send(self.shown(batch))

    def one_of_batch(self, line, mark, asked, model):
        entry = {"t": time.time(), "path": "in a batch"}
        fault, reply = self.asked_for(asked, entry)
        self.log.append(entry | {"answered": not fault})
        text = f"{fault} happened to the key {line.key}"
        if asked.wire == "gemini":
            error = {"code": 13, "message": text}
            body = {"error": error} if fault else {"response": gemini_reply(reply, model)}
            return body | {"metadata": mark}
        error = {"type": "error", "error": {"type": "api_error", "message": text}}
        result = {"type": "succeeded", "message": anthropic_message(reply, model)}
        if fault:
            lost = fault in ("expired", "canceled")
            result = {"type": fault} if lost else {"type": "errored", "error": error}
        return {"custom_id": mark, "result": result}

    def shown(self, batch):
        """A batch as its provider describes it; it has ended after `polls` looks."""
        done, now = batch["polls"] >= self.polls, "2026-11-22T00:00:00Z"
        if batch["wire"] == "gemini":
            state = "SUCCEEDED" if done else "RUNNING"
            meta = {"state": f"BATCH_STATE_{state}", "displayName": batch["name"]}
            if done:
                meta["output"] = {"inlinedResponses": {"inlinedResponses": batch["results"]}}
            return {"name": f"batches/{batch['id']}", "metadata": meta, "done": done}
        kinds = [result["result"]["type"] for result in batch["results"]]
        names = ("succeeded", "errored", "canceled", "expired")
        counts = {name: kinds.count(name) if done else 0 for name in names}
        url = f"http://127.0.0.1:{self.port}/v1/messages/batches/{batch['id']}/results"
        shown = {"id": batch["id"], "type": "message_batch", "created_at": now, "expires_at": now}
        shown |= {"processing_status": "ended" if done else "in_progress"}
        waiting = {"processing": 0 if done else len(kinds)}
        return shown | {"request_counts": counts | waiting, "results_url": url if done else None}


class Line:
    """One request's connection: the ways to answer it, and not to."""

    def __init__(self, server, reader, writer, key):
        self.server, self.reader, self.writer, self.key = server, reader, writer, key

    @staticmethod
    def event(event):
        name = f"event: {event['type']}\n" if "type" in event else ""
        return f"{name}data: {json.dumps(event)}\n\n"

    async def send(self, body, kind="application/json", stream=False, status=200, more=""):
        """Pieces of bytes, or anything JSON; returns whether the connection stays open."""
        is_bytes = isinstance(body, list) and all(isinstance(piece, bytes) for piece in body)
        pieces = body if is_bytes else [json.dumps(body).encode()]
        kind = "text/event-stream" if stream else kind
        size = f"Content-Length: {sum(map(len, pieces))}"
        size = "Transfer-Encoding: chunked" if stream else size
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: {kind}\r\n{size}\r\n{more}\r\n"
        if stream:
            pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
        self.writer.write(b"".join([head.encode(), *pieces]))
        await self.writer.drain()
        return True

    async def fault(self, name, wire, pieces, stream=False):
        name, _, option = name.partition(":")
        half = b"".join(pieces)[: sum(map(len, pieces)) // 2]
        if name.isdecimal():
            return await self.status(int(name), wire, option)
        some = pieces[: len(pieces) // 2]
        failed = self.event({"type": "error", "error": {"type": "overloaded_error"}})
        failed = failed if wire == "anthropic" else 'data: {"error": {"code": 503}}\n\n'
        bodies = {
            "malformed": [b'data: {"candidates": [{"conte\n\n' if stream else half],
            "event": [*some, failed.encode()],  # the status said 200, then it went wrong
            "short": some if stream else [half],
            "empty": [],
        }
        if name in bodies:
            return await self.send(bodies[name], stream=stream)
        if name == "html":
            return await self.send([b"<html>Sign in to the network</html>"], "text/html")
        if name in ("cut", "drip"):
            self.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n")
            kind = b"text/event-stream" if stream else b"application/json"
            self.writer.write(b"Content-Type: %b\r\n\r\n" % kind)
        if name == "cut":
            self.writer.write(half)
            await self.writer.drain()
            await asyncio.sleep(0.02)  # a reset at once would overtake the bytes
        while name == "drip" and not self.reader.at_eof():
            self.writer.write(b" ")
            await self.writer.drain()
            await asyncio.sleep(0.2)
        if name == "stall":
            await self.reader.read()
            return False
        linger = struct.pack("ii", 1, 0)  # close with RST
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()
        return False

    async def status(self, status, wire, option):
        """An error in the provider's form; its message repeats the key."""
        message = f"Status {status} for the key {self.key}, as asked for."
        error = {"type": "error", "error": {"type": "some_error", "message": message}}
        if wire == "gemini":
            error = {"error": {"code": status, "message": message, "status": "SOME_ERROR"}}
        form, _, value = option.rpartition("=")
        more = f"Retry-After: {value}\r\n" if value else ""
        if form == "delay":  # in Gemini's form
            error["error"]["details"] = [{"@type": "RetryInfo", "retryDelay": f"{value}s"}]
            more = ""
        elif form == "ms":
            more = f"retry-after-ms: {value}\r\n"
        elif form == "date":
            more = f"Retry-After: {formatdate(time.time() + float(value), usegmt=True)}\r\n"
        return await self.send(error, status=status, more=more)


if __name__ == "__main__":
    server = Loopback()
    print(server.start().rpartition(":")[2], flush=True)
    sys.stdin.read()  # lives as long as its parent holds the pipe
