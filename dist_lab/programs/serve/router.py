"""The router: which texts are open, who gets their parts, and when there are too many.

It runs in a process of its own, in an event loop, and knows neither HTTP nor the model. To rank 0
it sends what is asked, and from rank 0 it gets a line after every step (inference/line.py).

    texts = router.open([Asked("def ", 16)])     429 if too many wait, 400 if there never is room
    await texts.accepted                         400 if the prompt does not fit
    async for part in texts: ...                 as they come
    texts.close()                                in any case: cancels what is still open

A client that reads slowly holds up nobody: the parts of its texts wait in its own queue, which is
as long as the texts at most.
"""

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dist_lab.inference.line import as_line
from dist_lab.programs.serve.refused import Refused

NOT_FINITE = (
    "the model's logits for this text are not finite: its weights are of a run that has diverged, "
    "or of a dtype that is too small; ask for another text"
)


@dataclass(frozen=True)
class Asked:
    """A prompt to be continued by one or more texts.

    Args:
        prompt: text, or tokens.
        new_tokens: generate so many at most.
        sampling: the arguments of inference.sampling.Sampling, but for the seed.
        seeds: one for each text.
    """

    prompt: str | list[int]
    new_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Attributes:
        number: of the text in its request.
        reason: why it has ended; "" if it has not.
    """

    number: int
    text: str
    reason: str


class Texts:
    """The texts of one request.

    Attributes:
        accepted: will be the number of tokens of each prompt; or raises Refused.
    """

    def __init__(self, router: "Router", name: str, count: int) -> None:
        self.accepted: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.name, self.count, self.open = name, count, set(range(count))
        self.started, self.has_begun = time.monotonic(), False
        self._router = router
        self._coming: asyncio.Queue[Part | Refused] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Part]:
        """Yields each part, one for every token. Raises Refused if the server fails."""
        left = self.count
        while left:
            part = await self._coming.get()
            if isinstance(part, Refused):
                raise part
            left -= bool(part.reason)
            yield part

    def close(self) -> None:
        """Cancel those that are open: their client has gone. May be called again."""
        self._router.forget(self)

    def tell(self, part: Part | Refused) -> None:
        if isinstance(part, Refused) and not self.accepted.done():
            self.accepted.set_exception(part)
            self.accepted.exception()  # a client that has gone does not ask
        self._coming.put_nowait(part)


class Router:
    """All open texts.

    Args:
        most_waiting: so many texts may wait for their turn.

    Attributes:
        ready: is done when rank 0 has loaded the model.
        totals: counts since the start, for /metrics.
        counts: of the engine after its last step, for /metrics.
        heard: when rank 0 has said something last (time.monotonic()).
        ending: is set when no more requests are taken.
        cut: the number of texts that got an error because of the end.
    """

    def __init__(self, most_waiting: int) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ending, self.limit, self.cut = asyncio.Event(), 0.0, 0
        self.most_waiting = most_waiting
        self.totals: Counter[str] = Counter()
        self.counts: dict[str, int] = {}
        self.heard = time.monotonic()
        self._requests: dict[str, Texts] = {}
        self._names = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._idle, self._gone = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._why: Refused | None = None  # no more requests are taken

    def open(self, asked: Sequence[Asked]) -> Texts:
        """Send texts to rank 0.

        Raises:
            Refused: too many wait, or are asked for, or the server is stopping.
        """
        if self._why is not None:
            raise self._why
        if not self.ready.done():
            raise Refused(503, "the model is still loading; ask again in a few seconds")
        count, waiting = sum(len(one.seeds) for one in asked), self.waiting
        if count > self.most_waiting:
            raise Refused(
                400, f"the request asks for {count} texts, and {self.most_waiting} may wait for "
                "their turn; ask for fewer, or start the server with a higher --max-queue", "n",
            )  # fmt: skip
        if waiting + count > self.most_waiting:
            raise Refused(
                429, f"{waiting} texts wait for their turn, and {self.most_waiting} may; ask again "
                "in a second", code="queue_full",
            )  # fmt: skip
        texts = Texts(self, str(next(self._names)), count)
        # Not asdict, which copies each token, and nobody else is served meanwhile.
        line = as_line({"do": "add", "name": texts.name, "asked": [vars(one) for one in asked]})
        self._requests[texts.name] = texts
        self._idle.clear()
        self._send(line)
        return texts

    @property
    def open_texts(self) -> int:
        return sum(len(texts.open) for texts in self._requests.values())

    @property
    def waiting(self) -> int:
        """Texts that do not run, as far as is known here: after the last step."""
        return max(0, self.open_texts - self.counts.get("running", 0))

    def forget(self, texts: Texts) -> None:
        """Cancel the open texts of a request."""
        if self._requests.pop(texts.name, None) is not None:
            for number in texts.open:
                self._send(as_line({"do": "cancel", "name": f"{texts.name}.{number}"}))
                self.totals["cancelled"] += 1
        if not self._requests:
            self._idle.set()

    def end(self, why: Refused, limit: float) -> None:
        """Take no more requests; those that are open go on for `limit` seconds."""
        self._why = self._why or why
        self.limit = limit
        self.ending.set()
        if limit == 0:
            self._cut()

    async def drained(self) -> None:
        """Wait until no text is open, and after the limit end the others with an error."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limit):
                await self._idle.wait()
        self._cut()

    def _cut(self) -> None:
        assert self._why is not None
        self.cut += self.open_texts
        for texts in [*self._requests.values()]:
            texts.tell(self._why)
            self.forget(texts)

    # --- the line to rank 0 -----------------------------------------------------------------------

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Rank 0 is there: read its lines until it ends."""
        if self._writer is not None:  # somebody else
            writer.close()
            return
        self._writer = writer
        try:
            while line := await reader.readline():
                self._hear(json.loads(line))
                if not self.ready.done():
                    self.ready.set_result(None)
        except OSError:
            pass  # the same as the end of the line
        finally:
            writer.close()
            self._gone.set()
            self.end(Refused(500, "the model has failed; start the server again"), 0)

    async def stop_ranks(self) -> None:
        """Tell the ranks to stop, and wait until rank 0 has closed the line."""
        self._send(as_line({"do": "stop"}))
        if self._writer is not None:
            await self._gone.wait()

    def _send(self, line: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(line)

    def _hear(self, message: Mapping[str, Any]) -> None:
        """A step of the engine is over."""
        self.heard, self.counts = time.monotonic(), message["counts"]
        for name, lengths in message["accepted"].items():
            self.totals["prompt_tokens"] += sum(lengths)
            if (texts := self._requests.get(name)) is not None:
                texts.accepted.set_result(lengths)
        for name, why in message["refused"].items():
            if (texts := self._requests.get(name)) is not None:
                texts.open.clear()  # rank 0 does not have them
                texts.tell(Refused(400, why, param="prompt", code="prompt_refused"))
                self.forget(texts)
        for full_name, text, reason in message["events"]:
            name, _, number = full_name.partition(".")
            if reason == "failed":
                self._fail(name, int(number))
                continue
            self.totals["generated_tokens"] += 1
            if (texts := self._requests.get(name)) is not None:
                self._tell(texts, Part(int(number), text, reason))

    def _fail(self, name: str, number: int) -> None:
        """A text has failed: its request gets an error, and its other texts are cancelled."""
        self.totals["ended_failed"] += 1
        if (texts := self._requests.get(name)) is not None:
            texts.open.discard(number)
            texts.tell(Refused(500, NOT_FINITE, code="not_finite"))
            self.forget(texts)

    def _tell(self, texts: Texts, part: Part) -> None:
        if not texts.has_begun:
            texts.has_begun = True
            self.totals["first_tokens"] += 1
            self.totals["first_token_ms"] += round(1000 * (self.heard - texts.started))
        texts.tell(part)
        if part.reason:
            texts.open.discard(part.number)
            self.totals[f"ended_{part.reason}"] += 1
            if not texts.open:
                self.forget(texts)
