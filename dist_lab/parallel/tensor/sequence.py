"""The residual stream of a tensor-parallel model, and the ways out of it into a block and back.

x -> Entry -> columns ... rows -> summed -> x + ...       see the table in tp.py
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import autograd
from dist_lab.comm.ops import Pending
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.errors import UserError, nearest_degree
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.split_linear import OnOutputGrad, split_linear, weight_gradient
from dist_lab.parallel.tensor.plan import divisors

T = -2  # the dim of a sequence, in (..., T, D)


class ActivationLayout:
    """How what flows between the blocks lies: whole on every rank, or each a piece of the sequence.

    Args:
        cut: along the sequence.
        regather: what a block reads is not kept whole for backward, but gathered again.
    """

    def __init__(self, axis: Axis, *, cut: bool, regather: bool) -> None:
        self.axis, self.cut, self.regather = axis, cut, regather
        self.scratch = Scratch(axis)

    def whole(self, x: Tensor) -> Tensor:
        """x[T_tp] -> x[T], or x itself."""
        return self.scratch.all_gather(x, T).wait() if self.cut else x

    def start_sum(self, x: Tensor) -> Pending:
        """x[T]{U_tp} -> x[T_tp], or x[T]."""
        return self.scratch.reduce_scatter(x, T) if self.cut else self.scratch.all_reduce(x)

    def summed(self, x: Tensor) -> Tensor:
        """Differentiable: what a row, or a part of an embedding, gives to the stream."""
        if self.cut:
            self._check(x)
        return _Summed.apply(x, self)

    def piece(self, x: Tensor) -> Tensor:
        """Differentiable: this rank's part of what all have computed alike, x[T] -> x[T_tp]."""
        if not self.cut:
            return x
        self._check(x)
        return autograd.scatter(x, self.axis, T)

    def joined(self, x: Tensor) -> Tensor:
        """Differentiable: x[T_tp] -> x[T], with which all go on alike."""
        return autograd.gather_replicated(x, self.axis, T) if self.cut else x

    def _check(self, x: Tensor) -> None:
        length, size = x.shape[T] if x.dim() > 1 else 1, self.axis.size
        if length % size:
            near = nearest_degree(divisors(length), size)
            raise UserError(
                f"a sequence of {length} does not divide over {size} ranks of {self.axis.name}; "
                f"give a multiple of {size}, a degree of {near}, or leave out sequence_parallel"
            )


class _Summed(torch.autograd.Function):
    """x{U_tp} -> x; backward is its conjugate: nothing, or all_gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activations: ActivationLayout) -> Tensor:
        ctx.activations = activations
        y = activations.start_sum(x).wait()
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # somebody will take the derivative of this
            return entered(dy, ctx.activations), None
        return ctx.activations.whole(dy), None


class SharedColumnInput:
    """The way from the stream into columns that read it together.

    The first of them that is given a tensor brings it in for all; what was brought in is let go
    when the last has had it. One that is given another tensor, or the same one again or changed,
    brings that in anew.
    """

    def __init__(self, activations: ActivationLayout) -> None:
        self.activations = activations
        self.columns: list[nn.Linear] = []
        self.leave()

    def leave(self) -> None:
        self.given: tuple[Tensor, int | None] | None = None
        self.inside: Tensor | None = None
        self.weights: dict[nn.Linear, tuple[Tensor, OnOutputGrad]] = {}  # of those still to come

    def __call__(self, x: Tensor, column: nn.Linear) -> Tensor:
        """x W^T + b of one of them."""
        # One made in inference mode does not tell whether it was changed.
        version = None if x.is_inference() else x._version
        before, then = self.given or (None, None)
        known = before is x and then == version and version is not None
        if not known or column not in self.weights:
            owed: dict[int, Tensor] = {}
            weights = [one.weight for one in self.columns]
            self.inside, *entered = _Enter.apply(x, self.activations, owed, *weights)
            self.given = x, version
            self.weights = {
                one: (weight, partial(owed.__setitem__, i))
                for i, (one, weight) in enumerate(zip(self.columns, entered, strict=True))
            }
        inside, (weight, on_grad) = self.inside, self.weights.pop(column)
        assert inside is not None
        if not self.weights:
            self.leave()
        return split_linear(inside, weight, column.bias, on_grad)


def entered(x: Tensor, activations: ActivationLayout) -> Tensor:
    """Differentiable: x from the stream, of which each rank goes on to use a part of its own."""
    inside: Tensor
    (inside,) = _Enter.apply(x, activations, {})
    return inside


class _Enter(torch.autograd.Function):
    """x, W1, W2, ... -> x[T], W1, W2, ...: what columns compute with.

    Their backward leaves dx{U_tp}, and owes dW; both pass here. So the sum of dx is on its way
    while dW is computed, and dW arrives at its parameter as any gradient does. A second derivative
    goes through the same in differentiable steps, and has gradients of its own for W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activations: ActivationLayout,
        owed: dict[int, Tensor],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.activations, ctx.owed = activations, owed
        ctx.set_materialize_grads(False)
        whole = activations.whole(x)
        inside = x.view_as(x) if whole is x else whole
        ctx.save_for_backward(x if activations.regather else inside)
        entered = [weight.view_as(weight) for weight in weights]
        outputs = [inside, *entered]
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        ctx.mark_non_differentiable(*[y for y, yes in zip(outputs, needed, strict=True) if not yes])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        activations, owed, again = ctx.activations, ctx.owed, torch.is_grad_enabled()
        pending = None
        if dx is not None:  # dx{U_tp} -> dx
            pending = Pending(activations.summed(dx)) if again else activations.start_sum(dx)
        (x,) = ctx.saved_tensors
        if activations.regather and owed:
            x = entered(x, activations) if again else activations.whole(x)
        gradients = list(given)
        for i, before in enumerate(given):
            if i in owed:
                own = weight_gradient(owed.pop(i), x)
                gradients[i] = own if before is None else own + before
        return None if pending is None else pending.wait(), None, None, *gradients
