"""Writes the table of situations and strategies: `python tests/strangers/table.py` prints it.

It is made from what each situation expects, and test_strangers.py sees that this is what happens.
"""

import importlib
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "helpers"))  # pytest does so itself

from situation import EVERY, SITUATIONS  # noqa: E402


def collect() -> None:
    """Import every file of situations."""
    for path in sorted(HERE.glob("as_people_*.py")):
        importlib.import_module(path.stem)


def table() -> str:
    """Markdown, a row a situation."""
    lines = [
        "| situation | reported in | " + " | ".join(EVERY) + " |",
        "|---|---|" + "---|" * len(EVERY),
    ]
    for situation in SITUATIONS.values():
        said = " ".join(situation.body.__doc__.split()).rstrip(".")
        cells = ["refused" if s in situation.refused else "exact" for s in EVERY]
        sources = ", ".join(situation.sources) or "-"
        lines.append("| " + " | ".join([said, sources, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    collect()
    print(table())
