"""What a user does to `.grad` before it is summed, under a strategy that shows only a part of it.

[Note: gradients that a user changes] Under zero1 `.grad` of a shard is, before `finish()`, a part
of this rank's own gradient; the rest lies in memory that a user does not see. What zero_grad() does
to the part is done to the rest as well. Any other change could not be: scaled, clipped or noised,
the part would be summed with what was not. So it is refused, by a flag that all ranks sum in
`finish()`.

A change shows in the tensor that `.grad` is, or in its version, or in a checksum of its values:
`.grad.data` and GradScaler leave the version as it was.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dist_lab.parallel.flat_buffer import FlatBuffer

WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> of as many bits


class UserChanges:
    """Watches the gradients of one bucket's shards.

    Args:
        shards: name -> the parameter whose `.grad` a user sees.
        grads: the memory of these gradients.
    """

    def __init__(self, shards: Mapping[str, Tensor], grads: FlatBuffer) -> None:
        self.shards, self.grads = shards, grads
        self._shown: dict[str, tuple[Tensor, int]] = {}  # what `.grad` was made, and its version
        self._changed: set[str] = set()
        self._noted: list[int] = []  # a checksum of each shard; empty if they are not known

    def backward_wrote(self, name: str, *, first: bool) -> None:
        """Backward has added to this gradient. `first`: it was none before, and is shown now."""
        self._noted = []
        if first:
            before, own = self.shards[name].grad, self.grads.views[name]
            if before is not None and before.data_ptr() != own.data_ptr() and before.any():
                self._changed.add(name)  # set by a user where none was shown
            shown = own.data  # with a version that backward does not count up
            self.shards[name].grad = shown
            self._shown[name] = shown, shown._version

    def note_values(self) -> None:
        """Backward is over, and a user may do what he likes until the next begins."""
        self._noted = self._checksums()

    def look(self, leaves: Mapping[str, Tensor], *, in_flight: bool) -> Iterator[str]:
        """Remember what was changed; yield the parameters whose gradient was cleared.

        Args:
            leaves: name -> what has a gradient if there is one that is not summed.
            in_flight: the sums may be on their way into this memory: nothing can be cleared.
        """
        written = set()
        if self._noted and not in_flight:
            seen = zip(self.shards, self._noted, self._checksums(), strict=True)
            written = {name for name, before, now in seen if before != now}
        for name, leaf in leaves.items():
            grad, (shown, version) = self.shards[name].grad, self._shown.get(name, (None, 0))
            if leaf.grad is None:
                continue
            if grad is None:
                yield name
            elif grad is not shown or grad._version != version or name in written:
                if in_flight or grad.any():
                    self._changed.add(name)
                else:
                    yield name  # zero_grad(set_to_none=False)

    def take(self) -> set[str]:
        """The parameters whose gradient was changed, which are forgotten here."""
        changed, self._changed = self._changed, set()
        return changed

    def _checksums(self) -> list[int]:
        """The sum of each shard's bits, read as whole numbers, in which a NaN equals itself."""
        bits = WHOLE_NUMBERS[self.grads.memory.dtype.itemsize]
        sums = [view.view(bits).sum(dtype=torch.int64) for view in self.grads.views.values()]
        checksums: list[int] = torch.stack(sums).tolist()
        return checksums
