"""Many shards in one collective: right for all shapes and algorithms, and counted to the byte."""

import subprocess
import time

import pytest
import torch

from dist_lab.comm import ops
from dist_lab.comm.board import proc
from dist_lab.comm.coalesced import pack
from dist_lab.comm.ledger import formula_bytes
from dist_lab.comm.shared import memory as shared
from dist_lab.comm.shared.collectives import BLOCK
from dist_lab.mesh.mesh import dry_run, init_mesh
from dist_lab.observe.memory import LiveBytes
from dist_lab.processes.failures import distance_from_cause

needs_linux = pytest.mark.skipif(not shared.FOLDER.is_dir(), reason="Linux alone has /dev/shm")
SETTINGS = [pytest.param("auto", marks=needs_linux), "backend", "ring", "direct"]
F16, B16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LENGTHS = [5, 0, 1, BLOCK + 3, 7]


def numbers(seed, *shape, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(values, axis):
    """Returns a shared buffer with these values."""
    buffer = ops.shared_buffer(len(values), values.dtype, axis)
    buffer.copy_(values)
    return buffer


def gradients(rank, n, dtype):
    """Returns one rank's inputs for LENGTHS: short, empty, missing on some ranks, any strides."""
    full = numbers(rank, n * LENGTHS[3], dtype=dtype)
    return [
        numbers(10 + rank, 2, 2 * n, dtype=dtype).t(),  # 4 n of 5 n elements, and not contiguous
        None,
        None if rank == 1 else torch.full((1,), rank + 0.5, dtype=dtype),  # 1 of n
        full.view(n, -1),
        numbers(20 + rank, 7 * n - 8, dtype=dtype) if n > 1 else torch.zeros(0, dtype=dtype),
    ]


def wanted(n, index, dtype, summed):
    """Returns the expected shards: each tensor padded, summed in the order of ranks, and split."""
    shards = []
    for k, length in enumerate(LENGTHS):
        total = torch.zeros(n * length, dtype=summed)
        for rank in range(n):
            x = gradients(rank, n, dtype)[k]
            if x is not None:
                total[: x.numel()] += x.reshape(-1).to(summed)
        shards.append(total[index * length : (index + 1) * length])
    return torch.cat(shards)


# --- results --------------------------------------------------------------------------------------


@pytest.mark.slow_unless(lambda world: world == 3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.ranks(4)
def test_every_rank_gathers_the_exact_shards_of_all_ranks(world, setting, mesh):
    axis = init_mesh(dp=4, collectives=setting).sub("dp", range(world))
    for dtype in (F32, F64, B16, F16) if axis is not None else ():
        rows = [numbers(rank, sum(LENGTHS), dtype=dtype) for rank in range(world)]
        x = filled(rows[axis.index], axis)
        outs = [torch.empty(world, length, dtype=dtype) for length in LENGTHS]
        with axis.comm.ledger.recording() as calls:
            assert ops.all_gather_coalesced(outs, x, axis).wait() is x
        for k, out in enumerate(outs):
            assert torch.equal(out, torch.stack([row.split(LENGTHS)[k] for row in rows])), dtype
        assert [call.algorithm for call in calls] == ["shared" if setting == "auto" else setting]


@pytest.mark.slow_unless(lambda world, setting: world == 3 and setting in ("auto", "ring"))
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.ranks(4)
def test_each_rank_gets_its_shard_of_every_sum(world, setting, mesh):
    axis = init_mesh(dp=4, collectives=setting).sub("dp", range(world))
    cases = [(F32, F32, F32), (F64, F64, F64), (F32, F64, F32), (B16, F32, B16), (F16, F16, F32)]
    for dtype, summed, kept in cases if axis is not None else ():
        staging = ops.shared_buffer(world * sum(LENGTHS), summed, axis)
        staging.fill_(torch.nan)  # every element must be overwritten
        out = torch.full((sum(LENGTHS),), torch.nan, dtype=kept)
        xs = gradients(axis.index, world, dtype)
        with axis.comm.ledger.recording() as calls:
            pending = ops.reduce_scatter_coalesced(out, xs, LENGTHS, staging, axis)
            for x in xs:
                if x is not None:
                    x.fill_(torch.nan)  # its copy is in flight
            assert pending.wait() is out
        expected = wanted(world, axis.index, dtype, summed).to(kept)
        if calls[-1].algorithm == "shared":  # in the order of the ranks: the same bits
            assert torch.equal(out, expected), (dtype, summed, kept)
        else:
            lowest = F16 if summed == F16 else kept
            tolerance = {F16: 2e-2, B16: 1e-2, F32: 1e-5, F64: 1e-12}[lowest]
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        in_memory = setting == "auto" and summed in shared.SUMMED
        assert (calls[-1].algorithm == "shared") == in_memory


def test_on_one_process_both_are_copies():
    axis = init_mesh()["dp"]
    x, outs = numbers(0, 5), [torch.empty(1, 2), torch.empty(1, 0), torch.empty(1, 3)]
    assert ops.all_gather_coalesced(outs, x, axis).wait() is x
    assert torch.equal(torch.cat([out[0] for out in outs]), x)
    out, staging = torch.empty(6, dtype=B16), torch.empty(6)
    ops.reduce_scatter_coalesced(out, [x[:2], None, x[2:4]], [2, 1, 3], staging, axis).wait()
    assert torch.equal(out, torch.cat([x[:2], torch.zeros(1), x[2:4], torch.zeros(1)]).to(B16))
    ops.wait_for_readers(x, axis)


def test_an_input_longer_than_its_rows_is_refused():
    with pytest.raises(AssertionError, match=r"7 elements for \(3, 2\)"):
        pack(torch.empty(3, 2), [torch.ones(7)], [2])


@needs_linux
@pytest.mark.ranks(4)
def test_only_the_shared_buffer_itself_on_its_own_axis_is_read_in_place(mesh):
    mesh = init_mesh(dp=2, tp=2)
    x, out = filled(numbers(mesh.rank, 6), mesh["dp"]), torch.empty(2, 6)
    for source, axis, algorithm in [
        (x, mesh["dp"], "shared"),
        (x, mesh.channel("dp"), "shared"),
        (x[:], mesh["dp"], "direct"),
        (x, mesh["tp"], "direct"),
    ]:
        with mesh.comm.ledger.recording() as calls:
            ops.all_gather_coalesced([out], source, axis).wait()
        assert [call.algorithm for call in calls] == [algorithm]
        assert torch.equal(out, torch.stack([numbers(rank, 6) for rank in axis.ranks]))


@pytest.mark.parametrize("setting", SETTINGS[:2])
@pytest.mark.ranks(2)
def test_autograd_does_not_see_the_write_to_an_output(setting, mesh):
    axis = init_mesh(dp=2, collectives=setting)["dp"]
    leaf = torch.zeros(2, 3, requires_grad=True)
    loss = leaf.square().sum()  # saves the leaf for backward
    before = leaf._version
    ops.all_gather_coalesced([leaf], filled(torch.ones(3), axis), axis).wait()
    assert leaf._version == before
    loss.backward()
    assert leaf.grad.eq(2).all()


@pytest.mark.parametrize("setting", SETTINGS[:2])
@pytest.mark.ranks(2)
def test_an_output_can_be_freed_resized_and_filled_again(setting, mesh):
    axis = init_mesh(dp=2, collectives=setting)["dp"]
    x, out = filled(torch.full((3,), 1.0 + axis.index), axis), torch.empty(2, 3)
    for _ in range(2):
        ops.all_gather_coalesced([out], x, axis).wait()
        assert torch.equal(out, torch.tensor([[1.0] * 3, [2.0] * 3]))
        out.untyped_storage().resize_(0)
        out.untyped_storage().resize_(24)


# --- in flight, and repeated ----------------------------------------------------------------------


@pytest.mark.slow_unless(lambda setting: setting == "auto")
@pytest.mark.parametrize("setting", SETTINGS[:2])
@pytest.mark.ranks(3)
def test_several_calls_are_in_flight_at_once_and_staging_is_reused(setting, mesh):
    mesh = init_mesh(dp=3, collectives=setting)
    axis, channel, n = mesh["dp"], mesh.channel("dp"), 3
    xs = [filled(numbers(10 * axis.index + k, 8), axis) for k in range(2)]
    stagings = [ops.shared_buffer(n * 4, F32, channel) for _ in range(2)]
    for turn in range(20):
        if turn % 3 == axis.index:
            time.sleep(0.01)
        outs = [[torch.empty(n, 3), torch.empty(n, 5)] for _ in xs]
        sums = [torch.empty(4) for _ in stagings]
        gathers = [ops.all_gather_coalesced(o, x, axis) for o, x in zip(outs, xs, strict=True)]
        grads = [torch.full((n * 4,), float(turn + k + axis.index)) for k in range(2)]
        reduces = [
            ops.reduce_scatter_coalesced(out, [grad], [4], staging, channel)
            for out, grad, staging in zip(sums, grads, stagings, strict=True)
        ]
        for pending in (*gathers, *reduces):
            pending.wait()
        for k in range(2):
            rows = torch.stack([numbers(10 * rank + k, 8) + turn for rank in range(n)])
            assert torch.equal(torch.cat(outs[k], 1), rows)
            assert sums[k].eq(3 * (turn + k) + 3).all()
        for k, x in enumerate(xs):
            ops.wait_for_readers(x, axis)
            x.copy_(numbers(10 * axis.index + k, 8) + (turn + 1))


@needs_linux
@pytest.mark.ranks(2)
def test_after_wait_for_readers_a_rank_may_write_and_a_late_rank_reads_the_old_values(mesh):
    axis, late = mesh["dp"], 0.3
    x, out = filled(torch.full((1000,), 1.0 + mesh.rank), axis), torch.empty(2, 1000)
    pending = ops.all_gather_coalesced([out], x, axis)
    if mesh.rank == 1:
        time.sleep(late)
    pending.wait()
    with mesh.comm.ledger.recording() as calls:
        began = time.monotonic()
        ops.wait_for_readers(x, axis)
        waited = time.monotonic() - began
    x.fill_(-1)
    assert not calls, "wait_for_readers was counted as a call"
    assert out[0].eq(1).all()
    assert out[1].eq(2).all()
    if mesh.rank == 0:
        assert waited > late / 2, "it did not wait for the late rank"
        assert mesh.comm.ledger.total.blocked > late / 2, "the wait was not charged"
    else:
        assert waited < late / 2


@needs_linux
@pytest.mark.ranks(2)
def test_a_second_reduce_waits_until_a_late_rank_has_read_the_staging(mesh):
    axis, staging = mesh["dp"], ops.shared_buffer(2000, F32, mesh["dp"])
    outs = [torch.empty(1000), torch.empty(1000)]
    for turn, out in enumerate(outs):
        grad = torch.full((2000,), 10.0**turn)
        pending = ops.reduce_scatter_coalesced(out, [grad], [1000], staging, axis)
        if mesh.rank == 1 and turn == 0:
            time.sleep(0.3)
        pending.wait()
    assert outs[0].eq(2).all()
    assert outs[1].eq(20).all()


@needs_linux
@pytest.mark.ranks(2)
def test_writing_to_staging_that_is_in_flight_is_refused(mesh):
    axis, staging = mesh["dp"], ops.shared_buffer(4, F32, mesh["dp"])
    first = ops.reduce_scatter_coalesced(torch.empty(2), [torch.ones(4)], [2], staging, axis)
    with pytest.raises(AssertionError, match=r"reduce_scatter .*test_coalesced.* was not waited"):
        ops.reduce_scatter_coalesced(torch.empty(2), [torch.ones(4)], [2], staging, axis)
    assert first.wait().eq(2).all()


@needs_linux
@pytest.mark.ranks(3)
def test_an_all_reduce_does_not_overwrite_memory_that_a_late_rank_still_reads(mesh):
    axis = mesh["dp"]
    x, out = filled(torch.full((999,), 1.0 + mesh.rank), axis), torch.empty(3, 999)
    gather, total = ops.all_gather_coalesced([out], x, axis), ops.all_reduce_into(x, axis)
    if mesh.rank == 2:
        time.sleep(0.2)
    gather.wait()
    assert total.wait().eq(6).all()
    assert torch.equal(out[:, 0], torch.tensor([1.0, 2.0, 3.0]))
    assert (out == out[:, :1]).all()


@needs_linux
@pytest.mark.ranks(2)
def test_memory_of_other_ranks_is_not_counted_for_this_rank(mesh):
    axis, length = mesh["dp"], 4 * BLOCK
    x, staging = filled(torch.ones(length), axis), ops.shared_buffer(2 * length, F64, axis)
    outs, sums, grad = [torch.empty(2, length)], torch.empty(length), torch.ones(2 * length)
    with LiveBytes([x, staging, *outs, sums, grad]) as count:
        before = count.live
        ops.all_gather_coalesced(outs, x, axis).wait()
        ops.reduce_scatter_coalesced(sums, [grad], [length], staging, axis).wait()
        assert count.live == before
        assert count.peak == before + 8 * BLOCK, "more than one spare block for the cast"


# --- the ledger -----------------------------------------------------------------------------------


def account(axis, dtype=F32):
    """Returns (op, algorithm, about, payload, sent) of one gather and one reduce."""
    x, n = ops.shared_buffer(6, dtype, axis), axis.size
    staging = ops.shared_buffer(n * 6, dtype, axis)
    with axis.comm.ledger.recording() as calls:
        outs = [torch.empty(n, 4, dtype=dtype), torch.empty(n, 2, dtype=dtype)]
        ops.all_gather_coalesced(outs, x, axis).wait()
        xs = [torch.ones(n * 4, dtype=dtype), None]
        ops.reduce_scatter_coalesced(torch.empty(6), xs, [4, 2], staging, axis).wait()
    return [(call.op, call.algorithm, call.about, call.payload, call.sent) for call in calls]


def expected(n, setting, dtype=F32):
    """Returns the same by formula. gloo's reduce_scatter is an all_reduce inside."""
    payload = n * 6 * dtype.itemsize
    sent = int(formula_bytes("all_gather", n, payload))
    name = str(dtype).removeprefix("torch.")
    to_gather = {"auto": "shared", "tree": "backend"}.get(setting, setting)
    to_reduce = "direct" if setting == "auto" and dtype.itemsize == 2 else to_gather
    shards = ", 2 shards" if to_gather == "shared" else ""
    return [
        ("all_gather", to_gather, f"{name}[6]{shards}", payload, sent),
        ("reduce_scatter", to_reduce, f"{name}[{n * 6}], sum", payload,
         sent * (2 if to_reduce == "backend" else 1)),
    ]  # fmt: skip


@pytest.mark.slow_unless(lambda world: world == 3)
@pytest.mark.parametrize("setting", [*SETTINGS, "tree"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.ranks(4)
def test_each_is_one_call_with_the_bytes_of_the_formula(world, setting, mesh):
    axis = init_mesh(dp=4, collectives=setting).sub("dp", range(world))
    for dtype in (F32, B16) if axis is not None else ():
        assert account(axis, dtype) == expected(world, setting, dtype)


@pytest.mark.parametrize("setting", [*SETTINGS, "tree"])
def test_a_dry_run_counts_the_same_bytes(setting):
    for world in (2, 4, 16):
        with dry_run({"dp": world}, collectives=setting) as mesh:
            assert account(mesh["dp"]) == expected(world, setting)
            assert account(mesh["dp"], B16) == expected(world, setting, B16)


# --- ranks that differ, are late, or die ----------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS[:2])
@pytest.mark.ranks(2)
def test_the_order_check_accepts_equal_calls_and_names_unequal_ones(setting, mesh):
    mesh = init_mesh(dp=2, check=True, collectives=setting)
    axis = mesh["dp"]
    assert [row[0] for row in account(axis)] == ["all_gather", "reduce_scatter"]
    x, staging = ops.shared_buffer(3, F32, axis), ops.shared_buffer(6, F32, axis)
    with pytest.raises(ops.CollectiveMismatch, match=r"rank 0 calls all_gather.*rank 1 calls redu"):
        if mesh.rank == 0:
            ops.all_gather_coalesced([torch.empty(2, 3)], x, axis)
        else:
            ops.reduce_scatter_coalesced(torch.empty(3), [None], [3], staging, axis)


@pytest.mark.slow_unless(lambda setting: setting == SETTINGS[0])
@pytest.mark.parametrize("setting", SETTINGS[:2])
@pytest.mark.ranks(2)
def test_a_rank_that_does_not_call_is_an_error_that_names_the_call(setting, mesh):
    mesh = init_mesh(dp=2, timeout=1.0, collectives=setting)
    staging = ops.shared_buffer(6, F32, mesh["dp"])
    if mesh.rank == 0:
        began = time.monotonic()
        with pytest.raises(
            ops.CollectiveError, match=r"rank 0/2 .*reduce_scatter .*coalesced.py"
        ) as error:
            ops.reduce_scatter_coalesced(torch.empty(3), [None], [3], staging, mesh["dp"]).wait()
        assert distance_from_cause(error.value) == 1
        assert 0.5 < time.monotonic() - began < 10
    else:
        time.sleep(2.5)


@pytest.mark.slow
@needs_linux
@pytest.mark.ranks(2)
def test_a_rank_that_does_not_finish_reading_is_an_error_that_names_the_call(mesh):
    mesh = init_mesh(dp=2, timeout=1.0)
    x = ops.shared_buffer(3, F32, mesh["dp"])
    pending = ops.all_gather_coalesced([torch.empty(2, 3)], x, mesh["dp"])
    if mesh.rank == 0:
        pending.wait()
        late = r"all_gather #.*rank 1 did not finish reading.*allow more than 1 s"
        with pytest.raises(ops.CollectiveError, match=late):
            ops.wait_for_readers(x, mesh["dp"])
    else:
        time.sleep(2)
        pending.wait()


def ended_process():
    """Returns the id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@needs_linux
@pytest.mark.ranks(3)
def test_a_dead_rank_is_reported_at_once_and_not_at_the_time_limit(mesh):
    axis, out = mesh["dp"], torch.empty(3, 3)
    x = filled(torch.ones(3), axis)
    window = mesh.comm.shared[x]
    if mesh.rank == 2:
        return
    window.memories[2] = window.memories[2]._replace(process=ended_process())
    began = time.monotonic()
    with pytest.raises(
        ops.CollectiveError, match=r"all_gather .*rank 2 did not call this.*has ended"
    ) as error:
        ops.all_gather_coalesced([out], x, axis).wait()
    assert time.monotonic() - began < 1
    assert distance_from_cause(error.value) == 2, "reports would begin with a rank that waited"


@needs_linux
@pytest.mark.ranks(2)
def test_a_rank_that_ends_after_its_last_collective_is_not_an_error(mesh):
    axis, out = mesh["dp"], torch.empty(2, 3)
    x = filled(torch.full((3,), 1.0 + mesh.rank), axis)
    pending = ops.all_gather_coalesced([out], x, axis)
    if mesh.rank == 0:
        window = mesh.comm.shared[x]
        window.memories[1] = window.memories[1]._replace(process=ended_process())
    pending.wait()
    ops.wait_for_readers(x, axis)
    assert out[1].eq(2).all()


@needs_linux
def test_a_rank_that_arrives_just_before_it_dies_is_not_an_error(monkeypatch):
    with shared.created(1, F32) as place:
        memory = shared.attach(place, 1, F32)
    window = shared.SharedWindow([memory], 0, (0,), timeout=5.0)

    def dies(process):
        window.arrive()
        return False

    monkeypatch.setattr(shared, "alive", dies)
    monkeypatch.setattr(proc, "CHECK_INTERVAL", 0.0)
    shared.Barrier(window, shared.ARRIVED, 1).wait()


def test_a_zombie_process_is_not_alive():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert shared.alive(process.pid) or not shared.FOLDER.is_dir()
        process.kill()
        time.sleep(0.1)  # nobody has read its exit status yet
        assert not shared.alive(process.pid)
    assert not shared.alive(process.pid)
