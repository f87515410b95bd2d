"""Simulates a schedule: when each action begins and ends, or which ranks deadlock.

Each rank executes its actions in order. An action begins as soon as its rank is free and its inputs
exist (`dependencies` in actions.py). Its time is in `COSTS`; messages take no time. After a send a
rank waits until at most IN_FLIGHT of its messages have no posted receive.

The drawing and the idle share come from this simulation, and so does the proof that a schedule
ends: real ranks wait for the same results, however long each action takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from dist_lab.parallel.schedules.actions import (
    COMPUTE,
    COSTS,
    Action,
    Op,
    Result,
    Schedule,
    dependencies,
    matching_receive,
    result_of,
)
from dist_lab.parallel.schedules.grid_errors import refuse_deadlock

Costs = Mapping[Op, float]
# Sends that a rank may have outstanding: `PipelineRun.send` in pipeline/executor.py.
IN_FLIGHT = 2


@dataclass(frozen=True)
class TimedAction:
    """An action with its start and end, in units of the costs or in seconds."""

    action: Action
    start: float
    end: float


def timeline(schedule: Schedule, costs: Costs = COSTS) -> list[list[TimedAction]]:
    """Each rank's compute actions with their times.

    Raises:
        UserError: a rank waits for a result that never comes. The message draws the grid.
    """
    ready_at: dict[Result, float] = {}
    position, free_at = [0] * len(schedule.ranks), [0.0] * len(schedule.ranks)
    timed: list[list[TimedAction]] = [[] for _ in schedule.ranks]
    send_limits = [_send_limits(actions) for actions in schedule.ranks]
    waiting: dict[Result, list[int]] = {}  # result -> the ranks that wait for it
    runnable = list(range(len(schedule.ranks)))
    while runnable:
        rank = runnable.pop()
        while position[rank] < len(schedule.ranks[rank]):
            action = schedule.ranks[rank][position[rank]]
            needed = [*dependencies(action, schedule), *send_limits[rank].get(position[rank], ())]
            missing = next((result for result in needed if result not in ready_at), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = max([free_at[rank], *(ready_at[result] for result in needed)])
            free_at[rank] = start
            if action.op in COMPUTE:
                free_at[rank] += costs[action.op]
                timed[rank].append(TimedAction(action, start, free_at[rank]))
            ready_at[result_of(action)] = free_at[rank]
            runnable += waiting.pop(result_of(action), ())
            position[rank] += 1
    if waiting:
        waits = {rank: result for result, ranks in waiting.items() for rank in ranks}
        refuse_deadlock(schedule, position, waits)
    return timed


def _send_limits(actions: Sequence[Action]) -> dict[int, list[Result]]:
    """position -> the receive it must wait for, so that at most IN_FLIGHT sends are pending."""
    sends = [i for i, a in enumerate(actions) if a.op in (Op.SEND_F, Op.SEND_B)]
    over_limit = sends[IN_FLIGHT:]
    pairs = zip(sends, over_limit, strict=False)
    return {later + 1: [matching_receive(actions[sent])] for sent, later in pairs}


# --- measures and the drawing ---------------------------------------------------------------------


def length(schedule: Schedule, costs: Costs = COSTS) -> float:
    """The time at which the last action ends."""
    return max((timed.end for row in timeline(schedule, costs) for timed in row), default=0.0)


def bubble(schedule: Schedule, costs: Costs = COSTS) -> float:
    """The idle share of all ranks' time, until the last action ends."""
    all_timed = [timed for row in timeline(schedule, costs) for timed in row]
    total = len(schedule.ranks) * max((timed.end for timed in all_timed), default=0.0)
    return 1 - sum(timed.end - timed.start for timed in all_timed) / total if total else 0.0


def from_zero(rows: Sequence[Sequence[TimedAction]]) -> list[list[TimedAction]]:
    """The computing actions of a step, with times that start at the first one."""
    rows = [[timed for timed in row if timed.action.op in COMPUTE] for row in rows]
    zero = min(timed.start for row in rows for timed in row)
    return [[replace(s, start=s.start - zero, end=s.end - zero) for s in row] for row in rows]


def idle_shares(rows: Sequence[Sequence[TimedAction]]) -> list[float]:
    """For each rank the share of a step's time in which it computes nothing."""
    rows = from_zero(rows)
    end = max(timed.end for row in rows for timed in row)
    return [1 - sum(timed.end - timed.start for timed in row) / end for row in rows]


def peak_activations(schedule: Schedule) -> list[int]:
    """Each rank's largest number of micro-batches in flight (F to B or W); 0 without backward."""
    if schedule.forward_only:
        return [0] * len(schedule.ranks)
    change = {Op.F: 1, Op.B: -1, Op.W: -1}
    rows = (accumulate(change.get(a.op, 0) for a in actions) for actions in schedule.ranks)
    return [max(in_flight, default=0) for in_flight in rows]


def render(schedule: Schedule, costs: Costs = COSTS) -> str:
    """Draw a schedule: a row per rank, a column per unit of time. `.` is idle, `-` continues.

    If each rank has one stage, its number is left out: F0 for 2F0. Costs must be whole numbers.
    """
    rows = timeline(schedule, costs)
    several_stages = schedule.stages > len(schedule.ranks)
    cells = [
        {
            int(s.start): str(s.action) if several_stages else str(s.action).lstrip("0123456789")
            for s in row
        }
        for row in rows
    ]
    busy = [{t for s in row for t in range(int(s.start), int(s.end))} for row in rows]
    columns = int(max((timed.end for row in rows for timed in row), default=0))
    width = max((len(text) for row in cells for text in row.values()), default=1)
    label = len(str(len(rows) - 1))
    return "\n".join(
        f"rank {rank:<{label}}  "
        + " ".join(
            row.get(t, "-" if t in busy[rank] else ".").ljust(width) for t in range(columns)
        ).rstrip()
        for rank, row in enumerate(cells)
    )
