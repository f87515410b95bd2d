"""GPTQ of one matrix: three ways to compute it agree with each other, and with the paper's code."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.quantize.formula import WHOLE, Scheme, round_to_nearest
from dist_lab.quantize.gptq_layer import (
    ColumnGrids,
    by_blocks,
    by_columns,
    naive,
    solve,
)
from dist_lab.quantize.hessian import inverse_factor

SCHEMES = [
    Scheme(2), Scheme(3), Scheme(4), Scheme(8), Scheme(4, symmetric=True), Scheme(4, None),
    Scheme(3, 8), Scheme(2, 12), Scheme(4, 16, symmetric=True), Scheme(4, 24),
]  # fmt: skip
ORDERS = [
    {}, {"act_order": True}, {"act_order": True, "static_groups": True},
]  # fmt: skip


def example(
    rows: int = 12, columns: int = 48, tokens: int = 200, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns), and inputs (tokens, columns) that are correlated."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return weight.to(dtype), x.to(dtype)


def error(weight: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """The squared error of the outputs, of each row."""
    return (x @ (weight - values).T).square().sum(0)


def published(
    weight: Tensor, hessian: Tensor, bits: int, group: int, act_order: bool, block: int = 16
) -> Tensor:
    """Algorithm 1 of arXiv:2210.17323 as it is printed, W in rows: Q, with affine codes.

    Written apart from the package: its own rounding, and the Cholesky factor of the inverse.
    """
    w, h = weight.clone(), hessian.clone()
    columns = len(h)
    order = torch.argsort(h.diag(), descending=True, stable=True)
    if not act_order:
        order = torch.arange(columns)
    w, h = w[:, order], h[order][:, order]
    h += 0.01 * h.diag().mean() * torch.eye(columns, dtype=h.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT
    q = torch.zeros_like(w)
    for i in range(0, columns, block):
        e = torch.zeros(len(w), block, dtype=w.dtype)
        for j in range(i, i + block):
            if j % group == 0:
                low = w[:, j : j + group].amin(1).clamp(max=0)
                high = w[:, j : j + group].amax(1).clamp(min=0)
                scale = (high - low) / (2**bits - 1)
                zero = torch.round(-low / scale)
            code = torch.clamp(torch.round(w[:, j] / scale) + zero, 0, 2**bits - 1)
            q[:, j] = scale * (code - zero)
            e[:, j - i] = (w[:, j] - q[:, j]) / upper[j, j]
            w[:, j : i + block] -= e[:, j - i, None] * upper[j, j : i + block]
        w[:, i + block :] -= e @ upper[i : i + block, i + block :]
    return q[:, torch.argsort(order)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [8, 48])
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_the_published_algorithm(bits, group, act_order):
    weight, x = example()
    hessian = 2 * x.T @ x
    scheme = Scheme(bits, group if group < 48 else WHOLE)
    expected = published(weight, hessian, bits, group, act_order)
    solution = solve(weight, hessian, scheme, act_order=act_order)
    torch.testing.assert_close(solution.quantized.values(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.slow_unless(lambda scheme: scheme.bits == 3)
def test_three_ways_give_the_same_codes_and_errors(scheme):
    weight, x = example()
    methods = (by_blocks, partial(by_blocks, block=10), from_inverse)
    for options in ORDERS:
        first = solve(weight, 2 * x.T @ x, scheme, **options, method=by_columns)
        for method in methods:
            other = solve(weight, 2 * x.T @ x, scheme, **options, method=method)
            assert torch.equal(other.quantized.codes, first.quantized.codes)
            torch.testing.assert_close(other.quantized.grid.scale, first.quantized.grid.scale)
            assert torch.equal(other.quantized.grid.groups, first.quantized.grid.groups)
            torch.testing.assert_close(other.errors, first.errors, rtol=1e-8, atol=1e-8)


def from_inverse(columns: Tensor, upper: Tensor, grids: ColumnGrids) -> Tensor:
    """`naive`, for `solve`, which has factored the inverse."""
    return naive(columns, torch.linalg.inv(upper.T @ upper), grids)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_columns_errors_add_up_to_the_error_of_the_outputs(scheme):
    weight, x = example()
    for options in ORDERS:
        solution = solve(weight, 2 * x.T @ x, scheme, **options)
        expected = error(weight, solution.quantized.values(), x)
        torch.testing.assert_close(solution.errors, expected, rtol=1e-8, atol=1e-8)


def test_damping_charges_for_the_size_of_the_change():
    weight, x = example()
    hessian = 2 * x.T @ x
    for damping in (0.0, 0.01, 1.0):
        factor = inverse_factor(hessian, damping)
        grids = ColumnGrids(weight, Scheme(4), torch.arange(48), static=False)
        columns = weight.T.contiguous()
        errors = by_blocks(columns, factor.upper, grids)
        change = weight - columns.T
        expected = error(weight, columns.T, x) + factor.ridge / 2 * change.square().sum(1)
        torch.testing.assert_close(errors, expected, rtol=1e-9, atol=1e-9)
        assert factor.ridge == pytest.approx(damping * float(hessian.diagonal().mean()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_is_smaller_than_that_of_rounding(scheme):
    for dtype in (torch.float32, torch.float64):
        weight, x = example(dtype=dtype)
        nearest = error(weight, round_to_nearest(weight, scheme).values(), x).sum()
        for act_order in (False, True):
            solution = solve(weight, 2 * x.T @ x, scheme, act_order=act_order)
            gptq = error(weight, solution.quantized.values(), x).sum()
            assert gptq < 0.8 * nearest
            torch.testing.assert_close(solution.errors.sum(), gptq, rtol=1e-3, atol=0)


def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for():
    weight, _ = example()
    hessian = torch.diag(torch.rand(48, dtype=torch.float64) + 0.5)
    for scheme in SCHEMES:
        codes = solve(weight, hessian, scheme, act_order=True, static_groups=True).quantized.codes
        assert torch.equal(codes, round_to_nearest(weight, scheme).codes)


def test_act_order_takes_large_inputs_first_and_groups_follow_it():
    weight, x = example()
    x = (
        x
        * torch.linspace(3, 1, 48, dtype=torch.float64)[
            torch.randperm(48, generator=torch.Generator().manual_seed(1))
        ]
    )
    hessian = 2 * x.T @ x
    order = hessian.diagonal().argsort(descending=True)
    grid = solve(weight, hessian, Scheme(4, 16), act_order=True).quantized.grid
    assert torch.equal(grid.groups[order], torch.arange(48, dtype=torch.int32) // 16)
    original = round_to_nearest(weight, Scheme(4, 16)).grid
    static = solve(weight, hessian, Scheme(4, 16), act_order=True, static_groups=True)
    assert torch.equal(static.quantized.grid.groups, original.groups)
    assert torch.equal(static.quantized.grid.scale, original.scale)
    on_the_fly = solve(weight, hessian, Scheme(4, 16)).quantized.grid
    assert torch.equal(on_the_fly.scale[:, 0], original.scale[:, 0])  # nothing has moved yet
    assert not torch.isclose(on_the_fly.scale[:, 1:], original.scale[:, 1:]).any()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(3, 16), Scheme(4, 24, symmetric=True)])
def test_a_dead_column_is_zero_and_changes_nothing_else(act_order, scheme):
    weight, x = example(dtype=torch.float32)
    x[:, [5, 40]] = 0
    quantized = solve(weight, 2 * x.T @ x, scheme, act_order=act_order).quantized
    values = quantized.values()
    assert values.isfinite().all()
    assert (values[:, [5, 40]] == 0).all()
    zeros = weight.clone()
    zeros[:, [5, 40]] = 0
    same = solve(zeros, 2 * x.T @ x, scheme, act_order=act_order).quantized
    assert torch.equal(quantized.codes, same.codes)
    assert solve(weight, 2 * x.T @ x, scheme, damping=0.0).factor.damping == 0  # not singular


def test_a_weight_without_any_live_column_is_zero():
    weight, x = example()
    solution = solve(weight, 0 * x.T @ x, Scheme(4))
    assert (solution.quantized.values() == 0).all()
    assert (solution.errors == 0).all()


def test_a_singular_hessian_is_damped_tenfold_until_it_can_be_factored():
    weight, x = example(tokens=10)  # 10 tokens cannot tell 48 columns apart
    hessian = 2 * x.T @ x
    assert inverse_factor(hessian, 0.0).damping == 0.01
    shifted = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    factor = inverse_factor(shifted, 0.01)  # as bad as rounding errors might ever make it
    assert factor.damping == pytest.approx(0.1)
    solution = solve(weight, hessian, Scheme(4))
    nearest = error(weight, round_to_nearest(weight, Scheme(4)).values(), x).sum()
    assert solution.factor.damping == 0.01
    assert error(weight, solution.quantized.values(), x).sum() < nearest


def test_what_has_no_solution_is_refused():
    weight, x = example()
    hessian = 2 * x.T @ x
    with pytest.raises(UserError, match="48 columns do not divide into groups of 36"):
        solve(weight, hessian, Scheme(4, 36))
    with pytest.raises(UserError, match=r"damping=-1 is no fraction"):
        solve(weight, hessian, Scheme(4), damping=-1)
    hessian[3, 3] = float("nan")
    with pytest.raises(UserError, match="an input of a Linear is not finite"):
        solve(weight, hessian, Scheme(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_panel_of_rows_has_the_same_bits_whatever_rows_are_beside_it(dtype):
    weight, x = example(rows=256, columns=192, dtype=dtype)
    hessian = 2 * x.T @ x
    whole = solve(weight, hessian, Scheme(3, 32), act_order=True).quantized
    for rows in (slice(0, 64), slice(64, 192)):
        part = solve(weight[rows], hessian, Scheme(3, 32), act_order=True).quantized
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.equal(part.grid.scale, whole.grid.scale[rows])


def test_a_huge_hessian_is_factored_or_refused_and_never_damped_for_ever():
    assert inverse_factor(torch.eye(8) * 1e38, 0.01).upper.isfinite().all()
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]]) * 1e38
    for hessian in (indefinite, torch.eye(8) * 3.4e38):
        with pytest.raises(UserError, match=r"cannot be factored: damping=.* model.double\(\)"):
            inverse_factor(hessian, 0.01)
