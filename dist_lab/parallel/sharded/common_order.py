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

At the end of a forward the ranks also tell each other where their backwards will come. If that is
the same on all, each goes its way. If not, backward has turns as well, the same in reverse.

Cost per forward: one all_reduce of three numbers for each unit and one more, how many ranks say yes
to each. It is summed in shared memory where there is some, as a message wakes every rank.
"""

from collections.abc import Callable, Sequence

import torch

from dist_lab.comm import ops
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
        backward: turns of the backward to come, each with whether this rank needs it.
        uneven: the ranks differ in that; otherwise each goes its way.
        returning: turns of the last forward to which the backward of some rank will come.
    """

    def __init__(self, units: Sequence[str], axis: Axis, gather: Turn, skip: Turn) -> None:
        self.units, self.axis, self.gather, self.skip = list(units), axis, gather, skip
        self.ballot = ops.shared_buffer(3 * len(units) + 1, torch.float32, axis)
        self.order: list[str] = []
        self.ahead: list[str] = []
        self.backward: list[tuple[str, bool]] = []
        self.returning: list[str] = []
        self.uneven = self.is_open = False
        self._wanted: list[str] = []  # in this forward, by this rank
        self._turns: list[str] = []  # of this forward
        self._returns: set[str] = set()  # units that this rank's backward will come to

    def begin(self) -> None:
        """A forward begins."""
        self.is_open, self.ahead = True, list(self.order)
        self._wanted, self._turns, self._returns = [], [], set()

    def use(self, unit: str) -> None:
        """Gather a unit, when its turn has come."""
        self._wanted.append(unit)
        if unit in self.ahead:
            while (turn := self.ahead.pop(0)) != unit:
                self._take(turn, self.skip)
            self._take(unit, self.gather)
        elif not self.is_open or self.axis.size == 1:  # a unit called by itself
            self._take(unit, self.gather)
        else:
            self._take_all()
            for turn in self._ask(unit):
                self._take(turn, self.gather if turn == unit else self.skip)

    def returns_to(self, unit: str) -> None:
        """A backward of this rank will come to the unit."""
        self._returns.add(unit)

    def end(self) -> None:
        """This rank is through. On return all ranks are."""
        if not self.is_open:
            return
        self.is_open = False
        self._take_all()
        if self.axis.size == 1:
            self.order = self._wanted
            self._plan_backward(self._returns, set())
            return
        while turns := self._ask(None):
            for turn in turns:
                self._take(turn, self.skip)

    def break_off(self) -> None:
        """An exception has ended the step."""
        self.is_open, self.ahead = False, []
        self.backward_ends()

    def backward_ends(self) -> None:
        self.backward, self.uneven = [], False

    def others_before(self, unit: str | None) -> list[str]:
        """Turns of backward that others have before this unit, or before the end, and this rank
        does not need.
        """
        if not self.uneven:
            return []
        found = (i for i, turn in enumerate(self.backward) if turn == (unit, True))
        here = len(self.backward) if unit is None else next(found, -1)
        before, self.backward = self.backward[: max(here, 0)], self.backward[here + 1 :]
        return [turn for turn, mine in before if not mine]

    def _take(self, unit: str, turn: Turn) -> None:
        self._turns.append(unit)
        turn(unit)

    def _take_all(self) -> None:
        """Take part in all turns that are to come."""
        while self.ahead:
            self._take(self.ahead.pop(0), self.skip)

    def _ask(self, unit: str | None) -> list[str]:
        """The units that ranks want, where this one wants a unit, or is through."""
        wants = [each == unit for each in self.units]
        returns = [each in self._returns for each in self.units]
        stays_away = [each in self._turns and each not in self._returns for each in self.units]
        differs = unit is None and self._wanted != self.order
        votes = torch.tensor([*wants, *returns, *stays_away, differs], dtype=torch.float32)
        with self.axis.wire.during("order", unit=""):
            ops.wait_for_readers(self.ballot, self.axis)
            self.ballot.copy_(votes)
            told = ops.all_reduce_into(self.ballot, self.axis).wait().tolist()
        n = len(self.units)
        turns, returning, away = (
            [u for u, yes in zip(self.units, told[i * n : (i + 1) * n], strict=True) if yes]
            for i in range(3)
        )
        if not turns:
            self._plan_backward(set(returning), set(away))
            if told[-1]:
                self._learn()
        return turns

    def _plan_backward(self, returning: set[str], away: set[str]) -> None:
        """All ranks are through.

        Args:
            returning, away: units that the backward of some rank will, and will not, come to.
        """
        self.returning = [unit for unit in self._turns if unit in returning]
        self.uneven |= bool(returning & away)
        # A backward begins with the model itself.
        back = [(u, u in self._returns) for u in reversed(self.returning) if u != ROOT]
        self.backward = back + self.backward

    def _learn(self) -> None:
        """Some rank has not kept to the order: take a new one, if all have wanted the same."""
        place = {unit: str(i) for i, unit in enumerate(self.units)}
        mine = " ".join(place[unit] for unit in self._wanted)
        with self.axis.wire.during("order", unit=""):
            everybody = ops.all_gather_bytes(mine.encode(), self.axis)
        if len(set(everybody)) == 1:
            self.order = self._wanted
