"""The common order in which all ranks gather units.

    rank 0 uses a b c, rank 1 uses a c      both gather a b c; rank 1 reshards b at once

Collectives have no names on the network: if one rank gathered b while another gathered c, each
would take the other's bytes for its own. But ranks often use different units: a rank has no tokens
for an expert, skips a layer, or has an output that needs no gradient. So each unit has a turn in
the forward, and every rank takes part in every turn.

The first forward learns the turns. Before each gather the ranks vote for the unit that they want,
and every unit with a vote gets a turn. If all ranks wanted the same units in one order, later
forwards have these turns, and vote only once, at the end. A rank that wants another unit takes part
in all remaining turns first, and then votes for this unit. The other ranks vote at the end of their
forwards, again and again until no rank wants a unit.

At the end of a forward the ranks also vote for the units that their backwards may reach. These
units get turns in backward, in the reverse of the order in which forward left them, like autograd.
This rank's backward may not reach a unit, if the loss does not use its output. The rank then takes
part in the unit's turn before the next turn that it uses, or after backward. A rank knows the names
of the units that others used, but not which unit called which. So the order of backward turns is a
guess if a unit was called by one that does not contain it. A turn may then come too early: for a
unit that forward left before the current one. The unit stays unsharded until backward reaches it.

A rank that has used other units, or has written to a parameter, sets a flag in the last vote of the
forward. Then all ranks exchange the units that they have used and the parameters they have written.

Cost per forward: one all_reduce of two numbers per unit and two more, each a count of votes. It
runs in shared memory where possible, because a message would wake every rank.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from weakref import ReferenceType, ref

import torch

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.sharded.unsharded import first_conflict, refuse_conflict
from dist_lab.step.protocol import ROOT

Turn = Callable[[str], None]


class CommonOrder:
    """The turns of the forwards of one model.

    Args:
        units: all units, in the same order on every rank.
        gather, skip: take a unit's turn: gather if this rank uses it, skip if only others do.

    Attributes:
        ballot: buffer of the votes: which units are wanted, and which ones backward may reach.
        order: the units of the last forward in which all ranks used the same ones in one order.
        upcoming: the remaining turns of this forward.
        backward: (unit, whether this rank's backward may reach it) for each turn of backward.
        returning: turns of the last forward that some rank's backward may reach.
        conflict: name of a parameter to which the ranks have written different values.
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
        self._wanted: list[str] = []  # units that this rank has used in this forward
        self._turns: list[str] = []  # turns taken in this forward
        self._returns: set[str] = set()  # units that this rank's backward may reach
        # One visit for each forward since the last backward; None if no backward can reach it.
        self._forwards: list[ReferenceType[object] | None] = []
        self._newest = 0  # the number of turns in `backward` that the last forward has added
        self._must_exchange = False  # some rank used other units, or wrote to a parameter
        self._clock = itertools.count()
        self._left_at: dict[str, list[int]] = {}  # unit -> when forwards left it

    def begin(self) -> None:
        """Begin a forward, with the turns of the last common order."""
        self.is_open, self.upcoming = True, list(self.order)
        self._wanted, self._turns, self._returns = [], [], set()
        if not any(visit is not None and visit() is not None for visit in self._forwards):
            self._left_at = {}
        self._forwards.append(None)

    def use(self, unit: str) -> None:
        """Take the turns before this unit's, and gather it."""
        self._wanted.append(unit)
        if unit in self.upcoming:
            while (turn := self.upcoming.pop(0)) != unit:
                self._take(turn, self.skip)
            self._take(unit, self.gather)
        elif not self.is_open or self.axis.size == 1:  # called outside the model
            self._take(unit, self.gather)
        else:
            self._take_all()
            for turn in self._vote(unit):
                self._take(turn, self.gather if turn == unit else self.skip)

    def leave(self, unit: str) -> None:
        """Note that a forward of this rank leaves the unit."""
        if unit in self._returns:
            self._left_at.setdefault(unit, []).append(next(self._clock))

    def returns_to(self, unit: str, visit: object) -> None:
        """Note that this rank's backward may reach the unit while `visit` is alive."""
        self._returns.add(unit)
        if unit == ROOT:
            self._forwards[-1:] = [ref(visit)]

    def end(self, written: Mapping[str, int]) -> None:
        """End the forward on this rank. Returns when all ranks have ended theirs.

        Args:
            written: name -> digest, of the parameters that this rank has written to.
        """
        if not self.is_open:
            return
        self.is_open = False
        self._take_all()
        if self.axis.size == 1:
            self.order = self._wanted
            self._plan_backward(self._returns, older=self._older())
            return
        while turns := self._vote(None, has_written=bool(written)):
            for turn in turns:
                self._take(turn, self.skip)
        if self._must_exchange:
            self._exchange(written)

    def refuse_conflict(self) -> None:
        """Raise UserError on every rank if the ranks have written different values."""
        name, self.conflict = self.conflict, None
        refuse_conflict(name)

    def abort(self) -> None:
        """Forget the forward and backward of a step that an exception has ended."""
        self.is_open, self.upcoming = False, []
        self.backward_ends()

    def backward_ends(self) -> None:
        self.backward, self._forwards, self._newest = [], [], 0
        self._left_at = {}

    def turns_before(self, unit: str | None) -> Iterator[tuple[str, bool]]:
        """Remove the turns before the unit's, and its own, from `backward`. None: all turns.

        Yields (unit, whether this rank's backward will use it later) for each turn before. A unit
        without a turn, such as one that backward reaches a second time, has no turns before it.
        """
        times = self._left_at.get(unit or ROOT)
        left_at = times.pop() if times else -1  # when forward left the unit
        indices = (i for i, turn in enumerate(self.backward) if turn == (unit, True))
        count = len(self.backward) if unit is None else next(indices, -1)
        for _ in range(count):  # one at a time, so that `backward` always begins with the next turn
            turn, may_reach = self.backward.pop(0)
            later = may_reach and any(time < left_at for time in self._left_at.get(turn, ())[-1:])
            yield turn, later and not self.has_backward_turn(turn)
        if unit is not None and count >= 0:
            self.backward.pop(0)

    def has_backward_turn(self, unit: str) -> bool:
        """Whether the unit has a turn in backward that is still to come."""
        return any(turn == unit for turn, _ in self.backward)

    def _take(self, unit: str, turn: Turn) -> None:
        self._turns.append(unit)
        turn(unit)

    def _take_all(self) -> None:
        """Take part in all remaining turns of this forward."""
        while self.upcoming:
            self._take(self.upcoming.pop(0), self.skip)

    def _vote(self, unit: str | None, *, has_written: bool = False) -> list[str]:
        """The units that some rank wants. Collective.

        Args:
            unit: what this rank wants; None: its forward is over.
            has_written: whether this rank has written to a parameter.
        """
        wants = [each == unit for each in self.units]
        returns = [each in self._returns for each in self.units]
        must_exchange = has_written or (unit is None and self._wanted != self.order)
        last = [self._older(), must_exchange]
        votes = torch.tensor([*wants, *returns, *last], dtype=torch.float32)
        with self.axis.comm.label("order", unit=""):
            ops.wait_for_readers(self.ballot, self.axis)
            self.ballot.copy_(votes)
            counts = ops.all_reduce_into(self.ballot, self.axis).wait().tolist()
        n = len(self.units)
        turns, returning = (
            [u for u, yes in zip(self.units, counts[i * n : (i + 1) * n], strict=True) if yes]
            for i in range(2)
        )
        if not turns:
            self._plan_backward(set(returning), older=bool(counts[-2]))
            self._must_exchange = bool(counts[-1])
        return turns

    def _older(self) -> bool:
        """Whether this rank's backward may reach a forward before the last two."""
        return any(visit is not None and visit() is not None for visit in self._forwards[:-2])

    def _plan_backward(self, returning: set[str], *, older: bool) -> None:
        """Put the turns of the backward through this forward before those of earlier forwards.

        Args:
            returning: units that some rank's backward may reach.
            older: whether some rank's backward may reach a forward before the last two. If not,
                drop the turns of such forwards: the user's loop runs forwards without no_grad, and
                keeps only the last output.
        """
        if not older:
            self.backward, self._forwards = self.backward[: self._newest], self._forwards[-2:]
        self.returning = [unit for unit in self._turns if unit in returning]
        # Without the root: it has no turn, because every backward begins with it.
        units = reversed(_sort_by_exit([unit for unit in self.returning if unit != ROOT]))
        new_turns = [(unit, unit in self._returns) for unit in units]
        self.backward, self._newest = new_turns + self.backward, len(new_turns)

    def _exchange(self, written: Mapping[str, int]) -> None:
        """Exchange the units used and the parameters written. Equal units become the order.

        Collective.
        """
        place = {unit: i for i, unit in enumerate(self.units)}
        message = json.dumps([[place[unit] for unit in self._wanted], written])
        with self.axis.comm.label("order", unit=""):
            messages = [json.loads(b) for b in ops.all_gather_bytes(message.encode(), self.axis)]
        if all(wanted == messages[0][0] for wanted, _ in messages):
            self.order = self._wanted
        self.conflict = first_conflict([written for _, written in messages])


def _sort_by_exit(entered: Sequence[str]) -> list[str]:
    """Sort units by when forward leaves them. They are given in the order in which it enters them.

    >>> _sort_by_exit(["a", "a.x", "a.y", "b"])
    ['a.x', 'a.y', 'a', 'b']
    """
    left: list[str] = []
    inside: list[str] = []
    for unit in entered:
        while inside and not unit.startswith(inside[-1] + "."):
            left.append(inside.pop())
        inside.append(unit)
    return left + inside[::-1]
