"""Writes a checkpoint of several ranks in one process, one rank after another.

Needs the memory of one rank's part at a time. The files and their order are those of a save by real
ranks (save.py), so a write that is interrupted leaves no checkpoint here, either.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.files import Files, as_machine_error
from dist_lab.checkpoint.save import Write, packed
from dist_lab.checkpoint.shard import Buffer


class OfflineWriter:
    """Writes one new checkpoint: `write` for each rank, then `commit`; used as a context manager.

    Attributes:
        final: the folder of the checkpoint, which is there after `commit`.
        about: what the manifest will say; until `commit` it can be added to.
    """

    def __init__(
        self, root: Path, step: int, axes: Mapping[str, int], about: Mapping[str, Any], *,
        files: Files | None = None, tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            root: the folder of checkpoints.
            about: what the manifest says besides: strategies, optimizer, settings, extra, versions.
            tokenizer: the contents of tokenizer.json, if the checkpoint has one.

        Raises:
            UserError: there is a checkpoint of this step.
        """
        self.final = root / folders.name_of(step)
        self._files, self._buffer, self._size = files or Files(), Buffer(), math.prod(axes.values())
        self.about = {"format": manifest.FORMAT, "step": step, "mesh": dict(axes), **about}
        self._tokenizer = tokenizer
        self._temporary = folders.beside(self.final, "tmp")
        self._last: Write | None = None

    def __enter__(self) -> "OfflineWriter":
        with as_machine_error(self.final):
            folders.check_free(self.final)
            self._files.make_folder(self._temporary)
        return self

    def __exit__(self, *error: object) -> None:
        if self._temporary.exists():
            self._files.remove_folder(self._temporary)

    def write(self, rank: int, entries: Sequence[Entry], table: Mapping[str, Any]) -> None:
        """Write one rank's part: the entries that it is the first to hold, and its table."""
        data, tensors = packed(entries, self._buffer)
        write = Write(
            rank, self._size, self._temporary, self.final, data,
            {"tensors": tensors, **table}, self.about, self._files, _say_nothing,
            tokenizer=self._tokenizer,
        )  # fmt: skip
        with as_machine_error(self.final, len(data)):
            write.write_part()
        self._last = write

    def commit(self) -> Path:
        """Make what was written a checkpoint. All ranks must have been written."""
        assert self._last is not None
        with as_machine_error(self.final):
            self._last.commit()
        return self.final


def _say_nothing(line: str) -> None:
    """A part is written in a moment, so that nobody needs a line of progress."""
