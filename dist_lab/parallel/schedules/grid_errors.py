"""How a schedule is refused: a line that says what, where and what to do, and below it the grid."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from dist_lab.errors import Drawn
from dist_lab.parallel.schedules.actions import Action, Op, Schedule, Thing, places

Marks = Mapping[int, tuple[int | None, str]]  # rank -> the action in question, and a remark
AROUND, ROWS = 6, 16  # so much of a grid is shown: actions to either side, and ranks


def refuse(schedule: Schedule, why: str, marks: Marks) -> NoReturn:
    """What is wrong, where and what to do in one line; then the grid with the place marked."""
    lines = [f"schedule {schedule.name}: {why}"]
    quiet = (rank for rank in range(len(schedule.ranks)) if rank not in marks)
    for rank in sorted([*sorted(marks), *quiet][:ROWS]):
        actions = schedule.ranks[rank]
        place, remark = marks.get(rank, (None, ""))
        middle = place or 0
        near = range(max(0, middle - AROUND), min(len(actions), middle + AROUND + 1))
        cells = [f"[{actions[i]}]" if i == place else str(actions[i]) for i in near]
        before, after = near.start > 0, near.stop < len(actions)
        row = " ".join([*["..."] * before, *cells, *["..."] * after])
        lines.append(f"  rank {rank}: {row}" + (f"   <-- {remark}" if remark else ""))
    if len(schedule.ranks) > ROWS:
        lines.append(f"  and {len(schedule.ranks) - ROWS} more ranks")
    raise Drawn("\n".join(lines))


def refuse_missing(schedule: Schedule, action: Action) -> NoReturn:
    """Beside what else the rank has of this stage and micro-batch, if anything."""
    rank, (s, m) = schedule.rank_of[action.stage], (action.stage, action.microbatch)
    row = schedule.ranks[rank]
    beside = next((i for i, a in enumerate(row) if (a.stage, a.microbatch) == (s, m)), None)
    name = f"{action}, or {s}I{m} and {s}W{m}" if action.op is Op.B else str(action)
    why = f"rank {rank}, which has stage {s}, lacks {name}; add it to the rank's row"
    refuse(schedule, why, {rank: (beside, f"lacks {name}")})


def refuse_deadlock(
    schedule: Schedule, position: Sequence[int], waits: Mapping[int, Thing]
) -> NoReturn:
    """Ranks wait for each other in a circle, or one for what nobody makes.

    Args:
        position: how far each rank gets.
        waits: rank that does not get to its end -> what it waits for there.
    """
    where = places(schedule)

    def name(thing: Thing) -> str:
        if thing in where:
            rank, i = where[thing]
            return str(schedule.ranks[rank][i])  # B rather than I, if that is what makes it
        return str(Action(thing[1], thing[0], thing[2]))

    stuck = {rank: schedule.ranks[rank][position[rank]] for rank in waits}
    marks = {rank: (position[rank], f"waits for {name(waits[rank])}") for rank in waits}
    path: dict[int, None] = {}  # in order, and quick to look up
    rank = min(waits)
    while rank not in path:
        path[rank] = None
        if waits[rank] not in where:
            lone = f"rank {rank} waits in {stuck[rank]} for {name(waits[rank])}, which nobody does"
            refuse(schedule, f"{lone}; add it", marks)
        rank = where[waits[rank]][0]
    circle = list(path)[list(path).index(rank) :]
    says = [f"rank {r} waits in {stuck[r]} for {name(waits[r])}" for r in circle]
    if len(says) > 4:
        says[3:] = [f"and so on round {len(circle)} ranks"]
    # Someone in the circle could go on with what another one waits for, were it not behind; if not,
    # it is what they have sent that cannot leave.
    fix = "receive before sending so much"
    for r in circle:
        owner, i = where[waits[r]]
        if i > position[owner]:
            fix = f"on rank {owner} move {name(waits[r])} before {stuck[owner]}"
    refuse(schedule, f"deadlock: {', '.join(says)}; {fix}", marks)
