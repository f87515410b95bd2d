"""Pictures of a pipeline: what each rank does when, where it waits, how much it holds meanwhile.

One lane a rank, one bar an action; where there is no bar the rank is idle, and how much of the time
stands beside its lane. The time is that from the first action of any rank to the last one's end, as
in `pp_timeline.bubble`. Below, on the same clock: the forwards held, whose B or W has not ended.

A schedule played through on paper (`ideal`) and a measured step are drawn alike; `side_by_side` has
both, with as much work in them, so that what one is longer by is waiting. What travels is not
drawn: a rank that waits for a message computes nothing, and is idle.

No window opens, and no global state of matplotlib's changes. It takes a while to import, so import
this where a picture is drawn.
"""

from collections.abc import Mapping, Sequence
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
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dist_lab.errors import UserError
from dist_lab.parallel.pp_actions import COMPUTE, Action, Op, Schedule
from dist_lab.parallel.pp_timeline import Slot, peak_activations, timeline

Rows = Sequence[Sequence[Slot]]

# The shades of a rank's first and last stage. Each op has a band of lightness to itself, so that it
# is known in grey too, and the hues are apart for whoever is color-blind.
LOOKS = {
    Op.F: ("F, forward", "#0f3565", "#234f7d"),
    Op.B: ("B, backward", "#c2440c", "#dd6a1b"),
    Op.I: ("I, its input gradient", "#4fbfb0", "#7fd0c2"),
    Op.W: ("W, its weight gradients", "#f0cf3c", "#fbe98f"),
}
IDLE: dict[str, Any] = {"fc": "#f6f6f6", "ec": "#dadada", "hatch": "////", "linewidth": 0}
CENTER: dict[str, Any] = {"ha": "center", "va": "center"}
HELD, QUIET = ("#8a7fa8", "#a096bb"), "#555555"
# In inches; a bar of the shorter kind is BAR wide, two digits, unless the page gets too wide.
LANE, STRIP, BAR, NARROWEST, WIDEST = 0.42, 0.32, 0.16, 9.5, 24.0
LEFT, RIGHT, HEAD, GAP, FOOT = 1.0, 0.7, 0.82, 0.42, 0.5
DPI, LEAST, DIGIT = 150, 4.5, 0.64  # the smallest letters; a digit's width for a height of 1


def draw(rows: Rows, *, title: str, unit: str) -> Figure:
    """The lanes, and below them what each rank holds. `unit`: what time is counted in."""
    rows = _from_zero(rows)
    whole = f"{title}: {fmean(idle_shares(rows)):.1%} idle"
    figure, (lanes, strips) = _page(whole, unit, [rows], [LANE * len(rows), STRIP * len(rows)])
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
    figure, panels = _page(title, "ms", [measured, paper], [LANE * len(measured)] * 2)
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
    """A step whose slots are in ms, as data. `last` of an action is not kept."""
    slots = [
        [{"action": str(s.action), "start_ms": s.start, "end_ms": s.end} for s in row]
        for row in rows
    ]  # fmt: skip
    return {
        "schedule": schedule_name, "unit": "ms", "ranks": slots,
        "idle_share": fmean(idle_shares(rows)), "peak_activations": _peaks(rows),
    }  # fmt: skip


