"""The flag of training in fewer bits: what it means, and what is refused."""

import pytest

from dist_lab.errors import UserError
from dist_lab.programs.cli import low_precision
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.cli.setup import recipe_of
from dist_lab.programs.train.checkpoints import MEANING
from dist_lab.quantize.lowp.codecs import CODECS
from dist_lab.quantize.lowp.recipe import LowPrecision


def test_the_flag_has_the_names_of_the_table():
    assert tuple(CODECS) == low_precision.RECIPES


def test_the_flag_becomes_a_recipe_and_is_part_of_a_run():
    recipe = recipe_of(parse(["--recipe", "nvfp4"]))
    assert isinstance(recipe, LowPrecision)
    assert recipe.weights.codec == CODECS["nvfp4"].weight
    assert "recipe" in MEANING  # a run goes on with the recipe that it began with


BAD = {
    "--recipe fp9": "recipe cannot be 'fp9' (--recipe); give fp8, ",
    "--recipe fp8 --qat 4": "qat 4 and recipe fp8 both say what Linears multiply (--qat, "
    "--recipe); leave one out",
    "--recipe fp8 --model resnet18": "model resnet18 has no Linear in its blocks to quantise "
    "(--recipe); leave it out, or give --model gpt, mlp or vit",
    "--recipe fp8 --strategy ddp --impl torch": "ddp@torch keeps weights in tensors of its own, "
    "and --recipe rounds those of our strategies (--recipe); leave it out, or give --impl hand",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_makes_no_sense_is_refused(flags):
    with pytest.raises(UserError) as refused:
        parse(flags.split())
    assert BAD[flags] in str(refused.value)
