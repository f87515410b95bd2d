"""Observers over ranks find the range of one process that has seen all rows, to the bit."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from dist_lab.comm.ops import all_reduce
from dist_lab.errors import UserError
from dist_lab.quantize.formula import Scheme, grid_between
from dist_lab.quantize.observers import (
    BINS,
    Histogram,
    MinError,
    MinMax,
    Percentile,
    RangeObserver,
    candidates,
)

COLUMNS = 6
TENSOR = Scheme(8, None)
MAKE = {
    "minmax": lambda: MinMax(COLUMNS),
    "percentile": lambda: Percentile(97.0),
    "min_error": lambda: MinError(),
}
SPREADS = {  # the share of rows of each rank, out of 12
    2: [(6, 6), (11, 1), (0, 12)],
    4: [(3, 3, 3, 3), (1, 0, 7, 4)],
}


def activations(rows: int = 120, seed: int = 0) -> Tensor:
    """Rows that grow a thousandfold, so that ranks see different ranges."""
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 1, rows)[:, None]


def seen(observer: RangeObserver, *parts: Tensor) -> RangeObserver:
    for part in parts:
        observer.see(part)
    return observer


def rows_of(x: Tensor, spread: tuple[int, ...], rank: int) -> Tensor:
    return x.split([len(x) // 12 * share for share in spread])[rank]


def on_ranks():
    """Marks each (name, spread) to run on as many ranks as the spread has."""
    rows = [
        (name, s) for name, spreads in itertools.product(MAKE, SPREADS.values()) for s in spreads
    ]
    return pytest.mark.parametrize(
        ("name", "spread"),
        [pytest.param(n, s, marks=pytest.mark.ranks(len(s)), id=f"{n}-{s}") for n, s in rows],
    )


@on_ranks()
@pytest.mark.parametrize(
    "scheme", [TENSOR, Scheme(8, None, symmetric=True)], ids=["affine", "symmetric"]
)
def test_ranks_find_the_range_of_one_process(mesh, name, spread, scheme):
    x = activations()
    observer = seen(MAKE[name](), *rows_of(x, spread, mesh.rank).split(17))
    observer.merge(mesh["dp"])
    alone = seen(MAKE[name](), x).bounds(scheme)
    assert [b.tolist() for b in observer.bounds(scheme)] == [b.tolist() for b in alone]


@pytest.mark.ranks(4)
def test_features_have_ranges_of_their_own(mesh):
    x = activations()
    observer = seen(MinMax(COLUMNS), rows_of(x, (3, 1, 8, 0), mesh.rank))
    observer.merge(mesh["dp"])
    assert torch.equal(observer.low, x.min(0).values)
    assert torch.equal(observer.high, x.max(0).values)
    assert torch.equal(observer.largest(), x.abs().max(0).values)


@pytest.mark.ranks(4)
def test_the_mean_of_the_ranks_ranges_and_rank_0s_are_not_the_range(mesh):
    x = activations()
    own = seen(MinMax(COLUMNS), rows_of(x, (3, 3, 3, 3), mesh.rank)).bounds(TENSOR)[1]
    merged = seen(MinMax(COLUMNS), rows_of(x, (3, 3, 3, 3), mesh.rank))
    merged.merge(mesh["dp"])
    mean = all_reduce(own, mesh["dp"]) / mesh["dp"].size
    assert merged.bounds(TENSOR)[1] == x.max() > 2 * mean
    assert mesh.rank or own < 0.1 * x.max()  # rank 0 has the first and smallest rows


@pytest.mark.ranks(2)
def test_a_value_that_is_not_finite_is_an_error_on_every_rank(mesh):
    for make in MAKE.values():
        x = activations()
        x[0, 3] = torch.nan
        observer = seen(make(), rows_of(x, (6, 6), mesh.rank))
        observer.merge(mesh["dp"])
        with pytest.raises(UserError, match=r"^1 of 720 activations are not finite"):
            observer.bounds(TENSOR)


@pytest.mark.ranks(2)
def test_no_rows_on_any_rank_are_an_error(mesh):
    for make in MAKE.values():
        observer = seen(make(), torch.empty(0, COLUMNS))
        observer.merge(mesh["dp"])
        with pytest.raises(UserError, match=r"^no activation was observed"):
            observer.bounds(TENSOR)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_minmax_has_the_scale_and_zero_of_torch_ao(symmetric: bool, positive: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        from torch.ao.quantization import MinMaxObserver

        theirs = MinMaxObserver(
            dtype=torch.qint8 if symmetric else torch.quint8,
            qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        )
    x = activations().abs() if positive else activations()
    scheme = Scheme(8, None, symmetric)
    observer = MinMax(COLUMNS)
    for part in x.split(50):
        observer.see(part)
        theirs(part)
    scale, zero = theirs.calculate_qparams()
    grid = grid_between(*observer.bounds(scheme), scheme, COLUMNS)
    assert grid.scale.item() == scale.item()
    assert grid.zero.item() == zero.item()


def test_counts_do_not_depend_on_the_order_in_which_the_range_grows() -> None:
    values = activations().flatten()
    values[:3] = torch.tensor([0.0, -1e-40, 3e8])  # 2^e doubles many times
    counts = [seen(Histogram(), *parts).counts for parts in (
        [values], values.split(1), values.flip(0).split(100), values[torch.randperm(720)].split(7)
    )]  # fmt: skip
    assert counts[0].sum() == 720
    assert all(torch.equal(c, counts[0]) for c in counts)


def test_a_value_lies_in_its_bin() -> None:
    values = activations().flatten()
    histogram = seen(Histogram(), *values.split(100))
    edges = histogram.edges()
    for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False):
        assert count == ((values >= low) & (values < high)).sum()
    assert edges[-1] / 2 <= values.abs().max() < edges[-1]


def test_percentiles_of_a_known_distribution() -> None:
    x = torch.linspace(-1, 1, 100_001)  # uniform; bins reach to 2, as 1 is not below 1
    for percent in (100.0, 99.0, 80.0):
        low, high = seen(Percentile(percent), x[:, None]).bounds(TENSOR)
        assert float(high) == pytest.approx(percent / 100, abs=2 / BINS + 1e-6)
        assert float(low) == pytest.approx(-percent / 100, abs=2 / BINS + 1e-6)
        assert ((x >= low) & (x <= high)).double().mean() >= percent / 100
    low, high = seen(Percentile(100.0), x[:, None]).bounds(TENSOR)
    assert (float(low), float(high)) == (-1, 1)
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    _, high = seen(Percentile(95.0), normal).bounds(TENSOR)
    assert float(high) == pytest.approx(1.96, abs=0.03)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "outlier"])
def test_no_candidate_has_less_error_than_the_one_chosen(kind: str, symmetric: bool) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = {"normal": x, "positive": x.abs(), "negative": -x.abs(), "outlier": x}[kind]
    if kind == "outlier":
        x[7] = 60
    scheme, observer = Scheme(3, None, symmetric), MinError(torch.float64)
    low, high = seen(observer, x).bounds(scheme)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:  # of the values themselves
        grid = grid_between(lows.view(-1, 1), highs.view(-1, 1), scheme, len(x))
        return (grid.rounded(x[None]) - x).square().sum(1)

    assert errors(low, high) <= errors(*candidates(x.min(), x.max(), scheme)).min() * (1 + 1e-3)
    assert errors(low, high) < errors(x.min(), x.max())
    if kind == "outlier":
        assert high < 30  # 3 bits are not spent on one value


def test_zeros_and_one_value_have_a_range() -> None:
    for make in MAKE.values():
        for x in (torch.zeros(5, COLUMNS), torch.full((5, COLUMNS), -2.5)):
            low, high = seen(make(), x).bounds(TENSOR)
            grid = grid_between(low, high, TENSOR, COLUMNS)
            assert torch.allclose(grid.rounded(x), x, atol=0.02)


def test_a_percentage_that_is_no_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"^percent=30 of all values is no range; give 50 to 100"):
        Percentile(30)
