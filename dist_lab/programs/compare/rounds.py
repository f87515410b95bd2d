"""Measure the time of steps, on every rank.

[Note: the time of a step] A step ends when the slowest rank ends it. Each rank records the end of
each step as the time since a barrier before the first step. The maximum over ranks is taken after
the last step. So the measured time has no communication and no waiting except the steps' own, and
ranks may drift apart within a block, as in a real run.
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
    """Returns the seconds of each step on the slowest rank; see [Note: the time of a step].

    Args:
        alone: only rank 0 has work. There is a barrier after each step, outside the measured time,
            so that the other ranks do not wait until they time out.
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
        own_ends = torch.tensor(ends, dtype=torch.float64, device=axis.device)
        last_ends = ops.all_reduce(own_ends, axis, "max").tolist()
    return [after - before for before, after in pairwise([0.0, *last_ends])]


def barrier(axis: Axis) -> None:
    """Wait until all ranks have called this."""
    with axis.comm.label("measure"):
        ops.all_reduce(torch.zeros(1, device=axis.device), axis, algorithm="backend")
