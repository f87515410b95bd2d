"""Splits a module's backward in two halves: gradients of its inputs now, of its weights later.

    I    dx    for which the previous stage waits
    W    dW    for which no one waits before the step ends

A zero-bubble schedule does W when a rank would be idle (Qi et al. 2023, arXiv:2401.10241). We
replace the forward of each outermost module that holds parameters directly. The new forward builds
an autograd graph of its own from detached inputs; the outer graph sees it as one operation. The
backward of that operation runs the inner graph to the inputs only, and defers its run to the
weights. A Linear needs no inner graph (parallel/split_linear.py); its bias gradient comes with I.

Nothing is computed twice if such a module is a single operation: a convolution, a norm, an
embedding. If it has several, those between its inputs and a weight run their backward twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.parallel.split_linear import Queue, defer_to, split_linear
from dist_lab.step.hooks import StaysBehind
from dist_lab.step.products import ProductForward, new_product
from dist_lab.step.setup import WeightWork
from dist_lab.torch_private import tree_flatten, tree_unflatten
from dist_lab.transforms.operands import without_graph

# Modules that are one operation, whose backward reads the input once.
ONE_OPERATION = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SplitBackward:
    """Replaces forwards so that their backward appends its weight work to a queue.

    A forward that another strategy has replaced is left alone, with all modules around it: tensor
    parallelism defers its own weight gradients, and its collectives must not run twice.

    Args:
        fixed_order: split single operations only. If a module reads its input twice, as RMSNorm
            does, its inner graph adds up the two gradients of the input by themselves, while
            autograd adds them to those of the input's other readers, one by one.
    """

    def __init__(self, deferred: WeightWork, *, fixed_order: bool = False) -> None:
        self.deferred, self.fixed_order = deferred, fixed_order

    def split(self, module: nn.Module) -> None:
        """Replace the forwards of the outermost modules that hold trained parameters directly."""
        if not isinstance(vars(module).get("forward"), ProductForward | None):
            return  # by another strategy, or by this function: two stages use the module
        has_weights = any(p is not None and p.requires_grad for p in module._parameters.values())
        replaced_inside = any(is_replaced(child) for child in module.modules())
        may_split = not self.fixed_order or type(module) in ONE_OPERATION
        if has_weights and may_split and not replaced_inside:
            module.forward = SplitForward(module, self)
            return
        for child in module.children():
            self.split(child)

    @contextmanager
    def deferring(self, queue: Queue | None) -> Iterator[None]:
        """In backward, forwards that ran inside the block append their weight work to this list.
        It can be called later, in any order. None: weights get their gradients in backward.
        """
        before, self.deferred.queue = self.deferred.queue, queue
        try:
            yield
        finally:
            self.deferred.queue = before


def is_replaced(module: nn.Module) -> bool:
    """Whether another strategy has replaced the module's forward."""
    return not isinstance(vars(module).get("forward"), SplitForward | ProductForward | None)


class SplitForward(StaysBehind):
    """The replaced `forward` of one module."""

    def __init__(self, module: nn.Module, splitter: SplitBackward) -> None:
        self.forward = self.in_a_copy = module.forward
        self.module, self.splitter = module, splitter
        is_linear = type(module) is nn.Linear and module.weight.requires_grad
        self.linear: nn.Linear | None = module if is_linear else None  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weight_work = self.splitter.deferred.queue
        if weight_work is None or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if self.linear is not None and len(args) == 1 and not kwargs:
            return _linear(self.linear, args[0], weight_work)
        return _with_inner_graph(self.module, self._undeferred, args, kwargs, weight_work)

    def _undeferred(self, *args: Any, **kwargs: Any) -> Any:
        with self.splitter.deferring(None):  # inner modules are part of this one's graph
            return self.forward(*args, **kwargs)


def _linear(linear: nn.Linear, x: Tensor, weight_work: Queue) -> Tensor:
    weight = linear.weight  # in the compute dtype: perhaps a cast of the parameter
    product = new_product(linear)
    on_grad = defer_to(weight_work, weight, x, product)
    return split_linear(x, without_graph(weight), linear.bias, product, on_grad)


def _with_inner_graph(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weight_work: Queue,
) -> Any:
    arguments, arguments_spec = tree_flatten((args, kwargs))
    positions = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    weights = [leaf for leaf in leaves_read(module) if leaf.requires_grad]
    inner_outputs: list[Any] = []  # tensors and other values
    output_spec: list[Any] = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        inner_arguments = list(arguments)
        for i, x in zip(positions, inputs, strict=True):
            inner_arguments[i] = x
        inner_args, inner_kwargs = tree_unflatten(inner_arguments, arguments_spec)
        values, spec = tree_flatten(forward(*inner_args, **inner_kwargs))
        inner_outputs.extend(values)
        output_spec.append(spec)
        return [value for value in values if isinstance(value, Tensor)]

    inputs = [arguments[i] for i in positions]
    tensors = iter(_InnerGraph.apply(run, weight_work, weights, *inputs, *weights))
    outputs = [next(tensors) if isinstance(value, Tensor) else value for value in inner_outputs]
    return tree_unflatten(outputs, output_spec[0])


def leaves_read(module: nn.Module) -> list[Tensor]:
    """The leaves that the module's forward reads: its parameters, or unsharded tensors in front."""
    leaves = dict[Tensor, None]()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            shown = getattr(part, name)  # a cast of the parameter is no leaf
            if parameter is not None:
                leaves[shown if shown.is_leaf else parameter] = None
    return list(leaves)


def as_non_leaf(x: Tensor) -> Tensor:
    """x as a non-leaf tensor with the same memory: unlike a leaf it may be changed in place."""
    y: Tensor = _Identity.apply(x) if x.requires_grad else x
    return y


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _InnerGraph(torch.autograd.Function):
    """(run, weight_work, weights, *inputs, *weights) -> run(inputs).

    The weights are inputs so that the outputs need a gradient even if no input does. This backward
    returns None for them.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[list[Tensor]], list[Tensor]], weight_work: Queue,
        weights: list[Tensor], *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outer_inputs = tensors[: len(tensors) - len(weights)]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.requires_grad) for x in outer_inputs]
            outputs = run([as_non_leaf(x) for x in inputs])
        ctx.inputs, ctx.outputs = inputs, outputs
        ctx.weight_work, ctx.weights = weight_work, weights
        ctx.set_materialize_grads(False)
        detached = tuple(y.detach() for y in outputs)
        constant = (d for d, y in zip(detached, outputs, strict=True) if not y.requires_grad)
        ctx.mark_non_differentiable(*constant)
        return detached

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        pairs = [
            (y, dy)
            for y, dy in zip(ctx.outputs, gradients, strict=True)
            if dy is not None and y.requires_grad
        ]
        xs = [x for x in ctx.inputs if x.requires_grad]
        grads: Any = [None] * len(xs)
        weights = ctx.weights
        if pairs:
            ys, dys = zip(*pairs, strict=True)
            if xs:
                grads = torch.autograd.grad(ys, xs, dys, retain_graph=True, allow_unused=True)
            ctx.weight_work.append(lambda: torch.autograd.backward(ys, dys, inputs=weights))
        remaining = iter(grads)
        dx = [next(remaining) if x.requires_grad else None for x in ctx.inputs]
        ctx.inputs = ctx.outputs = ctx.weights = None  # the weight work keeps what it needs
        return (None, None, None, *dx, *[None] * len(weights))
