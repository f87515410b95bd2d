"""BatchNorm over the rows of all ranks, as if they were on one.

    x[B_dp, C, ...] -> mean[C], variance[C] over all of B -> y[B_dp, C, ...]

Each rank measures its own rows; the numbers, the means and the sums of squares are gathered, and
put together by the rule for two samples of Chan, Golub and LeVeque 1979 ("Updating formulae and a
pairwise algorithm for computing sample variances"), which is exact and cancels nothing. What is
gathered depends on every rank's rows, so backward is the conjugate, a reduce-scatter: `all_gather`
in comm/autograd.py. Cost per layer: one all_gather of 2C + 1 numbers a rank in forward, and one
reduce_scatter of as many in backward. Ioffe & Szegedy 2015 (arXiv:1502.03167).

[Note: buffers] Without it each rank trains with statistics of its own rows, and its buffers are its
own: nobody overwrites what it has measured. Where the ranks must be one model, before
`job.evaluate` and in `job.full_state_dict`, running means and variances become those of all ranks
together:

    mean = mean of the means        variance = mean of the variances + variance of the means

(the law of total variance, each rank counting alike). InstanceNorm's variance is a mean over the
rows of each row's own, so of ranks it is the mean of the variances alone. Any other buffer is taken
to be equal, and full_state_dict gives rank 0's. Broadcasting rank 0's statistics in every forward,
the custom elsewhere, throws away what all other ranks have seen. SyncBatchNorm keeps them equal by
itself.
"""

import torch
from torch import Tensor, nn

from dist_lab.comm import autograd, ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import StaysBehind
from dist_lab.torch_private import AnyBatchNorm, StatisticsNorm

InstanceNorms = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


def convert_batchnorm(model: nn.Module, axis: Axis) -> None:
    """Put a SyncBatchNorm in the place of every BatchNorm, with its parameters and buffers.

    Args:
        axis: a channel of its own (`mesh.channel`), as statistics and gradient buckets have no
            common order.

    Raises:
        UserError: there is none, or it is the model itself.
    """
    modules = model.named_modules(remove_duplicate=False)  # one may have two places
    found = [(n, m) for n, m in modules if isinstance(m, AnyBatchNorm)]
    made: dict[AnyBatchNorm, SyncBatchNorm] = {}
    if not found:
        raise UserError("there is no BatchNorm in this model to synchronize")
    for name, module in found:
        parent, _, child = name.rpartition(".")
        if not name:
            raise UserError("a BatchNorm alone cannot be replaced in place; put it in a module")
        if module not in made:
            made[module] = SyncBatchNorm(module, axis)
        setattr(model.get_submodule(parent), child, made[module])


class SyncBatchNorm(StaysBehind, AnyBatchNorm):
    """x (B, C, ...) -> (B, C, ...). Every rank calls it, with any number of rows, even none.

    In eval mode it is BatchNorm: running statistics, if it has any, and then nothing is sent. A
    copy, or what is read back from a pickle, is the BatchNorm that it has taken the place of.
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
        over = [0, *range(2, x.dim())]
        if rows:
            variance, mean = torch.var_mean(wide, over, correction=0)  # (C,), of this rank's rows
        else:
            variance = mean = wide.sum(over)  # zeros, through which backward still comes by
        mine = torch.cat([mean, variance * rows, mean.new_full((1,), rows)])
        everyone = autograd.all_gather(mine[None], self.axis, 0)  # (N, 2C + 1)
        means, squares, counts = everyone.split([self.num_features, self.num_features, 1], 1)
        counts = counts.detach()  # numbers of rows have no gradient
        total = counts.sum()
        if self.training and total < 2:
            raise UserError(
                f"BatchNorm in training needs 2 values a channel or more, all ranks together have "
                f"{int(total)}; give a larger batch"
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
        """The BatchNorm that this one was, with the same parameters and buffers."""
        made = self.kind(self.num_features, self.eps, self.momentum, affine=False)
        made.affine, made.track_running_stats = self.affine, self.track_running_stats
        made._parameters, made._buffers = self._parameters, self._buffers
        return made.train(self.training)

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None, self
        assert self.running_var is not None, self
        assert self.num_batches_tracked is not None, self
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dims: what is replaced may be of 1d, 2d or 3d."""


def merge_statistics(model: nn.Module, axis: Axis) -> None:
    """Make the running statistics of every normalization layer those of all ranks, in place.

    One all_gather, none if there are no such layers. Merging again changes nothing.
    """
    layers = [
        (m.running_mean, m.running_var, not isinstance(m, InstanceNorms))
        for m in model.modules()
        if isinstance(m, StatisticsNorm) and not isinstance(m, SyncBatchNorm)
    ]
    kept = [(mean, var, law) for mean, var, law in layers if mean is not None and var is not None]
    if not kept or axis.size == 1:
        return
    pairs = [(mean, variance) for mean, variance, _ in kept]
    lengths = [mean.numel() for mean, _ in pairs]
    over_all = torch.tensor([float(law) for _, _, law in kept]).double()
    over_all = over_all.repeat_interleave(torch.tensor(lengths))  # (C,): 0 for InstanceNorm
    mine = torch.cat([torch.stack(pair).double().flatten(1) for pair in pairs], 1)  # (2, C)
    means, variances = ops.all_gather(mine[None], axis).unbind(1)  # (N, C) each
    between = means.var(0, correction=0) * over_all.to(means.device)
    merged = torch.stack([means.mean(0), variances.mean(0) + between])
    for (mean, variance), both in zip(pairs, merged.split(lengths, 1), strict=True):
        mean.copy_(both[0])
        variance.copy_(both[1])
