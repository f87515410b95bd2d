"""Gathers full tensors from the shards that ranks hold.

W[D_X] -> W[D]           undo one split after another, the last split first
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

BUCKET_BYTES = 16 * 2**20  # from here on, a collective's cost is proportional to its size
Layouts = Mapping[str, Layout]
Shards = Mapping[str, Tensor | None]  # name -> this rank's shard


def local_part(tensor: Tensor) -> Tensor:
    """This rank's local tensor: the tensor itself, or a DTensor's local shard.

    PyTorch's own shards are DTensors: their shape is the full one, and some operations communicate.
    """
    to_local = getattr(tensor, "to_local", None)  # no isinstance: importing DTensor takes a second
    if to_local is None:
        return tensor
    with torch.no_grad():
        local: Tensor = to_local()
    return local


def gather_full(local: Tensor | None, layout: Layout, mesh: Mesh) -> Tensor:
    """Gather one full tensor: see gather_all."""
    return gather_all({"": local}, {"": layout}, mesh)[""]


def gather_all(
    shards: Shards, layouts: Layouts, mesh: Mesh, bucket_bytes: int = BUCKET_BYTES
) -> dict[str, Tensor]:
    """Gather full tensors from all ranks' shards: W[D_X] -> W[D] for each split, the last first.

    Tensors with the same split share a collective: a small tensor alone would take about as long as
    a large one. Results have their own memory, without padding. Collective
    over the axes of the splits.

    Args:
        shards: by name, the same names in the same order on every rank. None if this rank has
            no shard of the tensor, or only a copy.
        bucket_bytes: bytes of full tensors per collective; a larger tensor goes alone.
    """
    tensors = {
        name: local_part(shard)
        if shard is not None and is_counted(layouts[name], mesh.coordinates)
        else None
        for name, shard in shards.items()
        if shard is None or shard.layout is torch.strided
    }
    for applied in reversed(range(max((len(layouts[name].splits) for name in tensors), default=0))):
        for names in _buckets(tensors, layouts, mesh, applied, bucket_bytes):
            axis_name, how = layouts[names[0]].splits[applied]
            axis = axis_of_parts(mesh, axis_name, how)
            if isinstance(how, OnlyOn):
                root = how.positions[0]
                tensors |= _broadcast_from({n: tensors[n] for n in names}, layouts, axis, root)
            else:
                tensors |= _all_gather({n: tensors[n] for n in names}, layouts, mesh, axis, applied)
    return {
        name: _required(name, tensors) if layouts[name].splits else _required(name, tensors).clone()
        for name in tensors
    } | _sparse_of_rank0(shards, mesh)


def on_any_stage(local: Iterable[str], layouts: Layouts, mesh: Mesh) -> list[str]:
    """The names that are in `local` on this stage of the pipeline, or on another. Collective."""
    names, own = list(layouts), set(local)
    is_local = torch.tensor([name in own for name in names], device=mesh.device).byte()
    found = ops.all_reduce(is_local, mesh["pp"], "max").tolist()
    return [name for name, yes in zip(names, found, strict=True) if yes]


def _sparse_of_rank0(shards: Shards, mesh: Mesh) -> dict[str, Tensor]:
    """Rank 0's sparse buffers. They are not split: each rank has a copy."""
    sparse = {
        name: buffer.clone()
        for name, buffer in shards.items()
        if buffer is not None and buffer.layout is not torch.strided
    }
    for tensor in sparse.values():
        broadcast_anything(tensor, mesh.world)
    return sparse


def axis_of_parts(mesh: Mesh, name: str, how: Placement) -> Axis:
    """The axis that has each shard once: the named one, or every `copies`-th position."""
    if isinstance(how, Shard) and how.copies > 1:
        return mesh.strided(name, how.copies)
    return mesh[name]


def _required(name: str, shards: Shards) -> Tensor:
    shard = shards[name]
    assert shard is not None, f"a rank that holds {name}, or a shard of it, has passed None"
    return shard


