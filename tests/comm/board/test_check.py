"""Ranks whose calls differ: found at once with `check`, by the later rank without it."""

import gc
import os
import signal
import time

import pytest
import torch
from mismatches import KINDS, is_quiet

from dist_lab.comm import ops
from dist_lab.comm.board import join
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import init_mesh


def caught(kind, mesh):
    """Returns the error of this kind on this rank, and the seconds until it came."""
    axis, other = mesh["dp"], mesh.sub("dp", [0, 1])
    for _ in range(6):
        ops.all_reduce(torch.ones(2), axis)
    began = time.monotonic()
    if is_quiet(kind, axis):
        return None, 0.0
    with pytest.raises(ops.CollectiveError) as error:
        KINDS[kind](mesh.rank, axis, other)
    return error.value, time.monotonic() - began


def check_message(error):
    text = str(error)
    assert "what every rank was doing:\n" in text
    for rank in (0, 1):
        assert f"\n  rank {rank} [dp={rank}] step 0, start: " in text
    assert "on dp" in text
    assert " B, at mismatches.py:" in text or " B) at mismatches.py:" in text


@pytest.mark.slow_unless(lambda kind: kind in ("reduction", "order of groups", "both receive"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.ranks(2, timeout=30)
def test_with_check_a_difference_is_an_error_on_all_ranks_within_two_seconds(kind, mesh):
    mesh = init_mesh(dp=2, timeout=20, check=True)
    error, seconds = caught(kind, mesh)
    if error is None:
        return
    assert seconds < 2 + SLACK
    check_message(error)
    if kind == "extra call":
        assert "rank 1 did not arrive: has left" in str(error)
        return
    assert isinstance(error, ops.CollectiveMismatch)
    assert "rank 0 calls " in str(error)
    assert "rank 1 calls " in str(error)
    assert "where ranks " in str(error)


SLACK = 3  # seconds, on a busy machine


@pytest.mark.slow_unless(lambda kind: kind == "bytes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.ranks(2, timeout=30)
def test_without_check_a_difference_is_an_error_within_the_timeout_and_no_abort(kind, mesh):
    mesh = init_mesh(dp=2, timeout=0.5)
    error, seconds = caught(kind, mesh)
    if error is None:
        time.sleep(1)
        return
    assert seconds < 0.5 + 1 + SLACK
    check_message(error)
    if kind in ("order of groups", "both receive", "extra call"):
        assert f"rank {1 - mesh.rank} did not arrive" in str(error)
    else:
        assert isinstance(error, ops.CollectiveMismatch), error


@pytest.mark.ranks(2)
def test_ranks_that_are_checked_and_ranks_that_are_not_are_refused(mesh):
    with pytest.raises(UserError, match=r"only on ranks 1 of 2 collectives are checked"):
        init_mesh(dp=2, check=mesh.rank == 1)


@pytest.mark.ranks(3)
def test_the_check_sends_nothing_and_counts_nothing(mesh):
    mesh = init_mesh(dp=3, check=True)
    with mesh.comm.ledger.recording() as calls:
        for _ in range(40):
            assert ops.all_reduce(torch.ones(2), mesh["dp"]).tolist() == [3, 3]
    assert [call.op for call in calls] == ["all_reduce"] * 40


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=30)
def test_the_first_call_that_differs_is_marked(mesh):
    mesh = init_mesh(dp=2, check=True)
    error, _ = caught("reduction", mesh)
    marked = [line for line in str(error).splitlines() if line.startswith("  > ")]
    assert len(marked) == 1
    ours, theirs = marked[0].split(" | ")
    assert ("sum" in ours, "max" in ours) == ((True, False), (False, True))[mesh.rank]
    assert ("sum" in theirs, "max" in theirs) == ((False, True), (True, False))[mesh.rank]
    assert str(error).count("all_reduce(float32[2], sum) on dp{0,1}") >= 8, "the calls before"


@pytest.mark.ranks(4, timeout=30)
def test_the_rank_that_all_wait_for_is_named_first_on_every_rank(mesh):
    # Rank 0 waits for rank 1, which waits for rank 3.
    mesh = init_mesh(dp=2, tp=2, timeout=0.5)
    if mesh.rank == 3:
        time.sleep(1.5)
        return
    with pytest.raises(ops.CollectiveError) as error:
        ops.all_reduce(torch.ones(4), mesh["dp"])
        ops.all_reduce(torch.ones(4), mesh["tp"])
    lines = str(error.value).splitlines()
    first = lines[lines.index("what every rank was doing:") + 1]
    assert first.startswith("  rank 3 [dp=1,tp=1] ")
    assert "has made no collective yet" in first


@pytest.mark.ranks(3, timeout=30)
def test_a_stopped_rank_is_named(mesh):
    mesh = init_mesh(dp=3, timeout=0.5)
    ops.all_reduce(torch.ones(4), mesh["dp"])
    if mesh.rank == 2:
        # A process that nobody knows wakes this one.
        if os.fork() == 0:
            time.sleep(1.5)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.wait()
        return
    began = time.monotonic()
    with pytest.raises(ops.CollectiveError, match=r"rank 2 did not arrive: is stopped \(SIGSTOP\)"):
        ops.all_reduce(torch.ones(4), mesh["dp"])
    assert time.monotonic() - began < 0.5 + 2 + SLACK


@pytest.mark.ranks(2)
def test_between_machines_the_check_gathers_descriptions(mesh):
    mesh = init_mesh(dp=2, check=True)
    mesh.comm.board = None
    with mesh.comm.ledger.recording() as calls:
        ops.all_reduce(torch.ones(4), mesh["dp"])
    assert [call.op for call in calls] == ["all_gather", "all_reduce"]
    assert calls[0].sent == 256
    with pytest.raises(ops.CollectiveMismatch, match=r"rank 0 calls .*sum.*rank 1 calls .*max"):
        ops.all_reduce(torch.ones(4), mesh["dp"], ("sum", "max")[mesh.rank])


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_board_covers_the_ranks_of_its_own_machine_and_says_so(mesh):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "machine", lambda: bytes([mesh.rank]) * 16)
        mesh = init_mesh(dp=2, check=True, timeout=0.5)
    assert mesh.comm.board.ranks == (mesh.rank,)
    with mesh.comm.ledger.recording() as calls:
        assert ops.all_reduce(torch.ones(1), mesh["dp"]) == 2
    assert [call.op for call in calls] == ["all_gather", "all_reduce"]
    if mesh.rank == 0:
        with pytest.raises(ops.CollectiveError, match="\n  on other machines: rank 1"):
            ops.all_reduce(torch.ones(4), mesh["dp"])
    else:
        time.sleep(1)


@pytest.mark.ranks(2)
def test_a_dropped_mesh_leaves_no_open_file(mesh):
    def files():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = files()
    for _ in range(5):
        ops.all_reduce(torch.ones(1), init_mesh(dp=2)["dp"])
    assert files() <= before
