"""What a run is asked to do: one frozen Config, from defaults < a TOML file < the command line.

A setting is a field: its type, default, help and limits are data, from which `settings` derives its
flag (`--val-every`), its TOML key (`val_every`), its checks and its line in --help. To add a
setting is to add a field. What no field can know alone is checked in checks.py, and what depends on
the number of processes in `Config.axes`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dist_lab.comm.by_hand.costs import SETTINGS
from dist_lab.errors import UserError
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.library import make
from dist_lab.programs.cli.mesh_text import read_mesh
from dist_lab.programs.cli.registry import ALL_SIZES, MODELS, STRATEGIES
from dist_lab.programs.cli.settings import AtLeast, setting


@dataclass(frozen=True)
class RunSettings(ABC):
    """The settings that programs of runs share. None: chosen when the run starts, as help says."""

    # fmt: off
    strategy: str = setting("single", "how the work is shared out over processes",
        choices=tuple(STRATEGIES), heading="what most runs set")
    impl: str = setting("hand", "who wrote the strategy: this project, PyTorch or accelerate",
        choices=("hand", "torch", "accelerate"))
    mesh: Mapping[str, int] | None = setting(None, "processes along each axis; default: all on the "
        "strategy's own", metavar="dp=N", read=read_mesh)
    nproc: int | None = setting(None, "start so many ranks on this machine; default: this process, "
        "or those that torchrun started", low=1)
    model: str = setting("gpt", "of text: a transformer, or a neural n-gram of residual MLP "
        "blocks; of images: a vision transformer, or a ResNet", choices=tuple(MODELS))
    size: str = setting("tiny", "about 1, 8, 25 or 124 million parameters; resnet18 has 11 million "
        "and one size, tiny", choices=ALL_SIZES)
    data: str = setting("", "text: stdlib (Python's own source), a file, a folder; images: glyphs "
        "(characters drawn at random), mnist, cifar10, fake (noise) or fake:3x64x64; or "
        "module:function; default: stdlib or glyphs, as the model reads", metavar="SPEC")
    steps: int = setting(200, "optimizer steps", low=1)
    batch: int = setting(AtLeast(32), "samples a step, over all ranks; unless given, the next "
        "multiple of data-parallel ranks x microbatches", low=1)
    seq: int = setting(128, "tokens a sample of text; images have none", low=1)
    microbatches: int = setting(None, "pieces whose gradients a rank adds up before a step, and "
        "which under pp follow each other through the stages; default: 1, under pp 8", low=1)
    dtype: str = setting("float32", "of compute; bfloat16 keeps float32 master weights",
        choices=("float32", "bfloat16", "float64"))
    lr: float = setting(2e-3, "learning rate, after the warm-up", above=0)
    config: str = setting("", "a TOML file of these settings, keys with underscores; flags win",
        metavar="FILE")
    out: str = setting("", "folder to write into; train.py's default: a fresh runs/N-STRATEGY-...",
        metavar="DIR")

    bucket_mb: float | None = setting(None, "MiB of gradients that travel as one; default: 25",
        heading="ddp, zero1, zero2", above=0, high=2**20)

    reshard_after_forward: bool | None = setting(None, "let a unit go after its forward and "
        "gather it again for its backward; on unless --no-reshard-after-forward",
        heading="fsdp, hsdp")
    keep_gathered: bool | None = setting(None, "units stay whole from the first micro-batch's "
        "backward to the last one's")
    defer_reduce: bool | None = setting(None, "whole gradients are kept, and reduced after "
        "the last micro-batch alone")
    prefetch: bool | None = setting(None, "gather the next unit while one computes; on unless "
        "--no-prefetch")
    reduce_dtype: str | None = setting(None, "gradients travel, and are summed, in this; "
        "default: as they are kept", choices=("float32", "bfloat16", "float16"))
    offload: str | None = setting(None, "keep parameters and optimizer state in files in this "
        "folder; or, of an accelerator, in the memory of the host: cpu", metavar="DIR")

    sequence_parallel: bool | None = setting(None, "what flows between the blocks is cut along the "
        "sequence, so that norms and residuals are shared out as well", heading="tp")
    regather: bool | None = setting(None, "with --sequence-parallel, what a block reads is not "
        "kept whole for backward but gathered again: less memory, 1.25 times the bytes")

    schedule: str | None = setting(None, "gpipe, 1f1b, zb; with --layers 8 interleaved, zbv, whose "
        "8 stages on 4 ranks the 4 blocks of tiny cannot fill; or a file, one row a rank, cells "
        "such as 2F0: who computes what when; default: 1f1b", heading="pp", metavar="NAME|FILE")
    chunks: int | None = setting(None, "stages a rank, of interleaved; default: 2", low=1)
    pp_balance: str | None = setting(None, "cut the model so that the slowest stage is as fast "
        "as can be, or has as few blocks; default: cost", choices=("cost", "count"))
    emulate_compute: float | None = setting(None, "each forward is made to take so many "
        "milliseconds at least, each backward twice as many, without holding a core", above=0,
        high=1e5, metavar="MS")

    layers: int | None = setting(None, "blocks of the model; default: as its size has", low=1,
        high=10_000, heading="model and data")
    recompute: int = setting(0, "each k-th block forgets its activations, and computes them again "
        "in backward; 1: all; 0: none", low=0)
    sync_batchnorm: bool = setting(False, "BatchNorm over the rows of all ranks (resnet18)")
    download: bool = setting(False, "fetch mnist or cifar10 into --cache, if it is not there")
    cache: str = setting("~/.cache/dist_lab", "folder for text as bytes, and for mnist and cifar10",
        metavar="DIR")

    optimizer: str = setting("adamw", "what updates the weights", heading="optimizer",
        choices=("adamw", "sgd"))
    weight_decay: float = setting(0.1, "on matrices; norms and biases have none", low=0)
    warmup: int = setting(20, "steps over which the learning rate rises from 0", low=0)
    clip: float = setting(1.0, "largest norm of the whole gradient; 0: any", low=0)
    seed: int = setting(0, "of weights and data", low=0, high=2**63 - 1)

    oversubscribe: bool = setting(False, "allow --nproc above 4 ranks a core",
        heading="ranks, and what they say to each other")
    threads: int | None = setting(None, "of each rank; default: cores // ranks", low=1, high=1024)
    backend: str = setting("gloo", "who carries the bytes: gloo (CPU) or nccl (GPU)",
        choices=("gloo", "nccl"))
    collectives: str = setting("auto", "whose algorithms: the fastest as measured, the backend's "
        "own, or one family by hand where it has the operation; a library's strategy uses the "
        "backend's", choices=SETTINGS)
    timeout: float = setting(60.0, "seconds that any collective may take", low=0.1, high=86400)
    log_collectives: bool = setting(False, "print every collective as it is called")
    check_collectives: bool = setting(False, "before each collective, compare what the ranks are "
        "about to call")

    val_every: int = setting(100, "steps between validations; 0: only at the end", low=0,
        heading="logs, and errors")
    log_every: int = setting(10, "steps between logged rows", low=1)
    overwrite: bool = setting(False, "replace the logs of an earlier run in --out")
    about: str = setting("", "what this run is for; kept in its summary", metavar="TEXT")
    debug: bool = setting(False, "show the traceback of an error")
    # fmt: on

    def __post_init__(self) -> None:
        if not self.data:
            object.__setattr__(self, "data", MODELS[self.model].data)

    @abstractmethod
    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """The mesh that a program starts on so many processes; {}: one process alone.

        Args:
            plain: this is one process that nobody started as a rank: no --nproc, no torchrun.

        Raises:
            UserError: the settings do not fit so many processes.
        """

    def run(self, **changes: Any) -> "Config":
        """One run with these settings, but for some."""
        own = {option.name: getattr(self, option.name) for option in fields(Config)}
        return Config(**own | changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values: for the summary, and to compare ranks by."""
        return asdict(self)

    def data_wanted(self) -> dict[str, Any]:
        """The arguments of `data.check` and `data.open_data`."""
        return {
            "spec": self.data,
            "seq": self.seq,
            "cache_dir": Path(self.cache),
            "download": self.download,
            "fits": self.check_fits,
        }

    def check_fits(self, image: tuple[int, int, int] | None) -> None:
        """Raise UserError unless the model takes such data: images of that shape, or None, text."""
        MODELS[self.model].check_fits(self.data, image)


