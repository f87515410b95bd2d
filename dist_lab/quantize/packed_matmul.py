"""A product with a packed matrix that never makes the whole matrix.

    y[M, F] = x[M, D] . W[D, F]

Generating text is bound by memory: for one row of x every weight is read once, and used once. Codes
of 4 bits are an eighth of the bytes. That is lost if W is made first, written to memory, and read
again. So a tile of inputs at a time is unpacked into memory that stays in the cache, and is
multiplied:

    for a tile of inputs d0..d1, all in one group g:
        y += (x[:, d0:d1] . (codes[d0:d1] - zero[g])) * scale[g]

The scale is taken out of the sum: it multiplies y, not each weight. The peak is one tile,
`TILE x F` numbers of 4 bytes twice: the codes as integers, and as numbers to multiply.

[Note: order of inputs] With act-order the inputs of a group are scattered: g_idx is 3, 0, 7, 3 ...
Then each weight needs its own scale. Like exllama we sort the inputs by group once, and afterwards
multiply x[:, order]: a permutation of one row costs nothing beside a matrix. The sorted words are a
second copy of the matrix; without act-order there is none.

The source of the idea is exllama (turboderp 2023), `q4_matrix.cu`, where the tile is a block of
threads' registers.

Letters: M rows of x, F outputs, D inputs, G groups.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dist_lab.quantize.packing import BLOCK, Packed, pack_words, unpack_blocks

TILE = 128  # inputs


@dataclass(frozen=True)
class Tile:
    """Inputs from `start` to `stop`, a multiple of 32 apart. `group`: theirs; None: several."""

    start: int
    stop: int
    group: int | None


@dataclass(frozen=True)
class SortedWeight:
    """A packed matrix whose inputs are sorted by group.

    words: (ceil(D/32) * b, F) int32
    scales: (G, F)
    zeros: (G, F) int32, of the unsigned codes
    groups: (D,) int64, ascending
    order: (D,) int64, so that x[:, order] fits; None: x fits as it is
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    order: Tensor | None
    tiles: tuple[Tile, ...]
    bits: int


def sorted_by_group(packed: Packed, tile: int = TILE) -> SortedWeight:
    """Sort the inputs of a matrix by group. The words are shared if they are sorted already.

    Args:
        tile: the most inputs of a tile, a multiple of 32.
    """
    assert tile % BLOCK == 0, tile
    groups = packed.g_idx.long()
    order = None
    words = packed.qweight
    if bool((groups.diff() < 0).any()):
        order = groups.argsort(stable=True)
        groups = groups[order]
        words = pack_words(packed.codes()[order], packed.scheme.bits)
    return SortedWeight(
        words, packed.scales, packed.zeros().int(), groups, order, _tiles(groups, tile),
        packed.scheme.bits,
    )  # fmt: skip


def packed_matmul(x: Tensor, weight: SortedWeight) -> Tensor:
    """x (M, D) -> (M, F), in the dtype of x. Sums are in float32 or more.

    Equal to `x @ W` up to rounding. Not for training: autograd would keep every tile.
    """
    if weight.order is not None:
        x = x[:, weight.order]
    precise = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(x.size(0), weight.words.size(1), dtype=precise)
    scales = weight.scales.to(precise)
    for tile in weight.tiles:
        rows = slice(tile.start // BLOCK * weight.bits, -(-tile.stop // BLOCK) * weight.bits)
        codes = unpack_blocks(weight.words[rows], weight.bits)[: tile.stop - tile.start]
        part = x[:, tile.start : tile.stop]
        if tile.group is not None:
            codes = codes.sub_(weight.zeros[tile.group]).to(x.dtype)  # whole numbers: exact
            y.addcmul_((part @ codes).to(precise), scales[tile.group])
        else:
            groups = weight.groups[tile.start : tile.stop]
            codes = codes.sub_(weight.zeros[groups])
            y += part.to(precise) @ (codes * scales[groups])
    return y.to(x.dtype)


def _tiles(groups: Tensor, size: int) -> tuple[Tile, ...]:
    """Tiles of one group each if groups begin at multiples of 32, else of several groups."""
    inputs = groups.numel()
    starts = [0, *(groups.diff().nonzero().flatten() + 1).tolist(), inputs]
    if any(start % BLOCK for start in starts[:-1]):
        return tuple(
            Tile(start, min(start + size, inputs), None) for start in range(0, inputs, size)
        )
    return tuple(
        Tile(first, min(first + size, stop), int(groups[start]))
        for start, stop in pairwise(starts)
        for first in range(start, stop, size)
    )
