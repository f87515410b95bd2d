"""Entries: the state of a job as named full tensors, of which a rank holds some boxes.

    model/layers.0.w                 [D, F], under fsdp=4:        rank 1 holds [D/4:D/2, :]
    optimizer/layers.0.w/exp_avg     lies as the parameter does
    optimizer/layers.0.w/step        one number, on every rank
    optimizer/layers.0.w/momentum    of Muon: whole, on the rank that owns the matrix

No strategy is named here. Layouts say which boxes a rank holds, and who is the first to hold them.
So one description serves for saving, where the first holder writes a box, and for loading, where
each rank reads what it holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lab.comm.anything import distinct
from dist_lab.errors import UserError, shown
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import Box, Layout, boxes, is_first_holder
from dist_lab.mesh.mesh import Mesh
from dist_lab.randomness.place import Place

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A full tensor by its name, and what this rank holds of it.

    Attributes:
        shape: of the full tensor.
        boxes: the boxes of the full tensor that this rank holds.
        is_first: this rank is the first of those that hold them: it writes them.
        local: their elements, box after box; any shape.
    """

    name: str
    shape: Shape
    boxes: list[Box]
    is_first: bool
    local: Tensor


class Trained(Protocol):
    """The part of `Job` that checkpoints use.

    Attributes:
        tied: another name of a parameter -> its name in `layouts`.
    """

    model: nn.Module
    mesh: Mesh
    layouts: Mapping[str, Layout]
    tied: dict[str, str]
    strategies: str
    place: Place

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def buffer_layouts(self) -> dict[str, Layout]: ...
    def settle(self) -> None: ...
    def weights_changed(self) -> None: ...


def entry_of(name: str, layout: Layout, local: Tensor, mesh: Mesh) -> Entry:
    """The entry of a tensor that lies as its layout says."""
    held = boxes(layout, mesh.axes, mesh.coordinates)
    first = is_first_holder(layout, mesh.axes, mesh.coordinates)
    return Entry(name, tuple(layout.shape), held, first, local)


def model_entries(job: Trained) -> Iterator[Entry]:
    """The entries of this rank's parameters and of the buffers of its state dict.

    Raises:
        UserError: a buffer is sparse, or a name cannot be printed.
    """
    mesh = job.mesh
    if odd := [name for name in job.layouts if not name.isprintable()]:
        raise UserError(
            f"parameter {shown(odd[0])} has a name that cannot be printed, which no checkpoint "
            "holds; give the module another name"
        )
    for name, parameter in job.named_parameters():
        local = local_part(parameter.detach())
        yield entry_of(f"model/{name}", job.layouts[name], local, mesh)
    own = dict(job.model.named_buffers())
    for name, layout in job.buffer_layouts().items():
        if name in own and own[name] is not None:
            buffer = own[name].detach()
            if buffer.layout is not torch.strided:
                raise UserError(
                    f"buffer {name} is sparse, and a checkpoint has dense tensors only; register "
                    "it with persistent=False, or keep its indices and values as two buffers"
                )
            if index := distinct(buffer):  # expanded: one element for each address
                buffer, layout = buffer[index], replace(layout, shape=buffer[index].shape)
            yield entry_of(f"model/{name}", layout, buffer, mesh)


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules keep besides tensors: `get_extra_state`. It must be JSON."""
    state = model.state_dict()
    return {name: state[name] for name in state if name.rpartition(".")[2] == "_extra_state"}
