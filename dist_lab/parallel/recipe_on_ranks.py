"""Applies a recipe to a model under strategies: finds the ranks that share each operand's range.

    tp        colwise     W[F_tp, D]  x[B, D]  dy[B, F_tp]     rows of W are split; columns of dy
              rowwise     W[F, D_tp]  x[B, D_tp]  dy[B, F]     columns of W and of x are split
              sequence    rows of x and dy are split over tp as well
    data      x[B_dp]  dy[B_dp]                                rows of x and dy are split

All other strategies show a forward the weight as tp has left it: fsdp unshards it, zero keeps it,
a pipeline's stage holds it. A range is a maximum, so taking it over ranks that have the same
elements changes nothing. Each kind of axis has a process group of its own, because backward
takes ranges too, while gradients are on their way. See transforms/operands.py.

`RecipeOnRanks` is made before any strategy changes the model, when names are those of one process.
`bind` registers the hooks when all strategies are applied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, Shard, shard_bounds
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.mesh.topology import DATA_AXES, ORDER
from dist_lab.step.protocol import Applied
from dist_lab.transforms.operands import LinearOperands, Split, Splits, scopes_of
from dist_lab.transforms.recipe import Recipe, linears_of, names_of_weights

Axes = tuple[str, ...]


class RecipeOnRanks:
    """The Linears of one model to which a recipe applies.

    Args:
        units: name -> module, those of `parallelize`, without the model itself.
        options: those of the strategies.
        fixed_order: each virtual shard of the batch has ranges of its own, so that they do not
            depend on the number of ranks.

    Raises:
        UserError: `recipe` is none, there are no such Linears, or the strategies are a library's.
    """

    def __init__(
        self, recipe: Any, model: nn.Module, units: Mapping[str, nn.Module], mesh: Mesh,
        impls: Sequence[str], options: Mapping[str, Any], *, fixed_order: bool,
    ) -> None:  # fmt: skip
        if not isinstance(recipe, Recipe):
            raise UserError(
                f"recipe cannot be {recipe!r:.60}; give a recipe, such as "
                "dist_lab.quantize.qat.QAT(Scheme(4, 32))"
            )
        for impl in impls:
            if "@" in impl and not impl.endswith("@hand"):
                raise UserError(
                    f"{impl} puts weights and gradients in tensors of its own, and a recipe rounds "
                    'those of our strategies (recipe=); give impl="hand", or leave recipe out'
                )
        self.recipe, self.mesh, self.units = recipe, mesh, list(units)
        linears = linears_of(model, recipe, units)
        self.widths = {name: (m.in_features, m.out_features) for name, m in linears.items()}
        self.weights = names_of_weights(model, linears)
        self.on_model = recipe.begin(linears, self.weights)
        self.data: Axes = () if fixed_order else DATA_AXES
        self.splits_sequence = bool(options.get("sequence_parallel"))

    def bind(self, applied: Applied, model: nn.Module) -> None:
        """Register the hooks in this rank's part of the model. Collective: makes process groups.

        Args:
            applied: the result of all strategies.
        """
        layouts, stages = applied.layouts, applied.stages
        if stages is not None and stages.traced:
            raise UserError(
                "pp has cut this model's graph, in which no unit is called, so a recipe cannot "
                "round its weights (recipe=); give the model `stages`, globs on names of modules "
                'that in sequence are its forward: stages = ("embed", "layers.*", "head")'
            )
        self._refuse_partial(layouts)
        splits = {
            name: self._splits(name, dict(layouts[weight].splits).get("tp"))
            for name, weight in self.weights.items()
        }
        over = {name: self._over(each) for name, each in splits.items()}
        channels: dict[Axes, Axis | None] = {(): None}
        for axes in sorted({axes for each in over.values() for axes in each} - {()}):
            channels[axes] = self.mesh.channel(*axes)  # the same on every rank, in this order
        roots = [model] if stages is None else list(stages.modules.values())
        on_rank = {m for root in roots for m in root.modules()}
        local = {name: m for name, m in model.named_modules() if m in on_rank}
        operands: dict[str, LinearOperands] = {}
        for name in self.weights:
            linear = local.get(name)
            if isinstance(linear, nn.Linear):
                weight, inputs, grads = (channels[axes] for axes in over[name])
                operands[name] = LinearOperands(
                    name, linear, splits[name], weight, inputs, grads,
                    resharded=applied.sharded_between_units,
                )  # fmt: skip
        units = {name: local[name] for name in self.units if name in local}
        scopes = scopes_of(roots, units, operands)
        self._refuse_alone([name for name, unit in units.items() if unit in scopes])
        self.on_model.show(scopes)

    def _splits(self, name: str, placement: object) -> Splits:
        """How weight, input and output gradient of a Linear are split; `placement`: over tp."""
        inputs, outputs = self.widths[name]
        dim, tp = placement.dim if isinstance(placement, Shard) else None, self.mesh["tp"]
        colwise: Axes = ("tp",) if dim == 0 else ()
        rowwise: Axes = ("tp",) if dim == 1 else ()
        tokens: Axes = (*self.data, "tp") if self.splits_sequence else self.data

        def split(width: int, rows: Axes, columns: Axes) -> Split:
            shard = -(-width // tp.size) if columns else width
            first = shard_bounds(width, tp.size, tp.index)[0] if columns else 0
            return Split(name, width, shard, first, rows, columns)

        return (
            split(inputs, colwise, rowwise),
            split(inputs, tokens, rowwise),
            split(outputs, tokens, colwise),
        )

    def _over(self, splits: Splits) -> tuple[Axes, ...]:
        """The axes over which the ranges of weight, input and output gradient are taken."""
        recipe = self.recipe
        operands = recipe.weights, recipe.inputs, recipe.output_grads
        return tuple(
            () if operand is None else self._longer(operand.over(split))
            for operand, split in zip(operands, splits, strict=True)
        )

    def _longer(self, axes: Axes) -> Axes:
        """Those with several ranks, each once, in the order of the mesh."""
        return tuple(axis for axis in ORDER if axis in axes and self.mesh[axis].size > 1)

    def _refuse_partial(self, layouts: Mapping[str, Layout]) -> None:
        """Raise UserError if a rank has only a term of a gradient that the recipe rounds.

        Rounding the terms is not rounding their sum.
        """
        rounds = self.recipe.output_grads is not None
        for name, weight in self.weights.items() if rounds else ():
            if any(owed.axis == "tp" for owed in layouts[weight].partial):
                raise UserError(
                    f"each rank of tp has only a term of the gradient of {name}, because ranks "
                    "share its features or split its tokens, and the recipe rounds the sum "
                    "(recipe=); give tp at most as many ranks as there are key heads, or leave "
                    "recipe out"
                )

    def _refuse_alone(self, units: Sequence[str]) -> None:
        """Raise UserError if a Linear is a unit, and tp computes it together with another one."""
        parents = [name.rpartition(".")[0] for name in self.weights]
        for name in units if self.mesh["tp"].size > 1 else ():
            if name in self.weights and parents.count(name.rpartition(".")[0]) > 1:
                raise UserError(
                    f"{name} is a unit by itself, and under tp the Linears of one parent read "
                    "their input together, so their weights must be rounded together (recipe=); "
                    "give the module around it as a unit"
                )
