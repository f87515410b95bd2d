"""Save a job, now or while training goes on.

    saver = job.saver("checkpoints", keep=2)
    saver.save(optimizer, step=120)              blocks for a copy; a thread writes it
    saver.finish()                               waits for the last one

The copy is of what this rank is the first to hold: under fsdp=4 a quarter of the model and of the
moments. It is kept and used again for the next save. The thread rests most of the time, until
somebody waits for it: see pace.py. A save waits for the one before it. An error of a save in the
background is raised by the next save, or by `finish`, on every rank.

A small checkpoint is written at once: that takes less than the rests would, and so it is whole
before the next step, whatever happens in it.
"""

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from dist_lab.checkpoint import manifest
from dist_lab.checkpoint import table as tables
from dist_lab.checkpoint.entries import Entry, Trained, entry_of, extra_state, model_entries
from dist_lab.checkpoint.files import Files
from dist_lab.checkpoint.optimizer_state import numbers_of, optimizer_entries, options_of
from dist_lab.checkpoint.save import Tell, Write, prepare
from dist_lab.checkpoint.shard import Buffer
from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.errors import UserError, shown
from dist_lab.randomness import generators
from dist_lab.step.shadow import Shadow

AT_ONCE = 16 * 10**6  # bytes of a checkpoint that is not worth a thread


class Saver:
    """Saves one job to one folder, again and again.

    Attributes:
        last: the last checkpoint that is whole, as far as this rank knows.
    """

    def __init__(
        self, job: Trained, folder: str | Path, *, keep: int | None = None,
        in_background: bool = True, files: Files | None = None, tell: Tell = lambda line: None,
        tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            folder: of the checkpoints, shared by all ranks.
            keep: delete all but the newest `keep`, after each save; None deletes none.
            in_background: write in a thread if there are more than AT_ONCE bytes. If not, `save`
                returns when the checkpoint is whole.
            files: the file operations.
            tell: called with a line of progress now and then, on rank 0, from any thread.
            tokenizer: the contents of a tokenizer.json, which each checkpoint then has.
        """
        if keep is not None and (type(keep) is not int or keep < 1):
            raise UserError(f"keep={shown(keep)} keeps no checkpoint; give 1 or more")
        self.job, self.folder = job, Path(folder).expanduser().absolute()
        self.keep, self.in_background = keep, in_background
        self.files, self.tell, self.tokenizer = files or Files(), tell, tokenizer
        self.last: Path | None = None
        self._buffer = Buffer()
        self._writing: tuple[Write, threading.Thread | None] | None = None

    def save(
        self, optimizer: Optimizer | None = None, *, step: int | None = None,
        shadow: Shadow | None = None, extra: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        """Save the state as it is now, between two steps. Collective.

        Args:
            step: the number of steps that were taken; default: those that the job has finished.
            shadow: a moving average of the weights, see `job.shadow`.
            extra: anything that is JSON, such as {"scheduler": scheduler.state_dict()}; `load`
                returns it.
            settings: of the run, as JSON, to compare when it is resumed.

        Returns:
            The folder of the new checkpoint, which is whole when the save has ended.

        Raises:
            UserError: there is a checkpoint of this step, or something cannot be saved.
            MachineError: a file cannot be written, now or in the save before.
        """
        self.finish()
        job, world = self.job, self.job.mesh.world
        with world.comm.label("save", unit=""):
            job.settle()
        with world.comm.label("save", unit=""), together(world):
            step = checked_step(job.place.step if step is None else step)
            about = {
                "strategies": job.strategies,
                "optimizer": options_of(optimizer, job) if optimizer else None,
                "settings": checked_mapping("settings", settings),
                "extra": checked_mapping("extra", extra),
                "tied": dict(job.tied),
                "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            }
            table = {
                "random": generators.to_json(),
                "optimizer": about["optimizer"],
                "numbers": numbers_of(optimizer, job) if optimizer else {},
                "modules": extra_state(job.model),
            }
            for name, value in {**about, **table}.items():
                check_json(name, value)
            entries = [*entries_of(job, optimizer, shadow)]
        own = sum(entry.local.nbytes for entry in entries if entry.is_first)
        with world.comm.label("save", unit=""):
            total = int(ops.all_reduce(torch.tensor(own, device=world.device), world))
        write = prepare(
            job.mesh, self.folder, step, entries, table, about, self._buffer, files=self.files,
            tell=self.tell, keep=self.keep, tokenizer=self.tokenizer, is_first=self.last is None,
        )  # fmt: skip
        thread = None
        if self.in_background and total > AT_ONCE:
            thread = threading.Thread(target=behind, args=[write], name="checkpoint", daemon=True)
            thread.start()
        else:
            write.pace.hurry()
            write.run()
        self._writing = write, thread
        if thread is None:
            self.finish()
        return write.final

    def finish(self) -> None:
        """Wait until the last save has ended, and raise its error on every rank. Collective."""
        if self._writing is None:
            return
        (write, thread), self._writing = self._writing, None
        if thread is not None:
            write.pace.hurry()
            thread.join()
        world = self.job.mesh.world
        with world.comm.label("save", unit=""), together(world):
            if write.error is not None:
                raise write.error
        self.last = write.final

    def wait(self) -> None:
        """Wait until this rank's part of the last save is written. Not collective.

        For an error that every rank raises, such as a loss that is NaN: the checkpoint is good.
        """
        if self._writing is not None and (thread := self._writing[1]) is not None:
            self._writing[0].pace.hurry()
            thread.join()


def behind(write: Write) -> None:
    """Write in this thread, behind training: if all cores are busy, training goes first."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    write.run()


def entries_of(job: Trained, optimizer: Optimizer | None, shadow: Shadow | None) -> Iterator[Entry]:
    """All that is saved as tensors."""
    yield from model_entries(job)
    if optimizer is not None:
        yield from optimizer_entries(optimizer, job)
    if shadow is not None:
        yield from shadow_entries(job, shadow)


def shadow_entries(job: Trained, shadow: Shadow) -> Iterator[Entry]:
    """The moving averages lie as the parameters do."""
    for name, average in shadow.averages.items():
        yield entry_of(f"shadow/{name}", job.layouts[name], average, job.mesh)


def checked_step(step: Any) -> int:
    """Returns the step. Raises UserError unless it is a number of steps."""
    if type(step) is not int or not 0 <= step <= tables.LARGEST:
        raise UserError(f"step={shown(step)} is no number of steps; give a whole one, 0 or more")
    return step


def checked_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """Returns the value. Raises UserError unless it is a mapping or None."""
    if not isinstance(value, Mapping | None):
        raise UserError(f"{name}={shown(value)} is no mapping; give a dict, or leave it out")
    return None if value is None else dict(value)


def check_json(name: str, value: Any) -> None:
    """Raise UserError unless a checkpoint can hold the value and give it back."""
    try:
        manifest.sealed({name: value})
    except (TypeError, ValueError, RecursionError) as error:
        what = {"modules": "the extra state of a module"}.get(name, f"{name}=")
        raise UserError(
            f"{what} is no JSON ({error}), which a checkpoint holds; make it of numbers, texts, "
            "lists and dicts"
        ) from error
