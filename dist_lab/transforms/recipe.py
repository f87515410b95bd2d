"""A recipe says what Linears multiply, and which Linears: `parallelize(model, ..., recipe=...)`.

A run that quantises its weights is a recipe (quantize/qat.py): hooks round the operands, and the
layer multiplies them (operands.py). So is a run that multiplies in 8-bit floating point
(quantize/lowp). It rounds an operand differently for each of the products that it is in, and so it
computes these products itself (step/products.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from dist_lab.errors import UserError, shown
from dist_lab.step.find_units import find_units
from dist_lab.step.hooks import ModuleHook, do_nothing
from dist_lab.step.setup import CodedGathers
from dist_lab.transforms.operands import (
    LinearOperands,
    Ranged,
    Rounding,
    Scopes,
    Split,
    scopes_of,
    show_operands,
    unsplit,
)


class OnModel(Protocol):
    """A recipe on one model."""

    @property
    def coded(self) -> CodedGathers | None:
        """The weights that may be gathered in codes; None: there are none."""

    def show(self, scopes: Scopes) -> None:
        """Let Linears multiply what the recipe says. Called when all strategies are applied."""


# (name -> Linear, name of a Linear -> name of its weight) -> the recipe on these. Called before any
# strategy is applied.
Start = Callable[[Mapping[str, nn.Linear], Mapping[str, str]], OnModel]


@dataclass(frozen=True)
class RoundedOperands:
    """Rounds operands by hooks; None: the operand stays as it is. An OnModel for any model."""

    weights: Rounding | None
    inputs: Rounding | None = None
    coded: CodedGathers | None = None

    def show(self, scopes: Scopes) -> None:
        show_operands(self.weights, self.inputs, scopes)


class RecipeHook(ModuleHook):
    """Marks a Linear that has a recipe.

    As a hook it does nothing. But in evaluation nn.TransformerEncoderLayer computes with the
    weights of its Linears, without calling them, unless one of its modules has a hook.
    """


class Recipe:
    """What the Linears of a model multiply.

    If a range is taken over ranks, as with one scale per matrix, then all ranks must call the same
    Linears equally often, also in evaluation.

    Args:
        weights, inputs, output_grads: the operands that are rounded; None: this one is not.
        start: applies the recipe.
        linears: globs on the names of modules, where a * is one name between dots. Default: all
            that are inside the model's `units`, or inside the units that `parallelize` is given.
            A str is one glob.
    """

    def __init__(
        self, weights: Ranged | None, inputs: Ranged | None, output_grads: Ranged | None,
        start: Start, linears: Sequence[str] | str = (),
    ) -> None:  # fmt: skip
        self.weights, self.inputs, self.output_grads = weights, inputs, output_grads
        self.start = start
        self.linears = (linears,) if isinstance(linears, str) else tuple(linears)

    @property
    def mixes_rows(self) -> bool:
        """Whether a token's output depends on the other tokens of the micro-batch."""
        rows = Split("", width=0, shard=0, rows=("rows",))
        roundings = self.inputs, self.output_grads
        return any(r is not None and "rows" in r.over(rows) for r in roundings)

    def on(self, model: nn.Module, units: Sequence[type[nn.Module] | str] = ()) -> nn.Module:
        """Apply the recipe to a plain model in one process, in place. Returns the model.

        Args:
            units: as for `parallelize`, if the model has no attribute `units`. If some recompute
                their activations, they must do so already.

        Raises:
            UserError: there is no Linear in the units, or one that has a recipe, or a weight that
                is computed from other parameters.
        """
        named = find_units(model, units or getattr(model, "units", ()))
        linears = linears_of(model, self, named)
        alone = {name: LinearOperands(name, m, unsplit(name, m)) for name, m in linears.items()}
        self._check(alone.values())
        on_model = self.begin(linears, names_of_weights(model, linears))
        on_model.show(scopes_of([model], named, alone))
        return model

    def begin(self, linears: Mapping[str, nn.Linear], weights: Mapping[str, str]) -> OnModel:
        """`start`, and mark the Linears. Raises UserError if one has a recipe already."""
        for name, linear in linears.items():
            if any(isinstance(hook, RecipeHook) for hook in linear._forward_pre_hooks.values()):
                raise UserError(
                    f"{name} has a recipe already (recipe=); apply one recipe to a fresh model"
                )
        on_model = self.start(linears, weights)
        for linear in linears.values():
            linear.register_forward_pre_hook(RecipeHook(do_nothing))
        return on_model

    def _check(self, linears: Iterable[LinearOperands]) -> None:
        """Raise UserError if an operand cannot be rounded at all."""
        for linear in linears:
            operands = self.weights, self.inputs, self.output_grads
            for operand, split in zip(operands, linear.splits, strict=True):
                if operand is not None:
                    operand.over(split)


def linears_of(
    model: nn.Module, recipe: Recipe, units: Mapping[str, nn.Module]
) -> dict[str, nn.Linear]:
    """The Linears to which a recipe applies, by name.

    Args:
        units: those of `parallelize`, which count if the model has none of its own.

    Raises:
        UserError: there are none, or a glob names none.
    """
    modules = dict(model.named_modules())
    # nn.MultiheadAttention reads the weights of its out_proj directly, and never calls it.
    never_called = {m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    linears = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module not in never_called
    }
    if recipe.linears:
        return by_globs(linears, recipe.linears)
    own = find_units(model, getattr(model, "units", ())) or units
    inside = {m for n, unit in own.items() if n for m in unit.modules() if m is not unit}
    found = {name: linear for name, linear in linears.items() if linear in inside}
    if not found:
        kind = type(model).__name__
        raise UserError(
            f"{kind} has no nn.Linear inside of units, and the recipe rounds only these (recipe=); "
            'give units=[Block], or name them: linears=("layers.*.up",)'
        )
    return found


def names_of_weights(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Name of a Linear -> the name of its weight. A tied weight has the first of its names.

    Raises:
        UserError: a weight is no parameter.
    """
    name_of: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for name, linear in linears.items():
        if linear.weight not in name_of:
            raise UserError(
                f"{name} computes its weight from other parameters, and the recipe rounds "
                "parameters only (recipe=); leave it out: linears=(...), or remove its "
                "parametrization"
            )
    return {name: name_of[linear.weight] for name, linear in linears.items()}


def by_globs(linears: Mapping[str, nn.Linear], globs: Sequence[str]) -> dict[str, nn.Linear]:
    """The Linears that globs name. Raises UserError if a glob names none."""
    found: dict[str, nn.Linear] = {}
    for glob in globs:
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        matched = {name: m for name, m in linears.items() if pattern.fullmatch(name)}
        if not matched:
            raise UserError(
                f"{shown(glob)} names no nn.Linear (linears=); there are "
                f"{', '.join([*linears][:8])}{', ...' * (len(linears) > 8)}"
            )
        found |= matched
    return found
