"""Owner mode: each matrix is updated on one rank, its owner, which has all of its gradient.

    dW[D_X, F] -> dW[D, F] on the owner          gradients: one all-to-all per bucket
    update[D, F] on the owner -> update[D_X, F]  updates: another one; in ddp each rank gets it all

An optimizer that multiplies matrices cannot work on shards. If every rank gathered every matrix,
all ranks would do the same work. So each matrix has an owner. The owners' loads are balanced by
cost: largest first, to the rank with the least so far (Graham 1969, "Bounds on multiprocessing
timing anomalies"). The owner also keeps the optimizer's state of the matrix.

With N ranks and P elements in matrices, a rank sends about P/N (N-1)/N elements of gradients where
they are sharded, none where they are replicated; and as much of updates, or P (N-1)/N if ranks need
whole ones. Rows of a message have one length, so the exact number is that of `Bucket`. While a
rank computes the updates of a bucket, the gradients of the next one and the updates of the one
before are travelling.

Which elements a rank holds comes from the layouts alone: boxes of the tensor, for a shard of fsdp
and for a range of elements that zero cuts through a matrix. So no strategy is named here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.calls import Pending
from dist_lab.layout.layout import Box, Coordinates, Layout, Sizes, boxes, shard_shape
from dist_lab.mesh.mesh import Axis
from dist_lab.mesh.topology import coordinates
from dist_lab.optim.boxes import copy_boxes, elements_of, numel_of, relative

BUCKET_BYTES = 16 * 2**20  # of whole matrices
Gradients = Mapping[str, Tensor | None]
Update = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Route:
    """The way of one parameter's elements between the ranks of an axis and its owner.

    Attributes:
        owner: the position of the owner.
        shape: of the tensor on the owner: whole, or a shard if other axes split it as well.
        parts: position -> the boxes of this tensor that the rank there holds, in order.
        senders: positions that send their elements to the owner: each element comes once, from
            the owner itself if it has it.
    """

    owner: int
    shape: tuple[int, ...]
    parts: Sequence[Sequence[Box]]
    senders: Sequence[int]

    def numel(self, position: int) -> int:
        return sum(numel_of(box) for box in self.parts[position])


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together. A row is what one rank sends to one other rank.

    Attributes:
        gradient_row, update_row: elements of the longest row; shorter ones are padded.
    """

    names: Sequence[str]
    gradient_row: int
    update_row: int


