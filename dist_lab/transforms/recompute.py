"""Activation recomputation: forget what a unit computed inside, and compute it again in backward.

    stored, n units of activations A with inputs I:    n A  ->  n I + A       compute: 4/3 of before

Backward needs what forward computed, and the first unit's waits for the longest. A unit that
recomputes keeps its inputs alone; when backward reaches it, its forward runs once more, and what
that yields is gone again before the next unit's turn. Recomputing each k-th unit lies in between.
Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174); the engine is
PyTorch's own `torch.utils.checkpoint`, without reentrance.

It changes no numbers, and no strategy knows of it. Only `forward` of the unit is replaced, so hooks
on the unit surround it as before and are not called again in backward: a strategy that lends a unit
its parameters does so before backward computes in it, which is when they are needed. Hooks on what
lies inside are called again.

[Note: twice is once] The second forward is to see what the first one saw, and to leave no trace:
* random masks are the same, since the state of the generators is kept and put back;
* buffers are as they were before the first forward, and what is written to them is thrown away:
  the running statistics of BatchNorm count a batch once;
* who surrounds a forward with something that changes its numbers surrounds the second as well:
  `CheckpointedForward.around`, which precision.py uses.
Anything else that a forward changes, such as a list that it was given, it would change twice.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_lab.errors import UserError
from dist_lab.step.hooks import StaysBehind

# unit -> a context to run its second forward in
Around = Callable[[nn.Module], AbstractContextManager[None]]


def recompute(model: nn.Module, units: Mapping[str, nn.Module], every: int) -> None:
    """Make each `every`-th unit recompute, in place, beginning with the first, held the longest.

    Args:
        units: by name, in the order of forward. One inside another does not count, and neither does
            the model itself: to recompute all at once would save nothing. Nor does a single layer,
            which keeps little but its inputs.
        every: 1 for all units, 0 for none.

    Raises:
        UserError: no such units, fewer than `every`, or one that recomputes already.
    """
    if every == 0:
        return
    outermost = _outermost(model, units)
    if not outermost:
        raise UserError(
            f"recompute={every}, and there is no unit of several layers; name some: units=[Block]"
        )
    if not 0 < every <= len(outermost):
        raise UserError(
            f"recompute={every} does not fit a model of {len(outermost)} units; give 1 for all, "
            f"k up to {len(outermost)} for each k-th, or 0 for none"
        )
    for name, unit in list(outermost.items())[::every]:
        if isinstance(unit.forward, CheckpointedForward):
            raise UserError(f"{name} recomputes already; call recompute() once, on a fresh model")
        unit.forward = CheckpointedForward(unit)


def _outermost(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    layers = {unit for unit in units.values() if not any(unit.children())}
    proper = {n: unit for n, unit in units.items() if unit is not model and unit not in layers}
    inside = {part for unit in proper.values() for part in unit.modules() if part is not unit}
    return {name: unit for name, unit in proper.items() if unit not in inside}


class CheckpointedForward(StaysBehind):
    """The `forward` of a unit that recomputes. Like all hooks of training, a copy leaves it behind.

    Attributes:
        around: unit -> a context to run the second forward in.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit
        self.forward = self.in_a_copy = unit.forward
        self.around: list[Around] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)

        def forward(*values: Any) -> Any:
            named = zip(kwargs_names, values[len(args) :], strict=True)
            return self.forward(*values[: len(args)], **dict(named))

        # By position, where none can be taken for an option of checkpoint's own.
        kwargs_names = tuple(kwargs)
        again = Replay(self.unit, self.around)
        return checkpoint(
            forward, *args, *kwargs.values(),
            use_reentrant=False, preserve_rng_state=True, context_fn=lambda: (nullcontext(), again),
        )  # fmt: skip


class Replay:
    """Around the second forward of one call, and around a third if backward comes twice.

    Made before the first, it takes copies of the unit's buffers; see [Note: twice is once].
    """

    def __init__(self, unit: nn.Module, around: Sequence[Around]) -> None:
        self.unit, self.around = unit, around
        self.stack = ExitStack()
        self.buffers = [
            (part._buffers, {name: _copy(buffer) for name, buffer in part._buffers.items()})
            for part in unit.modules()
            if part._buffers
        ]

    def __enter__(self) -> None:
        with ExitStack() as entered:
            for held, before in self.buffers:
                entered.callback(held.update, dict(held))
                held.update({name: _copy(buffer) for name, buffer in before.items()})
            for surround in self.around:
                entered.enter_context(surround(self.unit))
            self.stack = entered.pop_all()

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
