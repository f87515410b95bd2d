"""A flat buffer: tensors side by side in one piece of memory, so that they travel as one message.

    memory = [ a | b | c | ... | tail ]         views["b"] is a tensor on its part of the memory

A message costs a latency, however short it is, and a model has hundreds of small tensors. Whoever
computes works on the views; whoever sends takes the memory; nothing is packed or unpacked between.
Gradients get there by being copied once: `.grad` becomes the view, and autograd adds to it in
place from then on. Every strategy with buckets stands on this file, and says `issue` and `wait`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dist_lab.comm.ops import Pending
from dist_lab.mesh.mesh import Axis


class FlatBuffer:
    """Tensors side by side in one piece of memory, and the collective on it that is in flight.

    Args:
        memory: flat, with at least as many elements as the tensors have.
        shapes: name -> the shape of its tensor, in the order in which they lie.
        label: what its collectives are called in logs.

    Attributes:
        views: name -> the tensor.
        tail: the memory behind the last tensor: flags, or padding.
    """

    def __init__(self, memory: Tensor, shapes: Mapping[str, Sequence[int]], label: str) -> None:
        self.memory, self.label = memory, label
        lengths = [math.prod(shape) for shape in shapes.values()]
        *parts, self.tail = memory.split([*lengths, memory.numel() - sum(lengths)])
        self.views = {
            name: part.view(tuple(shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        self._pending: Pending | None = None

    # --- gradients --------------------------------------------------------------------------------

    def copy_in(self, name: str, parameter: Tensor) -> None:
        """Make `parameter.grad` its view; None stays None."""
        view = self.views[name]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad.detach())
            parameter.grad = view

    def copy_in_all(self, parameters: Mapping[str, Tensor]) -> None:
        """Make every `.grad` its view, and what has none zeros, in place of an earlier step's."""
        for name, parameter in parameters.items():
            if parameter.grad is None:
                self.views[name].zero_()
            else:
                self.copy_in(name, parameter)

    def assign_grads(self, parameters: Mapping[str, Tensor], used: Iterable[bool]) -> None:
        """Make `.grad` the view of each parameter that was used, and None of the others."""
        for (name, parameter), yes in zip(parameters.items(), used, strict=True):
            parameter.grad = self.views[name] if yes else None

    # --- collectives ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> bool:
        """Whether a collective was issued and has not been waited for."""
        return self._pending is not None

    def issue(self, collective: Callable[[Tensor, Axis], Pending], axis: Axis) -> None:
        """Begin `collective(memory, axis)`, and return at once."""
        with axis.comm.label(unit=self.label):
            self._pending = collective(self.memory, axis)

    def wait(self) -> None:
        """Wait for the collective that was issued."""
        assert self._pending is not None, self.label
        self._pending.wait()
        self._pending = None  # or it would keep alive what it has read from


class Arrivals:
    """The gradients of a bucket that are complete: nothing will be added to them in this step."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.ready: set[str] = set()
        self.frozen: set[str] = set()  # since parallelize(): they will not come

    def look_for_frozen(self) -> None:
        """A forward or backward begins."""
        self.frozen = {name for name, p in self.parameters.items() if not p.requires_grad}

    @property
    def complete(self) -> bool:
        """Whether all are in that can come."""
        return len(self.ready | self.frozen) == len(self.parameters)


def group_into_buckets(
    sizes: Iterable[tuple[str, torch.dtype, int]], first: int, limit: int
) -> list[list[str]]:
    """Cut names, in the order in which their gradients arrive, into buckets of one dtype each.

    Args:
        sizes: (name, dtype, bytes).
        first, limit: bytes that the first bucket, and any other, may hold.

    >>> f = torch.float32
    >>> sizes = [("head", f, 6), ("b", f, 1), ("c", f, 2), ("d", f, 2), ("e", f, 1)]
    >>> group_into_buckets(sizes, 4, 5)
    [['head'], ['b', 'c', 'd'], ['e']]
    """
    buckets: list[list[str]] = []
    open_now: dict[torch.dtype, tuple[list[str], int]] = {}  # the bucket to fill, and its bytes
    for name, dtype, size in sizes:
        bucket, filled = open_now.get(dtype, ([], 0))
        most = first if buckets and bucket is buckets[0] else limit
        if not bucket or filled + size > most:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(name)
        open_now[dtype] = bucket, filled + size
    return buckets


def bucket_label(index: int, names: Sequence[str]) -> str:
    """What a bucket is called in logs.

    >>> bucket_label(1, ["a", "b", "c"]), bucket_label(2, ["d"])
    ('bucket 1: a .. c (3)', 'bucket 2: d')
    """
    more = f" .. {names[-1]} ({len(names)})" if len(names) > 1 else ""
    return f"bucket {index}: {names[0]}{more}"
