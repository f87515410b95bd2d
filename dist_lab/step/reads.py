"""A forward that reads a parameter of another unit opens that unit.

    embed = Embedding, a unit of its own
    forward of the model:   h = embed(tokens) ...; logits = h @ embed.weight.T

While a unit is open, its unsharded parameters are in each module's `__dict__`, where Python looks
first. Once the unit is closed, the look-up of `embed.weight` goes on to the module's `_parameters`,
where a forward of another unit would find a shard. So we replace `_parameters` by a dict whose
`__getitem__` opens the unit. The unit stays open until the forward that reads its parameter is
over. In backward, unpacking the saved tensor opens the unit, like any other: see saved.py.

Nothing else changes: code that iterates over parameters sees the shards, as before, and so does
code that reads a parameter while no forward is running.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.step.hooks import StaysBehind
from dist_lab.step.protocol import Chain, Phase
from dist_lab.step.saved import SavedByName, Visit
from dist_lab.torch_private import backward_number


class UnitLike(Protocol):
    """The part of `units.Unit` that this file uses."""

    name: str
    sync: Chain
    comm: CommContext
    saver: SavedByName
    is_open: bool
    visit: Visit
    reader: Any
    read_units: list[Any]

    @property
    def root(self) -> Any: ...
    def open(self, phase: Phase) -> None: ...
    def close(self, phase: Phase) -> None: ...
    def enter_backward(self, visit: Visit) -> None: ...


class UnshardOnRead(StaysBehind, dict[str, Any]):
    """The `_parameters` of one module. A copy of the module has a plain dict.

    Attributes:
        unsharded: attribute -> (the unit to open, the unsharded tensor that the read returns).
    """

    unsharded: Mapping[str, tuple[UnitLike, Tensor]]

    @property
    def in_a_copy(self) -> dict[str, Any]:
        return dict(self)

    def __getitem__(self, attribute: str) -> Any:
        if attribute in self.unsharded:
            unit, unsharded = self.unsharded[attribute]
            if open_for_reader(unit, attribute):
                return unsharded
        return super().__getitem__(attribute)


def open_when_read(
    model: nn.Module,
    unit_of: Mapping[nn.Parameter, UnitLike],
    leaf_of: Mapping[nn.Parameter, Tensor],
) -> None:
    """Make a read of a parameter open its unit, in each module of the model."""
    for module in model.modules():
        unsharded = {
            attribute: (unit_of[parameter], leaf_of[parameter])
            for attribute, parameter in module._parameters.items()
            if parameter is not None and parameter in unit_of
        }
        if unsharded:
            parameters = UnshardOnRead(module._parameters)
            parameters.unsharded = unsharded
            module._parameters = parameters


def open_for_reader(unit: UnitLike, attribute: str) -> bool:
    """Open a unit whose parameter is read. Returns False if the read must return the shard."""
    reader, in_backward = unit.saver.innermost, backward_number() != -1
    # In backward, checkpointing may recompute code that is not in any unit's forward.
    is_running = reader is not None or (in_backward and torch.is_grad_enabled())
    if not is_running or unit.is_open:  # open: unshard() itself reads the shards
        return False
    if unit.root is None:
        raise UserError(
            f"{unit.comm.unit} was called by itself, but its forward reads {attribute}, which is "
            "sharded and belongs to the unit of the whole model; call the model"
        )
    unit.visit = visit = Visit()
    if reader is not None:
        visit.outer = reader, reader.visit
    if in_backward:
        unit.enter_backward(visit)
    else:
        unit.open(Phase.FORWARD)
    if reader is not None:
        unit.reader = reader
        reader.read_units.append(unit)
    return True


def close_read_units(reader: UnitLike) -> None:
    """Close the units whose parameters this unit has read: its forward is over."""
    for unit in reversed(reader.read_units):
        unit.reader = None
        if backward_number() == -1:
            if torch.is_grad_enabled():
                unit.sync.backward_will_come(unit.name, unit.visit)
            unit.close(Phase.FORWARD)
    reader.read_units.clear()
