"""The timeline as a file for https://ui.perfetto.dev and chrome://tracing.

The format is the JSON object of "Trace Event Format" (Google 2016). An event has a kind `ph`, a
time `ts` and a duration `dur` in microseconds, a process `pid`, here the rank, and a thread `tid`.

    M    the name of a rank
    X    a slice: step, phase, unit, wait; slices of one lane nest and never overlap
    b e  a collective in flight, from its launch to the end of its wait, on a lane of its axis

Viewers ignore `otherData`, which has the timeline for programs: see `Timeline.read`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dist_lab.observe.timeline.timeline import CallSpan, RankTimeline, Segment, Timeline

FILE = "timeline.json"
Event = dict[str, Any]


class Name(NamedTuple):
    """A slice's name and category, and for a wait the index of its call."""

    name: str
    category: str
    call: int | None = None


def write(timeline: Timeline, path: Path) -> None:
    """Raises OSError."""
    everything = {
        "displayTimeUnit": "ms",
        "traceEvents": [*events(timeline)],
        "otherData": timeline.to_json(),
    }
    path.write_text(json.dumps(everything, separators=(",", ":")), encoding="utf-8")


def events(timeline: Timeline) -> Iterator[Event]:
    """Yields all events. Times are in microseconds, exact to the nanosecond."""
    for rank in timeline.ranks:
        name = f"rank {rank.rank}" + f" ({rank.place})" * bool(rank.place)
        pid = {"pid": rank.rank, "tid": 0}
        yield {"ph": "M", "name": "process_name", **pid, "args": {"name": name}}
        yield {
            "ph": "M",
            "name": "process_sort_index",
            **pid,
            "args": {"sort_index": 2 * rank.rank},
        }
        yield {"ph": "M", "name": "thread_name", **pid, "args": {"name": "step"}}
        yield from slices(rank)
        for i, call in enumerate(rank.calls):
            yield from in_flight(rank, i, call)


def slices(rank: RankTimeline) -> Iterator[Event]:
    """Yields the slices of one rank: neighbours with the same first names share a slice."""
    open_slices: list[tuple[Name, int]] = []  # and their start, the outermost first
    steps = iter(rank.steps)
    step = next(steps)
    end = step.start

    def close(keep: int) -> Iterator[Event]:
        while len(open_slices) > keep:
            (name, category, call), start = open_slices.pop()
            event = {
                "ph": "X", "name": name, "cat": category, "pid": rank.rank, "tid": 0,
                "ts": start / 1e3, "dur": (end - start) / 1e3,
            }  # fmt: skip
            yield event if call is None else event | {"args": about(rank.calls[call])}

    for segment in rank.segments:
        while segment.start >= step.end:
            step = next(steps)
        names = [Name(f"step {step.step}", "step"), *names_of(segment, rank.calls)]
        same = 0
        for (name, _), wanted in zip(open_slices, names, strict=False):
            if name != wanted:
                break
            same += 1
        yield from close(same)
        open_slices += [(name, segment.start) for name in names[same:]]
        end = segment.end
    yield from close(0)


def names_of(segment: Segment, calls: tuple[CallSpan, ...]) -> Iterator[Name]:
    """Yields the slices that a segment lies in, below the step."""
    yield Name(segment.phase, "phase")
    if segment.unit:
        yield Name(segment.unit, "unit")
    if segment.call is not None:
        call = calls[segment.call]
        why = f"idle for rank {call.late}" if segment.kind == "idle" else "waiting"
        yield Name(f"{why}: {call.op} {call.axis}", segment.kind, segment.call)


def in_flight(rank: RankTimeline, index: int, call: CallSpan) -> Iterator[Event]:
    """Yields the begin and the end of a collective."""
    common = {
        "name": f"{call.op} {call.axis}", "cat": f"axis {call.axis}", "pid": rank.rank, "tid": 0,
        "id": f"{rank.rank}.{index}",
    }  # fmt: skip
    yield {"ph": "b", "ts": call.start / 1e3, **common, "args": about(call)}
    yield {"ph": "e", "ts": call.end / 1e3, **common}


def about(call: CallSpan) -> dict[str, Any]:
    """Returns what a viewer shows beside a collective."""
    return {
        "unit": call.unit, "phase": call.phase, "payload_bytes": call.payload,
        "sent_bytes": call.sent, "algorithm": call.algorithm, "about": call.about,
        "at": call.where, "exposed_us": call.exposed / 1e3, "hidden_us": call.hidden / 1e3,
    }  # fmt: skip
