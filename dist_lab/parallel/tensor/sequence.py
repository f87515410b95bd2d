"""Activations between tensor-parallel blocks, and the collectives into a block and out of it.

    x -> SharedColumnInput -> colwise layers ... rowwise layer -> reduce -> x + ...

The table in tp.py says which collective each arrow is, in forward and in backward.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import autograd
from dist_lab.comm.ops import Pending
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.errors import UserError, nearest_degree
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.split_linear import OnOutputGrad, Queue, defer_to, split_linear
from dist_lab.parallel.tensor.layers import AnyLinear
from dist_lab.parallel.tensor.plan import divisors
from dist_lab.step.products import Product, linear, new_product
from dist_lab.step.setup import WeightWork
from dist_lab.transforms.operands import without_graph

T = -2  # the dim of a sequence, in (..., T, D)


class ActivationLayout:
    """The layout of activations between blocks: replicated, or sharded along the sequence.

    Args:
        regather: save only this rank's shard of a block's input, and gather it again in backward.
    """

    def __init__(
        self, axis: Axis, weight_work: WeightWork, *, sequence_parallel: bool, regather: bool
    ) -> None:
        self.axis, self.sequence_parallel, self.regather = axis, sequence_parallel, regather
        self.weight_work = weight_work
        self.scratch = Scratch(axis)

    def linear(self, x: Tensor, layer: AnyLinear) -> Tensor:
        """x W^T, of which a pipeline's schedule may defer the weight gradient. Differentiable."""
        queue, weight, product = self.weight_work.queue, layer.weight, new_product(layer)
        if queue is None or not torch.is_grad_enabled() or not weight.requires_grad:
            return linear(x, weight, None, product)
        on_grad = defer_to(queue, weight, x, product)
        return split_linear(x, without_graph(weight), None, product, on_grad)

    def all_gather(self, x: Tensor) -> Tensor:
        """x[T_tp] -> x[T], or x itself. Not differentiable."""
        return self.scratch.all_gather(x, T).wait() if self.sequence_parallel else x

    def start_reduce(self, x: Tensor) -> Pending:
        """x[T]{U_tp} -> x[T_tp], or x[T]. Not differentiable."""
        scratch = self.scratch
        return scratch.reduce_scatter(x, T) if self.sequence_parallel else scratch.all_reduce(x)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum the partial outputs of a rowwise layer or an embedding. Differentiable."""
        if self.sequence_parallel:
            self._check_divides(x)
        return _Reduce.apply(x, self)

    def scatter(self, x: Tensor) -> Tensor:
        """Shard a replicated x[T] -> x[T_tp]. Differentiable."""
        if not self.sequence_parallel:
            return x
        self._check_divides(x)
        return autograd.scatter(x, self.axis, T)

    def gather(self, x: Tensor) -> Tensor:
        """Unshard x[T_tp] -> x[T], for replicated computation. Differentiable."""
        return autograd.gather_replicated(x, self.axis, T) if self.sequence_parallel else x

    def _check_divides(self, x: Tensor) -> None:
        length, size = x.shape[T] if x.dim() > 1 else 1, self.axis.size
        if length % size:
            degree = nearest_degree(divisors(length), size)
            raise UserError(
                f"a sequence of {length} does not divide over {size} ranks of {self.axis.name}; "
                f"give a multiple of {size}, a degree of {degree}, or leave out sequence_parallel"
            )


class _Reduce(torch.autograd.Function):
    """x{U_tp} -> x. Backward is the conjugate: nothing, or all_gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activations: ActivationLayout) -> Tensor:
        ctx.activations = activations
        y = activations.start_reduce(x).wait()
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # with create_graph
            return enter_block(dy, ctx.activations), None
        return ctx.activations.all_gather(dy), None


