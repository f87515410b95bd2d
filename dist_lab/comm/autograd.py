"""Differentiable collectives, as a table of conjugate pairs.

A collective is a linear map, so its backward is its transpose, and the transpose of a collective is
another collective:

    name               forward      backward         input        output
    scatter            slice        all_gather       replicated   shards
    gather_replicated  all_gather   slice            shards       replicated
    all_gather         all_gather   reduce_scatter   shards       used by each rank in its own way

A replicated tensor is equal on all ranks and used in the same way, so its gradient is not summed.
The use of the output decides which transpose is right: `gather_replicated` and `all_gather` send
the same bytes in forward, and differ in backward. Sequence parallelism has an all_gather before a
matmul: Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis

Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map and its transpose, which is linear too: gradients of any order work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, transpose: Map) -> Tensor:
        ctx.forward_map, ctx.transpose_map = forward, transpose
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(dy[0], ctx.transpose_map, ctx.forward_map), None, None


def scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D] -> x[D_X]: this rank's shard of a replicated tensor."""
    return _Linear.apply(x, _slice(axis, dim), _gather(axis, dim))


def gather_replicated(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D_X] -> x[D], which all ranks then use in the same way."""
    return _Linear.apply(x, _gather(axis, dim), _slice(axis, dim))


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D_X] -> x[D], which each rank then uses in its own way. Backward: dx[D]{U_X} -> dx[D_X]."""
    return _Linear.apply(x, _gather(axis, dim), _reduce_scatter(axis, dim))


def linear_map(x: Tensor, forward: Map, transpose: Map) -> Tensor:
    """Returns forward(x). Its backward is `transpose`. Gradients of any order work."""
    return _Linear.apply(x, forward, transpose)


# --- the linear maps. Each returns a new tensor, as autograd requires -----------------------------


def identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def _gather(axis: Axis, dim: int) -> Map:
    return lambda x: ops.all_gather(x, axis, dim) if axis.size > 1 else identity(x)


def _reduce_scatter(axis: Axis, dim: int) -> Map:
    return lambda x: ops.reduce_scatter(x, axis, dim) if axis.size > 1 else identity(x)


def _slice(axis: Axis, dim: int) -> Map:
    def shard(x: Tensor) -> Tensor:
        assert x.shape[dim] % axis.size == 0, (tuple(x.shape), dim, axis.size)
        return x.chunk(axis.size, dim)[axis.index].clone()

    return shard
