"""What `launch/serve.py` does: it starts the ranks and the router, and ends them together.

    serve.py     main thread: starts the ranks, waits for their end, gets the signals
                 thread "http": HTTP and the router          (http.py, router.py)
    rank 0 ...   the model: inference/serving.py             (worker.py)

This process does not import torch. The first SIGINT or SIGTERM stops it gracefully, with status 0;
the second ends it at once. If a rank fails, all ends: clients get an error, stderr a line.
"""

import importlib.util
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

from dist_lab.errors import MachineError, UserError, shown
from dist_lab.processes import launcher, ranks
from dist_lab.processes.failures import Failure, causes, collect, ranks_in_words
from dist_lab.processes.meeting_place import meeting_place
from dist_lab.processes.report import report
from dist_lab.programs.serve import settings
from dist_lab.programs.serve.settings import Serve

if TYPE_CHECKING:
    from dist_lab.programs.serve.http import HttpThread

BODY = "dist_lab.programs.serve.worker:serve_model"
LONGEST_PATH = 100  # bytes: the kernel's limit for Unix sockets is 108 or 104


def main(argv: Sequence[str] | None, description: str | None) -> int:
    """Serve a model. Returns the exit status."""
    try:
        with ranks.interruptible(SIGINT, SIGTERM):
            config = settings.read(argv, description)
            check_installed()
            if launcher.rank_in_environment() is not None:
                raise UserError(
                    "serve.py starts its ranks itself, and torchrun has started this one; start it "
                    "without torchrun, with --nproc"
                )
            with listen(config.host, config.port) as listener, meeting_place() as folder:
                return run(config, listener, folder)
    except ranks.Interrupted as stopped:
        return 128 + stopped.signal
    except (UserError, MachineError) as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
        return error.exit_status


def run(config: Serve, listener: socket.socket, folder: str) -> int:
    """Serve until a signal comes or a rank fails. All ranks have ended then."""
    from dist_lab.programs.serve.http import HttpThread
    from dist_lab.programs.serve.refused import Refused

    size, path = config.nproc or 1, f"{folder}/router"
    if len(path.encode()) > LONGEST_PATH:
        raise MachineError(
            f"the path of a socket, {path!r}, is longer than {LONGEST_PATH} bytes; set TMPDIR to a "
            "shorter one"
        )
    launcher.tell(f"serve.py: starting {size} ranks, which import torch ...")
    http = HttpThread(config, listener, path)
    http.start()
    preload = [*ranks.PRELOAD, BODY.partition(":")[0]]
    started: list[ranks.Rank] = []
    try:
        with blocked(SIGTERM):
            for rank in range(size):
                arguments = size, f"{folder}/rendezvous", replace(config, line=path), BODY
                started.append(ranks.start(rank, launcher.new_rank, *arguments, preload=preload))
        try:
            _, failures, running = collect(started)
        except ranks.Interrupted:
            if not http.ready:
                raise
            print(
                f"serve.py: stopping; texts may go on for {config.stop_seconds:g} s, and Ctrl-C "
                "ends them now", file=sys.stderr, flush=True,
            )  # fmt: skip
            http.end(Refused(503, "the server is stopping; ask again later"), config.stop_seconds)
            _, failures, running = collect(started)
        if all(failure.distance for failure in failures):  # none failed by itself: one hangs
            launcher.show_stacks(running)
    finally:
        http.end(Refused(500, "the server has failed; start it again"), 0)
        ranks.stop(started, grace=0.0)  # ranks have nothing to save
        http.join()
    if http.error is not None:
        raise http.error
    return tell_failures(failures, size, http, config.debug) if failures else 0


@contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal inside the block. Processes that are started there block it for good.

    A service manager sends SIGTERM to all processes of a service. Ranks must not end by it, because
    texts may go on. This process gets the signal when the block ends.
    """
    resource_tracker.ensure_running()  # its start would unblock SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def tell_failures(failures: Sequence[Failure], size: int, http: "HttpThread", debug: bool) -> int:
    """Print why the server has ended. Returns the exit status."""
    first = causes(failures)[0]
    refused = first.refused and not http.ready  # it has never served, and no rank is to blame
    if refused or debug or (first.details and not first.refused):
        status = report("serve.py", failures, size, debug)
    else:
        status = max(failure.status for failure in causes(failures))
    if not refused:
        who = ranks_in_words([f.rank for f in causes(failures) if f.summary == first.summary])
        print(
            f"serve.py: error: {who} of {size}: {first.summary}; the server has ended, and "
            f"{http.cut} open texts got an error", file=sys.stderr,
        )  # fmt: skip
    return status


def check_installed() -> None:
    """Raise UserError if the extra `serve` is not installed."""
    needed = ("starlette", "uvicorn", "pydantic")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"serve.py needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed; type pip install 'dist_lab[serve]'"
        )


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address.

    Raises:
        UserError: there is no such address.
        MachineError: the port is in use, or may not be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UserError(
            f"host {shown(host)} is no address of this machine (--host); give 127.0.0.1, or "
            "0.0.0.0 for all of its addresses"
        ) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise MachineError(
            f"cannot listen at port {port} of {host}: {error.strerror} (--port); give another "
            "--port, or 0 for any that is free"
        ) from None
    return listener
