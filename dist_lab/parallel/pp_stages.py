"""What a rank keeps of a model whose layers are in stages, and what stages give each other.

No name changes: a layer that is kept stays where it is, and one that is not has a stand-in that
refuses to run. Layers run as parts: of a model with `stages`, modules in turn; of any other, a
piece of its traced graph. Where they are cut is pp_cut.py's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout import Laid, On
from dist_lab.mesh import Axis
from dist_lab.parallel.pp_cut import cut, meta_copy, pieces_by_seams, seam_costs, seams
from dist_lab.parallel.pp_trace import node_costs, split, trace
from dist_lab.parallel.sync import Sync

Sub = Callable[[Sequence[int]], Axis | None]
BALANCES = ("cost", "count")


@dataclass(frozen=True)
class Kept:
    """What is here.

    parts: this rank's stages, by number
    shapes: what stages give each other
    laid, buffers: of the whole model
    tied: name -> the ranks that hold the same tensor, of what this one holds
    """

    parts: Mapping[int, nn.Module]
    shapes: "Shapes"
    laid: Mapping[str, Laid]
    buffers: Mapping[str, Laid]
    tied: Mapping[str, Axis]


def keep_stages(
    model: nn.Module,
    axis: Axis,
    rank_of: Mapping[int, int],
    *,
    value_of: Callable[[str], Tensor],
    sub: Sub,
    balance: str = "cost",
    example: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Kept:
    """Cut a model into stages and keep, in place, those of this rank. See `pp.apply`.

    Args:
        rank_of: stage -> position on `axis`.
    """
    if balance not in BALANCES:
        raise UserError(f"balance cannot be {balance!r}; give {' or '.join(BALANCES)}")
    if any(not isinstance(value, Tensor) for value in model.state_dict().values()):
        raise UserError("a module here has extra state, of which a stage would lose the others'")
    parts, uses = _in_stages(model, len(rank_of), balance, example)
    shapes = Shapes(meta_copy(nn.ModuleList(parts)), compute_dtype)

    def users(name: str) -> list[int]:
        """The stages that use a tensor; what none does lies on the first."""
        return [s for s, used in enumerate(uses) if _within(name, used)] or [0]

    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    laid: dict[str, Laid] = {}
    tied: dict[str, Axis] = {}
    values: dict[nn.Parameter, str] = {}  # of what is kept, the name that it is drawn by
    for parameter, (first, *_) in names.items():
        on: dict[int, str] = {}  # rank -> the first of the names it has there
        for name in names[parameter]:
            for stage in users(name):
                on.setdefault(rank_of[stage], name)
        together = sub(sorted(on)) if len(on) > 1 and parameter.requires_grad else None
        owed = (together,) if together is not None else ()
        home = rank_of[users(first)[0]]
        about = parameter.shape, parameter.dtype
        laid[first] = Laid(*about, ((axis, On(home)),), owed)
        for rank, name in on.items():
            if name not in laid:
                laid[name] = Laid(*about, ((axis, On(rank)),), owed, alias_of=first)
        if axis.index in on:
            values[parameter] = first
            if together is not None:
                tied[on[axis.index]] = together
    buffers = {
        name: Laid(buffer.shape, buffer.dtype, ((axis, On(rank_of[users(name)[0]])),))
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in model.state_dict()
    }
    here = {stage: part for stage, part in enumerate(parts) if rank_of[stage] == axis.index}
    kept = {n for n in names_of(model) if any(rank_of[s] == axis.index for s in users(n))}
    _leave(model, "", kept | {name for stage in here for name in uses[stage]})
    _come_to_life([model, *here.values()], values, value_of, axis.wire.device)
    return Kept(here, shapes, laid, buffers, tied)


# --- parts ----------------------------------------------------------------------------------------


class InTurn(nn.Sequential):
    """Modules in turn. What it gives is a tuple, as all stages give, but the last."""

    def __init__(self, modules: Iterable[nn.Module], *, last: bool) -> None:
        super().__init__(*modules)
        self.last = last

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor]:
        for module in self:
            x = module(x)
        return x if self.last else (x,)


def _in_stages(
    model: nn.Module, stages: int, balance: str, example: Tensor | None
) -> tuple[list[nn.Module], list[set[str]]]:
    """All stages of a model, and the names of the modules and tensors that each of them uses."""
    if seams(model) is not None:
        pieces = pieces_by_seams(model)
        modules = [[model.get_submodule(name) for name in piece] for piece in pieces]
        costs = [1.0] * len(pieces)
        if balance == "cost":
            ghosts = meta_copy(nn.ModuleList(nn.ModuleList(piece) for piece in modules))
            costs = seam_costs(
                [list(piece.children()) for piece in ghosts.children()],
                None if example is None else example.to("meta"),
            )
        _check_enough(stages, len(pieces), f"blocks of {type(model).__name__}")
        ends = [*cut(costs, stages), len(pieces)]
        parts: list[nn.Module] = [
            InTurn((m for piece in modules[a:b] for m in piece), last=b == len(pieces))
            for a, b in pairwise(ends)
        ]
        return parts, [{n for piece in pieces[a:b] for n in piece} for a, b in pairwise(ends)]
    if example is None:
        raise UserError(
            f"{type(model).__name__} has no `stages`, and to cut its graph takes an input to see "
            "what each operation costs: give example_inputs=, one micro-batch; or give the model "
            'stages = ("embed", "layers.*", "head")'
        )
    traced = trace(model, example)
    nodes, costs, carried = node_costs(traced, example)
    costs = costs if balance == "cost" else [1.0] * len(nodes)
    _check_enough(stages, len(nodes), f"operations of {type(model).__name__}")
    graphs = split(traced, cut(costs, stages, carried))
    return list(graphs), [
        {str(node.target) for node in g.graph.nodes if node.op in ("call_module", "get_attr")}
        for g in graphs
    ]


def _check_enough(stages: int, pieces: int, what: str) -> None:
    if stages > pieces:
        raise UserError(
            f"{stages} stages are more than the {pieces} {what}; give fewer ranks of pp, or a "
            "deeper model"
        )


# --- what stages give each other ------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of one tensor that travels."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def floats(self) -> bool:
        """Whether it has a gradient, which travels back."""
        return self.dtype.is_floating_point

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Shapes:
    """What each stage is given, by the shape of a micro-batch: [Note: what travels] in pp.py."""

    def __init__(self, ghosts: nn.Module, compute_dtype: torch.dtype | None) -> None:
        self.ghosts = list(ghosts.to(compute_dtype).children())
        self.dtype = compute_dtype
        self.known: dict[tuple[torch.Size, torch.dtype], list[list[Shape]]] = {}

    def of(self, x: Tensor) -> list[list[Shape]]:
        """For each stage the shapes of what it is given; the first is given x itself."""
        key = (x.shape, x.dtype)
        if key not in self.known:
            self.known[key] = list(self._pass_through(x))
        return self.known[key]

    def _pass_through(self, x: Tensor) -> Iterable[list[Shape]]:
        dtype = self.dtype if x.is_floating_point() and self.dtype else x.dtype
        values: tuple[Tensor, ...] = (torch.empty(x.shape, dtype=dtype, device="meta"),)
        yield [Shape(x.shape, x.dtype)]
        for stage, ghost in enumerate(self.ghosts[:-1]):
            try:
                with torch.no_grad():
                    values = ghost(*values)
            except Exception as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise UserError(
                    f"stage {stage} cannot be run on the meta device, to learn the shapes of what "
                    f"it gives ({why}); a pipeline needs shapes that do not depend on values"
                ) from None
            if not all(isinstance(value, Tensor) for value in values):
                raise UserError(f"stage {stage} gives what is no tensor, and cannot be sent")
            yield [Shape(value.shape, value.dtype) for value in values]


# --- tensors of several stages --------------------------------------------------------------------


class Tied(Sync):
    """Pays what tensors that several stages hold owe: see [Note: whole gradients] in pp.py."""

    def __init__(self, model: nn.Module, tied: Mapping[str, Axis]) -> None:
        self.model, self.tied = model, tied

    def finish(self) -> None:
        for name, axis in self.tied.items():
            parameter = self.model.get_parameter(name)
            mine = parameter.grad
            flat = torch.zeros_like(parameter).flatten() if mine is None else mine.flatten()
            # With one more element that says whether any of them has a gradient at all.
            flat = torch.cat([flat, flat.new_tensor([mine is not None])])
            with axis.wire.during(unit=f"tied {name}"):
                whole = ops.all_reduce_into(flat, axis).wait()  # dW{U} -> dW
            if whole[-1] > 0:
                parameter.grad = whole[:-1].view_as(parameter)


# --- what is here, and what is not ----------------------------------------------------------------


class Elsewhere(nn.Module):
    """Stands where a layer of another stage would be."""

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        raise UserError("this layer is on another stage; under pp call job.run or job.evaluate")


def names_of(model: nn.Module) -> Iterable[str]:
    """Of all its tensors, each name of those that have several."""
    yield from (name for name, _ in model.named_parameters(remove_duplicate=False))
    yield from (name for name, _ in model.named_buffers(remove_duplicate=False))


def _within(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _leave(module: nn.Module, prefix: str, kept: set[str]) -> None:
    """Put stand-ins for the modules, and None for the tensors, that are not among those kept."""
    for name, child in list(module._modules.items()):
        path = f"{prefix}{name}"
        if child is None or path in kept:
            continue
        if any(other.startswith(f"{path}.") for other in kept):
            _leave(child, f"{path}.", kept)
        else:
            module._modules[name] = Elsewhere()
    for held in (module._parameters, module._buffers):
        for name in held:
            if f"{prefix}{name}" not in kept:
                held[name] = None


def _come_to_life(
    roots: Sequence[nn.Module],
    values: Mapping[nn.Parameter, str],
    value_of: Callable[[str], Tensor],
    device: torch.device,
) -> None:
    """Of a model from the meta device: each parameter that is kept gets its value, where it is."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, name in values.items():
        if parameter.is_meta:
            value = value_of(name).to(device)
            new[parameter] = nn.Parameter(value, parameter.requires_grad)
            new[parameter].__dict__.update(parameter.__dict__)
    for root in roots:
        for module in root.modules():
            for name, held in module._parameters.items():
                if held in new:
                    module._parameters[name] = new[held]
