"""The command line of demo.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dist_lab.errors import MachineError, UserError
from dist_lab.programs.demo.command import Demo, demo

# A token has the space before its word, so the last line is one space short.
PROMPT = "def read_lines(path):\n    with open(path) as file:\n       "


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type demo.py alone, or see demo.py --help")


def main(argv: Sequence[str], description: str | None, launch: Path) -> int:
    """Run the demo. Returns the exit status.

    Args:
        launch: the folder of the programs.
    """
    parser = Parser(
        prog="demo.py", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", default=PROMPT,
                        help=f"the beginning of a function; default: {PROMPT!r}")  # fmt: skip
    parser.add_argument(
        "--steps", metavar="N", type=positive, default=600, help="of training [600]"
    )
    parser.add_argument("--tokens", metavar="N", type=positive, default=96,
                        help="generate so many at most [96]")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", default="runs/demo",
                        help="the run, which must not exist yet [runs/demo]")  # fmt: skip
    try:
        given = parser.parse_args(argv)
        demo(Demo(launch, Path(given.out), given.steps, given.prompt, given.tokens))
    except (UserError, MachineError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def positive(text: str) -> int:
    """Raises ValueError, of which argparse makes one line."""
    if (number := int(text)) < 1:
        raise ValueError
    return number
