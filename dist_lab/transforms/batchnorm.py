"""SyncBatchNorm: BatchNorm over the rows of all ranks.

    x[B_dp, C, ...] -> mean[C], variance[C] over all of B -> y[B_dp, C, ...]

Each rank computes the statistics of its own rows. The row counts, means and sums of squares are
all-gathered, and combined by the rule for two samples of Chan, Golub and LeVeque 1979 ("Updating
formulae and a pairwise algorithm for computing sample variances"), which is exact and has no
cancellation. The gathered tensor depends on every rank's rows, so its backward is the transpose, a
reduce-scatter: `all_gather` in comm/autograd.py. Cost per layer: one all_gather of 2C + 1 numbers
per rank in forward, and one reduce_scatter of as many in backward. Ioffe & Szegedy 2015
(arXiv:1502.03167).

[Note: buffers] Without SyncBatchNorm each rank trains with statistics of its own rows and keeps its
own buffers; nothing overwrites them. Before `job.evaluate` and in `job.full_state_dict` all
ranks must have the same model, so we merge their running means and variances:

    mean = mean of the means        variance = mean of the variances + variance of the means

(the law of total variance, with equal weight for each rank). InstanceNorm's running variance is a
mean of the rows' own variances, so we take the mean of the ranks' variances only. Any
other buffer is taken to be equal on all ranks, and full_state_dict returns rank 0's. PyTorch's
DDP broadcasts rank 0's statistics in every forward by default, and so discards the data of all
other ranks. SyncBatchNorm keeps its buffers equal by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_lab.comm import autograd, ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import StaysBehind
from dist_lab.torch_private import AnyBatchNorm, StatisticsNorm

InstanceNorms = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


def convert_batchnorm(model: nn.Module, axis: Axis) -> None:
    """Replace every BatchNorm by a SyncBatchNorm with the same parameters and buffers.

    Args:
        axis: a channel of its own (`mesh.channel`), because ranks launch its collectives at
            different times relative to those of gradient buckets.

    Raises:
        UserError: there is no BatchNorm, or the model itself is one.
    """
    modules = model.named_modules(remove_duplicate=False)  # one module may be in two places
    batchnorms = [(n, m) for n, m in modules if isinstance(m, AnyBatchNorm)]
    replacement: dict[AnyBatchNorm, SyncBatchNorm] = {}
    if not batchnorms:
        raise UserError("there is no BatchNorm in this model to synchronize")
    for name, module in batchnorms:
        parent, _, child = name.rpartition(".")
        if not name:
            raise UserError(
                "a model that is a BatchNorm cannot be replaced in place; put it in a module"
            )
        if module not in replacement:
            replacement[module] = SyncBatchNorm(module, axis)
        setattr(model.get_submodule(parent), child, replacement[module])


class SyncBatchNorm(StaysBehind, AnyBatchNorm):
    """x (B, C, ...) -> (B, C, ...). Every rank calls it, with any number of rows, even none.

    In eval mode with running statistics it is a plain BatchNorm and sends nothing. A deep copy or a
    pickle of it is the BatchNorm that it has replaced.
    """

    def __init__(self, local: AnyBatchNorm, axis: Axis) -> None:
        super().__init__(local.num_features, local.eps, local.momentum, affine=False)
        self.axis, self.affine, self.kind = axis, local.affine, type(local)
        self.track_running_stats = local.track_running_stats
        self._parameters, self._buffers = local._parameters, local._buffers
        self.training = local.training

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        wide = x if x.dtype.itemsize >= 4 else x.float()
        rows = x.numel() // self.num_features
        dims = [0, *range(2, x.dim())]
        if rows:
            variance, mean = torch.var_mean(wide, dims, correction=0)  # (C,), of this rank's rows
        else:
            variance = mean = wide.sum(dims)  # zeros, connected to x for backward
        own = torch.cat([mean, variance * rows, mean.new_full((1,), rows)])
        gathered = autograd.all_gather(own[None], self.axis, 0)  # (N, 2C + 1)
        means, squares, counts = gathered.split([self.num_features, self.num_features, 1], 1)
        counts = counts.detach()  # row counts have no gradient
        total = counts.sum()
        if self.training and total < 2:
            raise UserError(
                f"BatchNorm in training needs at least 2 values per channel, all ranks together "
                f"have {int(total)}; use a larger batch"
            )
        mean = (counts * means).sum(0) / total
        square = (squares + counts * (means - mean).square()).sum(0)  # sum of (x - mean)^2
        if self.training and self.track_running_stats:
            self._update(mean.detach(), square.detach() / (total - 1))
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = torch.rsqrt(square / total + self.eps)
        if self.affine:
            scale = scale * self.weight
        y = (wide - mean.view(shape)) * scale.view(shape)
        if self.affine:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    @property
    def in_a_copy(self) -> AnyBatchNorm:
        """The BatchNorm that this module has replaced, with the same parameters and buffers."""
        local = self.kind(self.num_features, self.eps, self.momentum, affine=False)
        local.affine, local.track_running_stats = self.affine, self.track_running_stats
        local._parameters, local._buffers = self._parameters, self._buffers
        return local.train(self.training)

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None, self
        assert self.running_var is not None, self
        assert self.num_batches_tracked is not None, self
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any number of dims: this module replaces BatchNorm1d, 2d and 3d."""


def merge_statistics(model: nn.Module, axis: Axis) -> None:
    """Replace the running statistics of every normalization layer by those of all ranks together.

    In place, with one all_gather, or none if there are no such layers. A second merge changes
    nothing.
    """
    layers = [
        (m.running_mean, m.running_var, not isinstance(m, InstanceNorms))
        for m in model.modules()
        if isinstance(m, StatisticsNorm) and not isinstance(m, SyncBatchNorm)
    ]
    tracked = [
        (mean, var, is_batch)
        for mean, var, is_batch in layers
        if mean is not None and var is not None
    ]
    if not tracked or axis.size == 1:
        return
    pairs = [(mean, variance) for mean, variance, _ in tracked]
    lengths = [mean.numel() for mean, _ in pairs]
    between_weight = torch.tensor([float(is_batch) for _, _, is_batch in tracked]).double()
    between_weight = between_weight.repeat_interleave(
        torch.tensor(lengths)
    )  # (C,): 0 for InstanceNorm
    own = torch.cat([torch.stack(pair).double().flatten(1) for pair in pairs], 1)  # (2, C)
    means, variances = ops.all_gather(own[None], axis).unbind(1)  # (N, C) each
    between = means.var(0, correction=0) * between_weight.to(means.device)
    merged = torch.stack([means.mean(0), variances.mean(0) + between])
    for (mean, variance), new in zip(pairs, merged.split(lengths, 1), strict=True):
        mean.copy_(new[0])
        variance.copy_(new[1])


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block every module is in eval mode, and afterwards in its earlier mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
