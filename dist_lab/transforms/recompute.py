"""Activation checkpointing: discard a unit's activations, and recompute them in backward.

    memory for n units with activations A and inputs I:   n A  ->  n I + A    compute: 4/3 as much

Backward needs the activations of forward, and the first unit's are kept for the longest time. A
unit that recomputes keeps only its inputs. When backward reaches it, its forward runs once more,
and the new activations are freed before the next unit's turn. Recomputing every k-th unit is a
compromise. Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv:1604.06174).
We use PyTorch's `torch.utils.checkpoint`, the non-reentrant variant.

Recomputing changes no numbers, and strategies do not depend on it. Only `unit.forward` is replaced.
So hooks on the unit are called as before, and not again in backward: a sharding strategy unshards
the unit before the second forward begins. Hooks on modules inside the unit are called again.

[Note: no side effects] The second forward sees what the first one saw, and has no side effects:
* random masks are equal, because the state of the generators is saved and restored;
* buffers are as they were before the first forward, and writes to them are discarded: the running
  statistics of BatchNorm count a batch once;
* a context that changes the numbers of a forward also surrounds the second forward:
  `CheckpointedForward.around`, which precision.py and exact dropout use.
Any other side effect of a forward, such as an append to a list, would happen twice.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_lab.errors import UserError
from dist_lab.step.hooks import StaysBehind

# Called with the unit before its first forward. Returns what makes a context for the second one.
Around = Callable[[nn.Module], Callable[[], AbstractContextManager[None]]]


def recompute(model: nn.Module, units: Mapping[str, nn.Module], every: int) -> None:
    """Replace, in place, the forward of every k-th unit, k = `every`, beginning with the first.

    Args:
        units: by name, in the order of forward. We skip units inside another one, the model
            itself (recomputing all at once saves nothing), and single layers (they save little
            besides their inputs).
        every: 1 for all units, 0 for none.

    Raises:
        UserError: there are no such units, fewer than `every`, or one recomputes already.
    """
    if every == 0:
        return
    outermost = _outermost_units(model, units)
    if not outermost:
        raise UserError(
            f"recompute={every}, but there is no unit of several layers; pass some: units=[Block]"
        )
    if not 0 < every <= len(outermost):
        raise UserError(
            f"recompute={every} does not fit a model of {len(outermost)} units; give 1 for all, "
            f"k up to {len(outermost)} for every k-th, or 0 for none"
        )
    for name, unit in list(outermost.items())[::every]:
        if isinstance(unit.forward, CheckpointedForward):
            raise UserError(f"{name} recomputes already; call recompute() once, on a fresh model")
        unit.forward = CheckpointedForward(unit)


def _outermost_units(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    layers = {unit for unit in units.values() if not any(unit.children())}
    candidates = {n: unit for n, unit in units.items() if unit is not model and unit not in layers}
    nested = {m for unit in candidates.values() for m in unit.modules() if m is not unit}
    return {name: unit for name, unit in candidates.items() if unit not in nested}


class CheckpointedForward(StaysBehind):
    """The `forward` of a unit that recomputes. A copy of the unit has its original `forward`.

    Attributes:
        around: what makes contexts to run the second forward in.
    """

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit
        self.forward = self.in_a_copy = unit.forward
        self.around: list[Around] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)

        def forward(*values: Any) -> Any:
            keywords = zip(kwargs_names, values[len(args) :], strict=True)
            return self.forward(*values[: len(args)], **dict(keywords))

        # Passed by position: a keyword could be taken for an option of checkpoint().
        kwargs_names = tuple(kwargs)
        replay = Replay(self.unit, self.around)
        return checkpoint(
            forward, *args, *kwargs.values(),
            use_reentrant=False, preserve_rng_state=True,
            context_fn=lambda: (nullcontext(), replay),
        )  # fmt: skip


class Replay:
    """The context of the second forward of one call, and of a third if backward runs twice.

    The constructor copies the buffers before the first forward; see [Note: no side effects].
    """

    def __init__(self, unit: nn.Module, around: Sequence[Around]) -> None:
        self.unit, self.around = unit, [note(unit) for note in around]
        self.stack = ExitStack()
        self.buffers = [
            (module._buffers, {name: _copy(buffer) for name, buffer in module._buffers.items()})
            for module in unit.modules()
            if module._buffers
        ]

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for buffers, copies in self.buffers:
                stack.callback(buffers.update, dict(buffers))
                buffers.update({name: _copy(buffer) for name, buffer in copies.items()})
            for surround in self.around:
                stack.enter_context(surround())
            self.stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
