"""What stands as the `.grad` of a tensor whose gradient lies elsewhere.

[Note: one gradient, two tensors] Under ZeRO a parameter is two tensors: the whole one in the model,
into whose `.grad` backward adds, and the shard that the optimizer steps on. The gradient itself is
at one of them: at the whole until it is summed over the ranks, at the shard from then on. At the
other stands a tensor that has no values. What can be done to a gradient element by element, such as
to scale, clamp or clear it, is done to the gradient itself, wherever it lies; all else raises a
UserError that says where it is. So nothing that a user does to `.grad` is lost.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.torch_private import of_plain_tensors, tree_leaves, tree_map_only

# What may be asked of it, because its values do not matter.
ABOUT = {
    "dtype", "device", "layout", "shape", "ndim", "is_sparse", "is_leaf", "grad_fn", "grad",
    "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_quantized", "itemsize", "nbytes",
    "size", "dim", "numel", "element_size", "is_contiguous", "stride", "is_floating_point",
    "is_complex", "requires_grad_", "detach_", "__len__", "_version",
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
}  # fmt: skip

# What acts on each element by itself, if all else that it is given are numbers.
BY_ELEMENT = {
    "zero_", "fill_", "mul_", "__imul__", "div_", "__itruediv__", "add_", "__iadd__", "sub_",
    "__isub__", "neg_", "sign_", "clamp_", "clamp_min_", "clamp_max_", "clip_", "nan_to_num_",
    "_foreach_zero_", "_foreach_mul_", "_foreach_div_", "_foreach_add_", "_foreach_sub_",
    "_foreach_neg_", "_foreach_clamp_min_", "_foreach_clamp_max_",
}  # fmt: skip


class GradElsewhere(Tensor):
    """Stands as the `.grad` of one tensor, while another, the owner, has the gradient.

    Attributes:
        owner: None while the gradient is on its way.
        advice: what to do instead of what cannot be done here.
    """

    owner: Tensor | None
    advice: str

    @staticmethod
    def stand_at(holder: Tensor, owner: Tensor | None, advice: str) -> "GradElsewhere":
        """Make it the `.grad` of `holder`."""
        grad = _zero(holder.dtype, holder.device).expand(holder.shape).as_subclass(GradElsewhere)
        grad.owner, grad.advice = owner, advice
        holder.grad = grad
        return grad

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = tree_leaves((args, kwargs or {}))
        ours = [value for value in given if isinstance(value, GradElsewhere)]
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        if name in ABOUT:
            return of_plain_tensors(func, *args, **(kwargs or {}))
        if name in ("data", "detach"):
            return ours[0]
        if name == "__repr__":
            return f"<a gradient that lies elsewhere: {ours[0].advice}>"
        numbers = all(v.dim() == 0 for v in given if type(v) is Tensor)
        if name not in BY_ELEMENT or not numbers or any(map(_is_on_its_way, ours)):
            raise UserError(ours[0].advice)
        if all(_of_owner(grad) is not None for grad in ours):  # otherwise it was cleared there
            func(*tree_map_only(GradElsewhere, _of_owner, args), **(kwargs or {}))
        return args[0]


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the elements of all of them are, which nobody reads or writes."""
    return torch.zeros((), dtype=dtype, device=device)


def real_grad(tensor: Tensor) -> Tensor | None:
    """The `.grad` of a tensor, or where that lies elsewhere the one there; None on its way."""
    grad = tensor.grad
    return _of_owner(grad) if isinstance(grad, GradElsewhere) else grad


def _of_owner(grad: GradElsewhere) -> Tensor | None:
    return None if grad.owner is None else real_grad(grad.owner)


def _is_on_its_way(grad: GradElsewhere) -> bool:
    if grad.owner is None:
        return True
    there = grad.owner.grad
    return isinstance(there, GradElsewhere) and _is_on_its_way(there)
