"""The loss of language models and classifiers, as the sum that the one division expects."""

from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from dist_lab.errors import UserError

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


def one_number(share: Any) -> Tensor:
    """Raises UserError unless it is what a loss_fn returns."""
    if not isinstance(share, Tensor) or share.numel() != 1:
        raise UserError("loss_fn returns one number as a tensor: a sum / job.count(n)")
    return share
