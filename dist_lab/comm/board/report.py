"""What the board says when a collective fails on this rank."""

import time
from collections.abc import Sequence

from dist_lab.comm.board.board import Board, numbers_in_words
from dist_lab.comm.board.page import Entry
from dist_lab.comm.board.stack import lines_now
from dist_lab.comm.board.words import Status, by_blame, parting, table

DYING = 0.3  # seconds in which a process whose connections were closed is seen to end


def report(board: Board, number: int, size: int, *, lost: bool) -> tuple[str, str]:
    """Returns who did not make call `number`, in one phrase, and a text about all ranks.

    Both are empty if this rank has just failed before.

    Args:
        lost: a peer's connection was closed, so a rank is ending, or has ended.
        size: the number of ranks on all machines.
    """
    if board.failed_before():  # such as by another wait, while the first error is on its way
        return "", ""
    board.failed()
    entry, began = board.page.entry(number), time.monotonic()
    while True:
        late = [] if entry is None else board.missing(entry)
        statuses = by_blame(board.statuses(), board.awaited())
        others = [s for s in statuses if s.rank != board.rank]
        # A rank that failed in a wait is no cause: it lost a peer, too.
        causes = [s for s in others if s.state or (s.failed and s.waiting is None)]
        if causes or not lost or time.monotonic() - began > DYING:
            break
        time.sleep(0.01)
    text = what_all_do(board, statuses, size)
    blamed = [s for s in others if s.rank in late]
    if not blamed and lost:
        blamed = causes[:1]
    if blamed and entry is not None:
        text += "\n" + where_they_part(board, blamed[0].rank, entry.channel)
    verb = "did not arrive: " if blamed and blamed[0].rank in late else ""
    return ", ".join(f"rank {s.rank} {verb}{s.what}" for s in blamed[:3]), text


def disagreement(board: Board, numbers: dict[int, int], size: int) -> tuple[str, str]:
    """Returns what each rank calls, and a text about all ranks. `numbers`: page -> its call."""
    board.failed()
    calls = {board.ranks[i]: board.pages[i].entry(number) for i, number in numbers.items()}
    each = "; ".join(f"rank {r} calls {said(e)}" for r, e in sorted(calls.items()) if e)
    statuses = by_blame(board.statuses(), board.awaited())
    other = next(rank for rank in calls if rank != board.rank)
    text = what_all_do(board, statuses, size)
    own = calls[board.rank]
    return each, text + "\n" + where_they_part(board, other, own.channel if own else 0)


def what_all_do(board: Board, statuses: Sequence[Status], size: int) -> str:
    """One line for each rank, with the Python line that it is at, if it answers."""
    alive = {s.rank for s in statuses if not s.state}
    python = lines_now({rank: page for rank, page in board.others() if rank in alive})
    hidden: Sequence[int] = [rank for rank in range(size) if rank not in board.ranks]
    elsewhere = f"  on other machines: rank {numbers_in_words(hidden)}" if hidden else ""
    return table(statuses, python, elsewhere)


def said(entry: Entry) -> str:
    return f"{entry.call} at {entry.where}, phase {entry.phase}, {entry.unit}".removesuffix(", ")


def where_they_part(board: Board, rank: int, channel: int) -> str:
    """Compares the calls of this rank and another in all groups that both are in.

    Ranks call in their own order on different channels, so only the failed call's own counts.
    """
    ours, theirs = board.page.entries(), board.pages[board.ranks.index(rank)].entries()
    common = board.common(rank)
    left, right = (
        [e for e in side if e.key in common and e.channel == channel] for side in (ours, theirs)
    )
    return parting(left, right, (board.rank, rank))
