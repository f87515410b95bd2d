"""A server without ranks: the real router and HTTP, and a thread with an engine of letters."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dist_lab.errors import MachineError, UserError
from dist_lab.inference.engine import Counts
from dist_lab.inference.line import Line
from dist_lab.inference.sequence import Request
from dist_lab.inference.serving import serve
from dist_lab.inference.text import Bytes, TextStream
from dist_lab.programs.serve.command import listen
from dist_lab.programs.serve.http import HttpThread
from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.settings import Serve


@dataclass
class Letters:
    """An engine that continues each text with the letters after its last byte: x -> y -> z -> {.

    Args:
        capacity: tokens of all texts together.
        slots: so many texts run at once.
        pace: seconds of a step.
        gate: until it is set, requests are taken, and no step is made.
    """

    capacity: int = 1000
    slots: int = 50
    pace: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    requests: dict[str, Request] = field(default_factory=dict)
    running: dict[str, list[int]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self):
        self.gate.set()
        self.streams, self.tokenizer = {}, Bytes()

    @property
    def busy(self) -> bool:
        return bool(self.requests) and self.gate.is_set()

    def add(self, name: str, request: Request) -> None:
        tokens = len(request.prompt) + request.new_tokens
        if tokens > self.capacity:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens and {request.new_tokens} are to be "
                f"generated, and the cache has room for {self.capacity}"
            )
        if not request.prompt:
            raise UserError("the prompt is empty, and a model continues a text")
        if wrong := [token for token in request.prompt if token >= 256]:
            raise UserError(f"the prompt has token {wrong[0]}, and the vocabulary has 256")
        self.log.append(f"add {name}")
        self.requests[name] = request
        self.streams[name] = TextStream(Bytes(), request.stops)

    def cancel(self, name: str) -> None:
        self.log.append(f"cancel {name}")
        self.requests.pop(name, None)
        self.running.pop(name, None)

    def step(self) -> list[Any]:
        time.sleep(self.pace)
        self.steps += 1
        for name in [*self.requests][: self.slots]:
            self.running.setdefault(name, list(self.requests[name].prompt))
        events = []
        for name, tokens in [*self.running.items()]:
            request, stream = self.requests[name], self.streams[name]
            tokens.append(tokens[-1] % 127 + 1)
            text = stream.feed(tokens[-1])
            full = len(tokens) - len(request.prompt) == request.new_tokens
            reason = "stop" if stream.stopped else "length" if full else ""
            if reason:
                text += stream.finish()
                del self.running[name], self.requests[name]
            events.append(SimpleNamespace(name=name, text=text, reason=reason))
        return events

    @property
    def counts(self) -> Counts:
        used = sum(len(tokens) for tokens in self.running.values())
        waiting = len(self.requests) - len(self.running)
        return Counts(waiting, len(self.running), self.capacity - used, used, 0, 0, 1, 0)


@dataclass
class Server:
    """A running server, as its clients see it."""

    port: int
    engine: Any = None
    http: Any = None
    opened: list[socket.socket] = field(default_factory=list)

    def ask(self, path: str, body: Any = None, headers: Any = (), method: str = "") -> "Reply":
        """One request; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        method = method or ("GET" if body is None else "POST")
        try:
            connection.request(method, path, data, kind | dict(headers))
            response = connection.getresponse()
            return Reply(response.status, response.read().decode(), dict(response.getheaders()))
        finally:
            connection.close()

    def complete(self, prompt: Any = "a", tokens: int = 3, **fields: Any) -> "Reply":
        return self.ask("/v1/completions", {"prompt": prompt, "max_tokens": tokens} | fields)

    def stream(
        self, prompt: Any = "a", tokens: int = 3, buffer: int = 0, **fields: Any
    ) -> "Stream":
        """A stream whose parts are read by the test, one by one."""
        body = {"prompt": prompt, "max_tokens": tokens, "stream": True} | fields
        return Stream(self.raw("/v1/completions", json.dumps(body).encode(), buffer=buffer))

    def raw(
        self, path: str, body: bytes, length: int | None = None, buffer: int = 0
    ) -> socket.socket:
        """A connection on which a request has been sent.

        Args:
            length: as its header says.
            buffer: so many bytes are taken from the network without being read; 0: as usual.
        """
        connection = socket.socket()
        self.opened.append(connection)
        connection.settimeout(60)
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body) if length is None else length}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        return connection

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    def close(self) -> None:
        """Close the connections that a test has left open."""
        for connection in self.opened:
            connection.close()

    def until(self, holds: Any, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "this has not come"
            time.sleep(0.005)


@dataclass(frozen=True)
class Reply:
    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        return self.json["error"]


class Stream:
    """Server-sent events, read as they come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.file = connection, connection.makefile("rb")

    def __iter__(self) -> Iterator[Any]:
        for line in self.file:
            if line.startswith(b"data: "):
                data = line.removeprefix(b"data: ").strip()
                event = "[DONE]" if data == b"[DONE]" else json.loads(data)
                yield event
                if event == "[DONE]" or "error" in event:
                    break
        self.close()

    def text(self) -> str:
        """The whole text. Fails if the stream is cut off, or has an error."""
        events = [*self]
        assert events[-1] == "[DONE]", events[-1:]
        return "".join(c["text"] for event in events[:-1] for c in event["choices"])

    def close(self) -> None:
        self.file.close()
        self.connection.close()


@contextmanager
def server_of(folder: Path, engine: Any = None, **settings: Any) -> Iterator[Server]:
    """A server at a free port. Its socket for rank 0 is in `folder`."""
    engine = engine or Letters()
    config = Serve(checkpoint="runs/007-letters", port=0, stop_seconds=5.0, **settings)
    with listen(config.host, 0) as listener:
        web = HttpThread(config, listener, str(folder / "r"))
        web.start()
        rank = threading.Thread(target=rank_0, args=(folder / "r", engine), daemon=True)
        rank.start()
        server = Server(listener.getsockname()[1], engine, web)
        try:
            server.until(lambda: web.ready or not rank.is_alive())
            yield server
        finally:
            server.close()
            engine.gate.set()
            web.end(Refused(503, "the test is over"), 0)
            web.join(20)
            rank.join(20)
    assert web.error is None, web.error
    assert not web.is_alive()
    assert not rank.is_alive()


def rank_0(path: Path, engine: Any) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        deadline = time.monotonic() + 10
        while connection.connect_ex(str(path)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        line = Line(connection)
        try:
            serve(engine, SimpleNamespace(size=1), line, beat=0.1)
        except MachineError as error:
            engine.log.append(str(error))
