"""Buffers: what a module remembers and no gradient moves, such as the statistics of BatchNorm.

[Note: buffers] While it trains, a rank's buffers are its own: nobody overwrites what it has
measured. Where the ranks must be one model, before `job.evaluate` and in `job.full_state_dict`,
running means and variances become those of all ranks together:

    mean = mean of the means        variance = mean of the variances + variance of the means

(the law of total variance, each rank counting alike). Any other buffer is taken to be equal, and
full_state_dict gives rank 0's. Broadcasting rank 0's statistics in every forward, the custom
elsewhere, throws away what all other ranks have seen. SyncBatchNorm keeps them equal by itself.
"""

import torch
from torch import nn

from dist_lab.comm.ops import all_gather
from dist_lab.mesh.mesh import Axis
from dist_lab.torch_private import StatisticsNorm
from dist_lab.transforms.batchnorm import SyncBatchNorm


def merge_statistics(model: nn.Module, axis: Axis) -> None:
    """Running statistics of every normalization layer, made those of all ranks, in place.

    One all_gather, none if there are no such layers. Merging again changes nothing.
    """
    layers = [
        (m.running_mean, m.running_var)
        for m in model.modules()
        if isinstance(m, StatisticsNorm) and not isinstance(m, SyncBatchNorm)
    ]
    pairs = [(mean, var) for mean, var in layers if mean is not None and var is not None]
    if not pairs or axis.size == 1:
        return
    mine = torch.cat([torch.stack(pair).double().flatten(1) for pair in pairs], 1)  # (2, C)
    means, variances = all_gather(mine[None], axis).unbind(1)  # (N, C) each
    merged = torch.stack([means.mean(0), variances.mean(0) + means.var(0, correction=0)])
    lengths = [mean.numel() for mean, _ in pairs]
    for (mean, variance), both in zip(pairs, merged.split(lengths, 1), strict=True):
        mean.copy_(both[0])
        variance.copy_(both[1])
