"""Reads schedules from CSV files, in the format of torch.distributed.pipelining: a row per rank."""

import csv
from collections.abc import Sequence
from pathlib import Path

from dist_lab.errors import UserError, one_of, shown
from dist_lab.parallel.schedules.actions import COMPUTE, Action, Schedule

LONGEST = 10_000_000  # characters of a file; 64 ranks with 1024 micro-batches take a tenth of it


def load(path: str | Path, names: Sequence[str] = ()) -> Schedule:
    """Read a schedule, without checking it: one cell per action. Empty cells mean nothing.

    A file without SEND and RECV gets them when it is run.

    Args:
        names: the built-in schedules, to suggest one if the path is a misspelled name.

    Raises:
        UserError: the file cannot be read, or a cell is no action; names its row and column.
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
        rows.pop()  # blank lines at the end; one before the last rank is a rank without work
    if not rows:
        raise UserError(f"schedule {str(path)!r} is empty (schedule=); write one row per rank")
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
    suggestion = f"{one_of(list(names), str(path))}, or " if names else ""
    return UserError(
        f"no schedule {shown(str(path))}, and no such file ({why}) (schedule=); give "
        f"{suggestion}a file with one row per rank: 0F0,0F1,0B0,0B1"
    )


def check_fits(schedule: Schedule, ranks: int, microbatches: int, chunks: int | None) -> None:
    """Raise UserError unless a schedule is for these ranks, micro-batches and stages a rank."""
    has_ranks, has_microbatches = len(schedule.ranks), schedule.microbatches
    for noun, has, asked, fix in (
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
                f"schedule {schedule.name} is for {has} {noun}, not {asked} (schedule=); {fix}"
            )
    counts = {len(schedule.stages_of(rank)) for rank in range(ranks)}
    if chunks is not None and counts != {chunks}:
        actual = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        raise UserError(
            f"schedule {schedule.name} has {actual} stages a rank, not {chunks} (chunks=); leave "
            "it out"
        )
