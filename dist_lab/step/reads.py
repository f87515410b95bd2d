"""A forward that reads a parameter of another unit opens that unit.

    embed = Embedding, a unit of its own
    forward of the model:   h = embed(tokens) ...; logits = h @ embed.weight.T

While a unit is open, its unsharded parameters stand before the shards in each module's `__dict__`,
and Python does not look further. Once it is closed, the look-up of `embed.weight` goes on to the
module's `_parameters`, where a forward of another unit would find a shard. So that dict is of a
class that hears of it: the unit is opened, and stays open until the forward that reads it is over.
Backward comes to it by name, as to any other unit: see saved.py.

Nothing else changes: what iterates over parameters sees the shards, as before, and so does whoever
reads one while no forward is under way.
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


class Lends(Protocol):
    """A unit, as far as it is needed here: see units.py."""

    name: str
    sync: Chain
    comm: CommContext
    saved: SavedByName
    is_open: bool
    visit: Visit
    reader: Any
    read: list[Any]

    @property
    def root(self) -> Any: ...
    def open(self, phase: Phase) -> None: ...
    def close(self, phase: Phase) -> None: ...
    def enter_backward(self, visit: Visit) -> None: ...


class Parameters(StaysBehind, dict[str, Any]):
    """The `_parameters` of one module. A copy of the module has a plain dict.

    Attributes:
        lent: attribute -> the unit that is to be opened, and the unsharded tensor it will have.
    """

    lent: Mapping[str, tuple[Lends, Tensor]]

    @property
    def in_a_copy(self) -> dict[str, Any]:
        return dict(self)

    def __getitem__(self, attribute: str) -> Any:
        if attribute in self.lent:
            unit, unsharded = self.lent[attribute]
            if lend(unit, attribute):
                return unsharded
        return super().__getitem__(attribute)


def open_when_read(
    model: nn.Module, unit_of: Mapping[nn.Parameter, Lends], leaf_of: Mapping[nn.Parameter, Tensor]
) -> None:
    """Let each module of the model open the units of the parameters that it holds."""
    for module in model.modules():
        lent = {
            attribute: (unit_of[parameter], leaf_of[parameter])
            for attribute, parameter in module._parameters.items()
            if parameter is not None and parameter in unit_of
        }
        if lent:
            parameters = Parameters(module._parameters)
            parameters.lent = lent
            module._parameters = parameters


def lend(unit: Lends, attribute: str) -> bool:
    """A parameter of the unit is read. Returns whether its unsharded tensor is there."""
    reader, in_backward = unit.saved.innermost, backward_number() != -1
    # In backward a part of a forward may be under way, that is recomputed.
    computes = reader is not None or (in_backward and torch.is_grad_enabled())
    if not computes or unit.is_open:  # in the midst of being opened, it holds shards
        return False
    if unit.root is None:
        raise UserError(
            f"{unit.comm.unit} was called by itself, and its forward reads {attribute}, which "
            "belongs to the whole model and is sharded; call the model"
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
        reader.read.append(unit)
    return True


def give_back(reader: Lends) -> None:
    """A forward is over that has read parameters of other units."""
    for unit in reversed(reader.read):
        unit.reader = None
        if backward_number() == -1:
            if torch.is_grad_enabled():
                unit.sync.backward_will_come(unit.name, unit.visit)
            unit.close(Phase.FORWARD)
    reader.read.clear()
