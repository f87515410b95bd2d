"""The keys and values of a paged cache, and attention to those of a sequence.

    memory of a layer      (2, blocks, size, K, Dh)      keys, then values
    write                  the new tokens of all sequences at once, each to its slot
    read                   the blocks of one sequence, gathered into one piece

A slot is a place for one token: block x size + its place in the block. The gather copies the keys
and values of a sequence, which is little beside the weights that a step reads. Kernels for GPUs
read the blocks where they are instead (arXiv:2309.06180, section 4.1).

Letters: N new tokens of a step, T of one sequence, S its tokens so far, H, K, Dh as in cache.py.
"""

from collections import abc

import torch
from torch import Tensor

from dist_lab.inference.blocks import Pool
from dist_lab.inference.stage import Stage
from dist_lab.inference.step import Part
from dist_lab.zoo.gpt import causal_attention


class Memory:
    """The keys and values in all blocks of a pool, for each layer of a stage."""

    def __init__(self, stage: Stage, pool: Pool) -> None:
        self._pool, self._device = pool, stage.mesh.device
        self._layers = [Layer(pool.total, pool.size) for _ in stage.layers]

    @torch.inference_mode()
    def prepare(self, parts: abc.Sequence[Part]) -> list["Rows"]:
        """Copy the blocks that are to be copied. Returns a cache for a step: see step.py."""
        for layer in self._layers:
            layer.copy(self._pool.copies)
        self._pool.copies.clear()
        size = self._pool.size
        slots: list[int] = []
        tables: list[Tensor] = []
        for sequence, count in parts:
            blocks, seen = sequence.table.blocks, sequence.seen
            slots += [blocks[at // size] * size + at % size for at in range(seen, seen + count)]
            tables.append(torch.tensor(blocks[: self._pool.blocks_for(seen + count)]))
        counts = [count for _, count in parts]
        lengths = [sequence.seen + count for sequence, count in parts]
        where = torch.tensor(slots).to(self._device)
        tables = [table.to(self._device) for table in tables]
        return [Rows(layer, where, tables, counts, lengths) for layer in self._layers]


class Layer:
    """The keys and values of one layer. Memory is taken when the first ones come."""

    def __init__(self, blocks: int, size: int) -> None:
        self._blocks, self._size = blocks, size
        self._memory: Tensor | None = None

    def like(self, k: Tensor) -> Tensor:
        """The memory (2, blocks, size, K, Dh), of the dtype and heads of k (1, K, N, Dh)."""
        if self._memory is None:
            self._memory = k.new_empty(2, self._blocks, self._size, k.size(1), k.size(3))
        return self._memory

    def copy(self, copies: abc.Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            assert self._memory is not None
            self._memory[:, target] = self._memory[:, source]


class Rows:
    """The `Past` of one layer for one step: new tokens of several sequences lie in one row of N.

    Args:
        slots: (N,), of each new token.
        tables: of each sequence, the blocks of its S tokens.
        counts: of each sequence, its number T of new tokens.
        lengths: of each sequence, S: with the new tokens.
    """

    def __init__(
        self, layer: Layer, slots: Tensor, tables: list[Tensor], counts: list[int],
        lengths: list[int],
    ) -> None:  # fmt: skip
        self._layer, self._slots, self._tables = layer, slots, tables
        self._counts, self._lengths = counts, lengths

    def positions(self, new: int) -> Tensor:
        each = zip(self._counts, self._lengths, strict=True)
        return torch.cat([torch.arange(length - count, length) for count, length in each])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory = self._layer.like(k)
        new = torch.cat([k, v]).transpose(1, 2)  # 2 of (1, K, N, Dh) -> (2, N, K, Dh)
        memory.flatten(1, 2).index_copy_(1, self._slots, new)
        outs = []
        each = zip(q.split(self._counts, dim=2), self._tables, self._lengths, strict=True)
        for queries, blocks, length in each:
            gathered = memory.index_select(1, blocks).flatten(1, 2)[:, :length]  # (2, S, K, Dh)
            keys, values = gathered.transpose(1, 2).split(1)  # 2 of (1, K, S, Dh)
            outs.append(causal_attention(queries, keys, values))
        return torch.cat(outs, dim=2)  # (1, H, N, Dh)
