"""Differentiable collectives, as a table of conjugate pairs.

A collective is a linear map, so its backward is its transpose, and the transpose of a collective is
another collective:

    name             forward          backward         from          to
    replicate        identity         all_reduce       one copy      each its own  Megatron's f
    reduce           all_reduce       identity         each its own  one copy      Megatron's g
    scatter          slice            all_gather       one copy      shards
    gather           all_gather       slice            shards        one copy
    spread           all_gather       reduce_scatter   shards        each its own  before a matmul
    reduce_scatter   reduce_scatter   all_gather       each its own  shards        after a matmul
    all_reduce       all_reduce       all_reduce       each its own  each its own
    all_to_all       all_to_all       all_to_all       shards        shards

"one copy" is a tensor every rank holds alike, and uses alike: it counts once. "each its own" is
used differently by each rank. Which transpose is right depends on that, not on the forward:
`reduce` and `all_reduce` move the same bytes and have different backwards. f and g:
Shoeybi et al. 2019 (arXiv:1909.08053); spread and reduce_scatter around a matmul: sequence
parallelism, Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh import Axis

Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map and its transpose, which is one too: gradients of any order work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, transpose: Map) -> Tensor:
        ctx.forward_map, ctx.transpose_map = forward, transpose
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(dy[0], ctx.transpose_map, ctx.forward_map), None, None


def replicate(x: Tensor, axis: Axis) -> Tensor:
    """x -> x; backward sums dx{U_X} -> dx. Before work that each rank does a part of."""
    return _Linear.apply(x, _identity, _sum(axis))


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """x{U_X} -> x; backward is the identity. After such work."""
    return _Linear.apply(x, _sum(axis), _identity)


def scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D] -> x[D_X]: this rank's piece of what all hold."""
    return _Linear.apply(x, _slice(axis, dim), _gather(axis, dim))


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D_X] -> x[D], which every rank then uses alike."""
    return _Linear.apply(x, _gather(axis, dim), _slice(axis, dim))


def spread(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D_X] -> x[D], which each rank then uses in its own way: backward dx[D]{U_X} -> dx[D_X]."""
    return _Linear.apply(x, _gather(axis, dim), _reduce_scatter(axis, dim))


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """x[D]{U_X} -> x[D_X]."""
    return _Linear.apply(x, _reduce_scatter(axis, dim), _gather(axis, dim))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """x{U_X} -> x, where each rank goes on to a loss of its own and the losses add up."""
    return _Linear.apply(x, _sum(axis), _sum(axis))


def all_to_all(x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
    """x[A_X, B] -> x[A, B_X]."""
    return _Linear.apply(
        x, _all_to_all(axis, split_dim, concat_dim), _all_to_all(axis, concat_dim, split_dim)
    )


# --- the maps. Each returns a new tensor, as autograd demands -------------------------------------


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(axis: Axis) -> Map:
    return lambda x: ops.all_reduce(x, axis) if axis.size > 1 else _identity(x)


def _gather(axis: Axis, dim: int) -> Map:
    return lambda x: ops.all_gather(x, axis, dim) if axis.size > 1 else _identity(x)


def _reduce_scatter(axis: Axis, dim: int) -> Map:
    return lambda x: ops.reduce_scatter(x, axis, dim) if axis.size > 1 else _identity(x)


def _all_to_all(axis: Axis, split_dim: int, concat_dim: int) -> Map:
    return lambda x: (
        ops.all_to_all(x, axis, split_dim, concat_dim) if axis.size > 1 else _identity(x)
    )


def _slice(axis: Axis, dim: int) -> Map:
    def piece(x: Tensor) -> Tensor:
        assert x.shape[dim] % axis.size == 0, (tuple(x.shape), dim, axis.size)
        return x.chunk(axis.size, dim)[axis.index].clone()

    return piece
