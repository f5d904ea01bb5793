"""The providers of teachers and judges: Gemini, Anthropic, and the demo's own, which is offline.

How each is asked (`ASK`: requests, replies, pictures as both take them), what it charges (PRICES),
which of its faults are worth another try (`retry_after`) and what they are called (`in_words`). A
provider is asked by one coroutine, (client, model, text, image, schema, how) -> Reply. image is
(bytes, media type) or None; with a schema the answer is JSON of that form; how has max_output,
thoughts (ask for them), and where given effort, thinking_budget and seed. One without an SDK has an
httpx2.AsyncClient; README.md ("How to hack it") adds one to ASK and TEACHERS.

The SDKs (anthropic, google-genai) are imported here only, where they are first needed; keys and
base urls come from the environment variables that they define.

Left out on purpose: other providers, tools, conversations, prompt caching.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import math
import os
import random
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from PIL import Image

from demo import scenes
from support import files
from support.dataset import images as pictures

TEACHERS = {"gemini": "gemini-3.8-flash", "anthropic": "claude-opus-5-5", "demo": ""}
JUDGES = {"gemini": "gemini-3.5-flash-lite", "anthropic": "claude-haiku-5-5"}
JUDGES |= {"rule": "", "demo": ""}
PRICES_OF = "2026-10"  # platform.claude.com/docs, Models; ai.google.dev/gemini-api/docs/pricing
PRICES = {  # model: USD per million tokens (input, output), thoughts are output; a batch is half
    "claude-fable-5-2": (8, 40),
    "claude-opus-5-5": (4, 20),
    "claude-opus-5": (5, 25),
    "claude-sonnet-5-5": (2, 10),
    "claude-sonnet-5": (2, 10),
    "claude-haiku-5-5": (0.1, 0.5),  # prompts up to 100,000 tokens
    "claude-haiku-4-5": (1, 5),
    "gemini-3.8-flash": (0.75, 3.75),  # until 2026-12-31, then 1.5 and 7.5
    "gemini-3.5-flash": (1.5, 9),
    "gemini-3.5-flash-lite": (0.3, 2.5),
    "gemini-3.1-pro-preview": (2, 12),  # prompts up to 200,000 tokens
}

KEYS = {"gemini": ("GOOGLE_API_KEY", "GEMINI_API_KEY")}
KEYS["anthropic"] = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
PACKAGES = {"gemini": ("google-genai", 3), "anthropic": ("anthropic", 2)}  # oldest major version
AGAIN = (200, 408, 409, 425, 429)  # worth another try, as is 5xx; 200: an error inside a stream
FATAL = (401, 402, 403, 404)  # the key, the bill or the model's name: the same for all questions
LONGEST_WAIT = 60
NETWORK = ("anthropic", "httpx2", "httpcore2", "httpx", "httpcore", "aiohttp")
UNREADABLE = (ValueError, TypeError, AttributeError, AssertionError, LookupError, RuntimeError)


@dataclass
class Reply:
    """What a teacher said. stop is "end", "length", "blocked" or "refused", why the provider's
    word for it; usage has input, output and thought tokens, thoughts counted in output too."""

    thought: str
    answer: str
    stop: str
    usage: dict
    why: str = ""


@dataclass
class Model:
    """A teacher or judge: its provider, name, USD per million tokens (None: unknown), client."""

    provider: str
    name: str
    price: tuple | None = None
    client: object = None

    @property
    def spec(self):
        return f"{self.provider}:{self.name}" if self.name else self.provider


class Lost(Exception):
    """A reply that cannot be read, or only in part: ask again. usage: what it cost, if known."""

    def __init__(self, text, usage=None):
        super().__init__(text)
        self.usage = usage


class Failed(Exception):
    """This question cannot be asked; the others can."""


def hide(text):
    """The text without the values of the keys in the environment."""
    for name in (name for names in KEYS.values() for name in names):
        key = os.environ.get(name, "")
        text = text.replace(key, f"[{name}]") if len(key) >= 6 else text
    return text


def parse_spec(spec, defaults, price=None):
    """A Model for "anthropic:MODEL", "anthropic" (the default model), "demo", "rule"."""
    provider, _, name = spec.partition(":")
    if provider not in defaults or (name and not defaults[provider]):
        known = ", ".join(f"{p}:MODEL" if m else p for p, m in defaults.items())
        raise ValueError(f"{spec!r} is none of {known}.")
    name = name or defaults[provider]
    price = tuple(price) if price else PRICES.get(name) if name else (0, 0)
    return Model(provider, name, price)


def connect(provider, timeout, opened):
    """An async client of the provider's SDK, with the SDK's own retries off, or of plain HTTP for
    one that has none in PACKAGES; closed with `opened`, an AsyncExitStack."""
    if provider in PACKAGES:
        check_package(provider)
    if provider == "anthropic":
        import anthropic

        client = anthropic.AsyncAnthropic(max_retries=0, timeout=timeout)
        opened.push_async_callback(client.close)
        return client
    import httpx2

    web = httpx2.AsyncClient(timeout=timeout, limits=httpx2.Limits(max_connections=None))
    opened.push_async_callback(web.aclose)
    if provider not in PACKAGES:
        return web
    from google import genai

    options = genai.types.HttpOptions(timeout=round(timeout * 1000), httpx_async_client=web)
    return genai.Client(vertexai=False, http_options=options)


def check_package(provider):
    """ValueError without the provider's SDK, or without a key for it."""
    package, oldest = PACKAGES[provider]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "0 (not installed)"
    if int(version.partition(".")[0]) < oldest:
        raise ValueError(f"{package} is {version}: run `pip install -U '{package}>={oldest}'`.")
    if not any(os.environ.get(name) for name in KEYS[provider]):
        raise ValueError(f"No key for {provider}: put it into the variable {KEYS[provider][0]}.")


