"""What our runners tell PyTorch's FSDP2, whose own hooks gather and reduce: see fsdp_torch.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.protocol import ROOT, Phase, Sync
from dist_lab.torch_private import forget_unsharded_gradients, is_view, tree_map_only


@dataclass(eq=False, kw_only=True)
class Through(Sync):
    """What both syncs below know.

    sharded: unit -> its module, which is an FSDPModule now
    roots: the units that are in no other: the model, or the stages of a pipeline
    leaves: name -> the unsharded parameter, to whose `.grad` backward adds
    scalars: names of 0-dim trained parameters, which the library ignores
    find_unused: ranks may use different parameters
    """

    model: nn.Module
    sharded: Mapping[str, Any]
    roots: Sequence[str]
    leaves: Mapping[str, Tensor]
    axis: Axis
    replicate: Axis
    scalars: Sequence[str]
    find_unused: bool

    def extra_memory(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.leaves.values():
            yield "gathered", leaf


@dataclass(eq=False, kw_only=True)
class ThroughFSDP(Through):
    """Leaves communication to the library's hooks, and changes its settings during a step."""

    reshard_after_forward: bool
    keep_gathered: bool
    defer_reduce: bool

    last = True  # this micro-batch is the last of the step
    keep_unsharded = False  # units stay unsharded until the last micro-batch's backward
    is_reduction_due = False  # a backward has left gradients for a later one to reduce
    has_begun = False  # the library's hooks have seen this forward begin
    has_ended = True  # the last forward or backward ended without an exception

    def __post_init__(self) -> None:
        self.root = self.sharded[ROOT]
        self.used: list[set[str]] = []  # names with a gradient, for each forward since finish()
        # Before the library's own hook, because an exception may have left it in a wrong state.
        self.model.register_forward_pre_hook(ModuleHook(self._before_forward), prepend=True)
        self.model.register_forward_hook(ModuleHook(self._after_forward))

    def microbatch(self, *, last: bool) -> None:
        if last != self.last:
            self.last = last
            if self.defer_reduce:
                self.root.set_requires_gradient_sync(last)
            elif self.replicate.size > 1:
                self.root.set_requires_all_reduce(last)
            if self.keep_gathered:
                self.root.set_reshard_after_backward(last)

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.BACKWARD:
            self.has_ended = False
        elif unit == ROOT:
            self.has_begun = True
            if torch.is_grad_enabled():
                self.used.append(set())
            if self.keep_gathered:
                keep = self.keep_unsharded or not self.reshard_after_forward
                self.root.set_reshard_after_forward(not keep)

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.BACKWARD:
            if unit == ROOT:
                self.has_ended = True
                self.keep_unsharded = self.keep_gathered and not self.last
                self.is_reduction_due = not self.last and (
                    self.defer_reduce or self.replicate.size > 1
                )
        elif not torch.is_grad_enabled():  # no backward will follow and reshard it
            for name, module in self.sharded.items():
                if unit in (ROOT, name):
                    module.reshard()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.used[-1].update(names)

    def finish(self) -> None:
        used, self.used = [names for names in self.used if names], []
        if self.is_reduction_due:
            raise UserError(
                "finish() before a last micro-batch: FSDP2 sums the gradients of all micro-batches "
                "in the backward of the last one; wrap the last one in job.microbatch(last=True)"
            )
        used_once: set[str] = set().union(*used)
        uneven = sorted(name for name in used_once if not all(name in names for names in used))
        if uneven and not self.find_unused and not self.defer_reduce and self.replicate.size > 1:
            raise UserError(
                f"{uneven[0]} was not used in each micro-batch, so FSDP2 has lost the gradient "
                "that other replicas have for it; give find_unused=True"
            )
        sum_scalars(self, used_once)
        for module in self.sharded.values():
            module.reshard()
        self.keep_unsharded = False

    def forget(self) -> None:
        self.used, self.keep_unsharded, self.is_reduction_due = [], False, False
        if self.has_begun:
            self._reset()

    def _reset(self) -> None:
        reset(self)
        self.has_ended = True

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self.has_ended:
            self._reset()
        self.has_begun = self.has_ended = False

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.has_ended = True


@dataclass(eq=False, kw_only=True)
class ThroughStages(Through):
    """In a pipeline the library's schedule gathers a stage, and reduces it after its last backward.

    Its runtime calls FSDP2 at the actions UNSHARD, RESHARD and REDUCE_GRAD. We do the rest.
    """

    has_begun = False  # there was a forward

    def __post_init__(self) -> None:
        self.used: set[str] = set()  # names with a gradient, since finish()

    def unshard(self, unit: str, phase: Phase) -> None:
        self.has_begun = True

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.FORWARD:  # an evaluation: no backward will follow and reshard it
            for module in self.sharded.values():
                module.reshard()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.used.update(names)

    def finish(self) -> None:
        used, self.used = self.used, set()
        sum_scalars(self, used)

    def forget(self) -> None:
        self.used = set()
        if self.has_begun:
            reset(self)


def sum_scalars(sync: Through, used: set[str]) -> None:
    """Sum the gradients of scalars, and clear those of unused parameters, which are 0."""
    trained = [name for name, leaf in sync.leaves.items() if leaf.requires_grad]
    names = [*sync.scalars, *(trained if sync.find_unused else ())]
    if not names:
        return
    gradients = [sync.model.get_parameter(name).grad for name in sync.scalars]
    flags = [g is not None for g in gradients] + [n in used for n in names[len(gradients) :]]
    values = [0.0 if g is None else float(g) for g in gradients]
    sums = torch.tensor([*values, *flags], dtype=torch.float64, device=sync.axis.device)
    for axis in (sync.axis, sync.replicate):
        sums = ops.all_reduce(sums, axis)
    for name, value in zip(sync.scalars, sums, strict=False):
        parameter = sync.model.get_parameter(name)
        parameter.grad = value.to(parameter.dtype)
    for name, users in zip(names, sums[len(sync.scalars) :].tolist(), strict=True):
        if users == 0:
            sync.model.get_parameter(name).grad = None


def reset(sync: Through) -> None:
    """Clear what a step that an exception has broken off left in the library."""
    for unit in sync.roots:
        sync.sharded[unit].reset_iter_state()
    for leaf in sync.leaves.values():
        leaf.grad = None
    for module in sync.sharded.values():
        forget_unsharded_gradients(module)


def without_views(module: nn.Module, args: Any, output: Any) -> Any:
    """Replace each view in the output, such as a Linear's, by a tensor that is not a view.

    The library puts backward hooks on the output. A view that is changed in place loses its hook,
    so the library warns of every view.
    """
    return tree_map_only(Tensor, lambda x: _NoView.apply(x) if is_view(x) else x, output)


class _NoView(torch.autograd.Function):
    """The identity, on the same memory. For autograd the output is not a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return dy[0]
