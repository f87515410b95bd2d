"""The flags of quantisation-aware training: what they mean, and what is refused."""

import pytest
from torch import nn

from dist_lab import zoo
from dist_lab.errors import UserError
from dist_lab.programs.cli import low_precision
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.cli.low_precision import scheme_of
from dist_lab.programs.cli.registry import MODELS
from dist_lab.programs.cli.setup import recipe_of
from dist_lab.quantize import formula
from dist_lab.quantize.formula import Scheme
from dist_lab.step.find_units import find_units


def test_a_scheme_is_bits_and_the_columns_that_share_a_scale():
    assert scheme_of("4") == (4, formula.WHOLE)
    assert scheme_of("3:32") == (3, 32)
    assert scheme_of("8:tensor") == (8, None)
    assert low_precision.BITS == formula.WIDTHS


def test_the_flags_become_a_recipe():
    assert recipe_of(parse([])) is None
    recipe = recipe_of(parse(["--qat", "3:32", "--qat-inputs", "8:tensor"]))
    assert recipe.weights.scheme == Scheme(3, 32)
    assert recipe.inputs.scheme == Scheme(8, None)
    assert recipe.output_grads is None


SCHEMES = (
    "give 2, 3, 4 or 8 bits, with one scale per row (4), one per 32 columns of a row (4:32), or "
    "one in all (4:tensor)"
)
BAD = {
    "--qat 5": f"'5' is no scheme of codes (--qat); {SCHEMES}",
    "--qat 4:0": f"'4:0' is no scheme of codes (--qat); {SCHEMES}",
    "--qat 4:": f"'4:' is no scheme of codes (--qat); {SCHEMES}",
    "--qat 44": f"'44' is no scheme of codes (--qat); {SCHEMES}",
    "--qat-inputs 8": "qat_inputs 8 rounds inputs together with weights (--qat-inputs); give "
    "--qat, too, such as --qat 8",
    "--qat 3:64": "the 480 columns of mlp.down_proj in gpt tiny do not divide into groups of 64 "
    "(--qat 3:64); give --qat 3:32, which divides those of all layers, or --qat 3: one scale per "
    "row",
    "--qat 4 --model resnet18": "model resnet18 has no Linear in its blocks to quantise (--qat); "
    "leave it out, or give --model gpt, mlp or vit",
    "--qat 4 --strategy ddp --impl torch": "ddp@torch keeps weights in tensors of its own, and "
    "--qat rounds those of our strategies (--qat); leave it out, or give --impl hand",
}


@pytest.mark.parametrize("model", ["gpt", "mlp", "vit", "resnet18"])
def test_the_columns_that_groups_divide_are_those_of_the_blocks(model):
    image = None if MODELS[model].reads == "text" else (1, 28, 28)
    built = zoo.build(model, "tiny", vocab=256, image=image, seed=0, device="meta")
    found = {
        name: linear.in_features
        for block in find_units(built, built.units).values()
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    }
    columns = MODELS[model].columns("tiny")
    assert columns.items() <= found.items()
    assert set(columns.values()) == set(found.values())


@pytest.mark.parametrize("flags", BAD)
def test_what_makes_no_sense_is_refused(flags):
    with pytest.raises(UserError) as refused:
        parse(flags.split())
    assert str(refused.value) == BAD[flags]
