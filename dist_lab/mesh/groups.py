"""Joining and leaving the process group, and making further groups.

Ranks find each other through a store: a file if we started them, else torchrun's store. This file
handles torchrun's environment variables and the network interface.

[Note: group lifetime] If a gloo group is still alive when the interpreter exits, its threads are
running, and the process aborts after all its work is done. torch.distributed holds all groups until
destroy_process_group. We hold only weak references, so groups are freed then, even if a mesh lives
on. But if torch.distributed.nn.functional is first imported after the world group exists, its
functions hold that group as the default of an argument. Any optimizer imports that module. So we
import it here, before any group is made.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: see [Note: group lifetime]
from torch.distributed import (  # type: ignore[attr-defined]
    FileStore,
    PrefixStore,
    Store,
    rendezvous,
)

from dist_lab.errors import MachineError


def connect(store: Store, rank: int, size: int, *, timeout: float, backend: str = "gloo") -> None:
    """Join the process group of the ranks that use `store`.

    Raises:
        MachineError: there is no GPU for nccl, or the transport cannot be set up.
    """
    if backend == "nccl":
        if not torch.cuda.is_available():
            raise MachineError('backend nccl needs a GPU and torch sees none; use backend="gloo"')
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    elif isinstance(store, FileStore):
        # We started this process as a rank. We keep this set, for groups that libraries make.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
    with _over_loopback():
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )


def new_group(
    ranks: Sequence[int], timeout: float, *, only_this_rank: bool = False
) -> dist.ProcessGroup:
    """Make a group of these ranks. Collective over the world, unless `only_this_rank`."""
    limit = timedelta(seconds=timeout)
    with _over_loopback():
        return dist.new_group(list(ranks), timeout=limit, use_local_synchronization=only_this_rank)


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def file_store(path: str, size: int) -> Store:
    """A store in a file. It needs no port, so no port can clash and nothing listens."""
    return FileStore(path, size)


def environment_store(rank: int, size: int, timeout: float) -> Store:
    """torchrun's store, with a different prefix for each restart.

    After a rank dies, torchrun restarts all ranks with the same store, which still has the old
    addresses. Without the prefix the new ranks would try to connect to them.
    """
    limit = timedelta(seconds=timeout)
    store, _, _ = next(rendezvous("env://", rank=rank, world_size=size, timeout=limit))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt-{attempt}", store)


def store_of_all_attempts(store: Store) -> Store:
    """The store behind that of `environment_store`. It keeps what an earlier attempt has set."""
    assert isinstance(store, PrefixStore), store
    return PrefixStore("all attempts", store.underlying_store)


def as_under_torchrun(rank: int, size: int) -> AbstractContextManager[None]:
    """Set torchrun's environment variables inside the block, for libraries that read them.

    They are unset if the ranks were not started by torchrun.
    """
    return _set_if_unset({
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",  # not used: the process group exists already
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    })  # fmt: skip


def default_backend() -> str:
    """nccl if every process of this machine can have its own GPU, else gloo."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "nccl" if dist.is_nccl_available() and torch.cuda.device_count() >= local else "gloo"


def loopback() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _over_loopback() -> AbstractContextManager[None]:
    """Groups made inside the block use loopback, if torchrun runs all ranks on one machine.

    Otherwise gloo resolves the host name, which may give a public address, or one that cannot be
    reached. gloo reads the environment each time a group is made.
    """
    ranks = os.environ.get("WORLD_SIZE")
    one_machine = ranks is not None and os.environ.get("LOCAL_WORLD_SIZE") == ranks
    return _set_if_unset({"GLOO_SOCKET_IFNAME": loopback()} if one_machine else {})


@contextmanager
def _set_if_unset(variables: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables inside the block, except those that are set already."""
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]
