"""PyTorch's own DDP, the twin of ddp.py: the library does the buckets, the overlap and the sums.

    In[B_dp, D] . W[D, F] -> Out[B_dp, F]         dW{U_dp} -> dW   bucket by bucket, in backward

Cost per step: 2 (N-1)/N P elements sent, in buckets of 25 MiB after a first of 1 MiB. Memory per
rank: all parameters, gradients and optimizer state. Li et al. 2020 (arXiv:2006.15704).
"""

from dist_lab.parallel.ddp_wrapper import apply_ddp
from dist_lab.step.protocol import Applied
from dist_lab.step.setup import Setup


def apply(setup: Setup, *, bucket_mb: float = 25.0, find_unused: bool = False) -> Applied:
    """Hand the gradients to DistributedDataParallel.

    Args:
        bucket_mb: MiB in a bucket.
        find_unused: allow parameters without a gradient, by a walk over the autograd graph in every
            step. Without it the library raises an error about them in the second step.
    """
    return apply_ddp(setup, bucket_mb=bucket_mb, find_unused=find_unused)
