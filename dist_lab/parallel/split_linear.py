"""A linear layer with a split backward: the input's gradient at once, the weight's gradient later.

    y = x W^T + b          dx = dy W,  db = sum of dy       in backward
                           dW = dy^T x                      by `weight_grad`, at any later time

Other layers and ranks wait for dx; dW is not needed before the step ends. Tensor parallelism
computes dW while the sum of dx over the ranks is in flight. A zero-bubble pipeline computes dW
where a rank would otherwise be idle (Qi et al. 2023, arXiv:2401.10241).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.step.products import Product, as_rows

OnOutputGrad = Callable[[Tensor], None]
Queue = list[Callable[[], None]]  # each call adds some weights' gradients to their `.grad`


def split_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, on_grad: OnOutputGrad
) -> Tensor:
    """x (..., D), weight (F, D), bias (F,) -> (..., F).

    Args:
        product: of this call: see step/products.py.
        on_grad: called with dy (..., F) in backward, if the weight is trained. It must compute the
            weight's gradient, and hold x for that: this function does not save x. If backward
            builds a graph (create_graph), dy is part of it.
    """
    return _SplitLinear.apply(x, weight, bias, product, on_grad)


def defer_to(queue: Queue, weight: Tensor, x: Tensor, product: Product) -> OnOutputGrad:
    """An `on_grad` that puts the work for dW into a queue.

    Args:
        weight: the parameter, or a cast of it: calling the work adds to the parameter's `.grad`.
        x: the input of the layer.
    """
    x = x.detach()

    def on_grad(dy: Tensor) -> None:
        if torch.is_grad_enabled():  # create_graph=True: deferred gradients have no graph
            raise UserError(
                "a backward that is differentiated again cannot be split in two; take a schedule "
                'that does not split it, such as "1f1b"'
            )
        dy = dy.detach()
        queue.append(lambda: torch.autograd.backward(weight, product.weight_grad(dy, x)))

    return on_grad


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product,
        on_grad: OnOutputGrad,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight)
        ctx.product, ctx.on_grad = product, on_grad
        return product.output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if needs_weight:
            ctx.on_grad(dy)
        dx = ctx.product.input_grad(dy, weight) if needs_x else None
        db = as_rows(dy).sum(0) if needs_bias else None
        return dx, None, db, None, None
