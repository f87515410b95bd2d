"""From the events of all ranks to their timeline: segments, and what each wait was for.

The labels cut a rank's time into intervals, and its waits cut these once more. A wait is `idle` as
long as some rank of the collective has not started it, and `waiting` after that:

    rank 0   forward | idle        | waiting | forward      waits for rank 1, then for the data
    rank 1   forward               | waiting | forward      starts the collective last

Ranks number their calls differently, but those of one group in one order: the k-th call of a group
on one rank is the k-th on the others (comm/check.py). So all ranks must begin to record at the same
point of the program.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from dist_lab.observe.timeline.timeline import (
    NOT_OF_A_STEP,
    CallSpan,
    RankTimeline,
    Segment,
    StepSpan,
    Timeline,
)

Record = dict[str, Any]  # the events of one rank as JSON: see recorder.py

# Phases of the ledger, and of the training loop, by the kind of their segments.
KIND_OF = {
    "forward": "forward", "backward": "backward", "recompute": "recompute", "finish": "reduce",
    "clip": "optimizer", "optimizer": "optimizer", "after_step": "optimizer", "data": "data",
    "samples": "data", "validation": "validation", "save": "checkpoint", "load": "checkpoint",
}  # fmt: skip
MARKS = ("loop", "log", "data", *NOT_OF_A_STEP)  # phases that no other phase is around


class Wait(NamedTuple):
    """Nanoseconds. `all_started`: the moment at which all ranks had started the collective."""

    call: int
    start: int
    end: int
    all_started: int


class Label(NamedTuple):
    start: int
    step: int
    phase: str
    unit: str


def timeline_of(records: Sequence[Record], about: Mapping[str, Any]) -> Timeline:
    """Returns the timeline of all ranks. Their times must be those of one clock."""
    zero = min(record["labels"][0][0] for record in records)
    last = last_to_start(records)
    return Timeline(about, tuple(rank_timeline(record, zero, last) for record in records))


Key = tuple[Any, ...]  # of one collective: its group, and its number in that group
Launches = dict[Key, tuple[float, int]]  # the last launch: when, and by which rank


def keys_of(record: Record) -> list[Key | None]:
    """Returns a key for each call of a rank; None for a call before the recording."""
    counts, first = Counter[Any](), record["labels"][0][1]
    keys: list[Key | None] = []
    for _, step, *_, (ranks, channel) in record["calls"]:
        group = tuple(ranks), channel
        keys.append((*group, counts[group]) if step >= first else None)
        counts[group] += step >= first
    return keys


def last_to_start(records: Sequence[Record]) -> Launches:
    """Returns the last launch of each collective that all ranks of its group have launched."""
    launches: dict[Key, list[tuple[float, int]]] = {}
    for record in records:
        for key, call in zip(keys_of(record), record["calls"], strict=True):
            if key is not None:
                launches.setdefault(key, []).append((call[0], record["rank"]))
    return {key: max(each) for key, each in launches.items() if len(each) == len(key[0])}


def rank_timeline(record: Record, zero: float, last: Launches) -> RankTimeline:
    """Returns the timeline of one rank. `zero`: the time that becomes 0."""

    def ns(seconds: float) -> int:
        return round((seconds - zero) * 1e9)

    keys, end = keys_of(record), ns(record["ended"])
    labels = [Label(ns(when), *label) for when, *label in record["labels"]]
    late = [last.get(key, (zero, -1)) for key in keys]  # type: ignore[arg-type]
    own = record["rank"]
    waits = [
        Wait(call, ns(start), ns(stop), ns(late[call][0]) if late[call][1] != own else 0)
        for call, start, stop in record["waits"]
    ]
    calls = spans_of_calls(record, waits, [who for _, who in late], end, ns)
    return RankTimeline(
        own, record["place"], record["host"],
        tuple(steps_of(labels, end)), tuple(tiles(labels, waits, end)), tuple(calls),
    )  # fmt: skip


def steps_of(labels: Sequence[Label], end: int) -> Iterator[StepSpan]:
    """A step begins at its first label, and ends when the next one begins."""
    begins: dict[int, int] = {}
    for label in labels:
        begins.setdefault(label.step, label.start)
    for (step, start), (_, stop) in pairwise([*begins.items(), (0, end)]):
        yield StepSpan(step, start, stop)


def tiles(labels: Sequence[Label], waits: Sequence[Wait], end: int) -> Iterator[Segment]:
    """Yields the segments from the first label to `end`, in order and without gaps."""
    at, whole, i = labels[0].start, "", 0
    for label, until in zip(labels, [*(x.start for x in labels[1:]), end], strict=True):
        if label.phase in MARKS:
            whole = label.phase if label.phase in NOT_OF_A_STEP else ""
        kind = KIND_OF.get(whole or label.phase, "other")
        name = whole or label.phase, label.unit
        while i < len(waits) and waits[i].start < until:
            wait, i = waits[i], i + 1
            start = max(at, wait.start)
            if at < start:
                yield Segment(at, start, kind, *name, None)
            idle_until = min(max(start, wait.all_started), wait.end)
            if start < idle_until:
                yield Segment(start, idle_until, "idle", *name, wait.call)
            if idle_until < wait.end:
                yield Segment(idle_until, wait.end, "waiting", *name, wait.call)
            at = max(start, wait.end)
        if at < until:
            yield Segment(at, until, kind, *name, None)
            at = until


def spans_of_calls(
    record: Record, waits: Sequence[Wait], late: Sequence[int], end: int, ns: Any
) -> Iterator[CallSpan]:
    """Yields the rank's collectives. `late`: the last rank to start each; -1: not known."""
    exposed, ends = Counter[int](), dict[int, int]()
    for wait in waits:
        exposed[wait.call] += wait.end - wait.start
        ends.setdefault(wait.call, wait.end)
    starts = [wait.start for wait in waits]
    before = [0, *accumulate(wait.end - wait.start for wait in waits)]

    def blocked(until: int) -> int:
        """The nanoseconds of waits before a moment."""
        i = bisect_right(starts, until)
        return before[i] - (max(0, waits[i - 1].end - until) if i else 0)

    for i, call in enumerate(record["calls"]):
        when, step, number, op, axis, size, about, payload, sent, *text, _ = call
        phase, unit, algorithm, where = text
        start, stop = ns(when), ends.get(i, end)
        hidden = stop - start - (blocked(stop) - blocked(start))
        who = None if late[i] in (-1, record["rank"]) else late[i]
        yield CallSpan(
            number, op, axis, size, about, payload, sent, phase, unit, algorithm, where,
            step, start, stop, exposed[i], hidden, who,
        )  # fmt: skip
