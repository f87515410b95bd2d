"""Sums a count over ranks, exactly: numbers of tokens, rows, or a sum of weights.

Integers are summed in one all_reduce. If a rank's value is not an integer, or so large that the sum
might not fit in 64 bits, the rank sends a large negative number instead, which makes the sum
negative on all ranks. Then the ranks exchange their values as text, and each adds up the same list:
integers exactly, floats rounded once at the end. An invalid value is exchanged in the same way, so
that every rank raises the same error.
"""

import json
import math
from typing import Any

import torch

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis


def sum_of_counts(n: Any, axis: Axis) -> int | float:
    """The sum over the axis, equal on every rank; an integer if all counts are integers.

    Raises:
        UserError: a rank's count is not one finite number >= 0.
    """
    value = _as_number(n)
    limit = 2**62 // axis.size
    fits = isinstance(value, int) and 0 <= value <= limit // axis.size
    total = int(ops.all_reduce(torch.tensor(value if fits else -limit, device=axis.device), axis))
    if total >= 0:
        return total
    counts = [json.loads(text) for text in ops.all_gather_bytes(json.dumps(value).encode(), axis)]
    for index, count in enumerate(counts):
        if isinstance(count, str) or not math.isfinite(count) or count < 0:
            raise UserError(
                f"count() takes one finite number >= 0, and was given {count} on rank "
                f"{axis.ranks[index]}: give the number of tokens, or the sum of their weights"
            )
    return sum(counts) if all(isinstance(count, int) for count in counts) else math.fsum(counts)


def _as_number(n: Any) -> int | float | str:
    """The value as a Python number, or a description of it if it is not one number."""
    item = getattr(n, "item", None)  # a tensor's or a NumPy array's
    try:
        value = n if item is None else item()
    except (RuntimeError, TypeError, ValueError):
        return f"a {type(n).__name__} of shape {tuple(n.shape)}"
    if isinstance(value, int):
        return int(value)  # a bool becomes 0 or 1
    return float(value) if isinstance(value, float) else f"a {type(value).__name__}"
