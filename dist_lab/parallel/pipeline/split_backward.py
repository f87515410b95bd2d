"""Backward of a module in two halves: the gradient of its inputs now, those of its weights later.

    I    dx    for which the stage before waits
    W    dW    for which nobody waits before the step ends

A zero-bubble schedule does W where a rank would be idle (Qi et al. 2023, arXiv:2401.10241). So each
module that holds parameters itself, the outermost of them, has its forward replaced: what it
computes is a graph of its own, from detached inputs, which autograd sees from outside as one
operation. Its backward walks that graph to the inputs alone, and notes as a debt that there are
weights to walk to. A Linear needs no graph for that (parallel/split_linear.py); its bias comes with
I.

Nothing is computed twice as long as such a module is one operation: a convolution, a norm, an
embedding. In one that is many, what lies between its inputs and a weight inside is walked twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.parallel.split_linear import split_linear, weight_gradient
from dist_lab.step.hooks import StaysBehind
from dist_lab.torch_private import tree_flatten, tree_unflatten

WeightWork = list[Callable[[], None]]


class SplitBackward:
    """Replaces forwards, and knows the list to which they add their weight work."""

    def __init__(self) -> None:
        self.weight_work: WeightWork | None = None  # None: nothing is put off

    def split(self, module: nn.Module) -> None:
        """In place: the outermost modules that hold trained parameters themselves."""
        if isinstance(module.forward, SplitForward):
            return  # called from two stages of this rank
        own = module._parameters.values()
        if any(p is not None and p.requires_grad for p in own):
            module.forward = SplitForward(module, self)
            return
        for child in module.children():
            self.split(child)

    @contextmanager
    def deferring(self, weight_work: WeightWork | None) -> Iterator[None]:
        """Inside, weights of what is computed are owed their gradient: each debt, when called in
        any order after backward, adds it to `.grad`. None: it comes in backward.
        """
        before, self.weight_work = self.weight_work, weight_work
        try:
            yield
        finally:
            self.weight_work = before


class SplitForward(StaysBehind):
    """The `forward` of one such module."""

    def __init__(self, module: nn.Module, splitter: SplitBackward) -> None:
        self.forward = self.in_a_copy = module.forward
        self.module, self.splitter = module, splitter
        plain = type(module) is nn.Linear and module.weight.requires_grad
        self.linear: nn.Linear | None = module if plain else None  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weight_work = self.splitter.weight_work
        if weight_work is None or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if self.linear is not None and len(args) == 1 and not kwargs:
            return _linear(self.linear, args[0], weight_work)
        return _by_graph(self.module, self._whole, args, kwargs, weight_work)

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        with self.splitter.deferring(None):  # one that lies inside owes nothing of its own
            return self.forward(*args, **kwargs)


def _linear(linear: nn.Linear, x: Tensor, weight_work: WeightWork) -> Tensor:
    weight = linear.weight  # in the dtype of compute: perhaps a cast of the parameter
    kept = x.detach()

    def run_deferred(dy: Tensor) -> None:
        torch.autograd.backward(weight, weight_gradient(dy, kept))

    def defer(dy: Tensor) -> None:
        if torch.is_grad_enabled():  # what is paid later has no history
            raise UserError(
                "a backward of which a derivative is taken cannot be split; take a schedule "
                'that does not split it, such as "1f1b"'
            )
        weight_work.append(partial(run_deferred, dy))

    return split_linear(x, weight, linear.bias, defer)


def _by_graph(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weight_work: WeightWork,
) -> Any:
    values, shape = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    weights = [p for p in module.parameters() if p.requires_grad]
    outputs: list[Any] = []  # of the module, some of which may be no tensors
    form: list[Any] = []

    def run(inputs: list[Tensor]) -> list[Tensor]:
        inside = list(values)
        for place, x in zip(places, inputs, strict=True):
            inside[place] = x
        inner_args, inner_kwargs = tree_unflatten(inside, shape)
        found, how = tree_flatten(forward(*inner_args, **inner_kwargs))
        outputs.extend(found)
        form.append(how)
        return [value for value in found if isinstance(value, Tensor)]

    inputs = [values[place] for place in places]
    made = iter(_Graph.apply(run, weight_work, weights, *inputs, *weights))
    whole = [next(made) if isinstance(value, Tensor) else value for value in outputs]
    return tree_unflatten(whole, form[0])


def fresh(x: Tensor) -> Tensor:
    """The same memory, as a tensor that may be changed in place, which a leaf may not."""
    made: Tensor = _Fresh.apply(x) if x.requires_grad else x
    return made


class _Fresh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Graph(torch.autograd.Function):
    """(run, weight_work, weights, *inputs, *weights) -> what `run` makes of the inputs.

    The weights are inputs so that the result has a gradient where no input has one; what they are
    given is None.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[list[Tensor]], list[Tensor]], weight_work: WeightWork,
        weights: list[Tensor], *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = tensors[: len(tensors) - len(weights)]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.requires_grad) for x in given]
            outputs = run([fresh(x) for x in inputs])
        ctx.inputs, ctx.outputs, ctx.weight_work, ctx.weights = (
            inputs,
            outputs,
            weight_work,
            weights,
        )
        ctx.set_materialize_grads(False)
        made = tuple(y.detach() for y in outputs)
        fixed = (m for m, y in zip(made, outputs, strict=True) if not y.requires_grad)
        ctx.mark_non_differentiable(*fixed)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        pairs = [
            (y, dy)
            for y, dy in zip(ctx.outputs, gradients, strict=True)
            if dy is not None and y.requires_grad
        ]
        wanted = [x for x in ctx.inputs if x.requires_grad]
        found: Any = [None] * len(wanted)
        weights = ctx.weights
        if pairs:
            ys, dys = zip(*pairs, strict=True)
            if wanted:
                found = torch.autograd.grad(ys, wanted, dys, retain_graph=True, allow_unused=True)
            ctx.weight_work.append(lambda: torch.autograd.backward(ys, dys, inputs=weights))
        each = iter(found)
        dx = [next(each) if x.requires_grad else None for x in ctx.inputs]
        ctx.inputs = ctx.outputs = ctx.weights = None  # the debt keeps what it needs
        return (None, None, None, *dx, *[None] * len(weights))
