"""Pictures of a pipeline: what each rank computes, when it is idle, and how many forwards it holds.

Each rank has one lane, and each action one bar. A rank is idle where there is no bar; its share of
idle time is printed beside its lane. Time runs from the first action of any rank to the end of the
last one, as in `simulate.bubble`. Below, on the same time axis, are the forwards held: those whose
B or W has not ended.

A simulated schedule (`ideal`) and a measured step are drawn in the same way. `side_by_side` draws
both with the same amount of work, so that the difference in length is waiting. Messages are not
drawn: a rank that waits for a message computes nothing, and is idle.

No window opens, and no global state of matplotlib changes. matplotlib is slow to import, so import
this module only where a picture is drawn.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dist_lab.errors import UserError
from dist_lab.parallel.schedules.actions import Op, Schedule
from dist_lab.parallel.schedules.simulate import (
    TimedAction,
    from_zero,
    idle_shares,
    peak_activations,
    timeline,
)

Rows = Sequence[Sequence[TimedAction]]

# The shades of a rank's first and last stage. Each op has its own band of lightness, so that it can
# be recognised in grey. The hues differ for color-blind readers as well.
LOOKS = {
    Op.F: ("F, forward", "#0f3565", "#234f7d"),
    Op.B: ("B, backward", "#c2440c", "#dd6a1b"),
    Op.I: ("I, its input gradient", "#4fbfb0", "#7fd0c2"),
    Op.W: ("W, its weight gradients", "#f0cf3c", "#fbe98f"),
}
IDLE: dict[str, Any] = {"fc": "#f6f6f6", "ec": "#dadada", "hatch": "////", "linewidth": 0}
HELD, QUIET = ("#8a7fa8", "#a096bb"), "#555555"
# Clipped text does not count for the layout.
CENTER: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True}
LANE, STRIP, AROUND, BESIDE = 0.42, 0.32, 1.8, 1.3  # inches: per rank, and for the text around
BAR, NARROWEST, WIDEST = 0.16, 9.5, 24.0  # inches: of a short bar, and of the page
IDEAL_UNIT = "units of one stage's forward"
# Font sizes in points, and the width of a digit relative to its height.
LEAST, LARGEST, DIGIT = 4.5, 9.0, 0.7


def draw(rows: Rows, *, title: str, unit: str) -> Figure:
    """Returns the lanes, and below them the forwards that each rank holds. `unit`: of time."""
    figure = _new_figure(from_zero(rows), [LANE, STRIP])
    draw_into(figure, rows, title=title, unit=unit)
    return figure


def draw_into(figure: Figure | SubFigure, rows: Rows, *, title: str, unit: str) -> None:
    """Draw what `draw` returns into a part of a larger figure."""
    rows = from_zero(rows)
    full_title = f"{title}: {fmean(idle_shares(rows)):.1%} idle"
    lanes, strips = _panels(figure, full_title, unit, rows, _end(rows), [LANE, STRIP])
    _draw_lanes(lanes, rows)
    _draw_held(strips, rows)


def ideal(schedule: Schedule) -> Figure:
    """Returns a picture of the schedule as simulated, with messages that take no time."""
    return draw(timeline(schedule), title=_label(schedule), unit=IDEAL_UNIT)


def ideal_into(figure: Figure | SubFigure, schedule: Schedule) -> None:
    """Draw what `ideal` returns into a part of a larger figure."""
    draw_into(figure, timeline(schedule), title=_label(schedule), unit=IDEAL_UNIT)


def side_by_side(measured: Rows, schedule: Schedule, title: str) -> Figure:
    """Returns a picture of a measured step, and below it of its simulated schedule, both in ms.

    A unit of simulated time is scaled so that both have the same total time of computation.
    """
    measured, simulated = from_zero(measured), timeline(schedule)
    idle = [fmean(idle_shares(rows)) for rows in (measured, simulated)]
    unit = (1 - idle[0]) * _end(measured) / ((1 - idle[1]) * _end(simulated))
    simulated = [
        [replace(s, start=unit * s.start, end=unit * s.end) for s in row] for row in simulated
    ]
    end = max(_end(measured), _end(simulated))
    figure = _new_figure(measured, [LANE, LANE], end)
    panels = _panels(figure, title, "ms", measured, end, [LANE, LANE])
    names = "measured", f"ideal, for the same work: {_label(schedule)}"
    for axes, name, rows, share in zip(panels, names, (measured, simulated), idle, strict=True):
        _draw_lanes(axes, rows, f"{name}: {_end(rows):,.4g} ms, {share:.1%} idle")
    return figure


def write(figure: Figure, path: str | Path) -> None:
    """Write .svg, .png or .pdf. The same picture gives the same bytes.

    Raises:
        UserError: another suffix, or a file that cannot be written.
    """
    kind = Path(path).suffix.lower()
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
    if kind not in dates:
        raise UserError(f"unknown kind of picture {str(path)!r}; end it .svg, .png or .pdf")
    try:
        with rc_context({"svg.hashsalt": "dist_lab"}):  # otherwise ids are random
            figure.savefig(path, metadata=dates[kind])
    except OSError as error:
        problem = f"cannot write the picture to {str(path)!r} ({error.strerror})"
        raise UserError(f"{problem}; give a file in a folder that you can write to") from None


def image(figure: Figure) -> NDArray[numpy.uint8]:
    """Returns the pixels, height x width x 3: dataformats="HWC" in TensorBoard's add_image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_json(rows: Rows, schedule_name: str) -> dict[str, Any]:
    """Returns a step in ms as data."""
    actions = [
        [{"action": str(s.action), "start_ms": s.start, "end_ms": s.end} for s in row]
        for row in rows
    ]  # fmt: skip
    return {
        "schedule": schedule_name, "unit": "ms", "ranks": actions,
        "idle_share": fmean(idle_shares(rows)), "peak_activations": _peaks(rows),
    }  # fmt: skip


