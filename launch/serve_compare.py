"""Race the scheduling policies of well-known servers on one trace of requests:

    python launch/serve_compare.py
    python launch/serve_compare.py --policy static,vllm --blocks 256 --wall
    python launch/serve_compare.py --checkpoint RUN --nproc 2 --mesh tp=2 --out runs/serving

All run on the same engine, with the same memory. The virtual clock is free of noise: a step of n
tokens takes a + b n seconds, with a and b measured on this model and machine. Without --checkpoint
a model with random weights serves: texts mean nothing, and times are the same.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.serve_compare import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    body = "dist_lab.programs.serve_compare.command:serve_compare"
    sys.exit(launcher.main("serve_compare.py", read, body))
