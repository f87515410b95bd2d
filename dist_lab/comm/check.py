"""Do all ranks of an axis make the same call? See [Note: the order check] in board/lanes.py.

Ranks of one machine compare fingerprints on their board, and ranks of several machines gather a
description of each call. The error is the same.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.board.board import Board, Group
from dist_lab.comm.board.lanes import Agreement, Differ, Stuck
from dist_lab.comm.board.page import WAITING
from dist_lab.comm.board.report import disagreement
from dist_lab.comm.by_hand.algorithms import Steps, Work
from dist_lab.comm.ledger import Call, backend_bytes
from dist_lab.errors import CollectiveMismatch
from dist_lab.mesh.mesh import Axis


def order_check(call: Call, axis: Axis) -> Iterable[Sequence[Work]]:
    """Write a collective that is about to start to the board. Returns what to wait for.

    Without `check` that is nothing. Raises CollectiveMismatch if a peer has made another call.
    """
    comm, board, group = axis.comm, axis.comm.board, None
    by = "" if call.algorithm == "backend" else f" by {call.algorithm}"
    if board is not None:
        group = board.group(axis)
        _enter(call, axis, board, group, f"{call.op}({call.about}){by}")
    if not comm.check:
        return []
    if board is not None and group is not None and group.is_local:
        return [[Check(call, axis, board, group.lane.agreement())]]
    return start_first(_gather(call, axis, by))


def message_check(call: Call, axis: Axis, x: Tensor, sender: int, receiver: int) -> Sequence[Work]:
    """The same for a send or a receive. Both ends must agree on its size and dtype."""
    board = axis.comm.board
    if board is None:
        return []
    group = board.messages(axis, sender, receiver)
    _enter(call, axis, board, group, f"{x.dtype} x {x.numel()}")
    if not (axis.comm.check and group.is_local):
        return []
    return [Check(call, axis, board, group.lane.agreement())]


def start_first(steps: Iterator[Sequence[Work]]) -> Iterable[Sequence[Work]]:
    """Post the messages of the first step, and return all steps to wait for."""
    return chain([next(steps, ())], steps)


# --- on one machine -------------------------------------------------------------------------------


def _enter(call: Call, axis: Axis, board: Board, group: Group, fingerprint: str) -> None:
    try:
        board.enter(call, axis.comm.step, group, fingerprint)
    except Differ as found:
        comm = axis.comm
        raise comm.mismatch(call, *disagreement(board, found.numbers, comm.size)) from None


@dataclass(frozen=True)
class Check:
    """Waits until all ranks have made this call."""

    call: Call
    axis: Axis
    board: Board
    agreement: Agreement

    def wait(self) -> None:
        """Raises CollectiveMismatch, and RuntimeError for a rank that is late or has ended."""
        self.board.page.set(WAITING, self.call.number)
        try:
            self.agreement.wait(self.axis.comm.timeout, self._fail)
        except Differ as found:
            comm = self.axis.comm
            both = disagreement(self.board, found.numbers, comm.size)
            raise comm.mismatch(self.call, *both) from None
        except Stuck as found:
            raise self._stuck(found.numbers) from None
        self.board.page.set(WAITING, 0)

    def _fail(self, pages: Sequence[int], why: str) -> None:
        numbers = ", ".join(str(self.board.ranks[i]) for i in pages)
        ranks = "ranks" if len(pages) > 1 else "rank"
        raise RuntimeError(f"{ranks} {numbers} did not call this collective: {why}")

    def _stuck(self, numbers: Mapping[int, int]) -> CollectiveMismatch:
        each, all_ranks = disagreement(self.board, dict(numbers), self.axis.comm.size)
        return CollectiveMismatch(
            f"{self.axis.comm.describe(self.call)}: ranks wait for each other in different groups, "
            f"and would hang: {each}; let all ranks make the same calls in the same order",
            all_ranks,
        )


# --- between machines -----------------------------------------------------------------------------


def _gather(call: Call, axis: Axis, by: str) -> Steps:
    """Gather a description of fixed length: the same collective on all ranks, whatever they call.

    If a rank calls nothing at all, the others time out. Their errors name their own line.
    """
    width = 256
    text = f"{call.op}({call.about}){by} at {call.where}, phase {call.phase}, {call.unit}"
    padded = bytearray(text.encode()[:width].ljust(width))
    row = torch.frombuffer(padded, dtype=torch.uint8).to(axis.device)
    rows = row.new_empty(axis.size, width)
    size, comm = axis.size, axis.comm
    sent = backend_bytes("all_gather", size, axis.index, rows.nbytes, comm.backend)
    comm.ledger.enter(comm.call("all_gather", axis.name, size, "order check", rows.nbytes, sent))
    try:
        work = dist.all_gather_single(rows.view(-1), row, axis.group, async_op=True)
    except RuntimeError as error:
        raise comm.failure(call, error) from error
    yield [work] if work is not None else []
    calls = [bytes(r.tolist()).decode(errors="replace").rstrip() for r in rows]
    if len({text.split(" at ")[0] for text in calls}) > 1:
        each = "; ".join(f"rank {r} calls {t}" for r, t in zip(axis.ranks, calls, strict=True))
        raise comm.mismatch(call, each)
