"""A schedule played through: when each action begins and ends, or why it never does.

Each rank does its actions in order. One begins as soon as its rank is free and what it needs is
there (`needs` in actions.py), and takes `COSTS`; what travels takes no time. A rank that has
sent goes on while at most IN_FLIGHT of its messages wait for their receive to be posted.

From this come the drawing, the share of time in which ranks are idle, and the proof that a schedule
ends: on real ranks an action waits for the same things, however long each takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from dist_lab.parallel.schedules.actions import (
    COMPUTE,
    COSTS,
    Action,
    Op,
    Schedule,
    Thing,
    made_by,
    needs,
    received,
)
from dist_lab.parallel.schedules.grid_errors import refuse_deadlock

Costs = Mapping[Op, float]
# So many messages a rank may have sent that have not left: `Flight.send` in pipeline/executor.py.
IN_FLIGHT = 2


@dataclass(frozen=True)
class TimedAction:
    """An action in time, in units of the costs, or in seconds."""

    action: Action
    start: float
    end: float


def timeline(schedule: Schedule, costs: Costs = COSTS) -> list[list[TimedAction]]:
    """When each rank computes what.

    Raises:
        UserError: a rank waits for what never comes; with the grid.
    """
    at: dict[Thing, float] = {}  # when each thing was there
    position, free = [0] * len(schedule.ranks), [0.0] * len(schedule.ranks)
    played: list[list[TimedAction]] = [[] for _ in schedule.ranks]
    left = [_left_before(actions) for actions in schedule.ranks]
    waiting: dict[Thing, list[int]] = {}  # thing -> the ranks that wait for it
    able = list(range(len(schedule.ranks)))
    while able:
        rank = able.pop()
        while position[rank] < len(schedule.ranks[rank]):
            action = schedule.ranks[rank][position[rank]]
            needed = [*needs(action, schedule), *left[rank].get(position[rank], ())]
            lacking = next((thing for thing in needed if thing not in at), None)
            if lacking is not None:
                waiting.setdefault(lacking, []).append(rank)
                break
            start = max([free[rank], *(at[thing] for thing in needed)])
            free[rank] = start
            if action.op in COMPUTE:
                free[rank] += costs[action.op]
                played[rank].append(TimedAction(action, start, free[rank]))
            at[made_by(action)] = free[rank]
            able += waiting.pop(made_by(action), ())
            position[rank] += 1
    if waiting:
        waits = {rank: thing for thing, ranks in waiting.items() for rank in ranks}
        refuse_deadlock(schedule, position, waits)
    return played


def _left_before(actions: Sequence[Action]) -> dict[int, list[Thing]]:
    """position -> the receive that must be posted before a rank that has sent gets there."""
    sends = [i for i, a in enumerate(actions) if a.op in (Op.SEND_F, Op.SEND_B)]
    late = sends[IN_FLIGHT:]
    return {b + 1: [received(actions[a])] for a, b in zip(sends, late, strict=False)}


# --- what it costs, and what it looks like --------------------------------------------------------


def length(schedule: Schedule, costs: Costs = COSTS) -> float:
    """From the first action to the last one's end."""
    return max((slot.end for slots in timeline(schedule, costs) for slot in slots), default=0.0)


def bubble(schedule: Schedule, costs: Costs = COSTS) -> float:
    """The share of all ranks' time, from the first action to the last one's end, that is idle."""
    slots = [slot for row in timeline(schedule, costs) for slot in row]
    whole = len(schedule.ranks) * max((slot.end for slot in slots), default=0.0)
    return 1 - sum(slot.end - slot.start for slot in slots) / whole if whole else 0.0


def peak_activations(schedule: Schedule) -> list[int]:
    """Of each rank: the most forwards it holds at once, until their B or W; 0 if there is none."""
    if schedule.forward_only:
        return [0] * len(schedule.ranks)
    change = {Op.F: 1, Op.B: -1, Op.W: -1}
    rows = (accumulate(change.get(a.op, 0) for a in actions) for actions in schedule.ranks)
    return [max(held, default=0) for held in rows]


def render(schedule: Schedule, costs: Costs = COSTS) -> str:
    """One row a rank, one column a unit of time; `.` is idle, `-` goes on with what is before it.

    Where a rank has one stage, the action is without it: F0 for 2F0. Costs are whole numbers.
    """
    rows = timeline(schedule, costs)
    several = schedule.stages > len(schedule.ranks)
    cells = [
        {
            int(s.start): str(s.action) if several else str(s.action).lstrip("0123456789")
            for s in row
        }
        for row in rows
    ]
    busy = [{t for s in row for t in range(int(s.start), int(s.end))} for row in rows]
    columns = int(max((slot.end for row in rows for slot in row), default=0))
    width = max((len(text) for row in cells for text in row.values()), default=1)
    label = len(str(len(rows) - 1))
    return "\n".join(
        f"rank {rank:<{label}}  "
        + " ".join(
            row.get(t, "-" if t in busy[rank] else ".").ljust(width) for t in range(columns)
        ).rstrip()
        for rank, row in enumerate(cells)
    )
