"""When gradients and borrowed parameters travel: the protocol that all strategies share.

[Note: the gradient convention] There is one division in the project. The loss of a step is

    loss = (sum over the tokens of the global batch) / (number of tokens in the global batch)

and each micro-batch of each rank contributes its tokens' share, already divided by the global
count. Shares add up: over micro-batches in `.grad`, over ranks by a plain SUM. Nothing is averaged
anywhere, so ragged batches and unequal token counts are exact, where a mean of means would not be.

A strategy never registers hooks and never calls backward. A runner does, and tells the strategy
what has happened through the verbs of `Sync`; so the same strategy runs under a plain loop and
under a pipeline schedule. Strategies know parameters by name, and look the object up when they
need it, because another strategy may have replaced it since.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lab.layout import Laid
from dist_lab.loss import LossFn, Pair
from dist_lab.mesh import Axis
from dist_lab.parallel.pp_actions import Schedule
from dist_lab.parallel.pp_timeline import Slot


class Sync:
    """What a strategy does at each moment of a step. A moment it does not write is empty."""

    def microbatch(self, *, last: bool) -> None:
        """Another micro-batch begins, of which `last` says whether gradients travel after it."""

    def unshard(self, unit: str) -> None:
        """The unit is about to be used: its parameters must be whole. "" is the model itself."""

    def reshard(self, unit: str) -> None:
        """The unit has been used: what was borrowed may go."""

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        """These gradients hold this micro-batch. `last`: nothing will be added to them."""

    def finish(self) -> None:
        """Backward is over. On return every `.grad` is global, for the local parameter."""

    def after_step(self) -> None:
        """The optimizer has stepped: pay what the new weights owe to others."""

    def forget(self) -> None:
        """The step was broken off: gradients that have not reached a parameter's `.grad` go."""

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """What is kept besides parameters and their `.grad`, as (kind, tensor): "gathered",
        "gradients" or "buffers". A tensor whose storage is empty at the moment may be among it.
        """
        yield from ()


class Chain(Sync):
    """Several Syncs as one, told of everything in this order. An empty chain does nothing."""

    def __init__(self, *links: Sync) -> None:
        self.links = links

    def microbatch(self, *, last: bool) -> None:
        for link in self.links:
            link.microbatch(last=last)

    def unshard(self, unit: str) -> None:
        for link in self.links:
            link.unshard(unit)

    def reshard(self, unit: str) -> None:
        for link in self.links:
            link.reshard(unit)

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        for link in self.links:
            link.grads_ready(names, last=last)

    def finish(self) -> None:
        for link in self.links:
            link.finish()

    def after_step(self) -> None:
        for link in self.links:
            link.after_step()

    def forget(self) -> None:
        for link in self.links:
            link.forget()

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for link in self.links:
            yield from link.held()


@dataclass(frozen=True)
class Applied:
    """What a strategy did to a model: where its parameters now lie, and when they travel.

    about: for a library's strategy, the configuration it runs in; shown beside its numbers
    leaves: name -> the tensor that backward reaches, where it is not the parameter in the model:
        see [Note: two tensors of one name] in shards.py
    make_optimizer: (class, groups of parameters, options) -> optimizer, for a library that
        shards its state by itself
    pipeline: what runs the micro-batches, of a strategy that splits time. Then `laid` is of the
        whole model, of which this rank has only some parameters.
    buffers: likewise, name -> how a buffer lies
    """

    laid: Mapping[str, Laid]
    sync: Sync
    about: str = ""
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    make_optimizer: "MakeOptimizer | None" = None
    pipeline: "Pipeline | None" = None
    buffers: Mapping[str, Laid] = field(default_factory=dict)


class Pipeline(Protocol):
    """Runs micro-batches through the stages of all ranks.

    Attributes:
        parts: this rank's stages, by number.
        slots: when each action of the last run began and ended, by this rank's clock, in seconds;
            none of a library's.
        schedule_for: number of micro-batches -> the schedule.
    """

    parts: Mapping[int, nn.Module]
    slots: list[Slot]
    schedule_for: Callable[[int], Schedule]

    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn, tell: "Tell") -> Tensor:
        """Forward and backward; the sum of the shares of the loss, 0 where that is not computed."""

    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn, tell: "Tell") -> Tensor:
        """The same by forward alone."""


class Tell(Protocol):
    """Who runs a pipeline is told what it does."""

    def begins(self, phase: str, what: str) -> None:
        """Something of this phase, "forward" or "backward"."""

    def gradients(self, stage: int, *, last: bool) -> None:
        """Those of the stage hold one more micro-batch. `last`: nothing will be added to them."""


MakeOptimizer = Callable[
    [type[torch.optim.Optimizer], list[dict[str, Any]], Mapping[str, Any]], torch.optim.Optimizer
]


def whole(model: nn.Module, axis: Axis) -> dict[str, Laid]:
    """Every parameter on every rank, its gradient owed a sum over the axis."""
    return {
        name: Laid(p.shape, p.dtype, sum_over=(axis,) if p.requires_grad else ())
        for name, p in model.named_parameters()
    }
