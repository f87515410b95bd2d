"""Goal R11: every process group of every strategy, a library's too, has the mesh's time limit."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from models import axes_of, batch, build, plan_of, units_of
from torch.distributed import distributed_c10d

import dist_lab
from dist_lab.programs.cli.mixes import strategies_on
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.torch_private import group_timeout

SECONDS = 37.0
MIXES = [
    {"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 2}, {"fsdp": 2, "tp": 2}, {"pp": 2, "dp": 2},
    {"pp": 2, "fsdp": 2}, {"pp": 2, "tp": 2},
]  # fmt: skip


def limits() -> dict[str, float]:
    """The seconds of each group of this rank, by its ranks and its number among all groups."""
    groups = list(distributed_c10d._world.pg_map)
    return {
        f"{dist.get_process_group_ranks(group)} #{i}": group_timeout(group)
        for i, group in enumerate(groups)
    }


def take_a_step(mesh, strategy, impl):
    pipeline = "pp" if "pp" in mesh.axes else ""
    report = dist_lab.verify(
        lambda: build(pipeline, "mlp"), batch, mesh, strategy, impl, steps=1, microbatches=4,
        clip=1.0, units=units_of("mlp"), **plan_of(pipeline or strategy, "mlp", impl),
    )  # fmt: skip
    assert report.equal


@pytest.mark.slow_unless(lambda strategy, impl: (strategy, impl) == ("hsdp", "torch"))
@pytest.mark.parametrize(
    ("strategy", "impl"), [row for row in IMPLEMENTATIONS if row[0] != "single"]
)
@pytest.mark.ranks(4, timeout=60)
def test_every_group_of_a_strategy_has_the_time_limit_of_its_mesh(strategy, impl, mesh):
    mesh = dist_lab.init_mesh(timeout=SECONDS, **axes_of(strategy, 4))
    take_a_step(mesh, strategy, impl)
    mesh.channel("dp", "fsdp", "tp", "pp")
    assert set(limits().values()) == {SECONDS}, limits()


@pytest.mark.slow
@pytest.mark.parametrize("axes", MIXES, ids=lambda axes: "x".join(axes))
@pytest.mark.ranks(4, timeout=60)
def test_every_group_of_a_mix_has_the_time_limit_of_its_mesh(axes, mesh):
    mesh = dist_lab.init_mesh(timeout=SECONDS, **axes)
    strategy = strategies_on(axes)[-1]
    take_a_step(mesh, strategy, "hand")
    mesh.device_mesh()
    assert set(limits().values()) == {SECONDS}, limits()


@pytest.mark.ranks(2)
def test_a_group_with_another_limit_would_be_found(mesh):
    dist_lab.init_mesh(timeout=SECONDS, dp=2)
    dist.new_group([0, 1], timeout=timedelta(seconds=3))
    dist.new_group([0, 1])  # torch's default, whatever the limit of the world
    assert set(limits().values()) == {SECONDS, 3.0, 1800.0}
