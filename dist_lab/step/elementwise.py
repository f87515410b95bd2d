"""Finds out which optimizers may step on shards: those that update each element by itself.

SGD and Adam do. Adafactor takes means over rows, Muon multiplies matrices, LAMB takes the norm of a
tensor, LBFGS products over all tensors: with a shard they compute a different update. A class does
not say which kind it is. So we try it twice with equal gradients: one optimizer gets full tensors,
then two optimizers get one half of each, as on two ranks. If the results are equal, the optimizer
is exact in any layout.
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
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Split = Callable[[Tensor], Sequence[Tensor]]  # into two views


def refuse_coupled(
    cls: type[torch.optim.Optimizer],
    options: Options,
    param_options: Mapping[str, Options],
    stepped: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    *,
    by_tensor: bool,
) -> None:
    """Check that an optimizer class computes the same step in these layouts as in one process.

    Args:
        param_options: name of a trained parameter, of any rank -> options of its group.
        stepped: name -> the tensor that the optimizer steps on, on this rank.
        by_tensor: a library assigns each tensor to one rank, which steps on it.

    Raises:
        UserError: the step would differ; raised on every rank.
    """
    sharded_names = {name for name in param_options if _is_sharded(name, stepped, layouts, mesh)}
    distributed = (by_tensor and mesh.size > 1) or mesh["pp"].size > 1
    if not (sharded_names or distributed):
        return
    device = next((local_part(tensor).device for tensor in stepped.values()), mesh.device)
    for group_options, names in by_options(param_options):

        def build(
            parameters: list[nn.Parameter], group_options: Options = group_options
        ) -> torch.optim.Optimizer:
            return cls([{"params": parameters, **group_options}], **options)

        sharded_name = next((name for name in names if name in sharded_names), None)
        depends_on = update_scope(build, device) if sharded_name or distributed else "element"
        if depends_on == "element" or (depends_on == "tensor" and not sharded_name):
            continue
        # A wrong option raises the optimizer's own error here, before we blame the layout.
        zero = torch.zeros((), device=device)
        build([nn.Parameter(zero.expand(layouts[name].shape)) for name in names])
        if sharded_name:
            why = f"more than one element at a time, but ranks step on shards of {sharded_name}"
        else:
            why = "more than one parameter at a time, but ranks step on different parameters"
        raise UserError(
            f"{cls.__name__} looks at {why}; use dp or ddp, where every rank has full parameters, "
            "or an optimizer of dist_lab.optim, which gets whole matrices"
        )


def by_options(param_options: Mapping[str, Options]) -> list[tuple[Options, list[str]]]:
    """Groups parameter names by equal options, which need not be hashable."""
    groups: list[tuple[Options, list[str]]] = []
    for name, group_options in param_options.items():
        names = next((names for known, names in groups if known == group_options), None)
        if names is None:
            groups.append((group_options, names := []))
        names.append(name)
    return groups


def update_scope(build: Build, device: torch.device) -> Literal["element", "tensor", "all"]:
    """What the update of one element depends on: only that element, its tensor, or all tensors.

    We try the optimizer on tiny tensors. Returns "all" also if we cannot try it, for instance
    because its step needs a closure.
    """
    random = torch.Generator().manual_seed(0)

    def random_steps(*shape: int) -> list[Tensor]:
        """A value and 4 gradients, of several scales because some optimizers clip."""
        sizes = (1.0, 1.0, 100.0, 0.01, 1.0)
        return [
            s * torch.randn(shape, generator=random, dtype=torch.float64).to(device) for s in sizes
        ]

    matrix, vector, other = random_steps(4, 3), random_steps(5), random_steps(3, 5)
    with (
        torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if all(_same_update(build, [matrix, vector], split) for split in (_rows, _ranges)):
            return "element"
        for pair in ([matrix, vector], [matrix, other]):  # some optimizers take only matrices
            if _same_update(build, pair, None):
                return "tensor"
    return "all"


def _same_update(build: Build, tensors: Sequence[Sequence[Tensor]], split: Split | None) -> bool:
    """Whether two optimizers with one half of each tensor compute the update of one with all.

    Without a split, each of the two optimizers gets one of the two tensors.
    """
    full = [[value.clone() for value in tensor] for tensor in tensors]
    copies = [[value.clone() for value in tensor] for tensor in tensors]
    if split:
        pairs = [[split(value) for value in tensor] for tensor in copies]
        halves = [[[pair[i] for pair in tensor] for tensor in pairs] for i in (0, 1)]
    else:
        halves = [[tensor] for tensor in copies]
    try:
        _step(build, full)
        for half in halves:
            _step(build, half)
    except Exception:  # an optimizer may raise any exception
        return False
    # Up to rounding: vectorized code computes the last elements of a tensor differently.
    return all(
        torch.allclose(a[0], b[0], rtol=1e-11, atol=1e-13, equal_nan=True)
        for a, b in zip(full, copies, strict=True)
    )


def _step(build: Build, tensors: Sequence[Sequence[Tensor]]) -> None:
    """Each tensor is [value, gradient, ...]: step once with each gradient, update the value."""
    parameters = [nn.Parameter(value.clone()) for value, *_ in tensors]
    optimizer = build(parameters)
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


def _is_sharded(
    name: str, stepped: Mapping[str, Tensor], layouts: Mapping[str, Layout], mesh: Mesh
) -> bool:
    """Whether ranks step on shards of a parameter, or on all its elements in another shape."""
    layout = layouts[name]
    for axis, how in layout.splits:
        copies = how.copies if isinstance(how, Shard) else 1
        if not isinstance(how, OnlyOn) and mesh[axis].size > copies:
            return True
    return name in stepped and stepped[name].shape != layout.shape
