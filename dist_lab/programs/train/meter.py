"""The meter of a training loop: seconds, bytes, memory and floating-point operations of its steps.

Memory and operations are measured in the first steps only. Measuring slows those steps down, so the
times do not include them.

[Note: libraries] A library's strategy waits inside the library, where the ledger does not see it.
So the work of its ranks is not known, and not compared (observe/stragglers.py).
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.ledger import Tally, formula_bytes
from dist_lab.job import Job
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import flops, memory, memory_series
from dist_lab.observe.report.folder import FORMAT
from dist_lab.observe.stragglers import Stragglers
from dist_lab.programs.cli.config import Config

MOST_STEPS = 2000  # whose times are in summary.json
WARM_UP = 2  # first steps, measured for memory and FLOPs and left out of the medians
NOT_COMPARED: dict[str, Any] = {"ranks": None, "stage_work_ms": None, "slow_ranks": []}


class Meter:
    """Times steps, and counts their bytes, memory and floating-point operations."""

    def __init__(
        self, job: Job, optimizer: torch.optim.Optimizer, first: int = 0, *, watch: bool = True
    ) -> None:
        """
        Args:
            first: the number of steps that were taken before.
            watch: look for slow ranks, which takes a small all-gather every few steps.
        """
        self.job, self.optimizer, self.first = job, optimizer, first
        self.steps: list[tuple[float, Tally]] = []  # (seconds, traffic) of every step
        self.traffic: dict[tuple[str, str, str], Tally] = {}  # of the last step, as in the ledger
        self.reported = 0
        self.memory = memory.NOTHING  # the largest of the measured steps
        self.series: memory_series.Entry = {}  # that step's bytes over time
        self.flops_per_step = self.model_flops_per_step = 0.0  # summed over all ranks
        watch = watch and not job.about  # see [Note: libraries]
        self.stragglers = Stragglers(job.mesh) if watch else None
        self.news: list[str] = []  # about the last step

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures one step."""
        step, ledger = len(self.steps) + 1, self.job.mesh.comm.ledger
        before, by_before, began = ledger.total, dict(ledger.by), time.perf_counter()
        with ExitStack() as measurements:
            if step <= WARM_UP:
                live = measurements.enter_context(memory.measured(self.job, self.optimizer))
            if step == 1:
                count = measurements.enter_context(flops.counted(self.job.model))
            yield
        self.steps.append((time.perf_counter() - began, ledger.total - before))
        changes = {key: tally - by_before.get(key, Tally()) for key, tally in ledger.by.items()}
        self.traffic = {key: tally for key, tally in changes.items() if tally.calls}
        if step <= WARM_UP:
            peak, comm = live.by_kind(), self.job.mesh.comm
            if peak.total > self.memory.total:
                self.series = memory_series.of_rank(
                    live, rank=comm.rank, place=comm.place, step=self.first + step
                )
            self.memory = self.memory.worst(peak)
        if step == 1:
            local = torch.tensor([count.total, count.model])
            total, of_model = sum_over_ranks(local, self.job.mesh).tolist()
            self.flops_per_step, self.model_flops_per_step = float(total), float(of_model)
        if step > WARM_UP and self.stragglers is not None:
            seconds, traffic = self.steps[-1]
            self.news = self.stragglers.after_step(self.first + step, seconds, traffic.blocked)

    def since_last_row(self, samples: int, tokens: int | None) -> dict[str, float]:
        """Returns the fields of a row: means over the steps since the last row.

        The slow warm-up steps count only if there are no others. `tokens` is None for images.
        """
        start, self.reported = self.reported, len(self.steps)
        recent = self.steps[max(start, WARM_UP) :] or self.steps[start:]
        seconds = statistics.fmean(s for s, _ in recent)
        return {
            "step_ms": seconds * 1e3,
            **rates(samples, tokens, seconds),
            "comm_payload_bytes": recent[-1][1].payload,
            "comm_sent_bytes": recent[-1][1].sent,
            "comm_ms": statistics.fmean(t.blocked for _, t in recent) * 1e3,
            "peak_memory_bytes": self.memory.total,
            **(self.stragglers.now() if self.stragglers else {}),
        }

    def memory_over_time(self) -> dict[str, Any]:
        """Returns memory.json: see observe/memory_series.py. Collective."""
        entries = memory_series.gather(self.series, self.job.mesh)
        return memory_series.document("measured", entries)

    def summary(self, config: Config, tokens: int | None) -> dict[str, Any]:
        """Returns medians over the steps after the warm-up, and the MFU. Collective."""
        steady = self.steps[WARM_UP:] or self.steps
        seconds = statistics.median(s for s, _ in steady)
        peak = peak_rate(config.dtype, self.job.mesh)
        library = bool(self.job.about)  # neither its calls nor its memory are known to us
        return {
            "format": FORMAT,
            "steps": self.first + len(self.steps),
            "step_times_ms": self._step_times(),
            "median": {
                "step_ms": seconds * 1e3,
                **rates(config.batch, tokens, seconds),
                "comm_ms": statistics.median(t.blocked for _, t in steady) * 1e3,
                "comm_payload_bytes": steady[-1][1].payload,
                "comm_sent_bytes": steady[-1][1].sent,
            },
            "peak_memory_bytes": self.memory.total,
            "peak_memory": self.memory.to_dict(),
            "by_layout": None if library else memory.by_layout(self.job, self.optimizer),
            "traffic": None if library else self._traffic(),
            **(self.stragglers.summary() if self.stragglers else NOT_COMPARED),
            "flops_per_step": self.flops_per_step,
            "model_flops_per_step": self.model_flops_per_step,
            "peak_flops_per_s": peak,
            "mfu": flops.utilization(self.model_flops_per_step, seconds, peak),
        }

    def _step_times(self) -> dict[str, Any]:
        """The time of each of the last steps, in ms; the first one's number; the slow warm-up's."""
        recent = self.steps[-MOST_STEPS:]
        first = self.first + len(self.steps) - len(recent) + 1
        warm_up = WARM_UP if len(recent) == len(self.steps) > WARM_UP else 0
        ms = [round(seconds * 1e3, 3) for seconds, _ in recent]
        return {"first_step": first, "warm_up": warm_up, "ms": ms}

    def _traffic(self) -> list[dict[str, Any]]:
        """The last step's collectives of this rank, one row per phase, operation and axis."""
        sizes = self.job.mesh.comm.ledger.sizes
        return [
            {
                "phase": phase, "op": op, "axis": axis, "ranks": sizes[axis], "calls": tally.calls,
                "payload": tally.payload,
                "formula": float(formula_bytes(op, sizes[axis], tally.payload)),
                "due": tally.due, "sent": tally.sent, "blocked_ms": tally.blocked * 1e3,
            }
            for (phase, op, axis), tally in self.traffic.items()
        ]  # fmt: skip


def sum_over_ranks(numbers: Tensor, mesh: Mesh) -> Tensor:
    """Sums measurements over all ranks. The bytes are not a step's traffic. Collective."""
    with mesh.comm.label("measure"):
        return ops.all_reduce(numbers.to(mesh.device), mesh.world)


def peak_rate(dtype: str, mesh: Mesh) -> float:
    """Peak floating-point operations per second of all ranks: observe/flops.py. Collective."""
    sum_over_ranks(torch.zeros(1), mesh)  # a barrier, so that all ranks start together
    return float(sum_over_ranks(flops.calibrate(getattr(torch, dtype), mesh.device), mesh).max())


def rates(samples: int, tokens: int | None, seconds: float) -> dict[str, float]:
    """The throughput of all ranks together."""
    values = {"samples_per_s": samples / seconds}
    return values if tokens is None else values | {"tokens_per_s": tokens / seconds}
