"""What a rank's part of a tensor refuses, because it is right for the whole alone.

A shard looks like any tensor. What acts on each element by itself does to all shards what it would
do to the whole. But a norm of it is another number on each rank, random numbers for it are not
those of the whole, and a whole tensor beside it is of another shape, which may still broadcast. A
loop that was written for one process would go on, and silently be wrong.

So where users meet parts, these are of a class that refuses such operations by name:

    gradients     from finish() to the optimizer's step
    parameters    from the optimizer's step to the next forward; under ZeRO to after_step()

The class is put on a tensor in place, and taken off again before the strategy, the model or the
optimizer computes with it: they meet plain tensors, at no cost. An optimizer that job.optimizer did
not build is not heard of, so the first operation with other tensors takes it off a gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, OnlyOn, Shard
from dist_lab.mesh.mesh import Mesh
from dist_lab.step.hooks import StaysBehind
from dist_lab.step.protocol import ROOT, Phase, Sync
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
}  # fmt: skip
DRAWS = {
    "randn_like", "rand_like", "randint_like", "normal_", "uniform_", "bernoulli", "bernoulli_",
    "exponential_", "random_", "multinomial", "normal",
}  # fmt: skip
RESHAPES = {"view", "reshape", "flatten", "ravel"}  # a part, in another shape
FRESH = {"clone", "zeros_like", "ones_like", "full_like", "empty_like"}  # what is kept of it
MARK = "part_of"
SPLIT = "is this rank's part of it"


@dataclass(frozen=True)
class PartOf(StaysBehind):
    """Stands on a part.

    Attributes:
        what, shape: of the whole.
        how: it is not all.
        advice: what to do instead of what is refused.
        stale: the tensor is as large as the whole, but only this rank's part has the new values.
    """

    what: str
    shape: torch.Size
    advice: str
    stale: bool = False
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
    if name in ("__get__", "__set__", "__delete__"):  # of an attribute
        name = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        if name != "data":
            return func(*args, **kwargs)
    given = list(_tensors_in([args, kwargs.values()]))
    parts = [value for value in given if isinstance(value, IsPart)]
    part, of = parts[0], getattr(parts[0], MARK)
    if name in REDUCES or (name in LOOKS_INSIDE and of.how == SPLIT):
        raise UserError(f"{of.what} {of.how}, and so would be {name}: {of.advice}")
    if name in DRAWS and not of.stale:
        raise UserError(
            f"{of.what} {of.how}, and noise for it is not noise for the whole: "
            "add it in the model's forward, or take dp or ddp"
        )
    others = [value for value in given if value.dim() and not isinstance(value, IsPart)]
    is_written = name.endswith("_") and given[0] is part
    if of.stale and (name == "detach" or name in FRESH or (others and not is_written)):
        raise UserError(f"{of.what} is new in this rank's part of it alone: {of.advice}")
    meets_whole = part.shape != of.shape and any(other.shape == of.shape for other in others)
    if meets_whole and not name.startswith("_"):  # lists of tensors are an optimizer's
        raise UserError(
            f"{of.what} is this rank's part of it, {tuple(part.shape)}, and meets a whole tensor, "
            f"{tuple(of.shape)}: job.shadow averages parts, job.full_state_dict and "
            "job.full_gradients give wholes"
        )
    if others and not is_written:
        for value in parts:
            if not isinstance(value, nn.Parameter):  # an optimizer steps with the gradient
                _take_off(value)
    result = func(*args, **kwargs)
    alike = type(result) is Tensor and (result.shape == part.shape or name in RESHAPES)
    if alike and not others and name not in FRESH:
        _put_on(result, of)
    return result


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | ValuesView):
            yield from _tensors_in(value)


def _put_on(part: Tensor, of: PartOf) -> None:
    setattr(part, MARK, of)
    part.__class__ = PartParameter if isinstance(part, nn.Parameter) else Part


PLAIN: Mapping[type, Any] = {Part: Tensor, PartParameter: nn.Parameter}


def _take_off(tensor: Tensor) -> None:
    if type(tensor) in PLAIN:
        tensor.__class__ = PLAIN[type(tensor)]


class Parts:
    """The parameters of which this rank has parts.

    Args:
        stepped: name -> the part that optimizers step on, where it is not the parameter itself.
    """

    def __init__(
        self,
        model: nn.Module,
        stepped: Mapping[str, nn.Parameter],
        layouts: Mapping[str, Layout],
        mesh: Mesh,
    ) -> None:
        self.parameters: list[tuple[nn.Parameter, PartOf]] = []
        self.gradients: list[tuple[nn.Parameter, PartOf]] = []
        for name, own in model.named_parameters():
            shape, held = layouts[name].shape, parts_of(layouts[name], mesh)
            if not held or type(own) is not nn.Parameter:  # a library's speak of the whole
                continue
            advice = "call job.clip_grad_norm, or job.full_gradients for the whole"
            of = PartOf(f"the gradient of {name}", shape, advice)
            if "part" not in held:
                of = replace(of, how="is one of this stage alone")
            self.gradients.append((stepped.get(name, own), of))
            if name in stepped:  # until all ranks give each other what they have stepped on
                advice = "call job.after_step() after the optimizer's step, before you use weights"
                self.parameters.append((own, PartOf(name, shape, advice, stale=True)))
            elif "part" in held:
                advice = "job.full_state_dict gives the whole, job.shadow averages parts"
                self.parameters.append((own, PartOf(name, shape, advice)))

    def guard_between_steps(
        self, optimizer: torch.optim.Optimizer, settle: Callable[[], None]
    ) -> None:
        """Take the guards off for its steps, and see before them what a user has done."""

        def before(*_: Any) -> None:
            settle()
            self.plain_parameters()
            self.plain_gradients()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_: self.guard_parameters())

    def plain_parameters(self) -> None:
        for parameter, _ in self.parameters:
            _take_off(parameter)

    def plain_gradients(self) -> None:
        for parameter, _ in self.gradients:
            grad = parameter.grad
            if grad is not None and type(grad) is Part:
                _take_off(grad)

    def guard_parameters(self, *, stale: bool = True) -> None:
        for parameter, of in self.parameters:
            if stale or not of.stale:
                _put_on(parameter, of)

    def guard_gradients(self) -> None:
        for parameter, of in self.gradients:
            if type(parameter.grad) is Tensor:
                _put_on(parameter.grad, of)


def parts_of(layout: Layout, mesh: Mesh) -> set[str]:
    """How this rank holds less than all: a "part" of the tensor, or one of the "stages"."""
    held = set()
    for axis, how in layout.splits:
        if isinstance(how, OnlyOn) and mesh[axis].size > 1:
            held.add("stage")
        elif mesh[axis].size > (how.copies if isinstance(how, Shard) else 1):
            held.add("part")
    return held


class Plain(Sync):
    """Told first: parts are about to be computed with."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def microbatch(self, *, last: bool) -> None:
        self.parts.plain_gradients()

    def unshard(self, unit: str, phase: Phase) -> None:
        if unit == ROOT and phase is Phase.FORWARD:
            self.parts.plain_parameters()
        if unit == ROOT and torch.is_grad_enabled():  # backward adds to them
            self.parts.plain_gradients()

    def finish(self) -> None:
        self.parts.plain_gradients()

    def after_step(self) -> None:
        self.parts.plain_parameters()


class Guarded(Sync):
    """Told last: users are about to meet parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def finish(self) -> None:
        self.parts.guard_gradients()

    def after_step(self) -> None:
        self.parts.guard_parameters(stale=False)
