"""Memory that all ranks of one machine map, so that a collective on it needs no message.

    flat = ops.shared_buffer(length, torch.float32, axis)    on every rank, in the same order
    ops.all_reduce_into(flat, axis).wait()                   sums it in place

Each rank's shared buffer is a file in memory, which the other ranks map as well. It has no name:
they open it as its owner has it open, in /proc. So a rank that is killed at any time leaves nothing
behind. A window is one rank's view of such a buffer: the memory of all ranks, mapped into this
process. `collectives` works on windows. MPI-3 calls this a shared-memory window (Hoefler et al.
2013, "MPI + MPI: a new hybrid approach to parallel programming"), and OpenSHMEM calls it symmetric
memory.

[Note: barriers] A rank must not read before all ranks have written, and must not write again before
all have read. So each file begins with two counters. Its owner alone writes them, and every rank
reads them: the number of collectives on this buffer at which the owner has arrived, and the number
from which it has departed. A rank arrives when it calls a collective, with its data in place.
`wait()` waits until all ranks have arrived. A rank departs when it has read what it needs; it does
not wait for the others. Before it writes to its buffer again, it waits until they have departed
(`ops.wait_for_readers`). A collective of one byte would do the same, but it wakes every rank
several times: with 4 ranks on 2 cores it took 1 ms, and the counters took 0.01 to 0.1 ms.

A barrier does not notice a broken connection. So it checks from time to time whether the late ranks
are still alive, and it gives up at the time limit of the mesh.
"""

import mmap
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_lab.comm.board.proc import alive, wait_until

# Other ranks' memory is in NumPy arrays: observe/memory.py must not count it as this rank's.
Array = npt.NDArray[Any]
SUMMED = {torch.float32: np.float32, torch.float64: np.float64}
# NumPy has no bfloat16. So 16-bit numbers are copied as integers; sums of them use messages.
TYPES = SUMMED | {torch.bfloat16: np.int16, torch.float16: np.int16}
FOLDER = Path("/dev/shm")  # a file system in memory, on Linux
HEADER = 64  # bytes before the data: the counters and the token, alone in their cache line
ARRIVED, DEPARTED = 0, 1  # positions of the counters
TOKEN = slice(16, 32)  # random bytes, by which another rank knows the file


class Memory(NamedTuple):
    """One rank's file, mapped: its counters, its data, and the process that created it."""

    counters: memoryview
    data: Array
    process: int


def at_once(function: Callable[..., object], *arrays: Any) -> object:
    return function(*arrays)


class SharedWindow:
    """A rank's window onto one shared buffer: the memory of all ranks, in order of position.

    Attributes:
        ranks: global ranks, for error messages and to compare with an axis.
        timeout: seconds that a barrier may take.
        move: calls a function that reads and writes the ranks' memory; see `SharedFiles`.
        call: the last collective on this buffer, a `ledger.Call`.
    """

    def __init__(
        self, memories: Sequence[Memory], index: int, ranks: tuple[int, ...], timeout: float,
        move: Callable[..., object] = at_once,
    ) -> None:  # fmt: skip
        self.memories, self.index, self.ranks = list(memories), index, ranks
        self.arrays = [memory.data for memory in memories]
        self.timeout, self.move = timeout, move
        self.call: Any = None
        self._counters = memories[index].counters
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.memories)

    def arrive(self) -> int:
        """Announce that this rank's data is ready for the next collective; returns its number."""
        self.fence()
        self._counters[ARRIVED] += 1
        return self._counters[ARRIVED]

    def depart(self, number: int) -> None:
        """Announce that this rank has finished its reads and writes in other ranks' memory."""
        assert self._counters[DEPARTED] == number - 1, (
            "wait for the collectives on one shared buffer in the order of their calls"
        )
        self.fence()
        self._counters[DEPARTED] = number

    @property
    def in_use(self) -> bool:
        """Whether this rank has launched a collective that it has not waited for."""
        return self._counters[DEPARTED] != self._counters[ARRIVED]

    def last(self) -> int:
        """Returns the number of the last collective at which this rank has arrived."""
        return self._counters[ARRIVED]

    def late(self, counter: int, number: int) -> list[int]:
        """Returns the positions of the ranks whose counter is below the number."""
        return [i for i, m in enumerate(self.memories) if m.counters[counter] < number]

    def fence(self) -> None:
        """Memory fence: all reads and writes before it complete before any after it.

        x86 keeps this order where it matters, arm does not. Releasing a lock and taking it again
        keeps it everywhere: no access moves from before the release to after the acquisition.
        """
        for _ in range(2):
            with self._lock:
                pass


