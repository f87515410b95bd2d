"""The two ends of a language model, split by vocabulary: rank r knows the tokens of one range.

    embedding    tokens[B, T] -> x[B, T, D]{U_tp}     rows of others' tokens are zeros here; summed
    logits       x[B, T, D] . W[D, V_tp] -> [B, T, V_tp]      and never put together:

    loss = log sum over V of exp(logits) - logits[target]

Of each token a rank gives three numbers: the largest of its logits, the sum of their exponentials
relative to that, and the target's logit if it is here. They are merged as partial softmaxes are
(Milakov and Gimelshein 2018, arXiv:1805.02867, eq. 4). That is one all_gather of 3 numbers a token
and rank, instead of V of each: (N-1) 3 B T elements sent; and nothing in backward, for
d logits = softmax - one at the target needs only what is here. Ranges need not be equal, and may be
empty. Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_lab.comm.autograd import Map, identity, linear_map
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.errors import UserError
from dist_lab.layout.layout import shard_bounds
from dist_lab.mesh.mesh import Axis

IGNORED = -100  # the target that is left out, as torch's cross_entropy has it


@dataclass(frozen=True)
class SplitLogits:
    """Logits of which a rank holds those of its range of the vocabulary. They know their own loss.

    Attributes:
        here: (..., V_tp).
        size: of the whole vocabulary.
        scratch: what the loss is put together through.
    """

    here: Tensor
    size: int
    scratch: Scratch

    def cross_entropy_sum(self, targets: Tensor) -> Tensor:
        """What `dist_lab.cross_entropy_sum` gives of the whole logits, on every rank."""
        wide = self.here if self.here.dtype.itemsize >= 4 else self.here.float()
        rows, wanted = wide.flatten(0, -2), targets.flatten()  # (N, V_tp), (N,)
        axis = self.scratch.axis
        first, _ = shard_bounds(self.size, axis.size, axis.index)
        return _CrossEntropy.apply(rows, wanted, first, self.size, self.scratch)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> NoReturn:
        raise UserError(
            f"{getattr(function, '__name__', function)} on logits that are split over the ranks by "
            "vocabulary; job.cross_entropy_sum(output, target) is the loss, and for whole logits "
            'give the head "colwise_gather_output" in the plan'
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for these itself
            raise AttributeError(name)
        self.__torch_function__(name, ())


class _CrossEntropy(torch.autograd.Function):
    """rows (N, V_tp), wanted (N,) -> the sum of their losses."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, wanted: Tensor, first: int, size: int, scratch: Scratch
    ) -> Tensor:
        counted = wanted != IGNORED
        if bool(((wanted < 0) | (wanted >= size))[counted].any()):
            raise IndexError(f"a target is outside of the {size} classes")
        column = wanted - first  # (N,)
        is_here = (column >= 0) & (column < rows.shape[1])
        column = torch.where(is_here, column, 0)[:, None]
        if rows.shape[1]:
            top = rows.amax(1)  # (N,)
            total = torch.exp(rows - top[:, None]).sum(1)
            chosen = rows.gather(1, column)[:, 0].where(is_here, 0)
        else:
            top = rows.new_full((len(rows),), -torch.inf)
            total = chosen = rows.new_zeros(len(rows))
        mine = torch.stack([top, total, chosen])[None]  # (1, 3, N)
        tops, totals, chosens = scratch.all_gather(mine, 0).wait().unbind(1)  # each (tp, N)
        top = tops.amax(0)
        log_total = top + (totals * torch.exp(tops - top)).sum(0).log()
        ctx.save_for_backward(rows, log_total, column, is_here, counted)
        ctx.summed = partial(_summed, scratch)
        return ((log_total - chosens.sum(0)) * counted).sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, log_total, column, is_here, counted = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will take the derivative of this
            dy = linear_map(dy, identity, ctx.summed)  # one copy, of which each rank uses its part
            log_total = _LogTotal.apply(rows, log_total, ctx.summed)
        gradient = torch.exp(rows - log_total[:, None])  # softmax, of which V_tp are here
        here = -is_here.to(gradient.dtype)[:, None]
        if torch.is_grad_enabled():
            gradient = gradient.scatter_add(1, column, here) if rows.shape[1] else gradient
            return gradient * (counted * dy)[:, None], None, None, None, None
        if rows.shape[1]:
            gradient.scatter_add_(1, column, here)
        return gradient.mul_((counted * dy)[:, None]), None, None, None, None


class _LogTotal(torch.autograd.Function):
    """rows (N, V_tp) -> log sum over V of exp(rows), which is known; its derivative is softmax."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, log_total: Tensor, summed: Map) -> Tensor:
        ctx.save_for_backward(rows, log_total)
        ctx.summed = summed
        return log_total.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        rows, log_total = ctx.saved_tensors
        if torch.is_grad_enabled():
            log_total = _LogTotal.apply(rows, log_total, ctx.summed)
        dy = linear_map(dy, ctx.summed, ctx.summed)  # dy{U_tp} -> dy, which each rank uses
        return torch.exp(rows - log_total[:, None]) * dy[:, None], None, None


def _summed(scratch: Scratch, x: Tensor) -> Tensor:
    return identity(scratch.all_reduce(x).wait())


def look_up(tokens: Tensor, weight: Tensor, size: int, padding: int | None, axis: Axis) -> Tensor:
    """tokens (...) -> (..., D){U_tp}: the rows that lie here, weight (V_tp, D), and zeros.

    Args:
        size: of the whole vocabulary.
        padding: the token whose row is not trained.
    """
    first, stop = shard_bounds(size, axis.size, axis.index)
    if bool(((tokens < 0) | (tokens >= size)).any()):
        raise IndexError(f"a token is outside of the vocabulary of {size}")
    is_here = (tokens >= first) & (tokens < stop)
    if stop == first:
        return weight.sum() + weight.new_zeros(*tokens.shape, weight.shape[1])  # a gradient of 0
    own = padding - first if padding is not None and first <= padding < stop else None
    found = F.embedding(torch.where(is_here, tokens - first, 0), weight, own)
    return found.masked_fill(~is_here[..., None], 0)


def check_embedding(name: str, module: nn.Embedding) -> None:
    """Raises UserError for what cannot be done on a part of the rows."""
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise UserError(
            f"{name} has max_norm or scale_grad_by_freq, which change rows by how they are used; "
            "leave it out of the plan, or make it without"
        )