def _buckets(
    names: Iterable[str], layouts: Layouts, mesh: Mesh, applied: int, bucket_bytes: int
) -> Iterator[list[str]]:
    """Group the names of tensors with the same axis, kind of collective, root and dtype.

    A tensor that an earlier split puts on other ranks is left out: no rank of this axis has it yet.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        layout = layouts[name]
        before = replace(layout, splits=layout.splits[:applied])
        if applied < len(layout.splits) and is_counted(before, mesh.coordinates):
            axis, how = layout.splits[applied]
            root = how.positions[0] if isinstance(how, OnlyOn) else None
            copies = how.copies if isinstance(how, Shard) else 1
            groups.setdefault((axis, copies, root, layout.dtype), []).append(name)
    for group in groups.values():
        sizes = [layouts[name].shape.numel() * layouts[name].dtype.itemsize for name in group]
        first, total = 0, 0
        for i, size in enumerate(sizes):
            if total + size > bucket_bytes and i > first:
                yield group[first:i]
                first, total = i, 0
            total += size
        yield group[first:]


def _broadcast_from(shards: Shards, layouts: Layouts, axis: Axis, index: int) -> dict[str, Tensor]:
    """Broadcast tensors that only one rank of the axis holds."""
    shapes = [layouts[name].shape for name in shards]
    lengths = [shape.numel() for shape in shapes]
    (dtype,) = {layouts[name].dtype for name in shards}
    if axis.index == index:
        flat = torch.cat([_required(name, shards).flatten() for name in shards])
        assert flat.dtype == dtype, f"{list(shards)} have dtype {flat.dtype}"
    else:
        flat = torch.empty(sum(lengths), dtype=dtype, device=axis.device)
    ops.broadcast_into(sendable(flat), axis, index).wait()
    tensors = flat.split(lengths)
    return {n: x.view(s).clone() for n, x, s in zip(shards, tensors, shapes, strict=True)}


def _all_gather(
    shards: Shards, layouts: Layouts, mesh: Mesh, axis: Axis, applied: int
) -> dict[str, Tensor]:
    """All-gather tensors of which each rank of the axis holds a shard."""
    all_bounds = [_bounds(layouts[name], mesh, axis.size, applied) for name in shards]
    padded = []
    for name, (dim, _, bounds) in zip(shards, all_bounds, strict=True):
        shard = _required(name, shards)
        assert shard.dtype == layouts[name].dtype, f"{name} has dtype {shard.dtype}"
        longest = max(stop - start for start, stop in bounds)
        no_padding = [0, 0] * (shard.dim() - 1 - dim)  # F.pad counts dims from the last
        padded.append(F.pad(shard, [*no_padding, 0, longest - shard.shape[dim]]))
    rows = ops.all_gather(torch.cat([x.flatten() for x in padded])[None], axis)  # (size, L)
    by_tensor = rows.split([x.numel() for x in padded], 1)
    full = {}
    for name, x, flat, (dim, shape, bounds) in zip(
        shards, padded, by_tensor, all_bounds, strict=True
    ):
        lengths = [stop - start for start, stop in bounds]
        by_rank = zip(flat.unflatten(1, x.shape), lengths, strict=True)
        full[name] = torch.cat([s.narrow(dim, 0, n) for s, n in by_rank], dim).view(shape)
    return full


def _bounds(
    layout: Layout, mesh: Mesh, size: int, applied: int
) -> tuple[int, list[int], list[tuple[int, int]]]:
    """The dim of a split, the shape before the split, and start and stop of each shard.

    FlatShard splits the tensor as a vector.
    """
    _, how = layout.splits[applied]
    shape = shape_before(layout, applied, mesh.axes, mesh.coordinates)
    if isinstance(how, FlatShard):
        numel = torch.Size(shape).numel()
        return 0, shape, [how.range(numel, i) for i in range(size)]
    assert isinstance(how, Shard)
    return how.dim, shape, [shard_bounds(shape[how.dim], size, i) for i in range(size)]
