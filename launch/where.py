"""What is every rank of a run doing now? Looks from outside, and does not stop the run:

    python launch/where.py runs/003-fsdp-gpt-tiny
    watch -n 1 python launch/where.py runs/003-fsdp-gpt-tiny

Shows each rank's step, phase and unit, the collective that it is in or has finished last, for how
long, and the Python line that it executes. For runs of train.py and compare.py on this machine.
"""

import sys

from dist_lab.programs.where.settings import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
