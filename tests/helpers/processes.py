"""What a program has left running, seen from outside. Linux only: it reads /proc."""

import time
from pathlib import Path


def with_mark(mark: str) -> list[int]:
    """Processes that have `mark` in their environment: those of one program and its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # another user's, or it has just ended
            continue
    return found


def all_gone(mark: str, within: float = 15.0) -> bool:
    """Whether they all end in so many seconds."""
    deadline = time.monotonic() + within
    while with_mark(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def listening(pid: int) -> list[str]:
    """Addresses on which a process listens, as /proc shows them: hexadecimal, `0100007F:1F90`."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            mine.add(str(link.readlink()))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in mine:
                found.append(address)
    return found
