"""The summed loss of language models and classifiers, to be divided once by the global count."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_lab.errors import UserError
from dist_lab.step.hooks import tensors_in

Pair = tuple[Any, Any]  # input, target: tensors, or structures of them
LossFn = Callable[[Any, Any], Tensor]  # output, target -> a share of the loss: see job.run


class Split(Protocol):
    """Logits that are split over ranks by vocabulary and compute their own loss."""

    def cross_entropy_sum(self, targets: Tensor) -> Tensor: ...


def cross_entropy_sum(logits: Tensor | Split, targets: Tensor) -> Tensor:
    """Return the sum over all positions of -log softmax(logits)[target], in nats.

    To get the loss, divide it by `job.count(number of targets)`: see
    [Note: the gradient convention] in step/protocol.py.

    Args:
        logits: shape (..., V), any floating dtype; below float32 it computes in float32. Or the
            output of a model whose head is split by vocabulary.
        targets: shape (...), int64; positions with target -100 are ignored.

    Returns:
        A scalar tensor.
    """
    if not isinstance(logits, Tensor):
        return logits.cross_entropy_sum(targets)
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="sum")


def share_of(output: Any, loss: Any) -> Tensor:
    """Return the loss that a loss_fn computed, as a scalar whose backward reaches the model.

    A rank's rows may all be padding, and then its loss is a constant. The rank must still run
    backward, because the other ranks wait for it there: the result sends zero gradients into the
    model's output. If no output requires a gradient, backward ends at once.
    """
    outputs = [x for x in tensors_in(output) if x.requires_grad]
    share = one_number(torch.zeros(()) if isinstance(loss, int | float) and loss == 0 else loss)
    if share.requires_grad:
        return share
    share = share if share.is_floating_point() else share.double()
    return _Constant.apply(share, *outputs) if outputs else share.detach().requires_grad_()


class _Constant(torch.autograd.Function):
    """A constant with zero gradients for the outputs, even if their values are infinite."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, *outputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in outputs]
        return share.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        like = ctx.like
        return None, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in like)


def one_number(share: Any) -> Tensor:
    """Return the loss unchanged; raise UserError unless it is a tensor with one element."""
    if not isinstance(share, Tensor) or share.numel() != 1:
        raise UserError("loss_fn returns one number as a tensor: a summed loss / job.count(n)")
    return share
