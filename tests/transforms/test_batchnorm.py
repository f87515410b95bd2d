"""BatchNorm under data parallelism: synchronized, or with statistics that are merged later."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dist_lab
from dist_lab.errors import UserError
from dist_lab.transforms.batchnorm import SyncBatchNorm, convert_batchnorm, merge_statistics


class ConvNet(nn.Module):
    """BatchNorm2d and 1d, with and without weights; one has a cumulative average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # No biases: before a BatchNorm their true gradient is zero.
        self.conv, self.norm = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.plain = nn.BatchNorm1d(7, affine=False, momentum=None)
        self.double()

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))  # (B, 5, 4, 4)
        return self.plain(self.head(x.mean((2, 3))))  # (B, 7)


def images(step, rows=24):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    # Far from zero, with a different mean in each row: a mean of the ranks' variances is wrong.
    x = x + 100 + torch.arange(rows, dtype=torch.float64).view(-1, 1, 1, 1)
    return x, torch.randint(7, (rows,), generator=generator)


# Cells of the matrix with `conv` do the same for strategies by hand.
@pytest.mark.slow_unless(
    lambda strategy, impl, sync: (
        (strategy, impl, sync) in [("ddp", "hand", False), ("ddp", "torch", True)]
    )
)
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize(
    ("strategy", "impl"),
    [("dp", "hand"), ("ddp", "hand"), ("ddp", "torch"), ("ddp", "accelerate")],
)
@pytest.mark.ranks(3)
def test_batchnorm_equals_one_process_over_the_same_rows(strategy, impl, sync, mesh):
    report = dist_lab.verify(
        ConvNet, images, mesh, strategy, impl, microbatches=2, sync_batchnorm=sync
    )
    assert report.equal, report.sentence()
    assert any(c.quantity == "buffer" for c in report.comparisons) == sync


@pytest.mark.ranks(3)
def test_synchronized_batchnorm_is_exact_for_ranks_with_unequal_rows_and_none(mesh):
    x, y = images(0, rows=4)
    plain = ConvNet()
    F.cross_entropy(plain(x), y, reduction="sum").backward()

    model = ConvNet()
    convert_batchnorm(model, mesh.sub("dp", range(3)))
    rows = [slice(0, 3), slice(3, 3), slice(3, 4)][mesh.rank]
    F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        total = dist_lab.comm.ops.all_reduce(p.grad, mesh["dp"])
        torch.testing.assert_close(total, q.grad, rtol=1e-10, atol=1e-12, msg=name)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert not a.requires_grad, "a buffer keeps the autograd graph of every step"
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=name)


@pytest.mark.ranks(2)
def test_the_gradient_of_sync_batchnorm_passes_gradcheck(mesh):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(mesh.rank))
    norm = nn.Sequential(nn.BatchNorm1d(4, momentum=0.0).double())
    convert_batchnorm(norm, mesh["dp"])
    weight = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def total(x):  # the sum over both ranks, equal on each
        own = (norm(x) * weight).sum()
        return dist_lab.comm.autograd.gather_replicated(own[None], mesh["dp"], 0).sum()

    x.requires_grad_()
    total(x).backward()
    for i in range(3):  # finite differences, for one rank's rows at a time
        for rank in range(2):
            step = torch.zeros_like(x)
            step[i, 1] = 1e-6 if mesh.rank == rank else 0.0
            with torch.no_grad():
                slope = (total(x + step) - total(x - step)) / 2e-6
            if mesh.rank == rank:
                assert float(x.grad[i, 1]) == pytest.approx(float(slope), abs=1e-7)


@pytest.mark.ranks(2)
def test_sync_batchnorm_keeps_the_names_weights_and_eval_of_batchnorm(mesh):
    plain, model = ConvNet(), ConvNet()
    convert_batchnorm(model, mesh["dp"])
    assert isinstance(model.norm, SyncBatchNorm)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x, _ = images(0)
    with mesh.comm.ledger.recording() as calls:
        assert torch.equal(model.eval()(x), plain.eval()(x))
    assert calls == []


