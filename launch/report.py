"""One page of HTML that explains a run, a comparison, or several runs. Open it in a browser:

    python launch/report.py runs/003-fsdp-gpt-tiny      a run's page, made again: DIR/report.html
    python launch/report.py runs/004-compare-gpt-25m    a comparison's
    python launch/report.py runs/*                      several runs: a table, runs/report.html

The page has everything in it, and loads nothing. train.py and compare.py write theirs at the end.
"""

import sys

from dist_lab.programs.report.settings import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
