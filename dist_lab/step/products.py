"""The three matrix products of a linear layer, which a recipe may compute in fewer bits.

    y = x W^T + b      output           forward
    dx = dy W          input_grad       backward
    dW = dy^T x        weight_grad      backward, or later: parallel/split_linear.py

Strategies compute some of these themselves, at times of their own, and ask `new_product(layer)` for
them. A plain layer multiplies its operands as they are. A recipe of low precision gives a layer the
attribute `new_product`, which makes products that round the operands: quantize/lowp/product.py.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_lab.step.hooks import StaysBehind


class Product(Protocol):
    """The products of one call of a layer: x (..., D), weight (F, D), bias (F,), dy (..., F).

    `output` comes first. The others are called with the same weight and x, in any order.
    """

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b, (..., F)."""

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W, (..., D)."""

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy^T x, (F, D)."""


NewProduct = Callable[[], Product]


class Plain:
    """Products of the operands as they are. Differentiable."""

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return dy @ weight

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        return as_rows(dy).t() @ as_rows(x)


PLAIN = Plain()


def new_product(layer: Any) -> Product:
    """The products of the next call of a layer."""
    make: NewProduct | None = getattr(layer, "new_product", None)
    return PLAIN if make is None else make()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    """y, whose backward computes dx and dW."""
    if product is PLAIN:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, product)


class ProductForward(StaysBehind):
    """The `forward` of an nn.Linear that asks for its product in each call."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.in_a_copy = module, module.forward

    def __call__(self, input: Tensor) -> Tensor:
        return linear(input, self.module.weight, self.module.bias, new_product(self.module))


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D), or (D,) -> (1, D); D may be 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product.output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = ctx.product.input_grad(dy, weight) if needs_x else None
        dw = ctx.product.weight_grad(dy, x) if needs_weight else None
        return dx, dw, as_rows(dy).sum(0) if needs_bias else None, None
