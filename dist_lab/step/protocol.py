"""The protocol of strategies: what one is handed, what it returns, and when gradients travel.

[Note: the gradient convention] There is one division in the project. The loss of a step is

    loss = (sum over the tokens of the global batch) / (number of tokens in the global batch)

and each micro-batch of each rank contributes its tokens' share, already divided by the global
count. Shares add up: over micro-batches in `.grad`, over ranks by a plain SUM. Nothing is averaged
anywhere, so ragged batches and unequal token counts are exact, where a mean of means would not be.

A strategy never registers hooks and never calls backward. A runner does, and tells the strategy
what has happened through the verbs of `Sync`; so the same strategy runs under a plain loop and
under a pipeline schedule. Strategies know parameters by name, and look the object up when they
need it, because another strategy may have replaced it since.

[Note: strategies fold] Several strategies are applied one after another, outermost first. Each is
handed one `Setup` and returns one `Applied`, whose layouts extend those that it was given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.context import CommContext
from dist_lab.layout.layout import Layout, Owed
from dist_lab.mesh.mesh import Axis, Mesh

ROOT = ""  # the unit that is the model itself


class Phase(Enum):
    """Where in a step a unit is used: ABORT where the step was broken off by an exception."""

    FORWARD = "forward"
    BACKWARD = "backward"
    ABORT = "abort"


class Sync:
    """What a strategy does at each moment of a step. A moment it does not write is empty."""

    def microbatch(self, *, last: bool) -> None:
        """Another micro-batch begins, of which `last` says whether gradients travel after it."""

    def unshard(self, unit: str, phase: Phase) -> None:
        """The unit is about to be used: its parameters must be unsharded."""

    def backward_will_come(self, unit: str, visit: object) -> None:
        """A forward leaves the unit, and backward may come back to it, as long as `visit` lives."""

    def reshard(self, unit: str, phase: Phase) -> None:
        """The unit has been used: what was gathered for it may go."""

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        """This micro-batch has been added to these gradients. `last`: nothing more will be."""

    def finish(self) -> None:
        """Backward is over. On return every `.grad` is global, for the local parameter."""

    def settle(self) -> None:
        """What a user did to one of a parameter's two tensors is done to both. Sends nothing."""

    def after_step(self) -> None:
        """The optimizer has stepped: send what the new weights owe to others."""

    def forget(self) -> None:
        """The step was broken off: gradients that have not reached a parameter's `.grad` go."""

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        """What is kept besides parameters and their `.grad`, as (kind, tensor): "gathered",
        "gradients" or "buffers". A tensor whose storage is empty at the moment may be among it.
        """
        yield from ()


class Chain(Sync):
    """Several Syncs as one, told of everything in this order. An empty chain does nothing.

    The order is inner to outer, the reverse of the order in which strategies are applied: what the
    data axis owes a gradient is summed first, then what tp owes, then what stages of pp share.
    """

    def __init__(self, *links: Sync) -> None:
        self.links = links

    def microbatch(self, *, last: bool) -> None:
        for link in self.links:
            link.microbatch(last=last)

    def unshard(self, unit: str, phase: Phase) -> None:
        for link in self.links:
            link.unshard(unit, phase)

    def backward_will_come(self, unit: str, visit: object) -> None:
        for link in self.links:
            link.backward_will_come(unit, visit)

    def reshard(self, unit: str, phase: Phase) -> None:
        for link in self.links:
            link.reshard(unit, phase)

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for link in self.links:
            link.grads_ready(names, last=last)

    def finish(self) -> None:
        for link in self.links:
            link.finish()

    def settle(self) -> None:
        for link in self.links:
            link.settle()

    def after_step(self) -> None:
        for link in self.links:
            link.after_step()

    def forget(self) -> None:
        for link in self.links:
            link.forget()

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for link in self.links:
            yield from link.extra_memory()


@dataclass(frozen=True)
class Setup:
    """What a strategy is handed: a model as the strategies before it have left it.

    model        the module, to be changed in place
    mesh         for parts of an axis (`mesh.sub`) and for more channels of one; both collective
    axes         name -> the axes that this strategy runs along, each with a process group of its
                 own; the last is the innermost
    layouts      name of a parameter -> how it lies so far
    full_value   name -> its value as it lies so far: whole under the first strategy, a shard under
                 a later one. Asked for once each, so that no rank needs all of them at once.
    units        name -> the modules to be unsharded, reduced and recomputed as one, ROOT among them
    param_dtype  the dtype of compute, where it is not that of the parameters
    recompute    each k-th unit computes again in backward; 0: none
    """

    model: nn.Module
    mesh: Mesh
    axes: Mapping[str, Axis]
    layouts: Mapping[str, Layout]
    full_value: Callable[[str], Tensor]
    units: Mapping[str, nn.Module]
    param_dtype: torch.dtype | None = None
    recompute: int = 0

    @property
    def axis(self) -> Axis:
        """The innermost axis, the only one of most strategies."""
        return list(self.axes.values())[-1]

    def channel(self) -> Axis:
        """`axis` with one more process group: see `Axis`. Collective."""
        return self.mesh.channel(self.axis.name)

    def owing_sums(self, *axes: Axis) -> dict[str, Layout]:
        """The layouts, the gradient of each trained parameter owed a sum over these axes."""
        sums = [Owed(axis.name) for axis in axes]
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return {**self.layouts} | {name: self.layouts[name].owing(*sums) for name in trained}


@dataclass(frozen=True)
class Applied:
    """What a strategy did to a model.

    layouts: name -> how each parameter now lies, also those that lie on other ranks alone
    sync: when they and their gradients travel
    about: for a library's strategy, the configuration it runs in; shown beside its numbers
    leaves: name -> the tensor that backward reaches, where it is not the parameter in the model:
        see [Note: two tensors of one name] in sharded/sharded_param.py
    stepped: name -> the tensor that optimizers step on, where it is not the parameter in the model
    sharded_between_units: outside of units the module holds shards, and cannot be computed with
    unit_of: name -> the unit with which its leaf gets memory, and loses it, whenever backward asks
        for it; see step/saved.py
    make_optimizer: (class, groups of parameters, options) -> optimizer, for a library that
        shards its state by itself
    make_runner: (model, chain, wire, units, applied) -> what runs the steps, of a strategy that
        splits time
    buffers: name -> how a buffer lies, where it is not on every rank
    """

    layouts: Mapping[str, Layout]
    sync: Sync
    about: str = ""
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    stepped: Mapping[str, nn.Parameter] = field(default_factory=dict)
    sharded_between_units: bool = False
    unit_of: Mapping[str, str] = field(default_factory=dict)
    make_optimizer: "MakeOptimizer | None" = None
    make_runner: "MakeRunner | None" = None
    buffers: Mapping[str, Layout] = field(default_factory=dict)


MakeOptimizer = Callable[
    [type[torch.optim.Optimizer], list[dict[str, Any]], Mapping[str, Any]], torch.optim.Optimizer
]
# Gives a `Step`, which this file does not know.
MakeRunner = Callable[[nn.Module, Chain, CommContext, Mapping[str, nn.Module], Applied], Any]
Apply = Callable[..., Applied]  # (setup, **options of its own)
