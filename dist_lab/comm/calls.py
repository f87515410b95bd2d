"""How every collective runs: we check it across ranks, count it, start it, and wait for it."""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.by_hand.algorithms import STEPS, Steps, Work
from dist_lab.comm.by_hand.costs import ALGORITHMS
from dist_lab.comm.by_hand.messages import Messages
from dist_lab.comm.check import order_check, start_first
from dist_lab.comm.choice import check_algorithm, choose
from dist_lab.comm.ledger import Call, backend_bytes
from dist_lab.comm.shared.collectives import Moves
from dist_lab.comm.shared.memory import SharedWindow
from dist_lab.errors import CollectiveError
from dist_lab.mesh.mesh import Axis

BY_BACKEND: dict[str, Callable[..., dist.Work | None]] = {
    "all_reduce": dist.all_reduce,
    "all_gather": dist.all_gather_single,
    "reduce_scatter": dist.reduce_scatter_single,
    "all_to_all": dist.all_to_all_single,
    "broadcast": dist.broadcast,
}


class Pending:
    """A collective in flight. `wait()` blocks until its result may be read, and returns it.

    Args:
        steps: the works to wait for, step by step. In a collective by hand, taking the next step
            from this iterable posts its messages.
    """

    def __init__(
        self,
        result: Tensor,
        steps: Iterable[Sequence[Work]] = (),
        call: Call | None = None,
        axis: Axis | None = None,
    ) -> None:
        self._result, self._steps, self._call, self._axis = result, steps, call, axis
        self._then: list[Callable[[Tensor], Tensor]] = []
        self._failure: CollectiveError | None = None

    def wait(self) -> Tensor:
        """Raises CollectiveError, naming rank, call and line, if a peer died or did not arrive."""
        if self._failure is not None:
            raise self._failure
        if self._call is not None and self._axis is not None:
            try:
                wait_for(self._steps, self._call, self._axis)
            except CollectiveError as error:
                self._failure = error
                raise
            self._call, self._steps = None, ()  # a second wait() neither blocks nor counts
        while self._then:
            self._result = self._then.pop(0)(self._result)
        return self._result

    def then(self, make: Callable[[Tensor], Tensor]) -> "Pending":
        """Make `wait()` return make(result), and drop the reference to the result."""
        self._then.append(make)
        return self


class Spec(NamedTuple):
    """A collective as its caller asks for it, before an algorithm is chosen.

    Attributes:
        x: this rank's input. All ranks must agree on its dtype and shape.
        detail: other arguments that all ranks must agree on.
        source: the position that a broadcast starts from.
    """

    op: str
    axis: Axis
    x: Tensor
    detail: str = ""
    source: int = 0

    @property
    def length(self) -> int:
        """Elements of the payload, as defined in `ledger`."""
        return self.x.numel() * (self.axis.size if self.op == "all_gather" else 1)

    @property
    def payload(self) -> int:
        return self.length * self.x.element_size()

    def due(self, algorithm: str) -> int:
        """Bytes that this rank sends under an algorithm, by formula."""
        n, comm = self.axis.size, self.axis.comm
        position = (self.axis.index - self.source) % n
        if algorithm == "backend":
            return backend_bytes(self.op, n, position, self.payload, comm.backend)
        sent = ALGORITHMS[self.op][algorithm].sent(n, position, self.length)
        return sent * self.x.element_size()

    def call(self, algorithm: str, due: int) -> Call:
        """Returns the collective's entry for the ledger, with its number."""
        about = ", ".join(filter(None, [describe(self.x), self.detail]))
        axis = self.axis
        return axis.comm.call(self.op, axis.name, axis.size, about, self.payload, due, algorithm)


