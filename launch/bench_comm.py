"""Time the backend's collectives and our hand-written ones: operation x size x algorithm:

    python launch/bench_comm.py --nproc 4
    torchrun --nproc_per_node=4 launch/bench_comm.py --ops all_gather,reduce_scatter --sizes 1M,16M

All algorithms run in the same processes, in alternating rounds. The program prints medians and
quartiles, a latency and a bandwidth fitted to each algorithm's own formula, and what
--collectives auto should choose.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.bench.settings import parse

read = partial(parse, program="bench_comm.py", description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("bench_comm.py", read, "dist_lab.programs.bench.measure:run"))