@pytest.mark.ranks(2)
def test_a_copy_or_a_pickle_of_sync_batchnorm_is_a_plain_batchnorm(mesh):
    job = dist_lab.parallelize(ConvNet(), mesh, "ddp", sync_batchnorm=True)
    x, _ = images(0)
    job.model(x)
    for copied in (copy.deepcopy(job.model), pickle.loads(pickle.dumps(job.model))):
        assert [type(m) for m in copied.modules()] == [type(m) for m in ConvNet().modules()]
        torch.testing.assert_close(copied.state_dict(), job.model.state_dict())
        assert copied.norm.weight is not job.model.norm.weight
        with mesh.comm.ledger.recording() as calls:
            copied(x)
        assert calls == []


@pytest.mark.ranks(2)
def test_a_batchnorm_in_two_places_is_replaced_by_one_layer(mesh):
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    convert_batchnorm(model, mesh["dp"])
    assert isinstance(model["a"], SyncBatchNorm)
    assert model["a"] is model["b"][0]


@pytest.mark.ranks(2)
def test_a_single_value_per_channel_is_refused_on_every_rank(mesh):
    model = nn.Sequential(nn.BatchNorm1d(3))
    convert_batchnorm(model, mesh["dp"])
    with pytest.raises(
        UserError, match=r"needs at least 2 values per channel, .* have 1; use a larg"
    ):
        model(torch.ones(1 - mesh.rank, 3))


@pytest.mark.ranks(2)
def test_sync_batchnorm_costs_one_collective_in_forward_and_one_in_backward(mesh):
    model = ConvNet()
    convert_batchnorm(model, mesh["dp"])
    with mesh.comm.ledger.recording() as calls:
        model(images(mesh.rank)[0]).square().sum().backward()
    assert [c.op for c in calls] == ["all_gather", "all_gather", "reduce_scatter", "reduce_scatter"]
    assert [c.payload for c in calls] == [2 * 8 * (2 * c + 1) for c in (5, 7, 7, 5)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "no BatchNorm in this model to synchronize"),
        (nn.BatchNorm1d(2), "cannot be replaced in place; put it in a module"),
    ],
)
def test_a_model_without_a_replaceable_batchnorm_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        dist_lab.parallelize(model, dist_lab.init_mesh(), "single", sync_batchnorm=True)


# --- statistics of all ranks ----------------------------------------------------------------------


@pytest.mark.ranks(4)
def test_merged_statistics_are_those_of_all_rows(mesh):
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:8] += 10
    norm = nn.BatchNorm1d(3, momentum=1.0).double()
    norm(x[8 * mesh.rank : 8 * mesh.rank + 8])
    norm.running_var *= 7 / 8  # the biased variance of 8 rows
    model = nn.Sequential(norm)
    for _ in range(2):  # a second merge changes nothing
        merge_statistics(model, mesh["dp"])
        torch.testing.assert_close(norm.running_mean, x.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(norm.running_var, x.var(0, correction=0), rtol=1e-13, atol=0)


@pytest.mark.ranks(2)
def test_running_statistics_differ_by_rank_until_evaluate_or_full_state_dict(mesh):
    job = dist_lab.parallelize(ConvNet(), mesh, "ddp")
    x, y = images(mesh.rank)
    job.run([(x, y)], lambda out, target: F.cross_entropy(out, target) / 2)
    job.finish()
    own = job.model.norm.running_mean.clone()
    gathered = dist_lab.comm.ops.all_gather(own[None], mesh["dp"])
    assert not torch.equal(gathered[0], gathered[1])
    job.evaluate([(x, y)], lambda out, target: F.cross_entropy(out, target) / 2)
    torch.testing.assert_close(job.model.norm.running_mean, gathered.mean(0))
    full = job.full_state_dict()
    torch.testing.assert_close(full["norm.running_mean"], gathered.mean(0))
    assert full["norm.num_batches_tracked"] == 1
