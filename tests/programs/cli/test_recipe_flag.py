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
    blocks = {name: codecs.x.block for name, codecs in CODECS.items()}
    assert {name: block[1] if block else 1 for name, block in blocks.items()} == (
        low_precision.RECIPES
    )


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


def text(recipe="mxfp8", batch=12, seq=24, more=()):
    flags = f"--model gpt --mesh dp=2 --nproc 2 --recipe {recipe} --batch {batch} --seq {seq}"
    return parse([*flags.split(), *more])


def test_blocks_of_tokens_that_would_lie_on_two_ranks_are_refused_before_a_rank_starts():
    with pytest.raises(UserError) as refused:
        text()
    assert str(refused.value) == (
        "recipe mxfp8 has blocks of 32 tokens, and batch 12 x seq 24 over 2 data-parallel ranks x "
        "1 micro-batches does not fill them (--recipe, --batch); give --batch 16, a --seq that is "
        "a multiple of 32, or --recipe fp8"
    )
    for good in ({"batch": 16}, {"seq": 32}, {"recipe": "fp8"}):
        text(**good)


def test_ranks_with_unequal_shares_of_a_batch_must_fill_blocks_too():
    text(batch=9, seq=32, more=["--resume", "x"])
    with pytest.raises(UserError, match="batch 9 x seq 16 over 2 data-parallel ranks"):
        text(batch=9, seq=16, more=["--resume", "x"])


@pytest.mark.parametrize("flags", BAD)
def test_what_makes_no_sense_is_refused(flags):
    with pytest.raises(UserError) as refused:
        parse(flags.split())
    assert BAD[flags] in str(refused.value)
