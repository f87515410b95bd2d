"""Recipes: which codec each operand of a training step is coded with.

A Linear has three matrix products, and each sums over another letter:

    y[N, F]  = q(x[N, D])   . q(W[F, D])^T       over D        forward
    dx[N, D] = q(dy[N, F])  . q(W[F, D])         over F        backward
    dW[F, D] = q(dy[N, F])^T . q(x[N, D])        over N        backward

A block is a run of values along the letter of the sum: hardware sums the products of elements in a
block first, and scales the result. So each matrix is coded twice, once along each of its letters;
except where its blocks are squares, or it has one scale only: then both codings are the same.

    recipe       x             W               dy            source
    fp8          e4m3          e4m3            e5m2          arXiv:2209.05433: dy needs more range
    fp8-block    e4m3, 1x128   e4m3, 128x128   e4m3, 1x128   DeepSeek-V3, arXiv:2412.19437, 3.3
    mxfp8        e4m3, 1x32    e4m3, 1x32      e4m3, 1x32    arXiv:2506.08027: e4m3 for dy, too
    mxfp4        e2m1, 1x32    e2m1, 1x32      e2m1, 1x32    OCP MX v1.0
    nvfp4        e2m1, 1x16    e2m1, 16x16     e2m1, 1x16    arXiv:2509.25149

The paper's nvfp4 also rounds dy at random and multiplies operands of dW by a Hadamard matrix, and
keeps some layers in bfloat16; ours does not. `fp8-pow2`, `fp8-block-pow2` and `nvfp4-pow2` have
float32 scales that are powers of two. Sums, weights, gradients and optimizer state stay in their
own precision in all recipes.

[Note: bits] An e4m3 number is a multiple of 2^-9 up to 448, so a product of two is a multiple of
2^-18 below 2^17.7: 36 bits. A sum of K products needs 36 + log2 K bits, and a float64 has 53: it is
exact, in any order, for K up to 2^17, whatever the values are. e2m1 products need 8 bits (2^-2 to
36). e5m2 x e4m3 needs 50 for the whole range; gradients use a part of it. Blocks with different
scales need as many bits more as their exponents differ by. Then a sum over ranks is exact as well,
and so training has the bits of one process: tests/quantize/lowp/test_recipes_on_ranks.py.

What this does not show: the matrix products here are in float32 (or float64). Tensor cores keep
fewer digits of a sum: Hopper's FP8 about 14 bits (DeepSeek-V3, section 3.3.2, which therefore adds
to float32 after 128 terms). So a run here says what the formats lose, and not what a kernel does.

Letters: N tokens, D inputs, F outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_lab.quantize.lowp.blocks import E4M3_SCALE, E8M0, FLOAT32, POWER_OF_TWO, Codec, Scale
from dist_lab.quantize.lowp.formats import E2M1, E4M3, E5M2, Format


@dataclass(frozen=True)
class Codecs:
    """The codecs of inputs, weights and gradients of outputs. Blocks run along the sum: (r, c)
    has c values of the letter that is summed over.
    """

    name: str
    x: Codec
    weight: Codec
    dy: Codec


def per_matrix(name: str, scale: Scale) -> Codecs:
    e4m3, e5m2 = Codec(E4M3, outer=scale), Codec(E5M2, outer=scale)
    return Codecs(name, e4m3, e4m3, e5m2)


def per_block(name: str, scale: Scale) -> Codecs:
    row, square = Codec(E4M3, (1, 128), scale), Codec(E4M3, (128, 128), scale)
    return Codecs(name, row, square, row)


def microscaled(name: str, element: Format) -> Codecs:
    codec = Codec(element, (1, 32), E8M0)
    return Codecs(name, codec, codec, codec)


def two_levels(name: str, outer: Scale) -> Codecs:
    row, square = (Codec(E2M1, (r, 16), E4M3_SCALE, outer) for r in (1, 16))
    return Codecs(name, row, square, row)


CODECS: Mapping[str, Codecs] = {
    codecs.name: codecs
    for codecs in (
        per_matrix("fp8", FLOAT32), per_matrix("fp8-pow2", POWER_OF_TWO),
        per_block("fp8-block", FLOAT32), per_block("fp8-block-pow2", POWER_OF_TWO),
        microscaled("mxfp8", E4M3), microscaled("mxfp4", E2M1),
        two_levels("nvfp4", FLOAT32), two_levels("nvfp4-pow2", POWER_OF_TWO),
    )
}  # fmt: skip