class Exchange:
    """Brings gradients to the owners of matrices, and updates back, along one axis.

    Args:
        layouts: name -> layout, of parameters of one dtype.
        costs: name -> the cost of an update, to balance the owners' loads.
        axis: the ranks among which each matrix has an owner; None: in one process.
        gather_axis: those of them that together have one gradient; other ranks have copies of it.
        sizes, position: the axes of the mesh, and this rank's coordinates.

    Attributes:
        owned: the names of the parameters that this rank owns.
    """

    def __init__(
        self, layouts: Mapping[str, Layout], costs: Mapping[str, int], axis: Axis | None,
        gather_axis: Axis | None, sizes: Sizes, position: Coordinates,
    ) -> None:  # fmt: skip
        self.axis, self.gather_axis = axis, gather_axis
        self.size, self.index = (axis.size, axis.index) if axis else (1, 0)
        # Position on the axis -> position on the gather axis.
        self.gather_index = {0: 0}
        if axis and gather_axis:
            self.gather_index = {axis.ranks.index(r): i for i, r in enumerate(gather_axis.ranks)}
        everyone = [coordinates(rank, sizes) for rank in axis.ranks] if axis else [position]
        changing = {n for n in sizes if len({place[n] for place in everyone}) > 1}
        owners = balance(costs, self.size)
        self.routes = {
            name: _route(layout, owners[name], changing, sizes, everyone)
            for name, layout in layouts.items()
        }
        self.owned = [name for name, owner in owners.items() if owner == self.index]
        by_owner = [[n for n in owners if owners[n] == i] for i in range(self.size)]
        self.dtype = next(iter(layouts.values())).dtype
        most = BUCKET_BYTES // self.dtype.itemsize
        numel = {name: layout.shape.numel() for name, layout in layouts.items()}
        self.buckets = [self._bucket(names) for names in fill_buckets(by_owner, numel, most)]

    def updates(self, gradients: Gradients, update: Update) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, this rank's elements of the update), for each parameter with a gradient.

        Collective over the axis. All its ranks have a gradient of the same parameters.

        Args:
            gradients: name -> this rank's elements of the gradient, in any shape, or None.
            update: gradients of parameters that this rank owns -> updates of the same shape. Called
                for each bucket, on all ranks, in one order.
        """
        coming = [self._send_gradients(bucket, gradients) for bucket in self.buckets[:1]]
        returning: list[tuple[Bucket, Mapping[str, Tensor], Pending]] = []
        for bucket, following in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            if following is not None:
                coming.append(self._send_gradients(following, gradients))
            own_updates = update(self._assemble(bucket, gradients, coming.pop(0).wait()))
            returning.append((bucket, own_updates, self._send_updates(bucket, own_updates)))
            if len(returning) > 1:
                yield from self._receive_updates(gradients, *returning.pop(0))
        for left in returning:
            yield from self._receive_updates(gradients, *left)

    def sent_elements(self) -> int:
        """The elements that this rank sends in a step, in direct messages."""
        gradients = sum(bucket.gradient_row for bucket in self.buckets)
        updates = sum(bucket.update_row for bucket in self.buckets)
        return (len(self.gather_index) - 1) * gradients + (self.size - 1) * updates

    def _send_gradients(self, bucket: Bucket, gradients: Gradients) -> Pending:
        """dW[D_X, F] -> dW[D, F] on the owner."""
        rows = self._rows(self.gather_axis, bucket.gradient_row)
        ends = [0] * len(rows)
        for name in bucket.names:
            route, gradient = self.routes[name], gradients[name]
            if self.index in route.senders and route.owner != self.index:
                owner = self.gather_index[route.owner]
                elements = _next(rows, ends, owner, route.numel(self.index))
                if gradient is not None:  # if it is None, it is None on the owner too
                    elements.copy_(gradient.reshape(-1))
        return _all_to_all("gradients of matrices", rows, self.gather_axis)

    def _assemble(self, bucket: Bucket, gradients: Gradients, rows: Tensor) -> dict[str, Tensor]:
        """The gradients that this rank owns."""
        whole, ends = {}, [0] * len(rows)
        for name in bucket.names:
            route, gradient = self.routes[name], gradients[name]
            if route.owner != self.index:
                continue
            gathered = torch.empty(route.shape, dtype=self.dtype, device=rows.device)
            for sender in route.senders:
                if sender != self.index:
                    row = self.gather_index[sender]
                    elements = _next(rows, ends, row, route.numel(sender))
                    copy_boxes(gathered, route.parts[sender], elements)
                elif gradient is not None:
                    copy_boxes(gathered, route.parts[sender], gradient.reshape(-1))
            if gradient is not None:
                whole[name] = gathered
        return whole

    def _send_updates(self, bucket: Bucket, own_updates: Mapping[str, Tensor]) -> Pending:
        """update[D, F] on the owner -> update[D_X, F]."""
        rows = self._rows(self.axis, bucket.update_row)
        ends = [0] * len(rows)
        for name in bucket.names:
            route = self.routes[name]
            for receiver in range(self.size) if route.owner == self.index else ():
                if receiver != self.index:
                    elements = _next(rows, ends, receiver, route.numel(receiver))
                    if name in own_updates:
                        elements.copy_(elements_of(own_updates[name], route.parts[receiver]))
        return _all_to_all("updates of matrices", rows, self.axis)

    def _receive_updates(
        self, gradients: Gradients, bucket: Bucket, own_updates: Mapping[str, Tensor],
        pending: Pending,
    ) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        rows = pending.wait()
        ends = [0] * len(rows)
        for name in bucket.names:
            route = self.routes[name]
            if route.owner == self.index:
                if name in own_updates:
                    yield name, elements_of(own_updates[name], route.parts[self.index])
            else:
                elements = _next(rows, ends, route.owner, route.numel(self.index))
                if gradients[name] is not None:
                    yield name, elements

    # --- messages ---------------------------------------------------------------------------------

    def _bucket(self, names: Sequence[str]) -> Bucket:
        """A bucket with the lengths of its longest rows, the same on every rank of the axis."""
        gradients, updates = ([[0] * self.size for _ in range(self.size)] for _ in range(2))
        for route in (self.routes[name] for name in names):
            for position in range(self.size):
                if position != route.owner:
                    is_sender = position in route.senders
                    gradients[position][route.owner] += route.numel(position) if is_sender else 0
                    updates[route.owner][position] += route.numel(position)
        return Bucket(names, *(max(max(row) for row in rows) for rows in (gradients, updates)))

    def _rows(self, axis: Axis | None, length: int) -> Tensor:
        """A row for each rank of an axis; no rows if they would be empty."""
        size, device = (axis.size, axis.device) if axis else (1, torch.device("cpu"))
        return torch.zeros(size if length else 0, length, dtype=self.dtype, device=device)


def _all_to_all(what: str, rows: Tensor, axis: Axis | None) -> Pending:
    """Send row j to the rank at position j. Nothing is sent if there are no rows."""
    if axis is None or not len(rows):
        return Pending(rows)
    with axis.comm.label("optimizer", what):
        return ops.all_to_all_into(torch.zeros_like(rows), rows, axis)


def balance(costs: Mapping[str, int], size: int) -> dict[str, int]:
    """Returns name -> owner, the most expensive first: each goes to the owner with the least load.

    >>> balance({"a": 1, "b": 5, "c": 3, "d": 2}, 2)
    {'b': 0, 'c': 1, 'd': 1, 'a': 0}
    """
    loads, owners = [0] * size, {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable, so equal on every rank
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def fill_buckets(
    by_owner: Sequence[Sequence[str]], numel: Mapping[str, int], most: int
) -> list[list[str]]:
    """Fill buckets with one parameter of each owner in turn, so that rows are about equally long.

    >>> fill_buckets([["a", "d"], ["b"], ["c"]], {"a": 4, "b": 4, "c": 4, "d": 4}, 12)
    [['a', 'b', 'c'], ['d']]
    """
    buckets: list[list[str]] = []
    total = 0
    for turn in range(max(map(len, by_owner))):
        names = [own[turn] for own in by_owner if turn < len(own)]
        length = sum(numel[name] for name in names)
        if not buckets or total + length > most:
            buckets.append([])
            total = 0
        buckets[-1] += names
        total += length
    return buckets


def _route(
    layout: Layout, owner: int, changing: set[str], sizes: Sizes, everyone: Sequence[Coordinates]
) -> Route:
    """Args: changing: the axes of the mesh along which the ranks of this axis differ."""
    fixed = tuple((axis, how) for axis, how in layout.splits if axis not in changing)
    gathered = replace(layout, splits=fixed)
    shape = tuple(shard_shape(gathered, sizes, everyone[0]))
    around = boxes(gathered, sizes, everyone[0])
    parts = [
        [relative(box, around[0]) for box in boxes(layout, sizes, place)] for place in everyone
    ]
    # The owner's replica: ranks that differ from it only along axes that split the tensor.
    splitting = {axis for axis, _ in layout.splits}
    replica = [
        i
        for i, place in enumerate(everyone)
        if all(place[name] == everyone[owner][name] for name in changing - splitting)
    ]
    senders: list[int] = []
    for position in sorted(replica, key=lambda i: i != owner):
        if parts[position] and all(parts[position] != parts[other] for other in senders):
            senders.append(position)
    return Route(owner, shape, parts, sorted(senders))


def _next(rows: Tensor, ends: list[int], row: int, count: int) -> Tensor:
    """The next `count` elements of a row; `ends` holds the number of those already taken."""
    ends[row] += count
    return rows[row, ends[row] - count : ends[row]]
