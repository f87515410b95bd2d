"""The random generators of a process: name -> a function that returns its state.

States of one generator compare with ==, and their repr has all of them. For a checkpoint they are
JSON, with bytes in base64.
"""

import base64
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

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


def to_json() -> dict[str, Any]:
    """The states of all generators as JSON data, which `from_json` restores."""
    kind, key, *rest = np.random.get_state()
    python = random.getstate()
    states = {
        "torch": _as_text(torch.get_rng_state().numpy().tobytes()),
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, _as_text(np.asarray(key).tobytes()), *rest],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = _as_text(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def from_json(states: Mapping[str, Any]) -> None:
    """Restore the states of all generators."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, *rest = states["numpy"]
    words = np.frombuffer(base64.b64decode(key), np.uint32)
    np.random.set_state((kind, words, *rest))
    torch.set_rng_state(_as_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_as_bytes(states["cuda"]))


def start_anew(*key: object) -> None:
    """Seed all generators by a key: for ranks that have no state to go on with."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _as_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
