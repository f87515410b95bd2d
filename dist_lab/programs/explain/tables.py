"""The tables of explain: the grid of ranks, layouts, memory, and the collectives of a step."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, product

from rich.table import Table

from dist_lab.comm.ledger import SHARE_SENT, Call, formula_bytes
from dist_lab.job import Job
from dist_lab.layout.layout import OnlyOn, Placement, Shard
from dist_lab.mesh.topology import ORDER, lines
from dist_lab.observe import memory
from dist_lab.observe.console import empty_table
from dist_lab.programs.explain.dry_run import Seen


def rank_grid(axes: dict[str, int]) -> Table:
    """Each rank's coordinates, outer axis first; neighbors on the last are neighbors in number."""
    long = {name: axes[name] for name in ORDER if name in axes}
    title = f"ranks of {' x '.join(f'{a}={n}' for a, n in long.items())}"
    *outer, inner = long
    columns = [f"{inner}={i}" for i in range(long[inner])]
    table = empty_table([" ".join(outer)], columns, title=title)
    positions = product(*(range(long[name]) for name in outer))
    for position, ranks in zip(positions, lines(long, [inner]), strict=True):
        place = " ".join(f"{a}={i}" for a, i in zip(outer, position, strict=True))
        table.add_row(place, *map(str, ranks))
    return table


def layout_table(job: Job) -> Table:
    """Where each parameter lies. Blocks that are alike share a row: layers.0-7."""
    columns = ["parameter", "shape", "dtype", "here", "gradient summed over"]
    table = empty_table(columns, ["bytes here"], title="where parameters lie, on rank 0")
    rows: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # -> (number of the block, bytes)
    own = dict(job.model.named_parameters())
    for name, parameter in own.items():
        layout = job.layouts[name]
        number = re.search(r"\.(\d+)\.", name)
        split = ", ".join(_how(axis, how) for axis, how in layout.splits)
        key = (
            re.sub(r"\.\d+\.", ".{}.", name, count=1), str(list(layout.shape)),
            str(layout.dtype).removeprefix("torch."), split or "whole",
            ", ".join(owed.axis for owed in layout.partial) or "-",
        )  # fmt: skip
        rows.setdefault(key, []).append((int(number[1]) if number else 0, parameter.nbytes))
    for (name, *cells), alike in rows.items():
        numbers, sizes = zip(*alike, strict=True)
        table.add_row(name.format(_ranges(numbers)), *cells, f"{sum(sizes):,}")
    total = sum(p.nbytes for p in own.values())
    count = sum(p.numel() for p in own.values())
    table.add_section()
    table.add_row(f"{count:,} parameters", "", "", "", "", f"{total:,}")
    return table


def memory_table(seen: Seen) -> Table:
    """Measured in those two steps, beside what the layout says of what stays here."""
    job, peak = seen.job, seen.peak
    of_formula = memory.by_layout(job, seen.optimizer)
    count = sum(layout.shape.numel() for layout in job.layouts.values())
    columns = ["at the peak", "at its own peak", "per parameter", "by layout"]
    table = empty_table(["kind"], columns, title="memory of rank 0 in a step, bytes")
    for kind in memory.KINDS:
        own, wanted = peak.own[kind], of_formula.get(kind)
        if own:
            table.add_row(
                kind.replace("_", " "), f"{peak.at_peak[kind]:,}", f"{own:,}", f"{own / count:.2f}",
                "" if wanted is None else f"{wanted:,}",
            )  # fmt: skip
    table.add_section()
    table.add_row("together", f"{peak.total:,}", "", f"{peak.total / count:.2f}", "")
    return table


def calls_table(title: str, calls: Sequence[Call]) -> Table:
    table = empty_table(["phase", "collective", "axis", "for"], ["payload", "sent"], title=title)
    for call in shortened(calls):
        if isinstance(call, int):
            table.add_row("", f"... {call} more", "", "", "", "")
        else:
            what = call.unit or call.about
            table.add_row(
                call.phase, call.op, call.axis, what, f"{call.payload:,}", f"{call.sent:,}"
            )
    return table


def shortened(calls: Sequence[Call], most: int = 24) -> Iterator[Call | int]:
    """The calls; of a long run of one kind its beginning, how many more, and its end."""
    for _, run in groupby(calls, key=lambda call: (call.phase, call.op, call.axis)):
        alike = list(run)
        if len(alike) <= most:
            yield from alike
        else:
            yield from alike[:3]
            yield len(alike) - 4
            yield alike[-1]


def totals_table(calls: Sequence[Call]) -> Table:
    """By collective, beside the published formula's bytes."""
    columns = ["calls", "payload S", "formula", "by formula", "sent"]
    title = "in all, bytes a step on rank 0"
    table = empty_table(["collective", "axis"], columns, title=title)
    for (op, axis, size), run in groupby(
        sorted(calls, key=lambda c: (c.op, c.axis)), key=lambda c: (c.op, c.axis, c.size)
    ):
        mine = list(run)
        payload = sum(call.payload for call in mine)
        share = SHARE_SENT.get(op)
        formula = f"{share if share != 1 else ''} (N-1)/N S".strip() if share else "S"
        wanted = formula_bytes(op, size, payload) if share else payload
        table.add_row(
            op, axis, str(len(mine)), f"{payload:,}", formula, f"{float(wanted):,.0f}",
            f"{sum(call.sent for call in mine):,}",
        )  # fmt: skip
    return table


def _how(axis: str, how: Placement) -> str:
    if isinstance(how, OnlyOn):
        return f"whole, as one stage of {axis} alone"
    return f"dim {how.dim} over {axis}" if isinstance(how, Shard) else f"elements over {axis}"


def _ranges(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{min(numbers)}-{max(numbers)}"
