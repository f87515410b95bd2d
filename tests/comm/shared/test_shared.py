"""Sums in shared memory: right, counted, and replaced by messages if ranks cannot share memory."""

import gc
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from dist_lab.comm import ops
from dist_lab.comm.shared import memory
from dist_lab.comm.shared.collectives import BLOCK
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe import sockets

needs_linux = pytest.mark.skipif(not memory.FOLDER.is_dir(), reason="Linux alone has /dev/shm")
pytestmark = needs_linux


def filled(length, dtype, axis, seed=0):
    """Returns a shared buffer with this rank's numbers, and the expected sum over ranks."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(axis.size, length, generator=generator, dtype=dtype)
    buffer = ops.shared_buffer(length, dtype, axis)
    buffer.copy_(rows[axis.index])
    return buffer, rows.sum(0)


@pytest.mark.slow_unless(
    lambda world, length, dtype: (world == 3) == (length <= 7) == (dtype is torch.float32)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 7, BLOCK * 9 + 5])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.ranks(4)
def test_every_rank_gets_the_sum_and_the_same_bits(world, length, dtype, mesh):
    axis = mesh.sub("dp", range(world))
    if axis is None:
        return
    buffer, wanted = filled(length, dtype, axis)
    with mesh.comm.ledger.recording() as calls:
        result = ops.all_reduce_into(buffer, axis).wait()
    assert result is buffer
    torch.testing.assert_close(buffer, wanted)
    rows = ops.all_gather(buffer[None], axis)
    assert (rows == rows[0]).all()
    [call] = calls
    assert (call.algorithm, call.payload) == ("shared", buffer.nbytes)
    assert call.sent == call.due
    total = int(ops.all_reduce(torch.tensor(call.sent), axis))
    assert total == 2 * (world - 1) * buffer.nbytes  # N ranks x 2 (N-1)/N S


@pytest.mark.ranks(2)
def test_the_calls_that_set_up_shared_memory_are_counted_and_not_logged(mesh):
    lines = []
    mesh.comm.log(lines.append)
    with mesh.comm.ledger.recording() as calls:
        ops.shared_buffer(10, torch.float32, mesh["dp"])
        lines_of_set_up = [line for line in lines if line.startswith("rank")]
        ops.all_reduce(torch.ones(2), mesh["dp"])
    assert [call.op for call in calls] == 4 * ["all_gather"] + ["all_reduce"]
    assert lines_of_set_up == []
    assert len([line for line in lines if line.startswith("rank")]) == 1


@pytest.mark.ranks(3)
def test_several_sums_may_be_in_flight_and_buffers_are_reused(mesh):
    axis = mesh["dp"]
    pairs = [filled(100 + i, torch.float64, axis, seed=i) for i in range(4)]
    for _ in range(3):
        before = [buffer.clone() for buffer, _ in pairs]
        pending = [ops.all_reduce_into(buffer, axis) for buffer, _ in pairs]
        for work in pending:
            work.wait()
        for (buffer, _), addend in zip(pairs, before, strict=True):
            torch.testing.assert_close(buffer, ops.all_reduce(addend, axis))


@pytest.mark.ranks(2)
def test_a_shared_sum_sends_almost_nothing_over_the_network(mesh):
    buffer, _ = filled(1 << 20, torch.float32, mesh["dp"])
    ops.all_reduce_into(buffer, mesh["dp"]).wait()
    before = sockets.sent_bytes()
    ops.all_reduce_into(buffer, mesh["dp"]).wait()
    assert sockets.sent_bytes() - before < 10_000 < buffer.nbytes


@pytest.mark.ranks(2)
def test_all_ranks_use_ordinary_memory_if_one_has_no_room(mesh):
    def full(file, start, length):
        raise OSError(28, os.strerror(28))

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(os, "posix_fallocate", full)
        buffer, wanted = filled(1000, torch.float32, mesh["dp"])
    with mesh.comm.ledger.recording() as calls:
        ops.all_reduce_into(buffer, mesh["dp"]).wait()
    assert [call.algorithm for call in calls] == ["backend"]
    torch.testing.assert_close(buffer, wanted)


@pytest.mark.ranks(2)
def test_ranks_on_two_machines_use_ordinary_memory(mesh):
    real = memory.attach  # as on two machines: a rank can open only its own file
    own = f"{os.getpid():010} "
    mesh.comm.files = memory.SharedFiles(
        attach=lambda p, n, d: real(p, n, d) if p[:11] == own else None
    )
    buffer, wanted = filled(1000, torch.float32, mesh["dp"])
    with mesh.comm.ledger.recording() as calls:
        ops.all_reduce_into(buffer, mesh["dp"]).wait()
    assert [call.algorithm for call in calls] == ["backend"]
    torch.testing.assert_close(buffer, wanted)


@pytest.mark.parametrize("setting", ["backend", "ring", "direct", "tree"])
@pytest.mark.ranks(2)
def test_a_mesh_with_another_collectives_setting_does_not_use_shared_memory(setting, mesh):
    mesh = init_mesh(dp=2, collectives=setting)
    buffer, wanted = filled(1000, torch.float32, mesh["dp"])
    with mesh.comm.ledger.recording() as calls:
        ops.all_reduce_into(buffer, mesh["dp"]).wait()
    assert [call.algorithm for call in calls] == [setting]
    torch.testing.assert_close(buffer, wanted)


@pytest.mark.ranks(2)
def test_bfloat16_sums_and_maxima_use_messages(mesh):
    axis = mesh["dp"]
    narrow = ops.shared_buffer(10, torch.bfloat16, axis)
    buffer, _ = filled(10, torch.float32, axis)
    highest = ops.all_reduce(buffer.clone(), axis, "max")
    with mesh.comm.ledger.recording() as calls:
        ops.all_reduce_into(narrow, axis).wait()
        ops.all_reduce_into(buffer, axis, "max").wait()
    assert [call.algorithm for call in calls] == ["backend", "backend"]
    assert torch.equal(buffer, highest)


def own_maps() -> set[str]:
    """Returns the names that the kernel gives to the shared files that this process maps."""
    return set(re.findall(r"/dev/shm/\S+ \(deleted\)", Path("/proc/self/maps").read_text()))


@pytest.mark.ranks(2)
def test_a_dropped_buffer_leaves_no_mapping(mesh):
    before, mapped = len(mesh.comm.shared), own_maps()
    buffer, _ = filled(1000, torch.float32, mesh["dp"])
    assert len(mesh.comm.shared) == before + 1
    assert len(own_maps() - mapped) == 2, "of both ranks"
    del buffer
    gc.collect()
    assert len(mesh.comm.shared) == before
    assert own_maps() <= mapped, "memory is still mapped"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child uses no thread
def test_a_process_that_is_killed_while_others_attach_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with memory.created(1000, torch.float32) as place:
                os.write(writing, place.encode())
                signal.pause()
        finally:
            os._exit(1)
    place = os.read(reading, 100).decode()
    attached = memory.attach(place, 1000, torch.float32)
    assert attached.process == child
    assert memory.attach(place[:-1] + "x", 1000, torch.float32) is None, "another file"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert list(tmp_path.iterdir()) == []
    attached.data[:] = 1.0  # the memory is there as long as someone maps it
    assert attached.data.sum() == 1000


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_rank_that_does_not_call_is_an_error_that_names_the_call(mesh):
    mesh = init_mesh(dp=2, timeout=1.0)
    buffer, _ = filled(1000, torch.float32, mesh["dp"])
    if mesh.rank == 0:
        began = time.monotonic()
        with pytest.raises(ops.CollectiveError, match=r"rank 0/2 .*all_reduce .*test_shared.py"):
            ops.all_reduce_into(buffer, mesh["dp"]).wait()
        assert time.monotonic() - began < 10
    else:
        time.sleep(2.5)
