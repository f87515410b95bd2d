"""A parser of the Chrome trace event format: ValueError unless a viewer can show a file."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

PHASES = {
    "M": ("name", "args"),
    "X": ("name", "cat", "ts", "dur"),
    "b": ("name", "cat", "ts", "id"),
    "e": ("name", "cat", "ts", "id"),
}


def check_trace(trace: Mapping[str, Any]) -> Counter[str]:
    """Check a whole file. Returns the number of events of each kind."""
    events = trace["traceEvents"]
    for event in events:
        check_event(event)
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * 1e3)
            lanes[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1e3)))
    for lane, slices in lanes.items():
        check_nesting(lane, slices)
    check_pairs(events)
    return Counter(event["ph"] for event in events)


def check_event(event: Mapping[str, Any]) -> None:
    if event.get("ph") not in PHASES:
        raise ValueError(f"unknown kind: {event}")
    if missing := {*PHASES[event["ph"]], "pid", "tid"} - event.keys():
        raise ValueError(f"{missing} missing: {event}")
    if not (type(event["pid"]) is type(event["tid"]) is int):
        raise ValueError(f"pid and tid are numbers: {event}")
    for field in ("ts", "dur"):
        if field in event and not (isinstance(event[field], Real) and event[field] >= 0):
            raise ValueError(f"{field} is no time: {event}")


def check_nesting(lane: object, slices: Sequence[tuple[int, int]]) -> None:
    """Of two slices of a lane, one contains the other or they do not overlap. In nanoseconds."""
    around: list[int] = []  # the ends of those that are open
    for start, end in sorted(slices, key=lambda times: (times[0], -times[1])):
        while around and around[-1] <= start:
            around.pop()
        if around and end > around[-1]:
            raise ValueError(f"slices of lane {lane} overlap at {start}")
        around.append(end)


def check_pairs(events: Sequence[Mapping[str, Any]]) -> None:
    """Each asynchronous slice begins once and ends once, later."""
    begun: dict[tuple[object, ...], float] = {}
    for event in events:
        if event["ph"] in "be":
            key = event["pid"], event["cat"], event["id"], event["name"]
            if event["ph"] == "b":
                if key in begun:
                    raise ValueError(f"begins twice: {event}")
                begun[key] = event["ts"]
            elif begun.pop(key) > event["ts"]:
                raise ValueError(f"ends before it begins: {event}")
    if begun:
        raise ValueError(f"no end: {next(iter(begun))}")
