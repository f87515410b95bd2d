"""Processes of this machine as the kernel shows them in /proc, and waiting for them."""

import os
import time
from collections.abc import Callable
from pathlib import Path

YIELD_TIME = 2e-4  # seconds for which a wait yields to other processes, before it sleeps
CHECK_INTERVAL = 0.1  # seconds between two looks at the late ranks


def state(process: int) -> str:
    """Returns the kernel's letter for a process, such as R, S or T (stopped); "" without one."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def alive(process: int) -> bool:
    """Returns whether a process runs on this machine. A zombie does not run."""
    return state(process) not in ("", "Z", "X")


def stopped(process: int) -> bool:
    """Returns whether a signal (SIGSTOP) or a debugger has stopped the process."""
    return state(process) in ("T", "t")


def wait_until(
    late: Callable[[], list[int]], timeout: float, look: Callable[[list[int]], None]
) -> list[int]:
    """Wait until no rank is late. Returns those that still are after `timeout` seconds.

    Calls `look(late ranks)` from time to time, which may raise.
    """
    began = checked = time.monotonic()
    while ranks := late():
        now = time.monotonic()
        if now - began < YIELD_TIME:
            os.sched_yield()  # with more ranks than cores, a late rank needs this core
            continue
        if now - checked > CHECK_INTERVAL:
            checked = now
            look(ranks)
        if now - began > timeout:
            return ranks
        time.sleep(min((now - began) / 10, 1e-3))
    return []
