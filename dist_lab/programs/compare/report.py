"""What a comparison found: a row a strategy, and what follows from it."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from dist_lab.comm.ledger import SHARE_SENT, Call, formula_bytes
from dist_lab.observe.flops import utilization
from dist_lab.programs.compare.ratios import Quartiles, Ratio, ratio

# Final losses that are further apart than this, relatively, are not explained by sums in another
# order. Training amplifies rounding: after 200 steps of the tiny gpt, 4e-7 in float32 and 3e-3 in
# bfloat16 were seen.
TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Traffic:
    """One collective in one step of one rank, in bytes. On the mean over ranks.

    formula: what the published formula says of this payload: see comm/ledger.py.
    """

    collective: str  # "all_reduce dp": the operation, and the axis
    calls: float
    payload: float
    sent: float
    formula: float


@dataclass(frozen=True)
class ContenderRow:
    """One strategy.

    Attributes:
        about: the configuration of a library's strategy.
        processes: those that took part.
        rounds: seconds of each step of each round.
        losses: of every step since the first, warm-up included.
        blocked: seconds that rank 0 waited for others, of each step of the rounds; None: a
            library's own waiting is not counted.
        peak_memory: of the rank that needs most, by kind: at that peak, and at each kind's own.
        traffic: of one step; None, as for `blocked`.
        kernel_bytes: sent in that step by the kernel's count, on the mean over ranks; None where
            nobody counts.
    """

    label: str
    strategy: str
    impl: str
    about: str
    processes: int
    rounds: list[list[float]]
    losses: list[float]
    blocked: list[float] | None
    peak_memory_bytes: int
    peak_memory: dict[str, dict[str, int]]
    flops_per_step: float
    traffic: list[Traffic] | None
    kernel_bytes: float | None

    @cached_property
    def round_seconds(self) -> list[float]:
        """Seconds a step in each round: the median of its steps."""
        return [statistics.median(steps) for steps in self.rounds]

    @cached_property
    def seconds(self) -> Quartiles:
        """Of a step, over the rounds."""
        return Quartiles.of(self.round_seconds)

    @property
    def blocked_seconds(self) -> float | None:
        return None if self.blocked is None else statistics.median(self.blocked)

    def total(self, what: Literal["payload", "sent", "formula"]) -> float | None:
        """Bytes of all collectives of a step together."""
        if self.traffic is None:
            return None
        return sum(getattr(collective, what) for collective in self.traffic)


@dataclass(frozen=True)
class CompareReport:
    """All rows.

    Attributes:
        setting: settings, mesh, threads, cores, versions: what a number needs beside it.
        reference: the label that ratios are to.
        unit: "tokens/s" or "samples/s".
        batch: tokens or samples of a step, over all ranks.
        peak_flops_per_s: of all ranks together.
        refused: label -> why it did not run.
    """

    setting: Mapping[str, Any]
    reference: str
    unit: str
    batch: int
    peak_flops_per_s: float
    rows: list[ContenderRow]
    refused: dict[str, str]

    def ratio(self, row: ContenderRow) -> Ratio | None:
        """How many times as fast as the reference; None for the reference itself."""
        if row.label == self.reference:
            return None
        return ratio(row.round_seconds, self.reference_row.round_seconds)

    @property
    def reference_row(self) -> ContenderRow:
        return next(row for row in self.rows if row.label == self.reference)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.setting["config"]["dtype"]]

    def loss_error(self, row: ContenderRow) -> float:
        """How far its final loss is from the reference's, relative to that."""
        final = self.reference_row.losses[-1]
        return abs(row.losses[-1] - final) / max(abs(final), 1e-300)

    def throughput(self, row: ContenderRow) -> Quartiles:
        """Tokens or samples a second, over the rounds."""
        return Quartiles.of([self.batch / seconds for seconds in row.round_seconds])

    def mfu(self, row: ContenderRow) -> float | None:
        """Model FLOPs utilization; None where it cannot be right: observe/flops.py."""
        return utilization(row.flops_per_step, row.seconds.median, self.peak_flops_per_s)

    def summary(self, row: ContenderRow) -> dict[str, Any]:
        """One row as flat numbers: in milliseconds, bytes, and `unit`."""
        found, rate = self.ratio(row), self.throughput(row)
        blocked = row.blocked_seconds
        return {
            "strategy": row.label,
            "processes": row.processes,
            "step_ms": row.seconds.median * 1e3,
            "step_ms_lower_quartile": row.seconds.low * 1e3,
            "step_ms_upper_quartile": row.seconds.high * 1e3,
            "rounds": len(row.rounds),
            "ratio": found.median if found else 1.0,
            "ratio_low": found.low if found else None,
            "ratio_high": found.high if found else None,
            "ratio_lower_quartile": found.quartiles.low if found else None,
            "ratio_upper_quartile": found.quartiles.high if found else None,
            "verdict": found.verdict if found else "reference",
            self.unit.replace("/", "_per_"): rate.median,
            "mfu": self.mfu(row),
            "blocked_ms": None if blocked is None else blocked * 1e3,
            "payload_bytes": row.total("payload"),
            "sent_bytes": row.total("sent"),
            "formula_bytes": row.total("formula"),
            "kernel_sent_bytes": row.kernel_bytes,
            "peak_memory_bytes": row.peak_memory_bytes,
            "final_loss": row.losses[-1],
            "loss_error": self.loss_error(row),
            "about": row.about,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "setting": dict(self.setting),
            "reference": self.reference,
            "unit": self.unit,
            "batch": self.batch,
            "peak_flops_per_s": self.peak_flops_per_s,
            "loss_tolerance": self.tolerance,
            "strategies": [self.summary(row) for row in self.rows],
            "measured": [asdict(row) for row in self.rows],
            "refused": self.refused,
        }


IN_MEMORY = "in memory"  # that all ranks see: comm/shared/memory.py


def by_collective(calls: Iterable[Call]) -> list[list[Any]]:
    """Calls of one rank, added up: [collective, calls, payload, sent, formula] of each."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for call in calls:
        formula = float(call.payload)  # of a message from one rank to another
        if call.op in SHARE_SENT:
            formula = float(formula_bytes(call.op, call.size, call.payload))
        place = f", {IN_MEMORY}" if call.algorithm == "shared" else ""
        for i, part in enumerate((1, call.payload, call.sent, formula)):
            sums[f"{call.op} {call.axis}{place}"][i] += part
    return [[name, *numbers] for name, numbers in sums.items()]


def mean_of_ranks(ranks: Sequence[list[list[Any]] | None]) -> list[Traffic] | None:
    """`by_collective` of all ranks as one. None if the ranks do not count."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for rank in ranks:
        if rank is None:
            return None
        for name, *numbers in rank:
            sums[name] = [a + b / len(ranks) for a, b in zip(sums[name], numbers, strict=True)]
    return [Traffic(name, *numbers) for name, numbers in sums.items()]
