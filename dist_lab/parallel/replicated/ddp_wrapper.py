"""A library's wrapper around a model, entered through the model itself.

Libraries return a new module that holds the old one, and all parameters have longer names then.
Here the model stays what one calls: hooks on it do what the wrapper's own forward does before and
after it calls the model. So names, units and the user's code are the same under every impl, and
nothing of ours comes between the library and its collectives.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.step.protocol import Phase, Sync
from dist_lab.torch_private import (
    ddp_forward_begins,
    ddp_forward_ends,
    forget_unsharded_gradients,
    tree_map_only,
)

ROOT = ""  # the unit that is the model itself


def wrap_in_ddp(
    model: nn.Module, axis: Axis, *, bucket_mb: float, find_unused: bool
) -> tuple["ThroughDDP", str]:
    """DistributedDataParallel as it is documented to run fastest, and a description of that.

    Gradients are views into its buckets. Without its broadcast of buffers, which would overwrite
    what a rank has measured by what rank 0 has, and of weights: parallelize() has seen to those.
    """
    ddp = DistributedDataParallel(
        model,
        process_group=axis.group,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        forward_sync_buffers=False,
        init_sync=False,
    )
    about = (
        f"torch DistributedDataParallel(bucket_cap_mb={bucket_mb:g}, gradient_as_bucket_view=True, "
        f"find_unused_parameters={find_unused}, forward_sync_buffers=False)"
    )
    return ThroughDDP(ddp, axis), about


class ThroughDDP(Sync):
    """Leaves everything to torch's DistributedDataParallel, which sums in its own backward hooks.

    The library averages over the ranks where the convention here is to add up (step/protocol.py).
    So the gradient is multiplied by the number of ranks where it enters the model, at its output:
    that is the smallest tensor there is to multiply, and the library runs as it always does. (A
    term of the loss that reaches a parameter past the output, such as a weight's norm, is
    averaged.)
    """

    def __init__(self, ddp: DistributedDataParallel, axis: Axis) -> None:
        self.ddp, self.axis = ddp, axis
        ddp.module.register_forward_pre_hook(ModuleHook(self._before), with_kwargs=True)
        ddp.module.register_forward_hook(ModuleHook(self._after))

    def microbatch(self, *, last: bool) -> None:
        self.ddp.require_backward_grad_sync = last  # what its no_sync() does

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ddp_forward_begins(self.ddp, *args, **kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        output = ddp_forward_ends(self.ddp, output)
        scaled: dict[int, Tensor] = {}  # a tensor that is returned twice is one

        def scale(tensor: Tensor) -> Tensor:
            if id(tensor) not in scaled and tensor.requires_grad:
                scaled[id(tensor)] = Times.apply(tensor, self.axis.size)
            return scaled.get(id(tensor), tensor)

        # Each gets a node of its own, so that one which depends on another is not scaled with it.
        output = tree_map_only(Tensor, scale, output)
        ours = {id(tensor) for tensor in scaled.values()}
        if any(t.requires_grad and id(t) not in ours for t in tensors_in(output)):
            raise UserError(
                f"the model returns a {type(output).__name__}, into which torch's pytree does not "
                "look; register it there, or return a tuple or a dict"
            )
        return output


class Times(torch.autograd.Function):
    """The identity, with a gradient that is so many times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None]:
        return dy[0] * ctx.factor, None


