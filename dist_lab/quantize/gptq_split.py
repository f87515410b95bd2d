"""GPTQ of one matrix that is split over ranks: what they must exchange, for each way of splitting.

A user with a model under tensor parallelism can quantise its shards where they are. What makes the
three ways differ is that rows of W share H and nothing else, and columns depend on each other.

    rows of X       X[N_Y, D]   W[F, D]      H{U_Y} -> H, then as on one rank        `gptq.quantize`
    rows of W       X[N, D]     W[F_Y, D]    nothing: each rank solves its rows      `solve_colwise`
    columns of W    X[N, D_Y]   W[F, D_Y]    H needs x_a x_b^T of any two ranks      `solve_rowwise`

In the last one a rank has the inputs of its own columns, and with them the block H[D_Y, D_Y] on the
diagonal of H. Solving each shard with this block ignores that inputs of different ranks are
correlated: the error of a column on one rank is then never made up for on another. So each rank
gathers X, computes its rows H[D_Y, D], and all gather these. Columns must be solved one after
another, whoever has them; but rows need not be. So the weight goes from columns to rows and back,
by an all-to-all each way:

    W[F, D_Y] -> W[F_Y, D],   solve,   Q[F_Y, D] -> Q[F, D_Y]

(Names of tensor parallelism are from the view of W^T, D to F: "colwise" splits the F outputs.)

Letters: N tokens, F rows (outputs), D columns (inputs), G groups of columns, Y the axis.
"""

from typing import Any

from torch import Tensor

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.formula import WHOLE, Grid, Quantized, Scheme
from dist_lab.quantize.gptq_layer import solve


def solve_colwise(weight: Tensor, hessian: Tensor, scheme: Scheme, **options: Any) -> Quantized:
    """W[F_Y, D], H[D, D] -> Q[F_Y, D]: the rows of this rank, with no message.

    They have the bits of the whole matrix's rows if each rank has a multiple of PANEL of them: see
    [Note: rows] in gptq_layer.py.

    Raises:
        UserError: one scale for the whole matrix: rows would share it.
    """
    refuse_one_scale(scheme)
    return solve(weight, hessian, scheme, **options).quantized


def solve_rowwise(
    weight: Tensor, x: Tensor, scheme: Scheme, axis: Axis, **options: Any
) -> Quantized:
    """W[F, D_Y], X[N, D_Y] -> Q[F, D_Y]: the columns of this rank. Collective.

    A rank sends about N D + 2 F D / Y + D^2 elements times (Y-1)/Y.

    Args:
        options: of `solve`. With act_order the groups, of columns in that order, may lie on several
            ranks; so static_groups is needed.

    Raises:
        UserError: rows do not divide by the ranks, or a group of columns lies on two ranks.
    """
    refuse_one_scale(scheme)
    rows, columns = weight.shape
    if rows % axis.size:
        raise UserError(f"{rows} rows do not divide by {axis.size} ranks of {axis.name}")
    grouped = scheme.group != WHOLE
    if grouped:
        scheme.groups_of(columns)  # of this rank alone
        if options.get("act_order") and not options.get("static_groups"):
            raise UserError(
                "act_order makes groups of columns of several ranks (static_groups=); give "
                "static_groups=true"
            )
    hessian = rowwise_hessian(x, axis)
    whole = ops.all_to_all(weight, axis, split_dim=0, concat_dim=1)  # W[F, D_Y] -> W[F_Y, D]
    solved = solve(whole, hessian, scheme, **options).quantized

    def back(part: Tensor) -> Tensor:
        return ops.all_to_all(part, axis, split_dim=1, concat_dim=0)  # [F_Y, D] -> [F, D_Y]

    grid = solved.grid
    move = back if grouped else lambda scale: ops.all_gather(scale, axis)  # [F_Y, G] or [F_Y, 1]
    groups = scheme.groups_of(columns)
    return Quantized(back(solved.codes), Grid(scheme, move(grid.scale), move(grid.zero), groups))


def rowwise_hessian(x: Tensor, axis: Axis) -> Tensor:
    """X[N, D_Y] -> H[D, D] = 2 X^T X, with the products of columns on different ranks."""
    whole = ops.all_gather(x, axis, dim=1)  # X[N, D_Y] -> X[N, D]
    return ops.all_gather(2 * x.T @ whole, axis)  # H[D_Y, D] -> H[D, D]


def refuse_one_scale(scheme: Scheme) -> None:
    if scheme.group is None:
        raise UserError(
            "one scale for a matrix is shared by all ranks that have a part of it (group=); give "
            "-1 for one scale per row"
        )
