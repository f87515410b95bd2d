"""Pictures of a pipeline: what each rank does when, where it waits, how much it holds meanwhile.

One lane a rank, one bar an action; where there is no bar the rank is idle, and how much of the time
stands beside its lane. Time runs from the first action of any rank to the end of the last one, as
in `simulate.bubble`. Below, on the same clock: the forwards held, whose B or W has not ended.

A schedule played through on paper (`ideal`) and a measured step are drawn alike; `side_by_side` has
both, with as much work in them, so that what one is longer by is waiting. Messages are not drawn: a
rank that waits for a message computes nothing, and is idle.

No window opens, and no global state of matplotlib changes. It takes a while to import, so import
this where a picture is drawn.
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
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dist_lab.errors import UserError
from dist_lab.parallel.schedules.actions import COMPUTE, Op, Schedule
from dist_lab.parallel.schedules.simulate import TimedAction, peak_activations, timeline

Rows = Sequence[Sequence[TimedAction]]

# The shades of a rank's first and last stage. Each op has a band of lightness to itself, so that it
# is known in grey too, and the hues are apart for whoever is color-blind.
LOOKS = {
    Op.F: ("F, forward", "#0f3565", "#234f7d"),
    Op.B: ("B, backward", "#c2440c", "#dd6a1b"),
    Op.I: ("I, its input gradient", "#4fbfb0", "#7fd0c2"),
    Op.W: ("W, its weight gradients", "#f0cf3c", "#fbe98f"),
}
IDLE: dict[str, Any] = {"fc": "#f6f6f6", "ec": "#dadada", "hatch": "////", "linewidth": 0}
HELD, QUIET = ("#8a7fa8", "#a096bb"), "#555555"
CENTER: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True}  # not for layout to see
LANE, STRIP, AROUND, BESIDE = 0.42, 0.32, 1.8, 1.3  # inches: of a rank, and of the text around all
BAR, NARROWEST, WIDEST = 0.16, 9.5, 24.0  # inches: of a short bar, unless the page gets too wide
LEAST, TWO_LINES, LARGEST, DIGIT = (
    4.5,
    6.0,
    9.0,
    0.7,
)  # points of letters; of a digit, width : height


def draw(rows: Rows, *, title: str, unit: str) -> Figure:
    """The lanes, and below them what each rank holds. `unit`: what time is counted in."""
    rows = _from_zero(rows)
    whole = f"{title}: {fmean(idle_shares(rows)):.1%} idle"
    figure, (lanes, strips) = _page(whole, unit, rows, _end(rows), [LANE, STRIP])
    _draw_lanes(lanes, rows)
    _draw_held(strips, rows)
    return figure


def ideal(schedule: Schedule) -> Figure:
    """The schedule as it goes if what travels takes no time."""
    return draw(timeline(schedule), title=_label(schedule), unit="units of one stage's forward")


def side_by_side(measured: Rows, schedule: Schedule, title: str) -> Figure:
    """A measured step, and below it its schedule on paper, both in ms.

    A unit on paper is so long that all ranks together compute as long as they did in the step.
    """
    measured, paper = _from_zero(measured), timeline(schedule)
    idle = [fmean(idle_shares(rows)) for rows in (measured, paper)]
    unit = (1 - idle[0]) * _end(measured) / ((1 - idle[1]) * _end(paper))
    paper = [[replace(s, start=unit * s.start, end=unit * s.end) for s in row] for row in paper]
    end = max(_end(measured), _end(paper))
    figure, panels = _page(title, "ms", measured, end, [LANE, LANE])
    names = "measured", f"ideal, for as much work: {_label(schedule)}"
    for axes, name, rows, share in zip(panels, names, (measured, paper), idle, strict=True):
        _draw_lanes(axes, rows, f"{name}: {_end(rows):,.4g} ms, {share:.1%} idle")
    return figure


def write(figure: Figure, path: str | Path) -> None:
    """As .svg, .png or .pdf. The same picture is the same bytes.

    Raises:
        UserError: another suffix, or a place that cannot be written to.
    """
    kind = Path(path).suffix.lower()
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
    if kind not in dates:
        raise UserError(f"no kind of picture is called {str(path)!r}; end it .svg, .png or .pdf")
    try:
        with rc_context({"svg.hashsalt": "dist_lab"}):  # its ids are random without
            figure.savefig(path, metadata=dates[kind])
    except OSError as error:
        why = f"no picture can be written to {str(path)!r} ({error.strerror})"
        raise UserError(f"{why}; name a file in a folder that exists and is yours") from None


def image(figure: Figure) -> NDArray[numpy.uint8]:
    """Its pixels, height x width x 3: TensorBoard's add_image takes them with dataformats="HWC"."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_json(rows: Rows, schedule_name: str) -> dict[str, Any]:
    """A step whose slots are in ms, as data."""
    slots = [
        [{"action": str(s.action), "start_ms": s.start, "end_ms": s.end} for s in row]
        for row in rows
    ]  # fmt: skip
    return {
        "schedule": schedule_name, "unit": "ms", "ranks": slots,
        "idle_share": fmean(idle_shares(rows)), "peak_activations": _peaks(rows),
    }  # fmt: skip