# --- how each is asked


def anthropic_request(model, text, image, schema, how):
    """The arguments of messages.stream, and of a request in a batch."""
    content = [{"type": "text", "text": text}]
    if image:
        source = {"type": "base64", "media_type": image[1]}
        source["data"] = base64.b64encode(image[0]).decode()
        content.insert(0, {"type": "image", "source": source})
    request = {"model": model, "max_tokens": how["max_output"]}
    request["messages"] = [{"role": "user", "content": content}]
    output = {"effort": how["effort"]} if how.get("effort") else {}
    if schema:
        output["format"] = {"type": "json_schema", "schema": schema}
    if how["thoughts"]:  # their text is left out of the reply unless "summarized" is asked for
        budget = how.get("thinking_budget")
        mode = {"type": "enabled", "budget_tokens": budget} if budget else {"type": "adaptive"}
        request["thinking"] = mode | {"display": "summarized"}
    return request | ({"output_config": output} if output else {})


def anthropic_reply(message):
    """The Reply in a whole message, streamed or of a batch."""
    parts = {"thinking": [], "text": []}
    for block in message.content:
        if block.type in parts:
            parts[block.type].append(getattr(block, block.type))
    used, reason = message.usage, message.stop_reason
    details = used.output_tokens_details
    cached = (used.cache_creation_input_tokens or 0) + (used.cache_read_input_tokens or 0)
    usage = {"input": used.input_tokens + cached, "output": used.output_tokens}
    usage["thought"] = (details and details.thinking_tokens) or 0
    cut = dict.fromkeys(("max_tokens", "model_context_window_exceeded"), "length")
    stop = (cut | {"refusal": "refused"}).get(reason, "end") if reason else None
    return whole_reply("\n\n".join(parts["thinking"]), "".join(parts["text"]), stop, usage, reason)


async def ask_anthropic(client, model, text, image, schema, how):
    request = anthropic_request(model, text, image, schema, how)
    async with client.messages.stream(**request) as stream:
        return anthropic_reply(await stream.get_final_message())


