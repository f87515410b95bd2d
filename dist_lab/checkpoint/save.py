"""Saving: each rank writes what it is the first to hold, and rank 0 makes it a checkpoint.

    main thread, all ranks     copy the tensors; rank 0 makes step-00000120.tmp-...
    any thread, each rank      rank-K.safetensors, then rank-K.json, each brought to disk
    any thread, rank 0         when all rank-K.json are there: tokenizer.json, if there is one,
                               manifest.json with the hash of every file, and then the folder's
                               name becomes step-00000120

The new name is the last operation, and the file system does it at once or not at all. So a folder
with that name is a whole checkpoint, wherever the run was stopped. Only the first part is
collective; ranks meet in the folder, which they must share anyway. So the second part may run in a
thread while training goes on: see saver.py.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.files import Files, as_machine_error, sha256_of, write_file
from dist_lab.checkpoint.pace import Pace
from dist_lab.checkpoint.shard import Buffer
from dist_lab.comm.agree import first_says
from dist_lab.errors import MachineError
from dist_lab.mesh.mesh import Mesh

PATIENCE = 120.0  # seconds for which no file of the checkpoint has grown
TELL_EVERY = 2.0  # seconds between two lines of progress

Tell = Callable[[str], None]


@dataclass
class Write:
    """One rank's part of a save, copied and ready to be written. `run` is not collective.

    It rests between its pieces until `pace.hurry()` says that somebody waits.
    """

    rank: int
    size: int
    temporary: Path
    final: Path
    data: memoryview
    table: dict[str, Any]
    about: Mapping[str, Any]  # what the manifest says
    files: Files
    tell: Tell
    keep: int | None = None
    tokenizer: str | None = None  # the contents of tokenizer.json
    pace: Pace = field(default_factory=Pace, init=False)
    error: Exception | None = field(default=None, init=False)

    def run(self) -> None:
        """Write this rank's files, and wait until rank 0 has made them a checkpoint.

        An error is kept in `error`, because this may run in a thread.
        """
        began = time.monotonic()
        try:
            with as_machine_error(self.final, len(self.data)):
                self.write_part()
                if self.rank == 0:
                    self.commit()
                    seconds = time.monotonic() - began
                    if seconds > TELL_EVERY and self.final.exists():
                        self.tell(f"{self.final.name}: whole after {seconds:.1f} s")
                else:
                    self._wait(self.final.exists)
                if self.rank == 0 and self.keep is not None and self.final.exists():
                    self._read_again()
                    folders.prune(self.final, self.keep, self.files)
        except Exception as error:
            self.error = error
        if not self.final.exists():
            self._give_up()

    def write_part(self) -> None:
        """Write this rank's files."""
        shard, name = f"rank-{self.rank}.safetensors", f"rank-{self.rank}.json"
        path = self.temporary / shard
        self.table["file"] = write_file(self.files, path, self.data, self.pace, self._progress())
        # Rank 0 reads the table as soon as it has its name.
        new = self.temporary / f"{name}.new"
        write_file(self.files, new, memoryview(json.dumps(self.table).encode()), self.pace)
        self.files.rename(new, self.temporary / name)

    def commit(self) -> None:
        """Make the files of all ranks a checkpoint, once they are there."""
        tables = [self.temporary / f"rank-{rank}.json" for rank in range(self.size)]
        if not self._wait(lambda: all(path.exists() for path in tables)):
            return
        about: dict[str, Any] = {}
        for path in tables:
            about[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            about[f"{path.stem}.safetensors"] = json.loads(path.read_bytes())["file"]
        if self.tokenizer is not None:
            path, data = self.temporary / manifest.TOKENIZER, self.tokenizer.encode()
            about[path.name] = write_file(self.files, path, memoryview(data), self.pace)
        text = manifest.sealed({**self.about, "files": about})
        write_file(self.files, self.temporary / manifest.NAME, memoryview(text), self.pace)
        self.files.sync_folder(self.temporary)
        self.files.rename(self.temporary, self.final)
        self.files.sync_folder(self.final.parent)

    def _read_again(self) -> None:
        """Compare what is on disk with what was written, before an older checkpoint is deleted."""
        try:
            manifest.verify(self.final, self.pace)
        except manifest.Damaged as error:
            raise manifest.Damaged(
                f"{self.final.name} was read again after the save, and is damaged; no other "
                f"checkpoint was deleted: {error}"
            ) from error

    def _wait(self, arrived: Callable[[], bool]) -> bool:
        """Wait until something is there. False if another rank has failed: it says why.

        Raises:
            MachineError: nothing has happened for PATIENCE seconds, or the folder was removed.
        """
        seen, since = -1, time.monotonic()
        while not arrived():
            # In this order: rank 0 renames the one to the other, which are never both missing.
            if not self.temporary.exists() and not self.final.exists():
                raise MachineError(
                    f"checkpoint {str(self.final)!r} was removed or renamed while rank {self.rank} "
                    "waited for it; save it again, and leave its folder alone meanwhile"
                )
            now, failed = 0, False
            with suppress(FileNotFoundError):  # rank 0 renames files, and at last the folder
                for path in self.temporary.iterdir():
                    failed = failed or path.suffix == ".failed"
                    now += 1 + path.stat().st_size
            if failed:
                return arrived()
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                late = [
                    rank
                    for rank in range(self.size)
                    if not (self.temporary / f"rank-{rank}.json").exists()
                ]
                raise MachineError(
                    f"checkpoint {str(self.final)!r}: ranks {late or [0]} have written nothing for "
                    f"{PATIENCE:g} s; all ranks must share the folder"
                )
            self.pace.rest()
            time.sleep(0.005)
        return True

    def _give_up(self) -> None:
        """Free the space of a save that has failed. The last rank to do so removes the folder.

        Until rank 0 gives up, it may be about to commit: then a part that is complete must stay.
        """
        own = f"rank-{self.rank}."
        complete = (self.temporary / f"{own}json").exists()
        over = self.rank == 0 or (self.temporary / "rank-0.failed").exists()
        with suppress(OSError):  # the error of the save is the one to raise
            for path in self.temporary.iterdir():
                is_own = path.name.startswith(own) and (over or not complete)
                if path.suffix != ".failed" and (is_own or self.rank == 0):
                    path.unlink(missing_ok=True)
            (self.temporary / f"{own}failed").touch()
            if len([*self.temporary.glob("*.failed")]) == self.size:
                self.files.remove_folder(self.temporary)

    def _progress(self) -> Callable[[int], None]:
        """Returns what is called after each write: now and then rank 0 tells how far it is."""
        total, done, last = len(self.data), 0, time.monotonic()

        def wrote(size: int) -> None:
            nonlocal done, last
            done += size
            if self.rank == 0 and time.monotonic() - last > TELL_EVERY:
                last = time.monotonic()
                megabytes = f"{total / 1e6:,.0f} MB a rank"
                self.tell(f"{self.final.name}: {done / total:.0%} of {megabytes} written")

        return wrote


def prepare(
    mesh: Mesh,
    root: Path,
    step: int,
    entries: Sequence[Entry],
    table: Mapping[str, Any],
    about: Mapping[str, Any],
    buffer: Buffer,
    *,
    files: Files,
    tell: Tell,
    keep: int | None,
    tokenizer: str | None,
    is_first: bool,
) -> Write:
    """Copy the entries that this rank is the first to hold. Collective.

    Args:
        root: the folder of checkpoints.
        table, about: what this rank's table, and the manifest, say besides.
        is_first: no checkpoint was saved there yet. Those of later steps may be damaged.
    """
    final = root / folders.name_of(step)

    def make() -> str:
        with as_machine_error(root):
            if is_first:
                folders.set_aside_damaged(root, step, files)
            folders.check_free(final)
            temporary = folders.beside(final, "tmp")
            files.make_folder(temporary)
        return temporary.name

    with mesh.comm.label("save", unit=""):
        temporary = root / first_says(make, mesh.world)
    data, tensors = packed(entries, buffer)
    return Write(
        mesh.rank, mesh.size, temporary, final, data, {"tensors": tensors, **table},
        {"format": manifest.FORMAT, "step": step, "mesh": dict(mesh.axes), **about}, files, tell,
        keep, tokenizer,
    )  # fmt: skip


def packed(
    entries: Sequence[Entry], buffer: Buffer
) -> tuple[memoryview, dict[str, dict[str, Any]]]:
    """The bytes of a rank's file, and the table of its tensors: of entries it is the first to hold.

    The bytes are valid until the buffer is used again.
    """
    own = [entry for entry in entries if entry.is_first and entry.boxes]
    data = buffer.pack([(entry.name, _local(entry)) for entry in own])
    tensors = {
        entry.name: {
            "shape": list(entry.shape),
            "dtype": str(entry.local.dtype).removeprefix("torch."),
            "boxes": [[[side.start, side.stop] for side in box] for box in entry.boxes],
        }
        for entry in own
    }
    return data, tensors


def _local(entry: Entry) -> torch.Tensor:
    """This rank's elements: in the shape of the box, or as a vector if there are several."""
    if len(entry.boxes) > 1:
        return entry.local.reshape(-1)
    return entry.local.reshape([side.stop - side.start for side in entry.boxes[0]])
