"""The settings of quantize.py. Does not import torch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dist_lab.checkpoint.exchange.folders import check_new
from dist_lab.checkpoint.exchange.gptq_names import is_quantized
from dist_lab.errors import UserError, shown
from dist_lab.programs.cli.mesh_text import mesh_in_words, read_mesh
from dist_lab.programs.cli.ranks import RankSettings, check_nproc
from dist_lab.programs.cli.settings import flag, setting, split_names
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.quantize.methods import METHODS, QAT, check_width, read_bits
from dist_lab.step.fixed_order.order import microbatches_of

GROUP = 32  # columns
OPTIONS = tuple(name for row in METHODS.values() for name in row.options)


@dataclass(frozen=True)
class Quantize(RankSettings):
    """The settings of one quantisation, or of a table of them."""

    # fmt: off
    checkpoint: str = setting("", "the run to quantise, or one of its checkpoints; with --table "
        "several runs, separated by commas; default there: trains three", metavar="RUN",
        heading="common settings")
    method: str = setting("rtn", "; ".join(f"{name}: {row.about}" for name, row in METHODS.items()),
        choices=tuple(METHODS))
    bits: int | None = setting(None, "bits of a weight: 2, 3, 4 or 8; default: 4, or 8 with inputs "
        "of 8 bits; --table: all", read=read_bits)
    group: int | None = setting(None, "columns of a weight that share a scale; -1: all of a row; "
        "default: 32, or -1 with inputs of 8 bits", low=-1)
    symmetric: bool = setting(False, "signed codes, whose zero is 0; always with inputs of 8 bits")
    mesh: Mapping[str, int] | None = setting(None, "dp=N: N ranks share out the samples and the "
        "layers; default: all ranks", metavar="dp=N", read=read_mesh)
    out: str = setting("", "write the quantised model to this new folder, in AutoGPTQ's format; "
        "with --table: the table and its runs, default runs/quantize", metavar="DIR")
    table: bool = setting(False, "every method with every width, on all runs")
    methods: str = setting("", "--table: these methods only, separated by commas; default: all, "
        "and without --checkpoint qat: trained with rounded weights", metavar="LIST",
        heading="the table")
    calibration: int = setting(128, "samples of the training data that the method may read",
        low=1, high=10**6, heading="the method")
    shards: int = setting(8, "the samples are summed in so many parts, along one tree: the same "
        "bits on any number of ranks", low=1, high=4096)
    act_order: bool = setting(False, "gptq: columns with large inputs first")
    damping: float = setting(0.01, "gptq: added to the diagonal of the Hessian, relative to its "
        "mean", low=0.0, high=1.0)
    inputs: str = setting("dynamic", "w8a8, smoothquant: the range of 8-bit inputs; dynamic: of "
        "each token; static: one for all, of the samples", choices=("dynamic", "static"))
    data: str = setting("", "the run's own data, whose code the checkpoint only names: it runs if "
        "you give it", metavar="module:function")
    # fmt: on

    def __post_init__(self) -> None:
        if self.threads is None:
            object.__setattr__(self, "threads", 1)  # their number changes the bits of a layer

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """The mesh: all ranks along dp.

        Raises:
            UserError: there are other axes, or the ranks cannot share the samples equally.
        """
        if self.table:  # this process starts those that train and quantise
            if size > 1:
                raise UserError(
                    f"a table starts its own processes, {size} were started; type python "
                    "launch/quantize.py --table"
                )
            return {}
        mesh = self.mesh or {"dp": size}
        others = [name for name, n in mesh.items() if name != "dp" and n > 1]
        if others:
            raise UserError(
                f"mesh {mesh_in_words(mesh)} has {others[0]}, but ranks share out samples and "
                f"layers, not weights (--mesh); give dp={size}"
            )
        ranks = mesh.get("dp", 1)
        if ranks != size:
            raise UserError(
                f"mesh dp={ranks} needs {ranks} processes, {size} were started (--mesh); add "
                f"--nproc {ranks}"
            )
        try:
            microbatches_of(self.shards, ranks)
        except UserError:
            raise UserError(
                f"{self.shards} parts of the samples do not divide over {ranks} ranks in a binary "
                "tree (--shards, --mesh); give powers of two, with at least as many parts"
            ) from None
        return {"dp": size}

    @property
    def columns(self) -> int:
        """The columns that share a scale, unless the method says so."""
        return GROUP if self.group is None else self.group

    @property
    def method_list(self) -> list[str]:
        """The methods of the table."""
        return split_names(self.methods, (*METHODS, QAT), "--methods", "method") or [*METHODS, QAT]

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}


def read(argv: Sequence[str] | None, description: str | None) -> Quantize:
    """Read the command line of quantize.py. Raises UserError for every mistake visible in it."""
    words = list(sys.argv[1:] if argv is None else argv)
    config, where = read_settings(Quantize, words, "quantize.py", description, {})
    check_nproc(config, where)
    if config.shards & (config.shards - 1):
        raise UserError(
            f"{config.shards} parts are no power of two ({where['shards']}); give "
            f"{1 << (config.shards.bit_length() - 1)}"
        )
    if config.calibration % config.shards:
        near = -(-config.calibration // config.shards) * config.shards
        raise UserError(
            f"{config.calibration} samples do not divide into {config.shards} equal parts "
            f"({where['calibration']}); give --calibration {near}"
        )
    if config.group == 0:
        raise UserError(
            f"groups of 0 columns have no scale ({where['group']}); give 32, or -1: all of a row"
        )
    named = split_names(config.methods, (*METHODS, QAT), "--methods", "method")
    if config.table:
        check_table(config, named)
        return config if config.out else replace(config, out="runs/quantize")
    if not config.checkpoint:
        raise UserError(
            "a run to quantise is missing (--checkpoint); give the folder of a run that was "
            "trained with --save-every, or --table to have three trained"
        )
    if config.methods:
        raise UserError("--methods are those of --table; give --method, or --table as well")
    config = replace(config, bits=check_width(config.method, config.bits))
    check_options(config)
    check_run(config.checkpoint)
    if config.out:
        check_new(config.out)
    return config


def check_run(path: str) -> None:
    """Raise UserError unless there is a folder that may be of a run."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {shown(path)} (--checkpoint); give that of a run, such as "
            "runs/003-fsdp-gpt-tiny"
        )
    if is_quantized(folder):
        raise UserError(
            f"{shown(path)} is quantised already, and its codes cannot be rounded again "
            "(--checkpoint); give the run that it comes from"
        )


