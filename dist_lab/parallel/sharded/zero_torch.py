"""PyTorch's own ZeRO-1, the twin of zero.py: its DDP, and then ZeroRedundancyOptimizer.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward
                                                  W -> W           from the rank that steps on it

Each parameter belongs to one rank as a whole, and the ranks' shares are about equal. The optimizer
steps on this rank's share only; then each rank broadcasts its share in one message, because its
parameters are views into one buffer. Without `job.optimizer` this is plain DDP.

The library's `overlap_with_ddp` is off. With it the first two steps update nothing, as its
documentation says, and no comparison would hold.

Cost per step: 2 (N-1)/N P elements sent for gradients, and P/N to each other rank for parameters.
Memory per rank: all of parameters and gradients, 1/N of the optimizer's state. Rajbhandari et al.
2020 (arXiv:1910.02054).
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.parallel.ddp_wrapper import apply_ddp
from dist_lab.step.protocol import Applied
from dist_lab.step.setup import Setup


def apply(setup: Setup, *, bucket_mb: float = 25.0, find_unused: bool = False) -> Applied:
    """Hand the gradients to DistributedDataParallel, and the optimizer to ZeroRedundancyOptimizer.

    Args:
        bucket_mb, find_unused: as in replicated/ddp_torch.py.

    Raises:
        UserError: for trained parameters of several dtypes, which cannot share one buffer.
    """
    dtypes = {setup.layouts[name].dtype for name in setup.trained}
    if setup.axis.size > 1 and len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(
            "ZeroRedundancyOptimizer takes trained parameters of one dtype, this model has "
            f'{names}; give impl="hand"'
        )
    applied = apply_ddp(setup, bucket_mb=bucket_mb, find_unused=find_unused)
    if setup.axis.size == 1:
        return applied
    about = (
        f"{applied.about}, torch ZeroRedundancyOptimizer(parameters_as_bucket_view=True, "
        "overlap_with_ddp=False)"
    )
    return replace(applied, about=about, make_optimizer=partial(_sharded_optimizer, setup.axis))


def _sharded_optimizer(
    axis: Axis,
    cls: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    with warnings.catch_warnings():  # its imports use parts of torch that are deprecated
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer  # half a second

    return ZeroRedundancyOptimizer(
        groups,
        optimizer_class=cls,
        process_group=axis.group,
        parameters_as_bucket_view=True,
        overlap_with_ddp=False,
        **options,
    )
