"""Is a parallel run equal to one process? Trains both, and compares loss, gradients and weights:

    python launch/verify.py --strategy dp --nproc 4
    torchrun --nproc_per_node=4 launch/verify.py --strategy dp --microbatches 2

The exit status is 0 if they are equal. With --out DIR the comparison is written to DIR/verify.json.
"""

import sys
from functools import partial

from dist_lab import launcher
from dist_lab.config import parse

# Little work, for a bug shows in the first steps; in float64, where rounding cannot hide it.
DEFAULTS = {"steps": 3, "batch": 8, "seq": 32, "dtype": "float64", "warmup": 0}

if __name__ == "__main__":
    read = partial(parse, program="verify.py", description=__doc__, defaults=DEFAULTS)
    sys.exit(launcher.main("verify.py", read, "dist_lab.parity:run"))
