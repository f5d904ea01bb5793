"""The providers of teachers and judges: Gemini, Anthropic, and the demo's own, which is offline.

Here: requests and replies in one form for all; one coroutine a provider that asks, (client, model
name, Request) -> Reply, in `ASK`; prices; which failures are worth another try (`retry_after`);
images as both accept them. The SDKs (anthropic, google-genai) are imported in this file only, when
they are first needed; keys and base URLs come from the environment variables that they define.
"""

import base64
import contextlib
import functools
import importlib.metadata
import io
import math
import os
import random
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from PIL import Image

import data
from demo import scenes
from support import files
from support.dataset import images

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

KEYS = {"gemini": ("GOOGLE_API_KEY", "GEMINI_API_KEY")}  # variables of the environment
KEYS["anthropic"] = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
PACKAGES = {"gemini": ("google-genai", 3), "anthropic": ("anthropic", 2)}  # oldest major version
RETRIED = (200, 408, 409, 425, 429)  # as is 5xx; 200: an error inside a stream
FATAL = (401, 402, 403, 404)  # the key, the bill or the model's name: the same for all questions
LONGEST_WAIT = 60  # seconds
NETWORK = ("anthropic", "httpx2", "httpcore2", "httpx", "httpcore", "aiohttp")
# What the SDKs raise on JSON of a form that they do not expect.
UNREADABLE = (ValueError, TypeError, AttributeError, AssertionError, LookupError, RuntimeError)


@dataclass(frozen=True)
class Options:
    """The parameters of a request, in the words of neither provider."""

    max_output: int  # most tokens of the reply, thoughts included
    thoughts: bool  # whether the model's thoughts are asked for
    effort: str | None = None
    thinking_budget: int | None = None  # tokens
    seed: int | None = None  # Anthropic has none

    def chosen(self) -> dict:
        """Those that are set: a part of a record's key, so a new option changes no old key."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Request:
    """One question. With a schema the answer is JSON of that form."""

    text: str
    image: tuple[bytes, str] | None  # the file's bytes, media type
    options: Options
    schema: dict | None = None


@dataclass
class Reply:
    """stop is "end", "length", "blocked" or "refused", why the provider's word for it; usage has
    input, output and thought tokens, thoughts counted in output too."""

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
    price: tuple[float, float] | None = None
    client: object = None

    @property
    def spec(self) -> str:
        return f"{self.provider}:{self.name}" if self.name else self.provider


class Lost(Exception):
    """A reply that is incomplete or cannot be read: ask again. usage: what it cost, if known."""

    def __init__(self, message: str, usage: dict | None = None) -> None:
        super().__init__(message)
        self.usage = usage


class Failed(Exception):
    """This question cannot be asked; the others can."""


def hide(text: str) -> str:
    """The text without the values of the keys in the environment."""
    for name in sum(KEYS.values(), ()):
        key = os.environ.get(name, "")
        if len(key) >= 6:  # a shorter one is no key, and may be part of any word
            text = text.replace(key, f"[{name}]")
    return text


def parse_spec(spec: str, defaults: dict, price: Iterable[float] | None = None) -> Model:
    """A Model for "anthropic:MODEL", "anthropic" (the default model), "demo", "rule"; ValueError
    for a provider that is not among the `defaults`, TEACHERS or JUDGES."""
    provider, _, name = spec.partition(":")
    if provider not in defaults or (name and not defaults[provider]):
        known = ", ".join(f"{p}:MODEL" if model else p for p, model in defaults.items())
        raise ValueError(f"{spec!r} is not one of {known}.")
    name = name or defaults[provider]
    if price:
        return Model(provider, name, tuple(price))
    return Model(provider, name, PRICES.get(name) if name else (0, 0))


def connect(provider: str, timeout: float, opened: contextlib.AsyncExitStack) -> object:
    """An async client of the SDK, with its own retries off, or of plain HTTP for a provider that is
    not in PACKAGES; closed with `opened`. ValueError without SDK, usable key or proxy."""
    if provider in PACKAGES:
        check_package(provider)
        check_keys(provider)
    import httpx2

    try:  # for Anthropic too, whose client prints a traceback at a proxy that it cannot use
        web = httpx2.AsyncClient(timeout=timeout, limits=httpx2.Limits(max_connections=None))
    except ImportError:
        text = "ALL_PROXY (or HTTPS_PROXY) names a SOCKS proxy: unset it, or `pip install socksio`"
        raise ValueError(f"{text}.") from None
    opened.push_async_callback(web.aclose)
    if provider == "anthropic":
        import anthropic

        client = anthropic.AsyncAnthropic(max_retries=0, timeout=timeout)
        opened.push_async_callback(client.close)
        return client
    if provider == "gemini":
        from google import genai

        options = genai.types.HttpOptions(timeout=round(timeout * 1000), httpx_async_client=web)
        return genai.Client(vertexai=False, http_options=options)
    return web


def check_package(provider: str) -> None:
    """ValueError without the provider's SDK, or with one that is too old."""
    package, oldest = PACKAGES[provider]
    version = "0 (not installed)"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(package)
    if int(version.partition(".")[0]) < oldest:
        raise ValueError(f"{package} is {version}: run `pip install -U '{package}>={oldest}'`.")


