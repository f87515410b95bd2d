"""Small pictures of a mesh for the terminal: its ranks along the axes, and who holds what.

          dp=0         dp=1
       tp=0    1    tp=0    1
      +-----------++-----------+      the two innermost axes are the columns, the others the rows;
 pp=0 |  [0]   1  ||   2    3  |      [0] is the rank whose step is explained
 pp=1 |   4    5  ||   6    7  |
      +-----------++-----------+

All of it is arithmetic on layouts: no rank is needed. rank_plot.py draws the same as SVG.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from rich.table import Table

from dist_lab.comm.board.board import numbers_in_words
from dist_lab.errors import UserError, one_of, shown
from dist_lab.layout.holders import by_rank, in_words
from dist_lab.layout.layout import Box, FlatShard, Layout
from dist_lab.mesh.topology import ORDER, coordinates, line_through, rank_at
from dist_lab.observe.console import empty_table

# The most positions that are drawn. Of a longer axis the first ones and the last are drawn.
MOST_ROWS, MOST_COLUMNS = 8, 16
MOST_BESIDE = (3, 4)  # boxes side by side, and columns in each
Place = Sequence[int | None]


@dataclass(frozen=True)
class RankGrid:
    """Which ranks stand where in a picture of a mesh.

    Attributes:
        outer, group, inner: the axes of the rows, of the boxes side by side, and of the columns.
        rows, groups, columns: the positions that are drawn. None: those left out.
    """

    sizes: Mapping[str, int]
    outer: Sequence[str]
    group: Sequence[str]
    inner: str
    rows: Sequence[Place]
    groups: Sequence[Place]
    columns: Place

    @classmethod
    def of(cls, axes: Mapping[str, int]) -> "RankGrid":
        sizes = {name: axes[name] for name in ORDER if name in axes}
        *outer, inner = sizes
        group = [outer.pop()] if len(sizes) > 2 else []
        all_fit = sizes[inner] * math.prod(sizes[name] for name in group) <= MOST_COLUMNS
        most_boxes, most_columns = MOST_BESIDE if group and not all_fit else [MOST_COLUMNS] * 2
        return cls(
            sizes, outer, group, inner,
            list(product(*(positions(sizes[name], MOST_ROWS) for name in outer))),
            list(product(*(positions(sizes[name], most_boxes) for name in group))),
            positions(sizes[inner], most_columns),
        )  # fmt: skip

    @property
    def title(self) -> str:
        return f"ranks of {place_text(self.sizes, self.sizes.values(), ' x ')}"

    def rank(self, row: Place, group: Place, column: int | None) -> int | None:
        """The rank at these positions; None if one of them is left out."""
        place = dict(
            zip([*self.outer, *self.group, self.inner], [*row, *group, column], strict=True)
        )
        known = {name: at for name in self.sizes if (at := place[name]) is not None}
        return rank_at(known, self.sizes) if len(known) == len(self.sizes) else None


def rank_picture(axes: Mapping[str, int], marked: int) -> list[str]:
    """Returns the lines of a picture of all ranks, and of the partners of the `marked` one."""
    grid = RankGrid.of(axes)
    width = max(len(str(math.prod(axes.values()) - 1)), len(grid.inner)) + 3
    inside = width * len(grid.columns) + 1
    labels = [place_text(grid.outer, row) for row in grid.rows]
    margin = " " * (max(map(len, labels)) + 2)
    heads = [place_text([grid.inner], grid.columns[:1]), *map(dots, grid.columns[1:])]
    head = "".join(f"{text + ' ':>{width}}" for text in heads)

    edge = margin + f"+{'-' * inside}+" * len(grid.groups)
    lines = [grid.title]
    if grid.group:
        names = (f"{place_text(grid.group, place):^{inside + 2}}" for place in grid.groups)
        lines.append((margin + "".join(names)).rstrip())
    lines.append((margin + f" {head}  " * len(grid.groups)).rstrip())
    for row, label, before in zip(grid.rows, labels, [None, *grid.rows], strict=False):
        if before is None or row[:-1] != before[:-1]:
            lines.append(edge)
        line = f" {label:<{len(margin) - 1}}"
        for group in grid.groups:
            ranks = [grid.rank(row, group, column) for column in grid.columns]
            cells = [f"[{rank}]" if rank == marked else f"{dots(rank)} " for rank in ranks]
            line += f"|{''.join(f'{cell:>{width}}' for cell in cells)} |"
        lines.append(line)
    return [*lines, edge, *partners(grid.sizes, marked)]


def partners(sizes: Mapping[str, int], rank: int) -> list[str]:
    """Returns a line that says with which ranks a rank communicates along each axis."""
    along = []
    for axis in sizes:
        others = [str(other) for other in line_through(rank, sizes, [axis]) if other != rank]
        if others:
            listed = others if len(others) <= MOST_ROWS else [*others[:3], "...", others[-1]]
            along.append(f"along {axis} with {' '.join(listed)}")
    return [f" rank {rank} communicates {', '.join(along)}"] if along else []


def positions(size: int, most: int) -> list[int | None]:
    """The positions of an axis that are drawn. None: those left out.

    >>> positions(3, 4), positions(64, 4)
    ([0, 1, 2], [0, 1, None, 63])
    """
    if size <= most:
        return list(range(size))
    return [*range(most - 2), None, size - 1]


def find(layouts: Mapping[str, Layout], name: str) -> Layout:
    """Returns the layout of the parameter of that name. Raises UserError if there is none."""
    if name not in layouts:
        guess = one_of(["", *layouts], name).rpartition(" (")[2]
        hint = f" ({guess}" if guess.startswith("did you mean") else ""
        raise UserError(
            f"no parameter {shown(name)} (--parameter); give one of the {len(layouts)} names, such "
            f"as {next(iter(layouts))}{hint}"
        )
    return layouts[name]


def parameter_lines(name: str, layout: Layout, sizes: Mapping[str, int], *, flat: str) -> list[str]:
    """Returns lines on a parameter, and a picture of it: who holds which part.

    Each cell lists the ranks that hold these rows and columns, as ranges without their last number.
    """
    shape = " x ".join(map(str, layout.shape)) or "a single number"
    lines = [f"{name}: {shape}, {in_words(layout)}"]
    if any(isinstance(how, FlatShard) for _, how in layout.splits):
        lines.append(f" these are parts of {flat}; the model has all of it between steps")
    held = by_rank(layout, sizes)
    rows, columns = (cuts(layout, held.values(), dim) for dim in (0, 1))
    grid = [[holders(held, row, column) for column in columns] for row in rows]
    sides = [f"{row.start}:{row.stop}" for row in rows]
    heads = [f"{c.start}:{c.stop}" for c in columns] if len(layout.shape) > 1 else [""]
    width = max(map(len, [*heads, *(cell for line in grid for cell in line)])) + 2
    margin = " " * (max(map(len, sides)) + 2)
    lines.append((margin + "".join(f" {head:^{width}}" for head in heads)).rstrip())
    edge = f"{margin}+" + f"{'-' * width}+" * len(columns)
    for number, (side, line) in enumerate(zip(sides, grid, strict=True)):
        cells = "|".join(f"{cell:^{width}}" for cell in line)
        if number == 0 or len(rows) <= MOST_ROWS:
            lines.append(edge)
        lines += [f"{side:>{len(margin) - 1}} |{cells}|"]
    return [line for line in [*lines, edge] if line]


def parameter_table(layout: Layout, sizes: Mapping[str, int]) -> Table:
    """Returns a table of the box of each rank."""
    dims = ["rows", "columns", *(f"dim {d}" for d in range(2, len(layout.shape)))]
    dims = dims[: len(layout.shape)] if len(layout.shape) != 1 else ["elements"]
    table = empty_table(["rank", *sizes, *dims], ["elements held"], title="the part of each rank")
    first: dict[str, int] = {}
    for rank, parts in by_rank(layout, sizes).items():
        place = map(str, coordinates(rank, sizes).values())
        sides = [[f"{box[d].start}:{box[d].stop}" for box in parts] for d in range(len(dims))]
        count = sum(_elements(box) for box in parts)
        same = first.setdefault(str(parts), rank)
        note = "-" if not parts else f"{count:,}" + (f", as rank {same}" if same != rank else "")
        table.add_row(str(rank), *place, *("\n".join(side) or "-" for side in sides), note)
    return table


def cuts(layout: Layout, held: Iterable[list[Box]], dim: int) -> list[slice]:
    """The ranges of a dim between the edges of all boxes; one range if there is no such dim."""
    if dim >= len(layout.shape):
        return [slice(0, 1)]
    edges = {0, layout.shape[dim]}
    for parts in held:
        edges |= {edge for box in parts for edge in (box[dim].start, box[dim].stop)}
    return [slice(a, b) for a, b in pairwise(sorted(edges))]


def holders(held: Mapping[int, list[Box]], *cell: slice) -> str:
    """The ranks that hold a cell, or a part of it in further dims."""

    def covers(box: Box) -> bool:
        sides = zip(box, cell, strict=False)  # a vector has no columns
        return all(side.start <= part.start and part.stop <= side.stop for side, part in sides)

    return numbers_in_words([rank for rank, parts in held.items() if any(map(covers, parts))], " ")


def _elements(box: Box) -> int:
    return math.prod(side.stop - side.start for side in box)


def dots(position: int | None) -> str:
    return "..." if position is None else str(position)


def place_text(names: Iterable[str], place: Iterable[int | None], separator: str = " ") -> str:
    return separator.join(f"{name}={dots(i)}" for name, i in zip(names, place, strict=True))