class SharedColumnInput:
    """The input of colwise layers that read the same tensor, such as q, k and v.

    The first layer that is called gathers the input for all of them. The last one frees it. A layer
    gathers again if it is called with another tensor, if the tensor has changed, or if the layer is
    called a second time.
    """

    def __init__(self, activations: ActivationLayout) -> None:
        self.activations = activations
        self.columns: list[AnyLinear] = []
        self.clear()

    def clear(self) -> None:
        self.source: tuple[Tensor, int | None] | None = None  # the input, and its version
        self.gathered: Tensor | None = None
        self.uncalled: dict[AnyLinear, tuple[Tensor, Product, OnOutputGrad]] = {}

    def __call__(self, x: Tensor, column: AnyLinear) -> Tensor:
        """x W^T + b of one colwise layer."""
        # A tensor made in inference mode has no version that would show a change.
        queue = self.activations.weight_work.queue
        version = None if x.is_inference() else x._version
        source, source_version = self.source or (None, None)
        is_same = source is x and source_version == version and version is not None
        if not is_same or column not in self.uncalled:
            output_grads: dict[int, Tensor] = {}
            weights = [each.weight for each in self.columns]
            products = [new_product(each) for each in self.columns]
            operands = weights if queue is None else map(without_graph, weights)
            self.gathered, *views = _EnterBlock.apply(
                x, self.activations, queue, output_grads, products, weights, *operands
            )
            self.source = x, version
            self.uncalled = {
                each: (view, products[i], partial(output_grads.__setitem__, i))
                for i, (each, view) in enumerate(zip(self.columns, views, strict=True))
            }
        gathered, (weight, product, on_grad) = self.gathered, self.uncalled.pop(column)
        assert gathered is not None
        if not self.uncalled:
            self.clear()
        return split_linear(gathered, weight, column.bias, product, on_grad)


def enter_block(x: Tensor, activations: ActivationLayout) -> Tensor:
    """Unshard x for layers that differ between ranks. Differentiable: backward sums dx."""
    gathered: Tensor
    (gathered,) = _EnterBlock.apply(x, activations, None, {}, [], [])
    return gathered


class _EnterBlock(torch.autograd.Function):
    """x, W1, W2, ... -> x[T], and a view of each W: the operands of colwise layers.

    The backward of a colwise layer returns dx{U_tp}, and leaves dy in `output_grads`. Then this
    backward starts the sum of dx, computes dW from dy meanwhile, and returns dW as the gradient of
    W. If a pipeline's schedule gives a `queue`, it puts the work for dW there instead: all
    collectives, also those of regather, still run in this backward. With create_graph the whole
    backward is differentiable, and second derivatives add gradients of the views of W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activations: ActivationLayout, queue: Queue | None,
        output_grads: dict[int, Tensor], products: Sequence[Product], deferred: list[Tensor],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.activations, ctx.queue, ctx.output_grads = activations, queue, output_grads
        ctx.products, ctx.deferred = products, deferred if queue is not None else []
        ctx.set_materialize_grads(False)
        full_x = activations.all_gather(x)
        gathered = x.view_as(x) if full_x is x else full_x
        ctx.save_for_backward(x if activations.regather else gathered)
        outputs = [gathered, *(weight.view_as(weight) for weight in weights)]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        frozen = [y for y, needs_grad in zip(outputs, needs, strict=True) if not needs_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(outputs)

    @staticmethod
    def backward(
        ctx: Any, dx: Tensor | None, *view_grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        activations, output_grads = ctx.activations, ctx.output_grads
        create_graph, pending = torch.is_grad_enabled(), None
        if dx is not None and create_graph:
            pending = Pending(activations.reduce(dx))
        elif dx is not None:
            pending = activations.start_reduce(dx)  # dx{U_tp} -> dx
        (x,) = ctx.saved_tensors
        if activations.regather and output_grads:
            x = enter_block(x, activations) if create_graph else activations.all_gather(x)
        weight_grads = list(view_grads)
        for i, view_grad in enumerate(view_grads):
            if i in output_grads and ctx.queue is not None and not create_graph:
                on_grad = defer_to(ctx.queue, ctx.deferred[i], x, ctx.products[i])
                on_grad(output_grads.pop(i))
            elif i in output_grads:
                dw = ctx.products[i].weight_grad(output_grads.pop(i), x)
                weight_grads[i] = dw if view_grad is None else dw + view_grad
        return None if pending is None else pending.wait(), *[None] * 5, *weight_grads
