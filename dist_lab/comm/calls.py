"""The path of every collective: it is named, compared, counted, started and waited for."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.by_hand.algorithms import STEPS, Steps, Work
from dist_lab.comm.by_hand.costs import ALGORITHMS
from dist_lab.comm.by_hand.messages import Messages
from dist_lab.comm.choice import check_algorithm, choose
from dist_lab.comm.context import CollectiveError, CollectiveMismatch
from dist_lab.comm.ledger import Call, backend_bytes
from dist_lab.comm.shared.collectives import Moves
from dist_lab.comm.shared.memory import SharedWindow
from dist_lab.mesh.mesh import Axis

BY_BACKEND: dict[str, Callable[..., dist.Work | None]] = {
    "all_reduce": dist.all_reduce,
    "all_gather": dist.all_gather_single,
    "reduce_scatter": dist.reduce_scatter_single,
    "all_to_all": dist.all_to_all_single,
    "broadcast": dist.broadcast,
}


class Pending:
    """A collective on its way. `wait()` blocks until its result may be read, and returns it.

    Args:
        steps: what to wait for, one step after another. Of a collective by hand, going on to the
            next step posts its messages.
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
        """Let `wait()` return make(result); the result itself is released."""
        self._then.append(make)
        return self


class Spec(NamedTuple):
    """A collective as its caller asks for it, before it is decided who carries it.

    Attributes:
        given: what this rank gives; the ranks must agree on its dtype and shape.
        detail: what else they must agree on.
        source: the position at which a broadcast starts.
    """

    op: str
    axis: Axis
    given: Tensor
    detail: str = ""
    source: int = 0

    @property
    def length(self) -> int:
        """Elements of the payload, the tensor that the collective is about: see `ledger`."""
        return self.given.numel() * (self.axis.size if self.op == "all_gather" else 1)

    @property
    def payload(self) -> int:
        return self.length * self.given.element_size()

    def due(self, algorithm: str) -> int:
        """Bytes that an algorithm makes this rank send."""
        n, comm = self.axis.size, self.axis.comm
        position = (self.axis.index - self.source) % n
        if algorithm == "backend":
            return backend_bytes(self.op, n, position, self.payload, comm.backend)
        sent = ALGORITHMS[self.op][algorithm].sent(n, position, self.length)
        return sent * self.given.element_size()

    def call(self, algorithm: str, due: int) -> Call:
        """Give the collective its number and its entry for the ledger."""
        about = ", ".join(filter(None, [describe(self.given), self.detail]))
        axis = self.axis
        return axis.comm.call(self.op, axis.name, axis.size, about, self.payload, due, algorithm)


def start(
    spec: Spec,
    out: Tensor,
    algorithm: str | None,
    by_hand: Sequence[Any],
    by_backend: Sequence[Any],
) -> Pending:
    """Begin a collective by the algorithm that is chosen for it.

    Args:
        out: the result.
        algorithm: for this call alone; None: the setting of the mesh.
        by_hand, by_backend: arguments of the algorithm by hand, and of the backend's.
    """
    op, axis, comm = spec.op, spec.axis, spec.axis.comm
    if algorithm is not None:
        check_algorithm(op, algorithm, comm.backend)
    chosen = choose(op, algorithm or comm.collectives, spec.payload, comm.backend)
    call = spec.call(chosen, spec.due(chosen))

    def steps() -> Steps:
        if chosen != "backend":
            post = Messages(call, axis, comm.tag(f"{axis.name}/{axis.channel}"))
            yield from STEPS[op][chosen](post, *by_hand)
        # On a pretended mesh an algorithm takes its memory and counts its bytes, but hears nothing.
        # The fake backend then answers as if all ranks were like this one, as comparisons need.
        if chosen == "backend" or comm.dry_run:
            work = BY_BACKEND[op](*by_backend, group=axis.group, async_op=True)
            yield [work] if work is not None else []

    return _launched(call, axis, steps(), out)


def start_shared(spec: Spec, out: Tensor, due: int, window: SharedWindow, moves: Moves) -> Pending:
    """Begin a collective on memory that all ranks map, one of shared/collectives.py."""
    call = spec.call("shared", due)

    def steps() -> Steps:
        spec.axis.comm.ledger.handed_over(call, (yield from moves))

    window.call = call
    return _launched(call, spec.axis, steps(), out)


def _launched(call: Call, axis: Axis, steps: Steps, out: Tensor) -> Pending:
    """Compare the call with the other ranks' if asked to, count it, and take its first step."""
    check: Iterable[Sequence[Work]] = []
    if axis.comm.check:
        check = _begun(_compare(call, axis))
        if axis.channel == 0:  # on others a rank may call much later, and is not waited for here
            _go_through(check, call, axis)
            check = []
    axis.comm.ledger.enter(call)
    try:
        return Pending(out, chain(check, _begun(steps)), call, axis)
    except RuntimeError as error:
        raise axis.comm.failure(call, error) from error


def wait_for(steps: Iterable[Sequence[Work]], call: Call, axis: Axis) -> None:
    """Go through the steps, and charge the time to the call."""
    began = time.perf_counter()
    _go_through(steps, call, axis)
    axis.comm.ledger.waited(call, time.perf_counter() - began)


def _go_through(steps: Iterable[Sequence[Work]], call: Call, axis: Axis) -> None:
    """Wait for one step after another; an error of the transport gets the name of the call."""
    try:
        for works in steps:
            for work in works:
                work.wait()
    except CollectiveMismatch:
        raise
    except RuntimeError as error:
        raise axis.comm.failure(call, error) from error


def _begun(steps: Iterator[Sequence[Work]]) -> Iterable[Sequence[Work]]:
    """The same steps, after the first has posted its messages."""
    return chain([next(steps, ())], steps)


def _compare(call: Call, axis: Axis) -> Steps:
    """Check that all ranks of the axis are about to call the same collective.

    [Note: the order check] Collectives have no names on the network: ranks that call different
    ones hang, or read each other's bytes as something else. With `check` every rank first sends a
    description of fixed length; that is the same collective, whatever the ranks are about to call.
    If a rank calls nothing at all, the others still time out, with the line that waited.
    """
    width = 256
    how = "" if call.algorithm == "backend" else f" by {call.algorithm}"
    mine = f"{call.op}({call.about}){how} at {call.where}, phase {call.phase}, {call.unit}"
    text = bytearray(mine.encode()[:width].ljust(width))
    row = torch.frombuffer(text, dtype=torch.uint8).to(axis.device)
    rows = row.new_empty(axis.size, width)
    size, comm = axis.size, axis.comm
    sent = backend_bytes("all_gather", size, axis.index, rows.nbytes, comm.backend)
    comm.ledger.enter(comm.call("all_gather", axis.name, size, "order check", rows.nbytes, sent))
    try:
        work = dist.all_gather_single(rows.view(-1), row, axis.group, async_op=True)
    except RuntimeError as error:
        raise axis.comm.failure(call, error) from error
    yield [work] if work is not None else []
    calls = [bytes(r.tolist()).decode(errors="replace").rstrip() for r in rows]
    if len({text.split(" at ")[0] for text in calls}) > 1:
        each = "; ".join(f"rank {r} calls {t}" for r, t in zip(axis.ranks, calls, strict=True))
        raise CollectiveMismatch(
            f"call #{call.number}: the ranks of {axis.name} disagree, and would have hung: {each}"
        )


def describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
