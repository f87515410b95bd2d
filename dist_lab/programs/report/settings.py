"""The command line of report.py: folders."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dist_lab.errors import UserError
from dist_lab.programs.report.command import report


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type report.py and folders of runs, such as runs/003-dp-gpt")


def main(argv: Sequence[str], description: str | None) -> int:
    """Write a report. Returns the exit status."""
    parser = Parser(
        prog="report.py", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", metavar="DIR", nargs="+", help="of a run or of a comparison")
    parser.add_argument("--out", metavar="FILE", default="", help="the page; default: report.html "
                        "in the folder, or beside several")  # fmt: skip
    try:
        given = parser.parse_args(argv)
        path, left_out = report(given.folders, given.out)
    except UserError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return error.exit_status
    for line in left_out:
        print(f"left out: {line}")
    print(f"report in {path}")
    return 0
