"""Marks rows of long parametrized tests as slow or nightly, so that the default run stays short.

    @pytest.mark.slow_unless(lambda model, impl: impl == "hand" or model == "gpt")

on a parametrized test marks each row `slow` for which the predicate is false; `nightly_unless` does
the same for `nightly`, and a row that is nightly is not slow. The predicate gets the parameters
that it names. By default a test runs the rows that differ most, often only one. A value without a
row by default shares its code with one that has a row, as zero1 does with zero2, hsdp with fsdp and
dp with ddp; or a cell of tests/programs/verify/test_matrix.py covers it: the slice there has every
strategy, schedule, model and option.
"""

import inspect

import pytest

import dist_lab
from dist_lab.testing import POOL

dist_lab.fix_torchvision()  # many tests import torchvision, beside a torch that may be CPU-only


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_unusual(item, "nightly_unless"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
            item.add_marker(pytest.mark.nightly)
        elif is_unusual(item, "slow_unless"):
            item.add_marker(pytest.mark.slow)


def is_unusual(item: pytest.Item, mark_name: str) -> bool:
    """Whether the predicate of such a mark is false for the parameters of this row."""
    for mark in item.iter_markers(mark_name):
        (is_usual,) = mark.args
        assert isinstance(item, pytest.Function)
        arguments = {n: item.callspec.params[n] for n in inspect.signature(is_usual).parameters}
        if not is_usual(**arguments):
            return True
    return False


@pytest.fixture
def on_ranks(request):
    """on_ranks(size, body, *arguments) -> what the body returned on each rank."""
    pool = request.config.stash[POOL]
    return lambda size, body, *arguments: pool.run(size, body, *arguments, timeout=90.0)


@pytest.fixture(scope="session")
def library(request, tmp_path_factory):
    """Saves each layout's checkpoint once: library(name, model, optimizer) -> folder, losses."""
    import saved

    pool, made = request.config.stash[POOL], {}

    def saved_by(name, model="gpt", optimizer="adamw"):
        key = name, model, optimizer
        if key not in made:
            folder = tmp_path_factory.mktemp("saved")
            arguments = saved.LAYS[name], str(folder), model, optimizer
            ranks = saved.LAYS[name].ranks
            made[key] = folder, pool.run(ranks, saved.save, *arguments, timeout=90.0)[0]
        return made[key]

    return saved_by
