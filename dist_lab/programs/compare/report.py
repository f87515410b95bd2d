"""The results of a comparison as data: one row per strategy, and the numbers derived from it."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from dist_lab.comm.ledger import Call, formula_bytes
from dist_lab.observe.flops import utilization
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.compare.ratios import Quartiles, Ratio, ratio

# The largest relative difference of final losses that a different order of sums can explain.
# Training amplifies rounding: after 200 steps of the tiny gpt it was 4e-7 in float32 and 3e-3 in
# bfloat16.
TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Traffic:
    """The bytes of one kind of collective in one step of a rank; the mean over ranks.

    formula: the bytes that the published formula gives for this payload: see comm/ledger.py.
    """

    collective: str  # the operation and the axis: "all_reduce dp"
    calls: float
    payload: float
    sent: float
    formula: float


@dataclass(frozen=True)
class ContenderRow:
    """The results of one strategy.

    Attributes:
        mesh, mix: axis -> size, and all strategies on it: "pp x fsdp@hand".
        about: the configuration of a library's strategy.
        processes: the number of ranks that took part.
        rounds: seconds of each step of each round.
        losses: the loss of every step, including warm-up.
        blocked: seconds that rank 0 waited for others in each step of the rounds; None for a
            library's strategy, whose waiting is not counted.
        peak_memory: bytes by kind on the rank that needs most, at its peak and at each kind's peak.
        flops_per_step, model_flops_per_step: of all ranks; the model's are those of the MFU.
        traffic: the collectives of one step; None for a library's strategy.
        kernel_bytes: bytes sent in that step as the kernel counts them, mean over ranks; None
            where the system does not count them.
    """

    label: str
    strategy: str
    impl: str
    mesh: dict[str, int]
    mix: str
    about: str
    processes: int
    rounds: list[list[float]]
    losses: list[float]
    blocked: list[float] | None
    peak_memory_bytes: int
    peak_memory: dict[str, dict[str, int]]
    flops_per_step: float
    model_flops_per_step: float
    traffic: list[Traffic] | None
    kernel_bytes: float | None

    @cached_property
    def round_seconds(self) -> list[float]:
        """Seconds per step in each round: the median over its steps."""
        return [statistics.median(steps) for steps in self.rounds]

    @cached_property
    def seconds(self) -> Quartiles:
        """Seconds per step: median and quartiles over the rounds."""
        return Quartiles.of(self.round_seconds)

    @property
    def blocked_seconds(self) -> float | None:
        return None if self.blocked is None else statistics.median(self.blocked)

    def total(self, column: Literal["payload", "sent", "formula"]) -> float | None:
        """The bytes of all collectives of a step."""
        if self.traffic is None:
            return None
        return sum(getattr(collective, column) for collective in self.traffic)


@dataclass(frozen=True)
class CompareReport:
    """The results of all strategies.

    Attributes:
        setting: settings, mesh, threads, cores and versions, on which the numbers depend.
        reference: the label of the strategy that the others are compared with.
        unit: "tokens/s" or "samples/s".
        batch: tokens or samples per step, over all ranks.
        peak_flops_per_s: the sum over all ranks.
        refused: label -> why the strategy did not run.
    """

    setting: Mapping[str, Any]
    reference: str
    unit: str
    batch: int
    peak_flops_per_s: float
    rows: list[ContenderRow]
    refused: dict[str, str]

    def ratio(self, row: ContenderRow) -> Ratio | None:
        """The speed relative to the reference's; None for the reference itself."""
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
        """The relative difference of the final loss from the reference's."""
        final = self.reference_row.losses[-1]
        return abs(row.losses[-1] - final) / max(abs(final), 1e-300)

    def throughput(self, row: ContenderRow) -> Quartiles:
        """Tokens or samples per second: median and quartiles over the rounds."""
        return Quartiles.of([self.batch / seconds for seconds in row.round_seconds])

    def mfu(self, row: ContenderRow) -> float | None:
        """Model FLOPs utilization; None where it would be wrong: see observe/flops.py."""
        return utilization(row.model_flops_per_step, row.seconds.median, self.peak_flops_per_s)

    def summary(self, row: ContenderRow) -> dict[str, Any]:
        """One row as a flat dict of numbers, in milliseconds, bytes and `unit`."""
        ratio, rate = self.ratio(row), self.throughput(row)
        blocked = row.blocked_seconds
        return {
            "strategy": row.label,
            "mix": row.mix,
            "mesh": mesh_in_words(row.mesh),
            "processes": row.processes,
            "step_ms": row.seconds.median * 1e3,
            "step_ms_lower_quartile": row.seconds.low * 1e3,
            "step_ms_upper_quartile": row.seconds.high * 1e3,
            "rounds": len(row.rounds),
            "ratio": ratio.median if ratio else 1.0,
            "ratio_low": ratio.low if ratio else None,
            "ratio_high": ratio.high if ratio else None,
            "ratio_lower_quartile": ratio.quartiles.low if ratio else None,
            "ratio_upper_quartile": ratio.quartiles.high if ratio else None,
            "verdict": ratio.verdict if ratio else "reference",
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
        """All results, as JSON values."""
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


IN_MEMORY = "in memory"  # through memory that ranks share: comm/shared/memory.py


def by_collective(calls: Iterable[Call]) -> list[list[Any]]:
    """Sum the calls of one rank per collective: [collective, calls, payload, sent, formula]."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for call in calls:
        formula = float(formula_bytes(call.op, call.size, call.payload))
        transport = f", {IN_MEMORY}" if call.algorithm == "shared" else ""
        for i, number in enumerate((1, call.payload, call.sent, formula)):
            sums[f"{call.op} {call.axis}{transport}"][i] += number
    return [[name, *numbers] for name, numbers in sums.items()]


def mean_of_ranks(ranks: Sequence[list[list[Any]] | None]) -> list[Traffic] | None:
    """Average the results of `by_collective` over ranks; None if the ranks count no bytes."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for rank in ranks:
        if rank is None:
            return None
        for name, *numbers in rank:
            sums[name] = [a + b / len(ranks) for a, b in zip(sums[name], numbers, strict=True)]
    return [Traffic(name, *numbers) for name, numbers in sums.items()]
