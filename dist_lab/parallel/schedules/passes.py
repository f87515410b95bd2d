"""Passes: from a schedule to a schedule, with what travels and what strategies must be told.

A schedule says what is computed when. Before it is run, passes write into it when messages are sent
and received, when a stage's parameters must be there, and when its gradients are complete. What a
pipeline and another strategy do together is written here and nowhere else.
"""

from dataclasses import replace

from dist_lab.parallel.schedules.actions import COMPUTE, Action, Op, Schedule
from dist_lab.parallel.schedules.simulate import timeline


def add_communication(schedule: Schedule) -> Schedule:
    """Write in what travels: a send after what makes it, a receive where that begins to be made.

    Both ends are placed in the order in which the ideal run makes things, so two messages between
    two ranks cannot cross. A receive is posted before the compute that runs while its message is
    being made. And no wait can end in a circle: what a rank waits for, a message, or the other
    end's receive where it waits for its own send to leave, lies before it in the ideal run.
    """
    if schedule.sends:
        return schedule
    rows = timeline(schedule)
    begins = sorted(
        (slot.start, slot.end, rank, i)
        for rank, row in enumerate(rows)
        for i, slot in enumerate(row)
    )
    before: dict[tuple[int, int], list[Action]] = {}  # (rank, position) -> receives posted there
    after: dict[tuple[int, int], list[Action]] = {}
    for start, _, rank, i in begins:
        a = rows[rank][i].action
        forward = a.op is Op.F
        other = a.stage + 1 if forward else a.stage - 1
        to = schedule.rank_of.get(other)
        if a.op is Op.W or to is None or to == rank:
            continue
        send, receive = (Op.SEND_F, Op.RECV_F) if forward else (Op.SEND_B, Op.RECV_B)
        place = next(j for j, slot in enumerate(rows[to]) if slot.end > start)
        after.setdefault((rank, i), []).append(Action(a.stage, send, a.microbatch))
        before.setdefault((to, place), []).append(Action(other, receive, a.microbatch))
    return replace(
        schedule,
        ranks=tuple(
            tuple(
                action
                for i, slot in enumerate(row)
                for action in (*before.get((rank, i), ()), slot.action, *after.get((rank, i), ()))
            )
            for rank, row in enumerate(rows)
        ),
    )


def add_unshard(schedule: Schedule) -> Schedule:
    """Write in when a stage is unsharded and resharded: before a rank's first action of it, and
    after the last. So what a strategy gathers for a stage, it gathers once for all micro-batches.
    """
    return replace(schedule, ranks=tuple(map(_unsharded, schedule.ranks)))


def _unsharded(actions: tuple[Action, ...]) -> tuple[Action, ...]:
    compute = [i for i, a in enumerate(actions) if a.op in COMPUTE]
    first = {actions[i].stage: i for i in reversed(compute)}
    last = {actions[i].stage: i for i in compute}
    row: list[Action] = []
    for i, a in enumerate(actions):
        if first.get(a.stage) == i:
            row.append(Action(a.stage, Op.UNSHARD, a.microbatch))
        row.append(a)
        if last.get(a.stage) == i:
            row.append(Action(a.stage, Op.RESHARD, a.microbatch))
    return tuple(row)


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
