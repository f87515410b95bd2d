"""The loss of language models and classifiers, as the sum that the one division expects."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over all positions of -log softmax(logits)[target], in nats.

    Args:
        logits: (..., V), of any floating dtype; narrower than float32 is computed in float32.
        targets: (...) of int64; -100 is left out.

    Divide by `job.count(number of targets)`: see [Note: the gradient convention].
    """
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="sum")
