"""What a rank's part of a tensor refuses, because it is right for the whole alone.

A shard looks like any tensor. What acts on each element by itself does to all shards what it would
do to the whole. But a norm of it is another number on each rank, random numbers for it are not
those of the whole, and a whole tensor beside it is of another shape, which may still broadcast. A
loop that was written for one process would go on, and silently be wrong.

So where users meet parts, these are of a class that refuses such operations by name: guards.py
says when. It is put on a tensor in place, and taken off again. What is made of a part element by
element, or shows it in another shape, is a part as well; a copy is plain.

A gradient that is not summed over the ranks yet is of that class, too: what is not linear in it
is not the same of the sum.
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
# What looks at places in it, or at all of them together: of a split tensor they are other ones.
LOOKS_INSIDE = {
    "__getitem__", "__setitem__", "select", "narrow", "index_select", "index_fill_", "index_copy_",
    "index_add_", "scatter_", "einsum", "matmul", "__matmul__", "mm", "mv", "tolist", "numpy",
    "nonzero", "unique", "histc", "trace", "flip", "roll", "tril", "triu",
    "split", "chunk", "tensor_split", "unbind", "__iter__", "equal", "allclose", "softmax",
    "log_softmax", "normalize", "renorm", "cumprod",
}  # fmt: skip
DRAWS = {
    "randn_like", "rand_like", "randint_like", "normal_", "uniform_", "bernoulli", "bernoulli_",
    "exponential_", "random_", "multinomial", "normal",
}  # fmt: skip
SHOWS = {"data", "T", "mT", "H", "mH", "real"}  # attributes that are the part in another guise
WRITES = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
FRESH = {"clone", "zeros_like", "ones_like", "full_like", "empty_like"}  # what is kept of it
# What is not linear in each element: not the same of the sum as of what is summed.
CURVES = {
    "sign", "sign_", "sgn", "sgn_", "abs", "abs_", "clamp", "clamp_", "clamp_min", "clamp_min_",
    "clamp_max", "clamp_max_", "clip", "clip_", "pow", "pow_", "square", "square_", "sqrt", "sqrt_",
    "nan_to_num", "nan_to_num_", "_foreach_clamp_min_", "_foreach_clamp_max_", "_foreach_sign",
    "softmax", "log_softmax", "normalize", "renorm",
}  # fmt: skip
MARK = "part_of"
SPLIT = "is this rank's part of it"
UNSUMMED = "is not summed over the ranks yet"


@dataclass(frozen=True)
class PartOf(StaysBehind):
    """Stands on a part.

    Attributes:
        what, shape: of the whole.
        how: it is not all.
        advice: what to do instead of what is refused.
        stale: the tensor is as large as the whole, but only this rank's part has the new values.
        inside: forwards compute with it, also those of a module that is called by itself.
    """

    what: str
    shape: torch.Size
    advice: str
    stale: bool = False
    inside: bool = False
    how: str = SPLIT
    in_a_copy = None


class IsPart:
    """What is common to gradients and parameters that are parts."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        return of_plain_tensors(_of_parts, func, args, kwargs or {})

    def to_local(self) -> Tensor:
        """The same as a plain tensor."""
        plain: Tensor = of_plain_tensors(Tensor.as_subclass, self, Tensor)
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy is plain."""
        if id(self) not in memo:
            memo[id(self)] = of_plain_tensors(_plain_copy, self)
        return memo[id(self)]


class Part(IsPart, Tensor):
    """A gradient, or what was made of a part element by element."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_local().__reduce_ex__(protocol)


class PartParameter(IsPart, nn.Parameter):
    """A parameter."""


def _plain_copy(part: Tensor) -> Tensor:
    copied = part.detach().clone()
    return nn.Parameter(copied, part.requires_grad) if isinstance(part, nn.Parameter) else copied


def _of_parts(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Do it as with plain tensors, unless it is refused."""
    name = getattr(func, "__name__", "")
    writes = name in WRITES or (name.endswith("_") and not name.endswith("__"))
    if name in ("__get__", "__set__", "__delete__"):  # of an attribute
        writes, name = name == "__set__", getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        if name not in SHOWS:
            return func(*args, **kwargs)
    given = list(_tensors_in([args, kwargs.values()]))
    part = next(value for value in given if isinstance(value, IsPart))
    of: PartOf = getattr(part, MARK)
    refusal = f"{of.what} {of.how}, and so would be {name}: {of.advice}"
    refused = {SPLIT: LOOKS_INSIDE, UNSUMMED: CURVES}.get(of.how, ())
    if name in REDUCES or name in refused:
        raise UserError(refusal)
    if name in DRAWS and not of.stale:
        raise UserError(
            f"{of.what} {of.how}, and noise for it is not noise for the whole: "
            "add it in the model's forward, or take dp or ddp"
        )
    others = [value for value in given if value.dim() and not isinstance(value, IsPart)]
    is_written = writes and given[0] is part
    if of.stale and (name == "detach" or name in FRESH or (others and not is_written)):
        raise UserError(f"{of.what} is new in this rank's part of it alone: {of.advice}")
    meets_whole = part.shape != of.shape and any(other.shape == of.shape for other in others)
    if meets_whole and not name.startswith("_"):  # lists of tensors are an optimizer's
        raise UserError(
            f"{of.what} is this rank's part of it, {tuple(part.shape)}, and meets a whole tensor, "
            f"{tuple(of.shape)}: job.shadow averages parts, job.full_state_dict and "
            "job.full_gradients give wholes"
        )
    result = func(*args, **kwargs)
    if type(result) is not Tensor or name in FRESH or any(result is value for value in given):
        return result
    if of.inside and others:  # it is computed with
        return result
    is_number = part.dim() > 0 and not result.dim()  # made of a part of one element, too
    if result.numel() == part.numel() and not is_number:  # by element, or in another shape
        put_on(result, of)
    elif of.how == SPLIT and not name.startswith("new_"):
        raise UserError(refusal)
    return result


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | ValuesView):
            yield from _tensors_in(value)


def put_on(part: Tensor, of: PartOf) -> None:
    setattr(part, MARK, of)
    part.__class__ = PartParameter if isinstance(part, nn.Parameter) else Part


PLAIN: Mapping[type, Any] = {Part: Tensor, PartParameter: nn.Parameter}


def take_off(tensor: Tensor) -> None:
    if type(tensor) in PLAIN:
        tensor.__class__ = PLAIN[type(tensor)]
