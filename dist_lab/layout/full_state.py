"""The full state dict of a model whose ranks hold shards.

* gather: the shards of all ranks -> full tensors, under the names of `model.state_dict()`
* load: full tensors -> this rank's shards, in place
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
        layouts: name -> the layout of that parameter.
        buffers: name -> the layout of a buffer that is not on every rank.
        stepped: name -> the tensor that optimizers update, if it is not the parameter.
        names: key of the full state dict -> canonical name: a tied parameter's first name.
    """

    model: nn.Module
    mesh: Mesh
    layouts: Mapping[str, Layout]
    buffers: Mapping[str, Layout]
    stepped: Mapping[str, nn.Parameter]
    names: Mapping[str, str]

    def gather(self) -> dict[str, Any]:
        """Returns all full tensors, equal on every rank. Buffers on all ranks come from rank 0."""
        local = self.model.state_dict(keep_vars=True)
        tensors = {name: t.detach() for name, t in local.items() if isinstance(t, Tensor)}
        tensors |= {name: shard.detach() for name, shard in self.stepped.items()}
        rank0 = tuple((axis, OnlyOn((0,))) for axis in self.mesh.axes)
        layouts = {name: Layout(t.shape, t.dtype, rank0) for name, t in tensors.items()}
        layouts |= {**self.layouts, **self.buffers}
        names = [name for name in dict.fromkeys(self.names.values()) if name in layouts]
        gathered = gather_all({name: tensors.get(name) for name in names}, layouts, self.mesh)
        # Tied tensors have several names and one value. Extra state comes from this rank.
        return {key: gathered[n] if n in gathered else local[n] for key, n in self.names.items()}

    def tied(self) -> dict[str, str]:
        """Another name of a tied parameter -> its canonical name."""
        return {key: name for key, name in self.names.items() if key != name}

    def buffer_layouts(self) -> dict[str, Layout]:
        """The layout of each buffer that is saved; without a pipeline every rank has them all."""
        whole = {n: Layout(b.shape, b.dtype) for n, b in self.model.named_buffers()}
        return {n: whole[n] for n in self.names if n in whole} | {**self.buffers}

    def load(self, full: Mapping[str, Any]) -> None:
        """Write full tensors into this rank's shards.

        Raises:
            UserError: a name or a shape does not match. Nothing is changed in that case.
        """
        local = self.model.state_dict(keep_vars=True)
        self._check_names_and_shapes(full, local)
        to_load = {name: full[name] for name in local}
        first_name = {p: name for name, p in self.model.named_parameters()}
        for name, tensor in local.items():
            if isinstance(tensor, nn.Parameter):  # we copy: DTensors would need full shapes
                first = first_name[tensor]
                shard = slice_local(
                    full[name], self.layouts[first], self.mesh.axes, self.mesh.coordinates
                )
                local_part(self.stepped.get(first, tensor).detach()).copy_(shard)
                to_load[name] = tensor
            elif isinstance(tensor, Tensor) and (index := distinct(tensor)):
                tensor[index].copy_(full[name][index])
                to_load[name] = tensor
        self.model.load_state_dict(to_load)

    def _check_names_and_shapes(self, full: Mapping[str, Any], local: Mapping[str, Any]) -> None:
        odd_names = sorted(self.names.keys() ^ full.keys())
        if odd_names:
            side = "missing from" if odd_names[0] in self.names else "not in the model but in"
            raise UserError(
                f"{len(odd_names)} names do not match, first: {odd_names[0]} is {side} the weights"
            )
        for name, first in self.names.items():
            layout, tensor = self.layouts.get(first) or self.buffers.get(name), local.get(name)
            shape = layout.shape if layout else tensor.shape if isinstance(tensor, Tensor) else None
            if shape is not None and full[name].shape != shape:
                raise UserError(
                    f"{name} has shape {tuple(full[name].shape)}, the model {tuple(shape)}"
                )
