"""Tensor classes that refuse operations which would be wrong on a shard.

A shard looks like any tensor. An elementwise operation gives the same values on the shards as on
the full tensor. But the norm of a shard is different on each rank, random numbers for a shard are
not those for the full tensor, and a shard combined with a full tensor may broadcast although their
shapes differ. A training loop for one process would run, and silently compute wrong values.

So outside of forward and backward, the shards that users can reach have a class that refuses such
operations: guards.py says when. We set a tensor's `__class__` in place, and set it back. A view of
a guarded tensor and the result of an elementwise operation are guarded, too; a copy is plain.

A gradient that is not summed over the ranks yet has that class, too: a nonlinear operation on one
rank's term gives another result than on the sum.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.step.hooks import StaysBehind
from dist_lab.torch_private import of_plain_tensors

REDUCES = {
    "norm", "vector_norm", "matrix_norm", "linalg_norm", "linalg_vector_norm", "_foreach_norm",
    "sum", "nansum", "mean", "nanmean", "max", "min", "amax", "amin", "aminmax", "median", "std",
    "var", "std_mean", "var_mean", "dot", "vdot", "inner", "prod", "logsumexp", "all", "any",
    "argmax", "argmin", "count_nonzero", "quantile", "topk", "sort", "cumsum", "cat", "concat",
    "stack", "hstack", "_foreach_max", "svd", "svdvals",
}  # fmt: skip
# Operations on positions, or on several elements: a shard has other elements at these positions.
INDEXES = {
    "__getitem__", "__setitem__", "select", "narrow", "index_select", "index_fill_", "index_copy_",
    "index_add_", "scatter_", "einsum", "matmul", "__matmul__", "mm", "mv", "tolist", "numpy",
    "nonzero", "unique", "histc", "trace", "flip", "roll", "tril", "triu",
    "split", "chunk", "tensor_split", "unbind", "__iter__", "equal", "allclose", "softmax",
    "log_softmax", "normalize", "renorm", "cumprod",
}  # fmt: skip
RANDOM = {
    "randn_like", "rand_like", "randint_like", "normal_", "uniform_", "bernoulli", "bernoulli_",
    "exponential_", "random_", "multinomial", "normal",
}  # fmt: skip
ALIASES = {"data", "T", "mT", "H", "mH", "real"}  # attributes that are views of the tensor
IN_PLACE = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
NEW = {"clone", "zeros_like", "ones_like", "full_like", "empty_like"}  # results are plain tensors
# Operations f that are not linear: f(sum over ranks) is not the sum over ranks of f.
NONLINEAR = {
    "sign", "sign_", "sgn", "sgn_", "abs", "abs_", "clamp", "clamp_", "clamp_min", "clamp_min_",
    "clamp_max", "clamp_max_", "clip", "clip_", "pow", "pow_", "square", "square_", "sqrt", "sqrt_",
    "nan_to_num", "nan_to_num_", "_foreach_clamp_min_", "_foreach_clamp_max_", "_foreach_sign",
    "softmax", "log_softmax", "normalize", "renorm",
}  # fmt: skip
MARK = "guarded_for_a_job"
SHARD = "is only this rank's shard"
UNSUMMED = "is not summed over the ranks yet"


@dataclass(frozen=True)
class Guard(StaysBehind):
    """An attribute of a guarded tensor: why it refuses operations, and the error message.

    Attributes:
        label, shape: the name and shape of the full tensor in messages.
        advice: what to do instead of a refused operation.
        stale: a full tensor, in which only this rank's shard has the new values.
        used_in_forward: forwards compute with the tensor, also if only its module is called.
        reason: why operations are refused.
    """

    label: str
    shape: torch.Size
    advice: str
    stale: bool = False
    used_in_forward: bool = False
    reason: str = SHARD
    in_a_copy = None


class Guarded:
    """Base class of guarded gradients and guarded parameters."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        return of_plain_tensors(_guarded_call, func, args, kwargs or {})

    def to_local(self) -> Tensor:
        """The same memory as a plain tensor."""
        plain: Tensor = of_plain_tensors(Tensor.as_subclass, self, Tensor)
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is plain."""
        if id(self) not in memo:
            memo[id(self)] = of_plain_tensors(_plain_copy, self)
        return memo[id(self)]


class GuardedTensor(Guarded, Tensor):
    """A gradient, or the result of an operation on a guarded tensor."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_local().__reduce_ex__(protocol)


class GuardedParameter(Guarded, nn.Parameter):
    """A parameter."""


def _plain_copy(guarded: Tensor) -> Tensor:
    copied = guarded.detach().clone()
    if isinstance(guarded, nn.Parameter):
        return nn.Parameter(copied, guarded.requires_grad)
    return copied


def _guarded_call(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Call the function as on plain tensors, or raise UserError if its result would be wrong."""
    name = getattr(func, "__name__", "")
    writes = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if name in ("__get__", "__set__", "__delete__"):  # of an attribute
        writes, name = name == "__set__", getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        if name not in ALIASES:
            return func(*args, **kwargs)
    tensors = list(_tensors_in([args, kwargs.values()]))
    guarded = next(value for value in tensors if isinstance(value, Guarded))
    guard: Guard = getattr(guarded, MARK)
    refusal = f"{guard.label} {guard.reason}, so {name} would be wrong: {guard.advice}"
    refused = {SHARD: INDEXES, UNSUMMED: NONLINEAR}.get(guard.reason, ())
    if name in REDUCES or name in refused:
        raise UserError(refusal)
    if name in RANDOM and not guard.stale:
        raise UserError(
            f"{guard.label} {guard.reason}, so {name} would not give the noise of the full tensor: "
            "add noise in the model's forward, or use dp or ddp"
        )
    plain = [value for value in tensors if value.dim() and not isinstance(value, Guarded)]
    is_written = writes and tensors[0] is guarded
    if guard.stale and (name == "detach" or name in NEW or (plain and not is_written)):
        raise UserError(f"{guard.label} has new values only in this rank's shard: {guard.advice}")
    meets_full = guarded.shape != guard.shape and any(other.shape == guard.shape for other in plain)
    if meets_full and not name.startswith("_"):  # optimizers call _foreach functions
        raise UserError(
            f"{guard.label} is only this rank's shard, {tuple(guarded.shape)}, and {name} combines "
            f"it with a full tensor, {tuple(guard.shape)}: job.shadow averages shards, "
            "job.full_state_dict and job.full_gradients return full tensors"
        )
    result = func(*args, **kwargs)
    if type(result) is not Tensor or name in NEW or any(result is value for value in tensors):
        return result
    if guard.used_in_forward and plain:  # a module is called without the model
        return result
    is_number = guarded.dim() > 0 and not result.dim()  # also the sum of a shard with one element
    if result.numel() == guarded.numel() and not is_number:  # elementwise, or a view
        put_guard(result, guard)
    elif guard.reason == SHARD and not name.startswith("new_"):
        raise UserError(refusal)
    return result


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | ValuesView):
            yield from _tensors_in(value)


def put_guard(tensor: Tensor, guard: Guard) -> None:
    setattr(tensor, MARK, guard)
    tensor.__class__ = GuardedParameter if isinstance(tensor, nn.Parameter) else GuardedTensor


PLAIN: Mapping[type, Any] = {GuardedTensor: Tensor, GuardedParameter: nn.Parameter}


def remove_guard(tensor: Tensor) -> None:
    if type(tensor) in PLAIN:
        tensor.__class__ = PLAIN[type(tensor)]
