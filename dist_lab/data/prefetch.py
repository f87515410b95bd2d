"""Prefetch: a thread loads the next batch while the current one is used.

Loading a batch reads bytes from a memory map. That is short, but it would delay every step, and it
takes long if the bytes are still on disk. A generator that is not exhausted is closed in the end,
and closing this one ends its thread.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dist_lab.data import Data


def prefetch(
    data: Data, rows: slice, start: int, stop: int
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """Yield `data.batch(step, rows)` for each step of range(start, stop), loading one batch ahead.

    An exception in `data.batch` is raised here, at its step. Python closes a generator when nothing
    refers to it anymore: `for ... in prefetch(...)` may be left at any time, but an iterator that
    is bound to a name needs `contextlib.closing`.
    """
    if start >= stop:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        next_batch = worker.submit(data.batch, start, rows)
        for step in range(start + 1, stop):
            batch = next_batch.result()
            next_batch = worker.submit(data.batch, step, rows)
            yield batch
        yield next_batch.result()
