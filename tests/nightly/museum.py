"""Runs all exhibits of the museum of bugs: `python tests/nightly/museum.py`.

This is `launch/verify.py --museum`, with its flag `--out DIR`, which writes the page of the museum,
DIR/museum.md. It takes 2 minutes on 2 quiet cores. tests/programs/verify/test_museum.py has the
exhibits without the cheaper checks.
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    program = Path(__file__).parents[2] / "launch" / "verify.py"
    sys.exit(subprocess.call([sys.executable, str(program), "--museum", *sys.argv[1:]]))
