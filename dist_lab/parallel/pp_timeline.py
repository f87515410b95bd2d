"""A schedule played through: when each action begins and ends, or why it never does.

Each rank does its actions in order. One begins as soon as its rank is free and what it needs is
there, and takes `COSTS`; what travels takes no time:

    F(s, m)  needs F(s-1, m)      B(s, m), I(s, m)  need F(s, m), and B or I of (s+1, m)
                                  W(s, m)           needs I(s, m)

Once sends and receives are written in, what a stage is given has been sent and received; and a rank
that has sent goes on while at most IN_FLIGHT of its messages wait for their receive to be posted.

From this come the drawing, the share of time in which ranks are idle, and the proof that a schedule
ends: on real ranks an action waits for the same things, however long each takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dist_lab.errors import Drawn
from dist_lab.parallel.pp_actions import COMPUTE, COSTS, Action, Op, Schedule

Costs = Mapping[Op, float]
Thing = tuple[Op, int, int]  # op, stage, micro-batch: what is there once it has been done
# So many messages a rank may have sent that have not left: see `Flight.send` in pp.py.
IN_FLIGHT = 2


@dataclass(frozen=True)
class Slot:
    """An action in time, in units of the costs, or in seconds."""

    action: Action
    start: float
    end: float


def timeline(schedule: Schedule, costs: Costs = COSTS) -> list[list[Slot]]:
    """When each rank computes what.

    Raises:
        UserError: a rank waits for what never comes; with the grid.
    """
    at: dict[Thing, float] = {}  # when each thing was there
    position, free = [0] * len(schedule.ranks), [0.0] * len(schedule.ranks)
    played: list[list[Slot]] = [[] for _ in schedule.ranks]
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
                played[rank].append(Slot(action, start, free[rank]))
            at[made_by(action)] = free[rank]
            able += waiting.pop(made_by(action), ())
            position[rank] += 1
    if waiting:
        waits = {rank: thing for thing, ranks in waiting.items() for rank in ranks}
        _refuse_deadlock(schedule, position, waits)
    return played


def _left_before(actions: Sequence[Action]) -> dict[int, list[Thing]]:
    """position -> the receive that must be posted before a rank that has sent gets there."""
    sends = [i for i, a in enumerate(actions) if a.op in (Op.SEND_F, Op.SEND_B)]
    late = sends[IN_FLIGHT:]
    return {b + 1: [_received(actions[a])] for a, b in zip(sends, late, strict=False)}


def _received(send: Action) -> Thing:
    """The other end of a send."""
    if send.op is Op.SEND_F:
        return Op.RECV_F, send.stage + 1, send.microbatch
    return Op.RECV_B, send.stage - 1, send.microbatch


def needs(action: Action, schedule: Schedule) -> Iterator[Thing]:
    """What must be there before an action can begin."""
    op, stage, m = action.op, action.stage, action.microbatch
    if op is Op.SEND_F:
        yield Op.F, stage, m
    elif op is Op.SEND_B or op is Op.W:
        yield Op.I, stage, m
    elif op is Op.F and stage > 0:
        yield from _given(schedule, stage - 1, stage, m, Op.F, Op.SEND_F, Op.RECV_F)
    elif op in (Op.B, Op.I):
        yield Op.F, stage, m
        if stage < schedule.stages - 1:
            yield from _given(schedule, stage + 1, stage, m, Op.I, Op.SEND_B, Op.RECV_B)


def _given(
    schedule: Schedule, by: int, to: int, m: int, made: Op, send: Op, receive: Op
) -> Iterator[Thing]:
    """What a stage gets from its neighbor: made on this very rank, or sent and received."""
    if schedule.sends and schedule.rank_of.get(by) != schedule.rank_of[to]:
        yield send, by, m
        yield receive, to, m
    else:
        yield made, by, m


def made_by(action: Action) -> Thing:
    """B makes what I makes, and the gradients of the weights besides."""
    return Op.I if action.op is Op.B else action.op, action.stage, action.microbatch


# --- is it right? ---------------------------------------------------------------------------------


Marks = Mapping[int, tuple[int | None, str]]  # rank -> the action in question, and a remark


def check(schedule: Schedule, most: int | None = None) -> None:
    """See that a schedule does all its work once, and ends.

    Args:
        most: how many forwards a rank may hold that wait for their backward.

    Raises:
        UserError: a rank without work, a stage on two ranks, numbers with gaps, an action missing
            or doubled, a message that is not sent, not received or overtaken, a deadlock, more
            held than `most`; with the grid.
    """
    _check_ranks(schedule)
    _check_numbers(schedule)
    _check_once(schedule)
    _check_complete(schedule)
    if schedule.sends:
        _check_messages(schedule)
    timeline(schedule)
    for rank, peak in enumerate(peak_activations(schedule)):
        if most is not None and peak > most:
            i = next(i for i, held in enumerate(_held(schedule.ranks[rank])) if held > most)
            why = f"rank {rank} holds {peak} forwards at once, and {most} may be held (memory)"
            fix = f"do backwards before {schedule.ranks[rank][i]}"
            _refuse(schedule, f"{why}; {fix}", {rank: (i, f"one more than {most}")})


def _check_ranks(schedule: Schedule) -> None:
    if not schedule.ranks:
        _refuse(schedule, "no rank has anything to do; write one row of actions a rank", {})
    first: dict[int, tuple[int, int]] = {}  # stage -> where it is seen first
    for rank, actions in enumerate(schedule.ranks):
        if not actions:
            why = f"rank {rank} has no actions; give it a stage, or leave its row out"
            _refuse(schedule, why, {rank: (None, "nothing to do")})
        for i, action in enumerate(actions):
            other, j = first.setdefault(action.stage, (rank, i))
            if other != rank:
                why = (
                    f"stage {action.stage} is on ranks {other} and {rank}, and one has its weights"
                )
                here = {rank: (i, "here"), other: (j, "and here")}
                _refuse(schedule, f"{why}; leave all its actions to one", here)


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
            _refuse(
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
                    _refuse(schedule, f"{why}; leave out one", {rank: (i, "once too often")})
            seen[a.op, a.stage, a.microbatch] = i


def _check_complete(schedule: Schedule) -> None:
    """Each stage has for each micro-batch F, and B or both I and W."""
    has = {(a.op, a.stage, a.microbatch) for row in schedule.ranks for a in row}
    forward_only = schedule.forward_only
    # However many stages and micro-batches: at the first that lacks something it is over.
    for s in range(schedule.stages):
        for m in range(schedule.microbatches):
            if (Op.F, s, m) not in has:
                _refuse_missing(schedule, Action(s, Op.F, m))
            if forward_only or (Op.B, s, m) in has:
                continue
            split = {op for op in (Op.I, Op.W) if (op, s, m) in has}
            if len(split) == 1:
                _refuse_missing(schedule, Action(s, Op.W if Op.I in split else Op.I, m))
            if not split:
                _refuse_missing(schedule, Action(s, Op.B, m))


def _refuse_missing(schedule: Schedule, action: Action) -> NoReturn:
    """Beside what else the rank has of this stage and micro-batch, if anything."""
    rank, (s, m) = schedule.rank_of[action.stage], (action.stage, action.microbatch)
    row = schedule.ranks[rank]
    beside = next((i for i, a in enumerate(row) if (a.stage, a.microbatch) == (s, m)), None)
    name = f"{action}, or {s}I{m} and {s}W{m}" if action.op is Op.B else str(action)
    why = f"rank {rank}, which has stage {s}, lacks {name}; add it to the rank's row"
    _refuse(schedule, why, {rank: (beside, f"lacks {name}")})


def _check_messages(schedule: Schedule) -> None:
    """Each message is sent and received, and between two ranks none overtakes another."""
    where = _places(schedule)
    for rank, actions in enumerate(schedule.ranks):
        for i, a in enumerate(actions):
            step = 1 if a.op in (Op.F, Op.SEND_F, Op.RECV_B) else -1
            peer = schedule.rank_of.get(a.stage + step)
            travels = peer is not None and peer != rank
            if a.op in COMPUTE and travels and a.op is not Op.W:
                send = Action(a.stage, Op.SEND_F if a.op is Op.F else Op.SEND_B, a.microbatch)
                for thing in (made_by(send), _received(send)):
                    if thing not in where:
                        _refuse_missing(schedule, Action(thing[1], thing[0], thing[2]))
            if a.op not in COMPUTE and not travels:
                has = f"rank {rank} itself has" if peer == rank else "no rank has"
                why = f"{a} on rank {rank} is between it and stage {a.stage + step}, which {has}"
                _refuse(schedule, f"{why}; leave it out", {rank: (i, "no other rank")})
    sent: dict[tuple[int, int], list[Thing]] = {}
    come: dict[tuple[int, int], list[Thing]] = {}
    for rank, actions in enumerate(schedule.ranks):
        for a in actions:
            if a.op in (Op.SEND_F, Op.SEND_B):
                to = schedule.rank_of[_received(a)[1]]
                sent.setdefault((rank, to), []).append(_received(a))
            elif a.op not in COMPUTE:
                by = schedule.rank_of[a.stage + (1 if a.op is Op.RECV_B else -1)]
                come.setdefault((by, rank), []).append(made_by(a))
    for (by, to), messages in sent.items():
        for first, got in zip(messages, come[by, to], strict=False):
            if first != got:
                (_, i), (_, j) = where[got], where[first]
                early, late = schedule.ranks[to][i], schedule.ranks[to][j]
                _refuse(
                    schedule,
                    f"messages from rank {by} to rank {to} would be taken for each other: rank "
                    f"{to} does {early} first, and what {late} is for is sent first; on rank {to} "
                    f"move {late} before {early}",
                    {to: (i, f"before {late}")},
                )


def _places(schedule: Schedule) -> dict[Thing, tuple[int, int]]:
    """Where each thing is made: rank and position."""
    return {
        made_by(a): (rank, i) for rank, row in enumerate(schedule.ranks) for i, a in enumerate(row)
    }


def _refuse_deadlock(
    schedule: Schedule, position: Sequence[int], waits: Mapping[int, Thing]
) -> NoReturn:
    """Ranks wait for each other in a circle, or one for what nobody makes.

    Args:
        position: how far each rank gets.
        waits: rank that does not get to its end -> what it waits for there.
    """
    where = _places(schedule)

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
            _refuse(schedule, f"{lone}; add it", marks)
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
    _refuse(schedule, f"deadlock: {', '.join(says)}; {fix}", marks)


AROUND, ROWS = 6, 16  # so much of a grid is shown: actions to either side, and ranks


def _refuse(schedule: Schedule, why: str, marks: Marks) -> NoReturn:
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
    return [max(held, default=0) for held in map(_held, schedule.ranks)]


def _held(actions: tuple[Action, ...]) -> Iterator[int]:
    held = 0
    for action in actions:
        held += (action.op is Op.F) - (action.op in (Op.B, Op.W))
        yield held


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
