"""The doctor's report: one row per strategy, and the text that a person reads."""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.box import HEAVY_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dist_lab.observe.console import empty_table


class Verdict(StrEnum):
    """The verdict on one strategy, from best to worst."""

    EXACT = "exact"  # training in parallel gave the same results as one process
    UNPROVED = "unproved"  # it can be applied, but could not be compared with one process
    WRONG = "wrong"  # the results differ from one process
    REFUSED = "refused"  # parallelize or the first step raised a UserError, shown as the reason
    FAILED = "failed"  # any other error


COLORS = {
    Verdict.EXACT: "green", Verdict.UNPROVED: "yellow", Verdict.WRONG: "red",
    Verdict.REFUSED: "yellow", Verdict.FAILED: "red",
}  # fmt: skip


LEGEND = "exact: equal to one process; bytes: on the rank that keeps the most; moments: Adam's two"


@dataclass(frozen=True)
class StrategyRow:
    """The result for one strategy.

    Attributes:
        reason: why it is not exact; "" if it is.
        worst_error: the largest error against one process; None if nothing was compared.
        notes: what makes it slower or larger than necessary, each with the fix.
        bytes: of parameters, gradients and Adam's two moments on the rank that keeps most; empty if
            the strategy was refused or failed.
    """

    strategy: str
    mesh: str
    verdict: Verdict
    reason: str
    worst_error: float | None
    notes: tuple[str, ...]
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class DoctorReport:
    """The result of `doctor`, the same on every rank. `print(report)` shows it.

    Attributes:
        summary: one line on the model and how it was compared.
        findings: problems of the model, the loss or the batch, which hold for every strategy.
    """

    summary: str
    ranks: int
    findings: tuple[str, ...]
    rows: tuple[StrategyRow, ...]

    def __getitem__(self, strategy: str) -> StrategyRow:
        return next(row for row in self.rows if row.strategy == strategy)

    @property
    def exact(self) -> list[str]:
        """The names of the strategies that are exact."""
        return [row.strategy for row in self.rows if row.verdict is Verdict.EXACT]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values. JSON has no infinity, so an infinite worst error is null."""
        json_ready = asdict(self)
        for row in json_ready["rows"]:
            if row["worst_error"] is not None and not math.isfinite(row["worst_error"]):
                row["worst_error"] = None
        return json_ready

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.summary}\n")
        findings = [("", finding) for finding in self.findings]
        reasons = [(row.strategy, row.reason) for row in self.rows if row.reason]
        notes = [(row.strategy, note) for row in self.rows for note in row.notes]
        yield from _section("the model and the training loop", findings)
        yield self._table()
        yield Text(f"{LEGEND}\n", "dim")
        yield from _section("why not exact", _merge_equal(reasons))
        yield from _section("how to improve", _merge_equal(notes))
        yield Text(self.verdict_line())

    def verdict_line(self) -> str:
        """One line: each verdict with its strategies."""
        by_verdict: dict[str, list[str]] = {}
        for row in self.rows:
            by_verdict.setdefault(str(row.verdict.value), []).append(row.strategy)
        verdicts = [f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items()]
        return f"on {self.ranks} rank{'s' * (self.ranks > 1)} {'; '.join(verdicts)}"

    def _table(self) -> Table:
        numbers = ("worst error", "parameters", "gradients", "moments")
        table = empty_table(("strategy", "mesh", "verdict"), numbers, box=HEAVY_HEAD)
        for row in self.rows:
            error = "-" if row.worst_error is None else f"{row.worst_error:.1e}"
            error = "0" if row.worst_error == 0 else error
            kept = [size(n) for n in row.bytes.values()] or ["-", "-", "-"]
            verdict = Text(row.verdict, COLORS[row.verdict])
            table.add_row(row.strategy, row.mesh, verdict, error, *kept)
        return table


def size(number: float) -> str:
    """A number of bytes as text.

    >>> size(512), size(65536), size(12_345_678)
    ('512 B', '65.5 kB', '12.3 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} B"


def _merge_equal(labeled: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merges equal lines: each line once, labeled with all its strategies."""
    strategies_of: dict[str, list[str]] = {}
    for strategy, line in labeled:
        strategies_of.setdefault(line, []).append(strategy)
    return [(" ".join(strategies), line) for line, strategies in strategies_of.items()]


def _section(title: str, lines: Sequence[tuple[str, str]]) -> Iterator[RenderableType]:
    """A heading and its labeled lines, indented; yields nothing if there are no lines."""
    if not lines:
        return
    widest = max(len(label) for label, _ in lines)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=min(widest, 14), max_width=14, style="cyan")
    table.add_column(overflow="fold")
    for label, line in lines:
        table.add_row(Text(label), Text(line))
    yield Text(title, "bold")
    yield table
    yield Text()
