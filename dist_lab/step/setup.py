"""The input of a strategy: the model as the strategies before it left it, and all about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_lab.comm.ops import Pending
from dist_lab.layout.layout import Layout, Owed
from dist_lab.mesh.mesh import Axis, Mesh

ALIGNMENT = 64  # bytes: torch allocates tensors at multiples of it


@dataclass(frozen=True)
class Setup:
    """The input of a strategy: the model after the strategies applied before this one.

    model        the module, to be changed in place
    mesh         to make sub-axes (`mesh.sub`) and channels (`mesh.channel`); both collective
    axes         name -> the axes that this strategy runs along, each with a process group of its
                 own; the last is the innermost
    layouts      name of a parameter -> its layout so far, also of those that are on other stages
    trained      names of the parameters that require gradients, likewise
    full_value   name -> its value in that layout: the full tensor for the first strategy, a shard
                 for a later one. Called once for each, so that no rank needs all values at once.
    units        name -> a module to be unsharded and reduced as a whole, in a pipeline a stage;
                 includes ROOT
    inner_units  in a pipeline, whose stages are the units: the user's units inside of these
    param_dtype  the compute dtype, if it differs from the parameters' dtype
    recompute    every k-th of the user's units is recomputed in backward, which is arranged already
    stages       the pipeline's stages, if there is a pipeline around this strategy
    weight_work  the weight gradients that the pipeline's schedule defers
    coded        weights that are gathered in codes, for strategies that gather weights to use them
    fixed_order  the bits of a step must not depend on the layout: see step/fixed_order
    folded       filled in once all strategies are applied
    """

    model: nn.Module
    mesh: Mesh
    axes: Mapping[str, Axis]
    layouts: Mapping[str, Layout]
    trained: frozenset[str]
    full_value: Callable[[str], Tensor]
    units: Mapping[str, nn.Module]
    param_dtype: torch.dtype | None = None
    recompute: int = 0
    inner_units: Mapping[str, nn.Module] = field(default_factory=dict)
    stages: "Stages | None" = None
    weight_work: "WeightWork" = field(default_factory=lambda: WeightWork())
    coded: "CodedGathers | None" = None
    fixed_order: bool = False
    folded: "Folded" = field(default_factory=lambda: Folded())

    @property
    def axis(self) -> Axis:
        """The innermost axis. Most strategies have only one axis."""
        return list(self.axes.values())[-1]

    @property
    def whole_model(self) -> nn.Module:
        """The model with all its modules: on the meta device, if this rank holds a stage only."""
        return self.model if self.stages is None else self.stages.meta_model

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that hold the parameters, the model first. A stage may hold some directly."""
        return [self.model, *(self.stages.modules.values() if self.stages else ())]

    def stages_of(self, name: str) -> tuple[int, ...]:
        """The pipeline stages that use a parameter, of any rank; () without a pipeline."""
        return self.stages.stages_of[name] if self.stages else ()

    def units_of(self, name: str) -> tuple[str, ...]:
        """The stages of this rank that use a parameter, as units; () without a pipeline."""
        local = self.stages.modules if self.stages else {}
        return tuple(unit_of_stage(stage) for stage in self.stages_of(name) if stage in local)

    def slot_length(self, numel: int, dtype: torch.dtype, ranks: int = 1) -> int:
        """The elements that a parameter takes in a flat buffer. With a fixed order the next one
        begins where a tensor of its own would, because a matrix product may round differently at
        another address. If several ranks hold a part each, no rank computes with its part.
        """
        step = max(1, ALIGNMENT // dtype.itemsize) if self.fixed_order and ranks == 1 else 1
        return -(-numel // step) * step

    def channel(self) -> Axis:
        """`axis` with a process group of its own: see `Axis`. Collective."""
        return self.mesh.channel(self.axis.name)

    def owing_sums(self, *axes: Axis) -> dict[str, Layout]:
        """The layouts, with a pending sum over these axes for each trained parameter's gradient."""
        sums = [Owed(axis.name) for axis in axes]
        return {**self.layouts} | {n: self.layouts[n].owing(*sums) for n in self.trained}


AllGather = Callable[[Sequence[Tensor], Tensor, Axis], Pending]  # as ops.all_gather_coalesced


class CodedGathers(Protocol):
    """Makes the all-gathers of weights in codes: see quantize/lowp/gather.py.

    layers: whose weights these are
    """

    layers: frozenset[nn.Module]

    def all_gather_of(self, names: Sequence[str], range_axis: Axis) -> AllGather:
        """The all-gather of these weights, whose parts all ranks of `range_axis` hold."""


@dataclass
class Folded:
    """What is known only once all strategies are applied; empty before.

    layouts: name -> the final layout of each parameter
    stepped: name -> the tensor that optimizers step on, where it is not the parameter in the model
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    stepped: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def gradient_holder(self, model: nn.Module, name: str) -> nn.Parameter:
        """The tensor whose `.grad` is the gradient, after the data-parallel strategy's finish()."""
        return self.stepped[name] if name in self.stepped else model.get_parameter(name)


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline, for the strategies that are applied inside of it.

    modules      stage -> its module, for this rank's stages
    count        the number of stages of all ranks
    stages_of    name of a parameter, of any rank -> the stages that use it
    meta_model   the whole model on the meta device. The shapes of messages between stages come from
                 it, so a strategy that changes activations is applied to it as well.
    traced       the stages are parts of the graph of the model, not modules in sequence
    """

    modules: Mapping[int, nn.Module]
    count: int
    stages_of: Mapping[str, tuple[int, ...]]
    meta_model: nn.Module
    traced: bool

    @property
    def units(self) -> dict[str, nn.Module]:
        """Each stage is a unit, as the schedule unshards a whole stage."""
        return {unit_of_stage(stage): module for stage, module in self.modules.items()}


def unit_of_stage(stage: int) -> str:
    return f"stage {stage}"


class WeightWork:
    """The gradients of weights that a schedule with a split backward computes later.

    In a forward, `queue` is the list to which the backward of that forward appends its work; None:
    weights get their gradients in backward.
    """

    queue: list[Callable[[], None]] | None = None
