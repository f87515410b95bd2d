"""Write the report to files: compare.json, .csv and .png, report.html, and for TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING

from dist_lab.observe import export
from dist_lab.observe.report.comparison import page_of_comparison
from dist_lab.observe.report.folder import REPORT, Comparison
from dist_lab.observe.tensorboard import log_comparison
from dist_lab.programs.compare.report import CompareReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(report: CompareReport, folder: Path) -> None:
    """Write everything as JSON, one CSV line per strategy, a plot of throughput, and a page."""
    rows = [report.summary(row) | {"refused": None} for row in report.rows]
    rows += [{"strategy": label, "refused": why} for label, why in report.refused.items()]
    results = report.to_dict()
    export.write(folder, "compare", results, rows, draw(report))
    log_comparison(folder, results)
    page = page_of_comparison(Comparison(folder, results))
    (folder / REPORT).write_text(page, encoding="utf-8")


def keep(folder: Path, report: CompareReport) -> None:
    """Write compare.json of a comparison that goes on."""
    export.write_json(folder / "compare.json", report.to_dict())


def draw(report: CompareReport) -> "Figure":
    """Plot throughput as bars, with error bars from the lower to the upper quartile of rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.55 * len(report.rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    rates = [report.throughput(row) for row in report.rows]
    medians = [rate.median for rate in rates]
    below = [rate.median - rate.low for rate in rates]
    above = [rate.high - rate.median for rate in rates]
    labels = [row.label for row in report.rows]
    positions = range(len(labels))
    axes.barh(positions, medians, xerr=[below, above], color="#7aa6c2", ecolor="#333333", capsize=4)
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()  # the first strategy at the top
    end = max(rate.high for rate in rates)
    axes.set_xlim(0, end * 1.45)
    for position, row, rate in zip(positions, report.rows, rates, strict=True):
        ratio = report.ratio(row)
        text = "reference"
        if ratio:
            text = f"x {ratio.median:.3f}  ({ratio.low:.3f}-{ratio.high:.3f})\n{ratio.verdict}"
        axes.text(rate.high + end * 0.02, position, text, va="center", fontsize=8)
    config = report.setting["config"]
    axes.set_xlabel(
        f"{report.unit}: median and quartiles of {len(report.rows[0].rounds)} rounds; right: "
        f"ratio to {report.reference} (99% confidence interval)",
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
