"""Time is a budget: of a long product of settings, only some rows are tested by default.

    @pytest.mark.slow_unless(lambda model, impl: impl == "hand" or model == "gpt")

before a parametrized test marks its other rows `slow`. The predicate is handed the parameters that
it names. Each value of a parameter, and so each promise, belongs to a row that is not slow.
"""

import inspect

import pytest

import dist_lab

dist_lab.fix_torchvision()  # many tests import torchvision, beside a torch that may be CPU-only


@pytest.hookimpl(tryfirst=True)  # before -m looks at what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow_unless"):
            (is_usual,) = mark.args
            assert isinstance(item, pytest.Function)
            given = {n: item.callspec.params[n] for n in inspect.signature(is_usual).parameters}
            if not is_usual(**given):
                item.add_marker(pytest.mark.slow)
