"""Finds processes and sockets that a program left behind. Linux only: it reads /proc."""

import os
import time
from pathlib import Path

from dist_lab.comm.board.proc import alive
from dist_lab.processes.pool import Pool


def with_mark(mark: str) -> list[int]:
    """Return the ids of processes with `mark` in their environment: a program and its children."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
        except OSError:  # a process of another user, or one that has just ended
            continue
    return pids


def all_gone(mark: str, within: float = 15.0) -> bool:
    """Return whether all processes with this mark end within so many seconds."""
    deadline = time.monotonic() + within
    while with_mark(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def descendants(pool: Pool) -> set[int]:
    """Return the processes that tests have started and that run: children, and their children.

    Not those that stay for the next test: multiprocessing's servers, and the ranks of the pool.
    """
    ours = {child for child in children(os.getpid()) if not is_server(child)}
    forked = {pid for child in children(os.getpid()) for pid in children(child)}
    return {pid for pid in ours | forked - pool.processes() if alive(pid)}


def children(pid: int) -> list[int]:
    """Return the children that the main thread of a process has started."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has just ended, or this is another system
        return []
    return [int(word) for word in words]


def is_server(pid: int) -> bool:
    """Whether a child of this process is multiprocessing's forkserver or resource tracker."""
    try:
        return b"multiprocessing." in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def listening(pid: int) -> list[str]:
    """Return the addresses on which a process listens, in hexadecimal: `0100007F:1F90`."""
    open_files = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            open_files.add(str(link.readlink()))
        except OSError:
            continue
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in open_files:
                addresses.append(address)
    return addresses
