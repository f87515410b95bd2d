"""How does each strategy scale, with the number of ranks and the size of the model?

    python launch/sweep.py                                    ddp, fsdp, tp and pp on 2 and 4 ranks
    python launch/sweep.py --worlds 2,4,8 --scaling weak --batch 8 --strategies ddp,fsdp
    python launch/sweep.py --sizes tiny,small --worlds 4 --strategies fsdp,fsdp2xtp2,pp2xfsdp2

For each size and number of ranks all strategies are compared with one process, in alternating
rounds. The results are printed as a table; sweep.json, .csv and .png go to --out. A sweep that was
interrupted goes on with the next comparison if it is started again.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.sweep import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("sweep.py", read, "dist_lab.programs.sweep.command:run"))
