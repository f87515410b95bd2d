"""The error between tensors of every dtype and layout, and which elements are only rounding."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dist_lab
from dist_lab.parallel.replicated import dp
from dist_lab.programs.verify.compare import compare, error

TOKENS = 9


def eye(dtype=torch.float64):
    return torch.eye(4, dtype=dtype)


MAKES = {
    "bool": eye().bool,
    "int8": lambda: eye().to(torch.int8),
    "int64": lambda: eye().long(),
    "uint16": lambda: eye().to(torch.uint16),
    "uint64": lambda: eye().to(torch.uint64),
    "float8": lambda: eye().to(torch.float8_e4m3fn),
    "float8 powers": lambda: (eye() + 1).to(torch.float8_e8m0fnu),
    "half": eye().half,
    "complex": lambda: torch.polar(eye() + 1, eye()),
    "conjugated": lambda: torch.polar(eye() + 1, eye()).conj(),
    "sparse": eye().to_sparse,
    "csr": eye().to_sparse_csr,
    "expanded": lambda: eye()[:, :1].expand(4, 4),
    "infinite": lambda: torch.full((4, 4), -math.inf).triu(1),
    "nan": lambda: eye() * torch.nan,
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", MAKES)
def test_tensors_of_every_dtype_and_layout_are_compared(kind):
    class Holds(nn.Linear):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__(6, 4, dtype=torch.float64)
            self.register_buffer("held", MAKES[kind]())

    def rows(step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, 4, (8,), generator=generator)

    assert error(MAKES[kind](), MAKES[kind](), 0.0) == 0
    if kind not in ("sparse", "csr"):  # parallelize has no layout for them
        report = dist_lab.verify(Holds, rows, dist_lab.init_mesh(), "single", steps=1)
        assert [c.error for c in report.comparisons if c.quantity == "buffer"] == [0]
        assert report.equal, report.sentence()


@pytest.mark.parametrize("kind", [kind for kind in MAKES if kind != "empty"])
def test_one_changed_element_is_detected_in_every_dtype_and_layout(kind):
    right = MAKES[kind]()
    wrong = right.to_dense() if right.layout != torch.strided else right.clone()
    if kind == "float8 powers":
        wrong = (eye() + 3).to(right.dtype)
    else:
        wrong.view(-1)[-1] = 0 if kind != "infinite" else 1
        wrong.view(-1)[0] = 7 if wrong.dtype != torch.bool else False
    wrong = wrong if right.layout == torch.strided else wrong.to_sparse(layout=right.layout)
    exact = not (right.dtype.is_floating_point or right.is_complex())
    assert error(wrong, right, 0.0) >= (math.inf if exact else 0.1)


def test_integers_that_differ_have_an_infinite_error():
    big = torch.tensor([2**53, 1])
    assert error(big + torch.tensor([1, 0]), big, 0.0) == math.inf
    assert error(eye().int(), eye().long(), 0.0) == math.inf, "a different dtype is a difference"


def test_nan_or_a_different_shape_is_never_equal():
    x = eye()
    for wrong in (x * torch.nan, x.masked_fill(x > 0, torch.nan), x[0], x[None], x / 0):
        assert not error(wrong, x, 0.0) <= 1e300
        assert not error(x, wrong, 0.0) <= 1e300 or wrong.isinf().any()
    infinite = x.masked_fill(x > 0, math.inf)
    assert error(infinite, infinite, 0.0) == 0
    assert error(-infinite, infinite, 0.0) == math.inf
    assert error(infinite + (1 - x) * 0.1, infinite, 0.0) > 0.01, "finite elements are judged"


# --- rounding -------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS + 3, 8)  # three rows are never looked up
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, TOKENS)
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.attend(x, x, x)[0])


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, TOKENS, (8, 5), generator=generator)
    return x, (x + 1) % TOKENS


BIAS = "attend.in_proj_bias"
KEY = slice(8, 16)  # the key's third of it


@pytest.mark.slow  # test_parity.py lists such a weight, too
@pytest.mark.ranks(4)
def test_the_key_bias_without_a_true_gradient_does_not_fail_a_correct_run(mesh):
    for strategy in ("dp", "zero1"):
        report = dist_lab.verify(Attends, tokens, mesh, strategy, steps=4)
        assert report.equal, report.sentence()
        assert report.rounding_only() == [f"{BIAS} (8 of 24)"]
        assert report.table().caption == f"only rounding, not judged: {BIAS} (8 of 24)"
        assert all(c.judged for c in report.comparisons)


class Spoils(dp.AllReduceAfterBackward):
    """A correct run, except that one element of a weight is changed after the first update."""

    name, element, by = "", 0, 0.0

    def after_step(self):
        super().after_step()
        weight = self.model.get_parameter(self.name).detach()
        weight.view(-1)[self.element] += self.by


def spoiled(mesh, name, element, by):
    kind = type("Spoiled", (Spoils,), {"name": name, "element": element, "by": by})

    def apply(setup):
        return replace(dp.apply(setup), sync=kind(setup.model, setup.axis))

    return dist_lab.verify(Attends, tokens, mesh, apply, steps=1)


@pytest.mark.parametrize(
    ("name", "element"), [(BIAS, 0), (BIAS, 23), ("embed.weight", 11 * 8), ("head.bias", 2)]
)
@pytest.mark.ranks(2)
def test_a_wrong_weight_element_next_to_rounding_is_detected(name, element, mesh):
    # An embedding row that is never looked up has a gradient of exactly zero: that is not rounding.
    first = spoiled(mesh, name, element, 1e-9).first
    assert first is not None
    assert (first.quantity, first.tensor) == ("weight", name)


@pytest.mark.ranks(2)
def test_a_nan_among_rounding_elements_is_detected(mesh):
    first = spoiled(mesh, BIAS, KEY.start, torch.nan).first
    assert (first.quantity, first.tensor, first.error) == ("weight", BIAS, math.inf)


def judged(ours, theirs, weight_off, rounding=None, dtype=torch.float64):
    """Returns the weight's comparison; `weight_off` is the error of each element."""
    ours, theirs = (torch.tensor(g, dtype=torch.float64) for g in (ours, theirs))
    weight = torch.ones_like(theirs)
    other = weight + torch.tensor(weight_off, dtype=torch.float64)
    states = [
        {"gradient": {"w": g, "usual": torch.ones(2)}, "weight": {"w": w}}
        for g, w in ((ours, other), (theirs, weight))
    ]
    comparisons = compare(0, *states, {} if rounding is None else rounding, dtype)
    return next(c for c in comparisons if c.quantity == "weight")


