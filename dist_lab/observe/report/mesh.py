"""The mesh: where each rank is, and which part of a parameter it holds.

The picture and the table are arithmetic on the layouts in summary.json: no rank is needed. Blocks
with equal layouts are one row, as in explain: `layers.0-3.norm.weight`.
"""

import json
import re
from collections.abc import Mapping
from math import prod
from typing import Any

from dist_lab.comm.board.board import numbers_in_words
from dist_lab.layout.holders import by_rank, in_words
from dist_lab.layout.layout import Box, FlatShard, Layout, from_json
from dist_lab.mesh.topology import ORDER, coordinates, lines, rank_at
from dist_lab.observe.report.markup import (
    Cell,
    Content,
    Html,
    Section,
    number,
    section,
    table,
    tag,
)
from dist_lab.observe.report.units import plural

MOST_RANKS = 64  # that are drawn
Held = dict[int, list[Box]]  # rank -> the boxes of a tensor that it holds


def who_holds_what(summary: Mapping[str, Any]) -> Section:
    """A picture of the ranks, with a choice of parameters, and the table of all layouts."""
    sizes: Mapping[str, int] = summary["mesh"]
    layouts = grouped({name: from_json(data) for name, data in summary["layouts"].items()})
    held = {name: by_rank(layout, sizes) for name, layout in layouts.items()}
    count = prod(sizes.values())
    rows: list[list[Content | Cell]] = [
        [
            name, " x ".join(map(str, layout.shape)) or "-", in_words(layout),
            number(_per_rank(held[name]), max(map(_elements, held[name].values()))),
            ", ".join(partial.axis for partial in layout.partial) or "-",
        ]
        for name, layout in layouts.items()
    ]  # fmt: skip
    head = ["parameter", "shape", "split", "elements on a rank", "gradient summed over"]
    whole = table("layout of each parameter; equal blocks are one row", head, rows)
    lead = (
        f"{plural(count, 'rank')}. Along an axis a rank communicates with the ranks whose other "
        "coordinates are its own."
    )
    if count > MOST_RANKS:
        return section("mesh", "Mesh: who holds what", whole, lead=lead)
    return section(
        "mesh", "Mesh: who holds what", picture(sizes, layouts, held), lines_table(sizes),
        tag("details", tag("summary", "layouts of all parameters"), whole), lead=lead,
    )  # fmt: skip


def picture(
    sizes: Mapping[str, int], layouts: Mapping[str, Layout], held: Mapping[str, Held]
) -> Html:
    """The grid of ranks. A parameter that is chosen is drawn, with who holds its parts."""
    contents = [as_data(layouts[name], held[name]) for name in layouts]
    largest = max(layouts, key=lambda name: layouts[name].shape.numel(), default="")
    options = [
        tag("option", name + state_only(layout), value=i, selected=name == largest)
        for i, (name, layout) in enumerate(layouts.items())
    ]
    choice = tag(
        "div", tag("label", "parameter", for_="parameter"), tag("select", *options, id="parameter"),
        class_="controls",
    )  # fmt: skip
    script = Html(json.dumps(contents, separators=(",", ":")).replace("<", "\\u003c"))
    drawn = tag("div", class_="drawing", aria_hidden="true")
    content = tag("script", script, type="application/json")
    return tag(
        "figure", tag("figcaption", "each rank, and what it holds of one parameter"), choice,
        grid(sizes), drawn, content, data_held=True,
    )  # fmt: skip


def state_only(layout: Layout) -> str:
    """What is split, if it is not the parameter: zero's buckets are ranges of elements."""
    flat = any(isinstance(how, FlatShard) for _, how in layout.splits)
    return " (its gradient and optimizer state)" if flat else ""


