"""A placeholder for the `.grad` of a tensor whose gradient is on another tensor.

[Note: one gradient, two tensors] Under ZeRO a parameter is two tensors: the full one in the model,
where backward accumulates, and the shard that the optimizer steps on. Only one of them has the
gradient: the full one until the gradient is summed over the ranks, the shard afterwards. The other
one has a placeholder without values. Elementwise operations on a placeholder, such as scaling,
clamping or clearing, are applied to the gradient itself. All other operations raise a UserError
that says where the gradient is. So no change that a user makes to `.grad` is lost.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.torch_private import of_plain_tensors, tree_leaves, tree_map_only

# Allowed on a placeholder: the result does not depend on the gradient's values.
METADATA = {
    "dtype", "device", "layout", "shape", "ndim", "is_sparse", "is_leaf", "grad_fn", "grad",
    "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_quantized", "itemsize", "nbytes",
    "size", "dim", "numel", "element_size", "is_contiguous", "stride", "is_floating_point",
    "is_complex", "requires_grad_", "detach_", "__len__", "_version",
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
}  # fmt: skip

# Elementwise in-place operations: allowed if all other arguments are numbers.
BY_ELEMENT = {
    "zero_", "fill_", "mul_", "__imul__", "div_", "__itruediv__", "add_", "__iadd__", "sub_",
    "__isub__", "neg_", "sign_", "clamp_", "clamp_min_", "clamp_max_", "clip_", "nan_to_num_",
    "_foreach_zero_", "_foreach_mul_", "_foreach_div_", "_foreach_add_", "_foreach_sub_",
    "_foreach_neg_", "_foreach_clamp_min_", "_foreach_clamp_max_",
}  # fmt: skip


class GradElsewhere(Tensor):
    """The placeholder `.grad` of one tensor, while another tensor, the owner, has the gradient.

    Attributes:
        owner: None while the gradient is in flight.
        advice: the error message of refused operations: where the gradient is, and what to do.
    """

    owner: Tensor | None
    advice: str

    @staticmethod
    def stand_at(holder: Tensor, owner: Tensor | None, advice: str) -> "GradElsewhere":
        """Make a placeholder, and set it as the `.grad` of `holder`."""
        grad = _zero(holder.dtype, holder.device).expand(holder.shape).as_subclass(GradElsewhere)
        grad.owner, grad.advice = owner, advice
        holder.grad = grad
        return grad

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        values = tree_leaves((args, kwargs or {}))
        grads = [value for value in values if isinstance(value, GradElsewhere)]
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        if name in METADATA:
            return of_plain_tensors(func, *args, **(kwargs or {}))
        if name in ("data", "detach"):
            return grads[0]
        if name == "__repr__":
            return f"<a gradient that is on another tensor: {grads[0].advice}>"
        only_numbers = all(v.dim() == 0 for v in values if type(v) is Tensor)
        if name not in BY_ELEMENT or not only_numbers or any(map(_in_flight, grads)):
            raise UserError(grads[0].advice)
        if all(_of_owner(grad) is not None for grad in grads):  # None: the owner's was cleared
            func(*tree_map_only(GradElsewhere, _of_owner, args), **(kwargs or {}))
        return args[0]


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The storage of all placeholders: one element, which is never read or written."""
    return torch.zeros((), dtype=dtype, device=device)


def real_grad(tensor: Tensor) -> Tensor | None:
    """The gradient of a tensor, also if it is on another tensor; None while it is in flight."""
    grad = tensor.grad
    return _of_owner(grad) if isinstance(grad, GradElsewhere) else grad


def _of_owner(grad: GradElsewhere) -> Tensor | None:
    return None if grad.owner is None else real_grad(grad.owner)


def _in_flight(grad: GradElsewhere) -> bool:
    if grad.owner is None:
        return True
    grad_of_owner = grad.owner.grad
    return isinstance(grad_of_owner, GradElsewhere) and _in_flight(grad_of_owner)
