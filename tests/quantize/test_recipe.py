"""What all recipes have in common: the Linears they are given, and what is refused."""

import copy

import pytest
from models import UNITS, gpt
from torch import nn

from dist_lab.errors import UserError
from dist_lab.quantize.formula import Scheme
from dist_lab.quantize.lowp.recipe import LowPrecision
from dist_lab.quantize.qat import QAT
from dist_lab.transforms.recipe import linears_of


def test_a_str_is_one_glob():
    assert [*linears_of(gpt(), QAT(Scheme(4), linears="lm_*"), {})] == ["lm_head"]


@pytest.mark.parametrize(
    ("arguments", "name"), [(("4",), "weights"), ((4,), "weights"), ((Scheme(4), 8), "inputs")]
)
def test_a_width_alone_is_no_scheme(arguments, name):
    with pytest.raises(UserError, match=rf"is no scheme of codes \({name}=\); give Scheme\(bits"):
        QAT(*arguments)


@pytest.mark.parametrize("recipe", [QAT(Scheme(4)), LowPrecision("fp8")], ids=["qat", "fp8"])
def test_a_model_has_one_recipe(recipe):
    model = recipe.on(gpt(), UNITS["gpt"])
    for second in (QAT(Scheme(8)), LowPrecision("mxfp8")):
        with pytest.raises(UserError, match=r"q_proj has a recipe already \(recipe=\); apply one"):
            second.on(model, UNITS["gpt"])
    recipe.on(copy.deepcopy(model), UNITS["gpt"])  # a copy is a plain model


@pytest.mark.parametrize("recipe", [QAT(Scheme(4), linears="0"), LowPrecision("fp8", linears="0")])
def test_a_weight_that_is_computed_is_refused(recipe):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(UserError, match=r"^0 computes its weight from other parameters, and"):
        recipe.on(model)
