"""Try every strategy on your model: which are exact, which refuse it and why, what to improve:

    python launch/doctor.py mymodels:build --nproc 2
    torchrun --nproc_per_node=4 launch/doctor.py mymodels:build --strategies ddp,fsdp --units Block

build() returns a module, or (module, batch) with batch = (inputs, targets), all rows of one step,
or (module, batch, loss_sum). With a batch each strategy is trained for a few steps and compared
with one process. The exit status is 0 if all strategies in --strategies are exact; without
--strategies, if at least one parallel strategy is exact. --out DIR writes DIR/doctor.json.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.doctor import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("doctor.py", read, "dist_lab.programs.doctor.command:doctor"))