def check_keys(provider: str) -> None:
    """ValueError without a key, or with one that nobody can have issued, which a client would try
    again and again as a fault of the network."""
    keys = {name: os.environ[name] for name in KEYS[provider] if os.environ.get(name)}
    if not keys:
        raise ValueError(f"No key for {provider}: put it into the variable {KEYS[provider][0]}.")
    for name, key in keys.items():
        if wrong := re.search(r"[^!-~]|[\"'`]", key):
            fault = f"the character {wrong[0]!r}"
            raise ValueError(f"The variable {name} contains {fault}: set it to the key alone.")


# --- one coroutine for each provider


def anthropic_request(model: str, request: Request) -> dict:
    """The arguments of messages.stream, and of a request in a batch."""
    options = request.options
    content = [{"type": "text", "text": request.text}]
    if request.image:
        body, media_type = request.image
        source = {"type": "base64", "media_type": media_type}
        source["data"] = base64.b64encode(body).decode()
        content.insert(0, {"type": "image", "source": source})
    messages = [{"role": "user", "content": content}]
    arguments = {"model": model, "max_tokens": options.max_output, "messages": messages}
    if options.thoughts:
        thinking = {"type": "adaptive"}
        if options.thinking_budget:
            thinking = {"type": "enabled", "budget_tokens": options.thinking_budget}
        # Without "summarized" the reply has thinking blocks without text.
        arguments["thinking"] = thinking | {"display": "summarized"}
    output = {"effort": options.effort} if options.effort else {}
    if request.schema:
        output["format"] = {"type": "json_schema", "schema": request.schema}
    if output:
        arguments["output_config"] = output
    return arguments


def anthropic_reply(message: object) -> Reply:
    """The Reply in a whole message, streamed or of a batch. Raises Lost."""
    parts = {"thinking": [], "text": []}
    for block in message.content:
        if block.type in parts:
            parts[block.type].append(getattr(block, block.type))
    used = message.usage
    details = used.output_tokens_details
    cached = (used.cache_creation_input_tokens or 0) + (used.cache_read_input_tokens or 0)
    usage = {"input": used.input_tokens + cached, "output": used.output_tokens}
    usage["thought"] = (details and details.thinking_tokens) or 0
    reason = message.stop_reason
    stops = {"max_tokens": "length", "model_context_window_exceeded": "length"}
    stops |= {"refusal": "refused", None: None}
    thought = "\n\n".join(parts["thinking"])
    return whole_reply(thought, "".join(parts["text"]), stops.get(reason, "end"), usage, reason)


async def ask_anthropic(client: object, model: str, request: Request) -> Reply:
    async with client.messages.stream(**anthropic_request(model, request)) as stream:
        return anthropic_reply(await stream.get_final_message())


def gemini_request(model: str, request: Request) -> dict:
    """The arguments of generate_content_stream, and of a request in a batch."""
    from google.genai import types

    options = request.options
    contents = [request.text]
    if image := request.image:
        contents.insert(0, types.Part.from_bytes(data=image[0], mime_type=image[1]))
    config = {"max_output_tokens": options.max_output, "seed": options.seed}
    if request.schema:
        config["response_mime_type"] = "application/json"
        config["response_json_schema"] = request.schema
    if options.thoughts:
        thinking = {"include_thoughts": True}
        if options.thinking_budget is not None:
            thinking["thinking_budget"] = options.thinking_budget
        if options.effort:
            thinking["thinking_level"] = options.effort.upper()
        config["thinking_config"] = thinking
    return {"model": model, "contents": contents, "config": types.GenerateContentConfig(**config)}


def gemini_reply(chunks: list) -> Reply:
    """The Reply in the chunks of a stream, or in the one response of a batch. Raises Lost."""
    thoughts = []
    answers = []
    used = stop = None
    why = ""
    for chunk in chunks:
        used = chunk.usage_metadata or used
        if chunk.prompt_feedback and chunk.prompt_feedback.block_reason:
            stop = "blocked"
            why = chunk.prompt_feedback.block_reason.name
        for candidate in (chunk.candidates or [])[:1]:
            for part in (candidate.content and candidate.content.parts) or []:
                (thoughts if part.thought else answers).append(part.text or "")
            if candidate.finish_reason:
                why = candidate.finish_reason.name
                stop = {"STOP": "end", "MAX_TOKENS": "length"}.get(why, "blocked")
    usage = {"input": (used and used.prompt_token_count) or 0}
    usage["thought"] = (used and used.thoughts_token_count) or 0
    usage["output"] = ((used and used.candidates_token_count) or 0) + usage["thought"]
    return whole_reply("".join(thoughts), "".join(answers), stop, usage, why)


async def ask_gemini(client: object, model: str, request: Request) -> Reply:
    stream = await client.aio.models.generate_content_stream(**gemini_request(model, request))
    return gemini_reply([chunk async for chunk in stream])


