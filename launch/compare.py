"""Which strategy is faster here, by how much, and is it certain?

    torchrun --nproc_per_node=4 launch/compare.py --strategies single,dp,ddp,ddp@torch --batch 4
    python launch/compare.py --nproc 4 --size 25m --batch 4 --seq 64       all strategies
    python launch/compare.py --nproc 4 --strategies dp,dp                  how large is the noise?
    python launch/compare.py --nproc 4 --strategies fsdp,fsdp2xtp2,zero1:pp2xdp2,pp2xfsdp2@torch

The last one compares mixes of strategies: fsdp2xtp2 is the mesh fsdp=2,tp=2, and zero1 names the
strategy of the data axes.

All strategies train the same model on the same batches in the same processes, and take turns in
rounds. The results are printed as tables; compare.json, .csv and .png go to runs/.
"""

import sys
from collections.abc import Sequence

from dist_lab import data
from dist_lab.observe import run_dir
from dist_lab.processes import launcher
from dist_lab.programs.compare import settings


def read(argv: Sequence[str] | None) -> settings.Settings:
    config = settings.read(argv, __doc__)
    if config.nproc is not None:  # report every mistake before a rank starts
        run_dir.look(config)
        data.check(**config.data_wanted())
    return config


if __name__ == "__main__":
    sys.exit(launcher.main("compare.py", read, "dist_lab.programs.compare.measure:run"))
