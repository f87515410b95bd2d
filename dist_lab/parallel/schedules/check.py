"""Is a schedule right: does it do all its work once, send what is needed, and end?"""

from dist_lab.parallel.schedules.actions import (
    COMPUTE,
    MESSAGES,
    Action,
    Op,
    Schedule,
    Thing,
    made_by,
    places,
    received,
)
from dist_lab.parallel.schedules.grid_errors import refuse, refuse_missing
from dist_lab.parallel.schedules.simulate import timeline


def check(schedule: Schedule) -> None:
    """See that a schedule does all its work once, and ends.

    Raises:
        UserError: a rank without work, a stage on two ranks, numbers with gaps, an action missing
            or doubled, a message that is not sent, not received or overtaken, a deadlock; with the
            grid.
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
        refuse(schedule, "no rank has anything to do; write one row of actions a rank", {})
    first: dict[int, tuple[int, int]] = {}  # stage -> where it is seen first
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            why = f"rank {rank} has no actions; give it a stage, or leave its row out"
            refuse(schedule, why, {rank: (None, "nothing to do")})
        for i, action in enumerate(actions):
            other, j = first.setdefault(action.stage, (rank, i))
            if other != rank:
                why = (
                    f"stage {action.stage} is on ranks {other} and {rank}, and one has its weights"
                )
                here = {rank: (i, "here"), other: (j, "and here")}
                refuse(schedule, f"{why}; leave all its actions to one", here)


def _check_numbers(schedule: Schedule) -> None:
    """Stages and micro-batches are numbered from 0, without gaps."""
    places = [(a, rank, i) for rank, row in enumerate(schedule.ranks) for i, a in enumerate(row)]
    for what, number in (
        ("stage", lambda action: action.stage),
        ("micro-batch", lambda action: action.microbatch),
    ):
        numbers = {number(action) for action, _, _ in places}
        if numbers != set(range(len(numbers))):
            odd, rank, i = next(p for p in places if number(p[0]) not in range(len(numbers)))
            lacks = next(n for n in range(len(numbers)) if n not in numbers)
            refuse(
                schedule,
                f"{odd} on rank {rank}, and there is no {what} {lacks}; number "
                f"{what if len(numbers) == 1 else what.replace('h', 'he') + 's'} from 0, "
                f"without gaps: 0 to {len(numbers) - 1}",
                {rank: (i, f"{what} {number(odd)}, of {len(numbers)}")},
            )


def _check_once(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.ranks):
        seen: dict[Thing, int] = {}
        for i, a in enumerate(actions):
            # The executor does either: B, or I and W.
            rivals = {Op.B: (Op.B, Op.I, Op.W), Op.I: (Op.I, Op.B), Op.W: (Op.W, Op.B)}
            for op in rivals.get(a.op, (a.op,)):
                j = seen.get((op, a.stage, a.microbatch))
                if j is not None:
                    why = (
                        f"rank {rank} has {a} twice"
                        if op is a.op
                        else (
                            f"rank {rank} has both {actions[j]} and {a}, and B is I and W at once"
                        )
                    )
                    refuse(schedule, f"{why}; leave out one", {rank: (i, "once too often")})
            seen[a.op, a.stage, a.microbatch] = i


def _check_complete(schedule: Schedule) -> None:
    """Each stage has for each micro-batch F, and B or both I and W."""
    has = {(a.op, a.stage, a.microbatch) for row in schedule.ranks for a in row}
    forward_only = schedule.forward_only
    # However many stages and micro-batches: at the first that lacks something it is over.
    for s in range(schedule.stages):
        for m in range(schedule.microbatches):
            if (Op.F, s, m) not in has:
                refuse_missing(schedule, Action(s, Op.F, m))
            if forward_only or (Op.B, s, m) in has:
                continue
            split = {op for op in (Op.I, Op.W) if (op, s, m) in has}
            if len(split) == 1:
                refuse_missing(schedule, Action(s, Op.W if Op.I in split else Op.I, m))
            if not split:
                refuse_missing(schedule, Action(s, Op.B, m))


def _check_messages(schedule: Schedule) -> None:
    """Each message is sent and received, and between two ranks none overtakes another."""
    where = places(schedule)
    for rank, actions in enumerate(schedule.ranks):
        for i, a in enumerate(actions):
            step = 1 if a.op in (Op.F, Op.SEND_F, Op.RECV_B) else -1
            peer = schedule.rank_of.get(a.stage + step)
            travels = peer is not None and peer != rank
            if a.op in COMPUTE and travels and a.op is not Op.W:
                send = Action(a.stage, Op.SEND_F if a.op is Op.F else Op.SEND_B, a.microbatch)
                for thing in (made_by(send), received(send)):
                    if thing not in where:
                        refuse_missing(schedule, Action(thing[1], thing[0], thing[2]))
            if a.op in MESSAGES and not travels:
                has = f"rank {rank} itself has" if peer == rank else "no rank has"
                why = f"{a} on rank {rank} is between it and stage {a.stage + step}, which {has}"
                refuse(schedule, f"{why}; leave it out", {rank: (i, "no other rank")})
    sent: dict[tuple[int, int], list[Thing]] = {}
    come: dict[tuple[int, int], list[Thing]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for a in actions:
            if a.op in (Op.SEND_F, Op.SEND_B):
                to = schedule.rank_of[received(a)[1]]
                sent.setdefault((rank, to), []).append(received(a))
            elif a.op in MESSAGES:
                by = schedule.rank_of[a.stage + (1 if a.op is Op.RECV_B else -1)]
                come.setdefault((by, rank), []).append(made_by(a))
    for (by, to), messages in sent.items():
        for first, got in zip(messages, come[by, to], strict=False):
            if first != got:
                (_, i), (_, j) = where[got], where[first]
                early, late = schedule.ranks[to][i], schedule.ranks[to][j]
                refuse(
                    schedule,
                    f"messages from rank {by} to rank {to} would be taken for each other: rank "
                    f"{to} does {early} first, and what {late} is for is sent first; on rank {to} "
                    f"move {late} before {early}",
                    {to: (i, f"before {late}")},
                )
