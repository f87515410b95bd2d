"""Refuses buffers that become different on each rank, because a forward updates them by its rows.

Examples are a codebook updated by a moving average (VQ-VAE), the running mean of a normalizer, or
the min and max of a quantizer's observer. One process updates a buffer from all rows of a batch, a
rank only from its own rows. The gradients do not reveal it: the ranks train with different buffers,
and a checkpoint saves those of rank 0.

So the ranks compare their buffers in `finish`, in steps 1, 2, 4, 8 and so on: some buffers change
late, and these few checks cost almost nothing. The ranks compare only floating-point buffers that a
checkpoint saves. A buffer that is not persistent may differ by rank. Integers are counters, which a
rank without rows does not advance. Running statistics of torch's own layers are merged: see
transforms/batchnorm.py.

Differences of the size of rounding errors are accepted: different kinds of machines round
differently, for example in a power iteration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.protocol import Sync
from dist_lab.torch_private import StatisticsNorm

ROUNDING = 64  # the tolerance, in units of the dtype's eps


class SameBuffers(Sync):
    """Checks that buffers are equal on all ranks of an axis.

    Args:
        names: the buffers that a checkpoint saves, the same on every rank.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], axis: Axis) -> None:
        self.model, self.axis = model, axis
        merged = {n for n, module in model.named_modules() if isinstance(module, StatisticsNorm)}
        self.names = [name for name in names if name.rpartition(".")[0] not in merged]
        self.steps = 0

    def finish(self) -> None:
        """Compare the buffers. Raises UserError on every rank if they differ."""
        self.steps += 1
        if not self.names or self.steps & (self.steps - 1):
            return
        buffers = dict(self.model.named_buffers())  # a forward may have assigned a new tensor
        fingerprints = [_fingerprint(buffers.get(name)) for name in self.names]
        own = torch.tensor(fingerprints, dtype=torch.float64, device=self.axis.device)
        with self.axis.comm.label("buffers", unit=""):
            gathered = ops.all_gather(own[None], self.axis)
        numbers, tolerances = gathered.unbind(-1)  # (ranks, buffers) each
        differ = numbers.amax(0) - numbers.amin(0) > tolerances.amax(0)
        if differ.any():
            name = self.names[int(differ.nonzero()[0])]
            raise UserError(
                f"the forward updates the buffer {name} by the rows of its own rank, so that it "
                "differs by rank, but one process uses all rows: in the forward, sum the update x "
                "over ranks with dist_lab.comm.ops.all_reduce(x, mesh.data), or register the "
                "buffer with persistent=False if it may differ"
            )


def _fingerprint(buffer: Tensor | None) -> tuple[float, float]:
    """A number that differs between different buffers, and its tolerance for rounding."""
    if buffer is None or buffer.layout is not torch.strided or not buffer.dtype.is_floating_point:
        return 0.0, 0.0
    values = buffer.detach().flatten().double().nan_to_num(0, 0, 0)
    weights = torch.arange(len(values), device=values.device).double().cos()
    rounding = ROUNDING * torch.finfo(buffer.dtype).eps
    return float(values @ weights), rounding * float(values.norm())
