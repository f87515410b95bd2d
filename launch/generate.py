"""Continue a text with a model that was trained here, or with a Llama from Hugging Face:

    python launch/generate.py --checkpoint runs/003-fsdp-gpt-tiny --prompt "def "
    python launch/generate.py --checkpoint runs/003-fsdp-gpt-tiny --prompt "def " --temperature 0.8
    python launch/generate.py --checkpoint RUN --prompt-file a.py --nproc 4 --mesh pp=2,tp=2

The text is written to stdout as it comes, without the prompt; all else goes to stderr. The most
likely token is taken each time, unless --temperature, --top-k, --top-p or --seed is given. The
degrees of tp and pp need not be those of the training. DIR is a checkpoint, a folder of checkpoints
or of a run, the newest one of several, or a Hugging Face folder of the Llama kind.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.generate import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("generate.py", read, "dist_lab.programs.generate.command:generate"))
