"""The checkpoints of a training run: from which one it goes on, and when it saves another.

They are in OUT/checkpoints. A run goes on only with the settings that decide what it computes:
model, data, batch, optimizer. All others may change, such as the number of ranks or the strategy.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.files import Files, as_machine_error
from dist_lab.checkpoint.load import load, open_newest
from dist_lab.checkpoint.manifest import ANOTHER, Damaged
from dist_lab.checkpoint.optimizer_state import unwrapped
from dist_lab.checkpoint.save import Tell
from dist_lab.checkpoint.state_check import check_stepped
from dist_lab.comm.agree import first_says, together
from dist_lab.data import Data
from dist_lab.data.custom import is_custom
from dist_lab.errors import MachineError, UserError, shown
from dist_lab.job import Job
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe.run_dir import CHECKPOINTS
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.resume import is_auto
from dist_lab.programs.cli.saved_settings import checked_settings
from dist_lab.programs.cli.settings import AtLeast, as_typed, flag
from dist_lab.programs.train.schedule import other_steps

# Settings that may not change when a run goes on.
MEANING = (
    "model", "size", "layers", "dropout", "sync_batchnorm", "data", "tokenizer", "seq", "batch",
    "seed", "dtype", "optimizer", "lr", "adamw_lr", "weight_decay", "warmup", "clip", "qat",
    "qat_inputs", "recipe",
)  # fmt: skip
KEEP = 2  # checkpoints, by default


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        first: the number of steps that were taken before this process was started.
        summary: the contents of summary.json, if these were all steps; else empty.
    """

    def __init__(
        self, job: Job, optimizer: Optimizer, config: Config, data: Data, out: Path, *,
        files: Files | None = None, tell: Tell = lambda line: None,
    ) -> None:  # fmt: skip
        """Resume, if `config.resume` says so. Collective.

        Args:
            out: the run's folder, the same on every rank.
            files: the file operations of saves.
            tell: called on rank 0 with lines for the user, from any thread.

        Raises:
            UserError: there is no such checkpoint, or it is of another model, data or settings.
            MachineError: it is damaged.
        """
        self._job, self._optimizer, self._config = job, optimizer, config
        self._meaning = meaning_of(config, data)
        self._settings = self._meaning | {"steps": config.steps}
        self._tokenizer = data.tokenizer.text if data.tokenizer is not None else None
        self._folder, self._tell = out.absolute() / CHECKPOINTS, tell
        self._files = files or Files()
        with together(job.mesh.world):
            if job.mesh.rank == 0:
                with as_machine_error(self._folder):
                    lost = folders.sweep(self._folder, Files())
                for step in lost if config.resume else ():
                    self._tell(f"the save of step {step} was not whole yet when the run ended")
        self.first, self.summary = self._resume() if config.resume else (0, {})
        self._saver = None
        if config.save_every:
            keep = KEEP if config.keep is None else config.keep
            self._saver = job.saver(
                self._folder, keep=keep, files=self._files, tell=tell, tokenizer=self._tokenizer
            )

    def due(self, step: int) -> bool:
        """Whether it is time to save after this step, which is not the last."""
        return self._saver is not None and step % self._config.save_every == 0

    def after(self, step: int) -> None:
        """A step has ended, after which it is time to save. Collective."""
        if self._saver is not None:
            self._saver.save(self._optimizer, step=step, settings=self._settings)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The last step has ended: save, together with the summary. Collective.

        Whoever resumes a run that was killed after this save takes no step that it could measure.
        """
        if self._saver is not None:
            extra = {"summary": dict(summary)}
            steps, settings = self._config.steps, self._settings
            self._saver.save(self._optimizer, step=steps, settings=settings, extra=extra)
            self._saver.finish()
            if self._job.mesh.rank == 0:
                self._tell(f"newest whole checkpoint: {self._saver.last}")

    def wait(self) -> None:
        """Wait for this rank's part of the last save: every rank is about to raise an error."""
        if self._saver is not None:
            self._saver.wait()

    def _resume(self) -> tuple[int, Mapping[str, Any]]:
        """Load the checkpoint that `config.resume` names. Returns its step and its summary."""
        mesh = self._job.mesh
        source = first_says(lambda: source_of(self._config, self._folder), mesh.world)
        if not source:
            if mesh.rank == 0:
                hint = "" if self._config.save_every else f"; {flag('save_every')} N saves some"
                self._tell(f"no checkpoint in {self._folder}: starting with step 1{hint}")
            return 0, {}
        checkpoint = open_newest(source, mesh, self._tell)
        with together(mesh.world):
            self._check_settings(str(checkpoint.folder), checkpoint.manifest["settings"])
            if is_custom(self._config.data):  # which may be the tokens of an imported model
                self._tokenizer = checkpoint.tokenizer
            if checkpoint.step and checkpoint.manifest["settings"]:  # of a run like this one
                kind = type(unwrapped(self._optimizer))
                check_stepped(str(checkpoint.folder), kind, checkpoint.tensors)
        with together(mesh.world):
            if mesh.rank == 0:
                with as_machine_error(self._folder):
                    self._set_aside(checkpoint.step)
        is_imported = checkpoint.step == 0 and checkpoint.tables[0]["optimizer"] is None
        only_weights = is_imported and not any(
            n.startswith("optimizer/") for n in checkpoint.names()
        )
        extra = load(checkpoint, self._job, None if only_weights else self._optimizer)
        if mesh.rank == 0:
            new = ", its moments with the options of this run" if is_imported else ""
            new = " with a new optimizer: it has only weights" if only_weights else new
            self._tell(f"resumed after step {checkpoint.step} from {checkpoint.folder}{new}")
            steps = (checkpoint.manifest["settings"] or {}).get("steps", self._config.steps)
            if line := other_steps(checkpoint.step, steps, self._config):
                self._tell(line)
        summary = extra.get("summary") or {}
        if not isinstance(summary, dict):
            raise Damaged(
                f"checkpoint {str(checkpoint.folder)!r} has a summary that is none; {ANOTHER}"
            )
        return checkpoint.step, summary

    def _check_settings(self, name: str, saved: Mapping[str, Any] | None) -> None:
        """Raise UserError if the run would go on as another one."""
        if saved is None:
            return  # saved by a script: only the model's tensors can be compared
        _ = checked_settings({k: saved[k] for k in (*MEANING, "steps") if k in saved}, name)
        meaning = self._meaning
        if is_custom(self._config.data):  # nobody knows whose tokens these are
            meaning = {k: v for k, v in meaning.items() if not k.startswith("tokenizer")}
        different = [k for k, value in meaning.items() if saved.get(k, value) != value]
        if {"tokenizer", "data_sha256"} & {*different}:
            different = [k for k in different if k != "tokenizer_sha256"]  # a consequence
        if different:
            was = ", ".join(
                f"{k} {shown(saved[k])} (now {shown(self._meaning[k])})" for k in different
            )
            settings = [k for k in different if k in MEANING]
            given = " ".join(as_typed(k, saved[k]) for k in settings if saved[k] is not None)
            left_out = " and ".join(f"no {flag(k)}" for k in settings if saved[k] is None)
            typed = ", and ".join(filter(None, (given, left_out)))
            if different == ["tokenizer_sha256"]:
                typed = "its text, and the library tokenizers in the version that trained on it"
            raise UserError(
                f"checkpoint {name!r} is of a run with {was} ({flag('resume')}); give "
                f"{typed or 'its data'}"
            )

    def _set_aside(self, step: int) -> None:
        """Make room for the steps to come: in this run's folder there may be damaged ones."""
        if whole := folders.set_aside_damaged(self._folder, step + 1, self._files):
            raise UserError(
                f"{str(self._folder)!r} has checkpoints after step {step}, such as "
                f"{whole[0].name} ({flag('resume')}); give another folder ({flag('out')}), or move "
                "them away"
            )


