"""Memory that all ranks of one machine see, so that a collective on it needs no message.

    flat = ops.shared_buffer(length, torch.float32, axis)    on every rank, in the same order
    ops.all_reduce_into(flat, axis).wait()                   sums it where it lies

Each rank's buffer is a file in memory, which the others map as well.

    all_reduce        x{U_X} -> x     rank i adds up piece i of everyone's buffer, and writes the
                                      sum into all of them: 2 (N-1)/N S bytes, half of them read
                                      from others' memory and half written to it
    all_gather        x[D_X] -> x     each rank copies from everyone's buffer: (N-1)/N S
    reduce_scatter    x{U_X} -> x[D_X]  rank i adds up row i of everyone's buffer: (N-1)/N S

That is `direct` without the copies of every byte into the kernel and out of it again. Such memory
is called symmetric in OpenSHMEM, and a shared window in MPI-3 (Hoefler et al. 2013, "MPI + MPI: a
new hybrid approach to parallel programming").

[Note: meetings] A rank must not read before all have written, nor write again before all have read.
So each file begins with two counters, which its owner alone sets and all may read: in how many
collectives on this buffer its part has come to be there, and with how many it is done. A rank sets
the first when it calls, and waits for those of the others in `wait()`. It sets the second when it
has read, and goes on; whoever wants to write to a buffer that was read waits for the others' then
(`ops.until_read`). A collective of one byte would do the same. It wakes every rank several times,
which for 4 ranks on 2 cores took 1 ms, the counters 0.01 to 0.1 ms.

Such a wait sees no connection break. It looks from time to time whether the ranks that are late
still live, and ends at the time limit of the mesh.
"""

import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_lab.comm.algorithms import Steps, lengths

# NumPy's arrays, because others' memory is not to be counted as this rank's: see observe/memory.py.
Array = npt.NDArray[Any]
SUMMED = {torch.float32: np.float32, torch.float64: np.float64}
# NumPy has no bfloat16. It copies what has 16 bits, and leaves sums of it to others.
TYPES = SUMMED | {torch.bfloat16: np.int16, torch.float16: np.int16}
FOLDER = Path("/dev/shm")  # files that live in memory: Linux
HEADER = 64  # bytes before the data: the counters, and no other's data in their line of the cache
CAME, DONE = 0, 1  # the counters
BLOCK = 1 << 15  # elements that are added up at once: few enough to stay in the cache meanwhile
YIELDING = 2e-4  # seconds that a wait only gives way to other processes, before it sleeps
LOOK = 0.1  # seconds between two looks whether those that are late are alive


class Memory(NamedTuple):
    """One rank's file: the counters, what follows them, and the process that made it."""

    counters: memoryview
    data: Array
    process: int


class Window:
    """One shared buffer: everyone's memory, in order of position, and who is how far in using it.

    Attributes:
        ranks: global, for messages, and to know the axis by.
        call: the last collective on it, as `calls` names it.
    """

    def __init__(self, everyone: Sequence[Memory], index: int, ranks: tuple[int, ...]) -> None:
        self.everyone, self.index, self.ranks = list(everyone), index, ranks
        self.arrays = [memory.data for memory in everyone]
        self.call: Any = None
        # On another machine, or behind another count of processes, it would look dead from here.
        self.visible = [alive(memory.process) for memory in everyone]
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.everyone)

    def come(self) -> int:
        """This rank's part is there, for the next collective. Returns its number."""
        own = self.everyone[self.index].counters
        self.in_order()
        own[CAME] += 1
        return own[CAME]

    def done(self, number: int) -> None:
        """This rank has read from others, and written to them, what it had to."""
        own = self.everyone[self.index].counters
        assert own[DONE] == number - 1, "collectives on one shared buffer: wait in their order"
        self.in_order()
        own[DONE] = number

    @property
    def in_use(self) -> bool:
        """A collective on it was begun that this rank has not waited for."""
        own = self.everyone[self.index].counters
        return own[DONE] != own[CAME]

    def last(self) -> int:
        """The number of the last collective that this rank has come to."""
        return self.everyone[self.index].counters[CAME]

    def late(self, counter: int, number: int) -> list[int]:
        """Positions of the ranks that are not so far yet."""
        return [i for i, m in enumerate(self.everyone) if m.counters[counter] < number]

    def in_order(self) -> None:
        """All that was read and written before this comes before all that is after it.

        x86 keeps that order where it matters, arm does not. Letting go of a lock and then taking it
        does everywhere: what is before the first stays before what is after the second.
        """
        for _ in range(2):
            with self._lock:
                pass


@dataclass(frozen=True)
class Until:
    """A wait until the counter of every rank has reached a number. `limit` is in seconds."""

    window: Window
    counter: int
    number: int
    limit: float

    def wait(self) -> None:
        """Raises RuntimeError if a rank has died, or is not there in time."""
        began = looked = time.monotonic()
        while late := self.window.late(self.counter, self.number):
            now = time.monotonic()
            if now - began < YIELDING:
                os.sched_yield()  # with more ranks than cores, the one to wait for needs this one
                continue
            if now - looked > LOOK:
                looked = now
                self._look(late)
            if now - began > self.limit:
                self._fail(late, f"not so far after {self.limit:g} s")
            time.sleep(min((now - began) / 10, 1e-3))
        self.window.in_order()

    def _look(self, late: Sequence[int]) -> None:
        window = self.window
        dead = [i for i in late if window.visible[i] and not alive(window.everyone[i].process)]
        if still := [i for i in dead if i in window.late(self.counter, self.number)]:
            self._fail(still, "dead")  # and had not done its part just before

    def _fail(self, late: Sequence[int], how: str) -> None:
        who = ", ".join(str(self.window.ranks[i]) for i in late)
        what = ("come to it", "read what it shares")[self.counter]
        ranks = "ranks" if len(late) > 1 else "rank"
        raise RuntimeError(f"{ranks} {who} did not {what}: {how}")