def ideal_to_json(schedule: Schedule) -> dict[str, Any]:
    """Returns the simulated schedule as data, in units of one stage's forward."""
    rows = timeline(schedule)
    actions = [
        [{"action": str(s.action), "start": s.start, "end": s.end} for s in row] for row in rows
    ]
    return {"unit": IDEAL_UNIT, "ranks": actions, "idle_share": fmean(idle_shares(rows))}


def _end(rows: Rows) -> float:
    return max(timed.end for row in rows for timed in row)


def _short(rows: Rows) -> float:
    """Returns the length of a short action, the 10% quantile: a measured step has outliers."""
    lengths = [timed.end - timed.start for row in rows for timed in row]
    return max(float(numpy.quantile(lengths, 0.1)), 1e-9)


def _peaks(rows: Rows) -> list[int]:
    return peak_activations(Schedule("", tuple(tuple(s.action for s in row) for row in rows)))


def _several_stages(rows: Rows) -> bool:
    return any(len({timed.action.stage for timed in row}) > 1 for row in rows)


def _label(schedule: Schedule) -> str:
    ranks, microbatches = len(schedule.ranks), schedule.microbatches
    return f"{Path(schedule.name).name:.40}, {ranks} ranks, {microbatches} micro-batches"


def _shade(op: Op, chunk: int, chunks: int) -> str:
    first, last = (numpy.array(to_rgb(color)) for color in LOOKS[op][1:])
    return to_hex(first + (last - first) * (chunk / (chunks - 1) if chunks > 1 else 0.5))


def _new_figure(rows: Rows, heights: Sequence[float], end: float | None = None) -> Figure:
    """Returns an empty figure, as large as the rows need. `end`: of the time axis."""
    end = _end(rows) if end is None else end
    width = min(max(BAR * end / _short(rows) + BESIDE, NARROWEST), WIDEST)
    size = width, AROUND + sum(heights) * len(rows)
    return Figure(figsize=size, dpi=150, layout="constrained")