def idle_shares(rows: Rows) -> list[float]:
    """Of each rank: the share of all ranks' time in which it computes nothing."""
    rows = _from_zero(rows)
    return [1 - sum(slot.end - slot.start for slot in row) / _end(rows) for row in rows]


def _from_zero(rows: Rows) -> list[list[TimedAction]]:
    """What is computed, by a clock that starts with the first action."""
    rows = [[slot for slot in row if slot.action.op in COMPUTE] for row in rows]
    zero = min(slot.start for row in rows for slot in row)
    return [[replace(s, start=s.start - zero, end=s.end - zero) for s in row] for row in rows]


def _end(rows: Rows) -> float:
    return max(slot.end for row in rows for slot in row)


def _short(rows: Rows) -> float:
    """How long a short action is; a tenth of all may be shorter, as happens in a measured step."""
    lengths = [slot.end - slot.start for row in rows for slot in row]
    return max(float(numpy.quantile(lengths, 0.1)), 1e-9)


def _peaks(rows: Rows) -> list[int]:
    return peak_activations(Schedule("", tuple(tuple(s.action for s in row) for row in rows)))


def _several_stages(rows: Rows) -> bool:
    return any(len({slot.action.stage for slot in row}) > 1 for row in rows)


def _label(schedule: Schedule) -> str:
    ranks, microbatches = len(schedule.ranks), schedule.microbatches
    return f"{Path(schedule.name).name:.40}, {ranks} ranks, {microbatches} micro-batches"


def _shade(op: Op, chunk: int, chunks: int) -> str:
    first, last = (numpy.array(to_rgb(color)) for color in LOOKS[op][1:])
    return to_hex(first + (last - first) * (chunk / (chunks - 1) if chunks > 1 else 0.5))


def _page(
    title: str, unit: str, rows: Rows, end: float, tall: Sequence[float]
) -> tuple[Figure, list[Axes]]:
    """Panels one below the other with one clock, wide enough for the bars; title and legend."""
    width = min(max(BAR * end / _short(rows) + BESIDE, NARROWEST), WIDEST)
    size = width, AROUND + sum(tall) * len(rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(
        len(tall), sharex=True, height_ratios=tall, subplot_kw={"xlim": (0, end)}
    )
    panels = list[Axes](grid)
    for axes in panels:
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, colors=QUIET)
    clock = panels[-1]
    clock.spines["bottom"].set(visible=True, color=QUIET)
    clock.tick_params("x", length=3)
    clock.xaxis.set_major_locator(MaxNLocator(int(width), integer=unit != "ms"))
    clock.set_xlabel(f"time, {unit}", fontsize=8, color=QUIET)
    used = {slot.action.op for row in rows for slot in row}
    looks = [Patch(color=_shade(op, 0, 1), label=LOOKS[op][0]) for op in LOOKS if op in used]
    if _several_stages(rows):
        looks[0].set_label(f"{looks[0].get_label()} (darkest: a rank's first stage)")
    legend = figure.legend(
        handles=[*looks, Patch(**IDLE, label="idle")], loc="outside upper left", frameon=False,
        ncols=len(LOOKS) + 1, fontsize=8, alignment="left",
        title=title, title_fontproperties={"size": 11, "weight": "bold"},
    )  # fmt: skip
    legend.get_title().set_parse_math(False)  # a file's name may have dollars
    return figure, panels


