"""`Tensors` is the form that all formats share: named tensors, read one at a time.

A checkpoint of ours is one (dist_lab/checkpoint/reader.py), a state dict becomes one by `InMemory`,
and each format's `open_...` returns one. So an export takes any of them, and needs the memory of
one tensor, or of one output file. Names are those of the model, as in `model.state_dict()`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_lab.errors import UserError

Kind = tuple[tuple[int, ...], torch.dtype]  # the shape and the dtype of a tensor
Kinds = Mapping[str, Kind]


class Tensors(Protocol):
    """Named tensors. `names` reads no tensor; `read` reads one, whole, in CPU memory."""

    def names(self) -> Kinds: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class InMemory:
    """The tensors of a state dict, such as `job.full_state_dict()`.

    `left_out`: the names of what lay beside it in a file.
    """

    tensors: Mapping[str, Tensor]
    left_out: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{name} is a {type(value).__name__}, and only tensors can be exported; leave "
                    "it out"
                )

    def names(self) -> Kinds:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach().cpu()


@dataclass(frozen=True)
class Under:
    """The tensors of `source` whose names begin with `prefix`, under the rest of their names."""

    source: Tensors
    prefix: str

    def names(self) -> Kinds:
        start = len(self.prefix)
        return {
            name[start:]: kind
            for name, kind in self.source.names().items()
            if name.startswith(self.prefix)
        }

    def read(self, name: str) -> Tensor:
        return self.source.read(self.prefix + name)


@dataclass(frozen=True)
class Renamed:
    """The tensors of `source` under other names, which may be several names for one tensor.

    `sources`: new name -> name in `source`.
    """

    source: Tensors
    sources: Mapping[str, str]

    def names(self) -> Kinds:
        kinds = self.source.names()
        return {name: kinds[original] for name, original in self.sources.items()}

    def read(self, name: str) -> Tensor:
        return self.source.read(self.sources[name])


@dataclass(frozen=True)
class Converted:
    """The tensors of `source`, with floating-point numbers of another dtype."""

    source: Tensors
    dtype: torch.dtype

    def names(self) -> Kinds:
        return {
            name: (shape, self.dtype if dtype.is_floating_point else dtype)
            for name, (shape, dtype) in self.source.names().items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def prefixed(source: Tensors, prefix: str) -> Renamed:
    """The tensors of `source`, with `prefix` before each name."""
    return Renamed(source, {prefix + name: name for name in source.names()})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits, NaN included.

    >>> nan = torch.tensor(float("nan"))
    >>> same_bits(nan, nan), same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def state_dict(source: Tensors) -> dict[str, Tensor]:
    """All tensors. Names of one tensor get one object, so that a tied tensor is saved once."""
    if isinstance(source, Renamed):
        originals = {name: source.source.read(name) for name in set(source.sources.values())}
        return {name: originals[original] for name, original in source.sources.items()}
    return {name: source.read(name) for name in source.names()}
