"""Bodies on ranks, from a test that runs in pytest's own process."""

import pytest

from dist_lab.testing import POOL


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