def grid(sizes: Mapping[str, int]) -> Html:
    """The ranks as a table: the innermost axis across, the others down."""
    sizes = {axis: sizes[axis] for axis in ORDER if axis in sizes}
    *outer, inner = sizes
    across = range(sizes[inner])
    rows = []
    for row in range(prod(sizes[axis] for axis in outer)):
        place = coordinates(row, {axis: sizes[axis] for axis in outer})
        cells = []
        for column in across:
            rank = rank_at({**place, inner: column}, sizes)
            name = tag(
                "span", str(rank), tag("small", class_="part"), class_="rank", data_rank=rank
            )
            cells.append(tag("td", name))
        label = " ".join(f"{axis}={at}" for axis, at in place.items())
        rows.append(tag("tr", tag("th", label or "rank", scope="row"), *cells))
    heads = [tag("th", f"{inner}={column}", scope="col") for column in across]
    head = tag("thead", tag("tr", tag("td"), *heads))
    whole = tag("table", tag("caption", "ranks of the mesh", class_="hidden"), head,
                tag("tbody", *rows), class_="mesh")  # fmt: skip
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="the mesh")


def lines_table(sizes: Mapping[str, int]) -> Html:
    """Which ranks communicate with each other along each axis."""
    rows: list[list[Content]] = [
        [
            axis, str(size),
            "; ".join(numbers_in_words(line, " ") for line in lines(sizes, [axis])),
        ]
        for axis, size in sizes.items()
    ]  # fmt: skip
    return table("groups of ranks along each axis", ["axis", "ranks", "groups"], rows)


def grouped(layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Blocks with equal layouts as one entry, named like layers.0-3.norm.weight."""
    alike: dict[tuple[str, Layout], list[int]] = {}
    for name, layout in layouts.items():
        found = re.search(r"\.(\d+)\.", name)
        key = name if found is None else f"{name[: found.start()]}.{{}}.{name[found.end() :]}"
        key = key if found else name.replace("{", "{{").replace("}", "}}")
        alike.setdefault((key, layout), []).append(int(found[1]) if found else 0)
    return {key.format(numbers_in_words(blocks)): layout for (key, layout), blocks in alike.items()}


def as_data(layout: Layout, held: Held) -> dict[str, Any]:
    """What page.js draws: the parts, each with its text, boxes in percent and ranks."""
    parts: dict[str, list[int]] = {}
    for rank, own in held.items():
        if own:
            parts.setdefault(str(own), []).append(rank)
    order = list(parts)
    return {
        "parts": [
            [part_text(layout, held[ranks[0]]), [_percent(layout, box) for box in held[ranks[0]]],
             numbers_in_words(ranks, " ")]
            for ranks in parts.values()
        ],
        "of": [order.index(str(own)) if own else -1 for own in held.values()],
    }  # fmt: skip


def part_text(layout: Layout, own: list[Box]) -> str:
    """A rank's part in few words: all, 0:64 of dim 0, or a number of elements."""
    if len(own) != 1:
        return f"{_elements(own):,} el."
    split = [
        f"{side.start}:{side.stop}"
        for side, length in zip(own[0], layout.shape, strict=True)
        if (side.start, side.stop) != (0, length)
    ]
    whole = [d for d, side in enumerate(own[0]) if (side.start, side.stop) != (0, layout.shape[d])]
    return ", ".join(f"dim {d} {text}" for d, text in zip(whole, split, strict=True)) or "all"


def _percent(layout: Layout, box: Box) -> list[float]:
    """Top, left, height and width; dims after the second are not drawn."""
    sides = [(s.start, s.stop, n) for s, n in zip(box, layout.shape, strict=True)][:2]
    sides += [(0, 1, 1)] * (2 - len(sides))
    (top, bottom, high), (left, right, wide) = sides
    numbers = top / high, left / wide, (bottom - top) / high, (right - left) / wide
    return [round(100 * value, 3) for value in numbers]


def _per_rank(held: Held) -> str:
    counts = sorted(map(_elements, held.values()))
    return f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"


def _elements(own: list[Box]) -> int:
    return sum(prod(side.stop - side.start for side in box) for box in own)
