"""explain --all-ranks: one rank of each class is run, and its numbers are those of the others."""

from math import prod
from pathlib import Path

import pytest

from dist_lab.programs.cli.config import Config
from dist_lab.programs.explain.classes import Runs, classes

ROOT = Path(__file__).parents[3]
SMALL = {"batch": 12, "seq": 16, "microbatches": 2, "layers": 2, "data": str(ROOT / "README.md")}
FSDP_TP, PP_FSDP_TP = {"fsdp": 3, "tp": 2}, {"pp": 2, "fsdp": 3, "tp": 2}
MIXES = {
    "fsdp x tp": {"mesh": FSDP_TP},
    "ddp, a ring": {"mesh": {"dp": 3}, "collectives": "ring"},
    "ddp, a tree": {"mesh": {"dp": 6}, "collectives": "tree"},
    "zero1": {"mesh": {"dp": 6}, "strategy": "zero1"},
    "pp x fsdp x tp": {"mesh": PP_FSDP_TP},
    "pp x zero2": {"mesh": {"pp": 2, "dp": 3}, "strategy": "zero2"},
}


def runs_of(**settings):
    config = Config(**SMALL | settings)
    axes = config.axes(prod(settings["mesh"].values()))
    return Runs(config, axes), config.pipeline(axes["pp"]) if "pp" in axes else None


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_each_rank_counts_what_its_class_says(mix):
    runs, schedule = runs_of(**MIXES[mix])
    found = classes(runs, schedule)
    everyone = sorted(rank for one in found for rank in one.ranks)
    assert everyone == list(range(len(everyone)))
    for one in found:
        for rank in one.ranks:
            assert runs(rank, runs.microbatches).numbers == one.numbers, rank


@pytest.mark.slow_unless(lambda mesh, schedule: mesh == {"dp": 2})
@pytest.mark.parametrize(
    ("mesh", "schedule"), [({"dp": 2}, None), ({"fsdp": 2}, None), ({"pp": 4}, "1f1b"),
                           ({"pp": 2}, "zb"), ({"pp": 3, "fsdp": 2}, "1f1b"),
                           ({"pp": 2}, "interleaved")],
)  # fmt: skip
def test_of_many_microbatches_a_few_are_run_and_the_rest_is_multiplied(mesh, schedule):
    many = 12 if schedule else 6
    runs, pipeline = runs_of(
        mesh=mesh, schedule=schedule, microbatches=many, batch=2 * many,
        layers=6 if schedule else 1,
    )  # fmt: skip
    found = classes(runs, pipeline)
    assert not any(microbatches == many for _, microbatches in runs.done)
    for one in found:
        assert runs(one.ranks[0], many).numbers == one.numbers, one.ranks
