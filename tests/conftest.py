"""Marks rows of long parametrized tests as slow or nightly, so that the default run stays short.

    @pytest.mark.slow_unless(lambda model, impl: impl == "hand" or model == "gpt")

on a parametrized test marks each row `slow` for which the predicate is false; `nightly_unless` does
the same for `nightly`, and a row that is nightly is not slow. The predicate gets the parameters
that it names. By default a test runs the rows that differ most, often only one. A value without a
row by default shares its code with one that has a row, as zero1 does with zero2, hsdp with fsdp and
dp with ddp; or a cell of tests/programs/verify/test_matrix.py covers it: the slice there has every
strategy, schedule, model and option.

A long table is sampled. Of the slow rows of a test, `slow` runs a fifth, at least five, and nightly
runs the others. A hash of its name decides which, so that a new row moves no other. Rows that are
marked slow one by one, in `pytest.param`, all run.
"""

import hashlib
import inspect
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
from in_browser import browser  # noqa: F401  # a fixture
from processes import descendants

import dist_lab
from dist_lab.testing import POOL

dist_lab.fix_torchvision()  # many tests import torchvision, beside a torch that may be CPU-only


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tables = defaultdict(list)  # test -> its slow rows
    for item in items:
        if is_unusual(item, "nightly_unless"):
            make_nightly(item)
        elif is_unusual(item, "slow_unless"):
            item.add_marker(pytest.mark.slow)
        if is_slow_row(item):
            tables[item.nodeid.partition("[")[0]].append(item)
    for rows in tables.values():
        rows.sort(key=lambda row: hashlib.sha256(row.name.encode()).digest())
        for row in rows[max(5, len(rows) // 5) :]:
            make_nightly(row)


def make_nightly(item: pytest.Item) -> None:
    item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
    item.add_marker(pytest.mark.nightly)


def is_slow_row(item: pytest.Item) -> bool:
    """Whether it is a row of a table that may be sampled."""
    names = {mark.name for mark in item.iter_markers()}
    if "slow" not in names or "nightly" in names or "[" not in item.name:
        return False
    assert isinstance(item, pytest.Function)
    return all(mark.name != "slow" for mark in item.callspec.marks)


def is_unusual(item: pytest.Item, mark_name: str) -> bool:
    """Whether the predicate of such a mark is false for the parameters of this row."""
    for mark in item.iter_markers(mark_name):
        (is_usual,) = mark.args
        assert isinstance(item, pytest.Function)
        arguments = {n: item.callspec.params[n] for n in inspect.signature(is_usual).parameters}
        if not is_usual(**arguments):
            return True
    return False


@pytest.fixture(autouse=True)
def no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, every process that it has started must have ended."""
    pool = request.config.stash[POOL]
    before = descendants(pool)
    yield
    deadline = time.monotonic() + 10.0  # for those that are ending
    while left := descendants(pool) - before:
        if time.monotonic() > deadline:
            pytest.fail(f"processes {sorted(left)} are left")
        time.sleep(0.02)


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
