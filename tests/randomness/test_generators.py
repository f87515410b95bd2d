"""The states of all generators, as JSON."""

import random

import numpy as np
import pytest
import torch

from dist_lab.randomness import generators


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_generators_go_on_where_they_were():
    states = generators.to_json()
    first = draws()
    generators.from_json(states)
    assert draws() == first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_states_from_a_machine_with_a_gpu_are_restored_without_one():
    states = generators.to_json()
    first = draws()
    generators.from_json(states | {"cuda": states["torch"]})
    assert draws() == first
