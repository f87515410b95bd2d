"""A parameter is in one job only, and layers that mix rows of the batch are refused."""

import copy
import pickle

import pytest
import torch
from models import axes_of
from torch import nn

import dist_lab
from dist_lab.errors import UserError

STRATEGIES = ["single", "dp", "ddp", "zero1", "zero2", "fsdp"]


def two_heads(frozen=False):
    """Two models that share their first layer."""
    trunk = nn.Linear(3, 4).requires_grad_(not frozen)
    return nn.Sequential(trunk, nn.Linear(4, 1)), nn.Sequential(trunk, nn.Linear(4, 2))


def mesh_of(strategy, ranks=1):
    return dist_lab.init_mesh(**axes_of(strategy, ranks))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_parameter_of_two_jobs_is_refused(strategy):
    first, second = two_heads()
    dist_lab.parallelize(first, mesh_of(strategy), strategy)
    with pytest.raises(
        UserError, match=r"in another job already.*in one module, and paral|parallelized already"
    ):
        dist_lab.parallelize(second, mesh_of(strategy), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_submodule_or_a_parent_of_a_model_in_a_job_is_refused(strategy):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    dist_lab.parallelize(model, mesh_of(strategy), strategy)
    for other in (model[0], nn.Sequential(model, nn.Linear(2, 2))):
        with pytest.raises(UserError, match=r"in another job already|parallelized already"):
            dist_lab.parallelize(other, mesh_of(strategy), strategy)


@pytest.mark.slow_unless(lambda strategy: strategy in ("ddp", "zero2"))
@pytest.mark.parametrize("strategy", ["single", "dp", "ddp", "zero1", "zero2"])
def test_a_frozen_backbone_may_be_in_several_jobs(strategy):
    for model in two_heads(frozen=True):
        job = dist_lab.parallelize(model, mesh_of(strategy), strategy)
        job.model(torch.ones(2, 3)).sum().backward()
        job.finish()
        assert job.full_gradients()["1.weight"].any()


@pytest.mark.slow_unless(lambda strategy: strategy == "zero1")
@pytest.mark.parametrize("strategy", ["dp", "zero1"])
def test_a_copy_of_a_model_in_a_job_may_be_parallelized(strategy):
    job = dist_lab.parallelize(nn.Linear(2, 2), mesh_of(strategy), strategy)
    for copied in (copy.deepcopy(job.model), pickle.loads(pickle.dumps(job.model))):
        fresh = nn.Sequential(nn.Linear(2, 2))
        fresh[0].weight = copied.weight
        dist_lab.parallelize(fresh, mesh_of(strategy), strategy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "0 has max_norm=1.0 and rew"),
        ({"scale_grad_by_freq": True}, "0 has sca"),
    ],
)
@pytest.mark.ranks(2)
def test_a_layer_that_depends_on_which_rows_are_together_is_refused(options, message, mesh):
    for strategy in STRATEGIES[1:]:
        model = nn.Sequential(nn.Embedding(5, 2, **options), nn.Linear(2, 2))
        with pytest.raises(UserError, match=message):
            dist_lab.parallelize(model, mesh_of(strategy, 2), strategy)
