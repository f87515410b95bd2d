"""Buffers that a forward updates: equal on all ranks, or refused before the optimizer steps."""

import pytest
import torch
from models import axes_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError
from dist_lab.step.same_buffers import SameBuffers

STRATEGIES = [
    pytest.param(s, marks=pytest.mark.ranks(n, mesh=axes_of(s, n)))
    for s, n in {"dp": 2, "ddp": 2, "zero1": 2, "zero2": 2, "fsdp": 2, "hsdp": 4}.items()
]


class BufferModel(nn.Module):
    def __init__(self, update, *, dtype=torch.float64, persistent=True):
        super().__init__()
        self.update = update
        self.layer = nn.Linear(3, 2).double()
        self.register_buffer("kept", torch.ones(4, dtype=dtype), persistent=persistent)

    def forward(self, x):
        self.update(self, x)
        return self.layer(x)


def update_by_rows(model, x):
    model.kept.data.mul_(0.9).add_(x.mean(), alpha=0.1)


def step(job, mesh, number=0):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number)).double()
    n = 8 // mesh.data.size
    job.model(x[n * mesh.data.index :][:n]).square().sum().backward()
    job.finish()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_buffer_that_each_rank_updates_by_its_rows_is_refused_on_all_ranks(strategy, mesh):
    job = dist_lab.parallelize(BufferModel(update_by_rows), mesh, strategy)
    with pytest.raises(
        UserError, match=r"^the forward updates the buffer kept by the rows"
    ) as refused:
        step(job, mesh)
    assert "\n" not in str(refused.value)


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_a_buffer_that_changes_late_is_refused_at_the_next_power_of_two(mesh):
    steps = []

    def update_late(model, x):
        if len(steps) >= 2:
            update_by_rows(model, x)

    job = dist_lab.parallelize(BufferModel(update_late), mesh, "ddp")
    with pytest.raises(UserError, match=r"^the forward updates the buffer kept"):
        for number in range(5):
            step(job, mesh)
            job.after_step()
            job.model.zero_grad()
            steps.append(number)
    assert steps == [0, 1, 2]


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_buffers_are_compared_in_one_collective_at_steps_that_are_powers_of_two(mesh):
    def update_alike(model, x):
        model.kept += 1

    model = nn.Sequential(BufferModel(update_alike), nn.BatchNorm1d(2).double())
    job = dist_lab.parallelize(model, mesh, "ddp")
    compared = []
    for number in range(1, 10):
        with mesh.comm.ledger.recording() as calls:
            step(job, mesh)
        compared += [(number, c.op, c.payload) for c in calls if c.phase == "buffers"]
        job.after_step()
        model.zero_grad()
    assert compared == [(number, "all_gather", 32) for number in (1, 2, 4, 8)]


@pytest.mark.parametrize("options", [{"dtype": torch.int64}, {"persistent": False}], ids=str)
@pytest.mark.ranks(2, mesh={"dp": 2})
def test_integer_and_non_persistent_buffers_may_differ_by_rank(options, mesh):
    def update_by_rank(model, x):
        model.kept += mesh.rank + 1

    job = dist_lab.parallelize(BufferModel(update_by_rank, **options), mesh, "ddp")
    step(job, mesh)
    assert job.model.kept.tolist() == [mesh.rank + 2] * 4


@pytest.mark.parametrize(
    ("values", "shift", "differ"),
    [
        ([1.0, 2.0, 3.0], 0.0, False),
        ([1.0, 2.0, 3.0], 1e-6, False),  # the spacing of float32 there is 2.4e-7
        ([1.0, 2.0, 3.0], 1e-4, True),
        ([float("inf"), float("nan"), 3.0], 0.0, False),
        ([float("inf"), float("nan"), 3.0], 1e-4, True),
        ([0.0, 0.0, 0.0], 1e-30, True),
    ],
)
@pytest.mark.ranks(2, mesh={"dp": 2})
def test_buffers_that_differ_only_by_rounding_are_equal(values, shift, differ, mesh):
    model = nn.Module()
    model.register_buffer("kept", torch.tensor(values))
    model.kept[-1] += shift * mesh.rank
    check = SameBuffers(model, ["kept"], mesh.data)
    if differ:
        with pytest.raises(UserError, match="the buffer kept"):
            check.finish()
    else:
        check.finish()


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_permuted_buffers_are_different(mesh):
    """Two ranks have counted the same numbers of vectors, but for different codes."""
    model = nn.Module()
    model.register_buffer("size", torch.tensor([3.0, 1.0]).roll(mesh.rank))
    with pytest.raises(UserError, match="the buffer size"):
        SameBuffers(model, ["size"], mesh.data).finish()


@pytest.mark.ranks(2, mesh={"dp": 2})
def test_a_buffer_that_is_missing_on_one_rank_is_refused_without_a_hang(mesh):
    def drop_buffer(model, x):
        if mesh.rank == 1:
            model.kept = None

    job = dist_lab.parallelize(BufferModel(drop_buffer), mesh, "ddp")
    with pytest.raises(UserError, match="the buffer kept"):
        step(job, mesh)
