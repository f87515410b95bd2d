"""The loss of language models and classifiers, as the sum that the one division expects."""

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
    """Logits that no rank has whole, and that know their own loss."""

    def cross_entropy_sum(self, targets: Tensor) -> Tensor: ...


def cross_entropy_sum(logits: Tensor | Split, targets: Tensor) -> Tensor:
    """Sum over all positions of -log softmax(logits)[target], in nats.

    Args:
        logits: (..., V), of any floating dtype; narrower than float32 is computed in float32. Or
            what a model gives whose head is split by vocabulary.
        targets: (...) of int64; -100 is left out.

    Divide by `job.count(number of targets)`: see [Note: the gradient convention].
    """
    if not isinstance(logits, Tensor):
        return logits.cross_entropy_sum(targets)
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="sum")


def share_of(output: Any, loss: Any) -> Tensor:
    """What a loss_fn has made of a model's output, as a number whose backward reaches the model.

    The rows of a rank may all be padding, and its loss a constant. It joins in backward all the
    same, with gradients of zero, since the other ranks wait for it there. Where no output needs a
    gradient, backward ends at once.
    """
    reached = [x for x in tensors_in(output) if x.requires_grad]
    share = one_number(torch.zeros(()) if isinstance(loss, int | float) and loss == 0 else loss)
    if share.requires_grad:
        return share
    share = share if share.is_floating_point() else share.double()
    return _Constant.apply(share, *reached) if reached else share.detach().requires_grad_()


class _Constant(torch.autograd.Function):
    """A number that does not depend on the tensors, whose values may be infinite."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, *reached: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in reached]
        return share.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        like = ctx.like
        return None, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in like)


def one_number(share: Any) -> Tensor:
    """Raises UserError unless it is what a loss_fn returns."""
    if not isinstance(share, Tensor) or share.numel() != 1:
        raise UserError("loss_fn returns one number as a tensor: a sum / job.count(n)")
    return share
