"""The results of a sweep: speed-ups, and a model of what a step costs.

    seconds = FLOPs / cores x compute + calls x latency + bytes x transfer

FLOPs are those of all ranks, `cores` those that can work at a time, calls and bytes those of one
rank. The three costs are fitted to all steps of a sweep at once, by least squares of the relative
errors. It is the model of Valiant 1990 ("A bridging model for parallel computation"), with a term
for each call in place of his supersteps. Idle time of a pipeline, and waiting for slower ranks, is
in none of the terms: it is what remains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lab.observe.fit import nonnegative_fit

TERMS = ("compute", "calls", "bytes")


@dataclass(frozen=True)
class Point:
    """One strategy on one number of ranks.

    Attributes:
        seconds, low, high: of a step: the median, and the quartiles.
        rate: tokens or samples per second.
        speedup: how many times as fast as one process with the same batch, in the same rounds; and
            the interval that has the true value with 99%.
        cores: those of the machine that the ranks' threads can use at a time.
        work: FLOPs / cores, calls and bytes of a step; None if a library's strategy hides them.
    """

    size: str
    ranks: int
    strategy: str
    mesh: str
    seconds: float
    low: float
    high: float
    rate: float
    speedup: float
    interval: tuple[float, float]
    cores: int
    work: tuple[float, float, float] | None
    equal: bool

    @property
    def efficiency(self) -> float:
        """The speed-up for each rank."""
        return self.speedup / self.ranks

    @property
    def of_the_cores(self) -> float:
        """The speed-up for each core: what is lost by the strategy, and not by sharing cores."""
        return self.speedup / self.cores


@dataclass(frozen=True)
class Costs:
    """What a step costs: seconds for a FLOP of a core, for a call, and for a byte.

    `error`: the root mean square of (fitted - measured) / measured.
    """

    of: tuple[float, float, float]
    error: float

    def to_dict(self) -> dict[str, float]:
        units = ("seconds_per_flop_of_a_core", "seconds_per_call", "seconds_per_byte", "error")
        return dict(zip(units, (*self.of, self.error), strict=True))

    def parts(self, point: Point) -> dict[str, float]:
        """The seconds of each term in a step, by TERMS; empty if its work is not known."""
        if point.work is None:
            return {}
        return {t: c * w for t, c, w in zip(TERMS, self.of, point.work, strict=True)}


def points(reports: Sequence[Mapping[str, Any]]) -> list[Point]:
    """One point for each strategy of each report, which is a comparison's compare.json."""
    found = []
    for report in reports:
        setting = report["setting"]
        for row, measured in zip(report["strategies"], report["measured"], strict=True):
            ranks = row["processes"]
            cores = min(ranks * setting["threads"], setting["cores"])
            traffic = measured["traffic"]
            work = None
            if traffic is not None:
                calls, sent = (sum(t[name] for t in traffic) for name in ("calls", "sent"))
                work = measured["flops_per_step"] / cores, calls, sent
            low, high = row["ratio_low"], row["ratio_high"]
            found.append(
                Point(
                    setting["config"]["size"], setting["world_size"], row["strategy"], row["mesh"],
                    row["step_ms"] / 1e3, row["step_ms_lower_quartile"] / 1e3,
                    row["step_ms_upper_quartile"] / 1e3,
                    row[report["unit"].replace("/", "_per_")], row["ratio"],
                    (1.0, 1.0) if low is None else (low, high), cores, work,
                    row["loss_error"] <= report["loss_tolerance"],
                )
            )  # fmt: skip
    return found


def fit(found: Sequence[Point]) -> Costs | None:
    """The costs that describe all steps best; None unless there are more steps than costs."""
    known = [(point.work, point.seconds) for point in found if point.work is not None]
    fitted = nonnegative_fit([work for work, _ in known], [seconds for _, seconds in known])
    if fitted is None or fitted.error is None:
        return None
    return Costs((fitted.x[0], fitted.x[1], fitted.x[2]), fitted.error)
