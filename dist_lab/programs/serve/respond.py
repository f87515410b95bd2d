"""Answers in the format of OpenAI's API, whole or as a stream of server-sent events.

    data: {"id": "cmpl-...", "choices": [{"index": 0, "text": "a", ...}], ...}

    data: [DONE]

While an answer is made we listen for the end of the connection: a client that goes away cancels its
texts, whether it has been sent something yet or not.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.router import Texts

SLOWEST_READER = 60.0  # seconds in which a client takes nothing of what it is sent
EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx, which would keep the parts until the end
}


@dataclass(frozen=True)
class Style:
    """How an answer is written: that of a completion or that of a chat."""

    is_chat: bool
    id_prefix: str
    whole: str  # the value of `object`
    chunk: str

    def choice(self, number: int, text: str, reason: str | None) -> dict[str, Any]:
        if self.is_chat:
            return {
                "index": number, "message": {"role": "assistant", "content": text},
                "logprobs": None, "finish_reason": reason,
            }  # fmt: skip
        return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}

    def part(self, number: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
        if self.is_chat:
            role = {"role": "assistant"} if first else {}
            return {
                "index": number, "delta": role | {"content": text}, "logprobs": None,
                "finish_reason": reason,
            }  # fmt: skip
        return self.choice(number, text, reason)


COMPLETION = Style(False, "cmpl-", "text_completion", "text_completion")
CHAT = Style(True, "chatcmpl-", "chat.completion", "chat.completion.chunk")


class Answer:
    """The answer to one request: an ASGI application, which starlette calls as it does a Response.

    Args:
        stream: send parts as they come.
        include_usage: send the numbers of tokens after the last part.
    """

    def __init__(
        self, texts: Texts, style: Style, model: str, stream: bool, include_usage: bool
    ) -> None:
        self.texts, self.style, self.stream = texts, style, stream
        self.include_usage = include_usage
        self.prompt_tokens, self.generated = 0, 0
        self.head = {"id": f"{style.id_prefix}{uuid.uuid4().hex}", "model": model}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Any) -> None:
            async with asyncio.timeout(SLOWEST_READER):
                await send(message)

        work = asyncio.create_task(self._respond(scope, receive, send_soon))
        gone = asyncio.create_task(client_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.texts.close()
            for task in (work, gone):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], TimeoutError):
            raise results[0]

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.prompt_tokens = sum(await self.texts.accepted)
            if self.stream:
                await self._send_events(send)
                return
            response = JSONResponse(await self._whole())
        except Refused as refused:
            response = error_response(refused)
        await response(scope, receive, send)

    async def _whole(self) -> dict[str, Any]:
        texts = [""] * self.texts.count
        reasons: list[str | None] = [None] * self.texts.count
        async for part in self.texts:
            self.generated += 1
            texts[part.number] += part.text
            reasons[part.number] = part.reason or None
        ended = zip(texts, reasons, strict=True)
        choices = [self.style.choice(n, text, why) for n, (text, why) in enumerate(ended)]
        return self._envelope(self.style.whole, choices) | {"usage": self._usage()}

    async def _send_events(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in EVENTS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._events():
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)  # the turn of others, and of the news that the client has gone
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            async for part in self.texts:
                self.generated += 1
                if part.text or part.reason:
                    first = part.number not in begun
                    begun.add(part.number)
                    choice = self.style.part(part.number, part.text, part.reason or None, first)
                    yield as_json(self._envelope(self.style.chunk, [choice]))
        except Refused as refused:  # the status has been sent, so the error is an event
            yield as_json(refused.to_dict())
            return
        if self.include_usage:
            yield as_json(self._envelope(self.style.chunk, []) | {"usage": self._usage()})
        yield "[DONE]"

    def _envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.head | {"object": kind, "created": int(time.time()), "choices": choices}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
        }


async def client_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. Its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def as_json(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


def error_response(refused: Refused) -> JSONResponse:
    headers = {"retry-after": "1"} if refused.status == 429 else {}
    if refused.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(refused.to_dict(), refused.status, headers)
