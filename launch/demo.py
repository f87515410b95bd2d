"""From nothing to a model that completes a Python function, in about three minutes:

    python launch/demo.py
    python launch/demo.py --prompt "class Stack:" --steps 600

Trains gpt tiny on four ranks of fsdp, serves its checkpoint on two ranks of tp, and asks the server
to continue the prompt, as a client of OpenAI's API would. Each command is shown before it runs, so
that it can be typed again. The run is kept in --out.
"""

import sys
from pathlib import Path

from dist_lab.programs.demo.settings import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__, Path(__file__).parent))
