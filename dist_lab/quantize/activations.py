"""Inputs in 8 bits: the product of a Linear is one of integers.

    x[N, D] ~ sx (q - z)     q in 8 bits; sx and z of each row (dynamic), or of all rows (static)
    W[F, D] ~ sw p           p in 8 bits, signed; sw of each row of W

    (x W^T)[n, f] ~ sx[n] sw[f] ( sum_d q[n, d] p[f, d]  -  z[n] sum_d p[f, d] )
                                  ---------------------     ------------------
                                  int8 x int8 -> int32      the correction of an affine zero

Scales come out of the sum because none depends on d: hence one scale per row of W, and no groups.
Integers add up in any order to the same bits, so these are the bits on any machine, with any number
of threads, and on any split of D over ranks if the ranks add integers.

q is unsigned if it is affine. Then 128 is subtracted from q and z, which leaves q - z, and q fits
into int8. The sum fits into int32 if D * 255 * 128 < 2^31: `check_width`.

Jacob et al. 2018 (arXiv:1712.05877), section 2.3, equations 7 and 8.

Letters: N rows of inputs, D inputs, F outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.quantize.formula import WHOLE, Grid, Quantized, Scheme, grid_of
from dist_lab.torch_private import int8_matmul

WIDEST = (2**31 - 1) // (255 * 128)  # inputs, so that sums fit into 32 bits


@dataclass(frozen=True)
class ActivationGrid:
    """How a layer's input is rounded.

    scheme: bits and sign; group None: one range for all inputs; WHOLE (-1): one for each row
    scale, zero: (1, 1), chosen from samples before (static); None: of each input as it comes
        (dynamic)
    """

    scheme: Scheme
    scale: Tensor | None = None
    zero: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., D) -> the nearest numbers of the grid."""
        rows = x.reshape(-1, x.size(-1))
        return self.grid(rows).rounded(rows).view_as(x)

    def quantized(self, rows: Tensor) -> Quantized:
        """rows (N, D) -> their codes, and what these stand for."""
        grid = self.grid(rows)
        return Quantized(grid.codes(rows), grid)

    def grid(self, rows: Tensor) -> Grid:
        """The grid of these rows (N, D)."""
        if self.scale is None or self.zero is None:
            return grid_of(rows, self.scheme)
        groups = self.scheme.groups_of(rows.size(1))
        return Grid(self.scheme, self.scale.to(rows.dtype), self.zero.to(rows.dtype), groups)


def integer_linear(x: Quantized, weight: Quantized) -> Tensor:
    """x (N, D), weight (F, D) -> x W^T (N, F), as above, in the dtype of x's scale.

    Raises:
        UserError: D is too large for sums in 32 bits.
    """
    check_width(weight.codes.size(1))
    p = weight.codes
    q, z = x.codes, x.grid.zero.to(torch.int32)  # (N, D); (N, 1) or (1, 1)
    if not x.grid.scheme.symmetric:
        q, z = (q.to(torch.int16) - 128).to(torch.int8), z - 128
    products = int8_matmul(q, p.t())  # (N, D) x (D, F) -> (N, F) int32
    sums = products - z * p.sum(1, dtype=torch.int32)
    scale = x.grid.scale
    return sums.to(scale.dtype) * (scale * weight.grid.scale.to(scale.dtype).t())


def has_integer_product(weight: Scheme, inputs: Scheme) -> bool:
    """Whether `integer_linear` takes such codes."""
    whole_rows = inputs.group is None or inputs.group == WHOLE
    return inputs.bits == 8 and whole_rows and is_signed_rows(weight)


def is_signed_rows(weight: Scheme) -> bool:
    return weight.bits == 8 and weight.group == WHOLE and weight.symmetric


def check_width(inputs: int) -> None:
    """Raise UserError if the sum over so many inputs may not fit into 32 bits."""
    if inputs > WIDEST:
        raise UserError(
            f"{inputs} inputs x 255 x 128 is more than a sum in 32 bits holds; at most {WIDEST} "
            "inputs can have 8 bits, so leave them in floating point"
        )
