"""Compares every mix of strategies with one process, all cells: `python tests/nightly/matrix.py`.

This is `launch/verify.py --matrix`, with its flags: `--only TEXT`; `--out DIR`, which writes the
table of RESULTS.md there, and resumes a run that was stopped. It takes 30 minutes on 2 quiet cores.
A slice of the cells is in tests/programs/verify/test_matrix.py.
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    program = Path(__file__).parents[2] / "launch" / "verify.py"
    sys.exit(subprocess.call([sys.executable, str(program), "--matrix", *sys.argv[1:]]))
