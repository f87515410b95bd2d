"""Three ways to split GPTQ of one matrix over ranks, and what goes wrong without cross terms."""

import pytest
import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.quantize.calibrate import tree_sum
from dist_lab.quantize.formula import Scheme
from dist_lab.quantize.gptq_layer import PANEL, solve
from dist_lab.quantize.gptq_split import rowwise_hessian, solve_colwise, solve_rowwise
from dist_lab.quantize.hessian import HessianObserver

SCHEMES = [Scheme(4), Scheme(3, 16)]


def example(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    mixing = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(256, columns, generator=generator, dtype=dtype) @ mixing
    return weight, x


def own(tensor: Tensor, axis, dim: int) -> Tensor:
    return tensor.chunk(axis.size, dim)[axis.index].contiguous()


def check_rows_of_x(axis, alone):
    """H has the bits of one rank, and so has all that follows."""
    x = example(12, 64, torch.float32)[1]
    hessians = []
    for where in (alone, axis):
        shards = x.chunk(8)[where.index * 8 // where.size :][: 8 // where.size]
        observer = HessianObserver(len(shards))
        for shard in shards:
            observer.see(shard)
        hessians.append(observer.total(where))
        assert observer.tokens * where.size == 256
    assert torch.equal(*hessians)
    torch.testing.assert_close(hessians[0], 2 * x.T @ x, rtol=1e-5, atol=1e-2)


@pytest.mark.ranks(2)
def test_rows_of_x_on_2_ranks_give_the_same_hessian(mesh):
    check_rows_of_x(mesh["dp"], mesh["tp"])


@pytest.mark.ranks(4)
def test_rows_of_x_on_4_ranks_give_the_same_hessian(mesh):
    check_rows_of_x(mesh["dp"], mesh["tp"])


def check_rows_of_w(axis):
    weight, x = example(PANEL * 4, 96, torch.float32)
    hessian = 2 * x.T @ x
    for scheme in SCHEMES:
        for act_order in (False, True):
            whole = solve(weight, hessian, scheme, act_order=act_order).quantized
            shard = own(weight, axis, 0)
            part = solve_colwise(shard, hessian, scheme, act_order=act_order)
            assert torch.equal(part.codes, own(whole.codes, axis, 0))
            assert torch.equal(part.grid.scale, own(whole.grid.scale, axis, 0))
            assert torch.equal(part.values(), own(whole.values(), axis, 0))


@pytest.mark.ranks(2)
def test_rows_of_w_on_2_ranks_need_no_message(mesh):
    check_rows_of_w(mesh["dp"])


@pytest.mark.ranks(4)
def test_rows_of_w_on_4_ranks_need_no_message(mesh):
    check_rows_of_w(mesh["dp"])


def check_columns_of_w(axis):
    weight, x = example(24, 128, torch.float64)
    torch.testing.assert_close(rowwise_hessian(own(x, axis, 1), axis), 2 * x.T @ x)
    for scheme in SCHEMES:
        for options in ({}, {"act_order": True, "static_groups": True}):
            whole = solve(weight, 2 * x.T @ x, scheme, **options).quantized
            part = solve_rowwise(own(weight, axis, 1), own(x, axis, 1), scheme, axis, **options)
            assert torch.equal(part.codes, own(whole.codes, axis, 1))
            torch.testing.assert_close(part.values(), own(whole.values(), axis, 1))


@pytest.mark.ranks(2)
def test_columns_of_w_on_2_ranks_are_right_with_cross_terms(mesh):
    check_columns_of_w(mesh["dp"])


@pytest.mark.ranks(4)
def test_columns_of_w_on_4_ranks_are_right_with_cross_terms(mesh):
    check_columns_of_w(mesh["dp"])


def check_without_cross_terms(axis):
    """Each rank is right about its own outputs; their sum, which the model uses, is worse."""
    weight, x = example(24, 128, torch.float64)
    shard, inputs = own(weight, axis, 1), own(x, axis, 1)
    scheme = Scheme(4, 16)
    local = solve(shard, 2 * inputs.T @ inputs, scheme).quantized.values()
    right = solve_rowwise(shard, inputs, scheme, axis).values()

    def error(values: Tensor) -> float:
        """Of the sum over ranks of each one's outputs."""
        return float(tree_sum([inputs @ (shard - values).T], axis).square().sum())

    assert not torch.equal(local, right)
    assert error(right) < 0.85 * error(local)


@pytest.mark.ranks(2)
def test_columns_of_w_on_2_ranks_are_worse_without_cross_terms(mesh):
    check_without_cross_terms(mesh["dp"])


@pytest.mark.ranks(4)
def test_columns_of_w_on_4_ranks_are_worse_without_cross_terms(mesh):
    check_without_cross_terms(mesh["dp"])


@pytest.mark.ranks(2)
def test_what_cannot_be_split_is_refused_on_every_rank(mesh):
    axis = mesh["dp"]
    weight, x = example(9, 32, torch.float64)
    with pytest.raises(UserError, match="one scale for a matrix is shared by all ranks"):
        solve_colwise(weight, 2 * x.T @ x, Scheme(4, None))
    with pytest.raises(UserError, match="9 rows do not divide by 2 ranks of dp"):
        solve_rowwise(own(weight, axis, 1), own(x, axis, 1), Scheme(4), axis)
    with pytest.raises(UserError, match="16 columns do not divide into groups of 32"):
        solve_rowwise(weight[:8, :16], x[:, :16], Scheme(4, 32), axis)
    with pytest.raises(UserError, match=r"static_groups=true"):
        solve_rowwise(weight[:8, :16], x[:, :16], Scheme(4, 8), axis, act_order=True)
