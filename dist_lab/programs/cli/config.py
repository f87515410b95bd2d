"""The settings of a run: a frozen Config. Flags override the TOML file, which overrides defaults.

Each setting is a field with a type, a default, a help text and limits. From these settings.py
derives the flag (`--val-every`), the TOML key (`val_every`), the checks and the line in --help. To
add a setting, add a field. checks.py checks settings against each other; `Config.axes` checks them
against the number of processes.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from dist_lab.comm.by_hand.costs import SETTINGS
from dist_lab.data.tokenizer import BYTES, read_tokenizer
from dist_lab.errors import UserError
from dist_lab.faults.grammar import Fault, faults_of, read_spec
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.parallel.schedules.actions import Schedule
from dist_lab.parallel.schedules.library import make
from dist_lab.programs.cli.low_precision import LowPrecision
from dist_lab.programs.cli.mesh_text import read_mesh
from dist_lab.programs.cli.mixes import DATA, in_text, strategies_on
from dist_lab.programs.cli.order import read_order
from dist_lab.programs.cli.ranks import needs_ranks
from dist_lab.programs.cli.registry import ALL_SIZES, MODELS, STRATEGIES
from dist_lab.programs.cli.resume import is_auto, read_resume
from dist_lab.programs.cli.settings import AtLeast, setting
from dist_lab.programs.cli.steps import read_steps
from dist_lab.step.fixed_order.order import check_microbatches, microbatches_of, shards_of

# Settings of training alone; the other programs have no flags for them.
RESTARTS = ("save_every", "keep", "resume", "restarts", "fault", "timeline", "profile")


@dataclass(frozen=True)
class RunSettings(LowPrecision):
    """The settings of a run. None means a default that depends on other settings."""

    # fmt: off
    strategy: str | None = setting(None, "dp, ddp: data parallelism; zero1, zero2, fsdp, hsdp: "
        "with sharding; tp: tensor parallelism; pp: pipeline parallelism; with a --mesh of several "
        "axes, the strategy of dp and fsdp; default: what --mesh implies, or single: one process",
        choices=tuple(STRATEGIES), heading="common settings")
    impl: str = setting("hand", "whose implementation of the strategy: hand (this project's), "
        "torch (PyTorch's) or accelerate", choices=("hand", "torch", "accelerate"))
    mesh: Mapping[str, int] | None = setting(None, "ranks along each mesh axis, each with its "
        "strategy: pp=2,fsdp=2,tp=2; dp is ddp, dp with fsdp is hsdp; default: all ranks along the "
        "strategy's own axis", metavar="AXIS=N,...", read=read_mesh)
    model: str = setting("gpt", "text: gpt (a Llama-style transformer) or mlp (residual MLP on the "
        "last 16 bytes); images: vit or resnet18", choices=tuple(MODELS))
    size: str = setting("tiny", "number of parameters: about 1, 8, 25 or 124 million, and for gpt "
        "those of published Llamas; resnet18 has only tiny, with 11 million", choices=ALL_SIZES)
    data: str = setting("", "text: stdlib (the source of Python's standard library), a file or a "
        "folder; images: glyphs (distorted characters), mnist, cifar10, fake (noise) or "
        "fake:3x64x64; your own: module:function; default: stdlib for text models, glyphs for "
        "image models", metavar="SPEC")
    tokenizer: str = setting(BYTES, "tokens of text: bytes; or byte-level BPE with N tokens, "
        "trained on the training text", metavar="bytes|bpe:N", read=read_tokenizer)
    steps: int = setting(200, "optimizer steps", low=1)
    batch: int = setting(AtLeast(32), "samples per step, over all ranks; the default is rounded up "
        "to a multiple of data-parallel ranks x micro-batches", low=1)
    seq: int = setting(128, "tokens per sample of text; unused for images", low=1)
    microbatches: int = setting(None, "split each rank's samples into N micro-batches, to "
        "accumulate gradients and, under pp, to keep all stages busy; default: 1, under pp 8",
        low=1)
    dtype: str = setting("float32", "dtype of forward and backward; bfloat16 keeps float32 master "
        "weights", choices=("float32", "bfloat16", "float64"))
    lr: float = setting(2e-3, "learning rate after warm-up; falls to a tenth over --steps", above=0)
    config: str = setting("", "TOML file of these settings, with underscores in names: val_every = "
        "50; flags override it", metavar="FILE")
    out: str = setting("", "output folder; default: a new one in runs/ for train.py and "
        "compare.py, no files for others", metavar="DIR")

    bucket_mb: float | None = setting(None, "largest gradient bucket, in MiB; default: 25",
        heading="ddp, zero1, zero2", above=0, high=2**20)

    reshard_after_forward: bool | None = setting(None, "free a unit's unsharded parameters after "
        "its forward and all-gather them again for backward; default: on, "
        "--no-reshard-after-forward keeps them", heading="fsdp, hsdp")
    keep_gathered: bool | None = setting(None, "keep parameters unsharded from the first "
        "micro-batch's backward to the last one's: less traffic, more memory")
    prefetch: bool | None = setting(None, "all-gather the next unit while the current one "
        "computes; default: on, --no-prefetch turns it off")
    reduce_dtype: str | None = setting(None, "dtype in which gradients are sent and summed; "
        "default: that of the sharded parameters", choices=("float32", "bfloat16", "float16"))
    offload: str | None = setting(None, "keep sharded parameters and optimizer state in files in "
        "this folder; or cpu, with an accelerator: in host memory", metavar="DIR")

    defer_reduce: bool | None = setting(None, "accumulate unsharded gradients over micro-batches "
        "and reduce-scatter only after the last: less traffic, more memory; default: off, in a "
        "pipeline on", heading="zero2, fsdp, hsdp")

    sequence_parallel: bool | None = setting(None, "shard activations between blocks along the "
        "sequence, so that norms and residuals are sharded too: less memory, the same traffic",
        heading="tp")
    regather: bool | None = setting(None, "with --sequence-parallel: save a linear layer's input "
        "sharded and all-gather it again in backward: less memory, 1.25 times the traffic")

    schedule: str | None = setting(None, "gpipe, 1f1b, zb; with --layers 8 interleaved or zbv (2 "
        "stages per rank: 4 ranks need 8 blocks, size tiny has 4); or a file with one row per rank "
        "and cells such as 2F0 (stage 2, forward, micro-batch 0); default: 1f1b",
        heading="pp", metavar="NAME|FILE")
    chunks: int | None = setting(None, "stages per rank for --schedule interleaved; default: 2",
        low=1)
    pp_balance: str | None = setting(None, "partition the model into stages that minimize the "
        "largest stage's compute (cost) or number of blocks (count); default: cost",
        choices=("cost", "count"))
    emulate_compute: float | None = setting(None, "make each forward take at least MS "
        "milliseconds and each backward twice that, by sleeping: shows a schedule on few cores",
        above=0, high=1e5, metavar="MS")

    layers: int | None = setting(None, "number of blocks; default: that of --size", low=1,
        high=10_000, heading="model and data")
    recompute: int = setting(0, "activation checkpointing: recompute every N-th block in backward; "
        "1: all, 0: none", low=0)
    dropout: float = setting(0.0, "probability of dropout in gpt, mlp and vit, with the same masks "
        "in every layout", low=0.0, high=1.0)
    sync_batchnorm: bool = setting(False, "BatchNorm over the samples of all ranks (resnet18)")
    download: bool = setting(False, "download mnist or cifar10 into --cache if it is not there")
    cache: str = setting("~/.cache/dist_lab", "folder for cached text, mnist and cifar10",
        metavar="DIR")

    optimizer: str = setting("adamw", "adamw, sgd; muon or shampoo for matrices, with adamw for "
        "embeddings, head, norms and biases", heading="optimizer",
        choices=("adamw", "sgd", "muon", "shampoo"))
    adamw_lr: float | None = setting(None, "with muon or shampoo: the learning rate of adamw's "
        "part; default: that of --lr", above=0)
    weight_decay: float = setting(0.1, "weight decay of matrices; norms and biases have none",
        low=0)
    warmup: int = setting(20, "steps of linear learning-rate warm-up from 0", low=0)
    clip: float = setting(1.0, "clip the global gradient norm to this; 0: no clipping", low=0)
    reduce_order: str | None = setting(None, "fixed, or fixed:V: add in one order, so that weights "
        "have the same bits in every layout; each of V virtual shards of the batch (8) is one "
        "micro-batch; see dist_lab/step/fixed_order; default: any order", metavar="fixed[:V]",
        read=read_order)
    seed: int = setting(0, "seed of the initial weights and of the data order", low=0,
        high=2**63 - 1)

    collectives: str = setting("auto", "algorithms of collectives: auto (the fastest as measured), "
        "backend (gloo's or nccl's own), or one hand-written family for the operations it has; "
        "--impl torch and accelerate always use the backend's", choices=SETTINGS,
        heading="ranks and communication")
    log_collectives: bool = setting(False, "print every collective when it is launched")
    check_collectives: bool = setting(False, "before each collective, check that all ranks launch "
        "the same one")

    val_every: int = setting(100, "steps between validations; 0: only at the end", low=0,
        heading="logs and errors")
    log_every: int = setting(10, "steps between logged rows", low=1)
    sentinel: int = setting(0, "every N steps compare weights, buffers, random generators and the "
        "like over the ranks that should hold the same, and stop at a difference; 0: never", low=0)
    log_samples: bool = setting(False, "write the numbers of the samples of each step, one file "
        "per rank: see observe/sample_log.py")
    timeline: str = setting("", "record what every rank does and waits for in these steps, in "
        "OUT/timeline.json for ui.perfetto.dev; steps 1 and 2 are slow: they measure memory",
        metavar="FIRST:LAST", read=read_steps)
    profile: str = setting("", "torch's profiler in these steps: OUT/profile/rank-N.json, and "
        "merged.json of all ranks with their timeline", metavar="FIRST:LAST", read=read_steps)
    overwrite: bool = setting(False, "replace the logs and checkpoints of an earlier run in "
        "--out")
    about: str = setting("", "a note about this run, saved in its summary", metavar="TEXT")

    save_every: int = setting(0, "save a checkpoint in OUT/checkpoints every N steps; 0: never",
        low=0, heading="checkpoints, restarts and faults")
    keep: int | None = setting(None, "keep the N newest checkpoints; default: 2", low=1)
    resume: str = setting("", "auto: go on after the newest valid checkpoint in --out, or start if "
        "there is none; DIR: a run or one of its checkpoints; auto:DIR: as auto, or else from DIR",
        metavar="auto|DIR", read=read_resume)
    restarts: int = setting(0, "with --nproc: start new ranks up to N times when one fails, and go "
        "on after the newest checkpoint; under torchrun give it --max-restarts", low=0, high=10_000)
    fault: str = setting("", "make a rank fail on purpose: kill:rank=2@step=7,phase=backward, or "
        "random:n=20,seed=7; several separated by ; see dist_lab/faults", metavar="SPEC",
        read=read_spec, join=";")
    # fmt: on

    def __post_init__(self) -> None:
        if not self.data:
            object.__setattr__(self, "data", MODELS[self.model].data)
        if self.strategy is None:
            implied = strategies_on(self.mesh or {})
            object.__setattr__(self, "strategy", implied[-1 if implied[-1] in DATA else 0])

    def run(self, **changes: Any) -> "Config":
        """Returns these settings as a Config, with some changed, and without --reduce-order."""
        values = {option.name: getattr(self, option.name) for option in fields(Config)}
        return Config(**values | {"reduce_order": None} | changes)

    def data_wanted(self) -> dict[str, Any]:
        """The arguments of `data.check` and `data.open_data`."""
        return {
            "spec": self.data,
            "seq": self.seq,
            "tokenizer": self.tokenizer,
            "cache_dir": Path(self.cache),
            "download": self.download,
            "fits": self.check_fits,
            "tell": partial(print, file=sys.stderr, flush=True),
        }

    def check_fits(self, image: tuple[int, int, int] | None) -> None:
        """Raise UserError unless the model takes images of this shape, or text (`image` None)."""
        MODELS[self.model].check_fits(self.data, image)


@dataclass(frozen=True)
class Config(RunSettings):
    """The settings of one run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce_order and self.threads is None:
            object.__setattr__(self, "threads", 1)  # their number changes the bits of a layer
        if self.microbatches is None and not self.reduce_order:
            in_pipeline = self.strategy == "pp" or "pp" in (self.mesh or {})
            object.__setattr__(self, "microbatches", 8 if in_pipeline else 1)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies of this run, outermost first. Raises IllegalMix if they do not fit."""
        assert self.strategy is not None
        return strategies_on(self.mesh, self.strategy) if self.mesh else (self.strategy,)

    @property
    def options(self) -> tuple[str, ...]:
        """The settings of these strategies that some others do not have."""
        return tuple(option for name in self.strategies for option in STRATEGIES[name].options)

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns the mesh for `size` processes, and checks that the run fits it."""
        alone, mesh = self.strategies == ("single",), dict(self.mesh or {})
        mesh_size = math.prod(mesh.values())
        if alone and size > 1:
            raise UserError(
                f"strategy {self.strategy} runs in 1 process, {size} were started (--strategy); "
                "start 1, or give --strategy dp"
            )
        if not alone and plain:
            what, flag = f"strategy {self.strategy}", "--strategy"
            if mesh:
                what, flag = f"mesh {in_text(mesh)}", "--mesh"
            raise needs_ranks(what, flag, mesh_size if mesh else 2)
        if mesh and mesh_size != size:
            raise UserError(
                f"mesh {in_text(mesh)} needs {mesh_size} processes, {size} were started (--mesh); "
                f"type torchrun --nproc_per_node={mesh_size} ... or --nproc {mesh_size}"
            )
        axes = self.mesh_on(size)
        run = self.in_shards(axes)
        if "pp" in axes:
            run.check_pipeline(axes["pp"])
        run.check_batch(axes)
        if MODELS[run.model].reads == "text" and not run.reduce_order:
            run.check_tokens(run.fitted(size).batch, run.seq, data_ranks(axes), run.microbatches)
        if "tp" in axes:
            run.check_split(axes["tp"])
        self.faults(size)
        return axes

    def faults(self, ranks: int) -> list[Fault]:
        """Returns the faults on purpose. Raises UserError if one cannot happen in this run."""
        return faults_of(self.fault, ranks, self.steps, self.save_every)

    def attempt(self, out: str, *, again: bool) -> Self:
        """Returns this Config writing to `out`; `again`: going on after its newest checkpoint."""
        resume = self.resume
        if again and not is_auto(resume):
            resume = f"auto:{resume}" if resume else "auto"
        return replace(self, out=out, resume=resume)

    def mesh_on(self, size: int) -> dict[str, int]:
        """Returns --mesh, or else the strategy's default mesh for `size` processes, unchecked."""
        return dict(self.mesh or STRATEGIES[self.strategies[0]].default_axes(size))

    def fitted(self, size: int) -> Self:
        """Returns this Config; a default batch is rounded up to divide over `size` processes."""
        run = self.in_shards(self.mesh_on(size))
        if isinstance(run.batch, AtLeast):
            return replace(run, batch=run.batch.divided_by(run.parts(run.mesh_on(size))))
        return run

    def in_shards(self, axes: Mapping[str, int]) -> Self:
        """Returns this Config; with --reduce-order each virtual shard is one micro-batch."""
        if not self.reduce_order:
            return self
        shards = shards_of(self.reduce_order)
        needed = microbatches_of(shards, data_ranks(axes))
        if self.microbatches is not None:
            check_microbatches(self.microbatches, needed, shards)
        return replace(self, microbatches=needed)

    def parts(self, axes: Mapping[str, int]) -> int:
        """The number of equal parts of a batch: data-parallel ranks x micro-batches."""
        return data_ranks(axes) * self.microbatches

    def check_split(self, ranks: int) -> None:
        """Raise UserError unless heads and sequence divide over this many tensor-parallel ranks."""
        MODELS[self.model].check_split(self.size, self.impl, ranks)
        if self.sequence_parallel and MODELS[self.model].reads == "text" and self.seq % ranks:
            fitting = max(1, round(self.seq / ranks)) * ranks
            raise UserError(
                f"seq {self.seq} does not divide over {ranks} ranks of tp (--seq, "
                f"--sequence-parallel); give --seq {fitting}"
            )

    def pipeline(self, ranks: int) -> Schedule:
        """Returns the pipeline schedule; raises UserError if there is none for `ranks`."""
        return make(self.schedule or "1f1b", ranks, self.microbatches, self.chunks)

    def check_pipeline(self, ranks: int) -> None:
        """Raise UserError unless the schedule fits the number of ranks and the model's blocks."""
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
                f"recompute needs the backward of a block in one piece, and schedule "
                f"{self.schedule} splits it in two (--recompute); leave it out, or give "
                "--schedule 1f1b"
            )

    def check_batch(self, axes: Mapping[str, int]) -> None:
        """Raise UserError unless --batch, if given, divides over the mesh and micro-batches.

        A run that goes on with another number of ranks keeps its batch. Their shares may then be
        unequal, but not in a pipeline, whose stages expect micro-batches of one shape.
        """
        parts = self.parts(axes)
        if self.resume and "pp" not in axes and not self.reduce_order and self.batch >= parts:
            return
        if self.batch % parts and not isinstance(self.batch, AtLeast):
            fitting = max(1, round(self.batch / parts)) * parts
            raise UserError(
                f"batch {self.batch} is not a multiple of {parts // self.microbatches} "
                f"data-parallel ranks x {self.microbatches} micro-batches = {parts} (--batch); "
                f"give --batch {fitting}"
            )


def data_ranks(axes: Mapping[str, int]) -> int:
    return math.prod(axes.get(name, 1) for name in DATA_AXES)
