"""The operands of a Linear, and hooks that round its weight and its input.

    y  = x W^T                  ->    y  = X(x) W'(W)^T                 forward
    dx = dy W,  dW = dy^T x     ->    dx = dy W'(W),  dW = dy^T X(x)    backward

X and W' are roundings to fewer numbers, which a `Rounding` computes. Each is differentiable, so dx
and dW go on through its own backward. A training run that quantises its weights rounds them so
(quantize/qat.py). One that multiplies in 8-bit floating point rounds dy as well, and the operands
of each product differently: it computes the products itself (step/products.py), and shares with
this file only the description of the operands, `Split` and `LinearOperands`.

The parameters stay what they are. While the forward of a unit runs, each of its Linears has the
rounded weight in its `__dict__`, where Python looks before `_parameters`: see [Note: master
weights] in precision.py, which does the same with a cast. So a recipe rounds what the forward would
have used: the unsharded parameter under fsdp, this rank's shard under tp, and in a run that
computes in bfloat16 the bfloat16 copy. Optimizers and checkpoints see the parameters.

[Note: a range over ranks] To round, one needs a range, such as the largest absolute value of a row.
Under tp a row of the weight may be spread over ranks, and the rows of an input are always spread
over data-parallel ranks. Then each rank takes the range of its own elements, and the ranks take the
maximum: one all_reduce per unit for the weights, and one for each input. It is computed anew in
each forward, by all ranks, also by one without rows: there is no running average in a buffer, which
could differ between ranks.

[Note: one tensor for several readers] q, k and v read one tensor. It is rounded once, and all three
get the same object, which tp recognises (parallel/tensor/sequence.py).

[Note: recomputation] The first forward of a unit that recomputes makes the rounded weights before
the part that is recomputed begins. The second forward makes them again, as leaves: nothing is
saved for backward, because torch counts what the second forward saves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.mesh.mesh import Axis
from dist_lab.step.hooks import ModuleHook
from dist_lab.step.products import as_rows
from dist_lab.torch_private import of_plain_tensors
from dist_lab.transforms.recompute import CheckpointedForward
from dist_lab.transforms.saved_weights import Round, RoundAgain


@dataclass(frozen=True)
class Split:
    """How a matrix (N, D) is split over ranks.

    name: of the Linear, for messages
    width: D, on all ranks together
    shard: the columns on one rank; the last ranks may have fewer
    first: the first column on this rank
    rows, columns: the mesh axes along which ranks have other rows, and other columns
    """

    name: str
    width: int
    shard: int
    first: int = 0
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


class Ranged(Protocol):
    """An operand whose numbers are chosen by its range. Its rows are outputs of W, or tokens."""

    def over(self, split: Split) -> tuple[str, ...]:
        """The mesh axes over which the range is taken. UserError: it cannot do that split."""


class Rounding(Ranged, Protocol):
    """Rounds a matrix (N, D), of which this rank has a part: see Split."""

    def limits_of(self, x: Tensor, split: Split) -> Tensor:
        """Numbers of which the ranks take the maximum, each by itself. x may have no rows."""

    def round(self, x: Tensor, limits: Tensor, split: Split) -> Tensor:
        """The rounded matrix, in the dtype of x. Differentiable."""


@dataclass(frozen=True)
class Operand:
    """A matrix that a Linear multiplies, and the ranks that share its range; None: no others."""

    rounding: Rounding
    split: Split
    axis: Axis | None = None

    def rounded(self, x: Tensor, what: str) -> Tensor:
        """x (..., D), rounded as a matrix whose rows are all but the last dim."""
        rows = as_rows(x)
        limits = self.rounding.limits_of(rows.detach(), self.split)
        if self.axis is not None:
            (limits,) = over_ranks([limits], self.axis, what)
        return self.rounding.round(rows, limits, self.split).view(x.shape)


Splits = tuple[Split, Split, Split]  # of the weight, the input, and the gradient of the output


def unsplit(name: str, linear: nn.Linear) -> Splits:
    """The operands of a Linear in one process."""
    inputs, outputs = linear.in_features, linear.out_features
    return Split(name, inputs, inputs), Split(name, inputs, inputs), Split(name, outputs, outputs)


@dataclass(frozen=True)
class LinearOperands:
    """One Linear, and the ranks with which it shares the range of each operand; None: with none.

    resharded: between forward and backward the weight has no memory
    """

    name: str
    module: nn.Linear
    splits: Splits
    weight_axis: Axis | None = None
    input_axis: Axis | None = None
    grad_axis: Axis | None = None
    resharded: bool = False


Scopes = dict[nn.Module, list[LinearOperands]]


def scopes_of(
    roots: Sequence[nn.Module],
    units: Mapping[str, nn.Module],
    linears: Mapping[str, LinearOperands],
) -> Scopes:
    """The module whose forward shows the rounded weight of a Linear: its innermost unit.

    Args:
        roots: the modules whose forwards are called: the model, or the stages of this rank.
        units: an outer unit comes before the units inside it.
    """
    scope_of: dict[nn.Module, nn.Module] = {}
    for module in (*roots, *units.values()):
        scope_of |= dict.fromkeys(module.modules(), module)
    scopes: Scopes = {}
    for linear in linears.values():
        scopes.setdefault(scope_of[linear.module], []).append(linear)
    return scopes


def show_operands(weights: Rounding | None, inputs: Rounding | None, scopes: Scopes) -> None:
    """Register the hooks that round these operands; None: it stays as it is."""
    latest = LatestInput()
    for unit, linears in scopes.items():
        shown = RoundedWeights(weights, linears, latest)
        # Shown after the unit is unsharded, hidden before it is resharded.
        unit.register_forward_pre_hook(ModuleHook(shown.enter))
        unit.register_forward_hook(ModuleHook(shown.leave), always_call=True, prepend=True)
        if isinstance(unit.forward, CheckpointedForward):  # in backward it runs without hooks
            unit.forward.around.append(shown.in_recomputation)
        for linear in linears:
            if inputs is not None:
                operand = Operand(inputs, linear.splits[1], linear.input_axis)
                hook = ModuleHook(partial(latest.round, operand))
                linear.module.register_forward_pre_hook(hook, with_kwargs=True)


# --- weights --------------------------------------------------------------------------------------


class ShownTensors:
    """Tensors that modules show in place of their parameters for a while."""

    def __init__(self) -> None:
        self._before: list[
            tuple[nn.Module, str, Tensor | None]
        ] = []  # (module, name, shown so far)

    def show(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self._before.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = tensor  # found before _parameters

    def hide(self) -> None:
        """Show again what was there before."""
        while self._before:
            module, name, before = self._before.pop()
            module.__dict__.pop(name, None)
            if before is not None:
                module.__dict__[name] = before


class RoundedWeights:
    """Shows the rounded weights of some Linears while the forward of their unit runs."""

    def __init__(
        self, rounding: Rounding | None, linears: Sequence[LinearOperands], latest: "LatestInput"
    ) -> None:
        self.pairs = [
            (linear.module, Operand(rounding, linear.splits[0], linear.weight_axis))
            for linear in linears
            if rounding is not None
        ]
        self.latest, self.resharded = latest, any(linear.resharded for linear in linears)
        self.shown, self.saved, self.depth = ShownTensors(), RoundAgain(), 0

    def enter(self, module: nn.Module, args: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            weights = self._rounded()
            if self.resharded:
                self.saved.start(weights)
            for (linear, _), (_, rounded, _) in zip(self.pairs, weights, strict=True):
                self.shown.show(linear, "weight", rounded)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # Called after every exception, also after that of a hook that runs before `enter`.
        self._end()

    def in_recomputation(self, unit: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        return self._again

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Surrounds the second forward of the unit: see [Note: recomputation]."""
        with torch.no_grad():
            weights = self._rounded()
        self.depth += 1
        for (linear, _), (parameter, rounded, _) in zip(self.pairs, weights, strict=True):
            leaf = rounded.detach().requires_grad_(parameter.requires_grad)
            self.shown.show(linear, "weight", leaf)
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        self.depth = max(0, self.depth - 1)
        if self.depth == 0:
            self.saved.stop()
            self.shown.hide()
            self.latest.forget()

    def _rounded(self) -> list[tuple[Tensor, Tensor, Round]]:
        """Each weight, what it is rounded to, and the function from one to the other."""
        return of_plain_tensors(self._round)

    def _round(self) -> list[tuple[Tensor, Tensor, Round]]:
        weights = [linear.weight for linear, _ in self.pairs]
        operands = [operand for _, operand in self.pairs]
        limits = [
            operand.rounding.limits_of(weight.detach(), operand.split)
            for weight, operand in zip(weights, operands, strict=True)
        ]
        by_axis: dict[Axis, list[int]] = {}
        for i, operand in enumerate(operands):
            if operand.axis is not None:
                by_axis.setdefault(operand.axis, []).append(i)
        for axis, places in by_axis.items():  # one message for the unit
            largest = over_ranks([limits[i] for i in places], axis, "ranges of weights")
            for i, of_all in zip(places, largest, strict=True):
                limits[i] = of_all
        rounds = [
            partial(operand.rounding.round, limits=each, split=operand.split)
            for each, operand in zip(limits, operands, strict=True)
        ]
        return [(w, round(w), round) for w, round in zip(weights, rounds, strict=True)]


