"""The meter of a training loop: seconds, bytes, memory and floating-point operations of its steps.

The first steps are measured for memory and operations, which makes them slow; so they are left out
of the times.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.ledger import Tally
from dist_lab.job import Job
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import flops, memory
from dist_lab.programs.cli.config import Config

WARM_UP = 2  # steps that are measured for memory and FLOPs, and left out of the medians


class Meter:
    """Times steps, and counts their bytes, memory and floating-point operations."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        self.job, self.optimizer = job, optimizer
        self.steps: list[tuple[float, Tally]] = []  # (seconds, traffic) of every step
        self.reported = 0
        self.memory = memory.NOTHING  # at the worst of the steps that are measured
        self.flops_per_step = 0.0  # of all ranks together

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        ledger = self.job.mesh.comm.ledger
        before, began = ledger.total, time.perf_counter()
        with ExitStack() as measuring:
            if step <= WARM_UP:
                live = measuring.enter_context(memory.measured(self.job, self.optimizer))
            if step == 1:
                count = measuring.enter_context(flops.counter())
            yield
        self.steps.append((time.perf_counter() - began, ledger.total - before))
        if step <= WARM_UP:
            self.memory = self.memory.worst(live.by_kind())
        if step == 1:
            mine = torch.tensor(count.get_total_flops())
            self.flops_per_step = float(sum_over_ranks(mine, self.job.mesh))

    def since_last_row(self, samples: int, tokens: int | None) -> dict[str, float]:
        """The fields of a row, as means over the steps since the last one; images have no tokens.

        Of steps that are slow because they are measured only a row of nothing else is made.
        """
        begin, self.reported = self.reported, len(self.steps)
        window = self.steps[max(begin, WARM_UP) :] or self.steps[begin:]
        seconds = statistics.fmean(s for s, _ in window)
        return {
            "step_ms": seconds * 1e3,
            **rates(samples, tokens, seconds),
            "comm_payload_bytes": window[-1][1].payload,
            "comm_sent_bytes": window[-1][1].sent,
            "comm_ms": statistics.fmean(t.blocked for _, t in window) * 1e3,
            "peak_memory_bytes": self.memory.total,
        }

    def summary(self, config: Config, tokens: int | None) -> dict[str, Any]:
        """Medians over the steps after the warm-up, and the MFU they amount to. Collective."""
        steady = self.steps[WARM_UP:] or self.steps
        seconds = statistics.median(s for s, _ in steady)
        peak = peak_rate(config.dtype, self.job.mesh)
        return {
            "steps": len(self.steps),
            "median": {
                "step_ms": seconds * 1e3,
                **rates(config.batch, tokens, seconds),
                "comm_ms": statistics.median(t.blocked for _, t in steady) * 1e3,
                "comm_payload_bytes": steady[-1][1].payload,
                "comm_sent_bytes": steady[-1][1].sent,
            },
            "peak_memory_bytes": self.memory.total,
            "peak_memory": self.memory.to_dict(),
            "flops_per_step": self.flops_per_step,
            "peak_flops_per_s": peak,
            "mfu": flops.utilization(self.flops_per_step, seconds, peak),
        }


def sum_over_ranks(numbers: Tensor, mesh: Mesh) -> Tensor:
    """Collective, and no part of what a step sends."""
    with mesh.comm.label("measure"):
        return ops.all_reduce(numbers.to(mesh.device), mesh.world)


def peak_rate(dtype: str, mesh: Mesh) -> float:
    """Floating-point operations a second of all ranks together: observe/flops.py. Collective."""
    sum_over_ranks(torch.zeros(1), mesh)  # now all start together
    return float(sum_over_ranks(flops.calibrate(getattr(torch, dtype), mesh.device), mesh).max())


def rates(samples: int, tokens: int | None, seconds: float) -> dict[str, float]:
    """Throughput of all ranks together."""
    found = {"samples_per_s": samples / seconds}
    return found if tokens is None else found | {"tokens_per_s": tokens / seconds}
