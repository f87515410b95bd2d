"""The results of the matrix as text: a table of mixes, its sentence, and how to repeat failures."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table

from dist_lab.observe.console import empty_table
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.matrix.results import Result

TEXT = ("mix", "ranks")
NUMBERS = ("cells", "equal", "models", "schedules", "options", "numbers", "worst error")


def rendered(results: Mapping[Cell, Result]) -> Table:
    """A table for a console: one row for each mix, those with a cell that is not equal first."""
    title = f"{len(results)} cells against one process"
    caption = "numbers: tensors, losses and norms that were compared; error: in float64"
    table = empty_table(TEXT, NUMBERS, title=title, caption=caption)
    for row, is_wrong in rows(results):
        table.add_row(*row, style="red" if is_wrong else "")
    return table


def markdown(results: Mapping[Cell, Result]) -> str:
    """The same table for a document."""
    head = (*TEXT, *NUMBERS)
    lines = [head, ("---",) * len(head), *(row for row, _ in rows(results))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows(results: Mapping[Cell, Result]) -> list[tuple[tuple[str, ...], bool]]:
    """The cells of a table's row, and whether something in it is wrong."""
    cells_of: dict[tuple[str, ...], list[Cell]] = {}
    for cell in results:
        cells_of.setdefault(cell.strategies, []).append(cell)
    table = [
        (_row(strategies, cells, results), any(results[cell].is_wrong for cell in cells))
        for strategies, cells in sorted(cells_of.items(), key=lambda item: len(item[0]))
    ]
    return sorted(table, key=lambda row: not row[1])  # stable: short mixes first


def _row(
    strategies: Sequence[str], cells: Sequence[Cell], results: Mapping[Cell, Result]
) -> tuple[str, ...]:
    equal = [cell for cell in cells if results[cell].verdict == "equal"]
    exact = [results[cell].worst_error for cell in equal if not cell.is_low]
    return (
        " x ".join(strategies),
        ", ".join(map(str, sorted({cell.ranks for cell in cells}))),
        str(len(cells)),
        str(len(equal)),
        str(len({cell.model for cell in cells})),
        str(len({cell.schedule for cell in cells} - {""}) or "-"),
        str(len({option for cell in cells for option in cell.options})),
        f"{sum(results[cell].compared for cell in cells):,}",
        f"{max(exact):.0e}" if exact else "-",
    )


def sentence(results: Mapping[Cell, Result]) -> str:
    """What was found, in one line."""
    verdicts = Counter(result.verdict for result in results.values())
    parts = [f"{verdicts.pop('equal', 0)} cells equal", f"{verdicts.pop('not equal', 0)} not equal"]
    skipped = verdicts.pop("skipped", 0)
    parts += [f"{n} {verdict}" for verdict, n in sorted(verdicts.items())]
    if skipped:
        names = "; ".join(str(c) for c, result in results.items() if result.verdict == "skipped")
        parts.append(f"{skipped} skipped (memory): {names}")
    wrong = [str(cell) for cell, result in results.items() if result.is_wrong]
    if wrong and not skipped:
        parts[-1] += f": {'; '.join(wrong[:5])}" + (" ..." if len(wrong) > 5 else "")
    return ", ".join(parts)


def failures(results: Mapping[Cell, Result]) -> str:
    """Each cell that is wrong: how to run it alone, and what was found; "" if there is none."""
    return "".join(
        f"python launch/verify.py --matrix --only {shlex.quote(str(cell))}\n"
        f"{result.verdict}: {result.why.strip()}\n\n"
        for cell, result in results.items()
        if result.is_wrong
    )
