"""What would a run do? Shows ranks, layouts, memory and collectives without starting any rank:

    python launch/explain.py --strategy ddp --mesh dp=8 --size 25m
    python launch/explain.py --strategy dp --microbatches 2
    python launch/explain.py --strategy pp --schedule zb --stages 4 --svg zb.svg
    python launch/explain.py --strategy fsdp --out runs/fsdp                 writes explain.json
    python launch/explain.py --mesh pp=2,dp=2,tp=2 --rank 4                 a rank of the last stage
    python launch/explain.py --mesh fsdp=2,tp=2 --parameter lm_head.weight   who holds which part?

It is a dry run: one rank takes a real step in this process, and the other ranks are simulated.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.explain import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("explain.py", read, "dist_lab.programs.explain.command:explain"))
