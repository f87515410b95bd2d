"""The random generators of a process: name -> a function that returns its state.

States of one generator compare with ==, and their repr has all of them.
"""

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch


def state_of_numpy() -> tuple[object, ...]:
    kind, key, *rest = np.random.get_state()
    return (
        kind,
        np.asarray(key).tobytes(),
        *rest,
    )  # bytes, because arrays compare element by element


GENERATORS: Mapping[str, Callable[[], object]] = {
    "the state of torch's random generator": lambda: torch.get_rng_state().numpy().tobytes(),
    "the state of Python's random generator": random.getstate,
    "the state of NumPy's random generator": state_of_numpy,
}
