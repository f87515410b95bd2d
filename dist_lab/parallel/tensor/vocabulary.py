"""Vocabulary parallelism: the embedding and the logits of a language model, sharded by vocabulary.

    embedding    tokens[B, T] -> x[B, T, D]{U_tp}     zeros for tokens of other ranks; then summed
    logits       x[B, T, D] . W[D, V_tp] -> [B, T, V_tp]      never gathered

    loss = log sum over V of exp(logits) - logits[target]

Each rank holds one range of the vocabulary. For each token it computes three numbers: the largest
of its logits, the sum of exp(logit - largest), and the target's logit if the target is in its
range. All ranks merge these numbers as partial softmaxes (Milakov and Gimelshein 2018,
arXiv:1805.02867, eq. 4). This takes one all_gather of 3 numbers per token instead of V: (N-1) 3 B T
elements sent. Backward sends nothing: d logits = softmax - one at the target needs only local
values. Ranges may differ in length, and may be empty. Shoeybi et al. 2019 (arXiv:1909.08053),
section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lab.comm.autograd import Map, identity, linear_map
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.errors import UserError
from dist_lab.layout.layout import shard_bounds
from dist_lab.mesh.mesh import Axis

IGNORED = -100  # a target that does not count, torch's ignore_index


@dataclass(frozen=True)
class SplitLogits:
    """Logits sharded by vocabulary, with their cross entropy.

    Attributes:
        local: (..., V_tp), this rank's range.
        size: the length of the whole vocabulary.
        scratch: for the collectives of the loss.
    """

    local: Tensor
    size: int
    scratch: Scratch

    def cross_entropy_sum(self, targets: Tensor) -> Tensor:
        """Returns, on every rank, the `dist_lab.cross_entropy_sum` of the unsharded logits."""
        wide = self.local if self.local.dtype.itemsize >= 4 else self.local.float()
        rows, flat_targets = wide.flatten(0, -2), targets.flatten()  # (N, V_tp), (N,)
        axis = self.scratch.axis
        first, _ = shard_bounds(self.size, axis.size, axis.index)
        return _CrossEntropy.apply(rows, flat_targets, first, self.size, self.scratch)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> NoReturn:
        raise UserError(
            f"{getattr(function, '__name__', function)} fails on logits sharded over the ranks "
            "by vocabulary; compute the loss by job.cross_entropy_sum(output, target), or give the "
            'head the role "colwise_gather_output" in the plan'
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python looks these up itself
            raise AttributeError(name)
        self.__torch_function__(name, ())


class _CrossEntropy(torch.autograd.Function):
    """rows (N, V_tp), targets (N,) -> the sum of their losses."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, first: int, size: int, scratch: Scratch
    ) -> Tensor:
        counted = targets != IGNORED
        if bool(((targets < 0) | (targets >= size))[counted].any()):
            raise IndexError(f"a target is outside of the {size} classes")
        column = targets - first  # (N,)
        is_local = (column >= 0) & (column < rows.shape[1])
        column = torch.where(is_local, column, 0)[:, None]
        if rows.shape[1]:
            top = rows.amax(1)  # (N,)
            total = torch.exp(rows - top[:, None]).sum(1)
            target_logit = rows.gather(1, column)[:, 0].where(is_local, 0)
        else:
            top = rows.new_full((len(rows),), -torch.inf)
            total = target_logit = rows.new_zeros(len(rows))
        local = torch.stack([top, total, target_logit])[None]  # (1, 3, N)
        tops, totals, target_logits = scratch.all_gather(local, 0).wait().unbind(1)  # each (tp, N)
        top = tops.amax(0)
        log_total = top + (totals * torch.exp(tops - top)).sum(0).log()
        ctx.save_for_backward(rows, log_total, column, is_local, counted)
        ctx.all_reduce = partial(_all_reduce, scratch)
        return ((log_total - target_logits.sum(0)) * counted).sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, log_total, column, is_local, counted = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph
            dy = linear_map(dy, identity, ctx.all_reduce)  # each rank's use of dy is partial
            log_total = _LogTotal.apply(rows, log_total, ctx.all_reduce)
        grad = torch.exp(rows - log_total[:, None])  # this rank's V_tp of the softmax
        minus_one = -is_local.to(grad.dtype)[:, None]  # at the target
        if torch.is_grad_enabled():
            grad = grad.scatter_add(1, column, minus_one) if rows.shape[1] else grad
            return grad * (counted * dy)[:, None], None, None, None, None
        if rows.shape[1]:
            grad.scatter_add_(1, column, minus_one)
        return grad.mul_((counted * dy)[:, None]), None, None, None, None


class _LogTotal(torch.autograd.Function):
    """rows (N, V_tp) -> log_total, which is passed in. Its derivative by rows is the softmax."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, log_total: Tensor, all_reduce: Map) -> Tensor:
        ctx.save_for_backward(rows, log_total)
        ctx.all_reduce = all_reduce
        return log_total.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        rows, log_total = ctx.saved_tensors
        if torch.is_grad_enabled():
            log_total = _LogTotal.apply(rows, log_total, ctx.all_reduce)
        dy = linear_map(dy, ctx.all_reduce, ctx.all_reduce)  # dy{U_tp} -> dy, used by every rank
        return torch.exp(rows - log_total[:, None]) * dy[:, None], None, None


def _all_reduce(scratch: Scratch, x: Tensor) -> Tensor:
    return identity(scratch.all_reduce(x).wait())


def look_up(tokens: Tensor, weight: Tensor, size: int, padding: int | None, axis: Axis) -> Tensor:
    """tokens (...), weight (V_tp, D) -> (..., D){U_tp}: this rank's rows, zeros for other tokens.

    Args:
        size: the length of the whole vocabulary.
        padding: the token whose row is not trained.
    """
    first, stop = shard_bounds(size, axis.size, axis.index)
    if not tokens.is_meta and bool(((tokens < 0) | (tokens >= size)).any()):
        raise IndexError(f"a token is outside of the vocabulary of {size}")
    is_local = (tokens >= first) & (tokens < stop)
    if stop == first:
        return weight.sum() + weight.new_zeros(*tokens.shape, weight.shape[1])  # zeros with a graph
    local_padding = padding - first if padding is not None and first <= padding < stop else None
    rows = F.embedding(torch.where(is_local, tokens - first, 0), weight, local_padding)
    return rows.masked_fill(~is_local[..., None], 0)
