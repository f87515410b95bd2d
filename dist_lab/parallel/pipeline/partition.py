"""Where a pipeline cuts a model: pieces in forward order, what each costs, and the best cut.

    a model with `stages`    pieces_by_seams -> names; seam_costs of their modules; cut
    any other                trace -> a graph; node_costs; cut; split -> one GraphModule a stage

A pipeline runs at the speed of its slowest stage, so `cut` makes that one as fast as can be; then
it carries as little as it can from stage to stage, then it fills the stages evenly. Costs are
found on the meta device, where a model runs without values, in no time and in no memory.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate, pairwise
from math import isinf, lcm
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.step.hooks import map_tensors
from dist_lab.torch_private import TorchDispatchMode, flop_counter, tree_leaves

# --- the cut --------------------------------------------------------------------------------------


def cut(costs: Sequence[float], stages: int, carried: Sequence[float] = ()) -> list[int]:
    """Where each stage begins, when pieces are put together in their order.

    Of all cuts into stages that are not empty: one whose slowest stage costs least; of those one
    that carries least; of those one that is filled most evenly (the least sum of squares); of those
    the one whose stages begin first. Sums are exact, in floats too.

    >>> cut([1, 1, 4, 1, 1], stages=3)
    [0, 2, 3]
    >>> cut([2, 2, 2], stages=2), cut([2, 2, 2], stages=2, carried=[0, 9, 5])
    ([0, 1], [0, 2])

    Args:
        costs: of each piece; none is negative.
        carried: what crosses a cut just before each piece; inf: never cut there. The first is of no
            account.

    Raises:
        UserError: there are more stages than pieces that may be parted.
    """
    places = [i for i in range(len(costs)) if i == 0 or not carried or not isinf(carried[i])]
    if not 1 <= stages <= len(places):
        what = f"{len(places)} pieces" if len(places) == len(costs) else (
            f"{len(costs)} pieces, which may be cut in {len(places)} parts"
        )  # fmt: skip
        raise UserError(
            f"{stages} stages of a model of {what}: none may be empty; ask for "
            f"{len(places)} stages at most (mesh pp, chunks=), or give a deeper model"
        )
    before = [0, *accumulate(_whole(costs))]  # before[i]: the cost of all pieces before i
    edges = [before[i] for i in places] + [before[-1]]
    crossing = _whole([carried[i] if carried and i else 0 for i in places])
    slowest = _slowest(edges, stages)
    return [places[i] for i in _lightest(edges, crossing, stages, slowest)]


def _whole(numbers: Sequence[float]) -> list[int]:
    """In a unit in which they are whole, so that sums do not depend on their order.

    >>> _whole([0.5, 2, 0.25])
    [2, 8, 1]
    """
    exact = [Fraction(n) for n in numbers]
    unit = lcm(*(n.denominator for n in exact))
    return [int(n * unit) for n in exact]


def _slowest(edges: Sequence[int], stages: int) -> int:
    """The least cost of the slowest stage, by bisection.

    A bound can be kept if parts filled as far as it allows are few enough: cutting further makes no
    part slower.
    """
    parts = len(edges) - 1
    low, high = max(b - a for a, b in pairwise(edges)), edges[-1]
    while low < high:
        bound = (low + high) // 2
        at = filled = 0
        while at < parts and filled <= stages:
            at, filled = bisect_right(edges, edges[at] + bound) - 1, filled + 1
        low, high = (low, bound) if filled <= stages else (bound + 1, high)
    return low


def _lightest(edges: Sequence[int], crossing: Sequence[int], stages: int, bound: int) -> list[int]:
    """Among the cuts that keep the bound. best[i]: (carried, squares, next start) of parts i ..."""
    parts = len(edges) - 1
    squares = [(edges[-1] - edges[i]) ** 2 for i in range(parts)]
    best = {i: (0, squares[i], parts) for i in range(parts) if edges[-1] - edges[i] <= bound}
    tables = [best]
    for left in range(2, stages + 1):
        fewer, best = best, {}
        for i in range(stages - left, parts - left + 1):
            options = []
            for j in range(i + 1, parts):
                cost = edges[j] - edges[i]
                if cost > bound:
                    break
                if j in fewer:
                    sent, even, _ = fewer[j]
                    options.append((crossing[j] + sent, cost**2 + even, j))
            if options:
                best[i] = min(options)
        tables.append(best)
    starts = [0]
    for best in tables[:0:-1]:
        starts.append(best[starts[-1]][2])
    return starts


# --- a model that names its stages ----------------------------------------------------------------


def seams(model: nn.Module) -> tuple[str, ...] | None:
    """Its `stages`, globs on module names in forward order; of a plain nn.Sequential, its modules.
    None if it has none, or modules there that happen to be called so.
    """
    globs = ("*",) if type(model) is nn.Sequential else getattr(model, "stages", None)
    if not globs or not isinstance(globs, list | tuple):
        return None
    return tuple(globs) if all(isinstance(glob, str) for glob in globs) else None


def pieces_by_seams(model: nn.Module) -> list[list[str]]:
    """The names of modules that stay together, in forward order.

    A block, which is what a glob with a `*` matches, is one piece. What comes before the first
    block joins it, and what comes after a block joins that one: a head or a norm alone is no stage.
    Without any `*` each module is a piece.

    Raises:
        UserError: no `stages`, a glob that matches nothing, a module named with one around it, or a
            parameter that is in none of them: then they would not be the whole forward.
    """
    globs = seams(model)
    if globs is None:
        raise UserError(f"{type(model).__name__} has no `stages`: {BRING_STAGES}")
    every = model.named_modules(remove_duplicate=False)  # one that is used twice is there twice
    modules = {name: module for name, module in every if name}
    is_block: dict[str, bool] = {}
    for glob in globs:
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        matched = [name for name in modules if pattern.fullmatch(name)]
        if not matched:
            few = ", ".join(list(modules)[:12]) + (", ..." if len(modules) > 12 else "")
            raise UserError(f"{glob} in `stages` matches no module; there are {few}")
        for name in matched:
            is_block.setdefault(name, "*" in glob)
    for name in is_block:
        around = next((other for other in is_block if name.startswith(f"{other}.")), None)
        if around:
            raise UserError(f"`stages` names {name}, and {around} around it; name one of them")
    held = {p for name in is_block for p in modules[name].parameters()}
    for name, parameter in model.named_parameters():
        if parameter not in held:
            raise UserError(
                f"{name} is in no module that `stages` names, which run in turn must be the whole "
                "forward; add the module that holds it"
            )
    blocks = sum(is_block.values())
    pieces: list[list[str]] = [[]]
    seen = 0
    for name, block in is_block.items():
        seen += block
        if pieces[0] and ((block and seen > 1) or not blocks):
            pieces.append([])
        pieces[-1].append(name)
    return pieces


def seam_costs(modules: Sequence[Sequence[nn.Module]], example: Any) -> list[float]:
    """Of each piece: floating-point operations and elements of what its modules put out.

    Args:
        modules: of each piece, on the meta device; run in turn they are the forward.
        example: what the first reads, on the meta device; None: it is not known, and a piece costs
            as many as it has parameters, and 1.

    Raises:
        UserError: they cannot be run in turn on it.
    """
    if example is None:
        return [1.0 + sum(p.numel() for m in piece for p in m.parameters()) for piece in modules]
    costs, x = [], example
    with on_meta() as operations, as_user_error("the modules in `stages`, run in turn, fail"):
        for piece in modules:
            began, put_out = operations(), 0
            for module in piece:
                x = module(x)
                put_out += elements(x)
            costs.append(float(operations() - began + put_out))
    return costs


def check_whole(model: nn.Module, modules: Iterable[nn.Module], example: Any) -> None:
    """See that modules run in turn do what the model does, operation for operation.

    Args:
        model, modules, example: on the meta device.

    Raises:
        UserError: they do something else.
    """
    with on_meta(), as_user_error("the modules in `stages`, run in turn, fail"):
        with _Operations() as wanted:
            model(example)
        with _Operations() as found:
            x = example
            for module in modules:
                x = module(x)
    if found.names != wanted.names:
        raise UserError(
            f"the modules in `stages` of {type(model).__name__}, run in turn, do not do what its "
            "forward does: that would be another model; have `stages` name all that it calls"
        )


class _Operations(TorchDispatchMode):
    """Notes the operations of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# --- the meta device ------------------------------------------------------------------------------


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of it without values. None are copied on the way; what was tied is tied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for tensor in held.values():
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def to_meta(value: Any) -> Any:
    """Tensors, in whatever structure, without their values."""
    return map_tensors(lambda x: torch.empty_like(x, device="meta"), value)


@contextmanager
def on_meta() -> Iterator[Callable[[], int]]:
    """Gives what tells how many operations there were so far."""
    with torch.no_grad(), torch.device("meta"), flop_counter() as counter:
        yield counter.get_total_flops


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a refusal in one line."""
    try:
        yield
    except Exception as error:
        why = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(f"{what} ({why.rstrip('.')}); {BRING_STAGES}") from None


BRING_STAGES = (
    "give the model `stages`, globs on names of modules that run in turn are its forward: "
    'stages = ("embed", "layers.*", "head")'
)


def elements(value: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
