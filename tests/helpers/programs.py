"""Runs the programs of launch/ in this process, whose forkserver is warm: 0.3 s instead of 3 s.

At least one test of each program starts it in a new Python process, or by torchrun.
"""

import contextlib
import io
import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_lab.processes import launcher

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """The result of a program, with the names of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


def run(program: str, *arguments: Any) -> Done:
    """Run launch/<program> with these arguments, in the root of the repository."""
    path = str(ROOT / "launch" / program)
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        patch.setattr(launcher, "new_rank", partial(rank_that_prints_into, folder))
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            runpy.run_path(path, run_name="__main__")
        rank_out, rank_err = (
            "".join(file.read_text() for file in sorted(Path(folder).glob(f"{kind}-*")))
            for kind in ("stdout", "stderr")
        )
    return Done(ended.value.code, out.getvalue() + rank_out, err.getvalue() + rank_err)


def refusal(program: str, *arguments: Any) -> str:
    """The one line with which a program refuses its arguments."""
    done = run(program, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def rank_that_prints_into(folder: str, pipe: Any, rank: int, *arguments: Any) -> None:
    """Run a rank with its output in files, because its stdout is the forkserver's, not ours."""
    for stream, kind in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        file = os.open(f"{folder}/{kind}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
        os.close(file)
    launcher.new_rank(pipe, rank, *arguments)
