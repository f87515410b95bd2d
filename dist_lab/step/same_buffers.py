"""Refuses buffers that ranks move apart, as each forward moves them by its own rows.

A codebook that follows the vectors it stands for, the running mean of a normalizer, the extremes
that a quantizer has seen: one process moves them by all rows of a batch, and a rank by a share. No
gradient shows it, the ranks train with different numbers, and a checkpoint has those of rank 0.

So in `finish` the ranks compare what their buffers are: in the steps 1, 2, 4, 8 and so on, because
some move late, and then it costs nothing. What is compared is what a checkpoint holds in floating
point. A buffer that is not persistent may be a rank's own. Counters are whole numbers, which a rank
without rows leaves behind. Running statistics of torch's own layers are merged: see
transforms/batchnorm.py.

Equal is equal up to rounding: machines that are not alike round otherwise, as in a power iteration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.step.protocol import Sync
from dist_lab.torch_private import StatisticsNorm

ROUNDING = 64  # times the distance of two numbers next to each other


class SameBuffers(Sync):
    """Compares buffers along an axis.

    Args:
        names: of the buffers that a checkpoint holds, the same on every rank.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], axis: Axis) -> None:
        self.model, self.axis = model, axis
        merged = {n for n, module in model.named_modules() if isinstance(module, StatisticsNorm)}
        self.names = [name for name in names if name.rpartition(".")[0] not in merged]
        self.steps = 0

    def finish(self) -> None:
        """Raises UserError on every rank if they differ."""
        self.steps += 1
        if not self.names or self.steps & (self.steps - 1):
            return
        buffers = dict(self.model.named_buffers())  # a forward may have assigned another
        marks = [_mark(buffers.get(name)) for name in self.names]
        mine = torch.tensor(marks, dtype=torch.float64, device=self.axis.device)
        with self.axis.comm.label("buffers", unit=""):
            everybody = ops.all_gather(mine[None], self.axis)
        numbers, tolerances = everybody.unbind(-1)  # (ranks, buffers) each
        apart = numbers.amax(0) - numbers.amin(0) > tolerances.amax(0)
        if apart.any():
            name = self.names[int(apart.nonzero()[0])]
            raise UserError(
                f"the forward moves the buffer {name} by the rows of its rank, so that ranks "
                "differ, where one process takes all rows: in the forward, sum what goes into it "
                "by dist_lab.comm.ops.all_reduce(x, mesh.data); what is a rank's own, register "
                "with persistent=False"
            )


def _mark(buffer: Tensor | None) -> tuple[float, float]:
    """A number that tells buffers apart, and the distance that rounding may make."""
    if buffer is None or buffer.layout is not torch.strided or not buffer.dtype.is_floating_point:
        return 0.0, 0.0
    values = buffer.detach().flatten().double().nan_to_num(0, 0, 0)
    places = torch.arange(len(values), device=values.device).double().cos()
    rounding = ROUNDING * torch.finfo(buffer.dtype).eps
    return float(values @ places), rounding * float(values.norm())
