"""Pictures of a mesh: its ranks along the axes, and the part of a parameter that each rank holds.

A parameter is drawn as one rectangle, whose boxes have the colors of the ranks that hold them. A
rank without any part of it is grey. Without a parameter, ranks are colored by their position on the
outermost axis. The pictures in the terminal, of rank_grid.py, show the same.

No window opens. matplotlib is slow to import, so import this module only where a picture is drawn.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from dist_lab.comm.board.board import numbers_in_words
from dist_lab.layout.holders import by_rank, in_words
from dist_lab.layout.layout import Box, Layout
from dist_lab.mesh.topology import coordinates
from dist_lab.observe import pipeline_plot
from dist_lab.observe.rank_grid import RankGrid, cuts, dots, place_text
from dist_lab.parallel.schedules.actions import Schedule

NOTHING: dict[str, Any] = {"fc": "#f1f1f1", "ec": "#bbbbbb", "hatch": "////"}
QUIET = "#555555"
CELL, GAP = 0.42, 0.45  # inches: a rank; cells: between boxes of ranks
WIDEST, PANEL = 9.5, 2.6  # inches: of the ranks; the least height of ranks and parameter
LEAST = 4.5  # points: the smallest text


def draw(
    axes: Mapping[str, int],
    marked: int,
    parameter: tuple[str, Layout] | None = None,
    schedule: Schedule | None = None,
) -> Figure:
    """Returns the picture of a mesh; of a parameter's name and layout, and a schedule, if given.

    Args:
        marked: the rank with a thick edge.
    """
    grid = RankGrid.of(axes)
    across, down = _extent(grid)
    wide, high = min(across * CELL + 1.4, WIDEST), max(down * CELL + 1.2, PANEL)
    widths = [wide, 5.0] if parameter else [wide]
    size = sum(widths), high
    if schedule is not None:
        above = pipeline_plot.ideal(schedule).get_size_inches()
        size = max(size[0], above[0]), high + above[1]
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panel: Figure | SubFigure = figure
    if schedule is not None:
        heights = [size[1] - high, high]
        ((upper,), (panel,)) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        pipeline_plot.ideal_into(upper, schedule)
    panels = panel.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    colors = _colors(grid, marked, parameter)
    _draw_ranks(panels[0], grid, marked, colors)
    if parameter:
        _draw_parameter(panels[1], *parameter, grid.sizes, colors)
    return figure


def _extent(grid: RankGrid) -> tuple[float, float]:
    """The width and height of the ranks, in cells."""
    boxes, blocks = len(grid.groups), _blocks(grid)
    return boxes * (len(grid.columns) + GAP) - GAP, len(grid.rows) + GAP * blocks[-1]


def _blocks(grid: RankGrid) -> list[int]:
    """For each row its block: rows that differ in the innermost of their axes are one block."""
    before, numbers = grid.rows[0], [0]
    for row in grid.rows[1:]:
        numbers.append(numbers[-1] + (row[:-1] != before[:-1]))
        before = row
    return numbers


def _colors(
    grid: RankGrid, marked: int, parameter: tuple[str, Layout] | None
) -> dict[int, str | None]:
    """Rank -> its color; None if it holds nothing of the parameter."""
    if parameter is None:
        long = [name for name, size in grid.sizes.items() if size > 1] or list(grid.sizes)
        kinds = {
            rank: coordinates(rank, grid.sizes)[long[0]]
            for rank in range(prod(grid.sizes.values()))
        }
    else:
        held = by_rank(parameter[1], grid.sizes)
        known: dict[str, int] = {}
        kinds = {
            rank: known.setdefault(str(parts), len(known)) for rank, parts in held.items() if parts
        }
    most = max(max(kinds.values(), default=0), 1)
    shades = colormaps["viridis"]
    colors = {rank: to_hex(shades(0.12 + 0.8 * kind / most)) for rank, kind in kinds.items()}
    return {rank: colors.get(rank) for rank in range(prod(grid.sizes.values()))}


def _draw_ranks(axes: Axes, grid: RankGrid, marked: int, colors: Mapping[int, str | None]) -> None:
    blocks = _blocks(grid)
    label: dict[str, Any] = {"color": QUIET, "size": 8}
    across, down = _extent(grid)
    for y, (row, block) in enumerate(zip(grid.rows, blocks, strict=True)):
        top = y + GAP * block
        axes.text(-0.25, top + 0.5, place_text(grid.outer, row), ha="right", va="center", **label)
        for number, group in enumerate(grid.groups):
            left = number * (len(grid.columns) + GAP)
            for x, column in enumerate(grid.columns):
                rank = grid.rank(row, group, column)
                _draw_rank(axes, left + x, top, rank, rank == marked, colors)
    for number, group in enumerate(grid.groups):
        left = number * (len(grid.columns) + GAP)
        for x, column in enumerate(grid.columns):
            text = dots(column) if x else place_text([grid.inner], [column])
            axes.text(left + x + 0.5, -0.15, text, ha="center", va="bottom", **label)
        middle = left + len(grid.columns) / 2
        axes.text(middle, -0.75, place_text(grid.group, group), ha="center", va="bottom", **label)
    axes.set(xlim=(-0.2, across + 0.2), ylim=(down + 0.7, -1.1), aspect="equal")
    axes.set_axis_off()
    axes.set_title(grid.title, fontsize=9, weight="bold")
    note = f"thick edge: rank {marked}, whose step is explained"
    if None in colors.values():
        note += "; grey: holds nothing of it"
    axes.text(across / 2, down + 0.15, note, ha="center", va="top", **label)


def _draw_rank(
    axes: Axes, x: float, y: float, rank: int | None, marked: bool,
    colors: Mapping[int, str | None],
) -> None:  # fmt: skip
    if rank is None:
        axes.text(x + 0.5, y + 0.5, "...", ha="center", va="center", color=QUIET, size=8)
        return
    color = colors[rank]
    look = {"fc": color, "ec": "white"} if color else NOTHING
    axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, **look))
    if marked:
        axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, lw=1.8, ec="black"))
    axes.text(x + 0.5, y + 0.5, str(rank), ha="center", va="center", size=8, color=_ink(color))


def _draw_parameter(
    axes: Axes, name: str, layout: Layout, sizes: Mapping[str, int],
    colors: Mapping[int, str | None],
) -> None:  # fmt: skip
    """Draw the whole tensor with the boxes of all ranks. Dims after the second are not drawn."""
    held = by_rank(layout, sizes)
    rows, columns = (cuts(layout, held.values(), dim) for dim in (0, 1))
    ranks_of: dict[str, list[int]] = {}
    box_of: dict[str, Box] = {}
    for rank, parts in held.items():
        for box in parts:
            ranks_of.setdefault(str(box), []).append(rank)
            box_of[str(box)] = box
    high, wide = rows[-1].stop, columns[-1].stop
    for key, box in box_of.items():
        top, bottom, left, right = *_side(box, 0), *_side(box, 1)
        color = colors[ranks_of[key][0]]
        look: dict[str, Any] = {"fc": color, "ec": "white", "lw": 1.2}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **look))
        many = len(ranks_of[key]) > 1
        text = f"rank{'s' * many} {numbers_in_words(ranks_of[key], ' ')}"
        size = min(8.0, 110 * (bottom - top) / high, 380 * (right - left) / wide / len(text))
        if size >= LEAST:
            axes.text(
                (left + right) / 2, (top + bottom) / 2, text, ha="center", va="center", size=size,
                color=_ink(color),
            )  # fmt: skip
    axes.set(xlim=(0, wide), ylim=(high, 0), aspect="auto")
    axes.set_yticks(*_ticks([0, *(side.stop for side in rows)]))
    axes.set_xticks(*_ticks([0, *(side.stop for side in columns)] if len(layout.shape) > 1 else []))
    axes.tick_params(
        labelsize=7, colors=QUIET, top=True, labeltop=True, bottom=False, labelbottom=False
    )
    shape = " x ".join(map(str, layout.shape)) or "a single number"
    axes.set_title(f"{name}\n{shape}: {in_words(layout)}", fontsize=8, parse_math=False)


def _side(box: Box, dim: int) -> tuple[int, int]:
    return (box[dim].start, box[dim].stop) if dim < len(box) else (0, 1)


def _ticks(edges: list[int]) -> tuple[list[int], list[str]]:
    """At most about 16 of the edges, as numbers of rows or columns."""
    step = -(-len(edges) // 17) or 1
    shown = edges[::step]
    return shown, [f"{edge:,}" for edge in shown]


def _ink(color: str | None) -> str:
    """Black or white, whichever can be read on this color."""
    if color is None:
        return QUIET
    red, green, blue = to_rgb(color)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
