"""GPTQ of one matrix: quantise column by column, and let later columns make up for the errors.

Each row w of W has the error 1/2 (w - q) H (w - q)^T (hessian.py). Rounding each weight to the
nearest code makes w - q small. GPTQ makes the *error* small. It fixes column after column, and
after each one it moves the remaining weights to where the error is smallest, given what is fixed:

    q_i = round(w_i)                                           column i, all rows at once
    w_j -= (w_i - q_i) K_ij / K_ii   for all j >= i            K = inverse(H of the columns >= i)

The best move has this closed form because the error is quadratic. It costs 1/2 (w_i - q_i)^2 / K_ii
(OBQ, Frantar and Alistarh 2022, arXiv:2208.11580, eq. 2; GPTQ, Frantar et al. 2022,
arXiv:2210.17323, eq. 2 and algorithm 1). Below are three ways to compute it:

    naive        inverts what remains of H at each column                             D^4 + F D^2
    by_columns   reads K_ij / K_ii off one triangle U: [Note: the triangle]           D^3 + F D^2
    by_blocks    the same, but columns further right move once a block                D^3 + F D^2

All three give the same codes, by test. `solve` uses `by_blocks`.

[Note: the triangle] Let inverse(H) = U^T U with an upper triangle U. Then H = M M^T with
M = inverse(U), an upper triangle, too. Rows >= i of M are 0 left of column i. So H of the columns
>= i is M_i M_i^T, where M_i is the lower right part of M, and K = U_i^T U_i with that of U. In the
first column of U_i only U_ii is not 0. So K_ij = U_ii U_ij, and

    K_ij / K_ii = U_ij / U_ii        1 / K_ii = 1 / U_ii^2

[Note: rows] Rows of W never meet: they share H, and that is all. So q, k and v, which have one
input, are solved as one matrix of more rows, and so are gate and up. A matrix product may round a
row differently if it has more rows beside it, so products are done in panels of PANEL rows: whole
panels have the same bits in any matrix, and on any rank.

Letters: F rows (outputs), D columns (inputs), G groups of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_lab.quantize.formula import WHOLE, Grid, Quantized, Scheme, grid_of
from dist_lab.quantize.hessian import Factor, inverse_factor

PANEL = 64  # rows in one matrix product

# `columns` is W^T (D, F): a column of W is one stretch of memory. It becomes Q^T in place. Each of
# the three returns the error of each row, (F,), by the damped H.


def naive(columns: Tensor, hessian: Tensor, grids: "ColumnGrids") -> Tensor:
    """The formula itself. Returns the error of each row, (F,)."""
    errors = torch.zeros_like(columns[0])
    for i in range(len(columns)):
        inverse = torch.linalg.inv(hessian[i:, i:])  # of the columns that remain
        q = grids.at(i, columns).rounded(columns[i, :, None])[:, 0]
        change = (columns[i] - q) / inverse[0, 0]
        columns[i:] -= torch.outer(inverse[0], change)
        columns[i] = q  # it is so already, up to rounding
        errors += change**2 * inverse[0, 0] / 2
    return errors


def by_columns(columns: Tensor, upper: Tensor, grids: "ColumnGrids") -> Tensor:
    """With U, inverse(H) = U^T U. [Note: the triangle] says why row i of U is all that i needs."""
    errors = torch.zeros_like(columns[0])
    for i in range(len(columns)):
        q = grids.at(i, columns).rounded(columns[i, :, None])[:, 0]
        change = (columns[i] - q) / upper[i, i]
        columns[i:] -= torch.outer(upper[i, i:], change)
        columns[i] = q
        errors += change**2 / 2
    return errors


def by_blocks(columns: Tensor, upper: Tensor, grids: "ColumnGrids", block: int = 128) -> Tensor:
    """In a block of columns, each is moved at each step; those after it only once, by one product.

    An outer product reads and writes each weight for two operations. The product of a whole block
    does the same arithmetic in cache. No group of columns begins in one block and ends in another,
    so a group's scale is chosen from weights that have made all their moves.
    """
    errors = torch.zeros_like(columns[0])
    diagonal = upper.diagonal().tolist()
    for start, stop in block_bounds(len(columns), grids.size, block):
        changes = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            q = grids.at(i, columns).rounded(columns[i, :, None])[:, 0]
            change = torch.sub(columns[i], q, out=changes[i - start]).div_(diagonal[i])
            columns[i + 1 : stop] -= torch.outer(upper[i, i + 1 : stop], change)
            columns[i] = q
        moves = upper[start:stop, stop:].T  # (D - stop, block)
        for rows, change in zip(columns.split(PANEL, 1), changes.split(PANEL, 1), strict=True):
            rows[stop:] -= moves @ change.contiguous()
        errors += changes.square().sum(0) / 2
    return errors


def block_bounds(columns: int, group: int, block: int) -> list[tuple[int, int]]:
    """Blocks of at most `block` columns, unless a group has more: then the group is cut.

    >>> block_bounds(8, 2, 5), block_bounds(8, 4, 3)
    ([(0, 4), (4, 8)], [(0, 3), (3, 4), (4, 7), (7, 8)])
    """
    groups = max(block // group, 1) * group  # some whole groups, or one
    return [
        (start, min(start + block, first + groups, columns))
        for first in range(0, columns, groups)
        for start in range(first, min(first + groups, columns), block)
    ]


@dataclass(frozen=True)
class Solution:
    """A quantised matrix.

    quantized: codes and scales
    errors: (F,), 1/2 (w - q) H (w - q)^T of each row
    factor: of the inverse Hessian
    """

    quantized: Quantized
    errors: Tensor
    factor: Factor


Method = Callable[[Tensor, Tensor, "ColumnGrids"], Tensor]


def solve(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *, act_order: bool = False,
    static_groups: bool = False, damping: float = 0.01, method: Method = by_blocks,
) -> Solution:  # fmt: skip
    """Quantise a matrix W (F, D) for inputs with the Hessian H (D, D).

    A dead column, whose input was always 0, is set to 0.

    Args:
        act_order: the columns with the largest inputs first (AutoGPTQ's desc_act): while there are
            still many columns to make up for them. Groups are then of columns in that order.
        static_groups: scales are chosen before the first column, from the original weights, in
            groups of neighboring columns. Else when a group begins, from the weights as moved.
        damping: see `inverse_factor`.

    Raises:
        UserError: columns do not divide into groups, or H is not finite.
    """
    diagonal = hessian.diagonal()
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    weight = torch.where(diagonal > 0, weight, 0)
    factor = inverse_factor(hessian[order][:, order], damping)
    grids = ColumnGrids(weight, scheme, order, static=static_groups)
    columns = weight.T[order].contiguous()  # W (F, D) -> W^T (D, F)
    errors = method(columns, factor.upper, grids)
    values = columns[order.argsort()].T.contiguous()
    errors = errors - factor.ridge / 2 * (weight - values).square().sum(1)  # H was damped
    grid = grids.joined()
    return Solution(Quantized(grid.codes(values), grid), errors, factor)


class ColumnGrids:
    """The grid of each column, in the order in which columns are quantised.

    Args:
        weight: W (F, D), columns in their own order.
        order: (D,), the column that comes first, second, ...
        static: choose all scales now. One scale per row, or one in all, is always chosen now.

    Attributes:
        size: columns that share scales which are chosen when the first of them comes; else 1.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, order: Tensor, *, static: bool) -> None:
        self.scheme, self.order, self.size = scheme, order, 1
        groups = scheme.groups_of(weight.size(1))  # of a column
        self.grids: dict[int, Grid] = {}  # by group
        if static or scheme.group in (None, WHOLE):
            whole = grid_of(weight, scheme)
            for d, group in enumerate(groups.tolist()):
                if group not in self.grids:
                    self.grids[group] = whole.column(d)
            groups = groups[order.cpu()]
        elif isinstance(scheme.group, int):
            self.size = scheme.group
        self.groups = groups.tolist()  # of the i-th column in the order

    def at(self, i: int, columns: Tensor) -> Grid:
        """The grid of the i-th column in the order. columns (D, F): in the order, as moved so far.

        If a group begins with it, the scale is chosen here.
        """
        group = self.groups[i]
        if group not in self.grids:
            one_group = replace(self.scheme, group=WHOLE)
            self.grids[group] = grid_of(columns[i : i + self.size].T, one_group).column(0)
        return self.grids[group]

    def joined(self) -> Grid:
        """The grid of all columns, in their own order."""
        grids = [self.grids[group] for group in sorted(self.grids)]
        scale = torch.cat([grid.scale for grid in grids], dim=1)  # (F, G)
        zero = torch.cat([grid.zero for grid in grids], dim=1)
        groups = torch.empty(len(self.groups), dtype=torch.int32)
        groups[self.order.cpu()] = torch.tensor(self.groups, dtype=torch.int32)
        return Grid(self.scheme, scale, zero, groups)
