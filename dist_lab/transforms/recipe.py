"""A recipe says what Linears multiply, and which Linears: `parallelize(model, ..., recipe=...)`.

A run that quantises its weights is a recipe (quantize/qat.py), and so is one that multiplies in
8-bit floating point. How the rounded operands get into a forward: operands.py.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from dist_lab.errors import UserError, shown
from dist_lab.step.find_units import find_units
from dist_lab.transforms.operands import (
    LinearOperands,
    Rounding,
    Scopes,
    Split,
    scopes_of,
    show_operands,
)


class Recipe:
    """What the Linears of a model multiply.

    Args:
        weights, inputs, output_grads: how each operand is rounded; None: it is not.
        linears: globs on the names of modules, where a * is one name between dots. Default: all
            that are inside the model's `units`, or inside the units that `parallelize` is given.
    """

    def __init__(
        self, weights: Rounding | None, inputs: Rounding | None = None,
        output_grads: Rounding | None = None, linears: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.weights, self.inputs, self.output_grads = weights, inputs, output_grads
        self.linears = tuple(linears)

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
            UserError: there is no Linear in the units.
        """
        named = find_units(model, units or getattr(model, "units", ()))
        linears = linears_of(model, self, named)
        alone = {name: LinearOperands(name, linear) for name, linear in linears.items()}
        self.show(scopes_of([model], named, alone))
        return model

    def show(self, scopes: Scopes) -> None:
        """Register the hooks of the recipe."""
        show_operands(self.weights, self.inputs, self.output_grads, scopes)


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
