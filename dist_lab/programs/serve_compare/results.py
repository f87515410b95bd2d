"""The numbers of a replay: how long users wait, and what the machine and its memory do."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from statistics import fmean, median
from typing import Any

from dist_lab.programs.serve_compare.replay import Replay, Served


@dataclass(frozen=True)
class Result:
    """A policy's numbers on one clock. Times are in seconds.

    Attributes:
        clock: "virtual" or "wall".
        first, first_p95: from a request to its first token, median and 95th percentile.
        token: between two tokens of a text, median over the requests of their means.
        gap_p99: the 99th percentile of the times between two tokens.
        seconds: of the whole trace.
        rate: generated tokens a second.
        steps: their number.
        mean_step, largest_step: tokens computed in a step.
        computed: tokens, also those computed again after a preemption, and those thrown away.
        generated: tokens that users got.
        preemptions: see engine.Counts; also cached.
        empty: share of the held blocks' places that had no token of a live text, mean over steps.
        empty_each: empty places a sequence that runs, mean over steps.
        fullest: the largest share of all blocks that were used.
        same: requests with the same text as under the first policy; None for that one.
    """

    policy: str
    clock: str
    first: float
    first_p95: float
    token: float
    gap_p99: float
    seconds: float
    rate: float
    steps: int
    mean_step: float
    largest_step: int
    computed: int
    generated: int
    preemptions: int
    cached: int
    empty: float
    empty_each: float
    fullest: float
    same: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def result(
    policy: str, clock: str, seen: Replay, block_size: int, reference: Replay | None
) -> Result:
    """Summarize a replay. `reference`: another one, whose texts should be the same."""
    requests = list(seen.requests.values())
    first = [served.times[0] - served.came for served in requests]
    gaps = [gap for served in requests for gap in gaps_of(served)]
    counts = [step.counts for step in seen.steps]
    held = [max(1, c.used) * block_size for c in counts]
    generated = sum(len(served.times) for served in requests)
    seconds = seen.steps[-1].time - min(served.came for served in requests)
    return Result(
        policy=policy,
        clock=clock,
        first=median(first),
        first_p95=percentile(first, 0.95),
        token=median(fmean(gaps_of(served)) for served in requests if len(served.times) > 1),
        gap_p99=percentile(gaps, 0.99),
        seconds=seconds,
        rate=generated / seconds,
        steps=len(counts),
        mean_step=fmean(c.tokens for c in counts),
        largest_step=max(c.tokens for c in counts),
        computed=sum(c.tokens for c in counts),
        generated=generated,
        preemptions=counts[-1].preemptions,
        cached=counts[-1].cached,
        empty=fmean(c.empty / places for c, places in zip(counts, held, strict=True)),
        empty_each=fmean(c.empty / max(1, c.running) for c in counts),
        fullest=max(c.used / (c.used + c.free) for c in counts),
        same=None if reference is None else same_texts(seen, reference),
    )


def gaps_of(served: Served) -> list[float]:
    """The times between two tokens of a text."""
    return [after - before for before, after in pairwise(served.times)]


def same_texts(seen: Replay, reference: Replay) -> int:
    texts = seen.requests.items()
    return sum(served.tokens == reference.requests[name].tokens for name, served in texts)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that this share of them does not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[ceil(share * len(ordered)) - 1]
