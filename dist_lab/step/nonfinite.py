"""Remembers the first gradient of this rank that is not finite, before it travels.

After a sum over ranks every rank holds the NaN and none knows whose it was. This link stands first
in the chain and looks at each gradient while it is still the rank's own. Cost: one pass over a
gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_lab.step.protocol import Sync


class FirstNonFinite(Sync):
    """Holds the name of the first such parameter of this step, in the order of backward.

    leaves: name -> the tensor whose `.grad` is this rank's own.
    kept: gradients stay there from the first micro-batch to the last, which is then the time to
        look: a NaN does not go away by being added to.
    """

    def __init__(self, leaves: Mapping[str, Tensor], *, kept: bool = False) -> None:
        self.leaves, self.kept, self.found = leaves, kept, ""

    def take(self) -> str:
        """The name, or "" if there is none; forgotten from now on."""
        found, self.found = self.found, ""
        return found

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        if self.kept and not last:
            return
        for name in names:
            gradient = self.leaves[name].grad
            # A sum is the cheapest pass that any NaN or infinity survives. It may also overflow
            # by itself, so it only accuses; isfinite convicts.
            if not self.found and gradient is not None and not gradient.sum().isfinite():
                self.found = "" if torch.isfinite(gradient).all() else name

    def after_step(self) -> None:
        self.found = ""

    def forget(self) -> None:
        self.found = ""
