"""Schedules in files: one row a rank, one cell an action. PyTorch's pipelining reads them, too."""

import csv
from collections.abc import Sequence
from pathlib import Path

from dist_lab.errors import UserError, one_of, shown
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Schedule

LONGEST = 10_000_000  # characters of a file; 64 ranks and 1024 micro-batches are a tenth of it


def load(path: str | Path, names: Sequence[str] = ()) -> Schedule:
    """A schedule, not checked. Empty cells are idle, as in a grid, and mean nothing.

    Without SEND and RECV in it they are added when it is run.

    Args:
        names: of schedules that are in no file, one of which may have been meant.

    Raises:
        UserError: no such file, or a cell that is no action; with row and column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
        rows = list(csv.reader(text.splitlines()))
    except OSError as error:
        raise _no_file(path, names, error.strerror or "cannot be read") from None
    except (ValueError, csv.Error):  # bytes that are not UTF-8, a name with a NUL, a cell too long
        raise _no_file(path, names, "not a text file") from None
    if len(text) > LONGEST or "\0" in text:
        raise _no_file(path, names, f"binary, or more than {LONGEST:,} characters")
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()  # lines after the last rank; before it a blank one is a rank without work
    if not rows:
        raise UserError(f"schedule {str(path)!r} is empty (schedule=); write one row a rank")
    ranks = []
    for r, row in enumerate(rows):
        actions = []
        for column, cell in enumerate(map(str.strip, row)):
            action = Action.parse(cell)
            if action is not None:
                actions.append(action)
            elif cell:
                raise UserError(
                    f"{shown(cell[:40])} is no action ({path}, row {r + 1}, column {column + 1}); "
                    f"write stage, {', '.join(op.value for op in COMPUTE)}, micro-batch: 2F0"
                )
        ranks.append(tuple(actions))
    return Schedule(str(path), tuple(ranks))


def _no_file(path: str | Path, names: Sequence[str], why: str) -> UserError:
    meant = f"{one_of(list(names), str(path))}, or " if names else ""
    return UserError(
        f"no schedule {shown(str(path))}, and no such file ({why}) (schedule=); give "
        f"{meant}a file of one row a rank: 0F0,0F1,0B0,0B1"
    )


def check_fits(schedule: Schedule, ranks: int, microbatches: int, chunks: int | None) -> None:
    """See that it is for so many ranks and micro-batches, and has so many stages a rank.

    Raises:
        UserError: with what to give instead.
    """
    has_ranks, has_microbatches = len(schedule.ranks), schedule.microbatches
    for what, has, asked, fix in (
        ("ranks", has_ranks, ranks, f"give a mesh of pp={has_ranks}"),
        (
            "micro-batches",
            has_microbatches,
            microbatches,
            f"give microbatches={has_microbatches}",
        ),
    ):
        if has != asked:
            raise UserError(
                f"schedule {schedule.name} is for {has} {what}, not {asked} (schedule=); {fix}"
            )
    counts = {len(schedule.stages_of(rank)) for rank in range(ranks)}
    if chunks is not None and counts != {chunks}:
        own = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        raise UserError(
            f"schedule {schedule.name} has {own} stages a rank, not {chunks} (chunks=); leave it "
            "out"
        )
