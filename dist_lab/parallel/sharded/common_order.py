"""The order in which units are gathered, which all ranks must have in common.

    ranks that use       a b c        a c        what each takes part in        a b c
                                                 the second lets b go at once

Collectives have no names on the network: if one rank gathered b while another gathered c, each
would take the other's bytes for its own. Models whose ranks differ are nothing odd: experts that a
rank has no tokens for, layers that are skipped, outputs that need no gradient. So in a forward of
the model units have turns, and every rank takes part in every turn.

The first forward learns the turns: before each gather the ranks tell each other which unit they
want, and all that are wanted have a turn. If all ranks have wanted the same, that is the order of
later forwards, and nothing more is said than that a forward is over. A rank that wants something
else comes to the end of the order first, and asks there; others answer as long as anyone asks.

At the end of a forward the ranks also tell each other where their backwards may come. So backward
has turns as well, of what some rank's outputs need a gradient for, the last to be left first, which
is the order of autograd. A turn that does not come on a rank, as its loss has no use for what the
unit put out, is taken all the same, when a later one comes or the backward is over. The ranks have
names in common and not who called whom, so the order of turns is a guess where a unit was called in
one that does not hold it. What its rank has left earlier in forward than the unit that backward has
come to is still to come: when it is gathered out of order, it is kept.

Where a rank has more to tell at the end of a forward, because it has not kept to the order, or has
written to a parameter, all tell each other what they have used and what they have written.

Cost per forward: one all_reduce of two numbers for each unit and two more, how many ranks say yes
to each. It is summed in shared memory where there is some, as a message wakes every rank.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from weakref import ReferenceType, ref

import torch

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.protocol import ROOT

Turn = Callable[[str], None]


class CommonOrder:
    """The turns of the forwards of one model.

    Args:
        units: all there are, in one order on every rank.
        gather, skip: take a unit's turn to use it, and to let the others use it.

    Attributes:
        ballot: what the ranks tell each other: a number for each unit and question.
        order: of the units in a forward, as far as the ranks have it in common.
        ahead: turns of this forward that are to come.
        backward: turns of the backward to come, each with whether this rank's may come there.
        returning: turns of the last forward to which the backward of some rank will come.
        torn: a parameter to which the ranks have written different values.
    """

    def __init__(self, units: Sequence[str], axis: Axis, gather: Turn, skip: Turn) -> None:
        self.units, self.axis, self.gather, self.skip = list(units), axis, gather, skip
        self.ballot = ops.shared_buffer(2 * len(units) + 2, torch.float32, axis)
        self.order: list[str] = []
        self.upcoming: list[str] = []
        self.backward: list[tuple[str, bool]] = []
        self.returning: list[str] = []
        self.conflict: str | None = None
        self.is_open = False
        self._wanted: list[str] = []  # in this forward, by this rank
        self._turns: list[str] = []  # of this forward
        self._returns: set[str] = set()  # units that this rank's backward will come to
        # Each forward since the last backward, if this rank's backward may come to it.
        self._forwards: list[ReferenceType[object] | None] = []
        self._newest = 0  # turns in `backward` of the last forward
        self._more = False  # some rank has more to tell than was in the ballot
        self._clock = itertools.count()
        self._left: dict[str, list[int]] = {}  # when forwards left units that backward will come to

    def begin(self) -> None:
        """A forward begins."""
        self.is_open, self.upcoming = True, list(self.order)
        self._wanted, self._turns, self._returns = [], [], set()
        if not any(visit is not None and visit() is not None for visit in self._forwards):
            self._left = {}
        self._forwards.append(None)

    def use(self, unit: str) -> None:
        """Gather a unit, when its turn has come."""
        self._wanted.append(unit)
        if unit in self.upcoming:
            while (turn := self.upcoming.pop(0)) != unit:
                self._take(turn, self.skip)
            self._take(unit, self.gather)
        elif not self.is_open or self.axis.size == 1:  # a unit called by itself
            self._take(unit, self.gather)
        else:
            self._take_all()
            for turn in self._ask(unit):
                self._take(turn, self.gather if turn == unit else self.skip)

    def leave(self, unit: str) -> None:
        """A forward of this rank leaves the unit."""
        if unit in self._returns:
            self._left.setdefault(unit, []).append(next(self._clock))

    def returns_to(self, unit: str, visit: object) -> None:
        """A backward of this rank may come to the unit, as long as the visit lives."""
        self._returns.add(unit)
        if unit == ROOT:
            self._forwards[-1:] = [ref(visit)]

    def end(self, written: Mapping[str, int]) -> None:
        """This rank is through. On return all ranks are.

        Args:
            written: parameters that this rank has written to, each with a digest of what it is.
        """
        if not self.is_open:
            return
        self.is_open = False
        self._take_all()
        if self.axis.size == 1:
            self.order = self._wanted
            self._plan_backward(self._returns, older=self._older())
            return
        while turns := self._ask(None, tells=bool(written)):
            for turn in turns:
                self._take(turn, self.skip)
        if self._more:
            self._learn(written)

    def refuse_conflict(self) -> None:
        """Raise UserError on every rank if they have written different values."""
        conflict, self.conflict = self.conflict, None
        if conflict is not None:
            raise UserError(
                f"the forward writes to {conflict} by .data, and not the same on every rank, as rows "
                "differ by rank; write what does not depend on rows, or write after the step"
            )

    def break_off(self) -> None:
        """An exception has ended the step."""
        self.is_open, self.upcoming = False, []
        self.backward_ends()

    def backward_ends(self) -> None:
        self.backward, self._forwards, self._newest = [], [], 0
        self._left = {}

    def turns_before(self, unit: str | None) -> Iterator[tuple[str, bool]]:
        """Take out of `backward` the turns before this unit's, and then that; None: all there are.

        Yields each, and whether this rank's backward is still to come there. A unit that has no
        turn, as when backward comes to it a second time, has none before it.
        """
        times = self._left.get(unit or ROOT)
        now = times.pop() if times else -1  # when forward has left what backward has come to
        found = (i for i, turn in enumerate(self.backward) if turn == (unit, True))
        here = len(self.backward) if unit is None else next(found, -1)
        for _ in range(here):  # one after another, so that `backward` always begins with the next
            turn, is_mine = self.backward.pop(0)
            is_to_come = is_mine and any(time < now for time in self._left.get(turn, ())[-1:])
            yield turn, is_to_come and not self.has_backward_turn(turn)
        if unit is not None and here >= 0:
            self.backward.pop(0)

    def has_backward_turn(self, unit: str) -> bool:
        """Whether backward has turns of the unit to come, on this rank or another."""
        return any(turn == unit for turn, _ in self.backward)

    def _take(self, unit: str, turn: Turn) -> None:
        self._turns.append(unit)
        turn(unit)

    def _take_all(self) -> None:
        """Take part in all turns that are to come."""
        while self.upcoming:
            self._take(self.upcoming.pop(0), self.skip)

    def _ask(self, unit: str | None, *, tells: bool = False) -> list[str]:
        """The units that ranks want, where this one wants a unit, or is through.

        Args:
            tells: whether this one has more to tell.
        """
        wants = [each == unit for each in self.units]
        returns = [each in self._returns for each in self.units]
        more = tells or (unit is None and self._wanted != self.order)
        votes = torch.tensor([*wants, *returns, self._older(), more], dtype=torch.float32)
        with self.axis.comm.label("order", unit=""):
            ops.wait_for_readers(self.ballot, self.axis)
            self.ballot.copy_(votes)
            votes_for = ops.all_reduce_into(self.ballot, self.axis).wait().tolist()
        n = len(self.units)
        turns, returning = (
            [u for u, yes in zip(self.units, votes_for[i * n : (i + 1) * n], strict=True) if yes]
            for i in range(2)
        )
        if not turns:
            self._plan_backward(set(returning), older=bool(votes_for[-2]))
            self._more = bool(votes_for[-1])
        return turns

    def _older(self) -> bool:
        """Whether backward may come to a forward before the last two, of which one is just over."""
        return any(visit is not None and visit() is not None for visit in self._forwards[:-2])

    def _plan_backward(self, returning: set[str], *, older: bool) -> None:
        """All ranks are through.

        Args:
            returning: units that the backward of some rank may come to.
            older: some rank's may also come to earlier forwards than the last. A loop that forgot
                its no_grad leaves none, and the last output alone is still held.
        """
        if not older:
            self.backward, self._forwards = self.backward[: self._newest], self._forwards[-2:]
        self.returning = [unit for unit in self._turns if unit in returning]
        # A backward begins with the model itself.
        back = reversed(_as_left([unit for unit in self.returning if unit != ROOT]))
        planned = [(unit, unit in self._returns) for unit in back]
        self.backward, self._newest = planned + self.backward, len(planned)

    def _learn(self, written: Mapping[str, int]) -> None:
        """Some rank has more to tell. If all have wanted the same, that is the order now."""
        place = {unit: i for i, unit in enumerate(self.units)}
        mine = json.dumps([[place[unit] for unit in self._wanted], written])
        with self.axis.comm.label("order", unit=""):
            everybody = [json.loads(b) for b in ops.all_gather_bytes(mine.encode(), self.axis)]
        if all(wanted == everybody[0][0] for wanted, _ in everybody):
            self.order = self._wanted
        names = {name: None for _, writes in everybody for name in writes}
        self.conflict = next((n for n in names if len({w.get(n) for _, w in everybody}) > 1), None)


def _as_left(entered: Sequence[str]) -> list[str]:
    """Units in the order in which forward leaves them, from that in which it enters them.

    >>> _as_left(["a", "a.x", "a.y", "b"])
    ['a.x', 'a.y', 'a', 'b']
    """
    left: list[str] = []
    inside: list[str] = []
    for unit in entered:
        while inside and not unit.startswith(inside[-1] + "."):
            left.append(inside.pop())
        inside.append(unit)
    return left + inside[::-1]
