"""A run that was trained with --qat or --recipe: its Linears multiplied fewer numbers.

quantize.py starts from the weights of full precision, with which the run has never computed. Their
loss may be larger than that of the rounded ones, so that rounding seems to help.
"""

from copy import deepcopy
from dataclasses import replace

from dist_lab.mesh.mesh import Axis
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.low_precision import scheme_of
from dist_lab.programs.cli.setup import recipe_of
from dist_lab.programs.quantize.source import Source, loss_of
from dist_lab.quantize.formula import Scheme


def own_loss_note(source: Source, axis: Axis) -> str | None:
    """A line with the run's own loss, if its Linears multiplied fewer numbers. Collective."""
    config, recipe = source.config, recipe_of(source.config)
    if recipe is None:
        return None
    loss = loss_of(recipe.on(deepcopy(source.model)), source, axis)
    flags = f"--qat {config.qat}" if config.qat else f"--recipe {config.recipe}"
    return (
        f"the run rounds in its forward ({flags}): its own loss is {source.unit} {loss:.4f}; the "
        "first one below is that of its weights before they are rounded"
    )


def scheme_note(config: Config, scheme: Scheme) -> str | None:
    """A line for a run of --qat whose weights will be rounded to another scheme."""
    trained = Scheme(*scheme_of(config.qat)) if config.qat else None
    if trained is None or trained == replace(scheme, scale_dtype=None):
        return None
    return (
        f"it was not trained for {in_words(scheme)}, but for {in_words(trained)}, so these codes "
        f"may cost more{'' if trained.group is None else typed(trained)}"
    )


def in_words(scheme: Scheme) -> str:
    """
    >>> in_words(Scheme(3, 32)), in_words(Scheme(8, symmetric=True))
    ('3 bits in groups of 32', '8 bits with one scale a row, symmetric')
    """
    scales = {None: "with one scale a matrix", -1: "with one scale a row"}
    where = scales.get(scheme.group, f"in groups of {scheme.group}")
    return f"{scheme.bits} bits {where}{', symmetric' * scheme.symmetric}"


def typed(scheme: Scheme) -> str:
    """The flags of quantize.py, for a scheme of --qat."""
    flags = f"--bits {scheme.bits} --group {scheme.group} without --symmetric"
    return f"; the same codes: {flags} (rtn, gptq, awq)"
