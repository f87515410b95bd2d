"""Clocks for a trace: a virtual one, on which a step of n tokens takes a + b n, and the wall's.

A step reads all weights once (a), and computes for each token (b). On the virtual clock a race of
policies has no noise: the same trace, a and b give the same numbers, on a busy machine, too.
What it leaves out: attention to long texts, and the time of the policy itself.
"""

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh


@dataclass(frozen=True)
class Cost:
    """The time of a step: a seconds, and b for each token."""

    a: float
    b: float

    def __call__(self, tokens: int) -> float:
        return self.a + self.b * tokens


class Clock(Protocol):
    """Attributes: now: seconds since the start, the same on every rank."""

    now: float

    def step(self, tokens: int) -> None:
        """A step of so many tokens has been computed. Collective."""

    def wait(self, until: float) -> None:
        """Nothing happens until then."""


class Virtual:
    """A clock on which only steps and pauses take time."""

    def __init__(self, cost: Cost) -> None:
        self.now, self._cost = 0.0, cost

    def step(self, tokens: int) -> None:
        self.now += self._cost(tokens)

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


class Wall:
    """The clock of rank 0, which tells all ranks after each step."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._start = time.perf_counter()
        self.now = 0.0

    def step(self, tokens: int) -> None:
        (self.now,) = of_rank_0(self._mesh, time.perf_counter() - self._start)

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, until - self.now))
        self.now = max(self.now, until)


def of_rank_0(mesh: Mesh, *numbers: float) -> list[float]:
    """The numbers that rank 0 has. Collective."""
    row = torch.tensor(numbers, dtype=torch.float64, device=mesh.device)
    agreed: list[float] = ops.broadcast(row, mesh.world).tolist()
    return agreed
