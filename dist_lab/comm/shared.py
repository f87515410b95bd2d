"""Memory that all ranks of one machine see, so that a sum over them needs no message.

    flat = ops.shared_buffer(length, torch.float32, axis)    on every rank, in the same order
    ops.all_reduce_into(flat, axis).wait()                   sums it where it lies

Each rank's buffer is a file in memory, which the others map as well. To sum, rank i adds up piece i
of everyone's buffer, and writes the sum into all of them:

    x{U_X} -> x, 2 meetings; 2 (N-1)/N S bytes, half read from others' memory and half written to it

That is `direct_all_reduce` without the copies of every byte into the kernel and out of it again.
The meetings, before and after, are collectives of one byte, so that a rank which is lost is an
error here as everywhere. Such memory is called symmetric in OpenSHMEM, and a shared window in MPI-3
(Hoefler et al. 2013, "MPI + MPI: a new hybrid approach to parallel programming").
"""

import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dist_lab.comm.algorithms import Steps, Work, lengths

# NumPy's arrays, because others' memory is not to be counted as this rank's: see observe/memory.py.
Array = npt.NDArray[np.floating]
TYPES = {torch.float32: np.float32, torch.float64: np.float64}
FOLDER = Path("/dev/shm")  # files that live in memory: Linux
BLOCK = 1 << 15  # elements that are added up at once: few enough to stay in the cache meanwhile


class Meeting(Protocol):
    """What the sum sees of the other ranks."""

    @property
    def size(self) -> int: ...
    @property
    def index(self) -> int: ...
    def meet(self) -> list[Work]:
        """What to wait for until all ranks are here."""
        ...

    def moved(self, count: int) -> None:
        """So many bytes were read from others' memory, or written to it."""
        ...


def shared_all_reduce(post: Meeting, everyone: Sequence[Array]) -> Steps:
    """See the top of the file. Ranks are added up in one order: all get the same bits.

    Args:
        everyone: the buffers of all ranks, flat, in order of position.
    """
    n, i = post.size, post.index
    yield post.meet()  # now everyone's part is there
    own = lengths(len(everyone[i]), n)
    first = sum(own[:i])
    for start in range(first, first + own[i], BLOCK):
        blocks = [array[start : min(start + BLOCK, first + own[i])] for array in everyone]
        total = blocks[0] + blocks[1]
        for block in blocks[2:]:
            total += block
        for block in blocks:
            block[:] = total
    post.moved(shared_sent(n, i, len(everyone[i])) * everyone[i].itemsize)
    yield post.meet()  # now everyone's sums are there


def shared_sent(n: int, i: int, length: int) -> int:
    """Elements that rank i reads from others' memory and writes to it."""
    return 2 * (n - 1) * lengths(length, n)[i]


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
        os.posix_fallocate(file, 0, max(1, length) * dtype.itemsize)
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(file)
    return path


def attach(path: str, length: int, dtype: torch.dtype) -> Array | None:
    """The file of some rank as an array; None if it is not there, or on another machine."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        memory = mmap.mmap(file, max(1, length) * dtype.itemsize)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return np.frombuffer(memory, TYPES[dtype], length)
