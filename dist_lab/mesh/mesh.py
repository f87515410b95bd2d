"""The mesh: named axes of ranks, each with its process group.

topology.py computes each rank's coordinates. Only this file and groups.py know the backend and the
process groups; all other code is given an `Axis`.
"""

import atexit
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from dist_lab.comm.board.join import join
from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.mesh.groups import (
    connect,
    default_backend,
    disconnect,
    environment_store,
    new_group,
)
from dist_lab.mesh.topology import DATA_AXES, ORDER, coordinates, line_through, lines
from dist_lab.torch_private import group_timeout, register_fake_backend


@dataclass(frozen=True)
class Axis:
    """This rank's line of ranks along one named axis of the mesh.

    `ranks` are the members' global ranks; this rank is `ranks[index]`. An axis of size 1 has no
    group, and every collective over it is the identity. torch.distributed owns the group until
    destroy_process_group: see [Note: group lifetime] in groups.py.

    All ranks of an axis must launch its collectives in one order. Some collectives come in between
    at different times on each rank, such as reductions of gradients when they are ready. They use
    another `channel`: the same ranks with another process group. The default channel is 0.

    If `pairwise` is set, every sum along the axis is added in the order of by_hand/pairwise.py.
    """

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    comm: CommContext
    weak_group: "weakref.ref[dist.ProcessGroup] | None" = field(compare=False, repr=False)
    channel: int = 0
    pairwise: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def device(self) -> torch.device:
        """The device on which tensors must be for a collective."""
        return self.comm.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group. Raises UserError if it has been destroyed."""
        group = None if self.weak_group is None else self.weak_group()
        if self.weak_group is not None and group is None:
            raise UserError(
                f"the process group of axis {self.name} has been destroyed; make a new mesh: "
                "init_mesh(...)"
            )
        return group

    def group_even_of_one(self) -> dist.ProcessGroup:
        """The process group, even for one rank: some libraries require a group."""
        return self.group or new_group(
            [self.ranks[self.index]], self.comm.timeout, only_this_rank=True
        )


class Mesh:
    """All axes of this rank. `mesh["tp"]` is an Axis; an axis that is not given has size 1.

    Attributes:
        rank, size: this process and the number of processes.
        axes: name -> size, in `ORDER`.
        coordinates: name -> this rank's position along that axis.
        device: the device on which this rank computes.
        timeout: seconds that a collective may take.
        comm: the ledger and all other state that the axes share.
    """

    def __init__(self, axes: Mapping[str, int], comm: CommContext, timeout: float) -> None:
        self.axes = {name: axes[name] for name in ORDER if name in axes}
        self.comm, self.timeout = comm, timeout
        comm.timeout = timeout
        self.rank, self.size = comm.rank, comm.size
        self.coordinates = coordinates(self.rank, self.axes)
        comm.place = ",".join(f"{axis}={i}" for axis, i in self.coordinates.items())
        self.device = comm.device
        self._subs: dict[str, Axis | None] = {}
        self._channels = 0
        self._device_mesh: weakref.ref[DeviceMesh] | None = None
        self._axes = {name: self._along((name,)) for name in ORDER}

    def __getitem__(self, name: str) -> Axis:
        if name not in ORDER:
            raise KeyError(f"no axis {name!r}; a mesh has {', '.join(ORDER)}")
        return self._axes[name]

    def flatten(self, *names: str) -> Axis:
        """One axis over all positions of several axes: `flatten("dp", "fsdp")`.

        Collective: every rank of the mesh calls it.
        """
        longer = [name for name in ORDER if name in names and self[name].size > 1]
        if len(longer) < 2:
            return self[longer[0] if longer else names[0]]
        name = "_".join(longer)
        if name not in self._axes:
            self._axes[name] = self._along(longer)
        return self._axes[name]

    def sub(self, name: str, indices: Sequence[int]) -> Axis | None:
        """A new axis of the positions `indices` of an axis; None on ranks at other positions.

        Collective: every rank of the mesh calls it. `sub("pp", [0, 3])` joins the first and last
        stage, as a tied embedding needs.
        """
        indices = sorted(indices)
        key = f"{name}[{','.join(map(str, indices))}]"
        bad = [i for i in indices if not 0 <= i < self[name].size]
        if bad or len(set(indices)) != len(indices):
            raise UserError(f"{key}: positions must be distinct and below {self[name].size}")
        if key not in self._subs:
            ranks = tuple(self[name].ranks[i] for i in indices)
            group = self._new_group((name,), indices)
            self._subs[key] = self._axis(key, ranks, group) if self.rank in ranks else None
        return self._subs[key]

    def neighbours(self, name: str, count: int) -> Axis:
        """The block of `count` adjacent positions that this rank is in. Collective."""
        return self._one_of(name, [range(i, i + count) for i in range(0, self[name].size, count)])

    def strided(self, name: str, step: int) -> Axis:
        """Every `step`-th position of an axis, including this rank's. Collective."""
        return self._one_of(name, [range(i, self[name].size, step) for i in range(step)])

    def _one_of(self, name: str, groups: Sequence[Sequence[int]]) -> Axis:
        """Makes a sub-axis of each group of positions. Returns the one that this rank is on."""
        (axis,) = filter(None, [self.sub(name, indices) for indices in groups])
        return axis

    def channel(self, *names: str) -> Axis:
        """`flatten(*names)` with its own process group, a new one at each call: see `Axis`.

        Collective: every rank of the mesh calls it.
        """
        axis, along = self.flatten(*names), [name for name in ORDER if name in names]
        self._channels += 1
        group = self._new_group(along, range(axis.size))
        return self._axis(axis.name, axis.ranks, group, channel=self._channels)

    def device_mesh(self) -> DeviceMesh:
        """All axes as torch's DeviceMesh, with process groups of its own. Collective.

        Two strategies of a library must be given parts of one DeviceMesh, so it is the same object
        as long as anyone holds it.
        """
        found = None if self._device_mesh is None else self._device_mesh()
        if found is None:
            groups = [self.channel(name).group_even_of_one() for name in ORDER]
            ranks = torch.arange(self.size).view([self[name].size for name in ORDER])
            found = DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=ORDER)
            self._device_mesh = weakref.ref(found)
        return found

    @property
    def world(self) -> Axis:
        """All ranks of the mesh."""
        return self.flatten(*ORDER)

    @property
    def data(self) -> Axis:
        """The axis along which ranks have different rows of the batch: dp and fsdp together."""
        return self.flatten(*DATA_AXES)

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes.items())

    def _along(self, names: Sequence[str]) -> Axis:
        """One axis over all positions of these axes. The axis of all ranks uses the world group."""
        ranks = line_through(self.rank, self.axes, names)
        spans_world = len(ranks) == self.size > 1
        group = dist.group.WORLD if spans_world else self._new_group(names, range(len(ranks)))
        if spans_world and dist.get_backend() != "fake":
            assert group is not None
            group.set_timeout(timedelta(seconds=self.timeout))
        return self._axis("_".join(names), ranks, group)

    def _new_group(self, names: Sequence[str], indices: Sequence[int]) -> dist.ProcessGroup | None:
        """Makes a group of these positions on every line along the axes. Returns this rank's."""
        if len(indices) < 2:
            return None
        own_group = None
        # new_group is collective over the world: all ranks make all groups, in the same order.
        for line in lines(self.axes, names):
            ranks = [line[i] for i in indices]
            if self.comm.dry_run and self.rank not in ranks:
                continue  # the other ranks do not exist
            group = new_group(ranks, self.timeout)
            own_group = group if self.rank in ranks else own_group
        return own_group

    def _axis(
        self, name: str, ranks: tuple[int, ...], group: dist.ProcessGroup | None, channel: int = 0
    ) -> Axis:
        assert group is None or dist.get_process_group_ranks(group) == list(ranks), (name, ranks)
        weak = None if group is None else weakref.ref(group)
        return Axis(name, len(ranks), ranks.index(self.rank), ranks, self.comm, weak, channel)


