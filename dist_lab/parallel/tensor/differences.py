"""How far a tensor of one copy of a model may be from that of another: see plan_check.py."""

import math

import torch
from torch import Tensor

from dist_lab.parallel.tensor.trial import Trial

# Bytes of an element -> the largest difference that rounding explains, relative to the norm of the
# tensor; and the norm below which a gradient is only rounding, relative to that of all gradients.
# A wrong plan is off by a hundredth or more, mostly by a tenth.
TOLERANCE = {8: (1e-5, 1e-4), 4: (1e-3, 1e-2), 2: (0.25, 0.1), 1: (0.5, 0.5)}


def tolerance(*trials: Trial) -> tuple[float, float]:
    if all(trial.mode.dtype is torch.float64 for trial in trials):
        return TOLERANCE[8]
    tensors = (t for trial in trials for t in [*trial.model.parameters(), *trial.differentiable()])
    return TOLERANCE[min((t.dtype.itemsize for t in tensors if t.is_floating_point()), default=8)]


def distance(local: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The norm of the difference, relative to the expected norm, or to `least` if that is more."""
    if local.layout is not torch.strided:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    local, expected = local.detach().to(wide), expected.detach().to(wide)
    difference, norm = float((local - expected).norm()), max(float(expected.norm()), least)
    if not math.isfinite(norm):  # there is nothing to compare with
        return 0.0
    return difference / max(norm, 1e-300) if math.isfinite(difference) else math.inf
