"""A warm pool of rank processes, each of which runs the body of one test after another.

The parent sends a Task down each rank's pipe and gets back how its body ended. Between tests a rank
is made as good as new: it leaves the process group and joins the next one (about 70 ms, most of it
in gloo), so that no message, timeout, group or thread of one test is there in the next.
"""

import ast
import contextlib
import faulthandler
import gc
import importlib.util
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import loads
from types import ModuleType
from typing import Any

import pytest

from dist_lab import ranks
from dist_lab.failures import Failure, by_cause, heading, how_it_ended, named, tell

AT_START = 120.0  # seconds for ranks to import torch and say that they are there
AT_EXIT = 10.0  # seconds for ranks to end after the last test


@dataclass(frozen=True)
class Task:
    """One test, as it is sent to a rank.

    Attributes:
        size, timeout: the ranks that run it, and the seconds they have.
        axes: of the mesh that the body gets; None if it asks for none.
        module, path: of the file that the test is in.
        name: of the function in there, `TestClass.test_name` for a method.
        search: sys.path.
        values: the other arguments of the body, each pickled.
        filters: warnings.filters, pickled.
    """

    size: int
    timeout: float
    axes: Mapping[str, int] | None
    module: str
    path: str
    name: str
    search: Sequence[str]
    values: Mapping[str, bytes]
    filters: bytes


@dataclass(frozen=True)
class Ended:
    """The word of a rank on which nothing failed. An outcome of pytest's: skip or xfail, or None."""

    outcome: type[BaseException] | None = None
    reason: str = ""


class Pool:
    """As many ranks as the largest test so far has asked for; a test of n runs on the first n.

    After a failure all are ended, since nobody knows what state they are in, and the next test
    starts new ones.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._preload = preload
        self._ranks: list[ranks.Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tests = 0

    def run(self, task: Task) -> None:
        """Run a test, print what its ranks printed, and fail or skip as they did."""
        __tracebackhide__ = True
        try:
            text, ended = self._run(task)
        except BaseException:  # Ctrl-C, say
            self._end()
            raise
        if text:
            self._end()
            pytest.fail(text, pytrace=False)
        for word in ended:
            if word.outcome is not None:
                raise word.outcome(word.reason)

    def close(self) -> list[str]:
        """Let every rank end by itself; returns a complaint for each that did not do so well."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send(None)
        ranks.join(self._ranks, AT_EXIT)
        return [
            f"rank {number} of the pool: {how_it_ended(code)}, after its last test had ended"
            for number, code in enumerate(self._end())
            if code
        ]

    def _run(self, task: Task) -> tuple[str, list[Ended]]:
        self._tests += 1
        text = self._ready(task.size)
        if text:
            return text, []
        working = self._ranks[: task.size]
        for rank in working:
            os.truncate(self._file(rank, "printed"), 0)
            with contextlib.suppress(OSError):  # if it has just died, gather will say so
                rank.pipe.send((str(self._file(rank, "")), task))
        text, ended = self._hear(working, task.timeout)
        for rank in working:
            if printed := self._file(rank, "printed").read_text(errors="replace"):
                print(heading(f"rank {rank.number} printed") + printed, end="")
        return text, ended