def meaning_of(config: Config, data: Data) -> dict[str, Any]:
    """The settings that decide what a run computes, as JSON."""
    settings = config.to_dict()
    tokenizer = data.tokenizer.sha256 if data.tokenizer is not None else ""
    hashes = {"data_sha256": data.sha256, "tokenizer_sha256": tokenizer}
    return {name: settings[name] for name in MEANING} | hashes


def source_of(config: Config, folder: Path) -> str:
    """The folder to load from, `folder` being that of the run's own checkpoints; "" for none."""
    wanted = config.resume
    if is_auto(wanted):
        if folders.steps(folder):
            return str(folder)
        wanted = wanted.partition(":")[2]
    path = Path(wanted).expanduser()
    return str(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path) if wanted else ""


def with_saved_batch(config: Config, mesh: Mesh) -> Config:
    """Returns this Config; a default batch is that of the run that goes on. Collective.

    The default depends on the number of ranks, and a run may go on with another number.
    """
    if not (config.resume and isinstance(config.batch, AtLeast)):
        return config.fitted(mesh.size)

    def saved() -> str:
        source = Path(source_of(config, Path(config.out).expanduser() / CHECKPOINTS))
        alone = [source] if folders.is_checkpoint(source) else []
        for path in alone or [path for _, path in folders.steps(source)]:
            with suppress(UserError, MachineError):  # loading says what is wrong with it
                settings = manifest.read(path)["settings"] or {}
                batch = {"batch": settings.get("batch")}
                return str(checked_settings(batch, path).get("batch", 0))
        return "0"

    batch = int(first_says(saved, mesh.world))
    if not batch:
        return config.fitted(mesh.size)
    config = replace(config, batch=batch)
    config.axes(mesh.size)
    return config.fitted(mesh.size)
