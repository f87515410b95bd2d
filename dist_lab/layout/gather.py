"""Whole tensors from the parts that ranks hold.

W[D_X] -> W[D]           one split after another, the last applied first
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.anything import broadcast_anything, sendable
from dist_lab.layout.layout import (
    FlatShard,
    Layout,
    OnlyOn,
    Placement,
    Shard,
    is_counted,
    shape_before,
    shard_bounds,
)
from dist_lab.mesh.mesh import Axis, Mesh

TOGETHER = 16 * 2**20  # bytes: beyond that a tensor's own size is what it costs
Layouts = Mapping[str, Layout]
Parts = Mapping[str, Tensor | None]  # what of each tensor is here by now


def local_part(tensor: Tensor) -> Tensor:
    """This rank's local tensor: the tensor itself, or a DTensor's local shard.

    PyTorch's own shards are DTensors, which speak of the whole and communicate when asked for it.
    """
    to_local = getattr(tensor, "to_local", None)  # no isinstance: importing DTensor takes a second
    if to_local is None:
        return tensor
    with torch.no_grad():
        inside: Tensor = to_local()
    return inside


def gather_full(local: Tensor | None, layout: Layout, mesh: Mesh) -> Tensor:
    """Gather one whole tensor: see gather_all."""
    return gather_all({"": local}, {"": layout}, mesh)[""]


def gather_all(
    parts: Parts, layouts: Layouts, mesh: Mesh, together: int = TOGETHER
) -> dict[str, Tensor]:
    """Gather whole tensors from all ranks' parts: W[D_X] -> W[D] for each split, the last first.

    What is split alike travels as one: of a thousand small tensors each alone would cost as much
    as a large one. Results have memory of their own, in which there is no padding. Collective over
    the axes of the splits.

    Args:
        parts: by name, the same names in one order on every rank. None where this rank holds
            nothing of it that counts.
        together: bytes of whole tensors that travel as one; a larger tensor goes alone.
    """
    now = {
        name: local_part(part)
        if part is not None and is_counted(layouts[name], mesh.coordinates)
        else None
        for name, part in parts.items()
        if part is None or part.layout is torch.strided
    }
    for applied in reversed(range(max((len(layouts[name].splits) for name in now), default=0))):
        for names in _alike(now, layouts, mesh, applied, together):
            axis_name, how = layouts[names[0]].splits[applied]
            axis = axis_of_parts(mesh, axis_name, how)
            if isinstance(how, OnlyOn):
                now |= _from_one({n: now[n] for n in names}, layouts, axis, how.positions[0])
            else:
                now |= _from_all({n: now[n] for n in names}, layouts, mesh, axis, applied)
    return {
        name: _known(name, now) if layouts[name].splits else _known(name, now).clone()
        for name in now
    } | _sparse_of_rank0(parts, mesh)


def _sparse_of_rank0(parts: Parts, mesh: Mesh) -> dict[str, Tensor]:
    """Sparse buffers, which are whole on every rank: rank 0's, as of any buffer."""
    found = {
        name: part.clone()
        for name, part in parts.items()
        if part is not None and part.layout is not torch.strided
    }
    for tensor in found.values():
        broadcast_anything(tensor, mesh.world)
    return found


def axis_of_parts(mesh: Mesh, name: str, how: Placement) -> Axis:
    """The axis on which each part lies once: the named one, or every `copies`-th position."""
    if isinstance(how, Shard) and how.copies > 1:
        return mesh.strided(name, how.copies)
    return mesh[name]


def _known(name: str, now: Parts) -> Tensor:
    part = now[name]
    assert part is not None, f"a rank that has {name}, or a part of it, has given None"
    return part


def _alike(
    names: Iterable[str], layouts: Layouts, mesh: Mesh, applied: int, together: int
) -> Iterator[list[str]]:
    """Group the names of tensors that come over one axis, from one rank or all, in one dtype.

    Where an earlier split has put a tensor elsewhere, nobody on this line has anything of it yet.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        layout = layouts[name]
        before = replace(layout, splits=layout.splits[:applied])
        if applied < len(layout.splits) and is_counted(before, mesh.coordinates):
            axis, how = layout.splits[applied]
            whose = how.positions[0] if isinstance(how, OnlyOn) else None
            copies = how.copies if isinstance(how, Shard) else 1
            groups.setdefault((axis, copies, whose, layout.dtype), []).append(name)
    for group in groups.values():
        sizes = [layouts[name].shape.numel() * layouts[name].dtype.itemsize for name in group]
        first, total = 0, 0
        for i, size in enumerate(sizes):
            if total + size > together and i > first:
                yield group[first:i]
                first, total = i, 0
            total += size
        yield group[first:]


def _from_one(parts: Parts, layouts: Layouts, axis: Axis, index: int) -> dict[str, Tensor]:
    """Broadcast tensors that lie whole on one rank of the axis."""
    shapes = [layouts[name].shape for name in parts]
    lengths = [shape.numel() for shape in shapes]
    (dtype,) = {layouts[name].dtype for name in parts}
    if axis.index == index:
        flat = torch.cat([_known(name, parts).flatten() for name in parts])
        assert flat.dtype == dtype, f"{list(parts)} come in {flat.dtype}"
    else:
        flat = torch.empty(sum(lengths), dtype=dtype, device=axis.device)
    ops.broadcast_into(sendable(flat), axis, index).wait()
    whole = flat.split(lengths)
    return {n: x.view(s).clone() for n, x, s in zip(parts, whole, shapes, strict=True)}


def _from_all(
    parts: Parts, layouts: Layouts, mesh: Mesh, axis: Axis, applied: int
) -> dict[str, Tensor]:
    """Gather tensors of which each rank of the axis has a shard."""
    cuts = [_bounds(layouts[name], mesh, axis.size, applied) for name in parts]
    padded = []
    for name, (dim, _, bounds) in zip(parts, cuts, strict=True):
        part = _known(name, parts)
        assert part.dtype == layouts[name].dtype, f"{name} comes in {part.dtype}"
        longest = max(stop - start for start, stop in bounds)
        after = [0, 0] * (part.dim() - 1 - dim)  # the dims behind it stay as long as they are
        padded.append(F.pad(part, [*after, 0, longest - part.shape[dim]]))
    rows = ops.all_gather(torch.cat([x.flatten() for x in padded])[None], axis)  # (size, L)
    shards = rows.split([x.numel() for x in padded], 1)
    joined = {}
    for name, x, each, (dim, shape, bounds) in zip(parts, padded, shards, cuts, strict=True):
        lengths = [stop - start for start, stop in bounds]
        pieces = zip(each.unflatten(1, x.shape), lengths, strict=True)
        joined[name] = torch.cat([p.narrow(dim, 0, n) for p, n in pieces], dim).view(shape)
    return joined


def _bounds(
    layout: Layout, mesh: Mesh, size: int, applied: int
) -> tuple[int, list[int], list[tuple[int, int]]]:
    """Along which dim a split cuts, the shape before it, and where each shard begins and ends.
    Under FlatShard it cuts the tensor as a vector.
    """
    _, how = layout.splits[applied]
    shape = shape_before(layout, applied, mesh.axes, mesh.coordinates)
    if isinstance(how, FlatShard):
        numel = torch.Size(shape).numel()
        return 0, shape, [how.range(numel, i) for i in range(size)]
    assert isinstance(how, Shard)
    return how.dim, shape, [shard_bounds(shape[how.dim], size, i) for i in range(size)]
