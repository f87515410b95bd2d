"""Stops all ranks in the same step if the loss or a gradient is not finite, and names the culprit.

`FirstNonFinite` records the first gradient of this rank that is not finite, before it is summed
over ranks: after the sum every rank has the NaN, and no rank can tell which rank it came from. So
this Sync is before the strategy in the chain. It costs one pass over each gradient.

[Note: one verdict] Ranks that hold copies of a number each compute their own: under tp each rank
has its own loss, and its own gradient of a norm's weight. A bit that breaks on one of them makes
the norm NaN on that rank alone. If it stopped alone, the others would wait for it until the
timeout. So all ranks agree first, with one byte. Under fsdp and pp nothing is sent: every parameter
is sharded there, so the norm is a sum over the ranks, and the same on all of them already.
"""

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import TrainingDiverged
from dist_lab.layout.gather import Layouts
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import DATA_AXES, ORDER
from dist_lab.step.protocol import Sync


class FirstNonFinite(Sync):
    """Holds the name of the first parameter of this step whose gradient is not finite.

    leaves: name -> the autograd leaf, whose `.grad` is not summed over ranks yet.
    accumulates: `.grad` accumulates all micro-batches, so we check it only after the last one:
        a NaN in one micro-batch stays in the sum.
    """

    def __init__(self, leaves: Mapping[str, Tensor], *, accumulates: bool = False) -> None:
        self.leaves, self.accumulates = leaves, accumulates
        self.first_name = self.first_sum = ""  # before and after the sum over ranks

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        if not self.first_name and (last or not self.accumulates):
            self.first_name = first_non_finite({name: self.leaves[name].grad for name in names})

    def look_at_sums(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Record the first gradient that is not finite now, after the sum over ranks."""
        self.first_sum = first_non_finite(gradients)

    def after_step(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.first_name = self.first_sum = ""


def first_non_finite(gradients: Mapping[str, Tensor | None]) -> str:
    """The name of the first gradient with a NaN or an infinity; "" if all are finite."""
    for name, gradient in gradients.items():
        # A sum is the cheapest pass that keeps any NaN or infinity. But a sum of finite values may
        # overflow, so isfinite() confirms it.
        if gradient is None or gradient.sum().isfinite():
            continue
        if not torch.isfinite(gradient).all():
            return name
    return ""


def may_differ(layouts: Layouts, mesh: Mesh) -> bool:
    """Whether loss or norm may differ between ranks: see [Note: one verdict].

    The loss is summed over pp and the data axes. The norm is summed over an axis if all parameters
    are sharded over it.
    """
    same = {"pp", *DATA_AXES}.intersection(*(dict(layout.splits) for layout in layouts.values()))
    return any(mesh[axis].size > 1 for axis in ORDER if axis not in same)


def stop_if_not_finite(
    watch: FirstNonFinite, mesh: Mesh, step: int, loss: float, norm: float, differ: bool
) -> None:
    """Raise TrainingDiverged on every rank: see `Job.check_finite`. Collective.

    Args:
        differ: loss or norm may differ between ranks.
    """
    is_bad = not (math.isfinite(loss) and math.isfinite(norm))
    with mesh.comm.label("check"):
        if differ:
            flag = torch.tensor([is_bad], dtype=torch.uint8, device=mesh.device)
            is_bad = bool(ops.all_reduce(flag, mesh.world, "max"))
        if not is_bad:
            return
        own = json.dumps([watch.first_name, watch.first_sum, loss, norm]).encode()
        found = [json.loads(text) for text in ops.all_gather_bytes(own, mesh.world)]
    watch.forget()
    first_names, first_sums, losses, norms = zip(*found, strict=True)
    loss, norm = (next((x for x in xs if not math.isfinite(x)), xs[0]) for xs in (losses, norms))
    if name := next(filter(None, first_names), ""):
        cause = f"first in the gradient of {name} on rank {first_names.index(name)}"
    elif name := next(filter(None, first_sums), ""):
        cause = (
            "each rank's own gradients are finite, but not their sum: first in the gradient of "
            f"{name} on rank {first_sums.index(name)}"
        )
    else:
        cause = "but all gradients are finite"
    raise TrainingDiverged(
        f"step {step}: loss {loss}, gradient norm {norm}, {cause}; no weight was updated; "
        "lower the learning rate, lengthen the warm-up or look at that rank's batch"
    )
