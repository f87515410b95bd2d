"""Every rank of a mesh: ranks that do the same are one class, and one rank of each class is run.

    of 4,096 ranks at pp=16, fsdp=32, tp=8:     ranks 0-255        the first stage
                                                ranks 256-511      the second, and so on

Ranks differ in their stage, in the sizes of their shards, in their rows of the batch, and in what
an algorithm lets a position of an axis send. All of it is arithmetic: layouts tell the shards of
any rank, and the ledger's formulas what any position sends. So the ranks of a stage are divided by
these, and what is shown of a class is counted on its first rank.

[Note: many micro-batches] Once a pipeline is full, each further micro-batch adds the same calls and
bytes, and the batch's own tensors. So of many micro-batches a few are run, and the rest is
multiplied: from d + 3 and d + 4 of them, if at most d are in flight on this rank. (An interleaved
schedule takes them in groups of one per rank, so there it is one group more.) Under 1f1b the
stages that differ in d only are equal, apart from the activations that d micro-batches hold. They
are computed from three such stages, if these are on a line; if not, each stage is run.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from math import prod
from typing import Any

import torch

from dist_lab.comm.by_hand.costs import ALGORITHMS, lengths
from dist_lab.comm.ledger import Call, backend_bytes
from dist_lab.layout.layout import FlatShard, Layout, holds, local_numel, shard_bounds
from dist_lab.mesh.mesh import Mesh, dry_run
from dist_lab.mesh.topology import DATA_AXES, ORDER, coordinates, rank_at
from dist_lab.observe import memory, memory_series
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.simulate import peak_activations
from dist_lab.programs.cli.config import Config
from dist_lab.programs.explain.dry_run import DryRunResult, observe, take_steps

Numbers = Mapping[tuple[str, ...], int]
"""("peak",): bytes; ("at_peak" or "own_peak", kind): bytes; ("calls", "payload" or "sent", op,
axis): in a step; ("operations",): floating-point operations; ("parameters",): elements."""


@dataclass(frozen=True)
class RankClass:
    """Ranks that do the same, in order, with what the first of them counted."""

    ranks: Sequence[int]
    numbers: Numbers

    @property
    def peak(self) -> int:
        return self.numbers["peak",]

    @property
    def sent(self) -> int:
        return sum(n for key, n in self.numbers.items() if key[0] == "sent")


@dataclass(frozen=True)
class Outcome:
    """What a rank counted, and all that says which other ranks count the same."""

    numbers: Numbers
    strategies: str
    layouts: Mapping[str, Layout]
    calls: Sequence[Call]
    series: memory_series.Entry

    @classmethod
    def of(cls, result: DryRunResult) -> "Outcome":
        job = result.job
        return cls(numbers_of(result), job.strategies, job.layouts, result.steady, result.series)


class Runs:
    """Runs ranks of the mesh, each once. `Runs(config, axes)(rank, microbatches)`.

    Args:
        config: the settings of the run, with a batch that fits the mesh.
        values: compute the numbers of each step.
        tell: is called with the rank that runs next, in words.
    """

    def __init__(
        self,
        config: Config,
        axes: Mapping[str, int],
        *,
        values: bool = False,
        tell: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.config, self.axes, self.values, self.tell = config, axes, values, tell
        self.microbatches = config.microbatches
        self.group = axes["pp"] if config.schedule == "interleaved" else 1
        self.done: dict[tuple[int, int], Outcome] = {}

    def first_rank(self, stage: int) -> int:
        """The first rank of a position along pp."""
        return rank_at({**dict.fromkeys(self.axes, 0), "pp": stage}, self.axes)

    def in_groups(self, microbatches: int) -> int:
        """So many micro-batches, or as many more as the schedule needs."""
        return -(-microbatches // self.group) * self.group

    def first_of(self, stage: int) -> Outcome:
        """A run of that rank, of as many micro-batches as there is one of, or of few."""
        rank = self.first_rank(stage)
        done = [outcome for (r, _), outcome in self.done.items() if r == rank]
        return done[0] if done else self(rank, min(self.microbatches, self.in_groups(4)))

    def __call__(self, rank: int, microbatches: int) -> Outcome:
        """What this rank counts in a step of so many micro-batches, each of the usual size."""
        key = rank, microbatches
        if key not in self.done:
            self.tell(f"rank {rank}: a step of {microbatches} micro-batches")
            with self._as_rank(rank) as mesh:
                result = observe(self._config(microbatches), mesh, values=self.values)
            self.done[key] = Outcome.of(result)
        return self.done[key]

    def two(self, rank: int, few: int, more: int, depth: int) -> tuple[Outcome, Outcome]:
        """The same for two numbers of micro-batches, in one job.

        The first step fills the pipeline. In steps 1, 2, 4, 8 and so on strategies make a check, so
        the counted ones are steps 2 and 4.
        """
        keys = (rank, few), (rank, more)
        if not all(key in self.done for key in keys):
            self.tell(f"rank {rank}: steps of {few} and of {more} micro-batches")
            counts = self.in_groups(depth), few, self.group, more
            with self._as_rank(rank) as mesh:
                results = take_steps([*map(self._config, counts)], mesh, values=self.values)
            self.done.update(zip(keys, map(Outcome.of, results[1::2]), strict=True))
        return self.done[keys[0]], self.done[keys[1]]

    def _config(self, microbatches: int) -> Config:
        batch = self.config.batch // self.microbatches * microbatches
        return replace(self.config, microbatches=microbatches, batch=batch)

    def _as_rank(self, rank: int) -> AbstractContextManager[Mesh]:
        config = self.config
        return dry_run(self.axes, rank, backend=config.backend, collectives=config.collectives)


def numbers_of(result: DryRunResult) -> Numbers:
    """What the second step of a rank counted."""
    peak, job = result.peak, result.job
    numbers: dict[tuple[str, ...], int] = {
        ("peak",): peak.total, ("operations",): int(result.operations),
    }  # fmt: skip
    numbers["parameters",] = sum(p.numel() for p in job.model.parameters())
    for kind in memory.KINDS:
        numbers["at_peak", kind], numbers["own_peak", kind] = peak.at_peak[kind], peak.own[kind]
    for call in result.steady:
        for what, count in (("calls", 1), ("payload", call.payload), ("sent", call.sent)):
            key = what, call.op, call.axis
            numbers[key] = numbers.get(key, 0) + count
    return numbers


def classes(runs: Runs, schedule: Schedule | None) -> list[RankClass]:
    """The classes of a mesh, in the order of their first ranks. `schedule`: of a pipeline."""
    axes = runs.axes
    depths = peak_activations(schedule) if schedule else [1]
    members: dict[Any, list[int]] = {}
    counted: dict[Any, Numbers] = {}
    for stage, (numbers, sample) in enumerate(of_stages(runs, schedule, depths)):
        first = runs.first_rank(stage)
        key = differences(runs, stage, runs.first_of(sample))
        everyone = range(prod(axes.values()))
        ranks = [rank for rank in everyone if coordinates(rank, axes).get("pp", 0) == stage]
        for _, group in groupby(sorted(ranks, key=key), key):
            alike = list(group)
            of_class = numbers if alike[0] == first else at(runs, alike[0], depths[stage])
            same = tuple(sorted(of_class.items()))
            counted[same] = of_class
            members.setdefault(same, []).extend(alike)
    found = [RankClass(sorted(ranks), counted[same]) for same, ranks in members.items()]
    return sorted(found, key=lambda one: one.ranks[0])


# --- a rank, of many micro-batches ----------------------------------------------------------------


def at(runs: Runs, rank: int, depth: int) -> Numbers:
    """What a rank counts, of which `depth` micro-batches are in flight at most."""
    few = runs.in_groups(depth + 3)
    more = few + runs.group
    if runs.microbatches > more:
        steps = (runs.microbatches - few) // runs.group
        a, b = runs.two(rank, few, more, depth)
        numbers = along(a.numbers, b.numbers, steps)
        if is_consistent(numbers):
            return numbers
    return runs(rank, runs.microbatches).numbers


def along(first: Numbers, second: Numbers, steps: int) -> Numbers:
    """The numbers on the line from the first through the second, at so many steps."""
    keys = first.keys() | second.keys()
    return {k: first.get(k, 0) + steps * (second.get(k, 0) - first.get(k, 0)) for k in keys}


def is_consistent(numbers: Numbers) -> bool:
    """Whether the kinds add up to the peak, and nothing is below zero."""
    at_peak = sum(number for key, number in numbers.items() if key[0] == "at_peak")
    return at_peak == numbers["peak",] and min(numbers.values()) >= 0


# --- the stages -----------------------------------------------------------------------------------


def of_stages(
    runs: Runs, schedule: Schedule | None, depths: Sequence[int]
) -> list[tuple[Numbers, int]]:
    """For each position along pp: what its first rank counts, and a stage of its kind that ran."""
    if schedule is None:
        return [(at(runs, 0, depths[0]), 0)]
    last = len(depths) - 1
    found = {last: (at(runs, runs.first_rank(last), depths[last]), last)}
    layouts = runs.first_of(last).layouts  # those of all stages
    contents = [content(layouts, stage, last) for stage in range(last + 1)]
    rows = [row_of(schedule, stage) for stage in range(last + 1)]
    for stage in reversed(range(last)):
        alike = {s: one for s, one in found.items() if contents[s] == contents[stage]}
        same = [one for s, one in alike.items() if rows[s] == rows[stage]]
        on_line = _from_line(alike, depths, stage) if schedule.name == "1f1b" else None
        ready = same[0] if same else on_line
        found[stage] = ready or (at(runs, runs.first_rank(stage), depths[stage]), stage)
    return [found[stage] for stage in range(last + 1)]


def content(layouts: Mapping[str, Layout], stage: int, last: int) -> Any:
    """What the stages of one position along pp consist of; equal for equal ones."""
    held = (
        (re.sub(r"\.\d+\.", ".", name), tuple(layout.shape))
        for name, layout in layouts.items()
        if holds(layout, {"pp": stage})
    )
    return sorted(held), stage == 0, stage == last


def row_of(schedule: Schedule, rank: int) -> list[tuple[Any, ...]]:
    """The actions of a rank, without the numbers of its stages."""
    own = sorted({action.stage for action in schedule.ranks[rank]})
    return [(own.index(a.stage), a.op, a.microbatch) for a in schedule.ranks[rank]]


def _from_line(
    alike: Mapping[int, tuple[Numbers, int]], depths: Sequence[int], stage: int
) -> tuple[Numbers, int] | None:
    """What a stage counts, from three that differ in the micro-batches in flight; else None."""
    nearest = sorted((depths[s], s) for s in alike)[:3]
    first = nearest[0][0] if nearest else 0
    if [depth - first for depth, _ in nearest] != [0, 1, 2]:
        return None
    a, b, c = (alike[s][0] for _, s in nearest)
    numbers = along(a, b, depths[stage] - first)
    is_line = along(a, b, 2) == along(b, c, 1)
    return (numbers, alike[nearest[0][1]][1]) if is_line and is_consistent(numbers) else None


# --- the ranks of a stage -------------------------------------------------------------------------


def differences(runs: Runs, stage: int, outcome: Outcome) -> Callable[[int], Any]:
    """Returns a function of a rank of that stage; it is equal for ranks that count the same.

    `outcome`: of a rank of that stage, or of an equal one.
    """
    axes = runs.axes
    held = [layout for layout in outcome.layouts.values() if holds(layout, {"pp": stage})]
    kinds = sorted({_how_sent(call) for call in outcome.calls if call.size > 1})

    @cache
    def sizes(layout: Layout, place: tuple[tuple[str, int], ...]) -> int:
        return local_numel(layout, axes, dict(place))

    def key(rank: int) -> Any:
        place = coordinates(rank, axes)
        local: list[int] = []
        flat: dict[str, list[int]] = {}
        for layout in held:
            along = tuple((axis, place.get(axis, 0)) for axis, _ in layout.splits)
            size = sizes(layout, along)
            if layout.splits and isinstance(layout.splits[-1][1], FlatShard):
                flat.setdefault(str(layout.dtype), []).append(size)
            else:
                local.append(size)
        # Of a bucket's range only the sum counts, and the number of tensors that have state.
        buckets = [(dtype, sum(n), sum(map(bool, n))) for dtype, n in sorted(flat.items())]
        rows = shard_bounds(runs.config.batch, *_along(DATA_AXES, axes, place))
        return local, buckets, rows[1] - rows[0], [_due(kind, axes, place, rank) for kind in kinds]

    return key


def _how_sent(call: Call) -> tuple[str, str, int, str, int, str]:
    return call.op, call.axis, call.size, call.algorithm, call.payload, call.about


def _due(
    kind: tuple[Any, ...], axes: Mapping[str, int], place: Mapping[str, int], rank: int
) -> int:
    """The bytes that a position of an axis sends in a call, up to what all positions send."""
    op, axis, size, algorithm, payload, about = kind
    if op in ("send", "recv") or "[" in axis:  # the same for the whole stage
        return 0
    if "unequal parts" in about:
        return rank
    _, position = _along(axis.split("_"), axes, place)
    source = re.search(r"from (\d+)", about) if op == "broadcast" else None
    from_source = (position - int(source[1])) % size if source else position
    itemsize: int = getattr(torch, about.partition("[")[0].partition(",")[0]).itemsize
    if algorithm == "backend":
        return backend_bytes(op, size, from_source, payload)
    if algorithm == "shared":
        return lengths(payload // itemsize, size)[position]
    return ALGORITHMS[op][algorithm].sent(size, from_source, payload // itemsize) * itemsize


def _along(
    names: Sequence[str], axes: Mapping[str, int], place: Mapping[str, int]
) -> tuple[int, int]:
    """The number of positions along several axes, and this rank's."""
    size, position = 1, 0
    for name in (name for name in ORDER if name in names and name in axes):
        size, position = size * axes[name], position * axes[name] + place[name]
    return size, position
