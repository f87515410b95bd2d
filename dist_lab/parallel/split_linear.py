"""A linear layer whose backward comes in two halves: for its input now, for its weight when asked.

    y = x W^T + b          dx = dy W,  db = sum of dy       in backward
                           dW = dy^T x                      by `weight_gradient`, whenever it suits

dx is what others wait for; dW is needed by nobody before the step ends. Tensor parallelism sums dx
over ranks, and computes dW while that is on its way; a zero-bubble pipeline computes dW where it
would have nothing to do (Qi et al. 2023, arXiv:2401.10241).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OnOutputGrad = Callable[[Tensor], None]


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, on_grad: OnOutputGrad) -> Tensor:
    """x (..., D), weight (F, D), bias (F,) -> (..., F).

    Args:
        owe: is given dy (..., F) in backward, if the weight is trained. Who takes it owes the
            weight its gradient, and keeps x for that, which is not kept here. In a backward that is
        to be differentiated in its turn, dy has a history.
    """
    return _SplitLinear.apply(x, weight, bias, on_grad)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy (..., F), x (..., D) -> dW (F, D)."""
    return _rows(dy).t() @ _rows(x)


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D), of one vector too; D may be 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, on_grad: OnOutputGrad
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.on_grad = on_grad
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight:
            ctx.on_grad(dy)
        dx = dy @ weight if needs_x else None
        db = _rows(dy).sum(0) if needs_bias else None
        return dx, None, db, None
