"""Strategies compose: each gets the model that the earlier ones left, and their Applied combine."""

import re
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
from dist_lab.programs.cli.mixes import DATA, FAMILIES, check_impl, strategies_on
from dist_lab.programs.cli.registry import IMPLEMENTATIONS, STRATEGIES, Impl
from dist_lab.step.protocol import Applied, Sync
from dist_lab.step.setup import Setup


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
    value = compose._current_value(model)
    setup = Setup(model, mesh, {}, layouts, frozenset(layouts), value, {"": model})
    return compose.fold(setup, [(chosen, {}) for chosen in strategies])


@pytest.mark.ranks(4, mesh={"fsdp": 2, "tp": 2})
def test_each_strategy_splits_the_shard_that_the_earlier_one_left(mesh):
    log, model = [], nn.Linear(6, 5, bias=False)
    full = model.weight.detach().clone().copy_(torch.arange(30.0).view(5, 6))
    model.weight.data.copy_(full)
    applied = fold(model, mesh, splitting("tp", 0, log), splitting("fsdp", 1, log))
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


def test_every_strategy_is_in_one_family_and_alone_on_its_default_mesh():
    families = [name for family in FAMILIES for name in family]
    assert sorted([*families, "single"]) == sorted(STRATEGIES)
    assert {name for name, _ in IMPLEMENTATIONS} == set(STRATEGIES)
    for name, row in STRATEGIES.items():
        assert strategies_on(row.default_axes(4), name) == (name,)


@pytest.mark.parametrize(
    ("axes", "strategies"),
    [
        ({}, ("single",)),
        ({"dp": 4}, ("ddp",)),
        ({"fsdp": 4}, ("fsdp",)),
        ({"dp": 2, "fsdp": 2}, ("hsdp",)),
        ({"pp": 2, "tp": 2}, ("pp", "tp")),
        ({"pp": 2, "fsdp": 2, "tp": 2}, ("pp", "tp", "fsdp")),
    ],
    ids=str,
)
def test_a_mesh_alone_implies_its_strategies(axes, strategies):
    assert strategies_on(axes) == strategies


@pytest.mark.parametrize("outer", [{}, {"pp": 2}, {"tp": 2}, {"pp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("strategy", DATA)
def test_a_strategy_of_the_data_axes_can_be_named_in_every_mix(strategy, outer):
    axes = outer | STRATEGIES[strategy].default_axes(4)
    assert strategies_on(axes, strategy) == (*outer, strategy)


@pytest.mark.parametrize(
    ("axes", "strategy", "message"),
    [
        ({"dp": 2, "tp": 2}, "fsdp", "the mesh is dp=2 x tp=2, but fsdp runs along fsdp; give "
         'init_mesh(fsdp=2, tp=2) or strategy="ddp" or strategy="dp" or strategy="zero1" or '
         'strategy="zero2"'),
        ({"pp": 2}, "zero1", "the mesh is pp=2, but zero1 runs along dp; give init_mesh(pp=2, "
         'dp=2) or strategy="pp"'),
        ({"fsdp": 4}, "hsdp", "the mesh is fsdp=4, but hsdp runs along dp and fsdp; give "
         'init_mesh(dp=2, fsdp=2) or strategy="fsdp"'),
        ({"dp": 2, "tp": 2}, "tp", "the mesh is dp=2 x tp=2, and tp is not the strategy of its "
         'data axes; tp is implied; give strategy="ddp" or'),
        ({"dp": 4}, "pp", "the mesh is dp=4, but pp runs along pp only; give init_mesh(pp=4) or "
         "init_mesh(pp=2, dp=4)"),
        ({"dp": 4}, "single", 'single is for one process, but the mesh is dp=4; give '
         'strategy="ddp"'),
    ],
    ids=str,
)  # fmt: skip
def test_a_strategy_that_does_not_fit_the_mesh_is_refused_with_the_nearest_that_do(
    axes, strategy, message
):
    with pytest.raises(UserError, match=re.escape(message)):
        strategies_on(axes, strategy)


@pytest.mark.parametrize(
    ("strategies", "impl", "message"),
    [
        (
            ("tp", "ddp"),
            "torch",
            "tp x ddp by torch: its DistributedDataParallel takes the D",
        ),
        (("pp", "fsdp"), "accelerate", "no strategy fsdp@accelerate; accelerate ignores"),
        (("pp", "ddp"), "accelerate", "strategy pp has no impl 'accelerate'; give impl=\"hand\""),
        (("zero2",), "torch", "strategy zero2 has no impl 'torch'; give impl=\"hand\""),
    ],
    ids=str,
)
def test_a_mix_that_a_library_does_not_have_is_refused_with_the_reason(strategies, impl, message):
    with pytest.raises(UserError, match=message):
        check_impl(strategies, impl)


@pytest.mark.parametrize("impl", ["hand", "torch"])
@pytest.mark.ranks(2)
def test_fsdp_on_a_mesh_without_its_axis_is_refused_with_the_mesh_to_make(impl, mesh):
    with pytest.raises(UserError, match=r"is dp=2, but fsdp runs .*; give init_mesh\(fsdp=2\) or"):
        dist_lab.parallelize(nn.Linear(2, 2), mesh, "fsdp", impl)
    tp = dist_lab.init_mesh(tp=2)
    with pytest.raises(UserError, match=r"fsdp runs along fsdp; give init_mesh\(fsdp=2, tp=2\) or"):
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
@pytest.mark.ranks(4)
def test_parameters_of_other_stages_have_the_layouts_of_the_inner_strategy_too(inner):
    mesh = dist_lab.init_mesh(pp=2, **axes_of(inner, 2))
    model = gpt(layers=2)
    names = [name for name, _ in model.named_parameters()]
    applied = fold(model, mesh, *compose.choose(inner, "hand", mesh))
    assert list(applied.layouts) == names
    local_names = {name for name, _ in model.named_parameters()}
    for name, layout in applied.layouts.items():
        assert layout.splits[0][0] == "pp"
        assert (name in local_names) == holds(layout, mesh.coordinates)
        assert layout.partial[0].axis == ("fsdp" if inner == "fsdp" else "dp")
        assert len(layout.splits) == (1 if inner == "ddp" else 2)


@pytest.mark.ranks(4, mesh={"dp": 2, "fsdp": 2})
def test_batchnorm_is_synchronized_over_the_rows_of_all_ranks(mesh):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    job = dist_lab.parallelize(model, mesh, "hsdp", sync_batchnorm=True)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(mesh.rank))
    job.model(x)
    all_rows = all_gather(x[None], mesh.world).flatten(0, 1)
    torch.testing.assert_close(job.model[0].running_mean, 0.1 * all_rows.mean(0))
