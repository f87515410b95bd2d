"""Is a parallel run equal to one process? Trains both, and compares loss, gradients and weights:

    python launch/verify.py --strategy dp --nproc 4
    torchrun --nproc_per_node=4 launch/verify.py --strategy dp --microbatches 2
    python launch/verify.py --strategy fsdp --nproc 4 --reduce-order fixed  to the last bit
    python launch/verify.py --matrix --out runs/matrix                      every mix, 30 minutes
    python launch/verify.py --bug list                      bugs of public trainers, and their names
    python launch/verify.py --bug norm-of-one-stage                                      one of them
    python launch/verify.py --museum --out runs/museum                      all of them, 3 minutes

The exit status is 0 if they are equal; of bugs, if each behaves as its page says. With --out DIR
the comparison is written to DIR/verify.json, that of all mixes to DIR/matrix.json and matrix.md,
the bugs to DIR/museum.json and museum.md.
"""

import sys
from collections.abc import Sequence

from dist_lab import data
from dist_lab.processes import launcher
from dist_lab.programs.verify import settings


def read(argv: Sequence[str] | None) -> settings.Verify:
    config = settings.read(argv, __doc__)
    if config.nproc is not None:  # report every mistake before a rank starts
        data.check(**config.data_wanted())
    return config


if __name__ == "__main__":
    sys.exit(launcher.main("verify.py", read, "dist_lab.programs.verify.command:verify"))
