"""The HTTP server and the router, in a thread with an event loop.

The main thread starts the ranks, waits for their end, and gets the signals. It tells this thread
when to end, and this thread tells rank 0, when nobody is left who waits for a text:

    end(why, limit)     no more connections; requests on old ones get 503
    ... limit seconds   open texts go on to their end; after that they get an error
                        rank 0 is told to stop
"""

import asyncio
import math
import socket
import sys
import threading
import time
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import uvicorn

from dist_lab.inference.line import LARGEST
from dist_lab.programs.serve import respond
from dist_lab.programs.serve.api import build
from dist_lab.programs.serve.receive import LOCAL
from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.router import Router
from dist_lab.programs.serve.settings import Serve

SILENT = 10.0  # seconds for a client to send the head of a request
SWEEP = 1.0  # seconds between looks for them
TO_READ = 3  # seconds for clients to take the end of their answers


class HttpThread(threading.Thread):
    """Serves until `end`, or until rank 0 ends.

    Args:
        listener: listens already.
        path: of the Unix socket at which rank 0 comes in.

    Attributes:
        ready: rank 0 has loaded the model.
        cut: the number of texts that got an error because the server ended.
        error: a defect that has ended this thread.
    """

    def __init__(self, config: Serve, listener: socket.socket, path: str) -> None:
        super().__init__(name="http", daemon=True)
        self.config, self.listener, self.path = config, listener, path
        self.ready, self.cut = False, 0
        self.error: BaseException | None = None
        self._begun = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # the main thread raises it
            self.error = error
        finally:
            self._begun.set()

    def end(self, why: Refused, limit: float) -> None:
        """Take no more requests, and end when all texts have ended, or after `limit` seconds."""
        self._begun.wait()
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._router.end, why, limit)

    async def _serve(self) -> None:
        self._loop, self._router = asyncio.get_running_loop(), Router(self.config.max_queue)
        router, config = self._router, self.config
        for_rank_0 = await asyncio.start_unix_server(router.connected, self.path, limit=LARGEST)
        app = build(router, config.model_name, config.timeout, self._hosts())
        options = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", loop="asyncio", log_config=None,
            log_level="error", access_log=False, server_header=False, proxy_headers=False,
        )  # fmt: skip
        web = self._web = uvicorn.Server(options)
        serving = asyncio.create_task(web.serve(sockets=[self.listener]))
        others = [
            asyncio.create_task(self._announce()),
            asyncio.create_task(close_silent(web.server_state.connections)),
        ]
        self._begun.set()
        ending = asyncio.create_task(router.ending.wait())
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        options.timeout_graceful_shutdown = TO_READ + math.ceil(router.limit)
        web.should_exit = True
        await router.drained()
        await serving
        self.cut = router.cut
        await router.stop_ranks()
        for task in (*others, ending):
            task.cancel()
        for_rank_0.close()

    @property
    def _address(self) -> str:
        """The address that is listened at, as it is in a URL."""
        host = self.listener.getsockname()[0]
        return f"[{host}]" if ":" in host else host

    def _hosts(self) -> set[str]:
        """The names under which clients may ask; empty: any."""
        is_local = ip_address(self.listener.getsockname()[0]).is_loopback
        return {*LOCAL, self._address} if is_local else set()

    async def _announce(self) -> None:
        await self._router.ready
        self.ready = True
        url = f"http://{self._address}:{self.listener.getsockname()[1]}"
        print(
            f"serve.py: {self.config.model_name} is at {url}; Ctrl-C stops",
            file=sys.stderr, flush=True,
        )  # fmt: skip


async def close_silent(connections: set[Any]) -> None:
    """Close connections on which nothing moves: each of them takes a file descriptor.

    uvicorn itself waits for ever for the head of the first request, and for a client to take the
    end of an answer. We look at them now and then, so a connection counts as silent only if it has
    had no other request since the last look (`cycle`), and its client has taken no bytes.
    """
    since: dict[Any, float] = {}
    while True:
        await asyncio.sleep(SWEEP)
        now = time.monotonic()
        silent = [
            (connection, connection.cycle, connection.transport.get_write_buffer_size())
            for connection in connections
            if connection.cycle is None
            or connection.cycle.response_complete
            or connection.transport.is_closing()
        ]
        since = {state: since.get(state, now) for state in silent}
        for (connection, _, unsent), start in since.items():
            if now - start > (respond.SLOWEST_READER if unsent else SILENT):
                connection.transport.abort()