def check_table(config: Quantize, named: Sequence[str]) -> None:
    """Raise UserError for a table that cannot be made.

    Args:
        named: the methods that the user has named.
    """
    if config.method != "rtn":
        raise UserError(
            f"--method {config.method} is that of one quantisation, and a table has several; give "
            f"--methods {config.method}"
        )
    if config.checkpoint and QAT in named:
        raise UserError(
            "qat trains runs of its own, so it is in a table without --checkpoint only (--methods);"
            " leave one of them out"
        )
    if len(set(config.checkpoint.split(","))) < len(config.checkpoint.split(",")):
        raise UserError(f"{shown(config.checkpoint)} names a run twice (--checkpoint)")
    for path in config.checkpoint.split(",") if config.checkpoint else ():
        check_run(path.strip())


def check_options(config: Quantize) -> None:
    """Raise UserError for an option of another method."""
    row = METHODS[config.method]
    if row.activations and config.group not in (None, -1):
        raise UserError(
            f"{config.method} multiplies integers, which needs one scale a row (--group "
            f"{config.group}); leave --group out"
        )
    defaults = {option.name: option.default for option in fields(Quantize)}
    for name in dict.fromkeys(OPTIONS):
        takes = [method for method, row in METHODS.items() if name in row.options]
        if getattr(config, name) != defaults[name] and name not in row.options:
            value = shown(getattr(config, name))
            raise UserError(
                f"{config.method} has no {name}={value} ({flag(name)}); leave it out, or give "
                f"--method {' or '.join(takes)}"
            )
