"""Forwards that write to a weight by .data, a write that autograd does not count.

Under fsdp the memory that they write to is freed when the unit is resharded. If all ranks have
written the same, each copies the written elements into its shard.
"""

import copy
import warnings

import pytest
import torch
from test_user_changes import assert_same
from torch import nn

import dist_lab
from dist_lab.errors import UserError


class WritingLinear(nn.Linear):
    """A linear whose forward first writes to its weight or bias."""

    def __init__(self, write):
        super().__init__(6, 7)
        self.write = write

    def forward(self, x):
        self.write(self, x)
        return super().forward(x)


def model_of(write):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Sequential(WritingLinear(write), nn.Tanh()), nn.Linear(7, 3)).double()
    for p in model.parameters():
        p.data.normal_(generator=generator)
    return model


def rows(step, part=slice(None)):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).double()[part]


def rows_of(mesh):
    n = 8 // mesh.data.size
    return slice(n * mesh.data.index, n * mesh.data.index + n)


def halve_negatives(layer, x):
    layer.weight.data[layer.weight < 0] *= 0.5


def assign_and_restore(layer, x):
    old = layer.weight.data
    layer.weight.data = old * 2
    layer.weight.data = old


def of_one_process(write, steps=3, parts=2):
    model = model_of(write)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        for part in range(parts):
            model(rows(parts * step + part)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(job, mesh, steps=3, parts=2):
    optimizer = job.optimizer(torch.optim.SGD, lr=0.1)
    for step in range(steps):
        for part in range(parts):
            with job.microbatch(last=part == parts - 1):
                job.model(rows(parts * step + part, rows_of(mesh))).square().sum().backward()
        job.finish()
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
    return job.full_state_dict()


@pytest.mark.slow_unless(
    lambda options: not {*options} & {"prefetch", "units", "reshard_after_forward"}
)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"reshard_after_forward": False}, {"keep_gathered": True}, {"defer_reduce": True},
        {"prefetch": False}, {"recompute": 1}, {"units": []},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_writes_by_data_persist_as_in_one_process(options, mesh):
    def clamp(layer, x):  # idempotent, because recompute runs it twice
        layer.weight.data.clamp_(-0.5, 0.5)

    write = clamp if "recompute" in options else halve_negatives
    job = dist_lab.parallelize(model_of(write), mesh, "fsdp", **{"units": ["0"], **options})
    assert_same(trained(job, mesh), of_one_process(write))


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_writes_by_data_reach_every_replica(mesh):
    job = dist_lab.parallelize(model_of(halve_negatives), mesh, "hsdp", units=["0"])
    assert_same(trained(job, mesh), of_one_process(halve_negatives))


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_elements_not_written_by_data_keep_their_float32_digits(mesh):
    """A mask in bfloat16 zeroes elements of the float32 shard, and rounds no other."""

    def mask(layer, x):
        layer.weight.data[:, ::2] = 0

    model = model_of(mask).float()
    wanted = copy.deepcopy(model.state_dict())
    wanted["0.0.weight"][:, ::2] = 0
    job = dist_lab.parallelize(model, mesh, "fsdp", units=["0"], param_dtype=torch.bfloat16)
    job.model(rows(0).float())
    weights = job.full_state_dict()
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())


def scale_by_rows(layer, x):
    layer.weight.data /= 1 + x.square().mean()


def add_on_one_rank(layer, x):
    if torch.distributed.get_rank() == 1:
        layer.bias.data[0] += 1  # a row of the other rank's shard


@pytest.mark.slow_unless(
    lambda options, name: options == {} or (name == "bias" and "units" in options)
)
@pytest.mark.parametrize(("write", "name"), [(scale_by_rows, "weight"), (add_on_one_rank, "bias")])
@pytest.mark.parametrize("options", [{}, {"units": []}, {"reshard_after_forward": False}], ids=str)
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_different_writes_on_different_ranks_are_refused_on_all(write, name, options, mesh):
    job = dist_lab.parallelize(model_of(write), mesh, "fsdp", **{"units": ["0"], **options})
    with pytest.raises(
        UserError, match=rf"^the forward writes to 0.0.{name} by .data, with different"
    ):
        job.model(rows(0, rows_of(mesh)))


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_different_writes_in_a_later_forward_are_refused_on_all(mesh):
    forwards = []

    def write(layer, x):
        if forwards:
            scale_by_rows(layer, x)

    job = dist_lab.parallelize(model_of(write), mesh, "fsdp", units=["0"])
    job.model(rows(0, rows_of(mesh)))
    forwards.append(1)
    with pytest.raises(UserError, match=r"^the forward writes to 0.0.weight by .data, with"):
        job.model(rows(0, rows_of(mesh)))


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_reading_data_on_one_rank_sends_nothing(mesh):
    def look(layer, x):
        if mesh.rank == 0:
            layer.seen = float(layer.weight.data.norm())

    job = dist_lab.parallelize(model_of(look), mesh, "fsdp", units=["0"])
    job.model(rows(0, rows_of(mesh)))
    with mesh.comm.ledger.recording() as calls:
        job.model(rows(0, rows_of(mesh)))
    assert calls
    assert not [call for call in calls if call.phase == "order" and call.op != "all_reduce"]


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_new_memory_for_data_is_refused_while_the_old_is_held(mesh):
    job = dist_lab.parallelize(model_of(assign_and_restore), mesh, "fsdp", units=["0"])
    with pytest.raises(UserError, match=r"^the forward replaces 0.0.weight.data while"):
        job.model(rows(0, rows_of(mesh)))


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
@pytest.mark.ranks(2)
def test_new_memory_for_data_between_steps_is_copied_into_the_bucket(strategy, mesh):
    plain = model_of(lambda layer, x: None)
    job = dist_lab.parallelize(copy.deepcopy(plain), mesh, strategy)
    for model in plain, job.model:
        model[1].weight.data = model[1].weight.data * 2
    assert torch.equal(job.model(rows(0)), plain(rows(0)))
    assert torch.equal(job.full_state_dict()["1.weight"], plain[1].weight)


@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_write_to_a_frozen_weight_is_refused_if_it_would_be_lost(mesh):
    def age(layer, x):
        with torch.no_grad():
            layer.weight.mul_(0.9)

    def age_data(layer, x):
        layer.weight.data.mul_(0.9)

    for write in age, age_data:
        model = model_of(write)
        model[0][0].weight.requires_grad_(False)
        before = model[0][0].weight.detach().clone()
        job = dist_lab.parallelize(model, mesh, "fsdp", units=["0"])
        if write is age:
            with pytest.raises(UserError, match=r"^the forward writes to 0.0.weight, which is fr"):
                job.model(rows(0, rows_of(mesh)))
        else:
            job.model(rows(0, rows_of(mesh)))
            assert torch.equal(job.full_state_dict()["0.0.weight"], before * 0.9)


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"fsdp": 2})
def test_a_compiled_model_may_write_by_data(mesh):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler says that it skips a function
        model = model_of(halve_negatives)
        job = dist_lab.parallelize(model, mesh, "fsdp", units=["0"])
        job.model[0][0].compile(backend="eager")
        weights = trained(job, mesh)
    assert_same(weights, of_one_process(halve_negatives))
