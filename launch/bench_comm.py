"""How fast are the collectives, the backend's own and those by hand? Operation x size x algorithm:

    python launch/bench_comm.py --nproc 4
    torchrun --nproc_per_node=4 launch/bench_comm.py --ops all_gather,reduce_scatter --sizes 1M,16M

All run in the same processes, in alternating rounds. It prints medians and quartiles, a latency and
a bandwidth fitted to each algorithm's own formula, and what --collectives auto should choose.
"""

import sys
from collections.abc import Sequence

from dist_lab.processes import launcher
from dist_lab.programs.bench.settings import Bench, parse


def read(argv: Sequence[str] | None) -> Bench:
    return parse(argv, "bench_comm.py", __doc__)


if __name__ == "__main__":
    sys.exit(launcher.main("bench_comm.py", read, "dist_lab.programs.bench.measure:run"))