def start(
    spec: Spec,
    out: Tensor,
    algorithm: str | None,
    by_hand: Sequence[Any],
    by_backend: Sequence[Any],
) -> Pending:
    """Choose an algorithm and launch the collective with it.

    Args:
        out: the result.
        algorithm: the algorithm for this call; None for the axis's or the mesh's setting.
        by_hand, by_backend: arguments for an algorithm by hand, and for the backend's function.
    """
    op, axis, comm = spec.op, spec.axis, spec.axis.comm
    if out.is_meta:  # only its shape is asked for
        return Pending(out)
    if algorithm is not None:
        check_algorithm(op, algorithm, comm.backend)
    sums_in_pairs = axis.pairwise and "pairwise" in ALGORITHMS[op]
    setting = algorithm or ("pairwise" if sums_in_pairs else comm.collectives)
    chosen = choose(op, setting, spec.payload, comm.backend)
    call = spec.call(chosen, spec.due(chosen))

    def steps() -> Steps:
        if chosen != "backend":
            post = Messages(call, axis, comm.tag(f"{axis.name}/{axis.channel}"), out)
            yield from STEPS[op][chosen](post, *by_hand)
        # In a dry run an algorithm by hand allocates its memory and counts its bytes, but receives
        # nothing. So we also call the fake backend, whose result is as if all ranks had the values
        # of this one. Checks that compare ranks then pass.
        if chosen == "backend" or comm.dry_run:
            work = BY_BACKEND[op](*by_backend, group=axis.group, async_op=True)
            yield [work] if work is not None else []

    return _launch(call, axis, steps(), out)


def start_uneven(
    out: Tensor, x: Tensor, axis: Axis, out_lengths: Sequence[int], lengths: Sequence[int]
) -> Pending:
    """Launch an all_to_all of parts of unequal lengths, which other ranks need not know."""
    sent = (x.numel() - lengths[axis.index]) * x.element_size()
    dtype = str(x.dtype).removeprefix("torch.")
    about = f"{dtype}, unequal parts"
    call = axis.comm.call("all_to_all", axis.name, axis.size, about, x.nbytes, sent)

    def steps() -> Steps:
        work = dist.all_to_all_single(
            out, x, list(out_lengths), list(lengths), group=axis.group, async_op=True
        )
        yield [work] if work is not None else []

    return _launch(call, axis, steps(), out)


def start_shared(spec: Spec, out: Tensor, due: int, window: SharedWindow, moves: Moves) -> Pending:
    """Launch a collective of shared/collectives.py, on memory that all ranks map."""
    call = spec.call("shared", due)

    def steps() -> Steps:
        spec.axis.comm.ledger.add_sent(call, (yield from moves))

    window.call = call
    return _launch(call, spec.axis, steps(), out)


def _launch(call: Call, axis: Axis, steps: Steps, out: Tensor) -> Pending:
    """Write the call to the board, check its order, count it, and start its first step."""
    call.group = axis.ranks, axis.channel
    check: Iterable[Sequence[Work]] = order_check(call, axis)
    if axis.channel == 0:  # on others, ranks may call at very different times: wait() checks
        _wait_for_steps(check, call, axis)
        check = []
    axis.comm.ledger.enter(call)
    try:
        return Pending(out, chain(check, start_first(steps)), call, axis)
    except RuntimeError as error:
        raise axis.comm.failure(call, error) from error


def wait_for(steps: Iterable[Sequence[Work]], call: Call, axis: Axis) -> None:
    """Wait for all steps, and add the time to the call's `blocked`."""
    began, board = time.perf_counter(), axis.comm.board
    if board is not None:
        board.wait_begins(call.number)
    _wait_for_steps(steps, call, axis)
    if board is not None:
        board.wait_ends(call.number)
    axis.comm.ledger.add_blocked(call, began, time.perf_counter())


def _wait_for_steps(steps: Iterable[Sequence[Work]], call: Call, axis: Axis) -> None:
    """Wait for one step after another. Adds the call to an error of the transport."""
    try:
        for works in steps:
            for work in works:
                work.wait()
    except CollectiveError:
        raise
    except RuntimeError as error:
        raise axis.comm.failure(call, error) from error


def describe(x: Tensor) -> str:
    """Returns the dtype and shape as text: float32[2, 3]."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
