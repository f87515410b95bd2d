"""The protocol of strategies: their input, their result, and the events of a step.

[Note: the gradient convention] There is one division in the project. The loss of a step is

    loss = (sum over the tokens of the global batch) / (number of tokens in the global batch)

and each micro-batch on each rank computes its own tokens' share of this loss, already divided by
the global count. Gradients accumulate over micro-batches in `.grad` and are summed over ranks. We
average nothing, so ragged batches and unequal token counts are exact. A mean of means would not be.

A strategy may change what a module computes, but it never hooks gradients or calls backward. The
runner does both, and calls the methods of `Sync` at each step event. So one strategy runs under a
plain loop and under a pipeline schedule. Strategies store parameter names, and look up a parameter
when they need it, because another strategy may have replaced it.

[Note: composing strategies] Several strategies are applied one after another, outermost first. Each
takes one `Setup` and returns one `Applied`, whose layouts extend those in the setup.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm.context import CommContext
from dist_lab.layout.layout import Layout
from dist_lab.step.setup import Stages

ROOT = ""  # the unit that is the model itself


class Phase(Enum):
    """The phase of a step in which a unit is used. ABORT: an exception has ended the step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    ABORT = "abort"


class Sync:
    """A strategy's response to each event of a step. Methods that are not overridden do nothing."""

    def microbatch(self, *, last: bool) -> None:
        """A micro-batch begins, or in a pipeline a run. `last`: gradients are reduced after it."""

    def unshard(self, unit: str, phase: Phase) -> None:
        """The unit is about to be used: its parameters must be unsharded."""

    def backward_will_come(self, unit: str, visit: object) -> None:
        """A forward of the unit has ended. Its backward may come as long as `visit` is alive."""

    def reshard(self, unit: str, phase: Phase) -> None:
        """The unit has been used: its unsharded parameters may be freed."""

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        """These gradients now include this micro-batch. `last`: they are complete."""

    def backward_done(self, unit: str, *, last: bool) -> None:
        """This micro-batch adds nothing more to the unit's gradients, also to those that it has not
        used. Only a schedule knows this before `finish`. ROOT: all stages of this rank.
        """

    def finish(self) -> None:
        """Backward is over. On return `.grad` is the global gradient of each local parameter."""

    def settle(self) -> None:
        """Copy a user's changes between a parameter's two tensors, if it has two. Sends nothing."""

    def after_step(self) -> None:
        """The optimizer has stepped: send the new weights to the ranks that need them."""

    def forget(self) -> None:
        """The step was aborted: drop gradients that have not reached a parameter's `.grad`."""

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors kept besides parameters and their `.grad`, as (kind, tensor), with
        kind "gathered", "gradients" or "buffers". The storage of some may be empty at the moment.
        """
        yield from ()


class Chain(Sync):
    """Several Syncs as one. Each event goes to the links in order. An empty chain does nothing.

    The order is inner to outer, the reverse of the order in which strategies are applied: gradients
    are summed over the data axes first, then over tp, then over the pp stages that share a weight.
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

    def backward_done(self, unit: str, *, last: bool) -> None:
        for link in self.links:
            link.backward_done(unit, last=last)

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
class Applied:
    """The result of a strategy: what it did to the model.

    layouts: name -> the layout of each parameter, also of those that are only on other ranks
    sync: communicates parameters and gradients at the events of a step
    about: for a strategy of a library, its configuration; shown beside its measurements
    leaves: name -> the autograd leaf, where it is not the parameter in the model:
        see [Note: two tensors of one name] in sharded/sharded_param.py
    stepped: name -> the tensor that optimizers step on, where it is not the parameter in the model
    sharded_between_units: a module holds shards, and cannot compute, while its unit is resharded
    unshard_each_action: in a pipeline, a stage is unsharded for each action; if not, once for all
    reduce_each_microbatch: gradients are reduced, and freed, after each micro-batch
    unit_of: name -> the unit whose unshard allocates the leaf's memory and whose reshard frees it,
        in forward and in backward; see step/saved.py
    make_optimizer: (class, groups of parameters, options) -> optimizer, for a library that
        shards optimizer state by itself
    make_runner: (model, chain, comm, units, applied) -> a `Step`, for a strategy that schedules
        forwards and backwards itself
    buffers: name -> the layout of a buffer, where it is not on every rank
    stages: the stages of a pipeline; of a later strategy: the same, in wrappers of a library
    """

    layouts: Mapping[str, Layout]
    sync: Sync
    about: str = ""
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    stepped: Mapping[str, nn.Parameter] = field(default_factory=dict)
    sharded_between_units: bool = False
    unshard_each_action: bool = False
    reduce_each_microbatch: bool = False
    unit_of: Mapping[str, str] = field(default_factory=dict)
    make_optimizer: "MakeOptimizer | None" = None
    make_runner: "MakeRunner | None" = None
    buffers: Mapping[str, Layout] = field(default_factory=dict)
    stages: Stages | None = None


MakeOptimizer = Callable[
    [type[torch.optim.Optimizer], list[dict[str, Any]], Mapping[str, Any]], torch.optim.Optimizer
]
# Returns a `Step` (step/order.py), which imports this file.
MakeRunner = Callable[[nn.Module, Chain, CommContext, Mapping[str, nn.Module], Applied], Any]
Apply = Callable[..., Applied]  # (setup, **the strategy's options)
