"""What `launch/where.py` does: it finds the board of a run, reads it, and prints it.

A run locks its folder, and the kernel knows which process holds the lock: that is rank 0. The board
is among its open files. So a run writes nothing for us, and a killed one leaves nothing behind.
"""

import os
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path

from dist_lab.comm.board.board import boards_of, numbers_in_words
from dist_lab.comm.board.page import PAGE, STACK, Page
from dist_lab.comm.board.stack import lines_now
from dist_lab.comm.board.words import Status
from dist_lab.errors import MachineError, UserError
from dist_lab.observe.run_dir import process_with

HEADINGS = "rank", "place", "step", "phase", "unit", "collective", "age", "now at"
WIDEST = 72  # characters of a cell


def where(run: str) -> str:
    """Returns the table of a live run.

    Raises:
        UserError: there is no such folder.
        MachineError: nothing runs there, or it cannot be looked at.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {run!r}; give that of a run, such as runs/003-dp-gpt")
    process = process_with(folder.stat())
    if process is None:
        names = {path.name for path in folder.iterdir()}
        ended = "has ended" if names & {"metrics.jsonl", "compare.json"} else "is not one of a run"
        raise MachineError(f"nothing runs in folder {run!r}: it {ended}; give that of a live run")
    try:
        pages = read_board(process)
    except PermissionError:
        raise MachineError(
            f"process {process}, which runs in {run!r}, belongs to another user; ask as that user"
        ) from None
    if not pages:
        raise MachineError(
            f"process {process}, which has locked folder {run!r}, shows no ranks: it is another "
            "program, or has just ended"
        )
    return table(pages)


def read_board(process: int) -> list[Page]:
    """Returns the pages of the ranks of one machine; empty if the process has no board."""
    found: list[Page] = []
    for path in boards_of(process):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            memory = mmap(file.fileno(), size, access=ACCESS_READ)
        pages = [Page(memory, i) for i in range(size // PAGE)]
        claimed = [page for page in pages if page.identity() is not None]
        if claimed and (not found or claimed[0].get(STACK)):  # that of the mesh which answers
            found = claimed
    return found


def table(pages: Sequence[Page]) -> str:
    by_rank = {who.rank: page for page in pages if (who := page.identity()) is not None}
    statuses = [s for rank, page in by_rank.items() if (s := Status.of(rank, page)) is not None]
    python = lines_now({s.rank: by_rank[s.rank] for s in statuses if not s.state})
    rows = [HEADINGS, *(row(status, python.get(status.rank, "")) for status in statuses)]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in rows
    ]
    who = next(iter(by_rank.values())).identity()
    assert who is not None
    title = f"{who.mesh}, {who.size} ranks"
    if hidden := [rank for rank in range(who.size) if rank not in by_rank]:
        title += f"; on other machines, or not started yet: rank {numbers_in_words(hidden)}"
    return "\n".join([title, *lines])


def row(status: Status, python: str) -> tuple[str, ...]:
    """One rank: the call that it is in, or the one that it finished last."""
    call, age = "none yet", ""
    if status.waiting is not None:
        call, since = f"in {status.waiting.short}", status.waiting.started
        age = f"{status.now - since:.1f} s"
    elif status.last is not None:
        call, since = f"after {status.last.short}", status.last.finished
        age = f"{status.now - since:.1f} s"
    last = status.waiting or status.last
    silent = {"": "no answer", "stopped": "stopped (SIGSTOP)"}.get(status.state, status.state)
    if not python:
        python = f"{silent}, last call at {last.where}" if last else silent
    step, unit = str(status.step), status.unit or "-"
    return str(status.rank), status.place or "-", step, status.phase, unit, call, age, python
