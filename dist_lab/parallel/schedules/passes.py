"""Passes over a schedule: each returns a copy with inserted actions or with marks.

A schedule orders the compute. Before it is run, passes insert when messages are sent and received
and when a stage is unsharded, and mark when its gradients are complete. How a pipeline and another
strategy work together is decided here and nowhere else.
"""

from collections.abc import Iterator
from dataclasses import replace

from dist_lab.parallel.schedules.actions import COMPUTE, Action, Op, Schedule
from dist_lab.parallel.schedules.simulate import timeline


def add_communication(schedule: Schedule) -> Schedule:
    """Insert messages: a send right after its compute, a receive when that compute begins.

    Sends and receives follow the order of the simulated run, so two messages between two ranks
    cannot cross. A receive is posted before the compute that runs while the sender computes.
    There is no deadlock: a rank waits only for messages, and for receives of its own sends, that
    come earlier in the simulated run.
    """
    if schedule.sends:
        return schedule
    rows = timeline(schedule)
    by_start = sorted(
        (timed.start, timed.end, rank, i)
        for rank, row in enumerate(rows)
        for i, timed in enumerate(row)
    )
    before: dict[tuple[int, int], list[Action]] = {}  # (rank, position) -> receives posted there
    after: dict[tuple[int, int], list[Action]] = {}  # (rank, position) -> sends
    for start, _, rank, i in by_start:
        a = rows[rank][i].action
        forward = a.op is Op.F
        other = a.stage + 1 if forward else a.stage - 1
        to = schedule.rank_of.get(other)
        if a.op is Op.W or to is None or to == rank:
            continue
        send, receive = (Op.SEND_F, Op.RECV_F) if forward else (Op.SEND_B, Op.RECV_B)
        j = next(j for j, timed in enumerate(rows[to]) if timed.end > start)
        after.setdefault((rank, i), []).append(Action(a.stage, send, a.microbatch))
        before.setdefault((to, j), []).append(Action(other, receive, a.microbatch))
    return replace(
        schedule,
        ranks=tuple(
            tuple(
                action
                for i, timed in enumerate(row)
                for action in (*before.get((rank, i), ()), timed.action, *after.get((rank, i), ()))
            )
            for rank, row in enumerate(rows)
        ),
    )


def add_unshard(schedule: Schedule, *, each_action: bool) -> Schedule:
    """Insert UNSHARD and RESHARD, between which a strategy holds a stage's unsharded parameters.

    Args:
        each_action: around each compute action, which keeps one stage unsharded at a time. If not,
            before the first and after the last one of each stage, which gathers it once.
    """
    insert = _around_each if each_action else _around_all
    return replace(schedule, ranks=tuple(tuple(insert(actions)) for actions in schedule.ranks))


def _around_each(actions: tuple[Action, ...]) -> Iterator[Action]:
    for a in actions:
        yield from _around(a) if a.op in COMPUTE else (a,)


def _around_all(actions: tuple[Action, ...]) -> Iterator[Action]:
    compute = [i for i, a in enumerate(actions) if a.op in COMPUTE]
    first = {actions[i].stage: i for i in reversed(compute)}
    last = {actions[i].stage: i for i in compute}
    for i, a in enumerate(actions):
        unshard, _, reshard = _around(a)
        yield from (unshard,) if first.get(a.stage) == i else ()
        yield a
        yield from (reshard,) if last.get(a.stage) == i else ()


def _around(a: Action) -> tuple[Action, Action, Action]:
    return Action(a.stage, Op.UNSHARD, a.microbatch), a, Action(a.stage, Op.RESHARD, a.microbatch)


def mark_gradients_complete(schedule: Schedule) -> Schedule:
    """Mark the last B or W of each stage: nothing is added to its gradients afterwards."""
    final = {a.stage: a for actions in schedule.ranks for a in actions if a.op in (Op.B, Op.W)}
    return replace(
        schedule,
        ranks=tuple(
            tuple(replace(a, last=True) if final.get(a.stage) == a else a for a in actions)
            for actions in schedule.ranks
        ),
    )