def _panels(
    figure: Figure | SubFigure, title: str, unit: str, rows: Rows, end: float,
    heights: Sequence[float],
) -> list[Axes]:  # fmt: skip
    """Draw title and legend. Returns the panels, stacked on one time axis."""
    grid = figure.subplots(
        len(heights), sharex=True, height_ratios=heights, subplot_kw={"xlim": (0, end)}
    )
    panels = list[Axes](grid)
    for axes in panels:
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, colors=QUIET)
    clock = panels[-1]
    clock.spines["bottom"].set(visible=True, color=QUIET)
    clock.tick_params("x", length=3)
    clock.xaxis.set_major_locator(MaxNLocator(_inches_wide(figure), integer=unit != "ms"))
    clock.set_xlabel(f"time, {unit}", fontsize=8, color=QUIET)
    used = {timed.action.op for row in rows for timed in row}
    looks = [Patch(color=_shade(op, 0, 1), label=LOOKS[op][0]) for op in LOOKS if op in used]
    if _several_stages(rows):
        looks[0].set_label(f"{looks[0].get_label()} (darkest: a rank's first stage)")
    legend = figure.legend(
        handles=[*looks, Patch(**IDLE, label="idle")], loc="outside upper left", frameon=False,
        ncols=len(LOOKS) + 1, fontsize=8, alignment="left",
        title=title, title_fontproperties={"size": 11, "weight": "bold"},
    )  # fmt: skip
    legend.get_title().set_parse_math(False)  # a file's name may have dollars
    return panels


def _inches_wide(figure: Figure | SubFigure) -> int:
    return int(figure.bbox.width / figure.dpi)


def _draw_lanes(axes: Axes, rows: Rows, head: str = "") -> None:
    """Draw the lanes. `head` is the line above them; if it is empty, it explains the bars.

    Numbers are as large as their bars allow. A number without enough room is left out.
    """
    several, names = _several_stages(rows), []
    largest = max(max(s.action.microbatch, s.action.stage * several) for row in rows for s in row)
    inches, units = axes.figure.bbox.width / axes.figure.dpi - BESIDE, axes.get_xlim()[1]
    size_of_one = 72 * inches / units / (DIGIT * len(str(largest)))  # in a bar of one unit
    axes.barh(range(len(rows)), _end(rows), 0.8, **IDLE)
    for rank, (row, idle) in enumerate(zip(rows, idle_shares(rows), strict=True)):
        stages = sorted({timed.action.stage for timed in row})
        stage_line = f"\nstages {', '.join(map(str, stages[:2]))}{' ..' * (len(stages) > 2)}"
        names.append(f"rank {rank}, {idle:.1%} idle" + stage_line * (len(stages) > 1))
        shades = [_shade(s.action.op, stages.index(s.action.stage), len(stages)) for s in row]
        bars = [(timed.start, timed.end - timed.start) for timed in row]
        axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=shades, edgecolor="white", lw=0.5)
        for action, (start, duration) in zip((timed.action for timed in row), bars, strict=True):
            large, ink = (
                min(size_of_one * duration, LARGEST),
                "white" if action.op is Op.F else "black",
            )
            small = 0.75 * large * several
            up = 0.14 * (small >= LEAST)
            for number, size, y in (action.microbatch, large, -up), (action.stage, small, 0.22):
                if size >= LEAST:
                    axes.text(
                        start + duration / 2, rank + y, str(number), size=size, color=ink, **CENTER
                    )
    legend = "in a bar: the micro-batch" + ", below it the stage, if there is room" * several
    _label_rows(axes, head or legend, names)


def _draw_held(axes: Axes, rows: Rows) -> None:
    peaks = _peaks(rows)
    unit = 0.84 / max(*peaks, 1)
    for rank, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        changes = [
            (timed.start, 1) if timed.action.op is Op.F else (timed.end, -1)
            for timed in row if timed.action.op is not Op.I
        ]  # fmt: skip
        times = [0.0, *(time for time, _ in changes), _end(rows)]
        held = list(accumulate((by for _, by in changes), initial=0))
        floor = rank + 0.42
        for n in range(peak):  # stacked, in alternating shades, so that they can be counted
            tops = floor - unit * numpy.clip([*held, held[-1]], n, n + 1)
            axes.fill_between(times, floor - unit * n, tops, step="post", color=HELD[n % 2], lw=0)
        axes.hlines([floor], 0, _end(rows), color="#bbbbbb", linewidth=0.6)
    names = [f"rank {rank}, {peak} at most" for rank, peak in enumerate(peaks)]
    _label_rows(axes, "a stage's forwards held, until the end of their backward", names)


def _label_rows(axes: Axes, head: str, names: Sequence[str]) -> None:
    axes.set_title(head, loc="left", fontsize=8, color=QUIET, parse_math=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # rank 0 on top