def whole_reply(thought: str, answer: str, stop: str | None, usage: dict, why: object) -> Reply:
    """The Reply; Lost if it was cut, which leaves no reason to stop, or ends normally but empty."""
    if stop is None:
        raise Lost("the reply was cut")
    if stop == "end" and not (thought.strip() or answer.strip()):
        raise Lost("the reply is empty", usage)
    thought = thought.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
    answer = answer.encode("utf-8", "replace").decode()
    return Reply(thought.strip(), answer.strip(), stop, usage, str(why))


@functools.cache
def demo_scenes() -> tuple[dict, dict]:
    """The demo's (problems, facts) by id, as demo.teacher takes them."""
    folder = scenes.demo_folder()
    return files.read_json(folder / "problems.json"), files.read_json(folder / "scenes.json")


def ask_demo(problem: data.Problem, seed: int, attempt: int) -> Reply:
    """demo.teacher's reply; that of the first attempt is the one in demo.teacher.traces."""
    from demo import teacher

    problems, facts = demo_scenes()
    again = f"/{attempt}" if attempt else ""
    reply = teacher.think(problems[problem.id], facts[problem.id], f"{seed}/{problem.id}{again}")
    usage = {"input": 0, "output": 0, "thought": 0, "cost": 0.0, "seconds": 0.0, "tries": 1}
    return Reply(reply["thought"], reply["answer"], "end", usage)


def demo_verdict(problem: data.Problem, thought: str, answer: str) -> dict:
    """The verdict of the demo's judge."""
    from demo.judge import judge

    problems, facts = demo_scenes()
    return judge(problems[problem.id], facts[problem.id], thought, answer)


ASK = {"gemini": ask_gemini, "anthropic": ask_anthropic}


# --- failures


def status_of(error: Exception) -> int | None:
    """The HTTP status of an SDK's error, or of plain HTTP's."""
    plain = getattr(getattr(error, "response", None), "status_code", None)
    status = getattr(error, "status_code", None) or getattr(error, "code", None) or plain
    return status if isinstance(status, int) else None


def retry_after(error: Exception, tries: int) -> float | None:
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
    elif status not in RETRIED and status < 500:
        return None
    delay = requested_delay(error)
    if delay is not None:
        return min(LONGEST_WAIT, delay * random.uniform(1, 1.1))
    return min(LONGEST_WAIT, 0.5 * 2 ** (tries - 1)) * random.uniform(0.5, 1)


def requested_delay(error: Exception) -> float | None:
    """The seconds that a server asks for."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    delays = [headers.get("retry-after-ms", "") + "ms", headers.get("retry-after", "")]
    delays += re.findall(r"'retryDelay': '([\d.]+)s'", str(getattr(error, "details", "")))
    for delay in delays:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if delay.endswith("ms"):
                seconds = float(delay[:-2]) / 1000
            elif re.match(r"[A-Za-z]{3}, ", delay):
                seconds = parsedate_to_datetime(delay).timestamp() - time.time()
            else:
                seconds = float(delay)
            if math.isfinite(seconds):
                return max(0.0, seconds)
    return None


def error_message(error: Exception) -> str:
    """An error of an SDK as one short line without keys."""
    if isinstance(error, TimeoutError):
        return "no reply in time (--timeout)"
    if isinstance(error, Lost):
        return hide(str(error))[:300]
    text = getattr(error, "api_message", None) or getattr(error, "message", None)
    text = text or getattr(getattr(error, "response", None), "text", None) or str(error)
    return hide(f"{status_of(error) or type(error).__name__}: {' '.join(text.split())}")[:300]


# --- images

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # both take them
MOST_BYTES = 3_900_000  # 5 MB in base64 is Anthropic's limit, and so is the side in pixels
MOST_PIXELS = 8000  # a side
REDUCED_PIXELS = 2048  # of an image over one of the limits
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright


def image_to_send(path: Path | None) -> tuple[bytes, str] | None:
    """(bytes, media type) of an image: the file's own bytes where they can be sent, else a PNG or
    JPEG within the limits. Raises Failed."""
    if path is None:
        return None
    with contextlib.suppress(Exception):  # open_image below says what is wrong with it
        body = files.regular_file(path).read_bytes()
        with Image.open(io.BytesIO(body), formats=images.FORMATS) as image:
            fits = len(body) <= MOST_BYTES and max(image.size) <= MOST_PIXELS
            upright = image.getexif().get(ORIENTATION, 1) == 1  # open_image turns the others
            if fits and upright and image.format in MEDIA_TYPES:
                return body, MEDIA_TYPES[image.format]
    try:
        image = images.open_image(path)
    except (OSError, ValueError) as error:
        raise Failed(str(error)) from None
    if max(image.size) > MOST_PIXELS:
        image.thumbnail((REDUCED_PIXELS, REDUCED_PIXELS))
    for format in ("PNG", "JPEG"):
        file = io.BytesIO()
        image.save(file, format, quality=90)
        if len(file.getvalue()) <= MOST_BYTES:
            break
        image.thumbnail((REDUCED_PIXELS, REDUCED_PIXELS))
    return file.getvalue(), MEDIA_TYPES[format]
