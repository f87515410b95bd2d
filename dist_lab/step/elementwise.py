"""Which optimizers may step on parts of a tensor: those that treat each element by itself.

SGD and Adam do. Adafactor takes means over rows, Muon multiplies matrices, LAMB takes the norm of a
tensor, LBFGS products over all of them: on a shard such a step is another step. No class says what
it is, so each is tried: the same gradients, once with whole tensors in one optimizer, and once with
their pieces in two, as two ranks have them. What comes out the same is exact on any layout.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Layout, OnlyOn, Shard
from dist_lab.mesh.mesh import Mesh

Options = Mapping[str, Any]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Cut = Callable[[Tensor], Sequence[Tensor]]  # into two views


def refuse_coupled(
    cls: type[torch.optim.Optimizer],
    options: Options,
    own_options: Mapping[str, Options],
    stepped: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    *,
    by_tensor: bool,
) -> None:
    """See that a class of optimizer takes the same step on this layout as in one process.

    Args:
        own_options: name of a trained parameter, also on other ranks -> options of its group.
        stepped: name -> the tensor that the optimizer is to step on here.
        by_tensor: a library gives each rank some of the tensors to step on.

    Raises:
        UserError: it does not; the same on every rank.
    """
    parts = {name for name in own_options if _in_parts(name, stepped, layouts, mesh)}
    scattered = (by_tensor and mesh.size > 1) or mesh["pp"].size > 1
    if not (parts or scattered):
        return
    device = next((local_part(tensor).device for tensor in stepped.values()), mesh.device)
    for own, names in by_options(own_options):

        def make(parameters: list[nn.Parameter], own: Options = own) -> torch.optim.Optimizer:
            return cls([{"params": parameters, **own}], **options)

        within = next((name for name in names if name in parts), None)
        sees = looks_at(make, device) if within or scattered else "element"
        if sees == "element" or (sees == "tensor" and not within):
            continue
        # What it does not take whole either, such as a wrong option, it refuses in its own words.
        zero = torch.zeros((), device=device)
        make([nn.Parameter(zero.expand(layouts[name].shape)) for name in names])
        if within:
            why = f"more than one element at a time, and here ranks step on parts of {within}"
        else:
            why = "more than one parameter at a time, and here ranks step on different ones"
        raise UserError(
            f"{cls.__name__} looks at {why}; take dp or ddp, under which every rank has all whole"
        )


def by_options(own_options: Mapping[str, Options]) -> list[tuple[Options, list[str]]]:
    """Options -> the parameters that have them. Options need not be hashable."""
    groups: list[tuple[Options, list[str]]] = []
    for name, own in own_options.items():
        names = next((names for known, names in groups if known == own), None)
        if names is None:
            groups.append((own, names := []))
        names.append(name)
    return groups


def looks_at(make: Make, device: torch.device) -> Literal["element", "tensor", "all"]:
    """What one number that the optimizer writes depends on, tried on tiny tensors.

    "all" also if it cannot be tried, for instance as it wants a closure.
    """
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> list[Tensor]:
        """Values, and gradients of a few steps; of any size, for what is done to large ones."""
        sizes = (1.0, 1.0, 100.0, 0.01, 1.0)
        return [
            s * torch.randn(shape, generator=random, dtype=torch.float64).to(device) for s in sizes
        ]

    matrix, vector, other = drawn(4, 3), drawn(5), drawn(3, 5)
    with (
        torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if all(_same(make, [matrix, vector], cut) for cut in (_rows, _ranges)):
            return "element"
        for pair in ([matrix, vector], [matrix, other]):  # some take matrices alone
            if _same(make, pair, None):
                return "tensor"
    return "all"


def _same(make: Make, tensors: Sequence[Sequence[Tensor]], cut: Cut | None) -> bool:
    """Whether two optimizers, each with one piece of each tensor, do what one does with all.

    Without a cut, each of the two has one of the tensors.
    """
    whole = [[value.clone() for value in tensor] for tensor in tensors]
    split = [[value.clone() for value in tensor] for tensor in tensors]
    pieces = [[cut(v) for v in t] for t in split] if cut else []
    halves = [[[v[i] for v in t] for t in pieces] for i in (0, 1)] if cut else [[t] for t in split]
    try:
        _step(make, whole)
        for half in halves:
            _step(make, half)
    except Exception:  # of whatever kind: it is the optimizer's
        return False
    # To a rounding: the last elements of a tensor may go another way through the processor.
    return all(
        torch.allclose(a[0], b[0], rtol=1e-11, atol=1e-13, equal_nan=True)
        for a, b in zip(whole, split, strict=True)
    )


def _step(make: Make, tensors: Sequence[Sequence[Tensor]]) -> None:
    """Change the first of each, its value, by steps with the others, its gradients."""
    parameters = [nn.Parameter(value.clone()) for value, *_ in tensors]
    optimizer = make(parameters)
    for gradients in list(zip(*tensors, strict=True))[1:]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for (value, *_), parameter in zip(tensors, parameters, strict=True):
        value.copy_(parameter.detach())


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.tensor_split(2, 0)


def _ranges(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.flatten().tensor_split([tensor.numel() // 2 - 1])  # a view, as it is contiguous


def _in_parts(
    name: str, stepped: Mapping[str, Tensor], layouts: Mapping[str, Layout], mesh: Mesh
) -> bool:
    """Whether ranks step on parts of it, or this one on all elements in another shape."""
    layout = layouts[name]
    for axis, how in layout.splits:
        copies = how.copies if isinstance(how, Shard) else 1
        if not isinstance(how, OnlyOn) and mesh[axis].size > copies:
            return True
    return name in stepped and stepped[name].shape != layout.shape
