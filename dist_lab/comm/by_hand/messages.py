"""The sends and receives of a collective by hand: counted when posted, all with one tag."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.by_hand.algorithms import Work
from dist_lab.comm.ledger import Call
from dist_lab.mesh.mesh import Axis
from dist_lab.torch_private import storage_key

# Up to this many bytes, `swap` is one call of the backend's all_to_all: N-1 sends would cost more
# than the copy into one tensor. Above it, sums start while other chunks are still in flight.
SWAP_IN_ONE_CALL = 1 << 20


@dataclass(frozen=True)
class Message:
    """A send or a receive with our time limit.

    By default it waits as long as its group's limit at creation: torch's 30 minutes.
    """

    work: dist.Work
    limit: timedelta

    def wait(self) -> None:
        self.work.wait(self.limit)


class Messages:
    """The `Post` of one call on one axis.

    [Note: tags] Two collectives may be in flight at once, and later messages of the first mix with
    those of the second. So every call on an axis has its own tag, counted in the same way on all
    ranks. `exchange` has the tag 0.

    [Note: silence] In a dry run a send is counted and not sent. What is received is as if all other
    ranks had zeros to add, and then the result of this one: a receive into the result leaves it as
    it is, and one into other memory yields zeros.

    Args:
        result: the tensor that the collective returns.
    """

    def __init__(self, call: Call, axis: Axis, tag: int, result: Tensor) -> None:
        assert axis.group is not None
        self.call, self.axis, self.tag, self.group = call, axis, tag, axis.group
        self.result = result
        self.size, self.index = axis.size, axis.index
        self.limit = timedelta(seconds=axis.comm.timeout)

    # The group's own send and receive take positions on the axis. torch's isend and irecv wrap
    # them, and take global ranks.

    def send(self, x: Tensor, to: int) -> list[Work]:
        if x.numel() == 0:
            return []
        self.axis.comm.ledger.add_sent(self.call, x.nbytes)
        if self.axis.comm.dry_run:
            return []
        return [Message(self.group.send([x], to % self.size, self.tag), self.limit)]

    def receive(self, into: Tensor, source: int) -> list[Work]:
        if into.numel() == 0:
            return []
        if self.axis.comm.dry_run:
            self._stay_silent(into)
            return []
        return [Message(self.group.recv([into], source % self.size, self.tag), self.limit)]

    def swap(
        self, into: Tensor, give: Sequence[Tensor], whole: Tensor
    ) -> list[tuple[int, list[Work]]]:
        others = [(self.index - distance) % self.size for distance in range(1, self.size)]
        if self.axis.comm.dry_run:
            self.axis.comm.ledger.add_sent(self.call, sum(give[j].nbytes for j in others))
            self._stay_silent(into[: self.index])
            self._stay_silent(into[self.index + 1 :])
            return [(j, []) for j in others]
        if 0 < whole.nbytes <= SWAP_IN_ONE_CALL:
            self.axis.comm.ledger.add_sent(self.call, sum(give[j].nbytes for j in others))
            work = dist.all_to_all_single(
                into.view(-1), whole.contiguous().view(-1), [into.shape[1]] * self.size,
                [len(chunk) for chunk in give], self.group, async_op=True,
            )  # fmt: skip
            assert work is not None
            return [(j, [work] if k == 0 else []) for k, j in enumerate(others)]
        sends = [work for j in reversed(others) for work in self.send(give[j], j)]
        arrivals = [(j, self.receive(into[j], j)) for j in others]
        arrivals[-1][1].extend(sends)
        return arrivals

    def _stay_silent(self, into: Tensor) -> None:
        """What a receive does in a dry run: see [Note: silence]."""
        if storage_key(into) != storage_key(self.result):
            into.zero_()
