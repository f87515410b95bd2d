"""The state of a whole model, of which each rank's module holds a part.

* gather: parts of all ranks -> every tensor whole, under the names of `model.state_dict()`
* load: whole tensors -> this rank's parts, in place
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dist_lab.comm.anything import distinct
from dist_lab.errors import UserError
from dist_lab.layout.gather import gather_all, local_part
from dist_lab.layout.layout import Layout, OnlyOn, slice_local
from dist_lab.mesh.mesh import Mesh


@dataclass(frozen=True)
class FullState:
    """Gathers and loads the state of one model.

    Attributes:
        layouts: name -> how that parameter lies.
        buffers: name -> how a buffer lies, where it is not on every rank.
        stepped: name -> the tensor that optimizers step on, where it is not the parameter.
        names: of the whole model's state -> of a parameter, the first of its names.
    """

    model: nn.Module
    mesh: Mesh
    layouts: Mapping[str, Layout]
    buffers: Mapping[str, Layout]
    stepped: Mapping[str, nn.Parameter]
    names: Mapping[str, str]

    def gather(self) -> dict[str, Any]:
        """Every tensor whole, equal on every rank; of buffers that lie on all, rank 0's."""
        own = self.model.state_dict(keep_vars=True)
        tensors = {name: t.detach() for name, t in own.items() if isinstance(t, Tensor)}
        tensors |= {name: shard.detach() for name, shard in self.stepped.items()}
        rank0 = tuple((axis, OnlyOn((0,))) for axis in self.mesh.axes)
        layouts = {name: Layout(t.shape, t.dtype, rank0) for name, t in tensors.items()}
        layouts |= {**self.layouts, **self.buffers}
        held = [name for name in dict.fromkeys(self.names.values()) if name in layouts]
        whole = gather_all({name: tensors.get(name) for name in held}, layouts, self.mesh)
        # Tied tensors have several names and one value; a module's extra state is this rank's.
        return {name: whole[n] if n in whole else own[n] for name, n in self.names.items()}

    def load(self, full: Mapping[str, Any]) -> None:
        """Write this rank's parts of whole tensors.

        Raises:
            UserError: a name or a shape that does not fit; nothing has been changed then.
        """
        own = self.model.state_dict(keep_vars=True)
        self._refuse_misfits(full, own)
        parts = {name: full[name] for name in own}
        canonical = {p: name for name, p in self.model.named_parameters()}
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter):  # here, as a library's may claim the whole shape
                first = canonical[tensor]
                part = slice_local(
                    full[name], self.layouts[first], self.mesh.axes, self.mesh.coordinates
                )
                local_part(self.stepped.get(first, tensor).detach()).copy_(part)
                parts[name] = tensor
            elif isinstance(tensor, Tensor) and (index := distinct(tensor)):
                tensor[index].copy_(full[name][index])
                parts[name] = tensor
        self.model.load_state_dict(parts)

    def _refuse_misfits(self, full: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        odd = sorted(self.names.keys() ^ full.keys())
        if odd:
            side = "missing from" if odd[0] in self.names else "not in the model but in"
            raise UserError(f"{len(odd)} names do not match, first: {odd[0]} is {side} the weights")
        for name, first in self.names.items():
            where, tensor = self.layouts.get(first) or self.buffers.get(name), own.get(name)
            shape = where.shape if where else tensor.shape if isinstance(tensor, Tensor) else None
            if shape is not None and full[name].shape != shape:
                raise UserError(
                    f"{name} has shape {tuple(full[name].shape)}, the model {tuple(shape)}"
                )
