"""Every rank of a mesh: the table of its classes, and explain.json of them.

    {"strategy": "fsdp@hand", "mesh": {"fsdp": 4}, "layouts": {...},
     "classes": [{"ranks": "0-3", "count": 4, "parameters": 1, "operations": 1, "peak": 1,
                  "memory": {"parameters": {"at_peak": 1, "own_peak": 1}, ...},
                  "traffic": [{"op": "all_gather", "axis": "fsdp", "calls": 1, "payload": 1,
                               "sent": 1}, ...]}]}

The numbers are those of each rank of the class, in bytes; `parameters` and `operations` are counts.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_lab.comm.board.board import numbers_in_words
from dist_lab.layout.layout import to_json
from dist_lab.observe import export, memory, memory_series
from dist_lab.observe.console import empty_table
from dist_lab.observe.report.units import of_bytes
from dist_lab.programs.explain.classes import RankClass, Runs

LONGEST = 40  # characters of the ranks of a class in the table


def show(console: Console, found: Sequence[RankClass], axes: Mapping[str, int]) -> None:
    """Print the classes, what they send along each axis, and a line about all of them."""
    console.print(classes_table(found))
    console.print(traffic_table(found))
    console.print(summary(found, axes), highlight=False, soft_wrap=True)


def classes_table(found: Sequence[RankClass]) -> Table:
    """Returns a row for each class, with the memory of one of its ranks."""
    kinds = [k for k in memory.KINDS if any(one.numbers["at_peak", k] for one in found)]
    columns = ["at the peak", *(kind.replace("_", " ") for kind in kinds), "sent"]
    table = empty_table(["ranks"], columns, title="memory and traffic of a step, MB of each rank")
    for one in found:
        sizes = [one.peak, *(one.numbers["at_peak", kind] for kind in kinds), one.sent]
        table.add_row(in_words(one.ranks), *(f"{size / 1e6:,.1f}" for size in sizes))
    return table


def traffic_table(found: Sequence[RankClass]) -> Table:
    """Returns the bytes of a step by collective and axis, of one rank of each class."""
    table = empty_table(
        ["ranks", "collective", "axis"], ["calls", "payload", "sent"],
        title="sent in a step by one rank of the class, bytes",
    )  # fmt: skip
    for one in found:
        for number, row in enumerate(traffic(one)):
            table.add_row(
                "" if number else in_words(one.ranks), row["op"], row["axis"],
                *(f"{row[what]:,}" for what in ("calls", "payload", "sent")),
            )  # fmt: skip
    return table


def traffic(one: RankClass) -> list[dict[str, Any]]:
    """The calls of one rank of the class, by collective and axis."""
    kinds = sorted(key[1:] for key in one.numbers if key[0] == "calls")
    return [
        {"op": op, "axis": axis}
        | {what: one.numbers[what, op, axis] for what in ("calls", "payload", "sent")}
        for op, axis in kinds
    ]


def in_words(ranks: Sequence[int]) -> str:
    """
    >>> in_words(range(4)), in_words(range(0, 60, 2))
    ('0-3', '0,2,4,6,8,10,12,14,16,18,20,22,24 ... 58 (30)')
    """
    text = numbers_in_words(ranks)
    if len(text) <= LONGEST:
        return text
    shown = text[: LONGEST - 4].rpartition(",")[0]
    return f"{shown} ... {ranks[-1]} ({len(ranks)})"


def summary(found: Sequence[RankClass], axes: Mapping[str, int]) -> str:
    """The classes in one line."""
    most = max(found, key=lambda one: one.peak)
    sent = sum(len(one.ranks) * one.sent for one in found)
    classes = f"{len(found)} class{'es' * (len(found) > 1)}"
    return (
        f"{prod(axes.values()):,} ranks in {classes}: together they send {of_bytes(sent)} a step; "
        f"ranks {in_words(most.ranks)} hold the most, {of_bytes(most.peak)} each"
    )


def write(folder: Path, runs: Runs, found: Sequence[RankClass]) -> Path:
    """Write explain.json. Returns its path.

    memory_predicted.json beside it has the first rank of each class, if all its micro-batches were
    run.
    """
    path, outcome = folder / "explain.json", runs.first_of(0)
    contents = {
        "strategy": outcome.strategies,
        "mesh": dict(runs.axes),
        "layouts": {name: to_json(layout) for name, layout in outcome.layouts.items()},
        "classes": [to_dict(one) for one in found],
    }
    export.write_json(path, contents)
    whole = [runs.done.get((one.ranks[0], runs.microbatches)) for one in found]
    over_time = [outcome.series for outcome in whole if outcome is not None]
    predicted = memory_series.document("predicted", over_time)
    export.write_json(folder / memory_series.PREDICTED, predicted)
    return path


def to_dict(one: RankClass) -> dict[str, Any]:
    """A class in the file."""
    numbers = one.numbers
    return {
        "ranks": numbers_in_words(one.ranks),
        "count": len(one.ranks),
        "parameters": numbers["parameters",],
        "operations": numbers["operations",],
        "peak": one.peak,
        "memory": {
            kind: {name: numbers[name, kind] for name in ("at_peak", "own_peak")}
            for kind in memory.KINDS
        },
        "traffic": traffic(one),
    }
