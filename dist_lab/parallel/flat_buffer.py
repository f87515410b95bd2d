"""A flat buffer: tensors side by side in one memory, so that one collective sends them all.

    memory = [ a | b | c | ... | tail ]         views["b"] is a tensor on b's part of the memory

Every message costs a latency, however short it is, and a model has hundreds of small tensors.
Compute works on the views, and collectives on the memory, so nothing is packed or unpacked. A
gradient is copied in once: then `.grad` is the view, and autograd adds to it in place. Every
strategy with buckets builds on this file: `issue` launches a collective, and `wait` waits for it.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from torch import Tensor

from dist_lab.comm.ops import Pending
from dist_lab.mesh.mesh import Axis

SET_LATE = (
    "the gradient of {} was set after job.run, when its bucket had been sent without it; set it "
    "before the step's last run"
)


class FlatBuffer:
    """Tensors side by side in one memory, and the collective on it that is in flight.

    Args:
        memory: flat, with at least as many elements as the tensors have.
        shapes: name -> shape of the tensor, in the order of the tensors in memory.
        label: the name of its collectives in logs.
        offsets: name -> where the tensor begins; default: one right after the other.

    Attributes:
        views: name -> the tensor, a view of the memory.
        tail: the memory after the last tensor: flags, or padding.
    """

    def __init__(
        self, memory: Tensor, shapes: Mapping[str, Sequence[int]], label: str,
        offsets: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.label = memory, label
        self.views: dict[str, Tensor] = {}
        end = 0
        for name, shape in shapes.items():
            start = end if offsets is None else offsets[name]
            end = start + math.prod(shape)
            self.views[name] = memory[start:end].view(tuple(shape))
        self.tail = memory[end:]
        self._pending: Pending | None = None

    # --- gradients --------------------------------------------------------------------------------

    def copy_in(self, name: str, parameter: Tensor) -> None:
        """Copy `parameter.grad` into its view, which becomes `.grad`. None stays None."""
        view = self.views[name]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad.detach())
            parameter.grad = view

    def copy_in_all(self, parameters: Mapping[str, Tensor]) -> None:
        """Call `copy_in` for every parameter. Zero the view of a parameter without a gradient."""
        for name, parameter in parameters.items():
            if parameter.grad is None:
                self.views[name].zero_()
            else:
                self.copy_in(name, parameter)

    def assign_grads(self, parameters: Mapping[str, Tensor], used: Iterable[bool]) -> None:
        """Make `.grad` the view for each parameter that was used, and None for the others."""
        for (name, parameter), is_used in zip(parameters.items(), used, strict=True):
            parameter.grad = self.views[name] if is_used else None

    # --- collectives ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> bool:
        """Whether a collective was issued and has not been waited for."""
        return self._pending is not None

    def issue(self, collective: Callable[[Tensor, Axis], Pending], axis: Axis) -> None:
        """Launch `collective(memory, axis)`, and return at once."""
        with axis.comm.label(unit=self.label):
            self._pending = collective(self.memory, axis)

    def wait(self) -> None:
        """Wait for the collective that was issued."""
        assert self._pending is not None, self.label
        self._pending.wait()
        self._pending = None  # a Pending keeps its inputs alive


class Arrivals:
    """Tracks which gradients of a bucket are complete: this step adds nothing more to them."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.ready: set[str] = set()
        self.frozen: set[str] = set()  # frozen since parallelize(): they get no gradient

    def look_for_frozen(self) -> None:
        """Note which parameters are frozen now, when a forward or backward begins."""
        self.frozen = {name for name, p in self.parameters.items() if not p.requires_grad}

    @property
    def complete(self) -> bool:
        """Whether the gradients of all parameters that are not frozen are complete."""
        return len(self.ready | self.frozen) == len(self.parameters)


def group_into_buckets(
    sizes: Iterable[tuple[str, Hashable, int]], first: int, limit: int
) -> list[list[str]]:
    """Group names, in the order in which their gradients arrive, into buckets of one kind each.

    Args:
        sizes: (name, kind, bytes). The kind is the dtype and, in a pipeline, the stages.
        first, limit: the largest size, in bytes, of the first bucket and of each other bucket.

    >>> f = "float32"
    >>> sizes = [("head", f, 6), ("b", f, 1), ("c", f, 2), ("d", f, 2), ("e", f, 1)]
    >>> group_into_buckets(sizes, 4, 5)
    [['head'], ['b', 'c', 'd'], ['e']]
    """
    buckets: list[list[str]] = []
    open_buckets: dict[Hashable, tuple[list[str], int]] = {}  # being filled, and their bytes
    for name, kind, size in sizes:
        bucket, filled = open_buckets.get(kind, ([], 0))
        max_bytes = first if buckets and bucket is buckets[0] else limit
        if not bucket or filled + size > max_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(name)
        open_buckets[kind] = bucket, filled + size
    return buckets


def bucket_label(index: int, names: Sequence[str]) -> str:
    """The name of a bucket in logs.

    >>> bucket_label(1, ["a", "b", "c"]), bucket_label(2, ["d"])
    ('bucket 1: a .. c (3)', 'bucket 2: d')
    """
    more = f" .. {names[-1]} ({len(names)})" if len(names) > 1 else ""
    return f"bucket {index}: {names[0]}{more}"
