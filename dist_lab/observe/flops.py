"""Model FLOPs utilization against what this machine really does.

    MFU = floating-point operations of the model per second / peak      Chowdhery et al. 2022,
                                                                        arXiv:2204.02311, appendix B

Both are measured here. The operations are counted as one step executes them. The peak is a plain
matmul at the run's dtype and number of threads, on all ranks at the same time, because they share
the cores: a peak copied from a data sheet would be another machine's.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dist_lab.torch_private import flop_counter


def utilization(operations: float, seconds: float, peak: float) -> float | None:
    """MFU; None where it cannot be right, as more was counted than the machine can do.

    A library may compute on tensors that stand for all ranks' parts, DTensors, and then each rank's
    count is of the whole.

    >>> utilization(3e9, 1.0, 4e9), utilization(5e9, 1.0, 4e9)
    (0.75, None)
    """
    found = operations / seconds / peak
    return found if found <= 1 else None


def in_percent(mfu: float | None) -> str:
    return "-" if mfu is None else f"{mfu:.1%}"


def counter() -> FlopCounterMode:
    """A context that counts this rank's operations: `.get_total_flops()` afterwards."""
    return flop_counter(CPU_ATTENTION)


def calibrate(
    dtype: torch.dtype, device: torch.device, *, windows: int = 5, seconds: float = 0.1
) -> Tensor:
    """Operations per second of a 768 x 768 matmul on this rank, in each of some windows of time.

    Start it on all ranks at once, add up over ranks, and take the best window: whatever else the
    machine was doing meanwhile only takes away.
    """
    n = 768
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.mm(a, b)
    rates = []
    for _ in range(windows):
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            torch.mm(a, b, out=out)
            done += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        rates.append(done * 2 * n**3 / (time.perf_counter() - began))
    return torch.tensor(rates, dtype=torch.float64)


# torch's counter knows the fused attention of GPUs and not that of CPUs. Forward is two matmuls of
# T x T x Dh for each sample and head; backward five, one of them computing the scores again.


def _attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    b, h, t, d = q  # shapes: (B, H, T, Dh)
    return 2 * 2 * b * h * t * k[2] * d


def _attention_backward(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    b, h, t, d = q
    return 5 * 2 * b * h * t * k[2] * d


aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
