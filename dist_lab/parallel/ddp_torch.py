"""PyTorch's own DDP, the twin of ddp.py: buckets, overlap and sums are the library's.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

Cost per step: 2 (N-1)/N P elements sent, in buckets of 25 MiB after a first of 1 MiB. Memory per
rank: all of everything. Li et al. 2020 (arXiv:2006.15704).
"""

from torch import nn

from dist_lab.mesh import Axis
from dist_lab.parallel.sync import Applied, Chain, whole
from dist_lab.parallel.wrapped import wrap_in_ddp


def apply(
    model: nn.Module, axis: Axis, *, bucket_mb: float = 25.0, find_unused: bool = False
) -> Applied:
    """Hand the gradients to DistributedDataParallel.

    Args:
        bucket_mb: MiB in a bucket.
        find_unused: allow parameters without a gradient, at the price of a walk over the graph in
            every step. Without it the library raises an error about them in the second step.
    """
    laid = whole(model, axis)
    if axis.size == 1:
        return Applied(laid, Chain())
    sync, about = wrap_in_ddp(model, axis, bucket_mb=bucket_mb, find_unused=find_unused)
    return Applied(laid, sync, about)
