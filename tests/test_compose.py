"""Strategies compose: each gets the model that the earlier ones left, and their Applied combine."""

from functools import partial

import pytest
import torch
from models import axes_of, gpt
from torch import nn

import dist_lab
from dist_lab import compose
from dist_lab.comm.ops import all_gather
from dist_lab.compose import Chosen
from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout, Owed, Shard, holds, shard_of
from dist_lab.parallel.param_slots import param_slots, set_param
from dist_lab.programs.cli.registry import (
    IMPLEMENTATIONS,
    MIXES,
    ORDER_OF_APPLICATION,
    STRATEGIES,
    Impl,
)
from dist_lab.step.protocol import Applied, Setup, Sync


class LogsFinish(Sync):
    """Appends its name to a log in each finish()."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def finish(self):
        self.log.append(self.name)


def splitting(name, dim, log):
    """A strategy that keeps this rank's shard along one dim, and reduces no gradients."""

    def apply(setup):
        axis, layouts = setup.axis, {}
        for fqn, slots in param_slots(setup.model).items():
            value = setup.full_value(fqn)
            set_param(slots, shard_of(value, Shard(dim), axis.size, axis.index).clone())
            layouts[fqn] = setup.layouts[fqn].split(axis.name, Shard(dim)).owing(Owed(axis.name))
        return Applied(layouts, LogsFinish(name, log), about=name)

    return Chosen(name, apply, (name,), Impl(""))


def fold(model, mesh, *strategies):
    layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
    setup = Setup(model, mesh, {}, layouts, compose._current_value(model), {"": model})
    return compose._fold(setup, [(chosen, {}) for chosen in strategies])


@pytest.mark.parametrize("order", [("tp", "fsdp"), ("fsdp", "tp")], ids=" given ".join)
@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_the_order_of_application_is_fixed_and_each_strategy_splits_the_earlier_shard(order, mesh):
    log, model = [], nn.Linear(6, 5, bias=False)
    full = model.weight.detach().clone().copy_(torch.arange(30.0).view(5, 6))
    model.weight.data.copy_(full)
    strategies = {"tp": splitting("tp", 0, log), "fsdp": splitting("fsdp", 1, log)}
    applied = fold(model, mesh, *(strategies[name] for name in order))
    layout = applied.layouts["weight"]
    assert layout.splits == (("tp", Shard(0)), ("fsdp", Shard(1)))
    assert layout.partial == (Owed("tp"), Owed("fsdp"))
    rows = slice(0, 3) if mesh["tp"].index == 0 else slice(3, 5)
    columns = slice(0, 3) if mesh["fsdp"].index == 0 else slice(3, 6)
    assert torch.equal(model.weight.detach(), full[rows, columns])
    applied.sync.finish()
    assert log == ["fsdp", "tp"], "gradients are summed inner to outer"
    assert applied.about == "tp, fsdp"


def test_a_strategy_that_drops_an_earlier_split_fails():
    def forgets(setup):
        layouts = {name: Layout(p.shape, p.dtype) for name, p in setup.model.named_parameters()}
        return Applied(layouts, Sync())

    mesh = dist_lab.init_mesh()
    outer = splitting("tp", 0, [])
    with pytest.raises(AssertionError, match="forgets"):
        fold(nn.Linear(2, 2), mesh, outer, Chosen("forgets", forgets, ("dp",), Impl("")))


def test_every_strategy_has_a_place_in_the_order_and_a_legal_mesh():
    for name, row in STRATEGIES.items():
        axes = set(row.axes)
        assert any(axes & set(family) for family in ORDER_OF_APPLICATION) or not axes, name
        assert any(set(row.default or row.axes) <= mix <= axes for mix in MIXES) or not axes, name
    assert {name for name, _ in IMPLEMENTATIONS} == set(STRATEGIES)


def test_a_mesh_with_an_axis_of_another_strategy_is_refused():
    mesh = dist_lab.init_mesh()
    mesh.axes = {"dp": 2, "tp": 2}
    with pytest.raises(UserError, match=r"the mesh is dp=2 x tp=2, but ddp runs along dp only"):
        compose._refuse_other_axes(compose._choose("ddp", "hand"), "ddp", mesh)


@pytest.mark.parametrize("impl", ["hand", "torch"])
@pytest.mark.ranks(2)
def test_fsdp_on_a_mesh_without_its_axis_is_refused_with_the_mesh_to_make(impl, mesh):
    with pytest.raises(UserError, match=r"is dp=2, .*shards nothing; make it by init_mesh\(fsdp=2"):
        dist_lab.parallelize(nn.Linear(2, 2), mesh, "fsdp", impl)
    tp = dist_lab.init_mesh(tp=2)
    with pytest.raises(UserError, match=r"fsdp and dp only; make it by init_mesh\(fsdp=2\)$"):
        dist_lab.parallelize(nn.Linear(2, 2), tp, "fsdp", impl)


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "fsdp"])
def test_parallelize_does_not_use_the_global_random_generator(strategy):
    model = nn.Linear(3, 3)
    before = torch.get_rng_state()
    dist_lab.parallelize(model, dist_lab.init_mesh(**axes_of(strategy, 1)), strategy)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_strategy_may_be_any_callable():
    def apply(setup, factor):
        return Applied(setup.layouts, Sync())

    job = dist_lab.parallelize(nn.Linear(2, 2), dist_lab.init_mesh(), partial(apply, factor=1))
    assert list(job.layouts) == ["weight", "bias"]


def test_full_gradients_before_finish_is_refused():
    job = dist_lab.parallelize(nn.Linear(2, 2), dist_lab.init_mesh(), "single")
    job.model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(UserError, match=r"full_gradients\(\) before finish\(\)"):
        job.full_gradients()
    job.finish()
    assert torch.equal(job.full_gradients()["bias"], torch.ones(2))


@pytest.mark.parametrize("inner", ["ddp", "zero1", "fsdp"])
@pytest.mark.ranks(4, mesh={"pp": 2, "dp": 2})
def test_parameters_of_other_stages_keep_their_layouts_under_an_inner_strategy(inner, mesh):
    model = gpt(layers=2)
    names = [name for name, _ in model.named_parameters()]
    strategies = [(compose._choose("pp", "hand"), {}), (compose._choose(inner, "hand"), {})]
    layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
    value = compose._current_value(model)
    setup = Setup(model, mesh, {}, layouts, value, {"": model}, None, 0)
    applied = compose._fold(setup, strategies)
    assert list(applied.layouts) == names
    local_names = {name for name, _ in model.named_parameters()}
    for name, layout in applied.layouts.items():
        assert layout.splits[0][0] == "pp"
        assert (name in local_names) == holds(layout, mesh.coordinates)


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_batchnorm_is_synchronized_over_the_rows_of_all_ranks(mesh):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    job = dist_lab.parallelize(model, mesh, "hsdp", sync_batchnorm=True)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(mesh.rank))
    job.model(x)
    all_rows = all_gather(x[None], mesh.world).flatten(0, 1)
    torch.testing.assert_close(job.model[0].running_mean, 0.1 * all_rows.mean(0))
