"""Bytes of tensor storage alive on this rank, and their peak.

Not the process's resident memory, which also holds the interpreter, the libraries and whatever the
allocator keeps for later: a number to compare with a formula must count tensors and nothing else.
Every operation passes through a dispatch mode; a storage counts from the operation that made it to
the moment its last reference goes, autograd's own references included. Costs some microseconds an
operation, so a run measures its first two steps (the second has the optimizer's state) and not
more.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts while entered. `held` are the tensors that are alive already.

    Attributes:
        live, peak: bytes.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.finalize[Any, Any]] = {}  # by the storage's address
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:  # views and in-place results share what is counted already
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            self._seen[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self._seen[key]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What is alive between two steps: parameters, buffers, gradients, optimizer state."""
    for parameter in model.parameters():
        yield parameter.detach()
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
