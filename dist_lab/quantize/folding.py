"""Moves a scale of each channel between two layers, so that the model computes the same.

    W x = (W diag(s)) (x / s)

Columns of W are multiplied by s, and the layer that makes x divides by it, in its own weights:
nothing is left to do at run time. Rounding W or x is another matter: a column that was multiplied
by 2 has half the relative error. AWQ and SmoothQuant choose s; this file puts it into the weights.

    source                         divides by s
    RMSNorm, LayerNorm             weight and bias
    Linear, before another one     rows and bias: v_proj before o_proj, as attention is linear in v;
                                   up_proj before down_proj, as silu(gate) * up is linear in up

[Note: the plan] It says what feeds each Linear, and it is data: globs on module names (`*`: one
name between dots), from Linears to sources. Models in zoo/ have their own, `scale_plan()`. For your
own model, pass one:

    plan = {"layers.*.attention.wq": "layers.*.attention_norm", ...}
    plan = {"layers.*.attention.wo": ("layers.*.attention.wv", head_dim)}

The second form is that of grouped-query attention: K heads of v feed H heads of o, H / K neighbors
each. The scale lies in v, so heads of o that share a head of v must share its scale.

[Note: powers of two] A plan may be wrong: if something else reads a source, its values change too.
So the first fold is a rehearsal. Products with powers of two are exact, so if s has only these, the
block's outputs must be the same, to the bit. If not, the plan is refused.

Letters: C channels of a source, D inputs of the Linears (D = C, or a multiple of it), R = D / C.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.quantize.blocks import Block

Source = str | tuple[str, int]
Plan = Mapping[str, Source]


@runtime_checkable
class HasScalePlan(Protocol):
    def scale_plan(self) -> Mapping[str, Source]: ...


@dataclass(frozen=True)
class Fed:
    """The Linears that read one source, and nothing else reads it.

    source: the full name of the module that divides by the scale
    linears: the full names of the Linears that multiply by it
    channels: C
    repeats: R, the number of neighboring blocks of inputs that are one block of channels
    block: the channels of a block, such as a head
    """

    source: str
    linears: tuple[str, ...]
    channels: int
    repeats: int = 1
    block: int = 1

    def spread(self, scale: Tensor) -> Tensor:
        """scale (C,) of channels -> (D,) of inputs: equal for inputs that share a channel."""
        return scale.view(-1, self.block).repeat_interleave(self.repeats, 0).flatten()

    def shared(self, x: Tensor) -> Tensor:
        """x (D,) of inputs -> (C, R): the inputs that share each channel."""
        return x.view(-1, self.repeats, self.block).transpose(1, 2).reshape(-1, self.repeats)


@torch.no_grad()
def fold(model: nn.Module, fed: Fed, scale: Tensor) -> None:
    """Divide a source by a scale, and multiply its Linears by it, in place.

    Args:
        scale: (C,), positive.
    """
    assert ((scale > 0) & (scale < torch.inf)).all(), scale
    source = model.get_submodule(fed.source)
    for parameter in source.parameters(recurse=False):  # weight (C,) or (C, ...), and bias (C,)
        parameter.copy_(parameter / scale.view(-1, *[1] * (parameter.dim() - 1)))
    for name in fed.linears:
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_(weight * fed.spread(scale))


def read_plan(model: nn.Module, plan: Plan | None) -> list[Fed]:
    """The model's sources, in the order of the plan, each with the Linears that it feeds.

    Args:
        plan: the caller's; None: the model's own, `scale_plan()`. See [Note: the plan].

    Raises:
        UserError: there is no plan, a name matches nothing, or sizes do not fit.
    """
    if plan is None:
        if not isinstance(model, HasScalePlan):
            raise UserError(
                f"{type(model).__name__} has no scale_plan(), which says what feeds each Linear; "
                'give plan={"layers.*.up": "layers.*.norm", ...}, or plan={} to scale nothing'
            )
        plan = model.scale_plan()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    readers: dict[tuple[str, int | None], list[str]] = {}
    for glob, source in plan.items():
        source_glob, block = source if isinstance(source, tuple) else (source, None)
        pattern = re.compile(re.escape(glob).replace(r"\*", r"([^.]+)"))
        matches = [match for name in linears if (match := pattern.fullmatch(name))]
        if not matches:
            raise UserError(
                f"the plan's {glob} matches no Linear; there are {', '.join(list(linears)[:12])}"
                + (", ..." if len(linears) > 12 else "")
            )
        for match in matches:
            name = source_glob
            for star in match.groups():
                name = name.replace("*", star, 1)
            readers.setdefault((name, block), []).append(match[0])
    return [
        _fed(model, name, block, {reader: linears[reader].in_features for reader in read})
        for (name, block), read in readers.items()
    ]


def rehearse(model: nn.Module, block: Block, feds: Sequence[Fed]) -> None:
    """Fold powers of two into a block, and take them out again: see [Note: powers of two].

    Raises:
        UserError: they change what the block computes, or its outputs are not finite.
    """
    if not feds:
        return
    before = block.run_shard(0)
    if not before.isfinite().all():
        raise UserError(
            f"the outputs of {block.name} are not finite on the calibration data; quantise a model "
            "whose loss is finite"
        )
    for fed in feds:
        exponents = torch.arange(fed.channels, device=before.device) % 5 - 2
        scale = 2.0**exponents
        fold(model, fed, scale)
        after = block.run_shard(0)
        fold(model, fed, 1 / scale)
        if not torch.equal(before, after):
            raise UserError(
                f"scales folded from {fed.source} into {', '.join(fed.linears)} change the outputs "
                f"of {block.name} by up to {(after - before).abs().max():.1e} (plan=): something "
                "else reads this source, or what lies between is not linear; leave it out"
            )


def _fed(model: nn.Module, name: str, block: int | None, inputs: Mapping[str, int]) -> Fed:
    """Check the sizes of a source, and of the Linears that read it: name -> number of inputs."""
    linears = tuple(inputs)
    try:
        source = model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"the plan feeds {linears[0]} from {name}, and there is no such module"
        ) from None
    weight = getattr(source, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() > 2:
        raise UserError(
            f"the plan's {name} is a {type(source).__name__} without a weight that can be divided; "
            f"leave out {linears[0]}, or give the norm or the Linear before it"
        )
    channels, width = len(weight), inputs[linears[0]]
    if set(inputs.values()) == {channels}:
        return Fed(name, linears, channels)
    if block is None or set(inputs.values()) != {width} or width % channels or channels % block:
        sizes = ", ".join(f"{linear} reads {size}" for linear, size in inputs.items())
        raise UserError(
            f"the plan's {name} makes {channels} channels, and {sizes}"
            + (f" in blocks of {block}" if block else "")
            + '; if heads are shared, give ("name of the source", size of a head)'
        )
    return Fed(name, linears, channels, width // channels, block)
