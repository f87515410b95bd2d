"""Charts that need no script: lines and dots as SVG, bars as boxes whose width is a share.

An SVG is stretched to the width that the page has; its strokes are not, and all text is HTML around
it. So a chart is as readable on a telephone as on a wide screen, and follows the page's colors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lab.observe.report.markup import Content, Html, tag

SIZE = 1000  # of an SVG's own coordinates, in both directions


@dataclass(frozen=True)
class Series:
    """The points of one line. `look`: the class of the line in page.css; `dots`: no line."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    look: str
    dots: bool = False


@dataclass(frozen=True)
class Scale:
    """A straight axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], *, zero: bool = False) -> "Scale":
        """An axis with room for all values, and from zero if asked for."""
        low, high = min(values), max(values)
        room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
        return cls(0.0 if zero else low - room, high + room)

    def at(self, value: float) -> float:
        """The share of the axis, from 0 to 1."""
        return (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the axis.

        >>> Scale(0.0, 1.05).ticks(6), Scale(1, 200).ticks(5)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [50.0, 100.0, 150.0, 200.0])
        """
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor((self.high - first * step) / step + 1e-9) + 1
        return [round((first + i) * step, 12) for i in range(count)]


def plot(
    series: Sequence[Series], x: Scale, y: Scale, *, title: str, x_label: str, y_label: str,
    extra: Content = None, cursor: bool = False,
) -> Html:  # fmt: skip
    """Lines and dots over an x axis.

    Args:
        title: what a screen reader says of the chart.
        extra: more SVG, below the lines.
        cursor: the reader can walk along the rows of the table in the same figure (page.js).
    """
    last = max((a for one in series for a in one.xs), default=x.high)
    x_ticks = [v for v in x.ticks(6) if v == int(v) and v <= last]  # steps, and other counts
    y_ticks = y.ticks(5)
    grid = "".join(f"M0 {_down(y, value)}h{SIZE}" for value in y_ticks)
    shapes = [tag("path", d=grid, class_="grid"), extra]
    for one in series:
        points = [(_n(SIZE * x.at(a)), _down(y, b)) for a, b in zip(one.xs, one.ys, strict=True)]
        if one.dots:
            d = "".join(f"M{a} {b}h0" for a, b in points)
        else:
            d = "M" + "L".join(f"{a} {b}" for a, b in points) if points else ""
        shapes.append(tag("path", d=d, class_=f"{'dots' if one.dots else 'line'} {one.look}"))
    svg = tag(
        "svg", *shapes, viewBox=f"0 0 {SIZE} {SIZE}", preserveAspectRatio="none", role="img",
        aria_label=title, tabindex=0 if cursor else None,
        data_x=f"{x.low} {x.high}" if cursor else None,
    )  # fmt: skip
    left = [tag("span", f"{v:,.10g}", style=f"bottom:{_percent(y.at(v))}") for v in y_ticks]
    below = [tag("span", f"{v:,.10g}", style=f"left:{_percent(x.at(v))}") for v in x_ticks]
    return tag(
        "div",
        tag("div", y_label, class_="y-name"), tag("div", *left, class_="y", aria_hidden="true"),
        tag("div", svg, class_="area"), tag("div", *below, class_="x", aria_hidden="true"),
        tag("div", x_label, class_="x-name"),
        class_="plot",
    )  # fmt: skip


def legend(series: Sequence[tuple[str, str]]) -> Html:
    """Names with their looks, for charts with more than one."""
    return tag("ul", *(tag("li", tag("i", class_=f"key {look}"), name) for name, look in series),
               class_="legend")  # fmt: skip


def bar(
    parts: Sequence[tuple[float, str]], whole: float,
    interval: tuple[float, float] | None = None,
) -> Html:  # fmt: skip
    """A bar of parts, each with its look, in a cell of a table, whose text has the numbers.

    Args:
        whole: the value of the full width.
        interval: drawn over the end of the bar.
    """
    boxes = [
        tag("i", class_=look, style=f"width:{_percent(value / whole)}")
        for value, look in parts
        if value > 0 and whole > 0
    ]
    if interval is not None:
        low, high = (value / whole for value in interval)
        style = f"left:{_percent(low)};width:{_percent(high - low)}"
        boxes.append(tag("b", style=style))
    return tag("span", *boxes, class_="bar", aria_hidden="true")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _down(scale: Scale, value: float) -> str:
    return _n(SIZE - SIZE * scale.at(value))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"
