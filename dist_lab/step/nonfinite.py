"""Records the first gradient of this rank that is not finite, before it is summed over ranks.

After the sum every rank has the NaN, and no rank can tell which rank it came from. So this Sync is
before the strategy in the chain, and checks each gradient while it is still local to its rank. The
check costs one pass over each gradient.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import TrainingDiverged
from dist_lab.mesh.mesh import Mesh
from dist_lab.step.protocol import Sync


class FirstNonFinite(Sync):
    """Holds the name of the first parameter of this step whose gradient is not finite.

    leaves: name -> the autograd leaf, whose `.grad` is not summed over ranks yet.
    accumulates: `.grad` accumulates all micro-batches, so we check it only after the last one:
        a NaN in one micro-batch stays in the sum.
    """

    def __init__(self, leaves: Mapping[str, Tensor], *, accumulates: bool = False) -> None:
        self.leaves, self.accumulates, self.first_name = leaves, accumulates, ""

    def pop(self) -> str:
        """Returns the name, or "" if there is none, and forgets it."""
        first_name, self.first_name = self.first_name, ""
        return first_name

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        if self.accumulates and not last:
            return
        for name in names:
            gradient = self.leaves[name].grad
            # A sum is the cheapest pass that keeps any NaN or infinity. But a sum of finite values
            # may overflow, so isfinite() confirms it.
            if not self.first_name and gradient is not None and not gradient.sum().isfinite():
                self.first_name = "" if torch.isfinite(gradient).all() else name

    def after_step(self) -> None:
        self.first_name = ""

    def forget(self) -> None:
        self.first_name = ""


def raise_divergence(
    watch: FirstNonFinite, mesh: Mesh, step: int, *, loss: float, norm: float
) -> None:
    """Raise TrainingDiverged on every rank: see `Job.check_finite`. Collective."""
    with mesh.comm.label("check"):
        names = ops.all_gather_bytes(watch.pop().encode(), mesh.world)
    name, rank = next(((n.decode(), rank) for rank, n in enumerate(names) if n), ("", 0))
    if name:
        cause = f"first in the gradient of {name} on rank {rank}"
    elif math.isfinite(norm):
        cause = "but all gradients are finite"
    else:
        cause = "but each rank's own gradients are finite: their sum overflowed"
    raise TrainingDiverged(
        f"step {step}: loss {loss}, gradient norm {norm}, {cause}; no weight was updated; "
        "lower the learning rate, lengthen the warm-up or look at that rank's batch"
    )
