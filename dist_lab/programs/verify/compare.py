"""The error between two tensors, and the comparison of all tensors of one step.

    error = max|a - b| / max(max|b|, 1e-3 x the median over tensors of max|b|)

The floor is for tensors that are nearly zero, where rounding is large relative to the values.
Booleans and integers must be equal.

[Note: rounding only] Where the true gradient is zero, the computed gradient is rounding error.
Adam divides it by its own size and takes a full step, so two correct runs get different weights.
One example is the key bias of attention, which softmax cancels; it is a third of the `in_proj_bias`
of nn.MultiheadAttention. So we leave out the elements of a weight whose gradient was only rounding
at this step or an earlier one; the report counts and lists them. "Judged" values count in the
verdict. A gradient of exactly zero in both runs (an embedding row that was not looked up) is not
rounding, and its weight is judged. Gradients are always judged.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.verify.report import Comparison

# Compute dtype -> the largest error that rounding explains: sums in a different order, over a few
# optimizer steps. In float64 a bug is orders of magnitude larger.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}
Tensors = Mapping[str, Tensor | None]
State = dict[str, Tensors]  # quantity -> name -> its value after a step, in the order of comparison


def compare(
    step: int, ours: State, theirs: State, rounding: dict[str, Tensor], dtype: torch.dtype
) -> list[Comparison]:
    """Compares every quantity of one step.

    Args:
        rounding: name -> mask of the elements whose gradient was only rounding in some step so
            far. This function adds the elements of this step.
    """
    _update_rounding(rounding, ours["gradient"], theirs["gradient"], dtype)
    comparisons = []
    for quantity, tensors in theirs.items():
        floor = floor_of(tensors)
        for name, tensor in tensors.items():
            mask = rounding.get(name) if quantity == "weight" else None
            left_out, elements = int(mask.sum()) if mask is not None else 0, tensor_size(tensor)
            judged = not left_out or left_out < elements
            distance = error(ours[quantity].get(name), tensor, floor, mask if judged else None)
            judged = judged or not math.isfinite(distance)  # rounding alone never makes a NaN
            comparisons.append(
                Comparison(step, quantity, name, distance, 0, judged, left_out, elements)
            )
    return comparisons


def error(
    a: Tensor | None, b: Tensor | None, floor: float, left_out: Tensor | None = None
) -> float:
    """The largest difference between a and b, relative to b's largest element or to the floor."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf  # only one of them has a gradient
    a, b = _dense(a), _dense(b)
    if a.shape != b.shape:
        return math.inf
    if b.numel() == 0:
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else math.inf
    distances = (a - b).abs()
    if left_out is not None:
        distances = distances.masked_fill(left_out & distances.isfinite(), 0)
    largest = float(distances.max())
    if not math.isfinite(largest):  # for example a mask of -inf, equal in both
        distances = distances.masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
        largest = float(distances.max())
    scale = max(_largest(b), floor)
    return largest / scale if scale else math.inf if largest else 0.0


def floor_of(tensors: Tensors) -> float:
    """The floor in the formula above, for one quantity."""
    return 1e-3 * _median(_magnitudes(tensors))


def rounding_only_tensors(gradients: Tensors, dtype: torch.dtype) -> set[str]:
    """Names of tensors whose gradient is so small, relative to others, that it may be rounding."""
    magnitudes = _magnitudes(gradients)
    threshold = _rounding_level(dtype) * _median(magnitudes)
    return {name for name, magnitude in magnitudes.items() if 0 < magnitude <= threshold}


def _update_rounding(
    rounding: dict[str, Tensor], ours: Tensors, theirs: Tensors, dtype: torch.dtype
) -> None:
    """Adds the elements that are tiny relative to the rest of their tensor, or to other tensors."""
    magnitudes, all_rounding = _magnitudes(theirs), rounding_only_tensors(theirs, dtype)
    for name, largest in magnitudes.items():
        gradient, other = theirs[name], ours.get(name)
        assert gradient is not None
        magnitude = gradient.abs()
        if name in all_rounding:
            small = torch.ones_like(magnitude, dtype=torch.bool)
        else:
            threshold = _rounding_level(dtype) * max(largest, _median(magnitudes))
            # One of the two runs may round to exactly zero; then the other's magnitude counts.
            if other is not None and other.shape == magnitude.shape:
                magnitude = torch.where(magnitude > 0, magnitude, other.abs())
            small = (magnitude > 0) & (magnitude <= threshold)
        rounding[name] = small | rounding[name] if name in rounding else small


def _rounding_level(dtype: torch.dtype) -> float:
    """A gradient below this fraction of the typical gradient may be only rounding."""
    return min(64 * torch.finfo(dtype).eps, 1e-2)


def _magnitudes(tensors: Tensors) -> dict[str, float]:
    """The largest magnitude of each floating-point or complex tensor that is not empty."""
    dense = {name: _dense(t) for name, t in tensors.items() if t is not None and t.numel()}
    return {n: _largest(t) for n, t in dense.items() if t.is_floating_point() or t.is_complex()}


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    magnitudes = tensor.abs()
    largest = float(magnitudes.max())
    return largest if math.isfinite(largest) else float(magnitudes.nan_to_num(0, 0, 0).max())


def _median(magnitudes: Mapping[str, float]) -> float:
    return statistics.median(magnitudes.values()) if magnitudes else 0.0


def _dense(tensor: Tensor) -> Tensor:
    """Returns the same numbers in a layout and dtype that can be subtracted."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return tensor.view(torch.uint8)
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return tensor.float()
    return tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor


def tensor_size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def worst_over_ranks(comparisons: list[Comparison], mesh: Mesh) -> list[Comparison]:
    """For each comparison, takes the values of the rank with the largest error. Collective."""
    rows = [[[c.error, c.left_out, c.judged] for c in comparisons]]
    local = torch.tensor(rows, dtype=torch.float64).nan_to_num(nan=math.inf, posinf=math.inf)
    gathered = ops.all_gather(local, mesh.world)  # (rank, comparison, 3)
    worst_ranks, worst = gathered[..., 0].argmax(0), gathered.amax(0).tolist()
    return [
        replace(c, error=e, rank=int(rank), left_out=int(left_out), judged=bool(judged))
        for c, rank, (e, left_out, judged) in zip(comparisons, worst_ranks, worst, strict=True)
    ]
