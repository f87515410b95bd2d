"""The settings of checkpoint.py: one class for each of its commands. Does not import torch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dist_lab.errors import UserError, one_of, shown
from dist_lab.programs.cli.checks import check_strategy
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.mesh_text import read_mesh
from dist_lab.programs.cli.ranks import RankSettings
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.cli.settings import flag, kind, own_first, setting
from dist_lab.programs.cli.settings import read as read_settings

WITHOUT = ("nproc", "oversubscribe", "threads", "backend", "timeout")
LARGEST_FILE = 5000  # MB, as transformers writes by default


@dataclass(frozen=True)
class Command(RankSettings):
    """What all commands have in common: they run in one process.

    `words`: the settings that come first on the command line, without a flag.
    """

    words: ClassVar[tuple[str, ...]] = ()

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns {}: no rank is started."""
        if size > 1:
            raise UserError(
                f"checkpoint.py runs in one process, {size} were started; type python "
                "launch/checkpoint.py ..."
            )
        return {}


@dataclass(frozen=True)
class Inspect(Command):
    """What is in a checkpoint: step, settings, tensors, and which rank has saved what."""

    words = ("checkpoint",)
    # fmt: off
    checkpoint: str = setting("", "a checkpoint, a folder of them, or of a run", metavar="DIR",
        heading="common settings")
    tensors: bool = setting(False, "list every tensor, not only the first ones")
    # fmt: on


@dataclass(frozen=True)
class Verify(Command):
    """Compare every file of a checkpoint with its SHA-256. 0 if all are whole, else 1."""

    words = ("checkpoint",)
    # fmt: off
    checkpoint: str = setting("", "a checkpoint, or a folder of them or of a run: all of its "
        "checkpoints", metavar="DIR", heading="common settings")
    # fmt: on


@dataclass(frozen=True)
class Reshard(Command):
    """Write a checkpoint in another layout. Its ranks are built here, one after another."""

    words = ("source", "target")
    # fmt: off
    source: str = setting("", "the checkpoint to read", metavar="DIR", heading="common settings")
    target: str = setting("", "the folder to write to: DIR/step-...", metavar="DIR")
    mesh: Mapping[str, int] | None = setting(None, "ranks along each axis of the new mesh; default:"
        " one process", metavar="AXIS=N,...", read=read_mesh)
    strategy: str | None = setting(None, "the strategy of dp and fsdp; default: what --mesh "
        "implies", choices=tuple(STRATEGIES))
    schedule: str | None = setting(None, "the schedule of a pipeline, which decides how many stages"
        " a rank has: as in train.py", metavar="NAME|FILE")
    chunks: int | None = setting(None, "stages per rank for --schedule interleaved", low=1)
    data: str = setting("", "the run's own data, whose code the checkpoint only names: it runs if "
        "you give it", metavar="module:function")
    # fmt: on


@dataclass(frozen=True)
class Diff(Command):
    """Which tensors of two checkpoints differ, and how much; in any layouts. 0 if equal, else 1."""

    words = ("first", "second")
    # fmt: off
    first: str = setting("", "a checkpoint, or the newest one in a folder", metavar="DIR",
        heading="common settings")
    second: str = setting("", "the other one", metavar="DIR")
    tensors: bool = setting(False, "list every tensor that differs, not only the first ones")
    # fmt: on


@dataclass(frozen=True)
class Export(Command):
    """Write a checkpoint as other programs' files: see dist_lab/checkpoint/exchange."""

    words = ("source", "target")
    # fmt: off
    source: str = setting("", "the checkpoint to export", metavar="DIR", heading="common settings")
    target: str = setting("", "a new folder, or for torch a new file", metavar="DIR|FILE")
    to: str = setting("", "hf: Hugging Face's files, for gpt; dcp: torch.distributed.checkpoint, "
        "with the optimizer; torch: a state_dict file", choices=("hf", "dcp", "torch"))
    file_mb: int = setting(LARGEST_FILE, "hf: the most megabytes in one file", low=1, high=10**6)
    # fmt: on


@dataclass(frozen=True)
class Import(Command):
    """Write a checkpoint from other programs' files, which it recognizes by their names."""

    words = ("source", "target")
    # fmt: off
    source: str = setting("", "a folder of Hugging Face or of torch.distributed.checkpoint, or a "
        "state_dict file", metavar="DIR|FILE", heading="common settings")
    target: str = setting("", "the folder to write to: DIR/step-...", metavar="DIR")
    dtype: str = setting("", "convert floating-point numbers; train.py loads float32, or with "
        "--dtype float64 float64; default: as they are", choices=("", "float32", "float64"))
    # fmt: on


COMMANDS: Mapping[str, type[Command]] = {
    "inspect": Inspect, "verify": Verify, "reshard": Reshard, "diff": Diff, "export": Export,
    "import": Import,
}  # fmt: skip


def read(argv: Sequence[str] | None, description: str | None) -> Command:
    """Read the command line of checkpoint.py. Raises UserError for every mistake visible in it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        raise UserError(f"no command {shown(words[0])}; give {one_of(list(COMMANDS), words[0])}")
    if not words or words[0] not in COMMANDS:
        read_settings(Command, words, "checkpoint.py COMMAND", description, {}, WITHOUT)  # --help
        raise UserError(f"a command is missing; give {one_of(list(COMMANDS), '')} first")
    name, cls = words[0], COMMANDS[words[0]]
    places = " ".join(_places(cls))
    words = with_flags(words[1:], cls)
    program = f"checkpoint.py {name} {places}"
    config, _ = read_settings(cls, words, program, cls.__doc__, {}, WITHOUT)
    missing = [word for word in cls.words if not getattr(config, word)]
    if missing:
        raise UserError(f"{name} needs {places}; type checkpoint.py {name} {places}")
    if isinstance(config, Export) and not config.to:
        raise UserError("to cannot be '' (--to); give hf, dcp or torch")
    if isinstance(config, Reshard):
        _ = layout_of(config)  # raises if the mesh and the strategy do not fit
    return config


def layout_of(config: Reshard, **settings: Any) -> Config:
    """The Config of a run in the new layout, with these settings of the old one."""
    run = Config(
        mesh=config.mesh, strategy=config.strategy, schedule=config.schedule, chunks=config.chunks,
        **settings,
    )  # fmt: skip
    check_strategy(run, {option.name: flag(option.name) for option in fields(Config)})
    return run


def with_flags(argv: Sequence[str], cls: type[Command]) -> list[str]:
    """Puts its flag in front of each word that belongs to none, in the order of `cls.words`.

    >>> with_flags(["A", "--mesh", "dp=2", "B"], Reshard)
    ['--source=A', '--mesh', 'dp=2', '--target=B']
    """
    wants_value = {flag(option.name) for option in fields(cls) if kind(option) is not bool}
    free, words = list(cls.words), list[str]()
    before = ""
    for word in argv:
        if not word.startswith("-") and before not in wants_value and free:
            word = f"{flag(free.pop(0))}={word}"
        words.append(word)
        before = word
    return words


def _places(cls: type[Command]) -> list[str]:
    options = own_first(cls)
    return [options[word].metadata["metavar"] for word in cls.words]
