"""Faults in the middle of a save: at the k-th file operation of one rank's part of a checkpoint.

`op` counts all operations, for `diskfull` only writes and for `truncate` only complete files. The
step is read from the path, because a save in the background ends in a later step.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dist_lab.checkpoint.files import Files
from dist_lab.faults.grammar import Fault

STEP = re.compile(r"step-(\d{8,})")
COUNTED = {"diskfull": "write", "truncate": "sync"}  # kind -> the only operation that it counts
Happen = Callable[[int, Fault], None]


class FilesWithFaults(Files):
    """The operations of `Files`, before each of which a fault may happen.

    Args:
        faults: number -> fault, those of this rank that have not happened yet.
        happen: makes the fault of a number happen, unless it is of a file.
    """

    def __init__(self, faults: dict[int, Fault], happen: Happen) -> None:
        self.faults, self.happen, self.step = faults, happen, 0
        self.counts = Counter[tuple[int, str]]()

    def make_folder(self, path: Path) -> None:
        self._before("make_folder", path)
        super().make_folder(path)

    def create(self, path: Path) -> BinaryIO:
        self._before("create", path)
        return super().create(path)

    def write(self, file: BinaryIO, data: memoryview) -> int:
        self._before("write", Path(file.name))
        return super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._before("sync", Path(file.name))
        super().sync(file)

    def rename(self, old: Path, new: Path) -> None:
        self._before("rename", old)
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        self._before("sync_folder", path)
        super().sync_folder(path)

    def remove_folder(self, path: Path) -> None:
        self._before("remove_folder", path)
        super().remove_folder(path)

    def _before(self, operation: str, path: Path) -> None:
        steps = STEP.findall(str(path))
        self.step = int(steps[-1]) if steps else self.step
        self.counts[self.step, ""] += 1
        self.counts[self.step, operation] += 1
        for number, fault in list(self.faults.items()):
            counted = COUNTED.get(fault.kind, "")
            here = fault.phase == "save" and fault.step == self.step and counted in ("", operation)
            if here and self.counts[self.step, counted] == fault.op:
                self.happen(number, fault)
                if fault.kind == "diskfull":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                if fault.kind == "truncate":
                    os.truncate(path, path.stat().st_size // 2)
