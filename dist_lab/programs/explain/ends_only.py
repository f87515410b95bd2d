"""What ranks exchange in a run without values: the ends of large tensors, and nothing else.

Gradients travel with flags at their end, which tell the parameters that were used; see
[Note: small tensors have values] in shapes_only.py. They arrive as if all ranks had those of this
one. Memory that ranks share is never provided by the kernel, but for these ends.
"""

import mmap
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_lab.comm.shared.memory import FOLDER, HEADER, TYPES, Memory, SharedFiles
from dist_lab.programs.explain.nested import mapped

FLAGS = 1 << 10  # elements at the end of a large vector that have values
# Pages that the kernel provides when they are touched, and does not reserve (0x4000) before.
PAGES = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x4000 if sys.platform == "linux" else 0)


def untouched(length: int) -> mmap.mmap:
    """Memory of so many bytes, of which the kernel provides what is touched."""
    return mmap.mmap(-1, length, flags=PAGES)


def collective(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A collective of torch on large tensors. Returns what torch's fake one returns.

    Args:
        name: of the operation, such as c10d::allreduce_.
    """
    if name == "c10d::_reduce_scatter_base_":
        out, x, *others = args
        ends = x.view(x.numel() // out.numel(), -1)[:, -FLAGS:]
        return func(end(out), ends.reshape(-1), *others, **kwargs)

    def nothing(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty(0, dtype=value.dtype, device="cpu")
        if isinstance(value, list):
            return [nothing(item) for item in value]
        return 0 if type(value) is int else value  # a list of numbers has the lengths of parts

    kinds = Tensor, list
    return func(*mapped(args, kinds, nothing), **mapped(kwargs, kinds, nothing))


def end(array: Any) -> Any:
    """The last elements of an array or tensor, of the last row if it has rows. A view."""
    if not array.ndim:
        return array
    return array[(*[slice(-1, None)] * (array.ndim - 1), slice(-FLAGS, None))]


# --- memory that ranks share ----------------------------------------------------------------------


@contextmanager
def _created(length: int, dtype: torch.dtype) -> Iterator[str]:
    """Yields a text as long as that of a real file, because ranks gather it; "" for no file."""
    exists = dtype in TYPES and FOLDER.is_dir()
    yield f"{os.getpid():010} {0:06} {secrets.token_hex(8)}" if exists else ""


def _attach(where: str, length: int, dtype: torch.dtype) -> Memory | None:
    if not where:
        return None
    memory = untouched(HEADER + length * dtype.itemsize)
    data = np.frombuffer(memory, TYPES[dtype], length, HEADER)
    return Memory(memoryview(memory)[:16].cast("q"), data, os.getpid())


def _move_ends(function: Any, *arrays: Any) -> None:
    function(*mapped(list(arrays), (np.ndarray, Tensor), end))


FILES = SharedFiles(_created, _attach, _move_ends)
