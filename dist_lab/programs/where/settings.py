"""The command line of where.py: one folder."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dist_lab.errors import MachineError, UserError
from dist_lab.programs.where.command import where


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type where.py and the folder of a run, such as runs/003-dp")


def main(argv: Sequence[str], description: str | None) -> int:
    """Print what the ranks of a run do. Returns the exit status."""
    parser = Parser(
        prog="where.py", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="the folder of the run (--out)")
    try:
        print(where(parser.parse_args(argv).run))
    except (UserError, MachineError) as error:
        print(f"where.py: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0
