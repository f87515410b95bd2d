"""Owner mode: each matrix is updated on one rank, its owner, which has all of its gradient.

    dW[D_X, F] -> dW[D, F] on the owner          gradients: one all-to-all per bucket
    update[D, F] on the owner -> update[D_X, F]  updates: another one; in ddp each rank gets it all

An optimizer that multiplies matrices cannot work on shards. If every rank gathered every matrix,
all ranks would do the same work. So each matrix has an owner. The owners' loads are balanced by
cost: largest first, to the rank with the least so far (Graham 1969, "Bounds on multiprocessing
timing anomalies"). The owner also keeps the optimizer's state of the matrix.

With N ranks and P elements in matrices, a rank sends about P/N (N-1)/N elements of gradients where
they are sharded, none where they are replicated; and as much of updates, or P (N-1)/N if ranks need
whole ones. `sent_elements` is exact. While a rank computes the updates of a bucket, the gradients
of the next one and the updates of the one before are travelling.

Which elements a rank holds comes from the layouts alone: boxes of the tensor, for a shard of fsdp
and for a range of elements that zero cuts through a matrix. So no strategy is named here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_lab.comm import ops
from dist_lab.comm.calls import Pending
from dist_lab.layout.boxes import copy_boxes, elements_of, numel_of, relative
from dist_lab.layout.layout import Box, Coordinates, Layout, Sizes, boxes, shard_shape
from dist_lab.mesh.mesh import Axis
from dist_lab.mesh.topology import coordinates

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
class Incoming:
    """A message that is on its way, and the sizes of what each rank has put in it."""

    pending: Pending
    sizes: Sequence[Sequence[int]]

    def wait(self) -> list[Iterator[Tensor]]:
        """For each rank, its parts in the order in which it has put them in."""
        rows = self.pending.wait().split([sum(row) for row in self.sizes])
        return [iter(row.split(list(of))) for row, of in zip(rows, self.sizes, strict=True)]


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
        self.device = axis.device if axis else torch.device("cpu")
        most = BUCKET_BYTES // self.dtype.itemsize
        numel = {name: layout.shape.numel() for name, layout in layouts.items()}
        self.buckets = fill_buckets(by_owner, numel, most)

    def updates(self, gradients: Gradients, update: Update) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, this rank's elements of the update), for each parameter with a gradient.

        Collective over the axis. All its ranks have a gradient of the same parameters.

        Args:
            gradients: name -> this rank's elements of the gradient, in any shape, or None.
            update: gradients of parameters that this rank owns -> updates of the same shape. Called
                for each bucket, on all ranks, in one order.
        """
        coming = [self._send_gradients(bucket, gradients) for bucket in self.buckets[:1]]
        returning: list[tuple[Sequence[str], Incoming]] = []
        for names, following in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            if following is not None:
                coming.append(self._send_gradients(following, gradients))
            own_updates = update(self._assemble(names, gradients, coming.pop(0)))
            returning.append((names, self._send_updates(names, own_updates)))
            if len(returning) > 1:
                yield from self._receive_updates(gradients, *returning.pop(0))
        for left in returning:
            yield from self._receive_updates(gradients, *left)

    def sent_elements(self) -> int:
        """The elements that this rank sends to other ranks in a step."""
        total = 0
        for route in self.routes.values():
            if route.owner != self.index:
                total += route.numel(self.index) if self.index in route.senders else 0
            else:
                others = (i for i in range(self.size) if i != self.index)
                total += sum(route.numel(i) for i in others)
        return total

    def _send_gradients(self, names: Sequence[str], gradients: Gradients) -> Incoming:
        """dW[D_X, F] -> dW[D, F] on the owner."""
        parts: list[list[Tensor]] = [[] for _ in self.gather_index]
        sizes: list[list[int]] = [[] for _ in self.gather_index]
        for name in names:
            route, gradient = self.routes[name], gradients[name]
            if self.index in route.senders:
                if gradient is None:  # it is None on the owner too, which will skip the matrix
                    gradient = torch.zeros(
                        route.numel(self.index), dtype=self.dtype, device=self.device
                    )
                parts[self.gather_index[route.owner]].append(gradient.reshape(-1))
            for sender in route.senders if route.owner == self.index else ():
                sizes[self.gather_index[sender]].append(route.numel(sender))
        travels = any(s != self.routes[n].owner for n in names for s in self.routes[n].senders)
        axis = self.gather_axis if travels else None
        return self._all_to_all("gradients of matrices", parts, sizes, axis)

    def _assemble(
        self, names: Sequence[str], gradients: Gradients, incoming: Incoming
    ) -> dict[str, Tensor]:
        """The gradients that this rank owns."""
        parts, whole = incoming.wait(), {}
        for route, name in ((self.routes[name], name) for name in names):
            if route.owner == self.index:
                gathered: Tensor | None = None
                for sender in route.senders:
                    elements = next(parts[self.gather_index[sender]])
                    if gathered is None:
                        gathered = elements.new_empty(route.shape)
                    copy_boxes(gathered, route.parts[sender], elements)
                gradient = gradients[name]
                if gradient is not None:
                    whole[name] = gradient.new_empty(route.shape) if gathered is None else gathered
        return whole

    def _send_updates(self, names: Sequence[str], own_updates: Mapping[str, Tensor]) -> Incoming:
        """update[D, F] on the owner -> update[D_X, F]."""
        parts: list[list[Tensor]] = [[] for _ in range(self.size)]
        sizes: list[list[int]] = [[] for _ in range(self.size)]
        for route, name in ((self.routes[name], name) for name in names):
            sizes[route.owner].append(route.numel(self.index))
            for receiver in range(self.size) if route.owner == self.index else ():
                update = own_updates.get(name)
                if update is None:
                    update = torch.zeros(route.shape, dtype=self.dtype, device=self.device)
                parts[receiver].append(elements_of(update, route.parts[receiver]))
        return self._all_to_all("updates of matrices", parts, sizes, self.axis)

    def _receive_updates(
        self, gradients: Gradients, names: Sequence[str], incoming: Incoming
    ) -> Iterator[tuple[str, Tensor]]:
        parts = incoming.wait()
        for name in names:
            elements = next(parts[self.routes[name].owner])
            if gradients[name] is not None:
                yield name, elements

    def _all_to_all(
        self, what: str, parts: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]],
        axis: Axis | None,
    ) -> Incoming:  # fmt: skip
        """Send parts[j] to the rank at position j. Without an axis this rank's own stay here."""
        all_parts = [part for row in parts for part in row]
        x = torch.cat(all_parts or [torch.empty(0, dtype=self.dtype, device=self.device)])
        if axis is None or axis.size == 1:
            return Incoming(Pending(x), sizes)
        lengths = [sum(part.numel() for part in row) for row in parts]
        received = [sum(row) for row in sizes]
        out = torch.zeros(sum(received), dtype=self.dtype, device=axis.device)
        with axis.comm.label("optimizer", what):
            pending = ops.all_to_all_uneven_into(out, x, axis, received, lengths)
        return Incoming(pending, sizes)


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
