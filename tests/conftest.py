"""Marks rows of long parametrized tests as slow, so that the default run stays short.

    @pytest.mark.slow_unless(lambda model, impl: impl == "hand" or model == "gpt")

on a parametrized test marks each row `slow` for which the predicate is false. The predicate gets
the parameters that it names. Each value of a parameter is in at least one row that is not slow.
"""

import inspect

import pytest

import dist_lab

dist_lab.fix_torchvision()  # many tests import torchvision, beside a torch that may be CPU-only


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow_unless"):
            (is_usual,) = mark.args
            assert isinstance(item, pytest.Function)
            arguments = {n: item.callspec.params[n] for n in inspect.signature(is_usual).parameters}
            if not is_usual(**arguments):
                item.add_marker(pytest.mark.slow)