def gemini_request(model, text, image, schema, how):
    """The arguments of generate_content_stream, and of a request in a batch."""
    from google.genai import types

    contents = [text]
    if image:
        contents.insert(0, types.Part.from_bytes(data=image[0], mime_type=image[1]))
    config = {"max_output_tokens": how["max_output"], "seed": how.get("seed")}
    if schema:
        config |= {"response_mime_type": "application/json", "response_json_schema": schema}
    if how["thoughts"]:
        config["thinking_config"] = {"include_thoughts": True}
        if how.get("thinking_budget") is not None:
            config["thinking_config"]["thinking_budget"] = how["thinking_budget"]
        if how.get("effort"):
            config["thinking_config"]["thinking_level"] = how["effort"].upper()
    config = types.GenerateContentConfig(**config)
    return {"model": model, "contents": contents, "config": config}


def gemini_reply(chunks):
    """The Reply in the chunks of a stream, or in the one response of a batch."""
    said, stop, why, used = {True: [], False: []}, None, "", None
    for chunk in chunks:
        used = chunk.usage_metadata or used
        if chunk.prompt_feedback and chunk.prompt_feedback.block_reason:
            stop, why = "blocked", chunk.prompt_feedback.block_reason.name
        for candidate in (chunk.candidates or [])[:1]:
            for part in (candidate.content and candidate.content.parts) or []:
                said[bool(part.thought)].append(part.text or "")
            if candidate.finish_reason:
                why = candidate.finish_reason.name
                stop = {"STOP": "end", "MAX_TOKENS": "length"}.get(why, "blocked")
    usage = {"input": (used and used.prompt_token_count) or 0}
    usage["thought"] = (used and used.thoughts_token_count) or 0
    usage["output"] = ((used and used.candidates_token_count) or 0) + usage["thought"]
    return whole_reply("".join(said[True]), "".join(said[False]), stop, usage, why)


async def ask_gemini(client, model, text, image, schema, how):
    request = gemini_request(model, text, image, schema, how)
    stream = await client.aio.models.generate_content_stream(**request)
    return gemini_reply([chunk async for chunk in stream])


def whole_reply(thought, answer, stop, usage, why):
    """The Reply. One without a reason to stop was cut. One that ends normally and says nothing, as
    one with neither candidates nor a block reason, is taken for a passing fault too."""
    if stop is None:
        raise Lost("the reply was cut")
    if stop == "end" and not (thought.strip() or answer.strip()):
        raise Lost("the reply says nothing", usage)
    thought, answer = (x.encode("utf-8", "replace").decode().strip() for x in (thought, answer))
    return Reply(thought, answer, stop, usage, str(why))  # JSON may hold half a surrogate pair


@functools.cache
def demo_scenes():
    """The demo's (problems, facts) by id, as demo.teacher takes them."""
    folder = scenes.demo_folder()
    return files.read_json(folder / "problems.json"), files.read_json(folder / "scenes.json")


def ask_demo(problem, seed, attempt):
    """What demo.teacher says; the first attempt is the one in demo.teacher.traces."""
    from demo import teacher

    problems, facts = demo_scenes()
    again = f"/{attempt}" if attempt else ""
    told = teacher.think(problems[problem.id], facts[problem.id], f"{seed}/{problem.id}{again}")
    usage = {"input": 0, "output": 0, "thought": 0, "cost": 0.0, "seconds": 0.0, "tries": 1}
    return Reply(told["thought"], told["answer"], "end", usage, "")


def demo_verdict(problem, thought, answer):
    """What demo.teacher's judge says."""
    from demo import teacher

    problems, facts = demo_scenes()
    return teacher.judge(problems[problem.id], facts[problem.id], thought, answer)


ASK = {"gemini": ask_gemini, "anthropic": ask_anthropic}


# --- faults


def status_of(error):
    """The HTTP status of an SDK's error, or of plain HTTP's, or None."""
    plain = getattr(getattr(error, "response", None), "status_code", None)
    status = getattr(error, "status_code", None) or getattr(error, "code", None) or plain
    return status if isinstance(status, int) else None