class ThroughFSDP(Sync):
    """Leaves everything to the library, which has hooks of its own; tells it which moment it is.

    Args:
        sharded: unit -> the module that it has become, an FSDPModule.
        leaves: name -> the whole parameter, into which backward adds.
        scalars: trained parameters that the library knows nothing of.
    """

    def __init__(
        self,
        model: nn.Module,
        sharded: Mapping[str, Any],
        leaves: Mapping[str, Tensor],
        axis: Axis,
        replicate: Axis,
        *,
        scalars: Sequence[str],
        reshard_after_forward: bool,
        keep_gathered: bool,
        defer_reduce: bool,
        find_unused: bool,
    ) -> None:
        self.model, self.root, self.sharded, self.leaves = model, sharded[ROOT], sharded, leaves
        self.axis, self.replicate, self.scalars = axis, replicate, scalars
        self.reshard_after_forward, self.keep_gathered = reshard_after_forward, keep_gathered
        self.defer_reduce, self.find_unused = defer_reduce, find_unused
        self.last = True  # nothing follows the micro-batch that is under way
        self.staying = False  # units stay whole until the last micro-batch's backward
        self.owed = False  # a backward has left gradients for a later one to reduce
        self.used: list[set[str]] = []  # by each forward since finish(), as its backward shows
        self.begun = False  # this forward, and the library knows of it
        self.ended = True  # the last forward and the last backward have, without an exception
        # Before the library's own hook, which an exception in the last step may have confused.
        model.register_forward_pre_hook(ModuleHook(self._before_forward), prepend=True)
        model.register_forward_hook(ModuleHook(self._after_forward))

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
            self.ended = False
        elif unit == ROOT:
            self.begun = True
            if torch.is_grad_enabled():
                self.used.append(set())
            if self.keep_gathered:
                keep = self.staying or not self.reshard_after_forward
                self.root.set_reshard_after_forward(not keep)

    def reshard(self, unit: str, phase: Phase) -> None:
        if phase is Phase.BACKWARD:
            if unit == ROOT:
                self.ended = True
                self.staying = self.keep_gathered and not self.last
                self.owed = not self.last and (self.defer_reduce or self.replicate.size > 1)
        elif not torch.is_grad_enabled():  # no backward follows that would do it
            for name, module in self.sharded.items():
                if unit in (ROOT, name):
                    module.reshard()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self.used[-1].update(names)

    def finish(self) -> None:
        used, self.used = [names for names in self.used if names], []
        if self.owed:
            raise UserError(
                "finish() before a last micro-batch, in whose backward FSDP2 sums the gradients of "
                "all: wrap that one in job.microbatch(last=True)"
            )
        anywhere: set[str] = set().union(*used)
        uneven = sorted(name for name in anywhere if not all(name in names for names in used))
        if uneven and not self.find_unused and not self.defer_reduce and self.replicate.size > 1:
            raise UserError(
                f"{uneven[0]} was not used in each micro-batch, and FSDP2 has lost what its "
                "gradient was on other replicas; give find_unused=True"
            )
        self._sum_scalars(anywhere)
        for module in self.sharded.values():
            module.reshard()
        self.staying = False

    def _sum_scalars(self, used: set[str]) -> None:
        """And find out what was used at all, for the library puts zeros where nobody has."""
        told = [name for name, leaf in self.leaves.items() if leaf.requires_grad]
        names = [*self.scalars, *(told if self.find_unused else ())]
        if not names:
            return
        gradients = [self.model.get_parameter(name).grad for name in self.scalars]
        flags = [g is not None for g in gradients] + [n in used for n in names[len(gradients) :]]
        mine = [0.0 if g is None else float(g) for g in gradients]
        both = torch.tensor([*mine, *flags], dtype=torch.float64, device=self.axis.wire.device)
        for axis in (self.axis, self.replicate):
            both = ops.all_reduce(both, axis)
        for name, value in zip(self.scalars, both, strict=False):
            parameter = self.model.get_parameter(name)
            parameter.grad = value.to(parameter.dtype)
        for name, ranks in zip(names, both[len(self.scalars) :].tolist(), strict=True):
            if ranks == 0:
                self.model.get_parameter(name).grad = None

    def forget(self) -> None:
        self.used, self.staying, self.owed = [], False, False
        if self.begun:
            self._reset()

    def _reset(self) -> None:
        self.root.reset_iter_state()
        for leaf in self.leaves.values():
            leaf.grad = None
        for module in self.sharded.values():
            forget_unsharded_gradients(module)
        self.ended = True

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.leaves.values():
            yield "gathered", leaf

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self.ended:
            self._reset()
        self.begun = self.ended = False

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ended = True
