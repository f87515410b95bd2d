"""The sum of a count over ranks, exact for every number that a mask, a batch or weights add up to.

Whole numbers travel as they are, in one all_reduce. What is none of these, or so large that the
sum might not fit in 64 bits, is announced by a number so far below zero that the sum is, too, on
every rank. Then the ranks exchange their values as text, and each adds up the same list: whole
numbers without limit, others as if rounded once at the end. A value that is refused goes the same
way, so that every rank says the same line.
"""

import json
import math
from typing import Any

import torch

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis


def sum_of_counts(n: Any, axis: Axis) -> int | float:
    """The sum over the axis: a whole number if all are, the same on every rank.

    Raises:
        UserError: a rank's count is not one finite number from 0 on.
    """
    value = _as_number(n)
    most = 2**62 // axis.size
    travels = isinstance(value, int) and 0 <= value <= most // axis.size
    total = int(ops.all_reduce(torch.tensor(value if travels else -most, device=axis.device), axis))
    if total >= 0:
        return total
    values = [json.loads(text) for text in ops.all_gather_bytes(json.dumps(value).encode(), axis)]
    for index, each in enumerate(values):
        if isinstance(each, str) or not math.isfinite(each) or each < 0:
            raise UserError(
                f"count() takes one number from 0 on, and was given {each} on rank "
                f"{axis.ranks[index]}: give the number of tokens, or the sum of their weights"
            )
    return sum(values) if all(isinstance(each, int) for each in values) else math.fsum(values)


def _as_number(n: Any) -> int | float | str:
    """The number that it holds; what it is instead, in words, if it holds none."""
    item = getattr(n, "item", None)  # of a tensor, or of NumPy's
    try:
        value = n if item is None else item()
    except (RuntimeError, TypeError, ValueError):
        return f"a {type(n).__name__} of shape {tuple(n.shape)}"
    if isinstance(value, int):
        return int(value)  # a bool too
    return float(value) if isinstance(value, float) else f"a {type(value).__name__}"
