"""The loss of a run, and the times of its steps."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from dist_lab.observe.report.charts import SIZE, Scale, Series, legend, plot
from dist_lab.observe.report.folder import Run
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
from dist_lab.observe.report.units import of_ms, plural

MOST_ROWS = 300  # of the table of losses; of a longer run every second, third ... row is shown
BINS = 40
FAR = 4.0  # an outlier's distance from the median, in robust standard deviations
ROBUST = 1.4826  # standard deviation / median absolute deviation, of normal numbers


def losses(run: Run) -> Section:
    """The loss and the validation loss, by step."""
    rows = thinned(run.rows)
    steps = [row["step"] for row in rows]
    checked = [row for row in rows if "val_loss" in row]
    lines = [Series("training", steps, [row["loss"] for row in rows], "first")]
    if checked:
        values = [row["val_loss"] for row in checked]
        lines.append(
            Series("validation", [r["step"] for r in checked], values, "second", dots=True)
        )
    every = [y for line in lines for y in line.ys]
    x, y = Scale(min(0, steps[0] - 1), max(steps)), Scale.around(every)
    title = f"loss by step, from {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}"
    chart = plot(lines, x, y, title=title, x_label="step", y_label="loss", cursor=True)
    head = ["step", "loss", "validation", "gradient norm", "learning rate"]
    cells = [
        [
            Cell(f"{row['step']:,}", row["step"]), number(f"{row['loss']:.4f}", row["loss"]),
            number(f"{row['val_loss']:.4f}", row["val_loss"]) if "val_loss" in row else "",
            *(number(f"{row[name]:.3g}", row[name]) for name in ("grad_norm", "lr")),
        ]
        for row in rows
    ]  # fmt: skip
    whole = table("loss by step", head, cells)
    names = legend([(line.name, line.look) for line in lines]) if checked else None
    lead = (
        "The mean over the global batch. All layouts of the same settings have the same curve. "
        f"{which_steps(run.summary['config']['log_every'])}"
    )
    return section("loss", "Loss", figure(title, names, chart, details=whole), lead=lead)


def which_steps(log_every: int) -> str:
    """
    >>> which_steps(1), which_steps(3)
    ('All steps were logged.', 'One step in 3 was logged, and the first and those of a validation.')
    """
    if log_every == 1:
        return "All steps were logged."
    return f"One step in {log_every:,} was logged, and the first and those of a validation."


def thinned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_ROWS rows at equal distances, the last row, and all with a validation loss."""
    every = -(-len(rows) // MOST_ROWS)
    return [r for i, r in enumerate(reversed(rows)) if i % every == 0 or "val_loss" in r][::-1]


def step_times(summary: Mapping[str, Any]) -> Section:
    """The time of every step, with outliers marked, and how the times are distributed."""
    times = summary["step_times_ms"]
    first, values = times["first_step"], times["ms"]
    numbered = list(enumerate(values, start=first))
    warm = numbered[: times["warm_up"]]
    steady = numbered[len(warm) :]
    limit = outlier_limit([ms for _, ms in steady])
    far = [(step, ms) for step, ms in steady if ms > limit]
    usual = [(step, ms) for step, ms in steady if ms <= limit]
    low, high = min(ms for _, ms in usual), max(ms for _, ms in usual)
    room = 0.5 * (high - low) or 0.1 * high
    y = Scale(max(0.0, low - room), high + room)
    x = Scale(first - 1, first + 1.18 * len(values))  # at the right is room for the distribution
    kinds = [("step", usual, "normal"), ("outlier", far, "second"), ("warm-up", warm, "faint")]
    dots = [
        Series(name, [step for step, _ in steps], [ms for _, ms in steps], look, dots=True)
        for name, steps, look in kinds
        if steps
    ]
    title = f"{plural(len(steady), 'step')}, {plural(len(far), 'outlier')} above {of_ms(limit)}"
    chart = plot(dots, x, y, title=title, x_label="step", y_label="ms", extra=histogram(usual, y))
    note = tag("p", "Times above the chart are drawn at its upper edge.", class_="lead") if any(
        ms > y.high for _, ms in far + warm
    ) else None  # fmt: skip
    names = legend([(dot.name, dot.look) for dot in dots])
    lead = (
        "Each dot is a step of rank 0; the bars at the right edge are their distribution. The "
        "first steps are measured for memory and operations, which slows them down."
    )
    return section(
        "steps",
        "Step times",
        figure(title, names, chart, note, details=spread(steady, far)),
        lead=lead,
    )


def outlier_limit(values: Sequence[float]) -> float:
    """Above this a step is an outlier: FAR robust standard deviations above the median.

    >>> outlier_limit([100.0, 101.0, 99.0, 100.5, 99.5, 300.0])
    104.6978
    """
    middle = median(values)
    deviation = ROBUST * median(abs(value - middle) for value in values)
    return round(max(middle + FAR * deviation, 1.02 * middle), 4)


def histogram(steps: Sequence[tuple[int, float]], y: Scale) -> Html:
    """Bars at the right edge, beside the dots that they count."""
    counts = [0] * BINS
    for _, ms in steps:
        counts[min(int(BINS * y.at(ms)), BINS - 1)] += 1
    longest, high = max(counts), SIZE / BINS
    d = ""
    for i, count in enumerate(counts):
        if count:
            top, wide = SIZE - high * (i + 1), 0.14 * SIZE * count / longest
            d += f"M{SIZE} {top:.0f}v{high - 2:.0f}h-{wide:.0f}v-{high - 2:.0f}z"
    return tag("path", d=d, class_="bars")


def spread(steps: Sequence[tuple[int, float]], far: Sequence[tuple[int, float]]) -> Html:
    """The table of quartiles, and of the outliers."""
    values = sorted(ms for _, ms in steps)
    quarters = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    names = "fastest", "lower quartile", "median", "upper quartile", "slowest"
    shown = values[0], *quarters, values[-1]
    rows: list[list[Content | Cell]] = [
        [name, number(of_ms(ms), ms)] for name, ms in zip(names, shown, strict=True)
    ]
    rows += [[f"outlier: step {step}", number(of_ms(ms), ms)] for step, ms in far]
    return table("step times after the warm-up", ["step", "time"], rows)
