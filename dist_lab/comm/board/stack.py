"""The Python line at which another rank is now, without stopping it.

A rank that answers has a file in memory for its stacks. On SIGUSR2 faulthandler writes the stack of
the main thread to it, from a signal handler in C: this needs no GIL, and works inside C code. A
rank that is stopped writes nothing. A signal that a process does not expect would end it, so we
first look into /proc whether the process has this file, and catches the signal.
"""

import faulthandler
import fcntl
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dist_lab.comm.board.board import Board
from dist_lab.comm.board.page import STACK, Page

NAME = "dist_lab-stack"
SIGNAL = signal.SIGUSR2
FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
LIBRARIES = re.compile(r"/(?:site|dist)-packages/|/lib/python3[^/]*/|^<")
OURS, IN_COMM = "/dist_lab/", "/dist_lab/comm/"
LARGE = 1 << 20  # bytes of old stacks, from which on they are thrown away
PATIENCE = 0.15  # seconds for an answer
QUIET = 0.006  # seconds without another byte, after which an answer is complete


@contextmanager
def answering(board: Board | None) -> Iterator[None]:
    """Inside the block this process answers. Only programs do this: it takes over a signal.

    An exception that leaves the block marks the rank as failed.
    """
    if board is None:
        yield
        return
    file = os.memfd_create(NAME)
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)  # each stack goes to the end, also if we truncate
    faulthandler.register(SIGNAL, file, all_threads=False)
    board.page.set(STACK, file)
    try:
        yield
    except BaseException:
        board.failed()
        raise
    finally:
        board.page.set(STACK, 0)
        faulthandler.unregister(SIGNAL)
        signal.signal(SIGNAL, signal.SIG_IGN)  # for a signal that is on its way
        os.close(file)


def lines_now(pages: Mapping[int, Page]) -> dict[int, str]:
    """Returns rank -> file:line and function, of the ranks that answer."""
    files: dict[int, int] = {}
    sizes: dict[int, int] = {}
    try:
        for rank, page in pages.items():
            if (file := _ask(page)) is not None:
                files[rank] = file
                sizes[rank] = os.fstat(file).st_size
                _signal(page)
        frames = _answers(files, sizes)
    finally:
        for file in files.values():
            os.close(file)
    return {rank: innermost(text) for rank, text in frames.items() if text}


def innermost(stack: str) -> str:
    """Returns the line of a stack that is the user's, or dist_lab's outside its collectives.

    >>> innermost('  File "/lib/python3/queue.py", line 3 in get\\n  File "/a/b.py", line 7 in f')
    'b.py:7 in f'
    """
    frames = FRAME.findall(stack)
    own = [f for f in frames if OURS in f[0] or not LIBRARIES.search(f[0])]
    best = [f for f in own if IN_COMM not in f[0]] or own or frames
    return "".join(f"{Path(file).name}:{line} in {name}" for file, line, name in best[:1])


def _ask(page: Page) -> int | None:
    """Opens the file of a rank that will answer. None if it will not."""
    who, number = page.identity(), page.get(STACK)
    if who is None or not number:
        return None
    path = f"/proc/{who.process}/fd/{number}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME}") or not _catches(who.process):
            return None
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None


def _catches(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (SIGNAL - 1) & 1)


def _signal(page: Page) -> None:
    who = page.identity()
    assert who is not None
    os.kill(who.process, SIGNAL)


def _answers(files: Mapping[int, int], sizes: dict[int, int]) -> dict[int, str]:
    """Reads what was added to each file, once all are complete or the time is over."""
    began = changed = time.monotonic()
    before, now = dict(sizes), dict(sizes)
    while time.monotonic() - began < PATIENCE:
        now = {rank: os.fstat(file).st_size for rank, file in files.items()}
        if now != before:
            before, changed = now, time.monotonic()
        elif all(now[r] > sizes[r] for r in now) and time.monotonic() - changed > QUIET:
            break
        time.sleep(1e-3)
    texts = {
        rank: os.pread(file, now[rank] - sizes[rank], sizes[rank]).decode(errors="replace")
        for rank, file in files.items()
    }
    for rank, file in files.items():
        if now[rank] > LARGE:
            os.ftruncate(file, 0)
    return texts
