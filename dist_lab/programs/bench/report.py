"""Turn measured seconds into a table, a latency-bandwidth fit, a plot and the choice for `auto`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from dist_lab.comm.choice import AUTO
from dist_lab.observe import export
from dist_lab.observe.console import wide_console
from dist_lab.observe.fit import nonnegative_fit
from dist_lab.programs.compare.ratios import Quartiles

CLEARLY = 1.05  # choose an algorithm by hand only if it is this many times as fast as the backend's


@dataclass(frozen=True)
class BenchRow:
    """The measurements of one algorithm at one size.

    Attributes:
        payload: the bytes of the tensor.
        steps: the number of messages in sequence, each waiting for the one before.
        sent: the bytes that the busiest rank sends.
        seconds: the time of each round.
    """

    op: str
    algorithm: str
    payload: int
    steps: int
    sent: int
    seconds: Sequence[float]

    @cached_property
    def quartiles(self) -> Quartiles:
        return Quartiles.of(self.seconds)

    @property
    def median(self) -> float:
        return self.quartiles.median

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op, "algorithm": self.algorithm, "payload_bytes": self.payload,
            "rounds": len(self.seconds), "median_ms": 1e3 * self.median,
            "quartile1_ms": 1e3 * self.quartiles.low, "quartile3_ms": 1e3 * self.quartiles.high,
            "steps": self.steps, "sent_bytes": self.sent,
        }  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """The best fit of seconds = steps x latency + sent / bandwidth to the medians.

    Attributes:
        latency: alpha, seconds per step.
        inverse_bandwidth: beta, seconds per byte.
        error: the root mean square of (fitted - measured) / measured; None for two sizes, if
            both costs are above 0: two costs fit any two sizes.
    """

    op: str
    algorithm: str
    latency: float
    inverse_bandwidth: float
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "op": self.op, "algorithm": self.algorithm, "alpha_us": 1e6 * self.latency,
            "beta_ns_per_byte": 1e9 * self.inverse_bandwidth, "relative_error": self.error,
        }  # fmt: skip


def fit(rows: Sequence[BenchRow]) -> Fit:
    """Fits a latency and a bandwidth to the medians of one algorithm: see observe/fit.py.

    >>> rows = [BenchRow("all_reduce", "ring", 4 * b, 6, b, [6e-4 + b * 1e-9]) for b in (10, 10**6)]
    >>> f = fit(rows)
    >>> round(1e6 * f.latency), round(1e9 * f.inverse_bandwidth, 3), f.error
    (100, 1.0, None)
    """
    amounts = [[row.steps, row.sent] for row in rows]
    fitted = nonnegative_fit(amounts, [row.median for row in rows])
    assert fitted is not None, "two sizes or more"
    latency, inverse_bandwidth = fitted.x
    return Fit(rows[0].op, rows[0].algorithm, latency, inverse_bandwidth, fitted.error)


def choices(rows: Sequence[BenchRow]) -> dict[str, tuple[tuple[int, str], ...]]:
    """The choice that `auto` should make by these measurements, in the form of `comm.choice.AUTO`.

    For each size it takes the fastest algorithm by median, or the backend's own unless another is
    clearly faster. A choice applies from the size at which it was measured; the first, from 0.
    """
    chosen: dict[str, tuple[tuple[int, str], ...]] = {}
    for op in dict.fromkeys(row.op for row in rows):
        choice: list[tuple[int, str]] = []
        for size in sorted({row.payload for row in rows if row.op == op}):
            medians = {r.algorithm: r.median for r in rows if (r.op, r.payload) == (op, size)}
            best = min(medians, key=medians.__getitem__)
            if "backend" in medians and medians["backend"] < CLEARLY * medians[best]:
                best = "backend"
            if not choice or choice[-1][1] != best:
                choice.append((size if choice else 0, best))
        chosen[op] = tuple(choice)
    return chosen


def report(rows: Sequence[BenchRow], run_info: Mapping[str, Any], folder: Path) -> None:
    """Print the tables, and write bench_comm.json, bench_comm.csv and bench_comm.png."""
    by_algorithm: dict[tuple[str, str], list[BenchRow]] = {}
    for row in rows:
        by_algorithm.setdefault((row.op, row.algorithm), []).append(row)
    fits = [fit(group) for group in by_algorithm.values() if len(group) > 1]
    chosen = choices(rows)
    console = wide_console()
    machine = f"{run_info['threads']} threads ({run_info['cores']} cores)"
    title = f"{run_info['world_size']} ranks x {machine}"
    console.print(times_table(rows, title))
    if fits:
        console.print(fit_table(fits))
    console.print("what auto should choose, by these medians:")
    for op, choice in chosen.items():
        same = choice == AUTO[op]
        current = "as in comm/choice.py" if same else f"comm/choice.py has {AUTO[op]}"
        console.print(f'    "{op}": {choice},  # {current}', highlight=False, soft_wrap=True)

    table = [row.to_dict() for row in rows]
    everything = dict(run_info) | {
        "rows": [
            entry | {"ms": [1e3 * second for second in row.seconds]}
            for entry, row in zip(table, rows, strict=True)
        ],
        "fits": [fitted.to_dict() for fitted in fits],
        "auto": chosen,
    }
    export.write(folder, "bench_comm", everything, table, picture(by_algorithm, title))
    agreeing = sum(choice == AUTO[op] for op, choice in chosen.items())
    console.print(
        f"auto agrees with these medians for {agreeing} of {len(chosen)} operations; wrote to "
        f"{folder}: bench_comm.json, .csv, .png",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def times_table(rows: Sequence[BenchRow], title: str) -> Table:
    """A table of medians and quartiles: a row per operation and size, a column per algorithm."""
    names = list(dict.fromkeys(row.algorithm for row in rows))
    table = Table(title=f"{title}: median ms (quartiles), speed relative to the backend's own")
    for column in ("", "payload", *names):
        table.add_column(column, justify="left" if column == "" else "right")
    last = ""
    for op, payload in dict.fromkeys((row.op, row.payload) for row in rows):
        by_algorithm = {r.algorithm: r for r in rows if (r.op, r.payload) == (op, payload)}
        fastest = min(by_algorithm.values(), key=lambda row: row.median)
        cells = []
        for name in names:
            row = by_algorithm.get(name)
            if row is None:
                cells.append("")
                continue
            low, high = 1e3 * row.quartiles.low, 1e3 * row.quartiles.high
            text = f"{1e3 * row.median:.2f} ({low:.2f}-{high:.2f})"
            if "backend" in by_algorithm and name != "backend":
                text += f" {by_algorithm['backend'].median / row.median:.2f}x"
            cells.append(f"[bold]{text}[/bold]" if row is fastest else text)
        if last and op != last:
            table.add_section()
        table.add_row(op if op != last else "", size_text(payload), *cells)
        last = op
    return table


def fit_table(fits: Sequence[Fit]) -> Table:
    table = Table(title="seconds = steps x alpha + sent x beta, fitted to the medians")
    for column in ("", "algorithm", "alpha, us", "1 / beta, GB/s", "error"):
        table.add_column(column, justify="left" if column in ("", "algorithm") else "right")
    for fitted in fits:
        beta = fitted.inverse_bandwidth
        error = "-" if fitted.error is None else f"{fitted.error:.0%}"
        table.add_row(
            fitted.op, fitted.algorithm, f"{1e6 * fitted.latency:.0f}",
            f"{1e-9 / beta:.2f}" if beta else "-", error,
        )  # fmt: skip
    return table


def picture(groups: Mapping[tuple[str, str], Sequence[BenchRow]], title: str) -> Figure:
    """A log-log plot of time against size: one panel per operation, one line per algorithm."""
    ops = list(dict.fromkeys(op for op, _ in groups))
    colors = {
        "backend": "black", "ring": "tab:blue", "direct": "tab:orange", "tree": "tab:green",
        "pairwise": "tab:purple",
    }  # fmt: skip
    across = min(3, len(ops))
    down = -(-len(ops) // across)
    figure = Figure(figsize=(4.6 * across, 3.8 * down), dpi=130, layout="constrained")
    figure.suptitle(f"Collectives on {title}: median and quartiles")
    for index, op in enumerate(ops, start=1):
        axes = figure.add_subplot(down, across, index)
        for (group_op, name), rows in groups.items():
            if group_op == op:
                sizes = [row.payload for row in rows]
                low = [1e3 * row.quartiles.low for row in rows]
                high = [1e3 * row.quartiles.high for row in rows]
                color = colors[name]
                axes.fill_between(sizes, low, high, color=color, alpha=0.15)
                medians = [1e3 * row.median for row in rows]
                axes.plot(sizes, medians, "o-", color=color, label=name, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        ticks = sorted(
            {
                row.payload
                for (group_op, _), rows in groups.items()
                if group_op == op
                for row in rows
            }
        )
        axes.set_xticks(ticks, [size_text(tick) for tick in ticks], rotation=60)
        axes.set_title(op)
        axes.set_xlabel("payload")
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def size_text(size: int) -> str:
    """A number of bytes as text.

    >>> size_text(4096), size_text(1 << 20), size_text(12)
    ('4 KiB', '1 MiB', '12 B')
    """
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"
