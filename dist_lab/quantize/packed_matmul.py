"""A product with a packed matrix that never makes the whole matrix.

    y[M, F] = x[M, D] . W[D, F]

Generating text is bound by memory: for one row of x every weight is read once, and used once. Codes
of 4 bits are an eighth of the bytes. That is lost if W is made first, written to memory, and read
again. So a tile of inputs at a time is unpacked into memory that stays in the cache, and is
multiplied:

    for a tile of inputs, and each group g in it, of inputs d0..d1:
        y += (x[:, d0:d1] . (codes[d0:d1] - zero[g])) * scale[g]

The scale is taken out of the sum: it multiplies y, not each weight. The peak is one tile,
`TILE x F` numbers of 4 bytes twice: the codes as integers, and as numbers to multiply.

For many rows of x each weight is used many times, and it pays to make it once: `dequantize`.

[Note: order of inputs] With act-order the inputs of a group are scattered: g_idx is 3, 0, 7, 3 ...
Then each weight needs its own scale. Like exllama we sort the inputs by group once, and afterwards
multiply x[:, order]: a permutation of one row costs nothing beside a matrix. The sorted words are a
second copy of the matrix; without act-order there is none.

The source of the idea is exllama (turboderp 2023), `q4_matrix.cu`, where the tile is a block of
threads' registers.

Letters: M rows of x, F outputs, D inputs, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.quantize.formula import precise
from dist_lab.quantize.packing import BLOCK, Packed, pack_words, unpack_blocks

TILE = 128  # inputs


@dataclass(frozen=True)
class Tile:
    """Inputs from `start` to `stop`. `groups`: theirs, all of one size; None: of several sizes."""

    start: int
    stop: int
    groups: slice | None


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
    rows, outputs = x.size(0), weight.words.size(1)
    dtype = precise(x.dtype)
    y = x.new_zeros(rows, outputs, dtype=dtype)
    scales = weight.scales.to(dtype)
    for tile in weight.tiles:
        part = x[:, tile.start : tile.stop]
        codes = _codes(weight.words, tile.start, tile.stop, weight.bits)  # (t, F)
        if tile.groups is not None:
            zeros = weight.zeros[tile.groups, None]  # (k, 1, F): k groups in this tile
            of_groups = codes.view(zeros.size(0), -1, outputs).sub_(zeros).to(x.dtype)
            parts = part.unflatten(1, of_groups.shape[:2]).transpose(0, 1)
            products = torch.bmm(parts, of_groups).to(dtype)  # (k, M, F)
            y += products.mul_(scales[tile.groups, None]).sum(0)
        else:
            groups = weight.groups[tile.start : tile.stop]
            y += part.to(dtype) @ (codes.sub_(weight.zeros[groups]) * scales[groups])
    return y.to(x.dtype)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The whole matrix, (F, D): the bits of `unpack(packed, dtype).values()`, in less time.

    One tile after another is unpacked, too, so that only the result leaves the cache.
    """
    outputs, inputs = packed.shape
    groups, zeros, scales = packed.g_idx.long(), packed.zeros().int(), packed.scales.to(dtype)
    values = scales.new_empty(outputs, inputs)
    for start in range(0, inputs, TILE):
        stop = min(start + TILE, inputs)
        group = groups[start:stop] if zeros.size(0) > 1 else slice(None)
        codes = _codes(packed.qweight, start, stop, packed.scheme.bits).sub_(zeros[group])
        values[:, start:stop] = codes.to(dtype).mul_(scales[group]).t()
    return values


def _codes(words: Tensor, start: int, stop: int, bits: int) -> Tensor:
    """The codes (stop - start, F) int32 of some inputs. `start`: a multiple of 32."""
    rows = slice(start // BLOCK * bits, -(-stop // BLOCK) * bits)
    return unpack_blocks(words[rows], bits)[: stop - start]


def _tiles(groups: Tensor, most: int) -> tuple[Tile, ...]:
    """Tiles of whole groups, or of a part of one group, where all groups have one size.

    The largest such tile is taken, and tiles of several groups if there is none.
    """
    inputs = groups.numel()
    each, size = inputs // (int(groups[-1]) + 1), most
    fitting = [n for n in range(most, 0, -BLOCK) if not (n % each and each % n)]
    if each == inputs:
        fitting = [most]
    regular = torch.equal(groups, torch.arange(inputs, device=groups.device) // each)
    if regular and fitting:
        size = fitting[0]
    else:
        each = 0
    tiles = []
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        within = slice(start // each, -(-stop // each)) if each else None
        tiles.append(Tile(start, stop, within))
    return tuple(tiles)
