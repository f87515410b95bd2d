"""Stragglers: which rank is slow, since which step, and what that costs.

    own work = the duration of a step - the time that the rank was blocked in communication

All ranks take a step together, so all their steps are as long as the slowest rank's, and a step's
duration does not tell who is slow. The own work does: a slow rank works longer, and the others wait
longer. So it is compared between ranks that do the same work, which are all ranks, or under pp
those of one stage. A rank is slow if in 7 of 9 steps its work takes 1.5 times the median of these
ranks, and the difference is a twentieth of the step or more. A few long steps are noise: on a
laptop ranks share cores. Every 2 steps the ranks gather their numbers, 32 bytes of each. So a rank
that needs twice the time is named 6 or 7 steps after its first slow one, and after at most 9 if the
noise hides two of its steps.

[Note: an unbalanced pipeline] Stages do different work, so a longer stage is no slow rank. Its
ranks have too many layers, or too expensive ones, and all stages wait for them. The summary says
so. If a stage has one rank only, nothing tells the two apart.

Letters: N ranks, W steps.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import ORDER, lines

EVERY = 2  # steps between two comparisons
WINDOW = 9  # steps that are compared
AGREE = 7  # of these, to call a rank slow
HISTORY = 20  # steps that are kept
TIMES = 1.5  # a slow rank's work, relative to the median of the ranks with the same work
COST = 0.05  # of the step: what a slow rank costs at least
UNBALANCED = 1.25  # the longest stage of an unbalanced pipeline, relative to the mean


@dataclass
class Slow:
    """One rank that was slow in some steps.

    first, last: steps; there may be some normal ones in between
    own, others: seconds of work per step, of this rank and of those with the same work, at the
        last comparison
    lost: seconds that all ranks waited for it, in all steps
    """

    rank: int
    first: int
    last: int
    own: float
    others: float
    lost: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "first_step": self.first, "last_step": self.last,
            "work_ms": self.own * 1e3, "others_work_ms": self.others * 1e3, "lost_s": self.lost,
        }  # fmt: skip


class Stragglers:
    """Compares the work of the ranks of a mesh while they train.

    Attributes:
        episodes: the slow ranks so far, in order; the same on every rank.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.episodes = mesh, list[Slow]()
        self._groups = lines(mesh.axes, [name for name in ORDER if name != "pp"])
        self._recent: list[tuple[float, float]] = []  # (seconds, blocked) of this rank's last steps
        self._last = torch.zeros(2, mesh.size, 0, dtype=torch.float64)  # work, waiting
        self._totals = torch.zeros(2, mesh.size, dtype=torch.float64)  # in seconds
        self._steps = 0  # that are in the totals
        self._step = 0

    def after_step(self, step: int, seconds: float, blocked: float) -> list[str]:
        """Record this rank's step. Returns a line about each rank that has become slow. Collective.

        Args:
            seconds: the duration of the step.
            blocked: for how many of them this rank waited for others, as the ledger counts it.
        """
        self._step = step
        self._recent.append((seconds, blocked))
        if len(self._recent) < EVERY:
            return []
        self._gather()
        return [in_words(step, slow) for group in self._groups for slow in self._compare(group)]

    def now(self) -> dict[str, float]:
        """Fields of a row of metrics.jsonl: the slowest rank, if one is slow at present."""
        present = [slow for slow in self.episodes if slow.last > self._step - EVERY]
        if not present:
            return {}
        worst = max(present, key=lambda slow: slow.own - slow.others)
        cost = (worst.own - worst.others) * 1e3
        return {"slow_rank": worst.rank, "slow_times": worst.own / worst.others, "slow_ms": cost}

    def summary(self) -> dict[str, Any]:
        """Fields of summary.json: work and waiting of each rank, and the slow ranks. Collective."""
        if self._recent:
            self._gather()
        work, waited = (self._totals * 1e3 / max(self._steps, 1)).tolist()
        stages = [statistics.fmean(work[rank] for rank in group) for group in self._groups]
        return {
            "ranks": {"work_ms": work, "wait_ms": waited},
            "stage_work_ms": stages if len(stages) > 1 else None,
            "slow_ranks": [slow.to_dict() for slow in self.episodes],
        }

    def _gather(self) -> None:
        """Gather the recorded steps of all ranks."""
        own = torch.tensor([self._recent], dtype=torch.float64, device=self.mesh.device)
        with self.mesh.comm.label("measure"):
            seconds, waited = ops.all_gather(own, self.mesh.world).cpu().unbind(-1)  # (N, W)
        work_and_waiting = torch.stack([(seconds - waited).clamp(min=1e-6), waited])
        self._last = torch.cat([self._last, work_and_waiting], dim=2)[:, :, -HISTORY:]
        self._totals += work_and_waiting.sum(2)
        self._steps += len(self._recent)
        self._recent = []

    def _compare(self, group: Sequence[int]) -> list[Slow]:
        """Compare some ranks that do the same work. Returns those that have become slow."""
        work, waited = self._last[:, list(group)]  # each (N, W), with the N of this group
        usual = work.median(dim=0).values  # (W,); of two ranks, the shorter work
        excess, is_longer = (work - usual).clamp(min=0), work >= TIMES * usual
        window = slice(-WINDOW, None)
        agrees = is_longer[:, window].sum(1) >= AGREE
        least = COST * (work + waited)[:, window].median(1).values
        slow_rows = agrees & (excess[:, window].median(1).values >= least)
        new = []
        for row in slow_rows.nonzero().flatten().tolist():
            slow = self._recently_slow(group[row])
            if slow is None:
                since = self._step - steps_since_onset(is_longer[row].tolist())
                new.append(slow := Slow(group[row], since, since - 1, 0.0, 0.0))
            slow.lost += float((excess * is_longer)[row, slow.last - self._step :].sum())
            slow.last = self._step
            slow.own, slow.others = (float(x[window].median()) for x in (work[row], usual))
        self.episodes += new
        return new

    def _recently_slow(self, rank: int) -> Slow | None:
        """The entry of a rank that was slow a short time ago: it has not become slow again."""
        return next(
            (s for s in self.episodes if s.rank == rank and s.last > self._step - HISTORY), None
        )


