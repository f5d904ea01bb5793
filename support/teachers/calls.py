"""Many calls of providers at once, within limits of time, tries and money.

`Calls` is one run of them. A call goes through `insist`: it waits until the most that it can cost
fits under the limit (`reserve`), asks, asks again where clients.py says that this helps, and counts
what it cost. `pool` works through many items; `carry_out` opens and closes the clients around all
of it, and makes Ctrl-C finish what is paid for.

Left out on purpose: a rate limit of our own. A provider that has had enough says so (429), and then
each call waits as it is told to.
"""

import asyncio
import contextlib
import math
import signal
import sys
import time
from dataclasses import dataclass, field

from support import files
from support.teachers import providers as clients
from support.teachers.providers import FATAL, UNREADABLE, Failed, Lost, Reply, in_words, status_of

IMAGE_TOKENS = {"anthropic": 4800, "gemini": 1120}  # the most that one picture counts


class Halt(Exception):
    """No more questions: interrupted, out of money, or refused by the provider."""


# --- what a call costs


def cost(usage, price, share=1.0):
    """USD of a reply, or None if the price is unknown."""
    return price and share * (usage["input"] * price[0] + usage["output"] * price[1]) / 1e6


def input_tokens(provider, text, size):
    """An estimate for English that is rather too high: 3 characters a token."""
    image = IMAGE_TOKENS.get(provider, 0) if size else 0
    if size and provider == "anthropic":
        image = min(image, math.ceil(size[0] * size[1] / 750))
    return math.ceil(len(text) / 3) + image


def at_most(model, text, size, output):
    """The most USD that a call can cost; 0 where the price is unknown, for then no limit is set.
    size: the picture's (width, height), if one is sent; output: most tokens of the reply."""
    usage = {"input": input_tokens(model.provider, text, size), "output": output}
    return cost(usage, model.price) or 0.0


def may_have_cost(error, most, price):
    """USD that a failed call may have cost: nothing if it was turned away, else at most `most`."""
    if getattr(error, "usage", None):
        return cost(error.usage, price) or 0.0
    turned_away = status_of(error) not in (None, 200) or "Connect" in type(error).__name__
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
    flying: int = 0  # calls under way
    lost: float = 0.0  # at most so much may have been billed for replies that never came whole
    failed: dict = field(default_factory=dict)  # problem id: why
    in_a_row: int = 0  # of those that failed, since one did not
    done: int = 0
    total: int = 0
    start: float = field(default_factory=time.monotonic)
    stop: str = ""  # why no more is asked
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    halted: asyncio.Event = field(default_factory=asyncio.Event)

    def halt(self, why):
        """Ask no more; calls under way come to their end."""
        self.stop = self.stop or why
        self.halted.set()
        self.changed.set()

    def interrupt(self, task):
        """Ctrl-C or SIGTERM: the first waits for calls under way, which are paid for; the second
        does not."""
        if self.stop:
            task.cancel()
        elif self.flying:
            text = f"Stopping after the {self.flying} calls under way; once more to drop them."
            print(f"\n{text}", file=sys.stderr)
        self.halt("interrupted")

    def fail(self, id, error):
        """Give up a question; many in a row end the run."""
        self.failed[id] = str(error)
        self.in_a_row += 1
        if self.in_a_row == max(20, 2 * self.concurrency):
            self.halt(f"{self.in_a_row} questions in a row failed, the last with {error}")

    def progress(self, what):
        """One more is done."""
        self.done += 1
        files.progress(what, self.done, self.total, self.start, f", ${self.spent:.2f}")

    def money_left(self):
        return f"--max-cost: ${self.limit - self.spent:.4f} of ${self.limit:g} are left"

    async def pause(self, seconds):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.halted.wait(), seconds)

    async def reserve(self, most):
        """Wait until a call that may cost this much fits under the limit; Halt if it never will."""
        while most and not self.stop and self.spent + self.reserved + most > self.limit:
            if not self.flying:
                self.halt(f"{self.money_left()}, and a call may cost ${most:.4f}")
                break
            self.changed.clear()
            await self.changed.wait()
        if self.stop:
            raise Halt(self.stop)
        self.reserved, self.flying = self.reserved + most, self.flying + 1

    async def insist(self, ask, most=0.0, price=None, fatal=FATAL):
        """What the coroutine `ask()` returns, asked at most `retries` times as `retry_after` says.

        A Reply gets its cost, seconds and tries. Failed when it is given up, Halt when nothing more
        is to be asked. The timeout is on a whole call, as a stalled connection may drip.
        """
        tries = 0
        while True:
            await self.reserve(most)
            tries, start, spent = tries + 1, time.monotonic(), 0.0
            try:
                said = await asyncio.wait_for(ask(), self.timeout)
                if isinstance(said, Reply):
                    usd, seconds = cost(said.usage, price), round(time.monotonic() - start, 3)
                    said.usage |= {"cost": usd, "seconds": seconds, "tries": tries}
                    spent = usd or 0.0
                return said
            except Exception as error:
                if isinstance(error, UNREADABLE):  # what the SDKs raise on JSON of another form
                    error = Lost(f"the reply cannot be read: {error!r}")
                if status_of(error) in fatal or "API_KEY_INVALID" in str(error):  # Gemini's is 400
                    self.halt(f"the provider refuses: {in_words(error)}")
                    raise Halt(self.stop) from None
                spent = may_have_cost(error, most, price)
                self.lost += spent
                wait = clients.retry_after(error, tries) if tries < self.retries else None
                if wait is None:
                    raise Failed(f"{in_words(error)} ({tries} tries)") from error
            finally:
                self.reserved, self.spent = self.reserved - most, self.spent + spent
                self.flying -= 1
                self.changed.set()
            await self.pause(wait)

    async def pool(self, items, work):
        """await work(item) for all, `concurrency` at a time; none is taken before its turn."""
        items = iter(items)

        async def worker():
            for item in items:
                if self.stop:
                    return
                await work(item)

        await asyncio.gather(*(worker() for _ in range(self.concurrency)))

    async def carry_out(self, models, work):
        """Connect the models, await the coroutine `work`, disconnect. What stopped it stands in
        `stop`."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not all have
                loop.add_signal_handler(number, self.interrupt, task)
        async with contextlib.AsyncExitStack() as opened:
            opened.callback(work.close)  # says nothing if it was awaited
            for model in (model for model in models if model.provider in clients.ASK):
                model.client = clients.connect(model.provider, self.timeout, opened)
            try:
                await work
            except asyncio.CancelledError:
                self.halt("interrupted")