def without_graph(weight: Tensor) -> Tensor:
    """The weight for an operation whose weight gradient is deferred.

    A cast or a rounded weight has a graph, which only the deferred work may run: a backward that
    passes through it, even without a gradient, frees what it has saved.
    """
    return weight if weight.is_leaf else weight.detach().requires_grad_(weight.requires_grad)


def over_ranks(limits: Sequence[Tensor], axis: Axis, what: str) -> list[Tensor]:
    """The maximum of each number over the ranks of an axis. Sends one message."""
    with axis.comm.label(unit=what):
        flat = torch.cat([each.flatten() for each in limits])
        largest = ops.all_reduce_into(flat, axis, "max").wait()
    parts = largest.split([each.numel() for each in limits])
    return [part.view_as(each) for part, each in zip(parts, limits, strict=True)]


# --- inputs ---------------------------------------------------------------------------------------


class LatestInput:
    """The input that was rounded last, for the next reader: [Note: one tensor for several readers].

    Attributes:
        source: the input; its version, whether gradients were on, and how it is split.
    """

    def __init__(self) -> None:
        self.source: tuple[Tensor, Any] | None = None
        self.rounded: Tensor | None = None

    def round(self, operand: Operand, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a Linear, with its input rounded."""
        x: Tensor = args[0] if args else kwargs["input"]
        version = None if x.is_inference() else x._version  # None: nothing would show a change
        how = version, torch.is_grad_enabled(), operand.axis, operand.split.columns
        is_same = self.source is not None and self.source[0] is x and self.source[1] == how
        if not is_same or version is None:
            self.source, self.rounded = (x, how), operand.rounded(x, "range of an input")
        if args:
            return (self.rounded, *args[1:]), kwargs
        return args, {**kwargs, "input": self.rounded}

    def forget(self) -> None:
        self.source = self.rounded = None
