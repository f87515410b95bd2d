"""Pipeline schedules: pure functions from (ranks, micro-batches) to every rank's list of actions.

Letters: p ranks, r one of them, v stages a rank, m micro-batches. The forward, the input gradient
and the weight gradient of a stage are assumed to cost 1 each, and messages nothing:

    schedule      idle share                  micro-batches in flight, at most  stages of rank r
    gpipe         (p-1) / (m+p-1)             m                                 r
    1f1b          (p-1) / (m+p-1)             p-r                               r
    interleaved   (p-1) / (v m+p-1)           (v-1) p + 2 (p-r) - 1             r, p+r, 2p+r ...
    zb            (p-1) / (3m+p-1), m >= p    p                                 r
    zbv           (p-1) / (6m+p-1), m >= p    2p, each of half a stage          r, 2p-1-r

A micro-batch is in flight from its forward through a stage to its backward there; no rank has more
than m per stage. Costs are per stage, but interleaved has v times as many stages as gpipe, 1f1b and
zb, each 1/v as long, and zbv has twice as many. zb and zbv have the least possible idle time, since
the last rank cannot begin before p-1 units. With m < p they take longer than their formula.

gpipe: Huang et al. 2018 (arXiv:1811.06965). 1f1b: Narayanan et al. 2020 (arXiv:2006.09503),
interleaved: 2021 (arXiv:2104.04473), section 2.2. zb is ZB-H1, zbv ZB-V: Qi et al. 2023
(arXiv:2401.10241), 2024 (arXiv:2405.15362). A test checks the table for up to 8 ranks and 32
micro-batches. zbv comes from a greedy rule, so larger numbers are not proven.

    >>> from dist_lab.parallel.schedules.simulate import render
    >>> print(render(one_f_one_b(ranks=3, microbatches=4)))
    rank 0  F0 F1 F2 .  .  .  .  B0 -  F3 B1 -  .  B2 -  .  B3 -
    rank 1  .  F0 F1 .  .  B0 -  F2 B1 -  F3 B2 -  .  B3 -  .  .
    rank 2  .  .  F0 B0 -  F1 B1 -  F2 B2 -  F3 B3 -  .  .  .  .
    >>> print(render(zero_bubble(ranks=3, microbatches=4)))
    rank 0  F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1  .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2  .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dist_lab.errors import UserError
from dist_lab.parallel.schedules.actions import Action, Op, Schedule
from dist_lab.parallel.schedules.check import check
from dist_lab.parallel.schedules.files import check_fits, load

# --- the schedules --------------------------------------------------------------------------------


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards, in the order of the micro-batches."""
    each = range(microbatches)
    return Schedule(
        "gpipe",
        tuple(
            (*(Action(r, Op.F, k) for k in each), *(Action(r, Op.B, k) for k in each))
            for r in range(ranks)
        ),
    )


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """Rank r does p-1-r warm-up forwards, then one forward and one backward in turn."""
    return Schedule(
        "1f1b",
        tuple(
            _alternate(
                [Action(r, Op.F, k) for k in range(microbatches)],
                [Action(r, Op.B, k) for k in range(microbatches)],
                ahead=ranks - 1 - r,
            )
            for r in range(ranks)
        ),
    )


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1f1b with v stages a rank: p micro-batches run through one of them, then through the next.

    Raises:
        UserError: the micro-batches do not divide into groups of p.
    """
    if microbatches % ranks:
        fitting = max(1, round(microbatches / ranks)) * ranks
        raise UserError(
            f"interleaved takes micro-batches in groups of one per rank, but {microbatches} do not "
            f"divide by {ranks} ranks of pp (microbatches=); give microbatches={fitting}"
        )

    def turn(k: int) -> tuple[int, int]:  # the k-th forward: (chunk, micro-batch)
        group, within = divmod(k, ranks * chunks)
        return within // ranks, group * ranks + within % ranks

    rows = []
    for r in range(ranks):
        turns = [turn(k) for k in range(microbatches * chunks)]
        forward = [Action(chunk * ranks + r, Op.F, m) for chunk, m in turns]
        backward = [Action((chunks - 1 - chunk) * ranks + r, Op.B, m) for chunk, m in turns]
        rows.append(_alternate(forward, backward, ahead=(chunks - 1) * ranks + 2 * (ranks - 1 - r)))
    return Schedule("interleaved", tuple(rows))


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> tuple[Action, ...]:
    """`ahead` forwards, then one forward and one backward in turn, then the other backwards."""
    ahead = min(ahead, len(forward))
    pairs = zip(forward[ahead:], backward, strict=False)
    rest = backward[len(forward) - ahead :]
    return (*forward[:ahead], *(a for pair in pairs for a in pair), *rest)


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """ZB-H1: 1f1b in which the weight gradients of rank r come r micro-batches after its input
    gradients. So a later rank has more weight gradients left when it would be idle. Each rank has
    up to p micro-batches in flight, as the first rank of 1f1b has.
    """
    rows = []
    for r in range(ranks):
        actions = [Action(r, Op.F, k) for k in range(min(microbatches, ranks - r))]
        for k in range(microbatches):
            actions.append(Action(r, Op.I, k))
            if k >= r:
                actions.append(Action(r, Op.W, k - r))
            if k + ranks - r < microbatches:
                actions.append(Action(r, Op.F, k + ranks - r))
        remaining = range(max(0, microbatches - r), microbatches)
        rows.append((*actions, *(Action(r, Op.W, k) for k in remaining)))
    return Schedule("zb", tuple(rows))


def zero_bubble_v(ranks: int, microbatches: int) -> Schedule:
    """ZB-V: each rank has a stage on the way out and one on the way back, so that the last rank
    passes activations to itself, and the first computes the loss.

    A rank does the first action that is ready, of: F on the way back, which soon reaches the loss;
    I, F, W on the way out, which make room for new micro-batches; I, W on the way back. It begins
    no F while 2p are in flight. Of the 180 priority orders with I before W, 4 are optimal to p = 8.
    """
    last = 2 * ranks - 1
    count: Counter[tuple[Op, int]] = Counter()  # how many of each (op, stage) have begun
    ends: dict[tuple[Op, int, int], int] = {}  # (op, stage, micro-batch) -> when it ends
    rows: list[list[Action]] = [[] for _ in range(ranks)]

    def ready(r: int, now: int) -> Iterable[Action]:
        """The actions that rank r could do now, by priority."""
        out, back = r, last - r
        in_flight = sum(count[Op.F, s] - count[Op.W, s] for s in (out, back))
        for op, s in (
            (Op.F, back), (Op.I, out), (Op.F, out), (Op.W, out), (Op.I, back), (Op.W, back),
        ):  # fmt: skip
            k = count[op, s]
            needed = {
                Op.F: [(Op.F, s - 1, k)] if s > 0 else [],
                Op.I: [(Op.F, s, k)] + ([(Op.I, s + 1, k)] if s < last else []),
                Op.W: [(Op.I, s, k)],
            }[op]
            possible = k < microbatches and all(ends.get(n, now + 1) <= now for n in needed)
            if possible and (op is not Op.F or in_flight < 2 * ranks):
                yield Action(s, op, k)

    now = 0
    while len(ends) < 6 * ranks * microbatches:
        chosen = [next(iter(ready(r, now)), None) for r in range(ranks)]
        for r, action in enumerate(chosen):
            if action is not None:
                rows[r].append(action)
                count[action.op, action.stage] += 1
                ends[action.op, action.stage, action.microbatch] = now + 1
        assert any(chosen), "no rank has an action that is ready"
        now += 1
    return Schedule("zbv", tuple(map(tuple, rows)))


def forward_only(rank_of: Mapping[int, int], microbatches: int) -> Schedule:
    """For evaluation: groups of p micro-batches; each group passes through all stages before the
    next begins. Any number of micro-batches.
    """
    ranks = 1 + max(rank_of.values())
    order = sorted((m // ranks, s, m) for s in rank_of for m in range(microbatches))
    actions = [Action(s, Op.F, m) for _, s, m in order]
    return Schedule(
        "forward", tuple(tuple(a for a in actions if rank_of[a.stage] == r) for r in range(ranks))
    )


@dataclass(frozen=True)
class Kind:
    """A built-in schedule.

    make: (ranks, micro-batches; and chunks, if the user chooses them) -> the schedule
    chunks: stages a rank; None: the user chooses, 2 by default
    """

    make: Callable[..., Schedule]
    chunks: int | None


SCHEDULES: Mapping[str, Kind] = {
    "gpipe": Kind(gpipe, 1),
    "1f1b": Kind(one_f_one_b, 1),
    "interleaved": Kind(interleaved, None),
    "zb": Kind(zero_bubble, 1),
    "zbv": Kind(zero_bubble_v, 2),
}


def make(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """Make the schedule of this name, or read it from the file of this name, and check it.

    Raises:
        UserError: there is no such schedule or file, it has an error, or these numbers do not fit.
    """
    for noun, number in (("ranks", ranks), ("micro-batches", microbatches), ("chunks", chunks)):
        if number is not None and number < 1:
            raise UserError(f"a pipeline cannot have {number} {noun}; give 1 or more")
    if name not in SCHEDULES:
        schedule = load(name, list(SCHEDULES))
        check(schedule)
        check_fits(schedule, ranks, microbatches, chunks)
        return schedule
    kind = SCHEDULES[name]
    if chunks is not None and kind.chunks not in (None, chunks):
        raise UserError(
            f"schedule {name} has {kind.chunks} stage{'s' if kind.chunks != 1 else ''} a rank, not "
            f'{chunks} (chunks=); leave it out, or give schedule="interleaved"'
        )
    chunks_if_chosen = [chunks or 2] if kind.chunks is None else []
    schedule = kind.make(ranks, microbatches, *chunks_if_chosen)
    check(schedule)
    return schedule


def placement(name: str, ranks: int, chunks: int | None = None) -> dict[int, int]:
    """stage -> rank. Raises like `make`."""
    return example(name, ranks, chunks).rank_of


def example(name: str, ranks: int, chunks: int | None = None) -> Schedule:
    """The schedule for some number of micro-batches. The ranks of its stages, and whether it splits
    the backward, do not depend on that number. Raises like `make`.
    """
    microbatches = ranks if name in SCHEDULES else load(name, list(SCHEDULES)).microbatches
    return make(name, ranks, microbatches, chunks)
