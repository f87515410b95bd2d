"""Serve a model over HTTP, in the format of OpenAI's API, with a page to talk to it:

    python launch/serve.py --checkpoint runs/003-fsdp-gpt-tiny --nproc 2 --mesh tp=2
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "def ", "max_tokens": 64, "stream": true}'

The page is at http://127.0.0.1:8000/. Only this machine can ask, unless --host says otherwise. The
degrees of tp and pp need not be those of the training. DIR is a checkpoint, a folder of checkpoints
or of a run, the newest one of several, or a Hugging Face folder of the Llama kind. Needs more
packages: pip install 'dist_lab[serve]'. See dist_lab/programs/serve/README.md.
"""

import sys

from dist_lab.programs.serve.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
