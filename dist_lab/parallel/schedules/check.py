"""Checks a schedule: it does all its work once, sends and receives every message, and ends."""

from dist_lab.parallel.schedules.actions import (
    COMPUTE,
    MESSAGES,
    Action,
    Op,
    Result,
    Schedule,
    matching_receive,
    producers,
    result_of,
)
from dist_lab.parallel.schedules.grid_errors import refuse, refuse_missing
from dist_lab.parallel.schedules.simulate import timeline


def check(schedule: Schedule) -> None:
    """Check that a schedule does all its work once, and ends.

    Raises:
        UserError: a rank has no work, a stage is on two ranks, numbers have gaps, an action is
            missing or doubled, a message is not sent, not received or overtaken, or ranks
            deadlock. The message draws the grid.
    """
    _check_ranks(schedule)
    _check_numbers(schedule)
    _check_once(schedule)
    _check_complete(schedule)
    if schedule.sends:
        _check_messages(schedule)
    timeline(schedule)


def _check_ranks(schedule: Schedule) -> None:
    if not schedule.ranks:
        refuse(schedule, "no rank has any actions; write one row of actions per rank", {})
    first_seen: dict[int, tuple[int, int]] = {}  # stage -> (rank, position)
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            why = f"rank {rank} has no actions; give it a stage, or delete its row"
            refuse(schedule, why, {rank: (None, "nothing to do")})
        for i, action in enumerate(actions):
            other, j = first_seen.setdefault(action.stage, (rank, i))
            if other != rank:
                why = (
                    f"stage {action.stage} is on ranks {other} and {rank}, but only one rank can "
                    "hold its weights; give all its actions to one rank"
                )
                refuse(schedule, why, {rank: (i, "here"), other: (j, "and here")})


def _check_numbers(schedule: Schedule) -> None:
    """Check that stages and micro-batches are numbered from 0 without gaps."""
    all_actions = [(a, r, i) for r, row in enumerate(schedule.ranks) for i, a in enumerate(row)]
    for noun, number in (
        ("stage", lambda action: action.stage),
        ("micro-batch", lambda action: action.microbatch),
    ):
        numbers = {number(action) for action, _, _ in all_actions}
        if numbers != set(range(len(numbers))):
            odd, rank, i = next(p for p in all_actions if number(p[0]) not in range(len(numbers)))
            missing = next(n for n in range(len(numbers)) if n not in numbers)
            refuse(
                schedule,
                f"{odd} on rank {rank}, but there is no {noun} {missing}; number "
                f"{noun if len(numbers) == 1 else noun.replace('h', 'he') + 's'} from 0 "
                f"without gaps: 0 to {len(numbers) - 1}",
                {rank: (i, f"{noun} {number(odd)} of {len(numbers)}")},
            )


def _check_once(schedule: Schedule) -> None:
    """Check that no action comes twice, and that no backward is both a B and an I or W."""
    for rank, actions in enumerate(schedule.ranks):
        seen: dict[Result, int] = {}
        for i, a in enumerate(actions):
            # A backward is either B, or I and W.
            excludes = {Op.B: (Op.B, Op.I, Op.W), Op.I: (Op.I, Op.B), Op.W: (Op.W, Op.B)}
            for op in excludes.get(a.op, (a.op,)):
                j = seen.get((op, a.stage, a.microbatch))
                if j is not None:
                    why = (
                        f"rank {rank} has {a} twice"
                        if op is a.op
                        else (
                            f"rank {rank} has both {actions[j]} and {a}, but B already includes I "
                            "and W"
                        )
                    )
                    refuse(schedule, f"{why}; delete one of them", {rank: (i, "one too many")})
            seen[a.op, a.stage, a.microbatch] = i


def _check_complete(schedule: Schedule) -> None:
    """Check that each stage has, for each micro-batch, F and either B or both I and W."""
    present = {(a.op, a.stage, a.microbatch) for row in schedule.ranks for a in row}
    forward_only = schedule.forward_only
    # Files may have very large numbers in them: this ends at the first missing action.
    for s in range(schedule.stages):
        for m in range(schedule.microbatches):
            if (Op.F, s, m) not in present:
                refuse_missing(schedule, Action(s, Op.F, m))
            if forward_only or (Op.B, s, m) in present:
                continue
            halves = {op for op in (Op.I, Op.W) if (op, s, m) in present}
            if len(halves) == 1:
                refuse_missing(schedule, Action(s, Op.W if Op.I in halves else Op.I, m))
            if not halves:
                refuse_missing(schedule, Action(s, Op.B, m))


def _check_messages(schedule: Schedule) -> None:
    """Check that each message is sent and received, and that none overtakes another."""
    where = producers(schedule)
    for rank, actions in enumerate(schedule.ranks):
        for i, a in enumerate(actions):
            step = 1 if a.op in (Op.F, Op.SEND_F, Op.RECV_B) else -1
            peer = schedule.rank_of.get(a.stage + step)
            crosses_ranks = peer is not None and peer != rank
            if a.op in COMPUTE and crosses_ranks and a.op is not Op.W:
                send = Action(a.stage, Op.SEND_F if a.op is Op.F else Op.SEND_B, a.microbatch)
                for op, s, m in (result_of(send), matching_receive(send)):
                    if (op, s, m) not in where:
                        refuse_missing(schedule, Action(s, op, m))
            if a.op in MESSAGES and not crosses_ranks:
                owner = "is on the same rank" if peer == rank else "does not exist"
                why = f"{a} on rank {rank} exchanges with stage {a.stage + step}, which {owner}"
                refuse(schedule, f"{why}; delete it", {rank: (i, "no other rank")})
    # (from, to) -> messages, as (op, stage, micro-batch) of their receives, in order
    sent: dict[tuple[int, int], list[Result]] = {}
    received: dict[tuple[int, int], list[Result]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for a in actions:
            if a.op in (Op.SEND_F, Op.SEND_B):
                to = schedule.rank_of[matching_receive(a)[1]]
                sent.setdefault((rank, to), []).append(matching_receive(a))
            elif a.op in MESSAGES:
                source = schedule.rank_of[a.stage + (1 if a.op is Op.RECV_B else -1)]
                received.setdefault((source, rank), []).append(result_of(a))
    for (source, to), messages in sent.items():
        for next_sent, next_received in zip(messages, received[source, to], strict=False):
            if next_sent != next_received:
                (_, i), (_, j) = where[next_received], where[next_sent]
                early, late = schedule.ranks[to][i], schedule.ranks[to][j]
                refuse(
                    schedule,
                    f"messages from rank {source} to rank {to} would be mixed up: rank {to} does "
                    f"{early} first, but the message for {late} is sent first; on rank {to} move "
                    f"{late} before {early}",
                    {to: (i, f"before {late}")},
                )
