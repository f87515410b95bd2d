"""The mesh: its arithmetic without processes, and its groups on real ranks."""

import copy
import gc
import os
import socket
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from processes import listening

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.groups import disconnect, environment_store
from dist_lab.mesh.mesh import init_mesh
from dist_lab.mesh.topology import ORDER, line_through, lines
from dist_lab.torch_private import group_timeout


def test_a_single_process_is_a_mesh_of_size_one_on_every_axis():
    mesh = init_mesh()
    assert [mesh[name].size for name in ORDER] == [1, 1, 1, 1, 1]
    assert all(mesh[name].group is None and mesh[name].index == 0 for name in ORDER)
    assert mesh.data.size == 1


def test_every_rank_is_on_exactly_one_line_of_each_axis():
    axes = {"pp": 2, "dp": 3, "tp": 2}
    for along in (["pp"], ["dp"], ["tp"], ["pp", "tp"], ["dp", "tp"]):
        all_lines = lines(axes, along)
        assert sorted(rank for line in all_lines for rank in line) == list(range(12))
        assert all(line_through(rank, axes, along) == line for line in all_lines for rank in line)


def test_adjacent_positions_on_tp_are_adjacent_ranks():
    assert lines({"pp": 2, "dp": 2, "tp": 2}, ["tp"]) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert lines({"pp": 2, "dp": 2, "tp": 2}, ["pp"]) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_an_unknown_axis_is_refused_and_the_axes_are_listed():
    with pytest.raises(UserError, match="no mesh axis 'ddp'; the axes are pp, dp, fsdp, cp, tp"):
        init_mesh(ddp=1)


def test_a_mesh_of_the_wrong_size_names_the_torchrun_command():
    with pytest.raises(UserError, match=r"dp=3 needs 3 processes, 1 were started: torchrun --np"):
        init_mesh(dp=3)


@pytest.mark.ranks(4, mesh={"dp": 2, "tp": 2})
def test_axes_are_ordered_outer_to_inner_whatever_order_they_are_given_in(mesh):
    assert mesh["tp"].ranks == ((0, 1), (2, 3))[mesh.rank // 2]
    assert mesh["dp"].ranks == ((0, 2), (1, 3))[mesh.rank % 2]
    again = init_mesh(tp=2, dp=2)
    assert again["tp"].ranks == mesh["tp"].ranks


@pytest.mark.ranks(4)
def test_every_group_has_the_configured_timeout(mesh):
    # DeviceMesh gives sub-groups a timeout of 30 minutes, whatever the world group has.
    mesh = init_mesh(timeout=17, dp=2, tp=2)
    axes = [mesh["dp"], mesh["tp"], mesh.flatten("dp", "tp"), mesh.sub("tp", [1, 0])]
    assert [group_timeout(axis.group) for axis in axes] == [17.0] * 4


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_flatten_is_one_axis_over_all_positions(mesh):
    flat = mesh.flatten("fsdp", "dp")
    assert (flat.size, flat.index, flat.ranks) == (4, mesh.rank, (0, 1, 2, 3))
    assert mesh.data is flat
    assert ops.all_reduce(torch.tensor(1.0), flat) == 4
    assert mesh.flatten("dp", "tp") is mesh["dp"]


@pytest.mark.ranks(4)
def test_sub_makes_an_axis_of_some_positions(mesh):
    ends = mesh.sub("dp", [0, 3])
    assert (ends is None) == (mesh.rank in (1, 2))
    if ends is not None:
        assert ops.all_gather(torch.tensor([mesh.rank]), ends).tolist() == [0, 3]
    assert mesh.sub("dp", [3, 0]) is ends, "a second call made another group"
    pair = mesh.sub("dp", [0, 1])
    if pair is not None:
        assert ops.all_reduce(torch.tensor(1), pair) == 2
    with pytest.raises(UserError, match="positions must be distinct and below 4"):
        mesh.sub("dp", [0, 4])


def test_each_restart_of_torchrun_uses_its_own_prefix_in_the_store(monkeypatch):
    # The addresses of dead ranks stay in the store; new ranks that read them never connect.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    store = environment_store(0, 1, timeout=20)
    store.set("address", "here")
    assert store.underlying_store.get("attempt-3/address") == b"here"


@pytest.mark.ranks(2)
def test_groups_under_torchrun_use_loopback_and_leave_the_environment_unchanged(mesh):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = torch.tensor(probe.getsockname()[1] if mesh.rank == 0 else 0)
    port = int(ops.all_reduce(port, mesh["dp"]))
    disconnect()
    torchrun = {"RANK": mesh.rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        for name, value in torchrun.items():
            patch.setenv(name, str(value))
        before, listened = dict(os.environ), set(listening(os.getpid()))
        channel = init_mesh(dp=2).channel("dp")
        assert ops.all_reduce(torch.tensor(1), channel) == 2
        assert os.environ == before
    new = set(listening(os.getpid())) - listened
    gloo = {address for address in new if int(address.split(":")[1], 16) != port}
    assert {address.split(":")[0] for address in gloo} == {"0100007F"}


@pytest.mark.ranks(2)
def test_destroying_the_process_group_frees_all_groups_even_if_an_axis_is_kept(mesh):
    axes = [mesh["dp"], mesh.channel("dp"), copy.copy(mesh)["dp"]]
    groups = [weakref.ref(axis.group) for axis in axes]
    dist.destroy_process_group()
    gc.collect()
    assert all(group() is None for group in groups)
    with pytest.raises(UserError, match="group of axis dp has been destroyed; make a new mesh"):
        ops.all_reduce(torch.tensor(1.0), axes[1])


@pytest.mark.slow
def test_the_module_that_would_hold_the_world_group_is_imported_before_any_group():
    # If only mesh.py imports it, ranks under torchrun have joined already and abort at exit.
    code = (
        "import sys, dist_lab.mesh.groups;"
        "sys.exit('torch.distributed.nn.functional' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
