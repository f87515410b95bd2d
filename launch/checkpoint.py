"""Look at checkpoints, compare them, and turn them into other forms. No rank is started:

    python launch/checkpoint.py inspect DIR                 what is in it, and on which ranks
    python launch/checkpoint.py verify DIR                  is it whole? every file's hash
    python launch/checkpoint.py reshard SRC DST --mesh fsdp=2,tp=2    into another layout
    python launch/checkpoint.py diff A B                    which tensors and settings differ
    python launch/checkpoint.py export SRC OUT --to hf      hf (Hugging Face), dcp or torch
    python launch/checkpoint.py import SRC DST              from one of these

DIR is a checkpoint, a folder of checkpoints or of a run: of several the newest one is taken; verify
looks at all. `checkpoint.py COMMAND --help` shows the flags. The exit status is 0 if all is well, 1
if a checkpoint is damaged or two differ, 2 if the request is wrong.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.checkpoint import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(
        launcher.main("checkpoint.py", read, "dist_lab.programs.checkpoint.command:checkpoint")
    )
