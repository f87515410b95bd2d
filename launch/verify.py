"""Is a parallel run equal to one process? Trains both, and compares loss, gradients and weights:

    python launch/verify.py --strategy dp --nproc 4
    torchrun --nproc_per_node=4 launch/verify.py --strategy dp --microbatches 2

The exit status is 0 if they are equal. With --out DIR the comparison is written to DIR/verify.json.
"""

import sys
from collections.abc import Sequence

from dist_lab import data
from dist_lab.processes import launcher
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.settings import AtLeast

# A bug shows in the first steps, so a small run suffices; in float64 rounding cannot hide it.
DEFAULTS = {"steps": 3, "batch": AtLeast(8), "seq": 32, "dtype": "float64"}
WITHOUT = ["warmup", "overwrite", "about", "val_every", "log_every"]


def read(argv: Sequence[str] | None) -> Config:
    config = parse(
        argv, program="verify.py", description=__doc__, defaults=DEFAULTS, without=WITHOUT
    )
    if config.nproc is not None:  # report every mistake before a rank starts
        data.check(**config.data_wanted())
    return config


if __name__ == "__main__":
    sys.exit(launcher.main("verify.py", read, "dist_lab.programs.verify.command:verify"))
