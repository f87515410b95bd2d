"""The recipes of low precision, for `parallelize(model, ..., recipe=LowPrecision("mxfp8"))`.

codecs.py has the table: what each operand becomes. product.py multiplies, on one rank of several.
gather.py lets fsdp send the codes of weights instead of the weights.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from dist_lab.errors import UserError, one_of, shown
from dist_lab.quantize.lowp.blocks import Codec
from dist_lab.quantize.lowp.codecs import CODECS, Codecs
from dist_lab.quantize.lowp.gather import CodedWeights
from dist_lab.quantize.lowp.product import CodedLinear, Ranges
from dist_lab.step.products import ProductForward
from dist_lab.transforms.operands import Scopes, Split
from dist_lab.transforms.recipe import Recipe


class LowPrecision(Recipe):
    """Train with matrix products of 8-bit or 4-bit floating-point numbers, emulated.

    Args:
        name: a name in CODECS: fp8, fp8-block, mxfp8, mxfp4, nvfp4.
        linears: see Recipe.

    Raises:
        UserError: there is no such recipe.
    """

    def __init__(self, name: str, linears: Sequence[str] | str = ()) -> None:
        if name not in CODECS:
            raise UserError(f"no recipe {shown(name)} (recipe=); give {one_of([*CODECS], name)}")
        codecs = CODECS[name]
        operands = codecs.weight, codecs.x, codecs.dy
        weight, x, dy = (CodedOperand(name, codec) for codec in operands)

        def start(linears: Mapping[str, nn.Linear], weights: Mapping[str, str]) -> CodedLinears:
            return CodedLinears(codecs, linears, weights)

        super().__init__(weight, x, dy, start, linears)


class CodedLinears:
    """The recipe on the Linears of one model.

    Args:
        weights: name of a Linear -> name of its weight.

    Attributes:
        coded: the weights that fsdp may gather in codes; None: they have blocks.

    Raises:
        UserError: a Linear has another forward than nn.Linear, which would be lost.
    """

    def __init__(
        self, codecs: Codecs, linears: Mapping[str, nn.Linear], weights: Mapping[str, str]
    ) -> None:
        self.codecs, self.weights = codecs, weights
        whole = codecs.weight.block is None
        self.coded = CodedWeights(codecs.weight, linears.values()) if whole else None
        self.ranges = Ranges(self.coded.largest if self.coded else {})
        for name, linear in linears.items():
            if getattr(linear.forward, "__func__", None) is not nn.Linear.forward:
                raise UserError(
                    f"{name} computes its own forward, and the recipe multiplies for nn.Linear "
                    "only (recipe=); leave it out: linears=(...)"
                )
        for linear in linears.values():
            linear.forward = ProductForward(linear)  # type: ignore[method-assign]

    def show(self, scopes: Scopes) -> None:
        for layers in scopes.values():
            for layer in layers:
                product = CodedLinear(self.codecs, layer, self.weights[layer.name], self.ranges)
                layer.module.new_product = product  # type: ignore[assignment]


class CodedOperand:
    """Which ranks share the range of an operand: see `Ranged` in transforms/operands.py.

    Blocks have a range of their own. The ranks with other rows are named all the same, because no
    block of tokens may lie on two of them: product.py checks the number of tokens.
    """

    def __init__(self, recipe: str, codec: Codec) -> None:
        self.recipe, self.codec = recipe, codec

    def over(self, split: Split) -> tuple[str, ...]:
        size = 1 if self.codec.block is None else self.codec.block[1]
        if split.columns and split.shard % size:
            raise UserError(
                f"{split.name} has {split.width} features, of which a rank of "
                f"{' and '.join(split.columns)} has {split.shard}: blocks of {size} would lie on "
                f"two ranks (recipe={self.recipe}); let a rank have a multiple of {size}, or give "
                "recipe fp8, which has no blocks"
            )
        return (*split.rows, *split.columns)