def retry_after(error, tries):
    """Seconds to wait before asking again after the `tries`-th failure, or None: not worth it.

    The only place that decides this. Timeouts, lost connections, replies that cannot be read, 408,
    409, 425, 429 and 5xx are asked again: exponential back-off with jitter, or what the server says
    (Retry-After in seconds or as a date, retry-after-ms, Gemini's retryDelay), at most a minute.
    """
    status = status_of(error)
    if status is None:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, Lost | TimeoutError | ConnectionError) and library not in NETWORK:
            return None
    elif status not in AGAIN and status < 500:
        return None
    told = told_to_wait(error)
    if told is not None:
        return min(LONGEST_WAIT, told * random.uniform(1, 1.1))
    return min(LONGEST_WAIT, 0.5 * 2 ** (tries - 1)) * random.uniform(0.5, 1)


def told_to_wait(error):
    """The seconds a server asks for, or None."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    delays = [headers.get("retry-after-ms", "") + "ms", headers.get("retry-after", "")]
    delays += re.findall(r"'retryDelay': '([\d.]+)s'", str(getattr(error, "details", "")))
    for delay in delays:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number, scale = (delay[:-2], 1000) if delay.endswith("ms") else (delay, 1)
            if re.match(r"[A-Za-z]{3}, ", delay):
                number = parsedate_to_datetime(delay).timestamp() - time.time()
            if math.isfinite(seconds := float(number) / scale):
                return max(0.0, seconds)
    return None


def in_words(error):
    """An error of an SDK as one short line without keys."""
    if isinstance(error, TimeoutError):
        return "no reply in time (--timeout)"
    if isinstance(error, Lost):
        return hide(str(error))[:300]
    text = getattr(error, "api_message", None) or getattr(error, "message", None)
    text = text or getattr(getattr(error, "response", None), "text", None) or str(error)
    return hide(f"{status_of(error) or type(error).__name__}: {' '.join(text.split())}")[:300]


# --- pictures

SENT = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # both providers take them
SENT_BYTES = 3_900_000  # 5 MB in base64 is Anthropic's limit, and so is the side in pixels
SENT_SIDE, SMALLER = 8000, 2048


def picture(problem):
    """(bytes, media type) of the problem's picture, or None. The file's own bytes where they can be
    sent; else as PNG, no larger than what is accepted."""
    if problem.image is None:
        return None
    with contextlib.suppress(Exception):  # what is wrong with it, open_image says below
        body = files.regular_file(problem.image).read_bytes()
        with Image.open(io.BytesIO(body), formats=pictures.FORMATS) as image:
            fits = len(body) <= SENT_BYTES and max(image.size) <= SENT_SIDE
            upright = (
                image.getexif().get(0x0112, 1) == 1
            )  # the student's is, see pictures.open_image
            if fits and upright and image.format in SENT:
                return body, SENT[image.format]
    try:
        image = pictures.open_image(problem.image)
    except (OSError, ValueError) as error:
        raise Failed(str(error)) from None
    if max(image.size) > SENT_SIDE:
        image.thumbnail((SMALLER, SMALLER))
    body = encoded(image, "PNG")
    if len(body) > SENT_BYTES:
        image.thumbnail((SMALLER, SMALLER))
        return encoded(image, "JPEG"), "image/jpeg"
    return body, "image/png"


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()


@functools.cache
def seen(path):
    """(sha256 of a picture's file, (width, height)); (None, None) without one."""
    if path is None:
        return None, None
    try:
        body = files.regular_file(path).read_bytes()
        with Image.open(io.BytesIO(body), formats=pictures.FORMATS) as image:
            return hashlib.sha256(body).hexdigest(), image.size
    except Exception as error:  # PIL's can be almost anything
        why = getattr(error, "strerror", None) or "it is no picture"
        raise Failed(f"The image {path} cannot be read ({why}).") from None
