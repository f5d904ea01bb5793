"""Many provider calls at once, within limits of time, tries and money.

A call goes through `call_with_retries`: it waits until the most that it can cost fits under the
limit, asks, asks again where providers.py finds that worth it, and counts its cost. There is no
rate limit of our own: a provider that has had enough answers 429, and each call waits as it asks.
"""

import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field

from support import files
from support.teachers import providers
from support.teachers.providers import ASK, FATAL, UNREADABLE, Failed, Lost, Model, Reply

IMAGE_TOKENS = {"anthropic": 4800, "gemini": 1120}  # the most that one image counts


class Halt(Exception):
    """No more questions: interrupted, out of money, or refused by the provider."""


# --- what a call costs


def cost(usage: dict, price: tuple | None, share: float = 1.0) -> float | None:
    """USD of a reply, or None if the price is unknown."""
    if price is None:
        return None
    return share * (usage["input"] * price[0] + usage["output"] * price[1]) / 1e6


def input_tokens(provider: str, text: str, size: tuple[int, int] | None) -> int:
    """An estimate for English and an image of (width, height), too high: 3 characters a token."""
    image = IMAGE_TOKENS.get(provider, 0) if size else 0
    if size and provider == "anthropic":
        image = min(image, math.ceil(size[0] * size[1] / 750))
    return math.ceil(len(text) / 3) + image


def highest_cost(model: Model, text: str, size: tuple[int, int] | None, output: int) -> float:
    """The most USD of a call with a reply of at most `output` tokens; 0 with an unknown price, for
    then no limit is set."""
    usage = {"input": input_tokens(model.provider, text, size), "output": output}
    return cost(usage, model.price) or 0.0


def possible_cost(error: Exception, most: float, price: tuple | None) -> float:
    """USD that a failed call may have cost: 0 if it was turned away, else at most `most`."""
    if getattr(error, "usage", None):
        return cost(error.usage, price) or 0.0
    turned_away = providers.status_of(error) not in (None, 200) or "Connect" in type(error).__name__
    return 0.0 if turned_away else most


# --- many of them


@dataclass
class Calls:
    """A run of many calls: its limits, and how far it is. Money is in USD."""

    concurrency: int  # calls under way at once
    timeout: float  # seconds for a whole reply
    retries: int  # most requests for one reply
    limit: float = math.inf  # --max-cost
    spent: float = 0.0
    reserved: float = 0.0  # what the calls under way, and batches that are out, may cost
    in_flight: int = 0
    lost: float = 0.0  # at most so much may have been billed for replies that never came whole
    failed: dict[str, str] = field(default_factory=dict)  # problem id: why
    in_a_row: int = 0  # failures since the last success
    done: int = 0
    total: int = 0
    start: float = field(default_factory=time.monotonic)
    stop: str = ""  # why no more is asked
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    halted: asyncio.Event = field(default_factory=asyncio.Event)

    def halt(self, why: str) -> None:
        """Ask no more; calls under way come to their end."""
        self.stop = self.stop or why
        self.halted.set()
        self.changed.set()

    def interrupt(self, task: asyncio.Task) -> None:
        """Ctrl-C or SIGTERM: the first waits for the calls under way, which are paid for."""
        if self.stop:
            task.cancel()
        elif self.in_flight:
            text = f"\nstopping after the {self.in_flight} calls under way; press Ctrl-C again to"
            print(text, "drop them", file=sys.stderr)
        self.halt("interrupted")

    def fail(self, id: str, error: object) -> None:
        self.failed[id] = str(error)
        self.in_a_row += 1
        if self.in_a_row == max(20, 2 * self.concurrency):
            self.halt(f"{self.in_a_row} questions in a row failed, the last with {error}")

    def money_left(self) -> str:
        return f"--max-cost: ${self.limit - self.spent:.4f} of ${self.limit:g} are left"

    async def pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)

    async def reserve(self, most: float) -> None:
        """Wait until a call that may cost this much fits under the limit; Halt if it never will."""
        while most and not self.stop and self.spent + self.reserved + most > self.limit:
            if not self.in_flight:
                self.halt(f"{self.money_left()}, and a call may cost ${most:.4f}")
                break
            self.changed.clear()
            await self.changed.wait()
        if self.stop:
            raise Halt(self.stop)
        self.reserved += most
        self.in_flight += 1

    async def call_with_retries(
        self, ask: Callable, most: float = 0.0, price: tuple | None = None, fatal: tuple = FATAL
    ) -> object:
        """The result of the coroutine `ask()`, tried at most `retries` times as `retry_after` says;
        a Reply with its cost, seconds and tries. Raises Failed when it is given up, Halt when
        nothing more is to be asked, as after the statuses that are `fatal`."""
        tries = 0
        while True:
            await self.reserve(most)
            tries += 1
            start = time.monotonic()
            spent = 0.0
            try:
                # On the whole call, as a stalled connection may drip.
                result = await asyncio.wait_for(ask(), self.timeout)
                if isinstance(result, Reply):
                    usd = cost(result.usage, price)
                    seconds = round(time.monotonic() - start, 3)
                    result.usage |= {"cost": usd, "seconds": seconds, "tries": tries}
                    spent = usd or 0.0
                return result
            except Exception as error:
                if isinstance(error, UNREADABLE):
                    error = Lost(f"the reply cannot be read: {error!r}")
                # Gemini's answer to a wrong key has status 400, as has a request that is too long.
                if providers.status_of(error) in fatal or "API_KEY_INVALID" in str(error):
                    self.halt(f"the provider refuses: {providers.error_message(error)}")
                    raise Halt(self.stop) from None
                spent = possible_cost(error, most, price)
                self.lost += spent
                wait = providers.retry_after(error, tries) if tries < self.retries else None
                if wait is None:
                    raise Failed(f"{providers.error_message(error)} ({tries} tries)") from error
            finally:
                self.reserved -= most
                self.spent += spent
                self.in_flight -= 1
                self.changed.set()
            await self.pause(wait)

    async def pool(
        self, label: str, items: Iterable[tuple[str, object]], work: Callable[[object], Awaitable]
    ) -> None:
        """await work(item) for all (problem id, item), `concurrency` at a time, none before its
        turn. An error fails its own question; many in a row end the run."""
        items = iter(items)

        async def worker() -> None:
            for id, item in items:
                if self.stop:
                    return
                try:
                    await work(item)
                    self.in_a_row = 0
                except Halt:
                    return
                except Exception as error:
                    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                        raise  # the disk is full
                    self.fail(id, error if isinstance(error, Failed) else repr(error))
                self.done += 1
                money = f", ${self.spent:.2f}"
                files.progress(label, self.done, self.total, self.start, money)

        await asyncio.gather(*(worker() for _ in range(self.concurrency)))

    async def run(self, models: Iterable[Model], work: Coroutine) -> None:
        """Await `work` with the models connected; raises ValueError where one cannot be."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not all have
                loop.add_signal_handler(number, self.interrupt, asyncio.current_task())
        async with contextlib.AsyncExitStack() as opened:
            opened.callback(work.close)  # no "was never awaited" where connecting fails
            for model in models:
                if model.provider in ASK:
                    model.client = providers.connect(model.provider, self.timeout, opened)
            try:
                await work
            except asyncio.CancelledError:
                self.halt("interrupted")