def steps_since_onset(longer: Sequence[bool]) -> int:
    """For how many steps, of those up to the last, a rank has been slow without a break.

    A break within the window does not count: there may be one in it.

    >>> steps_since_onset([True, False, True, True, True, True, True, True, True, False])
    7
    """
    first = len(longer) - WINDOW
    first = longer.index(True, max(first, 0))
    while first and longer[first - 1]:
        first -= 1
    return len(longer) - 1 - first


# --- in words -------------------------------------------------------------------------------------


def in_words(step: int, slow: Slow) -> str:
    """Describes a rank that has become slow.

    >>> in_words(20, Slow(rank=2, first=16, last=20, own=0.2, others=0.1, lost=0.5))
    'step 20: rank 2 is slow since step 16: 200 ms of work a step, ranks with the same work 100'
    """
    own, others = slow.own * 1e3, slow.others * 1e3
    work = f"{own:.0f} ms of work a step, ranks with the same work {others:.0f}"
    return f"step {step}: rank {slow.rank} is slow since step {slow.first}: {work}"


def closing_words(summary: Mapping[str, Any]) -> str:
    """Names slow ranks and an unbalanced pipeline, for the line at the end of a run.

    >>> slow = Slow(rank=2, first=16, last=35, own=0.2, others=0.1, lost=2)
    >>> closing_words({"slow_ranks": [slow.to_dict()], "stage_work_ms": None})
    '; rank 2 was slow in steps 16 to 35 (2.0 times the work of the others), which cost 2.0 s'
    >>> ranks = {"work_ms": [10, 20, 10, 10]}
    >>> closing_words({"slow_ranks": [], "stage_work_ms": [10, 20, 10, 10], "ranks": ranks})
    '; an unbalanced pipeline or a slow rank: pp=1 works 20 ms a step, the mean of stages is 12'
    """
    words = ""
    for slow in summary["slow_ranks"]:
        times = slow["work_ms"] / slow["others_work_ms"]
        words += (
            f"; rank {slow['rank']} was slow in steps {slow['first_step']} to {slow['last_step']} "
            f"({times:.1f} times the work of the others), which cost {slow['lost_s']:.1f} s"
        )
    stages = summary["stage_work_ms"] or [0.0]
    mean = statistics.fmean(stages)
    if max(stages) > UNBALANCED * mean:
        alone = " or a slow rank" if len(stages) == len(summary["ranks"]["work_ms"]) else ""
        words += (
            f"; an unbalanced pipeline{alone}: pp={stages.index(max(stages))} works "
            f"{max(stages):.0f} ms a step, the mean of stages is {mean:.0f}"
        )
    return words