def _draw_lanes(axes: Axes, rows: Rows, head: str = "") -> None:
    """`head`: what stands above them; how to read a bar, if it is empty.

    A number is as large as its bar lets it be. Where there is no room for it, it is left out.
    """
    several, names = _several_stages(rows), []
    largest = max(max(s.action.microbatch, s.action.stage * several) for row in rows for s in row)
    inches, units = axes.figure.bbox.width / axes.figure.dpi - BESIDE, axes.get_xlim()[1]
    size_of_one = 72 * inches / units / (DIGIT * len(str(largest)))  # in a bar of one unit
    axes.barh(range(len(rows)), _end(rows), 0.8, **IDLE)
    for rank, (row, idle) in enumerate(zip(rows, idle_shares(rows), strict=True)):
        stages = sorted({slot.action.stage for slot in row})
        own = f"\nstages {', '.join(map(str, stages[:2]))}{' ..' * (len(stages) > 2)}"
        names.append(f"rank {rank}, {idle:.1%} idle" + own * (len(stages) > 1))
        shades = [_shade(s.action.op, stages.index(s.action.stage), len(stages)) for s in row]
        bars = [(slot.start, slot.end - slot.start) for slot in row]
        axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=shades, edgecolor="white", lw=0.5)
        for action, (start, long) in zip((slot.action for slot in row), bars, strict=True):
            large, ink = min(size_of_one * long, LARGEST), "white" if action.op is Op.F else "black"
            small = 0.75 * large * several
            up = 0.14 * (small >= LEAST)
            for number, size, y in (action.microbatch, large, -up), (action.stage, small, 0.22):
                if size >= LEAST:
                    axes.text(
                        start + long / 2, rank + y, str(number), size=size, color=ink, **CENTER
                    )
    reading = "in a bar: the micro-batch" + ", below it the stage, if there is room" * several
    _label_rows(axes, head or reading, names)


def _draw_held(axes: Axes, rows: Rows) -> None:
    peaks = _peaks(rows)
    unit = 0.84 / max(*peaks, 1)
    for rank, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        changes = [
            (slot.start, 1) if slot.action.op is Op.F else (slot.end, -1)
            for slot in row if slot.action.op is not Op.I
        ]  # fmt: skip
        times = [0.0, *(time for time, _ in changes), _end(rows)]
        held = list(accumulate((by for _, by in changes), initial=0))
        floor = rank + 0.42
        for n in range(peak):  # one above the other, in turn darker and lighter: to be counted
            tops = floor - unit * numpy.clip([*held, held[-1]], n, n + 1)
            axes.fill_between(times, floor - unit * n, tops, step="post", color=HELD[n % 2], lw=0)
        axes.hlines([floor], 0, _end(rows), color="#bbbbbb", linewidth=0.6)
    names = [f"rank {rank}, {peak} at most" for rank, peak in enumerate(peaks)]
    _label_rows(axes, "a stage's forwards held, until the end of their backward", names)


def _label_rows(axes: Axes, head: str, names: Sequence[str]) -> None:
    axes.set_title(head, loc="left", fontsize=8, color=QUIET, parse_math=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # rank 0 on top
