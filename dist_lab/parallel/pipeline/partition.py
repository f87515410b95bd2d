"""Partitions a model into stages: pieces in forward order, the cost of each, the best split points.

    a model with `stages`    pieces_by_seams -> names; seam_costs of their modules; cut
    any other                trace -> a graph; node_costs; cut; split -> one GraphModule per stage

A pipeline is as slow as its slowest stage, so `cut` first makes that stage as fast as possible.
Then it sends as little as possible between stages, then it balances them. Costs are measured on
the meta device, where a model runs without values, in almost no time and memory.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
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

# --- the split points -----------------------------------------------------------------------------


def cut(costs: Sequence[float], stages: int, carried: Sequence[float] = ()) -> list[int]:
    """The first piece of each stage, if each stage is a run of consecutive pieces.

    It chooses the partition, without empty stages, whose slowest stage costs least. Among equal
    ones it chooses the one that sends least; then the most even (the least sum of squares); then
    the one whose stages begin first. Sums are exact, also of floats.

    >>> cut([1, 1, 4, 1, 1], stages=3)
    [0, 2, 3]
    >>> cut([2, 2, 2], stages=2), cut([2, 2, 2], stages=2, carried=[0, 9, 5])
    ([0, 1], [0, 2])

    Args:
        costs: the cost of each piece, at least 0.
        carried: for each piece, the elements to send if a stage begins there; inf: no stage may
            begin there. The first is ignored.

    Raises:
        UserError: there are more stages than pieces that can begin a stage.
    """
    starts = [i for i in range(len(costs)) if i == 0 or not carried or not isinf(carried[i])]
    if not 1 <= stages <= len(starts):
        model = f"{len(starts)} pieces" if len(starts) == len(costs) else (
            f"{len(costs)} pieces, of which only {len(starts)} can begin a stage"
        )  # fmt: skip
        raise UserError(
            f"{stages} stages of a model of {model}: no stage may be empty; ask for "
            f"{len(starts)} stages at most (mesh pp, chunks=), or give a deeper model"
        )
    before = [0, *accumulate(_as_integers(costs))]  # before[i]: the cost of all pieces before i
    edges = [before[i] for i in starts] + [before[-1]]
    crossing = _as_integers([carried[i] if carried and i else 0 for i in starts])
    slowest = _least_slowest(edges, stages)
    return [starts[i] for i in _best_starts(edges, crossing, stages, slowest)]


def _as_integers(numbers: Sequence[float]) -> list[int]:
    """Multiples of a common unit, so that sums do not depend on their order.

    >>> _as_integers([0.5, 2, 0.25])
    [2, 8, 1]
    """
    exact = [Fraction(n) for n in numbers]
    unit = lcm(*(n.denominator for n in exact))
    return [int(n * unit) for n in exact]


def _least_slowest(edges: Sequence[int], stages: int) -> int:
    """The least possible cost of the slowest stage, by bisection.

    A bound is possible if, filled up to it, the pieces take no more than `stages` stages. If they
    take fewer, splitting some further makes none slower.
    """
    pieces = len(edges) - 1
    low, high = max(b - a for a, b in pairwise(edges)), edges[-1]
    while low < high:
        bound = (low + high) // 2
        at = filled = 0
        while at < pieces and filled <= stages:
            at, filled = bisect_right(edges, edges[at] + bound) - 1, filled + 1
        low, high = (low, bound) if filled <= stages else (bound + 1, high)
    return low


def _best_starts(
    edges: Sequence[int], crossing: Sequence[int], stages: int, bound: int
) -> list[int]:
    """The starts of the best partition in which no stage costs more than the bound.

    Dynamic programming from the end: best[i] is (sent, sum of squares, next start) of the best
    partition of pieces i ... into a given number of stages.
    """
    pieces = len(edges) - 1
    squares = [(edges[-1] - edges[i]) ** 2 for i in range(pieces)]
    best = {i: (0, squares[i], pieces) for i in range(pieces) if edges[-1] - edges[i] <= bound}
    tables = [best]
    for count in range(2, stages + 1):
        fewer, best = best, {}
        for i in range(stages - count, pieces - count + 1):
            options = []
            for j in range(i + 1, pieces):
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
    """A model's `stages`, globs on module names in forward order; of nn.Sequential, all modules.
    None if there are none, or if `stages` is something else, such as a ModuleList.
    """
    globs = ("*",) if type(model) is nn.Sequential else getattr(model, "stages", None)
    if not globs or not isinstance(globs, list | tuple):
        return None
    return tuple(globs) if all(isinstance(glob, str) for glob in globs) else None


def pieces_by_seams(model: nn.Module) -> list[list[str]]:
    """Pieces as lists of module names, in forward order. Modules of one piece stay together.

    A block is a module that a glob with a `*` matches, and each begins a piece. Modules before the
    first block join its piece; others join the piece of the block before them. So no norm or head
    is a stage by itself. If no glob has a `*`, each module is a piece.

    Raises:
        UserError: there is no `stages`; a glob matches nothing; a module is named together with one
            that contains it; or a parameter is in none of the modules, so they cannot be the whole
            forward.
    """
    globs = seams(model)
    if globs is None:
        raise UserError(f"{type(model).__name__} has no `stages`: {BRING_STAGES}")
    named = model.named_modules(remove_duplicate=False)  # a module that is used twice comes twice
    modules = {name: module for name, module in named if name}
    is_block: dict[str, bool] = {}
    for glob in globs:
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        matched = [name for name in modules if pattern.fullmatch(name)]
        if not matched:
            first = ", ".join(list(modules)[:12]) + (", ..." if len(modules) > 12 else "")
            raise UserError(f"{glob} in `stages` matches no module; there are {first}")
        for name in matched:
            is_block.setdefault(name, "*" in glob)
    for name in is_block:
        outer = next((other for other in is_block if name.startswith(f"{other}.")), None)
        if outer:
            raise UserError(f"`stages` names both {name} and {outer}, which contains it; name one")
    covered = {p for name in is_block for p in modules[name].parameters()}
    for name, parameter in model.named_parameters():
        if parameter not in covered:
            raise UserError(
                f"{name} is in no module that `stages` names, but these modules in sequence must "
                "be the whole forward; add the module that holds it"
            )
    blocks = sum(is_block.values())
    pieces: list[list[str]] = [[]]
    blocks_seen = 0
    for name, block in is_block.items():
        blocks_seen += block
        if pieces[0] and ((block and blocks_seen > 1) or not blocks):
            pieces.append([])
        pieces[-1].append(name)
    return pieces


def seam_costs(modules: Sequence[Sequence[nn.Module]], example: Any) -> list[float]:
    """The cost of each piece: floating-point operations, plus elements of its modules' outputs.

    Args:
        modules: the modules of each piece, on the meta device; in sequence they are the forward.
        example: the model's input, on the meta device. None: it is not known, and a piece costs
            1 plus its number of parameters.

    Raises:
        UserError: the modules in sequence fail on the example.
    """
    if example is None:
        return [1.0 + sum(p.numel() for m in piece for p in m.parameters()) for piece in modules]
    costs, x = [], example
    with on_meta() as operations, as_user_error("the modules in `stages`, in sequence, fail"):
        for piece in modules:
            operations_before, outputs = operations(), 0
            for module in piece:
                x = module(x)
                outputs += elements(x)
            costs.append(float(operations() - operations_before + outputs))
    return costs


class Operations(TorchDispatchMode):
    """Records the names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def check_whole(model: nn.Module, of_sequence: Operations, example: Any) -> None:
    """Check that the modules in sequence ran the same operations as the model.

    Args:
        model, example: on the meta device.
        of_sequence: those of `seam_costs` for the same example.

    Raises:
        UserError: they ran other operations.
    """
    with Operations() as of_model, on_meta(), as_user_error("the model fails on the meta device"):
        model(example)
    if of_sequence.names != of_model.names:
        raise UserError(
            f"the modules in `stages` of {type(model).__name__}, in sequence, do not compute what "
            "its forward computes; name in `stages` all modules that the forward calls"
        )


# --- the meta device ------------------------------------------------------------------------------


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device. No values are copied; tied tensors stay tied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attributes in (module._parameters, module._buffers, vars(module)):
            for tensor in attributes.values():
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def to_meta(value: Any) -> Any:
    """The same structure, with its tensors on the meta device."""
    return map_tensors(lambda x: torch.empty_like(x, device="meta"), value)


@contextmanager
def on_meta() -> Iterator[Callable[[], int]]:
    """Run on the meta device. Yields a function that returns the operations so far."""
    with torch.no_grad(), torch.device("meta"), flop_counter() as counter:
        yield counter.get_total_flops


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn any exception inside into a UserError of one line."""
    try:
        yield
    except Exception as error:
        why = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(f"{what} ({why.rstrip('.')}); {BRING_STAGES}") from None


BRING_STAGES = (
    "give the model `stages`, globs on names of modules that in sequence are its forward: "
    'stages = ("embed", "layers.*", "head")'
)


def elements(value: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
