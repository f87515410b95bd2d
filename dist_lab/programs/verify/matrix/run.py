"""Runs the cells of the matrix, one after another, on ranks that it starts itself.

The ranks come from a warm pool, whatever the number of cores: a cell on 4 ranks takes a second or
two. Results are written as they come, so that a run can be stopped and resumed.
"""

import contextlib
import io
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dist_lab.observe import export, run_dir
from dist_lab.observe.console import watched, wide_console
from dist_lab.processes.pool import Pool, RanksFailed
from dist_lab.processes.ranks import PRELOAD, cores
from dist_lab.programs.verify.matrix import cell as on_rank
from dist_lab.programs.verify.matrix import table
from dist_lab.programs.verify.matrix.cells import Cell
from dist_lab.programs.verify.matrix.results import LINES, Result, append, equal_in

MANY = 32  # a cell of so many ranks needs NEEDED bytes of free memory
NEEDED = 12 << 30


def matrix(cells: Sequence[Cell], out: str) -> int:
    """Run the cells, and print a line for each, a table, and one sentence.

    Args:
        out: the folder for matrix.jsonl, matrix.json and matrix.md; "" writes no files.

    Returns:
        Exit status 0 only if every cell is equal that there was memory for.
    """
    folder = run_dir.make_folder(out, LINES) if out else None
    pool = Pool([*PRELOAD, on_rank.__name__])
    started = time.monotonic()
    results: dict[Cell, Result] = {}
    try:
        for cell, result in run_cells(cells, lambda cell: run_on(pool, cell), folder):
            results[cell] = result
    except BaseException:  # Ctrl-C: what is known so far, and the rest as it was
        print(f"stopped: {table.sentence(results)}")
        raise
    finally:
        complaints = pool.close()
    seconds = time.monotonic() - started
    console = wide_console()
    console.print(table.rendered(results))
    print(table.failures(results), *(f"{line}\n" for line in complaints), sep="", end="")
    print(f"{table.sentence(results)}; {seconds / 60:.1f} minutes")
    if folder is not None:
        everything = {
            "sentence": table.sentence(results),
            "seconds": seconds,
            "machine": {
                "cores": cores(), "platform": platform.platform(), "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "cells": [asdict(result) for result in results.values()],
        }  # fmt: skip
        export.write_json(folder / "matrix.json", everything)
        (folder / "matrix.md").write_text(table.markdown(results), encoding="utf-8")
    return 1 if complaints or any(result.is_wrong for result in results.values()) else 0


def run_cells(
    cells: Sequence[Cell], run_cell: Callable[[Cell], Result], folder: Path | None
) -> Iterator[tuple[Cell, Result]]:
    """Run the cells that an earlier run in this folder has not found equal. Yields all results."""
    known = equal_in(folder) if folder else {}
    known = {str(cell): known[str(cell)] for cell in cells if str(cell) in known}
    if known:
        print(f"{len(known)} of {len(cells)} cells are equal in {folder}, and are not run again")
    for number, cell in enumerate(watched(cells, "cells", lines=False), 1):
        if str(cell) in known:
            yield cell, known[str(cell)]
            continue
        result = run_cell(cell)
        if folder:
            append(folder, result)
        print(f"{number:4} of {len(cells)} {result.seconds:6.1f} s  {result.line()}", flush=True)
        yield cell, result


def run_on(pool: Pool, cell: Cell) -> Result:
    """Run a cell on the ranks of the pool."""
    if cell.ranks >= MANY and (free := free_memory()) < NEEDED:
        why = f"{free >> 30} GB of memory are free, and {cell.ranks} ranks need {NEEDED >> 30}"
        return Result(str(cell), cell.ranks, "skipped", why)
    started, printed = time.monotonic(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            results = pool.run(cell.ranks, on_rank.run, cell, timeout=60.0 + 10.0 * cell.ranks)
        result: Result = results[0]
        if any(other != result for other in results):
            differing = next(other for other in results if other != result)
            result = replace(result, verdict="failed", why=f"ranks differ: {differing.line()}")
    except RanksFailed as failed:
        why = f"{failed}\n{printed.getvalue()}"
        result = Result(str(cell), cell.ranks, "failed", why)
    return replace(result, seconds=round(time.monotonic() - started, 2))


def free_memory() -> int:
    """The bytes that new processes can use without swapping; outside of Linux, all memory."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