def from_json(data: Mapping[str, Any]) -> tuple[list[list[Slot]], str]:
    """The rows and the name of the schedule.

    Raises:
        UserError: it is not what `to_json` makes.
    """
    try:
        return [[_slot(entry) for entry in row] for row in data["ranks"]], str(data["schedule"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"no measured pipeline ({why}); give what grid.to_json made") from None


def _slot(entry: Mapping[str, Any]) -> Slot:
    action = Action.parse(entry["action"])
    if action is None:
        raise ValueError(f"{entry['action']!r:.40} is no action")
    return Slot(action, float(entry["start_ms"]), float(entry["end_ms"]))


def idle_shares(rows: Rows) -> list[float]:
    """Of each rank: the share of all ranks' time in which it computes nothing."""
    rows = _from_zero(rows)
    return [1 - sum(slot.end - slot.start for slot in row) / _end(rows) for row in rows]


def _from_zero(rows: Rows) -> list[list[Slot]]:
    """What is computed, by a clock that starts with the first action."""
    rows = [[slot for slot in row if slot.action.op in COMPUTE] for row in rows]
    zero = min(slot.start for row in rows for slot in row)
    return [[replace(s, start=s.start - zero, end=s.end - zero) for s in row] for row in rows]


def _end(rows: Rows) -> float:
    return max(slot.end for row in rows for slot in row)


def _short(rows: Rows) -> float:
    """How long a short action is; a tenth of all may be shorter, as happens in a measured step."""
    lengths = sorted(slot.end - slot.start for row in rows for slot in row)
    return max(lengths[len(lengths) // 10], 1e-9)


def _peaks(rows: Rows) -> list[int]:
    return peak_activations(Schedule("", tuple(tuple(s.action for s in row) for row in rows)))


def _stages(rows: Rows) -> list[list[int]]:
    return [sorted({slot.action.stage for slot in row}) for row in rows]


def _label(schedule: Schedule) -> str:
    ranks, microbatches = len(schedule.ranks), schedule.microbatches
    return f"{Path(schedule.name).name:.40}, {ranks} ranks, {microbatches} micro-batches"


def _shade(op: Op, chunk: int, chunks: int) -> str:
    first, last = (numpy.array(to_rgb(color)) for color in LOOKS[op][1:])
    return to_hex(first + (last - first) * (chunk / (chunks - 1) if chunks > 1 else 0.5))


def _page(
    title: str, unit: str, drawn: Sequence[Rows], heights: Sequence[float]
) -> tuple[Figure, list[Axes]]:
    """Panels one below the other with one clock, wide enough for what is drawn; and the legend.

    Placed in inches, as text has its size: a layout engine would measure thousands of labels.
    """
    end = max(map(_end, drawn))
    width = min(max(BAR * end / _short(drawn[0]) + LEFT + RIGHT, NARROWEST), WIDEST)
    height = HEAD + sum(heights) + GAP * (len(heights) - 1) + FOOT
    left, top = LEFT / width, height - HEAD
    figure, panels = Figure(figsize=(width, height), dpi=DPI), list[Axes]()
    for tall in heights:
        box = left, (top - tall) / height, 1 - (LEFT + RIGHT) / width, tall / height
        axes, last = figure.add_axes(box, xlim=(0, end)), len(panels) == len(heights) - 1
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.spines["bottom"].set(visible=last, color=QUIET)
        axes.tick_params(left=False, bottom=last, labelbottom=last, labelsize=8, colors=QUIET)
        axes.xaxis.set_major_locator(MaxNLocator(int(width), integer=unit != "ms"))
        panels.append(axes)
        top -= tall + GAP
    panels[-1].set_xlabel(f"time, {unit}", fontsize=8, color=QUIET)
    large: dict[str, Any] = {"fontsize": 11, "weight": "bold", "parse_math": False}
    figure.text(left, 1 - 0.14 / height, title, va="top", **large)
    chunks = max(map(len, _stages(drawn[0])))
    ops = [op for op in LOOKS if any(s.action.op is op for row in drawn[0] for s in row)]
    texts = [*(LOOKS[op][0] for op in ops), "idle"]
    texts[0] += " (darkest: a rank's first stage)" * (chunks > 1)
    handles: list[Any] = [  # of an op all shades, side by side
        tuple(Patch(color=_shade(op, chunk, chunks)) for chunk in range(chunks)) for op in ops
    ]
    figure.legend(
        [*handles, Patch(**IDLE)], texts, handler_map={tuple: HandlerTuple(None, pad=0)},
        loc="upper left", bbox_to_anchor=(left, 1 - 0.4 / height), ncols=len(texts), fontsize=8,
        frameon=False, borderpad=0, borderaxespad=0, columnspacing=1.6,
    )  # fmt: skip
    return figure, panels


def _label_panel(axes: Axes, left: Sequence[str], right: Sequence[str], head: str, of: str) -> None:
    """Text at both ends of each row, and above both."""
    axes.set_yticks(range(len(left)), left)
    axes.set_ylim(len(left) - 0.5, -0.5)  # rank 0 on top
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    place["parse_math"] = False  # a file's name may have dollars
    for row, text in enumerate(right):
        axes.annotate(text, (1, row), (6, 0), fontsize=9, va="center", **place)
    for x, text in ((0, head), (1, of)):
        axes.annotate(text, (x, -0.5), (6 * x, 3), fontsize=8, color=QUIET, **place)


def _draw_lanes(axes: Axes, rows: Rows, head: str = "") -> None:
    """`head`: what stands above them; how to read a bar, if it is empty."""
    point = float(72 * axes.bbox.width / DPI / axes.get_xlim()[1])  # a unit of time, in points
    digits = len(str(max(slot.action.microbatch for row in rows for slot in row)))
    size = min(max(0.86 * point * _short(rows) / (DIGIT * digits), LEAST), 9.0)
    names, two = [], size >= 6 and max(map(len, _stages(rows))) > 1  # a smaller stage is not read
    head = head or "in a bar: the micro-batch" + ", below it the stage" * two
    for rank, (row, stages) in enumerate(zip(rows, _stages(rows), strict=True)):
        several, more = len(stages) > 1, " .." * (len(stages) > 2)
        own = f"\nstages {', '.join(map(str, stages[:2]))}{more}" * several
        names.append(f"rank {rank}{own}")
        axes.add_patch(Rectangle((0, rank - 0.4), _end(rows), 0.8, **IDLE))
        for slot in row:
            long, stage = slot.end - slot.start, slot.action.stage
            color = _shade(slot.action.op, stages.index(stage), len(stages))
            ink = "white" if numpy.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.5 else "black"
            axes.barh(rank, long, 0.8, slot.start, color=color, edgecolor="white", linewidth=0.5)
            lines = [(slot.action.microbatch, size, -0.14 * two), (stage, 0.75 * size, 0.22)]
            for number, most, down in lines[: 1 + two]:
                x, y, text = slot.start + long / 2, rank + down, str(number)
                fits = min(most, 0.95 * point * long / (DIGIT * len(text)))
                if fits >= LEAST:
                    axes.text(x, y, text, size=fits, color=ink, **CENTER)
    _label_panel(axes, names, [f"{idle:.1%}" for idle in idle_shares(rows)], head, "idle")


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
    names = [f"rank {rank}" for rank in range(len(rows))]
    head = "a stage's forwards held, until the end of their backward"
    _label_panel(axes, names, list(map(str, peaks)), head, "most")
