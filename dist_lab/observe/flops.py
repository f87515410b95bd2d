"""Model FLOPs utilization (MFU), relative to the measured peak of this machine.

    MFU = floating-point operations of the model per second / peak      Chowdhery et al. 2022,
                                                                        arXiv:2204.02311, appendix B

Both are measured. The operations are counted while one step executes: all of them, and those of the
model, without the optimizer's and without forwards that are recomputed, which a model could do
without. So recomputing lowers the MFU. The peak is that of a plain matmul at the run's dtype and
number of threads, on all ranks at the same time, because they share the cores. A peak from a data
sheet would be that of another machine.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from dist_lab.torch_private import flop_counter
from dist_lab.transforms.recompute import CheckpointedForward


def utilization(operations: float, seconds: float, peak: float) -> float | None:
    """Returns the MFU. None if it is above 1, which cannot be right: see `why_no_mfu`.

    >>> utilization(3e9, 1.0, 4e9), utilization(5e9, 1.0, 4e9)
    (0.75, None)
    """
    mfu = operations / seconds / peak
    return mfu if mfu <= 1 else None


def why_no_mfu(library: str) -> str:
    """Why an MFU would be above 1. `library`: that whose strategy computes, "" for ours.

    A library that computes on DTensors lets each rank count the operations of all ranks.
    """
    if library:
        return "each rank also counts operations of other ranks, as on a library's DTensors"
    return "the machine was busy when its peak was measured"


def in_percent(mfu: float | None) -> str:
    return "-" if mfu is None else f"{mfu:.1%}"


def counter() -> FlopCounterMode:
    """Returns a context that counts this rank's operations; then call `.get_total_flops()`."""
    return flop_counter(OPERATIONS)


@contextmanager
def counted(model: nn.Module) -> Iterator["Operations"]:
    """Counts this rank's operations inside the block, and tells those of the model apart."""
    with ExitStack() as stack:
        found = Operations(stack.enter_context(counter()))
        stack.callback(register_optimizer_step_pre_hook(found.begin).remove)
        stack.callback(register_optimizer_step_post_hook(found.end).remove)
        for unit in model.modules():
            if isinstance(unit.forward, CheckpointedForward):
                unit.forward.around.append(found.around)
                stack.callback(unit.forward.around.remove, found.around)
        yield found


class Operations:
    """The operations of a block: `total`, and those of the `model`."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        self._not_the_models = 0
        self._since: list[int] = []  # the count when each of these began: some step another one

    @property
    def total(self) -> int:
        return int(self._counter.get_total_flops())

    @property
    def model(self) -> int:
        return self.total - self._not_the_models

    def begin(self, *_: Any) -> None:
        """An optimizer begins its step: torch's hook."""
        self._since.append(self.total)

    def end(self, *_: Any) -> None:
        since = self._since.pop()
        if not self._since:
            self._not_the_models += self.total - since

    def around(self, unit: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        """Surrounds each second forward of a unit: see transforms/recompute.py."""
        return self._recompute

    @contextmanager
    def _recompute(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()


def calibrate(
    dtype: torch.dtype, device: torch.device, *, windows: int = 5, seconds: float = 0.1
) -> Tensor:
    """Returns the operations per second of a 768 x 768 matmul on this rank, in some time windows.

    Start it on all ranks at once, sum each window over ranks, and take the best one: other programs
    on the machine only make a window slower.
    """
    n = 768
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.mm(a, b)
    rates = []
    for _ in range(windows):
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            torch.mm(a, b, out=out)
            count += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        rates.append(count * 2 * n**3 / (time.perf_counter() - began))
    return torch.tensor(rates, dtype=torch.float64)


# torch's counter knows the fused attention of GPUs but not that of CPUs. Forward has two matmuls of
# T x T x Dh for each sample and head. Backward has five: one of them recomputes the scores.


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    b, h, t, d = q  # shapes: (B, H, T, Dh)
    return 2 * 2 * b * h * t * k[2] * d


def _attention_backward(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    b, h, t, d = q
    return 5 * 2 * b * h * t * k[2] * d


def _elementwise(*args: Any, **kwargs: Any) -> int:
    return 0


aten = torch.ops.aten
OPERATIONS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    # torch's counter replaces an operation that it does not know by simpler ones, if it can. Their
    # sums have other last bits than these two kernels have, and a step must not depend on whether
    # it is counted: a run that resumes counts another step.
    aten.silu_backward.default: _elementwise,
    aten.mish_backward.default: _elementwise,
}
