"""What the examination found: a row for each strategy, and what a person reads of them."""

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
    """Of a strategy. From EXACT on, each is worse than the one before it."""

    EXACT = "exact"  # trained in parallel and in one process, with equal results
    UNPROVED = "unproved"  # it applies; whether it is equal was not to be seen
    WRONG = "wrong"  # not equal to one process
    REFUSED = "refused"  # parallelize or the first step raises the line that is the reason
    FAILED = "failed"  # an error that is no refusal


COLORS = {
    Verdict.EXACT: "green", Verdict.UNPROVED: "yellow", Verdict.WRONG: "red",
    Verdict.REFUSED: "yellow", Verdict.FAILED: "red",
}  # fmt: skip


LEGEND = "exact: equal to one process; parameters, gradients, Adam's moments: on the fullest rank"


@dataclass(frozen=True)
class StrategyRow:
    """One strategy.

    Attributes:
        reason: why it is not exact; "" where it is.
        worst_error: of all that was compared with one process; None where nothing was.
        notes: what makes it slower or larger than it need be, each with what to do.
        bytes: parameters, gradients and moments (two of Adam's) that the fullest rank keeps; empty
            where it was refused.
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
    """What `doctor` found, the same on every rank. `print(report)` shows it.

    Attributes:
        summary: the model and how it was looked at, in a line.
        findings: what concerns the model, the loss or the batch, whatever the strategy.
    """

    summary: str
    ranks: int
    findings: tuple[str, ...]
    rows: tuple[StrategyRow, ...]

    def __getitem__(self, strategy: str) -> StrategyRow:
        return next(row for row in self.rows if row.strategy == strategy)

    @property
    def exact(self) -> list[str]:
        """The strategies that were proved."""
        return [row.strategy for row in self.rows if row.verdict is Verdict.EXACT]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which knows no infinity: a worst error that is infinite is null."""
        told = asdict(self)
        for row in told["rows"]:
            if row["worst_error"] is not None and not math.isfinite(row["worst_error"]):
                row["worst_error"] = None
        return told

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.summary}\n")
        every = [("", finding) for finding in self.findings]
        reasons = [(row.strategy, row.reason) for row in self.rows if row.reason]
        notes = [(row.strategy, note) for row in self.rows for note in row.notes]
        yield from _section("the model and the loop", every)
        yield self._table()
        yield Text(f"{LEGEND}\n", "dim")
        yield from _section("why not exact", _shared(reasons))
        yield from _section("what would be better", _shared(notes))
        yield Text(self.in_a_line())

    def in_a_line(self) -> str:
        """The strategies of each verdict."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            found.setdefault(str(row.verdict.value), []).append(row.strategy)
        said = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in found.items())
        return f"on {self.ranks} rank{'s' * (self.ranks > 1)} {said}"

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
    """Bytes, for a person.

    >>> size(512), size(65536), size(12_345_678)
    ('512 B', '65.5 kB', '12.3 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} B"


def _shared(said: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each line once, with all strategies of which it is said."""
    who: dict[str, list[str]] = {}
    for strategy, line in said:
        who.setdefault(line, []).append(strategy)
    return [(" ".join(strategies), line) for line, strategies in who.items()]


def _section(title: str, lines: Sequence[tuple[str, str]]) -> Iterator[RenderableType]:
    """A heading, and lines that hang beneath it, each with its label; nothing without lines."""
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
