"""Where the matrices of an optimizer are: which ranks share the work on which of them.

    fsdp, zero, dp, ddp     a matrix goes to one owner among the ranks of these axes
    tp                      ranks keep their rows or columns of it, and sum products of matrices, if
                            the optimizer can do that; if not, tp's ranks send them to an owner too
    pp                      each stage has its own matrices

Everything follows from the layouts, so a mix of strategies needs no rule of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_lab.layout.boxes import intersection, lengths, relative
from dist_lab.layout.gather import axis_of_parts
from dist_lab.layout.layout import Box, Layout, OnlyOn, Shard, boxes, shard_shape
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.mesh.topology import DATA_AXES, ORDER
from dist_lab.optim.matrices import How, matrix_boxes, matrix_shape, side_of
from dist_lab.optim.owners import Exchange


@dataclass(frozen=True)
class Part:
    """A matrix in a parameter, or this rank's part of it.

    Attributes:
        box: where it is in the tensor that the owner assembles.
        own_shape: the rows and columns in this box.
        shape: the rows and columns of the whole matrix.
        split: 0, ranks hold rows of it; 1, columns; None: the box has all of it.
        first: the first of those rows or columns.
    """

    box: Box
    own_shape: tuple[int, int]
    shape: tuple[int, int]
    split: int | None
    first: int = 0

    def held(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Box]:
        """The full shape of a state tensor of this matrix, and the box of it that it is.

        Args:
            shape: of the tensor on this rank.
        """
        if self.split is None or shape != self.own_shape:
            return shape, tuple(slice(0, length) for length in shape)
        box = [slice(0, length) for length in shape]
        box[self.split] = slice(self.first, self.first + shape[self.split])
        return self.shape, tuple(box)

    def own_part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on this rank of a state tensor with this full shape."""
        return self.own_shape if self.split is not None and shape == self.shape else shape


@dataclass(frozen=True)
class Placement:
    """Attributes:
    parameters: name -> the tensor of this rank, of each parameter that consists of matrices.
    parts: name -> its matrices.
    exchanges: each with the axis over which products of its matrices are summed, if any.
    mesh: None in one process.
    apart: name -> its layout over the axes along which no owner is chosen: ranks there hold other
        matrices, other parts of this one, or copies.
    """

    parameters: Mapping[str, Tensor]
    parts: Mapping[str, list[Part]]
    exchanges: list[tuple[Exchange, Axis | None]]
    mesh: Mesh | None
    apart: Mapping[str, tuple[Layout, tuple[str, ...]]] = field(default_factory=dict)

    def is_owned(self, name: str) -> bool:
        """Whether this rank keeps the state of a parameter's matrices."""
        return any(name in exchange.owned for exchange, _ in self.exchanges)


def place(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    kinds: Mapping[str, How],
    mesh: Mesh | None,
    *,
    sums_products: bool,
) -> Placement:
    """Give each matrix an owner. Collective over the mesh.

    Args:
        parameters: name -> the tensor that the optimizer steps on, on this rank.
        layouts: name -> layout, of the parameters of all ranks.
        kinds: name -> how to read it, of the trained ones.
        sums_products: the optimizer can work on shards of tp.
    """
    parts: dict[str, list[Part]] = {}
    apart: dict[str, tuple[Layout, tuple[str, ...]]] = {}
    lanes: dict[tuple[Axis | None, Axis | None, Axis | None, torch.dtype, str], list[str]] = {}
    for name, layout in layouts.items():
        # Groups of ranks are made here. So all ranks do this for all parameters.
        products = _products(layout, mesh) if sums_products else {}
        shared = [n for n in ORDER if n != "pp" and n not in products]
        splitting = [n for n in shared if n in dict(layout.splits)] or shared[:1]
        among, gather = (mesh.flatten(*shared), mesh.flatten(*splitting)) if mesh else (None, None)
        axis = axis_of_parts(mesh, *next(iter(products.items()))) if mesh and products else None
        if name in kinds and kinds[name] != "adamw" and name in parameters:
            parts[name] = _parts(layout, kinds[name], mesh, products)
            axes = ("pp", *products)
            kept = tuple(split for split in layout.splits if split[0] in axes)
            apart[name] = replace(layout, splits=kept), axes
            # Of a tied matrix two stages compute the update. Each sums it with no other matrix, so
            # that the order of the additions, and the bits of the copies, are equal.
            alone = name if _is_on_several_stages(layout) else ""
            lanes.setdefault((among, gather, axis, layout.dtype, alone), []).append(name)
    sizes, position = (mesh.axes, mesh.coordinates) if mesh else ({}, {})
    exchanges = []
    for (among, gather, axis, *_), names in lanes.items():
        costs = {name: sum(_cost(part) for part in parts[name]) for name in names}
        own = {name: layouts[name] for name in names}
        exchanges.append((Exchange(own, costs, among, gather, sizes, position), axis))
    return Placement({n: parameters[n] for n in parts}, parts, exchanges, mesh, apart)


def _is_on_several_stages(layout: Layout) -> bool:
    return any(isinstance(how, OnlyOn) and len(how.positions) > 1 for _, how in layout.splits)


def _products(layout: Layout, mesh: Mesh | None) -> dict[str, Shard]:
    """The axis over which products are summed, if any: one that splits the matrix, no data axis."""
    products = {
        axis: how
        for axis, how in layout.splits
        if isinstance(how, Shard) and axis not in DATA_AXES and mesh is not None
        if mesh[axis].size > how.copies
    }
    assert len(products) <= 1, f"products of a matrix are summed over one axis, not {products}"
    return products


def _parts(
    layout: Layout, how: How, mesh: Mesh | None, products: Mapping[str, Shard]
) -> list[Part]:
    """The matrices of a parameter. A part may be empty, if tp splits a parameter between them."""
    kept = Layout(layout.shape, layout.dtype, tuple(products.items()))
    sizes, position = (mesh.axes, mesh.coordinates) if mesh else ({}, {})
    shape = shard_shape(kept, sizes, position)
    (around,) = boxes(kept, sizes, position) or [tuple(slice(0, length) for length in shape)]
    dim = next((split.dim for split in products.values()), None)
    parts = []
    for box in matrix_boxes(layout.shape, how):
        inside = intersection(box, around)
        own = relative(inside, around)
        split = None if dim is None else side_of(dim, how)
        first = 0 if dim is None else inside[dim].start - box[dim].start
        whole = matrix_shape(lengths(box), how)
        parts.append(Part(own, matrix_shape(lengths(own), how), whole, split, first))
    return parts


def _cost(part: Part) -> int:
    """Multiplications in a product of the matrix with its transpose, on its shorter side."""
    rows, columns = part.shape
    return rows * columns * min(rows, columns)
