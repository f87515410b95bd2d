"""The matrix products of a Linear with coded operands, on one rank of several.

    y[N, F]  = x[N, D]  . W[F, D]^T      both are coded in blocks along D, the letter of the sum
    dx[N, D] = dy[N, F] . W[F, D]        along F
    dW[F, D] = dy[N, F]^T . x[N, D]      along N

Each is `multiply(A, B)`, where both operands have the letter of the sum last.

[Note: ranges over ranks] A codec with a scale for the whole matrix needs the matrix's largest
magnitude, and each rank has a part of the matrix: data-parallel ranks have other rows of x and dy,
tensor-parallel ranks other columns of some. Each takes the largest of its part, and an all_reduce
of one number the largest of these. A maximum is exact, so all ranks code as one process would: one
message for each x, one for each dy, and under tp one for each W. Blocks need no message if none
lies on two ranks, which is checked: widths when the job is made, tokens in each forward.

All ranks must call the same layers equally often, in one order, also in evaluation.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.lowp.blocks import Codec, Coded, magnitude
from dist_lab.quantize.lowp.codecs import Codecs
from dist_lab.step.hooks import StaysBehind
from dist_lab.step.products import as_rows
from dist_lab.transforms.operands import LinearOperands


@dataclass
class Ranges:
    """Largest magnitudes that are known already.

    weights: name of a weight -> that of all its parts, if it was gathered in codes: gather.py
    latest: (input, its version, axis) that a layer has measured last, and its range. The next layer
        often reads the same tensor, such as q, k and v.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    latest: tuple[weakref.ref[Tensor], int, Axis | None, Tensor] | None = None

    def of_input(self, x: Tensor, codec: Codec, axis: Axis | None, name: str) -> Tensor | None:
        """The range of a layer's input."""
        if codec.outer is None or x.is_inference():  # then it has no version
            return range_of(x, codec, axis, f"an input of {name}")
        if self.latest is not None:
            seen, version, of_axis, largest = self.latest
            if seen() is x and version == x._version and of_axis is axis:
                return largest
        measured = range_of(x, codec, axis, f"an input of {name}")
        assert measured is not None
        self.latest = weakref.ref(x), x._version, axis, measured
        return measured


@dataclass(frozen=True)
class CodedLinear(StaysBehind):
    """A Linear that multiplies coded operands. Calling this makes the products of one call of it.

    weight: the name of its weight
    """

    in_a_copy = None
    codecs: Codecs
    layer: LinearOperands
    weight: str
    ranges: Ranges

    def __call__(self) -> "CodedProduct":
        return CodedProduct(self)


class CodedProduct:
    """The products of one call of a Linear: see step/products.py.

    Attributes:
        x_range, weight_range: of each operand over all ranks; None: not known yet, or the codec
            has no scale for the whole matrix.
        latest: a gradient that was measured, and its range. The graph may be kept for a second
            backward, which has another gradient.
        is_trained: whether there will be a backward.
    """

    def __init__(self, linear: CodedLinear) -> None:
        self.linear, self.codecs, self.layer = linear, linear.codecs, linear.layer
        self.x_range: Tensor | None = None
        self.weight_range: Tensor | None = None
        self.latest: tuple[Any, Tensor | None] | None = None
        self.is_trained = torch.is_grad_enabled()  # off inside of an autograd.Function

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        codecs, layer, rows = self.codecs, self.layer, as_rows(x)
        if self.is_trained:
            check_tokens(layer.name, codecs.x, rows.size(0), layer.input_axis)
        ranges = self.linear.ranges
        self.x_range = ranges.of_input(x, codecs.x, layer.input_axis, layer.name)
        self.weight_range = ranges.weights.get(self.linear.weight)
        if self.weight_range is None:
            what = f"the weight of {layer.name}"
            self.weight_range = range_of(weight, codecs.weight, layer.weight_axis, what)
        a, b = codecs.x(rows, self.x_range), codecs.weight(weight, self.weight_range)
        y = multiply(a, b).to(x.dtype).view(*x.shape[:-1], weight.size(0))
        return y if bias is None else y + bias

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        refuse_graph(self.layer.name, dy, weight)
        rows = as_rows(dy)
        a = self.codecs.dy(rows, self._range_of_gradient(dy))
        b = self.codecs.weight(weight.t(), self.weight_range)
        return multiply(a, b).to(dy.dtype).view(*dy.shape[:-1], weight.size(1))

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        refuse_graph(self.layer.name, dy, x)
        a = self.codecs.dy(as_rows(dy).t(), self._range_of_gradient(dy))
        return multiply(a, self.codecs.x(as_rows(x).t(), self.x_range)).to(dy.dtype)

    def _range_of_gradient(self, dy: Tensor) -> Tensor | None:
        if self.latest is None or self.latest[0] != memory_of(dy):
            what = f"a gradient of {self.layer.name}"
            largest = range_of(dy, self.codecs.dy, self.layer.grad_axis, what)
            self.latest = memory_of(dy), largest
        return self.latest[1]


def multiply(a: Coded, b: Coded) -> Tensor:
    """A (N, K), B (M, K) -> A B^T (N, M). The scales of whole matrices are applied to the sums."""
    return a.operand() @ b.operand().t() * (a.outer * b.outer)


def memory_of(x: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors if both are the same numbers in memory. Does not keep them alive.

    A weak reference, because an address may be used again, by the next gradient.
    """
    return StorageWeakRef(x.untyped_storage()), x.storage_offset(), x.stride(), x._version


def range_of(x: Tensor, codec: Codec, axis: Axis | None, what: str) -> Tensor | None:
    """The largest magnitude in all ranks' parts of a matrix: [Note: ranges over ranks]."""
    if codec.outer is None:
        return None
    largest = magnitude(x)
    if axis is None:
        return largest
    with axis.comm.label(unit=f"range of {what}"):
        return ops.all_reduce_into(largest, axis, "max").wait()


def check_tokens(name: str, codec: Codec, tokens: int, axis: Axis | None) -> None:
    """Raise UserError if a block of tokens, of which dW is the sum, lies on two ranks.

    Without a backward there is no dW.
    """
    size = 1 if codec.block is None else codec.block[1]
    if axis is not None and axis.size > 1 and tokens % size:
        raise UserError(
            f"{name} has {tokens} tokens on this rank, and blocks of {size} tokens must lie on one "
            f"of the {axis.size} ranks (recipe=); give batch x seq per rank and micro-batch a "
            f"multiple of {size}, or recipe fp8"
        )


def refuse_graph(name: str, *operands: Tensor) -> None:
    """Raise UserError if backward is to be differentiated: codes have no derivative."""
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        raise UserError(
            f"{name} multiplies coded operands, whose backward cannot be differentiated again "
            "(recipe=); leave create_graph out, or leave recipe out"
        )
