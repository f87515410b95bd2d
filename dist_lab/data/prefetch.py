"""The next batch, made in a thread while this one is used.

Making a batch gathers bytes from a memory map: short, but it would stand in the way of every step,
and be long where the bytes are still on disk. A generator that is left early is closed, and closing
this one ends its thread.
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
    """Yield `data.batch(step, rows)` for every step of range(start, stop), always one ahead.

    What `data.batch` raises is raised here, at the step it belongs to. Python closes a generator
    when nothing refers to it anymore: `for ... in prefetch(...)` may be left at any time, and an
    iterator bound to a name wants `contextlib.closing`.
    """
    if start >= stop:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as worker:
        coming = worker.submit(data.batch, start, rows)
        for step in range(start + 1, stop):
            ready = coming.result()
            coming = worker.submit(data.batch, step, rows)
            yield ready
        yield coming.result()
