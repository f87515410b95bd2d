"""PyTorch's own DDP, the twin of ddp.py: buckets, overlap and sums are the library's.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

It runs with gradients as views into its buckets, its fastest documented configuration, and without
its broadcast of buffers, which would overwrite what a rank has measured by what rank 0 has.

Cost per step: 2 (N-1)/N P elements sent, in buckets of 25 MiB after a first of 1 MiB. Memory per
rank: all of everything. Li et al. 2020 (arXiv:2006.15704).
"""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_lab.mesh import Axis
from dist_lab.parallel.sync import Applied, Chain, whole
from dist_lab.parallel.wrapped import ThroughDDP


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
    ddp = DistributedDataParallel(
        model,
        process_group=axis.group,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        forward_sync_buffers=False,
        init_sync=False,  # parallelize() has seen to it
    )
    about = (
        f"torch DistributedDataParallel(bucket_cap_mb={bucket_mb:g}, gradient_as_bucket_view=True, "
        f"find_unused_parameters={find_unused}, forward_sync_buffers=False)"
    )
    return Applied(laid, ThroughDDP(ddp, axis), about)
