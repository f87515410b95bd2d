"""Errors of a schedule: a line that says what is wrong and what to do, and below it the grid."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from dist_lab.errors import Drawn
from dist_lab.parallel.schedules.actions import Action, Op, Result, Schedule, producers

Marks = Mapping[int, tuple[int | None, str]]  # rank -> (position of the marked action, remark)
AROUND, ROWS = 6, 16  # how much of the grid is shown: actions to either side, and ranks


def refuse(schedule: Schedule, why: str, marks: Marks) -> NoReturn:
    """Raise UserError: one line with the reason and the fix, then the grid with actions marked."""
    lines = [f"schedule {schedule.name}: {why}"]
    unmarked = (rank for rank in range(len(schedule.ranks)) if rank not in marks)
    for rank in sorted([*sorted(marks), *unmarked][:ROWS]):
        actions = schedule.ranks[rank]
        marked, remark = marks.get(rank, (None, ""))
        middle = marked or 0
        shown = range(max(0, middle - AROUND), min(len(actions), middle + AROUND + 1))
        cells = [f"[{actions[i]}]" if i == marked else str(actions[i]) for i in shown]
        before, after = shown.start > 0, shown.stop < len(actions)
        row = " ".join([*["..."] * before, *cells, *["..."] * after])
        lines.append(f"  rank {rank}: {row}" + (f"   <-- {remark}" if remark else ""))
    if len(schedule.ranks) > ROWS:
        lines.append(f"  and {len(schedule.ranks) - ROWS} more ranks")
    raise Drawn("\n".join(lines))


def refuse_missing(schedule: Schedule, action: Action) -> NoReturn:
    """Raise UserError: this action is missing. Marks another one of its stage and micro-batch."""
    rank, (s, m) = schedule.rank_of[action.stage], (action.stage, action.microbatch)
    row = schedule.ranks[rank]
    beside = next((i for i, a in enumerate(row) if (a.stage, a.microbatch) == (s, m)), None)
    name = f"{action}, or {s}I{m} and {s}W{m}" if action.op is Op.B else str(action)
    why = f"rank {rank} has stage {s}, but no {name}; add it to the rank's row"
    refuse(schedule, why, {rank: (beside, f"no {name}")})


def refuse_deadlock(
    schedule: Schedule, position: Sequence[int], waits: Mapping[int, Result]
) -> NoReturn:
    """Raise UserError: ranks wait for each other in a circle, or for an action that nobody has.

    Args:
        position: of each rank, the action at which it stops.
        waits: rank that does not reach its end -> the result it waits for.
    """
    where = producers(schedule)

    def name(result: Result) -> str:
        if result in where:
            rank, i = where[result]
            return str(schedule.ranks[rank][i])  # B rather than I, if it is B that produces it
        op, stage, m = result
        return str(Action(stage, op, m))

    stuck = {rank: schedule.ranks[rank][position[rank]] for rank in waits}
    marks = {rank: (position[rank], f"waits for {name(waits[rank])}") for rank in waits}
    path: dict[int, None] = {}  # an ordered set
    rank = min(waits)
    while rank not in path:
        path[rank] = None
        if waits[rank] not in where:
            why = f"rank {rank} waits in {stuck[rank]} for {name(waits[rank])}, which no rank does"
            refuse(schedule, f"{why}; add it", marks)
        rank = where[waits[rank]][0]
    circle = list(path)[list(path).index(rank) :]
    clauses = [f"rank {r} waits in {stuck[r]} for {name(waits[r])}" for r in circle]
    if len(clauses) > 4:
        clauses[3:] = [f"and so on round {len(circle)} ranks"]
    # Usually an action that one rank waits for comes too late in another's row: move it forward.
    # Otherwise the ranks wait for their sends to complete.
    fix = "receive before sending so much"
    for r in circle:
        owner, i = where[waits[r]]
        if i > position[owner]:
            fix = f"on rank {owner} move {name(waits[r])} before {stuck[owner]}"
    refuse(schedule, f"deadlock: {', '.join(clauses)}; {fix}", marks)