def shared_all_reduce(window: Window, limit: float, moved: Callable[[int], None]) -> Steps:
    """Ranks are added up in one order: all get the same bits.

    Args:
        limit: seconds for every wait.
        moved: is told how many bytes were read from others' memory, and written to it.
    """
    number = window.come()
    # Who is done with the one before does not read any more what is overwritten here.
    yield [Until(window, CAME, number, limit), Until(window, DONE, number - 1, limit)]
    n, i, arrays = window.size, window.index, window.arrays
    own = lengths(len(arrays[i]), n)
    first = sum(own[:i])
    for start in range(first, first + own[i], BLOCK):
        blocks = [array[start : min(start + BLOCK, first + own[i])] for array in arrays]
        total = add_up(blocks)
        for block in blocks:
            block[:] = total
    moved(shared_sent(n, i, len(arrays[i])) * arrays[i].itemsize)
    window.done(number)
    yield [Until(window, DONE, number, limit)]  # now everyone's sums are there


def shared_sent(n: int, i: int, length: int) -> int:
    """Elements that rank i reads from others' memory and writes to it, in an all_reduce."""
    return 2 * (n - 1) * lengths(length, n)[i]


def shared_all_gather(
    outs: Sequence[Tensor], window: Window, limit: float, moved: Callable[[int], None]
) -> Steps:
    """Row j of each of `outs`, (size, length_k), gets its part of rank j's buffer."""
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    into = [as_array(out) for out in outs]
    for j, array in enumerate(window.arrays):
        first = 0
        for out in into:
            out[j] = array[first : first + out.shape[1]]
            first += out.shape[1]
    moved((window.size - 1) * window.arrays[0].nbytes)
    window.done(number)


def shared_all_gather_in_place(window: Window, limit: float, moved: Callable[[int], None]) -> Steps:
    """Row j of this rank's buffer, of `size` rows, gets row j of rank j's."""
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    rows = [array.reshape(window.size, -1) for array in window.arrays]
    for j, theirs in enumerate(rows):
        if j != window.index:
            rows[window.index][j] = theirs[j]
    moved((window.size - 1) * rows[0][0].nbytes)
    window.done(number)


def shared_reduce_scatter(
    out: Tensor, window: Window, limit: float, moved: Callable[[int], None]
) -> Steps:
    """out, flat, of any dtype, gets the sum of everyone's piece `index`, in order of the ranks."""
    number = window.come()
    yield [Until(window, CAME, number, limit)]
    first = window.index * len(out)
    parts = [array[first : first + len(out)] for array in window.arrays]
    into = as_array(out) if SUMMED.get(out.dtype) == parts[0].dtype else None
    if into is not None and np.may_share_memory(into, parts[window.index]):
        into = None  # in place: a part must not be overwritten before it has been added
    spare = np.empty(min(BLOCK, len(out)) if into is None else 0, parts[0].dtype)
    cast = torch.from_numpy(spare)
    for start in range(0, len(out), BLOCK):
        blocks = [part[start : start + BLOCK] for part in parts]
        if into is not None:
            add_up(blocks, into[start : start + BLOCK])
        else:
            count = len(blocks[0])
            add_up(blocks, spare[:count])
            out.data[start : start + count].copy_(cast[:count])
    moved((window.size - 1) * parts[0].nbytes)
    window.done(number)


def add_up(blocks: Sequence[Array], into: Array | None = None) -> Array:
    total: Array = np.add(blocks[0], blocks[1], out=into)
    for block in blocks[2:]:
        total += block
    return total


class At:
    """Where a contiguous tensor lies, as NumPy asks for it. Holds on to the tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.__array_interface__ = {
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "typestr": np.dtype(TYPES[x.dtype]).str,
            "version": 3,
        }


def as_array(x: Tensor) -> Array:
    """A tensor as an array of the type that stands for its dtype here, on the same memory.

    Not by `x.numpy()`, after which its storage could never again be resized, as FSDP's are.
    """
    return np.asarray(At(x))


# --- files in memory ------------------------------------------------------------------------------


def create(length: int, dtype: torch.dtype) -> Path | None:
    """A new file in memory with room for so many elements; None if there cannot be one."""
    if dtype not in TYPES or not FOLDER.is_dir():
        return None
    path = FOLDER / f"dist_lab-{os.getpid():010}-{secrets.token_hex(8)}"  # all names are as long
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        # Now, and not at the first write, where no room would be the end of the process.
        os.posix_fallocate(file, 0, HEADER + length * dtype.itemsize)
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(file)
    return path


def attach(path: str, length: int, dtype: torch.dtype) -> Memory | None:
    """The file of some rank; None if it is not there, or on another machine."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        memory = mmap.mmap(file, HEADER + length * dtype.itemsize)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    counters = memoryview(memory)[:16].cast("q")
    data = np.frombuffer(memory, TYPES[dtype], length, HEADER)
    return Memory(counters, data, int(Path(path).name.split("-")[1]))


def alive(process: int) -> bool:
    """Whether a process of this machine is there, and has not ended without being buried."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
