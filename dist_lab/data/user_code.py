"""Running the user's code of `--data module:function`: where it may import from, and its errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dist_lab.errors import UserError


@contextmanager
def calling(spec: str, call: str) -> Iterator[None]:
    """Run the user's code. An exception in it becomes a UserError that names the call."""
    try:
        with importable_from(os.getcwd()):
            yield
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise refusal(spec, f"{call} raised {message}; --debug shows where") from error


@contextmanager
def importable_from(folder: str) -> Iterator[None]:
    """Put a folder first on sys.path, and remove it afterwards.

    Threads may overlap here (prefetch.py): each adds one entry and removes one.
    """
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def refusal(spec: str, what: str) -> UserError:
    return UserError(f"data={spec!r}: {what}")