@dataclass(frozen=True)
class Config(RunSettings):
    """The settings of one run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatches is None:
            object.__setattr__(self, "microbatches", 8 if self.strategy == "pp" else 1)

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """The mesh of the run on so many processes, axis -> processes along it."""
        own, asked = STRATEGIES[self.strategy].axes, dict(self.mesh or {})
        wanted = math.prod(asked.values())
        if not own and size > 1:
            raise UserError(
                f"strategy {self.strategy} is for 1 process, {size} were started (--strategy); "
                "start 1, or give --strategy dp"
            )
        if own and plain:
            ranks = wanted if asked else 2
            raise UserError(
                f"strategy {self.strategy} runs on several processes, this is one alone "
                f"(--strategy); add --nproc {ranks}, or start it by torchrun "
                f"--nproc_per_node={ranks}"
            )
        if asked and wanted != size:
            by_axis = " x ".join(f"{name}={n}" for name, n in asked.items())
            raise UserError(
                f"mesh {by_axis} needs {wanted} processes, {size} were started (--mesh); type "
                f"torchrun --nproc_per_node={wanted} ... or --nproc {wanted}"
            )
        axes = self.mesh_on(size)
        if "pp" in axes:
            self.check_pipeline(axes["pp"])
        self.check_batch(axes)
        if "tp" in axes:
            self.check_split(axes["tp"])
        return axes

    def mesh_on(self, size: int) -> dict[str, int]:
        """The mesh that was asked for, or the strategy's own for so many processes; not checked."""
        return dict(self.mesh or STRATEGIES[self.strategy].default_axes(size))

    def fitted(self, size: int) -> "Config":
        """This run on so many processes: a batch that was not given is one that divides."""
        if isinstance(self.batch, AtLeast):
            return replace(self, batch=self.batch.divided_by(self.parts(self.mesh_on(size))))
        return self

    def parts(self, axes: Mapping[str, int]) -> int:
        """Into so many parts the rows of a batch are shared out."""
        ranks = math.prod(axes.get(name, 1) for name in DATA_AXES)
        return ranks * self.microbatches

    def check_split(self, ranks: int) -> None:
        """Raises UserError if so many ranks cannot share the model, or its sequence, out."""
        MODELS[self.model].check_split(self.size, self.impl, ranks)
        if self.sequence_parallel and MODELS[self.model].reads == "text" and self.seq % ranks:
            fitting = max(1, round(self.seq / ranks)) * ranks
            raise UserError(
                f"seq {self.seq} does not divide over {ranks} ranks of tp (--seq, "
                f"--sequence-parallel); give --seq {fitting}"
            )

    def pipeline(self, ranks: int) -> Schedule:
        """The schedule of a run under pp. Raises UserError if there is none for so many ranks."""
        return make(self.schedule or "1f1b", ranks, self.microbatches, self.chunks)

    def check_pipeline(self, ranks: int) -> None:
        """Raises UserError if there is no such schedule for so many ranks, or too few blocks."""
        schedule = self.pipeline(ranks)
        blocks = self.layers or MODELS[self.model].blocks(self.size)
        if schedule.stages > blocks:
            deeper = "" if self.model == "resnet18" else f"--layers {schedule.stages}, or "
            raise UserError(
                f"{schedule.stages} stages ({ranks} ranks of pp x {schedule.stages // ranks}) are "
                f"more than the {blocks} blocks of {self.model} {self.size} (--mesh); give "
                f"{deeper}a smaller pp"
            )
        if schedule.splits_backward and self.recompute:
            raise UserError(
                f"recompute computes a block again for the whole of its backward, which schedule "
                f"{self.schedule} does in two halves (--recompute); leave it out, or give "
                "--schedule 1f1b"
            )

    def check_batch(self, axes: Mapping[str, int]) -> None:
        """Raises UserError if the ranks of this mesh cannot share out the rows that were given."""
        parts = self.parts(axes)
        if self.batch % parts and not isinstance(self.batch, AtLeast):
            fitting = max(1, round(self.batch / parts)) * parts
            raise UserError(
                f"batch {self.batch} does not divide into {parts // self.microbatches} "
                f"data-parallel ranks x "
                f"{self.microbatches} microbatches = {parts} (--batch); give --batch {fitting}"
            )
