"""Clocks of ranks, aligned: processes of one machine share one, machines are compared by messages.

time.perf_counter reads CLOCK_MONOTONIC on Linux, which counts from the start of the kernel. So all
processes of a machine read the same number at the same moment. Between two machines rank 0 answers
questions: a rank sends one, rank 0 replies with its time t, and that took from a to b on the clock
of the asking rank. If both messages take equally long, t was read at (a + b) / 2. The error is at
most half of b - a, so the quickest of some questions counts (Cristian 1989, "Probabilistic clock
synchronization", section 3).
"""

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh

QUESTIONS = 20
BOOT = Path("/proc/sys/kernel/random/boot_id")  # differs between kernels, and so between clocks


def machine() -> str:
    """Returns a name that two processes share only if they share a clock."""
    with suppress(OSError):
        return f"{platform.node()} {BOOT.read_text(encoding='ascii').strip()[:8]}"
    return platform.node()


def offset(
    mesh: Mesh, *, on: str | None = None, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the seconds to add to this rank's clock to get rank 0's. Collective.

    Args:
        on: the name of this rank's machine.
        clock: returns seconds.
    """
    names = ops.all_gather_bytes((on or machine()).encode(), mesh.world)
    asking = sorted({names.index(name) for name in names} - {0})  # the first rank of each machine
    own = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    for rank in asking:
        if mesh.rank == 0:
            _answer(mesh, rank, clock)
        elif mesh.rank == rank:
            own[0] = _ask(mesh, clock)
    if not asking:
        return 0.0
    return float(ops.all_gather(own, mesh.world)[names.index(names[mesh.rank])])


def _answer(mesh: Mesh, rank: int, clock: Callable[[], float]) -> None:
    for _ in range(QUESTIONS):
        _receive(mesh, rank)
        _send(mesh, rank, clock())


def _ask(mesh: Mesh, clock: Callable[[], float]) -> float:
    answers = []
    for _ in range(QUESTIONS):
        began = clock()
        _send(mesh, 0, began)
        there = _receive(mesh, 0)
        ended = clock()
        answers.append((ended - began, there - (began + ended) / 2))
    return min(answers)[1]


def _send(mesh: Mesh, rank: int, moment: float) -> None:
    number = torch.tensor([moment], dtype=torch.float64, device=mesh.device)
    for pending in ops.exchange([(number, rank)], [], mesh.world):
        pending.wait()


def _receive(mesh: Mesh, rank: int) -> float:
    number = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    (pending,) = ops.exchange([], [(number, rank)], mesh.world)
    return float(pending.wait())
