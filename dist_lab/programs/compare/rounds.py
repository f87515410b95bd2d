"""The clock of alternating rounds, on every rank.

[Note: the time of a step] A step is done when the last rank has done it. Every rank notes when it
has done each, counted from where all met before the first; the maximum over ranks is taken after
the last, so that nothing is sent or waited for, while the clock runs, that the step itself does not
send. Ranks may drift apart inside a block as they do in a real run.
"""

import time
from collections.abc import Callable
from itertools import pairwise

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis


def block(
    step: Callable[[], object], steps: int, axis: Axis, *, alone: bool = False
) -> list[float]:
    """Seconds of each of some steps by the slowest rank; see [Note: the time of a step].

    Args:
        alone: only rank 0 has work. The others must not wait for it until they time out, so all
            meet after each step, while no clock runs.
    """
    ends, elapsed = [], 0.0
    barrier(axis)
    for _ in range(steps):
        began = time.perf_counter()
        step()
        elapsed += time.perf_counter() - began
        ends.append(elapsed)
        if alone:
            barrier(axis)
    with axis.comm.label("measure"):
        mine = torch.tensor(ends, dtype=torch.float64, device=axis.device)
        last = ops.all_reduce(mine, axis, "max").tolist()
    return [after - before for before, after in pairwise([0.0, *last])]


def barrier(axis: Axis) -> None:
    """No rank goes on before all are here."""
    with axis.comm.label("measure"):
        ops.all_reduce(torch.zeros(1, device=axis.device), axis, algorithm="backend")
