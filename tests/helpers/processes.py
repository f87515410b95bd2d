"""Finds processes and sockets that a program left behind. Linux only: it reads /proc."""

import time
from pathlib import Path


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
