"""The pipeline of the last step: what each rank computed and when, and the ideal schedule below it.

Both have the same amount of work, so the difference in length is waiting.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_lab.observe.report.charts import legend
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Html,
    Section,
    figure,
    number,
    section,
    table,
    tag,
)
from dist_lab.observe.report.units import of_ms, percent
from dist_lab.parallel.schedules.actions import Action, Op

OPS = {
    Op.F: "F, forward", Op.B: "B, backward", Op.I: "I, its input gradient",
    Op.W: "W, its weight gradients",
}  # fmt: skip
NARROW = 1.6  # percent of the width: a narrower bar has no number
Row = Sequence[tuple[Action, float, float]]  # action, start and end


def grids(pipeline: Mapping[str, Any]) -> Section:
    """The measured grid above the ideal one."""
    measured = [_row(row, "start_ms", "end_ms") for row in pipeline["ranks"]]
    ideal = [_row(row, "start", "end") for row in pipeline["ideal"]["ranks"]]
    idle, ideal_idle = pipeline["idle_share"], pipeline["ideal"]["idle_share"]
    zero = min(start for row in measured for _, start, _ in row)
    measured = [[(a, start - zero, end - zero) for a, start, end in row] for row in measured]
    unit = (1 - idle) * _end(measured) / ((1 - ideal_idle) * _end(ideal))  # ms of one ideal forward
    ideal = [[(a, unit * start, unit * end) for a, start, end in row] for row in ideal]
    end = max(_end(measured), _end(ideal))
    used = {action.op for row in measured for action, *_ in row}
    keys = legend([(text, op.value) for op, text in OPS.items() if op in used])
    lead = (
        f"Schedule {pipeline['schedule']}. A number is the micro-batch. A rank is idle where "
        "nothing is drawn. The ideal one does the same work, with messages that take no time."
    )
    return section(
        "pipeline", "Pipeline", keys,
        figure(f"measured: {of_ms(_end(measured))}, {percent(idle)} idle", lanes(measured, end)),
        figure(f"ideal: {of_ms(_end(ideal))}, {percent(ideal_idle)} idle", lanes(ideal, end),
               details=idle_table(measured, ideal, pipeline["peak_activations"]),
               about="idle time and held forwards as a table"),
        lead=lead,
    )  # fmt: skip


def lanes(rows: Sequence[Row], end: float) -> Html:
    """One lane for each rank, and a bar for each action."""
    several = any(len({action.stage for action, *_ in row}) > 1 for row in rows)
    parts: list[Content] = []
    for rank, row in enumerate(rows):
        bars = []
        for action, start, stop in row:
            wide = 100 * (stop - start) / end
            text = str(action.microbatch) if wide >= NARROW else ""
            title = str(action) if several else None
            style = f"left:{100 * start / end:.2f}%;width:{wide:.2f}%"
            bars.append(tag("i", text, class_=action.op.value, style=style, title=title))
        parts += [tag("span", f"rank {rank}"), tag("div", *bars, class_="lane")]
    scale = tag("div", tag("span", "0"), tag("span", of_ms(end)), class_="end")
    return tag("div", *parts, scale, class_="lanes", aria_hidden="true")


def idle_table(measured: Sequence[Row], ideal: Sequence[Row], held: Sequence[int]) -> Html:
    rows: list[list[Content | Cell]] = []
    for rank, (real, simulated, most) in enumerate(zip(measured, ideal, held, strict=True)):
        idle, ideal_idle = (1 - _busy(row) / _end(rows_) for row, rows_ in
                            ((real, measured), (simulated, ideal)))  # fmt: skip
        rows.append([
            f"rank {rank}", number(of_ms(_busy(real)), _busy(real)),
            number(percent(idle), idle), number(percent(ideal_idle), ideal_idle),
            number(str(most), most),
        ])  # fmt: skip
    head = ["rank", "computing", "idle, measured", "idle, ideal", "forwards held at most"]
    return table("the last step, by pipeline rank", head, rows)


def _row(row: Sequence[Mapping[str, Any]], start: str, end: str) -> Row:
    parsed = ((Action.parse(timed["action"]), timed[start], timed[end]) for timed in row)
    return [(action, a, b) for action, a, b in parsed if action is not None and action.op in OPS]


def _end(rows: Sequence[Row]) -> float:
    return max(end for row in rows for *_, end in row)


def _busy(row: Row) -> float:
    return sum(end - start for _, start, end in row)