def test_rounding_is_decided_element_by_element():
    right = [1.0, 1e-16, 0.0]
    assert judged(right, right, [0, 0.5, 0]).error == 0
    assert judged(right, right, [0, 0, 0.5]).error == 0.5, "exactly zero in both is judged"
    assert judged(right, right, [0.5, 0, 0]).error == 0.5
    by_chance = judged([1.0, 1e-16, 1e-17], right, [0, 0.5, 0.5])
    assert (by_chance.error, by_chance.left_out, by_chance.elements) == (0, 2, 3)
    too_large = judged([1.0, 1e-16, 1e-9], right, [0, 0, 0.5])
    assert too_large.error == 0.5, "1e-9 is not rounding"


def test_an_element_can_be_rounding_relative_to_other_tensors():
    small = [1e-6, 1e-15]  # the second is a billionth of the first, and the usual gradient is 1
    assert judged(small, small, [0, 0.5]).left_out == 1
    assert judged(small, small, [0.5, 0]).error == 0.5


def test_gradients_are_judged_even_where_weights_are_left_out():
    gradients = [torch.tensor([1.0, small], dtype=torch.float64) for small in (1e-6, 1e-16)]
    states = [{"gradient": {"w": g}, "weight": {"w": torch.ones(2)}} for g in gradients]
    rows = compare(0, *states, {}, torch.float64)
    assert [(c.quantity, c.error > 1e-7) for c in rows] == [("gradient", True), ("weight", False)]


def test_an_element_that_was_rounding_once_is_never_judged_again():
    rounding = {}
    judged([1.0, 1e-16], [1.0, 1e-16], [0, 0.5], rounding)
    later = judged([1.0, 1.0], [1.0, 1.0], [0, 0.5], rounding)
    assert (later.error, later.left_out) == (0, 1)


def test_a_tensor_of_only_rounding_is_left_out_whole():
    result = judged([1e-16, 2e-16, 0.0], [1e-16, 2e-16, 0.0], [0.5, 0, 0])
    assert (result.judged, result.left_out, result.error) == (False, 3, 0.5)
    assert judged([1e-16, 2e-16, 0.0], [1e-16, 2e-16, 0.0], [torch.nan, 0, 0]).judged