def init_mesh(
    *,
    timeout: float | None = None,
    backend: str | None = None,
    check: bool = False,
    collectives: str = "auto",
    **axes: int,
) -> Mesh:
    """Arrange the processes of this run in a mesh: `init_mesh(dp=2, tp=2)`.

    Uses the process group if it is initialized, else joins torchrun's, else makes a mesh of this
    one process. Without axes all processes are along `dp`.

    Args:
        timeout: seconds for every collective; default: the process group's timeout, else 60. An
            axis of all ranks uses the world group and sets the timeout there.
        backend: gloo (CPU) or nccl (GPU); default: nccl if each process has a GPU, else gloo.
        check, collectives: see `CommContext`.

    Raises:
        UserError: an unknown axis, or the product of the sizes is not the number of processes.
    """
    unknown = [name for name in axes if name not in ORDER]
    if unknown:
        raise UserError(f"no mesh axis {unknown[0]!r}; the axes are {', '.join(ORDER)}")
    if not dist.is_initialized() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        seconds = 60.0 if timeout is None else timeout
        store = environment_store(rank, size, seconds)
        connect(store, rank, size, timeout=seconds, backend=backend or default_backend())
        atexit.register(disconnect)
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        backend = backend or str(dist.get_backend())
        world = dist.group.WORLD
        assert world is not None
        timeout = group_timeout(world) if timeout is None else timeout
    else:
        rank, size, backend = 0, 1, backend or "gloo"
        timeout = 60.0 if timeout is None else timeout
    axes = axes or {"dp": size}
    needed = math.prod(axes.values())
    if needed != size or min(axes.values()) < 1:
        text = " x ".join(f"{name}={n}" for name, n in axes.items())
        raise UserError(
            f"mesh {text} needs {needed} processes, {size} were started: "
            f"torchrun --nproc_per_node={max(needed, 1)} ..."
        )
    comm = CommContext(rank, size, backend=backend, check=check, collectives=collectives)
    mesh = Mesh(axes, comm, timeout)
    comm.board = join(rank, size, comm.device, check=check, place=comm.place, mesh=str(mesh))
    comm.begin(comm.step, comm.phase)  # the first words on the board
    return mesh


@contextmanager
def dry_run(
    axes: Mapping[str, int], rank: int = 0, *, backend: str = "gloo", collectives: str = "auto"
) -> Iterator[Mesh]:
    """One rank of a mesh without its other ranks: a dry run shows what a step would send.

    All code runs as on a real mesh, with torch's fake process group, which sends nothing and
    returns at once. Numbers that depend on other ranks are wrong; the ledger is right. So a machine
    without a GPU can show the step of nccl, too, on its CPU.
    """
    register_fake_backend()
    size = math.prod(axes.values())
    dist.init_process_group("fake", store=HashStore(), rank=rank, world_size=size)
    try:
        comm = CommContext(rank, size, backend=backend, collectives=collectives)
        comm.dry_run = True
        if not torch.cuda.is_available():
            comm.device = torch.device("cpu")
        yield Mesh(axes, comm, timeout=60.0)
    finally:
        dist.destroy_process_group()
