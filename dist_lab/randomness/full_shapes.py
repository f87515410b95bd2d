"""The shapes of the unsharded model, from which a shard of activations learns where it lies.

    tp, between colwise and rowwise layers     x[B, T, F_tp]     features are split
    tp, in attention over a rank's heads       x[B, H_tp, T, T]  heads are split
    sequence-parallel                          x[B, T_tp, D]     positions are split

A module sees only its rank's shard. We do not guess from the plan which dim is split. Instead a
copy of the whole model on the meta device, without any strategy, runs once for each shape of the
inputs, and records the shape of the input of each module. The dim whose length differs is split.
It costs no memory, and a few milliseconds once.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import shard_bounds
from dist_lab.step.hooks import map_tensors
from dist_lab.torch_private import outside_modes

Shapes = Mapping[str, list[torch.Size]]  # module -> the shape of its input at each call


class FullShapes:
    """The shapes of some modules' inputs, for each shape of the model's inputs.

    Args:
        model: the whole model on the meta device, without strategies.
        names: the modules.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.model, self._recorded = model, dict[str, list[torch.Size]]()
        self._known: dict[str, Shapes] = {}
        for name in names:
            hook = partial(self._record, name)
            model.get_submodule(name).register_forward_pre_hook(hook)

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes:
        """Raises UserError if the model cannot run on the meta device."""
        key = repr(map_tensors(lambda t: (t.shape, t.dtype), [args, dict(kwargs)]))
        if key not in self._known:
            self._recorded = {}
            to_meta = partial(torch.empty_like, device="meta")
            meta_args, meta_kwargs = map_tensors(to_meta, [args, dict(kwargs)])
            with outside_modes(), torch.no_grad():
                try:
                    self.model(*meta_args, **meta_kwargs)
                except Exception as error:
                    why = next(iter(str(error).splitlines()), type(error).__name__)
                    raise UserError(
                        f"{type(self.model).__name__} cannot be run on the meta device ({why}), to "
                        "see which part of the features each dropout has under tp; its forward "
                        "must not depend on values"
                    ) from None
            self._known[key] = self._recorded
        return self._known[key]

    def _record(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._recorded.setdefault(name, []).append(args[0].shape)


def offsets(local: torch.Size, full: torch.Size, size: int, index: int) -> list[int] | None:
    """Where a shard begins in the unsharded tensor, in each dim; None if it is no shard of it.

    >>> offsets(torch.Size([2, 6, 3]), torch.Size([2, 6, 10]), 4, 1)
    [0, 0, 3]
    >>> offsets(torch.Size([2, 1, 5]), torch.Size([2, 2, 5]), 4, 1)  # two ranks share a key head
    [0, 0, 0]
    >>> offsets(torch.Size([2, 3]), torch.Size([2, 6]), 4, 2)  # halves, each on two ranks
    [0, 3]
    """
    if len(local) != len(full):
        return None
    starts = []
    for length, whole in zip(local, full, strict=True):
        parts = [n for n in range(size, 0, -1) if size % n == 0 and (n == size or whole % n == 0)]
        if 0 < whole < size and size % whole == 0:
            parts = [whole]  # fewer heads than ranks: neighbouring ranks share one
        bounds = [shard_bounds(whole, n, index // (size // n)) for n in parts]
        fitting = [start for start, stop in bounds if stop - start == length]
        if length != whole and not fitting:
            return None
        starts.append(0 if length == whole else fitting[0])
    return starts
