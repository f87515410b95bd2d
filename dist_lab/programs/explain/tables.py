"""The tables of explain: layouts, memory, and the collectives of a step."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

from rich.table import Table

from dist_lab.comm.context import SHARED_MEMORY
from dist_lab.comm.ledger import SHARE_SENT, Call, formula_bytes
from dist_lab.job import Job
from dist_lab.layout.layout import OnlyOn, Placement, Shard
from dist_lab.observe import memory, memory_series
from dist_lab.observe.console import empty_table
from dist_lab.programs.explain.dry_run import DryRunResult


def layout_table(job: Job) -> Table:
    """Returns the layout of each parameter. Equal blocks share a row: layers.0-7."""
    columns = ["parameter", "shape", "dtype", "layout", "gradient summed over"]
    table = empty_table(columns, ["bytes"], title=f"parameters on rank {job.mesh.rank}")
    rows: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # row -> (block number, bytes)
    parameters = dict(job.model.named_parameters())
    for name, parameter in parameters.items():
        layout = job.layouts[name]
        number = re.search(r"\.(\d+)\.", name)
        split = ", ".join(_how(axis, how) for axis, how in layout.splits)
        key = (
            re.sub(r"\.\d+\.", ".{}.", name, count=1), str(list(layout.shape)),
            str(layout.dtype).removeprefix("torch."), split or "replicated",
            ", ".join(partial.axis for partial in layout.partial) or "-",
        )  # fmt: skip
        rows.setdefault(key, []).append((int(number[1]) if number else 0, parameter.nbytes))
    for (name, *cells), blocks in rows.items():
        numbers, sizes = zip(*blocks, strict=True)
        table.add_row(name.format(_ranges(numbers)), *cells, f"{sum(sizes):,}")
    total = sum(p.nbytes for p in parameters.values())
    count = sum(p.numel() for p in parameters.values())
    table.add_section()
    table.add_row(f"{count:,} parameters", "", "", "", "", f"{total:,}")
    return table


def memory_table(result: DryRunResult) -> Table:
    """Returns the measured memory by kind, next to the bytes computed from the layouts."""
    job, peak = result.job, result.peak
    by_layout = memory.by_layout(job, result.optimizer)
    count = sum(layout.shape.numel() for layout in job.layouts.values())
    columns = ["at the peak", "at its own peak", "per parameter", "by layout"]
    title = f"memory of rank {job.mesh.rank} in a step, bytes"
    table = empty_table(["kind"], columns, title=title)
    for kind in memory.KINDS:
        own_peak, computed = peak.own[kind], by_layout.get(kind)
        if own_peak:
            table.add_row(
                kind.replace("_", " "), f"{peak.at_peak[kind]:,}", f"{own_peak:,}",
                f"{own_peak / count:.2f}", "" if computed is None else f"{computed:,}",
            )  # fmt: skip
    table.add_section()
    table.add_row("total", f"{peak.total:,}", "", f"{peak.total / count:.2f}", "")
    return table


def alive_table(result: DryRunResult, most: int = 6) -> Table:
    """Returns what is alive at the peak, and whose it is: the largest, and all the others."""
    title = "alive at the peak, the largest first, bytes"
    table = empty_table(["kind", "of", "since"], ["tensors", "bytes"], title=title)
    rows = result.series["peak"]["alive"]
    for row in rows[:most]:
        kind = row["kind"].replace("_", " ")
        table.add_row(kind, row["of"], row["when"], f"{row['tensors']:,}", f"{row['bytes']:,}")
    if rest := rows[most:]:
        tensors, size = (sum(row[name] for row in rest) for name in ("tensors", "bytes"))
        table.add_row("", memory_series.REST, "", f"{tensors:,}", f"{size:,}")
    return table


def calls_table(title: str, calls: Sequence[Call]) -> Table:
    """Returns the collectives in order."""
    table = empty_table(["phase", "collective", "axis", "for"], ["payload", "sent"], title=title)
    for call in shortened(calls):
        if isinstance(call, int):
            table.add_row("", f"... {call} more", "", "", "", "")
        else:
            purpose = call.unit or call.about
            table.add_row(
                call.phase, call.op, call.axis, purpose, f"{call.payload:,}", f"{call.sent:,}"
            )
    return table


def shortened(calls: Sequence[Call], most: int = 24) -> Iterator[Call | int]:
    """Yields the calls; a long run of similar ones as its first three, a count and its last.

    The calls that set up shared memory are yielded as one, with the sum of their bytes.
    """
    similar_to = attrgetter("phase", "op", "axis")
    for (sets_up, _), run in groupby(calls, lambda c: (c.unit == SHARED_MEMORY, similar_to(c))):
        similar = list(run)
        if sets_up:
            payload, sent = sum(c.payload for c in similar), sum(c.sent for c in similar)
            about = f"set-up of {SHARED_MEMORY}, {len(similar)} calls"
            yield replace(similar[0], unit=about, payload=payload, sent=sent)
        elif len(similar) <= most:
            yield from similar
        else:
            yield from similar[:3]
            yield len(similar) - 4
            yield similar[-1]


def totals_table(calls: Sequence[Call], rank: int) -> Table:
    """Returns the bytes by collective, next to those of the published formula."""
    columns = ["calls", "payload S", "formula", "by formula", "sent"]
    title = f"total per step on rank {rank}, bytes"
    table = empty_table(["collective", "axis"], columns, title=title)
    for (op, axis, size), run in groupby(
        sorted(calls, key=lambda c: (c.op, c.axis)), key=lambda c: (c.op, c.axis, c.size)
    ):
        group = list(run)
        payload = sum(call.payload for call in group)
        share = SHARE_SENT.get(op)
        formula = f"{share if share != 1 else ''} (N-1)/N S".strip() if share else "S"
        formula_sent = formula_bytes(op, size, payload)
        table.add_row(
            op, axis, str(len(group)), f"{payload:,}", formula, f"{float(formula_sent):,.0f}",
            f"{sum(call.sent for call in group):,}",
        )  # fmt: skip
    return table


def _how(axis: str, how: Placement) -> str:
    if isinstance(how, OnlyOn):
        return f"only on its {axis} stage"
    return f"dim {how.dim} over {axis}" if isinstance(how, Shard) else f"elements over {axis}"


def _ranges(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{min(numbers)}-{max(numbers)}"
