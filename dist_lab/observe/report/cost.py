"""What a step costs: memory by kind, traffic by collective, and the work and waiting of ranks."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dist_lab.mesh.topology import coordinates
from dist_lab.observe.report.charts import bar, legend
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Html,
    Section,
    join,
    number,
    section,
    table,
    tag,
)
from dist_lab.observe.report.units import of_bytes, of_ms, plural

Summary = Mapping[str, Any]


def memory(summary: Summary, over_time: Html | None = None) -> Section:
    """The bytes of each kind at the peak, at the kind's own peak, and by layout."""
    peak, own = (summary["peak_memory"][name] for name in ("at_peak", "own_peak"))
    computed = summary["by_layout"] or {}
    kinds = [kind for kind in own if own[kind]]
    total = summary["peak_memory_bytes"]
    parts = sorted(((peak[kind], kind) for kind in kinds), reverse=True)
    stack = tag(
        "div",
        *(tag("i", class_=k, style=f"width:{100 * n / total:.2f}%") for n, k in parts),
        class_="stack", aria_hidden="true",
    )  # fmt: skip
    rows: list[list[Content | Cell]] = [
        [
            join([tag("i", class_=f"key {kind}"), words(kind)]),
            number(of_bytes(peak[kind]), peak[kind], f"peak_memory.at_peak.{kind}"),
            number(of_bytes(own[kind]), own[kind], f"peak_memory.own_peak.{kind}"),
            number(of_bytes(computed[kind]), computed[kind], f"by_layout.{kind}")
            if kind in computed
            else "-",
        ]
        for kind in kinds
    ]
    rows.append(["total", number(of_bytes(total), total, "peak_memory_bytes"), "-", "-"])
    head = ["kind", "at the peak", "at its own peak", "by layout"]
    lead = (
        "Live tensor storage of rank 0 in its first two steps, by kind. By layout: local elements "
        "times bytes per element, which is what the kind needs between forward and optimizer."
    )
    whole = table("bytes of rank 0", head, rows)
    return section("memory", "Memory", stack, whole, over_time, lead=lead)


def traffic(summary: Summary) -> Section:
    """The bytes of each collective of a step, beside the formulas."""
    lead = (
        "Rank 0's last step. Payload is the size of the full tensor. Least is the published "
        "formula of that payload; due is that of the algorithm that ran; sent was counted at the "
        "transport."
    )
    rows = summary["traffic"]
    if not rows:
        why = "Nothing is sent: there is one process."
        if rows is None:
            why = "A library's own collectives do not pass through our ledger, and are not counted."
        return section("traffic", "Traffic", tag("p", why))
    rows = sorted(rows, key=lambda row: (row["axis"], row["op"], -row["sent"]))
    most = max(sum(r["sent"] for r in group) for _, group in groupby(rows, _collective)) or 1
    cells: list[list[Content | Cell]] = []
    for name, group in groupby(rows, _collective):
        same = list(group)
        if len(same) > 1:
            cells.append(_row(join([tag("b", name)]), "all phases", same, most))
        cells += [_row(name, row["phase"] or "-", [row], most) for row in same]
    cells.append(_row(join([tag("b", "all")]), "", rows, None))
    head = ["collective", "phase", "", "calls", "payload", "least", "due", "sent", "waiting"]
    return section("traffic", "Traffic", table("bytes of a step", head, cells), lead=lead)


def _collective(row: Mapping[str, Any]) -> str:
    return f"{row['op']} {row['axis']} ({row['ranks']})"


def _row(
    name: Content, phase: str, rows: Sequence[Mapping[str, Any]], most: float | None
) -> list[Content | Cell]:
    """A row of the table of traffic: the sum of some rows of the ledger."""
    total = {field: sum(row[field] for row in rows)
             for field in ("calls", "payload", "formula", "due", "sent", "blocked_ms")}  # fmt: skip
    equal = "" if total["sent"] == total["due"] else " ≠ due"
    return [
        name, phase, None if most is None else bar([(total["sent"], "work")], most),
        number(f"{total['calls']:,}", total["calls"]),
        *(number(of_bytes(total[f]), total[f]) for f in ("payload", "formula", "due")),
        number(of_bytes(total["sent"]) + equal, total["sent"]),
        number(of_ms(total["blocked_ms"]), total["blocked_ms"]),
    ]  # fmt: skip


def ranks(summary: Summary) -> Section:
    """The work and the waiting of each rank, and the stragglers."""
    if summary["ranks"] is None:
        text = "A library waits inside its own code, so the work of its ranks is not known."
        return section("ranks", "Ranks and stragglers", tag("p", text))
    work, wait = summary["ranks"]["work_ms"], summary["ranks"]["wait_ms"]
    longest = max(a + b for a, b in zip(work, wait, strict=True)) or 1.0
    slow = {entry["rank"]: entry for entry in summary["slow_ranks"]}
    rows: list[list[Content | Cell]] = [
        [
            Cell(f"rank {rank}", rank), place(rank, summary["mesh"]),
            bar([(w, "work"), (v, "waiting")], longest),
            number(of_ms(w), w, f"ranks.work_ms.{rank}"),
            number(of_ms(v), v, f"ranks.wait_ms.{rank}"), _slow(slow.get(rank)),
        ]
        for rank, (w, v) in enumerate(zip(work, wait, strict=True))
    ]  # fmt: skip
    lead = (
        "Work is the time of a step without waiting: all steps are as long as the slowest rank's, "
        "so only the work tells who is slow."
    )
    head = ["rank", "place", "", "work", "waiting", "straggler"]
    found = "No rank was slow."
    if slow:
        found = f"{plural(len(slow), 'rank')} {'was' if len(slow) == 1 else 'were'} slow."
    keys = legend([("work", "work"), ("waiting", "waiting")])
    whole = table(f"means of the steps after the warm-up. {found}", head, rows)
    return section("ranks", "Ranks and stragglers", keys, whole, lead=lead)


def _slow(entry: Mapping[str, Any] | None) -> Content:
    if entry is None:
        return "-"
    times = entry["work_ms"] / entry["others_work_ms"]
    steps = f"steps {entry['first_step']} to {entry['last_step']}"
    return tag(
        "span",
        f"{times:.1f} times the others in {steps}, cost {entry['lost_s']:.1f} s",
        class_="off",
    )


def place(rank: int, mesh: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={at}" for axis, at in coordinates(rank, mesh).items()) or "-"


def words(kind: str) -> str:
    return kind.replace("_", " ")
