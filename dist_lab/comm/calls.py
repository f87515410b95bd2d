"""What every collective goes through: it is named, compared, counted, started and waited for."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lab.comm.algorithms import Steps, Work
from dist_lab.comm.choice import check_algorithm, choose
from dist_lab.comm.costs import ALGORITHMS
from dist_lab.comm.ledger import Call, backend_bytes
from dist_lab.comm.messages import Messages
from dist_lab.comm.shared import DONE, Until, Window
from dist_lab.comm.wire import CollectiveError, CollectiveMismatch
from dist_lab.mesh import Axis


class Pending:
    """A collective on its way. `wait()` blocks until its result may be read, and returns it.

    Args:
        steps: what is to be waited for, one step after another. Of a collective by hand, coming
            to the next step posts its messages.
        staging: where the result arrives, if not in place.
    """

    def __init__(
        self, result: Tensor, steps: Iterable[Sequence[Work]] = (), call: Call | None = None,
        axis: Axis | None = None, staging: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._result, self._steps, self._call, self._axis = result, steps, call, axis
        self._staging = staging
        self._then: Callable[[Tensor], Tensor] | None = None
        self._failure: CollectiveError | None = None

    def wait(self) -> Tensor:
        """Raises CollectiveError, naming rank, call and line, if a peer died or did not arrive."""
        if self._failure is not None:
            raise self._failure
        if self._call is not None and self._axis is not None:
            call, began = self._call, time.perf_counter()
            try:
                _go_through(self._steps, call, self._axis)
            except CollectiveError as error:
                self._failure = error
                raise
            self._axis.wire.ledger.waited(call, time.perf_counter() - began)
            if self._staging is not None:
                self._result.copy_(self._staging)
            self._call, self._steps = None, ()  # a second wait() neither blocks nor counts
        if self._then is not None:
            self._result, self._then = self._then(self._result), None
        return self._result

    def then(self, make: Callable[[Tensor], Tensor]) -> "Pending":
        """Let `wait()` return what this makes of the result, which is then let go of."""
        self._then = make
        return self


def start(
    op: str,
    axis: Axis,
    out: Tensor,
    given: Tensor,
    detail: str,
    algorithm: str | None,
    by_backend: Callable[[], dist.Work | None],
    by_hand: Callable[[Callable[..., Steps], Messages], Steps],
    *,
    payload: Tensor | None = None,
    source: int = 0,
) -> Pending:
    """Begin a collective by the algorithm that was chosen for it.

    Args:
        out, given: what the caller gets back, and what the transport reads; where the operation is
            in place and they differ, `out` is filled from `given` in the end.
        detail: what the ranks must agree on besides dtype and shape.
        algorithm: for this call alone; None: what the wire was set to.
        payload: the tensor that the collective is about; default `out`.
    """
    if axis.size == 1:
        return Pending(out)
    wire, payload = axis.wire, out if payload is None else payload
    if algorithm is not None:
        check_algorithm(op, algorithm, wire.backend)
    chosen = choose(op, algorithm or wire.collectives, payload.nbytes, wire.backend)
    position = (axis.index - source) % axis.size
    if chosen == "backend":
        due = backend_bytes(op, axis.size, position, payload.nbytes, wire.backend)
    else:
        elements = ALGORITHMS[op][chosen].sent(axis.size, position, payload.numel())
        due = elements * payload.element_size()
    about = ", ".join(filter(None, [describe(given), detail]))
    call = wire.call(op, axis.name, axis.size, about, payload.nbytes, due, chosen)

    def backends() -> Steps:
        work = by_backend()
        yield [work] if work is not None else []

    def begin() -> Iterable[Sequence[Work]]:
        if chosen == "backend":
            return _begun(backends())
        steps = by_hand(ALGORITHMS[op][chosen].steps, _messages(call, axis))
        # On a pretended mesh it takes its memory and counts its bytes, but hears nothing; the fake
        # backend then answers as if all ranks were like this one, which those who compare need.
        return _begun(chain(steps, backends()) if wire.pretended else steps)

    in_place = op in ("all_reduce", "broadcast")
    return _launched(call, axis, begin, out, given if in_place and given is not out else None)


def start_shared(
    op: str,
    axis: Axis,
    out: Tensor,
    buffer: Tensor,
    detail: str,
    window: Window,
    payload: int,
    due: int,
    steps: Callable[[Window, float, Callable[[int], None]], Steps],
) -> Pending:
    """Begin a collective on memory that all ranks see."""
    wire, about = axis.wire, ", ".join(filter(None, [describe(buffer), detail]))
    call = wire.call(op, axis.name, axis.size, about, payload, due, "shared")

    def moved(count: int) -> None:
        wire.ledger.handed_over(call, count)

    window.call = call
    return _launched(call, axis, lambda: _begun(steps(window, wire.timeout, moved)), out)


def until_all_have_read(window: Window, axis: Axis) -> None:
    """Wait until the last collective on this memory does not need it any more, on any rank.

    The wait counts as that collective's.
    """
    call: Call | None = window.call
    if call is None:
        return
    assert not window.in_use, f"{axis.wire.describe(call)} was not waited for"
    began = time.perf_counter()
    _go_through([[Until(window, DONE, window.last(), axis.wire.timeout)]], call, axis)
    axis.wire.ledger.waited(call, time.perf_counter() - began)


def _launched(
    call: Call,
    axis: Axis,
    begin: Callable[[], Iterable[Sequence[Work]]],
    out: Tensor,
    staging: Tensor | None = None,
) -> Pending:
    """Check the call if that is asked for, count it, and begin."""
    check: Iterable[Sequence[Work]] = []
    if axis.wire.check:
        check = _begun(_compare(call, axis))
        if axis.channel == 0:  # on others a rank may come much later, and must not be waited for
            _go_through(check, call, axis)
            check = []
    axis.wire.ledger.enter(call)
    try:
        return Pending(out, chain(check, begin()), call, axis, staging)
    except RuntimeError as error:
        raise axis.wire.failure(call, error) from error


def _go_through(steps: Iterable[Sequence[Work]], call: Call, axis: Axis) -> None:
    """Wait for one step after another; what the transport says gets the name of the call."""
    try:
        for works in steps:
            for work in works:
                work.wait()
    except CollectiveMismatch:
        raise
    except RuntimeError as error:
        raise axis.wire.failure(call, error) from error


def _messages(call: Call, axis: Axis) -> Messages:
    return Messages(call, axis, axis.wire.tag(f"{axis.name}/{axis.channel}"))


def _begun(steps: Iterator[Sequence[Work]]) -> Iterable[Sequence[Work]]:
    """The steps, of which the first has posted its messages."""
    return chain([next(steps, ())], steps)


def _compare(call: Call, axis: Axis) -> Steps:
    """Refuse a collective that the other ranks of the axis are not about to call as well.

    [Note: the order check] Collectives have no names on the network: ranks that call different
    ones hang, or read each other's bytes as something else. With `check` every rank first sends a
    description of fixed length, which is the same collective whatever the ranks were about to do.
    A rank that calls nothing at all is still a time-out, which names the line that waited.
    """
    width = 256
    how = "" if call.algorithm == "backend" else f" by {call.algorithm}"
    mine = f"{call.op}({call.about}){how} at {call.where}, phase {call.phase}, {call.unit}"
    text = bytearray(mine.encode()[:width].ljust(width))
    row = torch.frombuffer(text, dtype=torch.uint8).to(axis.wire.device)
    rows = row.new_empty(axis.size, width)
    size, wire = axis.size, axis.wire
    sent = backend_bytes("all_gather", size, axis.index, rows.nbytes, wire.backend)
    wire.ledger.enter(wire.call("all_gather", axis.name, size, "order check", rows.nbytes, sent))
    try:
        work = dist.all_gather_single(rows.view(-1), row, axis.group, async_op=True)
    except RuntimeError as error:
        raise axis.wire.failure(call, error) from error
    yield [work] if work is not None else []
    said = [bytes(r.tolist()).decode(errors="replace").rstrip() for r in rows]
    if len({text.split(" at ")[0] for text in said}) > 1:
        each = "; ".join(f"rank {r} calls {t}" for r, t in zip(axis.ranks, said, strict=True))
        raise CollectiveMismatch(
            f"call #{call.number}: the ranks of {axis.name} disagree, and would have hung: {each}"
        )


def describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
