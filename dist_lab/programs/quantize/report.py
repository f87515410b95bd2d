"""The table of quantize.py --table: what each method makes of each width, over all runs."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from dist_lab.observe import export
from dist_lab.observe.console import empty_table, wide_console
from dist_lab.programs.quantize.settings import Quantize

COLORS = ("#0f3565", "#c2440c", "#2a8f80", "#7a4f8f", "#8a6d00", "#b0447a")
Rows = Sequence[Mapping[str, Any]]


def report(rows: Rows, config: Quantize, folder: Path) -> None:
    """Print the table, and write quantize.json, .csv and .png."""
    means = over_runs(rows)
    console = wide_console()
    console.print(table_of(means, rows))
    everything = {"config": config.to_dict(), "means": means, "rows": list(rows)}
    export.write(folder, "quantize", everything, rows, picture(means, rows))
    console.print(f"files in {folder}: quantize.json, .csv, .png", highlight=False, soft_wrap=True)


def over_runs(rows: Rows) -> list[dict[str, Any]]:
    """One row for each method and width: means over the runs, and how the loss has changed."""
    keys = dict.fromkeys((row["method"], row["bits"]) for row in rows)
    means = []
    for method, bits in sorted(keys, key=lambda key: key[1]):  # stable: methods keep their order
        own = [row for row in rows if (row["method"], row["bits"]) == (method, bits)]
        change = [row["loss"] - row["loss_before"] for row in own]
        means.append({
            "method": method, "bits": bits, "runs": len(own),
            "bytes": fmean(row["bytes"] for row in own),
            "smaller": fmean(row["bytes_before"] / row["bytes"] for row in own),
            "loss": fmean(row["loss"] for row in own), "change": fmean(change),
            "least_change": min(change), "largest_change": max(change),
            "seconds": fmean(row["seconds"] for row in own),
        })  # fmt: skip
    return means


def table_of(means: Rows, rows: Rows) -> Table:
    """The table, with a section for each width."""
    unit, runs = rows[0]["unit"], len({row["run"] for row in rows})
    before = fmean({row["run"]: row["loss_before"] for row in rows}.values())
    loss, size = f"{before:.4f} {unit}", f"{rows[0]['bytes_before']:,} bytes"
    result = empty_table(
        ["bits", "method"], ["bytes", "smaller", unit, "change (least to largest)", "seconds"],
        title=f"{runs} run{'s' * (runs > 1)}; before: {loss}, {size}",
    )  # fmt: skip
    last = None
    for row in means:
        if last not in (None, row["bits"]):
            result.add_section()
        bits, last = "" if last == row["bits"] else str(row["bits"]), row["bits"]
        between = f"({row['least_change']:+.4f} to {row['largest_change']:+.4f})"
        result.add_row(
            bits, row["method"], f"{row['bytes']:,.0f}", f"{row['smaller']:.2f} x",
            f"{row['loss']:.4f}", f"{row['change']:+.4f} {between}", f"{row['seconds']:.1f}",
        )  # fmt: skip
    return result


def picture(means: Rows, rows: Rows) -> Figure:
    """Loss against bytes: a line for each method, with the least and the largest over the runs."""
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    before = fmean({row["run"]: row["loss_before"] for row in rows}.values())
    axes.axhline(before, color="black", linewidth=1, linestyle="--", label="float32")
    methods = dict.fromkeys(row["method"] for row in means)
    for color, method in zip(cycle(COLORS), methods, strict=False):
        line = [row for row in means if row["method"] == method]
        bars = [
            [row["change"] - row["least_change"] for row in line],
            [row["largest_change"] - row["change"] for row in line],
        ]
        axes.errorbar(
            [row["bytes"] / 1e6 for row in line], [row["loss"] for row in line], yerr=bars,
            fmt="o-", color=color, label=method, markersize=4, capsize=3, linewidth=1.4,
        )  # fmt: skip
    for row in means:
        if row["method"] == means[0]["method"]:
            axes.annotate(
                f"{row['bits']} bits", (row["bytes"] / 1e6, row["loss"]), fontsize=8,
                textcoords="offset points", xytext=(4, 6),
            )  # fmt: skip
    axes.set_xlabel("MB of the model")
    axes.set_ylabel(rows[0]["unit"])
    axes.set_title("validation loss against bytes")
    axes.legend()
    return figure