@dataclass(frozen=True)
class Barrier:
    """Waits until a counter of every rank has reached a number."""

    window: SharedWindow
    counter: int
    number: int

    def wait(self) -> None:
        """Raises RuntimeError if a rank has died, or is still late at the time limit."""
        window = self.window
        late = wait_until(
            lambda: window.late(self.counter, self.number), window.timeout, self._check_alive
        )
        if late:
            self._fail(late, f"timed out after {window.timeout:g} s")
        window.fence()

    def _check_alive(self, late: Sequence[int]) -> None:
        window = self.window
        dead = [i for i in late if not alive(window.memories[i].process)]
        # A dead rank is not late if it reached the number just before it died.
        if dead_and_late := [i for i in dead if i in window.late(self.counter, self.number)]:
            self._fail(dead_and_late, "its process has ended")

    def _fail(self, late: Sequence[int], why: str) -> None:
        numbers = ", ".join(str(self.window.ranks[i]) for i in late)
        action = ("call this collective", "finish reading the shared buffer")[self.counter]
        ranks = "ranks" if len(late) > 1 else "rank"
        raise RuntimeError(f"{ranks} {numbers} did not {action}: {why}")


def as_array(x: Tensor) -> Array:
    """Returns a NumPy array that views a contiguous tensor and keeps it alive; dtypes as in TYPES.

    We avoid `x.numpy()`: the storage cannot be resized after it, and FSDP resizes storages.
    """
    interface = {
        "data": (x.data_ptr(), False),
        "shape": tuple(x.shape),
        "typestr": np.dtype(TYPES[x.dtype]).str,
        "version": 3,
    }
    return np.asarray(SimpleNamespace(tensor=x, __array_interface__=interface))


# --- files in memory ------------------------------------------------------------------------------


@contextmanager
def created(length: int, dtype: torch.dtype) -> Iterator[str]:
    """Creates a file in memory with room for `length` elements, and yields where it is open.

    "" if there is no room. After the block the memory is that of the ranks that have attached it.
    """
    file = new_file(HEADER + length * dtype.itemsize) if dtype in TYPES else None
    if file is None:
        yield ""
        return
    with file:
        token = secrets.token_hex(8)
        os.pwrite(file.fileno(), token.encode(), TOKEN.start)
        # All texts have one length, because ranks gather them.
        yield f"{os.getpid():010} {file.fileno():06} {token}"


def new_file(size: int) -> IO[bytes] | None:
    """Returns a file in memory that has no name; None if there is no room for it."""
    if not FOLDER.is_dir():
        return None
    with ExitStack() as unless_ready, suppress(OSError):
        file = unless_ready.enter_context(tempfile.TemporaryFile(dir=FOLDER, prefix="dist_lab-"))
        # Reserve the space now: if a later write finds none, the process is killed.
        os.posix_fallocate(file.fileno(), 0, size)
        unless_ready.pop_all()
        return file
    return None


def attach(where: str, length: int, dtype: torch.dtype) -> Memory | None:
    """Maps a rank's file. None if it is missing, or on another machine."""
    try:
        process, number, token = where.split()
        with open(f"/proc/{int(process)}/fd/{int(number)}", "r+b", buffering=0) as file:
            memory = mmap.mmap(file.fileno(), HEADER + length * dtype.itemsize)
    except (OSError, ValueError):
        return None
    if memory[TOKEN] != token.encode():
        return None
    counters = memoryview(memory)[:16].cast("q")
    data = np.frombuffer(memory, TYPES[dtype], length, HEADER)
    return Memory(counters, data, int(process))


class SharedFiles(NamedTuple):
    """How ranks share memory. A mesh without other ranks has its own: programs/explain.

    Attributes:
        create, attach: the functions of this file.
        move: calls the function of a collective that reads and writes the ranks' memory, with the
            arrays, and lists of arrays, on which it works.
    """

    create: Callable[[int, torch.dtype], AbstractContextManager[str]] = created
    attach: Callable[[str, int, torch.dtype], Memory | None] = attach
    move: Callable[..., object] = at_once
