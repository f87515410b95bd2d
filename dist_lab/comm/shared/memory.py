"""Memory that all ranks of one machine map, so that a collective on it needs no message.

    flat = ops.shared_buffer(length, torch.float32, axis)    on every rank, in the same order
    ops.all_reduce_into(flat, axis).wait()                   sums it in place

Each rank's shared buffer is a file in memory, which the other ranks map as well. The collectives on
such buffers are in `collectives`. Such memory is called symmetric in OpenSHMEM, and a shared
window in MPI-3 (Hoefler et al. 2013, "MPI + MPI: a new hybrid approach to parallel programming").

[Note: barriers] A rank must not read before all ranks have written, nor write again before all have
read. So each file begins with two counters, which its owner alone writes and every rank reads: the
number of collectives on this buffer at which the owner has arrived, and the number from which it
has departed. A rank arrives when it calls a collective, its own data being in place, and `wait()`
waits until the others have arrived. It departs when it has read what it needs, and goes on. Before
its owner writes to a buffer again, it waits until the others have departed
(`ops.wait_for_readers`). A collective of one byte would do the same, but it wakes every rank
several times: for 4 ranks on 2 cores that took 1 ms, the counters take 0.01 to 0.1 ms.

A barrier does not notice when a connection breaks. So it checks from time to time whether the ranks
that are late are still alive, and it ends at the time limit of the mesh.
"""

import mmap
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# NumPy arrays, because other ranks' memory must not be counted as this rank's: observe/memory.py.
Array = npt.NDArray[Any]
SUMMED = {torch.float32: np.float32, torch.float64: np.float64}
# NumPy has no bfloat16. It copies 16-bit numbers; messages sum them.
TYPES = SUMMED | {torch.bfloat16: np.int16, torch.float16: np.int16}
FOLDER = Path("/dev/shm")  # files that live in memory: Linux
HEADER = 64  # bytes before the data: the counters, alone in their cache line
ARRIVED, DEPARTED = 0, 1  # the counters
YIELDING = 2e-4  # seconds for which a barrier only yields to other processes, before it sleeps
LOOK = 0.1  # seconds between two checks whether the late ranks are alive


class Memory(NamedTuple):
    """One rank's file: the counters, the data, and the process that made it."""

    counters: memoryview
    data: Array
    process: int


class SharedWindow:
    """One shared buffer: every rank's memory, in order of position, and the barriers between them.

    Attributes:
        ranks: global, for messages, and to recognise the axis.
        limit: seconds that a barrier may take.
        call: the last collective on this buffer, as `calls` names it.
    """

    def __init__(
        self, everyone: Sequence[Memory], index: int, ranks: tuple[int, ...], limit: float
    ) -> None:
        self.everyone, self.index, self.ranks = list(everyone), index, ranks
        self.arrays = [memory.data for memory in everyone]
        self.limit = limit
        self.call: Any = None
        # A process of another PID namespace looks dead from here, and is never reported as dead.
        self.visible = [alive(memory.process) for memory in everyone]
        self._counters = everyone[index].counters
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.everyone)

    def arrive(self) -> int:
        """Tell that this rank's data is in place for the next collective; returns its number."""
        self.fence()
        self._counters[ARRIVED] += 1
        return self._counters[ARRIVED]

    def depart(self, number: int) -> None:
        """Tell that this rank has read and written all it had to in other ranks' memory."""
        assert self._counters[DEPARTED] == number - 1, (
            "collectives on one shared buffer: wait in their order"
        )
        self.fence()
        self._counters[DEPARTED] = number

    @property
    def in_use(self) -> bool:
        """Whether this rank has begun a collective that it has not waited for."""
        return self._counters[DEPARTED] != self._counters[ARRIVED]

    def last(self) -> int:
        """The number of the last collective at which this rank has arrived."""
        return self._counters[ARRIVED]

    def late(self, counter: int, number: int) -> list[int]:
        """Positions of the ranks whose counter is below the number."""
        return [i for i, m in enumerate(self.everyone) if m.counters[counter] < number]

    def fence(self) -> None:
        """Memory fence: all reads and writes before it come before all those after it.

        x86 keeps that order where it matters, arm does not. To release a lock and take it again
        does so everywhere: what is before the release stays before what is after the acquisition.
        """
        for _ in range(2):
            with self._lock:
                pass


@dataclass(frozen=True)
class Barrier:
    """A wait until the counter of every rank has reached a number."""

    window: SharedWindow
    counter: int
    number: int

    def wait(self) -> None:
        """Raises RuntimeError if a rank has died, or is late at the time limit."""
        window = self.window
        began = looked = time.monotonic()
        while late := window.late(self.counter, self.number):
            now = time.monotonic()
            if now - began < YIELDING:
                os.sched_yield()  # with more ranks than cores, a late rank needs this core
                continue
            if now - looked > LOOK:
                looked = now
                self._look(late)
            if now - began > window.limit:
                self._fail(late, f"not so far after {window.limit:g} s")
            time.sleep(min((now - began) / 10, 1e-3))
        window.fence()

    def _look(self, late: Sequence[int]) -> None:
        window = self.window
        dead = [i for i in late if window.visible[i] and not alive(window.everyone[i].process)]
        if still := [i for i in dead if i in window.late(self.counter, self.number)]:
            self._fail(still, "dead")  # and it did not do its part just before it died

    def _fail(self, late: Sequence[int], how: str) -> None:
        who = ", ".join(str(self.window.ranks[i]) for i in late)
        what = ("come to it", "read what it shares")[self.counter]
        ranks = "ranks" if len(late) > 1 else "rank"
        raise RuntimeError(f"{ranks} {who} did not {what}: {how}")


def as_array(x: Tensor) -> Array:
    """View a contiguous tensor as a NumPy array, of the type that stands for its dtype.

    Not by `x.numpy()`, after which its storage could never be resized again, as FSDP's are. The
    array keeps the tensor alive.
    """
    interface = {
        "data": (x.data_ptr(), False),
        "shape": tuple(x.shape),
        "typestr": np.dtype(TYPES[x.dtype]).str,
        "version": 3,
    }
    return np.asarray(SimpleNamespace(tensor=x, __array_interface__=interface))


# --- files in memory ------------------------------------------------------------------------------


def create(length: int, dtype: torch.dtype) -> Path | None:
    """A new file in memory with room for `length` elements; None if there is no room."""
    if dtype not in TYPES or not FOLDER.is_dir():
        return None
    # The ranks send each other the names, which must all be as long.
    path = FOLDER / f"dist_lab-{os.getpid():010}-{secrets.token_hex(8)}"
    try:
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            # Reserve the room now: at the first write, a lack of it would kill the process.
            os.posix_fallocate(file.fileno(), 0, HEADER + length * dtype.itemsize)
    except OSError:
        path.unlink(missing_ok=True)
        return None
    return path


def attach(path: str, length: int, dtype: torch.dtype) -> Memory | None:
    """Map the file of some rank; None if it is missing, or on another machine."""
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), HEADER + length * dtype.itemsize)
    except (OSError, ValueError):
        return None
    counters = memoryview(memory)[:16].cast("q")
    data = np.frombuffer(memory, TYPES[dtype], length, HEADER)
    return Memory(counters, data, int(Path(path).name.split("-")[1]))


def alive(process: int) -> bool:
    """Whether a process of this machine runs. A zombie does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
