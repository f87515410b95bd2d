"""The commands of checkpoint.py: name -> function."""

from collections.abc import Callable, Mapping
from typing import Any

from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.checkpoint.contents import show
from dist_lab.programs.checkpoint.difference import compare
from dist_lab.programs.checkpoint.forms import export, import_
from dist_lab.programs.checkpoint.reshard import reshard
from dist_lab.programs.checkpoint.settings import (
    Command,
    Diff,
    Export,
    Import,
    Inspect,
    Reshard,
    Verify,
)
from dist_lab.programs.checkpoint.whole import verify

FUNCTIONS: Mapping[type[Command], Callable[[Any], int]] = {
    Inspect: show, Verify: verify, Reshard: reshard, Diff: compare, Export: export, Import: import_,
}  # fmt: skip


def checkpoint(config: Command, mesh: Mesh) -> int:
    """Run one command. Returns the exit status."""
    return FUNCTIONS[type(config)](config)
