"""Train a model on this machine, by any strategy:

    python launch/train.py                                           one process
    python launch/train.py --strategy dp --nproc 4                   4 ranks, started here
    torchrun --nproc_per_node=4 launch/train.py --strategy dp        4 ranks, started by torchrun
    python launch/train.py --config configs/02_dp.toml --steps 50    a preset; flags win over it

Logs go to runs/: metrics.jsonl, summary.json, and TensorBoard's (tensorboard --logdir runs).
"""

import sys
from functools import partial

from dist_lab import launcher
from dist_lab.config import parse

if __name__ == "__main__":
    read = partial(parse, program="train.py", description=__doc__)
    sys.exit(launcher.main("train.py", read, "dist_lab.train:run"))
