"""Train a model on this machine with any strategy:

    python launch/train.py                                           one process
    python launch/train.py --strategy fsdp --nproc 4                 4 ranks, started here
    torchrun --nproc_per_node=4 launch/train.py --strategy fsdp      4 ranks, started by torchrun
    python launch/train.py --config configs/02_dp.toml --steps 50    a preset; flags override it

Logs go to runs/: metrics.jsonl, summary.json and TensorBoard events (tensorboard --logdir runs).
"""

import sys
from collections.abc import Sequence

from dist_lab import data
from dist_lab.observe import run_dir
from dist_lab.processes import launcher
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.cli.config import Config


def read(argv: Sequence[str] | None) -> Config:
    config = parse(argv, program="train.py", description=__doc__)
    if config.nproc is not None:  # report every mistake before a rank starts
        run_dir.look(config)
        data.check(**config.data_wanted())
    return config


def place(config: Config) -> str:
    data.check(**config.data_wanted())  # an earlier run is removed for one that can begin
    return run_dir.placed(config, "-".join(config.strategies))


if __name__ == "__main__":
    body = "dist_lab.programs.train.command:train"
    sys.exit(launcher.main("train.py", read, body, place=place))
