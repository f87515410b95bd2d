"""What would each strategy do with my model? Exact, refused and why, slower than need be and why:

    python launch/doctor.py mymodels:build --nproc 2
    torchrun --nproc_per_node=4 launch/doctor.py mymodels:build --strategies ddp,fsdp --units Block

build() returns a module, or (module, batch) with batch = (inputs, targets), all rows of one step,
or (module, batch, loss_sum). With a batch each strategy is trained for a few steps and compared
with one process. The exit status is 0 if all strategies that were named are exact, or, where none
was, if any is that shares the work out. With --out DIR the report is written to DIR/doctor.json.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.doctor import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("doctor.py", read, "dist_lab.programs.doctor.command:doctor"))
