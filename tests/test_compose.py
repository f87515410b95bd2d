"""Strategies fold: each is handed what the ones before have left, and what they did adds up."""

from functools import partial

import pytest
import torch
from models import axes_of, gpt
from torch import nn

import dist_lab
from dist_lab import compose
from dist_lab.comm.ops import all_gather
from dist_lab.compose import Part
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


class Says(Sync):
    """Writes down its name in each finish."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def finish(self):
        self.log.append(self.name)


def splitting(name, dim, log):
    """A strategy that keeps this rank's shard along one dim, and sums nothing."""

    def apply(setup):
        axis, layouts = setup.axis, {}
        for fqn, places_of in param_slots(setup.model).items():
            value = setup.full_value(fqn)
            set_param(places_of, shard_of(value, Shard(dim), axis.size, axis.index).clone())
            layouts[fqn] = setup.layouts[fqn].split(axis.name, Shard(dim)).owing(Owed(axis.name))
        return Applied(layouts, Says(name, log), about=name)

    return Part(name, apply, (name,), Impl(""))


def fold(model, mesh, *parts):
    layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
    setup = Setup(model, mesh, {}, layouts, compose._own_value(model), {"": model})
    return compose._fold(setup, [(part, {}) for part in parts])


@pytest.mark.parametrize("order", [("tp", "fsdp"), ("fsdp", "tp")], ids=" given ".join)
@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_strategies_are_applied_in_one_order_and_each_splits_what_is_left(order, mesh):
    log, model = [], nn.Linear(6, 5, bias=False)
    whole = model.weight.detach().clone().copy_(torch.arange(30.0).view(5, 6))
    model.weight.data.copy_(whole)
    parts = {"tp": splitting("tp", 0, log), "fsdp": splitting("fsdp", 1, log)}
    applied = fold(model, mesh, *(parts[name] for name in order))
    layout = applied.layouts["weight"]
    assert layout.splits == (("tp", Shard(0)), ("fsdp", Shard(1)))
    assert layout.partial == (Owed("tp"), Owed("fsdp"))
    rows = slice(0, 3) if mesh["tp"].index == 0 else slice(3, 5)
    columns = slice(0, 3) if mesh["fsdp"].index == 0 else slice(3, 6)
    assert torch.equal(model.weight.detach(), whole[rows, columns])
    applied.sync.finish()
    assert log == ["fsdp", "tp"], "gradients are summed inner to outer"
    assert applied.about == "tp, fsdp"


def test_a_strategy_that_forgets_a_split_is_stopped():
    def forgets(setup):
        layouts = {name: Layout(p.shape, p.dtype) for name, p in setup.model.named_parameters()}
        return Applied(layouts, Sync())

    mesh = dist_lab.init_mesh()
    outer = splitting("tp", 0, [])
    with pytest.raises(AssertionError, match="forgets"):
        fold(nn.Linear(2, 2), mesh, outer, Part("forgets", forgets, ("dp",), Impl("")))


def test_every_strategy_has_a_place_in_the_order_and_a_mesh_that_is_legal():
    for name, row in STRATEGIES.items():
        axes = set(row.axes)
        assert any(axes & set(family) for family in ORDER_OF_APPLICATION) or not axes, name
        assert any(set(row.default or row.axes) <= mix <= axes for mix in MIXES) or not axes, name
    assert {name for name, _ in IMPLEMENTATIONS} == set(STRATEGIES)


def test_a_mesh_that_is_no_legal_mix_is_refused():
    mesh = dist_lab.init_mesh()
    mesh.axes = {"dp": 2, "tp": 2}
    with pytest.raises(UserError, match=r"the mesh is dp=2 x tp=2, and ddp runs along dp alone"):
        compose._refuse_other_axes(compose._part("ddp", "hand"), "ddp", mesh)


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "fsdp"])
def test_parallelize_draws_no_random_number(strategy):
    model = nn.Linear(3, 3)
    before = torch.get_rng_state()
    dist_lab.parallelize(model, dist_lab.init_mesh(**axes_of(strategy, 1)), strategy)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_strategy_may_be_anything_that_can_be_called():
    def apply(setup, factor):
        return Applied(setup.layouts, Sync())

    job = dist_lab.parallelize(nn.Linear(2, 2), dist_lab.init_mesh(), partial(apply, factor=1))
    assert list(job.layouts) == ["weight", "bias"]


def test_gradients_that_are_not_summed_yet_are_not_given():
    job = dist_lab.parallelize(nn.Linear(2, 2), dist_lab.init_mesh(), "single")
    job.model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(UserError, match=r"full_gradients\(\) before finish\(\)"):
        job.full_gradients()
    job.finish()
    assert torch.equal(job.full_gradients()["bias"], torch.ones(2))


@pytest.mark.parametrize("inner", ["ddp", "zero1", "fsdp"])
@pytest.mark.ranks(4, mesh={"pp": 2, "dp": 2})
def test_what_lies_on_another_stage_keeps_its_layout_under_an_inner_strategy(inner, mesh):
    model = gpt(layers=2)
    names = [name for name, _ in model.named_parameters()]
    parts = [(compose._part("pp", "hand"), {}), (compose._part(inner, "hand"), {})]
    layouts = {name: Layout(p.shape, p.dtype) for name, p in model.named_parameters()}
    value = compose._own_value(model)
    setup = Setup(model, mesh, {}, layouts, value, {"": model}, None, 0)
    applied = compose._fold(setup, parts)
    assert list(applied.layouts) == names
    here = {name for name, _ in model.named_parameters()}
    for name, layout in applied.layouts.items():
        assert layout.splits[0][0] == "pp"
        assert (name in here) == holds(layout, mesh.coordinates)


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_batchnorm_is_synchronized_over_the_rows_of_all_ranks(mesh):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    job = dist_lab.parallelize(model, mesh, "hsdp", sync_batchnorm=True)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(mesh.rank))
    job.model(x)
    everyone = all_gather(x[None], mesh.world).flatten(0, 1)
    torch.testing.assert_close(job.model[0].running_mean, 0.1 * everyone.mean(0))
