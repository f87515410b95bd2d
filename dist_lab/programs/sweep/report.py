"""Prints a sweep as a table, and writes sweep.json, sweep.csv and sweep.png."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.table import Table

from dist_lab.observe import export
from dist_lab.observe.console import empty_table, wide_console
from dist_lab.programs.sweep.results import TERMS, Costs, Point, fit
from dist_lab.programs.sweep.settings import SINGLE, Sweep

COLORS = {"compute": "#3b6ea5", "calls": "#e0a03a", "bytes": "#7a4f8f", "rest": "#d9d9d9"}
LINES = ("#0f3565", "#c2440c", "#2a8f80", "#7a4f8f", "#8a6d00", "#555555", "#b0447a", "#3b9a3b")


def report(found: Sequence[Point], sweep: Sweep, folder: Path) -> None:
    """Print the table and what it says, and write the files."""
    costs = fit(found)
    console = wide_console()
    console.print(table(found, sweep, costs))
    for line in notes(found, sweep, costs):
        console.print(line, highlight=False, soft_wrap=not console.is_terminal, markup=False)
    rows = [row(point, costs) for point in found]
    everything = {
        "config": sweep.to_dict(),
        "costs": None if costs is None else costs.to_dict(),
        "points": rows,
    }
    export.write(folder, "sweep", everything, rows, picture(found, sweep, costs))
    console.print(f"files in {folder}: sweep.json, .csv, .png", highlight=False, soft_wrap=True)


def row(point: Point, costs: Costs | None) -> dict[str, object]:
    """A point as a flat dict, in milliseconds."""
    parts = costs.parts(point) if costs else {}
    return {
        "size": point.size, "ranks": point.ranks, "strategy": point.strategy, "mesh": point.mesh,
        "step_ms": 1e3 * point.seconds, "step_ms_lower_quartile": 1e3 * point.low,
        "step_ms_upper_quartile": 1e3 * point.high, "per_s": point.rate,
        "speedup": point.speedup, "speedup_low": point.interval[0],
        "speedup_high": point.interval[1], "efficiency": point.efficiency,
        "of_the_cores": point.of_the_cores,
        **{f"{term}_ms": 1e3 * parts[term] if parts else None for term in TERMS},
        "equal_loss": point.equal,
    }  # fmt: skip


def table(found: Sequence[Point], sweep: Sweep, costs: Costs | None) -> Table:
    batch = f"{sweep.batch} samples " + ("for each rank" if sweep.scaling == "weak" else "a step")
    result = empty_table(
        ["model", "strategy"],
        ["ranks", "step ms (quartiles)", "speed-up (99%)", "efficiency", "of the cores", *TERMS,
         "rest"],
        title=f"{sweep.scaling} scaling of {sweep.model}, {batch}; speed-up: over one process",
    )  # fmt: skip
    last = ""
    for point in found:
        if last not in ("", f"{point.size} {point.ranks}"):
            result.add_section()
        last = f"{point.size} {point.ranks}"
        parts = costs.parts(point) if costs else {}
        cells = ["-"] * 4
        if parts:
            rest = point.seconds - sum(parts.values())
            cells = [f"{round(1e3 * part)}" for part in (*parts.values(), rest)]
        low, high = point.interval
        alone = point.strategy == SINGLE
        result.add_row(
            point.size, point.strategy, "1" if alone else str(point.ranks),
            f"{1e3 * point.seconds:.0f} ({1e3 * point.low:.0f} - {1e3 * point.high:.0f})",
            "1" if alone else f"{point.speedup:.2f} ({low:.2f} - {high:.2f})",
            *(["", ""] if alone else [f"{point.efficiency:.0%}", f"{point.of_the_cores:.0%}"]),
            *cells,
        )  # fmt: skip
    return result


def notes(found: Sequence[Point], sweep: Sweep, costs: Costs | None) -> Iterator[str]:
    """Yields what the table says, in sentences."""
    shared = sorted({p.ranks for p in found if p.strategy != SINGLE and p.cores < p.ranks})
    if shared:
        cores = next(p.cores for p in found if p.ranks == shared[0] and p.strategy != SINGLE)
        numbers = " and ".join(map(str, shared))
        yield (
            f"{numbers} ranks share {cores} cores, so no strategy can be more than {cores} times "
            "as fast as one process: the cores are the limit there; 'of the cores' is what a "
            "strategy makes of them"
        )
    if costs is not None:
        flop, call, byte = costs.of
        speed = f"{1e-9 / flop:.1f} GFLOP/s of a core" if flop else "compute that costs nothing"
        moved = f"{1e-9 / byte:.1f} GB/s" if byte else "bytes that cost nothing"
        yield (
            f"fitted to all steps: {speed}, {1e6 * call:.0f} us a call, {moved}; the fit is off by "
            f"{costs.error:.0%} on average. rest: waiting for other ranks, idle stages, noise"
        )
    else:
        known = sum(point.work is not None for point in found)
        yield (
            f"no costs are fitted: {len(TERMS)} costs need more than the {known} steps whose bytes "
            "are counted; add --worlds, --sizes or --strategies"
        )
    unlike = [f"{p.strategy} on {p.ranks}" for p in found if not p.equal]
    if unlike:
        yield f"other final losses than one process: {', '.join(unlike)}"


def picture(found: Sequence[Point], sweep: Sweep, costs: Costs | None) -> Figure:
    """For each size, speed-ups by ranks with what the cores allow, and the parts of the steps."""
    sizes = list(dict.fromkeys(point.size for point in found))
    figure = Figure(figsize=(11, 3.9 * len(sizes)), dpi=130, layout="constrained")
    figure.suptitle(f"{sweep.scaling} scaling of {sweep.model}")
    for place, size in enumerate(sizes):
        these = [p for p in found if p.size == size]
        left = figure.add_subplot(len(sizes), 2, 2 * place + 1)
        worlds = sorted({p.ranks for p in these})
        limit = {p.ranks: p.cores for p in these if p.strategy != SINGLE}
        ideal = [1, *worlds] if worlds[0] > 1 else worlds
        left.plot(ideal, ideal, ":", color="#999999", label="a core for each rank")
        left.plot(ideal, [limit.get(n, n) for n in ideal], "--", color="black", label="these cores")
        names = [n for n in dict.fromkeys(p.strategy for p in these) if n != SINGLE]
        for color, name in zip(cycle(LINES), names, strict=False):
            line = [p for p in these if p.strategy == name]
            below = [p.speedup - p.interval[0] for p in line]
            above = [p.interval[1] - p.speedup for p in line]
            left.errorbar(
                [p.ranks for p in line], [p.speedup for p in line], yerr=[below, above], fmt="o-",
                color=color, label=name, markersize=4, capsize=3, linewidth=1.4,
            )  # fmt: skip
        left.set_xscale("log", base=2)
        left.xaxis.set_major_locator(FixedLocator(ideal))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter("{x:.0f}")
        left.set_ylim(0)
        left.set_xlabel("ranks")
        left.set_ylabel("speed-up over one process")
        left.set_title(size)
        left.grid(alpha=0.3)
        left.legend(fontsize=8)
        right = figure.add_subplot(len(sizes), 2, 2 * place + 2)
        bars = [p for p in these if p.strategy != SINGLE or p.ranks == worlds[0]]
        labels = [p.strategy if p.strategy == SINGLE else f"{p.strategy} {p.ranks}" for p in bars]
        starts = [0.0] * len(bars)
        for term in (*TERMS, "rest") if costs else ("rest",):
            widths = []
            for bar, start in zip(bars, starts, strict=True):
                parts = costs.parts(bar) if costs else {}
                whole = 1e3 * bar.seconds
                widths.append(
                    1e3 * parts.get(term, 0.0) if term != "rest" else max(0, whole - start)
                )
            right.barh(labels, widths, left=starts, color=COLORS[term], label=term)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        right.plot([1e3 * p.seconds for p in bars], labels, "k|", markersize=12, label="measured")
        right.invert_yaxis()
        right.set_xlabel("ms of a step, as fitted")
        right.set_title(f"{size}: what a step costs")
        right.spines[["top", "right"]].set_visible(False)
        right.legend(
            fontsize=8, ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12)
        )
    return figure
