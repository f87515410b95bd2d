"""A report as files: everything in JSON, a row a strategy in CSV, a picture, TensorBoard."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lab.compare.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(report: Report, folder: Path) -> None:
    """compare.json, compare.csv, compare.png and TensorBoard's events, in `folder`."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    (folder / "compare.json").write_text(text, encoding="utf-8")
    write_csv(report, folder / "compare.csv")
    picture = draw(report)
    picture.savefig(folder / "compare.png")
    write_events(report, picture, folder)


def write_csv(report: Report, path: Path) -> None:
    rows = [report.summary(row) for row in report.rows]
    names = [*rows[0], "refused"]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
        for label, reason in report.refused.items():
            table.writerow({"strategy": label, "refused": reason})


def draw(report: Report) -> "Figure":
    """Bars of throughput; from the lower to the upper quartile of the rounds, a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.55 * len(report.rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws in memory: no window, no state of pyplot's
    axes = figure.add_subplot()
    rates = [report.throughput(row) for row in report.rows]
    medians = [rate.median for rate in rates]
    below = [rate.median - rate.low for rate in rates]
    above = [rate.high - rate.median for rate in rates]
    labels = [row.label for row in report.rows]
    places = range(len(labels))
    axes.barh(places, medians, xerr=[below, above], color="#7aa6c2", ecolor="#333333", capsize=4)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()  # the first on top
    end = max(rate.high for rate in rates)
    axes.set_xlim(0, end * 1.45)
    for place, row, rate in zip(places, report.rows, rates, strict=True):
        found = report.ratio(row)
        says = "reference"
        if found:
            says = f"x {found.median:.3f}  ({found.low:.3f}-{found.high:.3f})\n{found.verdict}"
        axes.text(rate.high + end * 0.02, place, says, va="center", fontsize=8)
    config = report.setting["config"]
    axes.set_xlabel(
        f"{report.unit}: median and quartiles of {len(report.rows[0].rounds)} rounds; beside it "
        f"the ratio to {report.reference} (99% interval)",
        fontsize=8,
    )
    axes.set_title(
        f"{config['model']} {report.setting['parameters'] / 1e6:.1f}M, {report.batch:,} "
        f"{report.unit.removesuffix('/s')} a step, {report.setting['world_size']} ranks",
        fontsize=10,
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_events(report: Report, picture: "Figure", folder: Path) -> None:
    """Each round's numbers as scalars, and the picture."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    canvas = picture.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    with SummaryWriter(str(folder)) as writer:
        unit = report.unit.replace("/", "_per_")
        for row in report.rows:
            for number, seconds in enumerate(row.round_seconds, start=1):
                writer.add_scalar(f"step_ms/{row.label}", seconds * 1e3, number)
                writer.add_scalar(f"{unit}/{row.label}", report.batch / seconds, number)
            for step, loss in enumerate(row.losses, start=1):
                writer.add_scalar(f"loss/{row.label}", loss, step)
            found = report.ratio(row)
            writer.add_scalar(f"ratio/{row.label}", found.median if found else 1.0)
            writer.add_scalar(f"mfu/{row.label}", report.mfu(row))
            writer.add_scalar(f"peak_memory_bytes/{row.label}", row.peak_memory_bytes)
        writer.add_image("compare", numpy.asarray(canvas.buffer_rgba()), dataformats="HWC")
