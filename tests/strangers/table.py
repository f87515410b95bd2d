"""Prints the table of situations and strategies in RESULTS.md: `python tests/strangers/table.py`.

The table shows what each situation expects; test_strangers.py checks that this is what happens.
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
    """Return the table in Markdown, with one row for each situation."""
    lines = [
        "| situation | reported in | " + " | ".join(EVERY) + " |",
        "|---|---|" + "---|" * len(EVERY),
    ]
    for situation in SITUATIONS.values():
        sentence = " ".join(situation.body.__doc__.split()).rstrip(".")
        cells = ["refused" if s in situation.refused else "exact" for s in EVERY]
        sources = ", ".join(situation.sources) or "-"
        lines.append("| " + " | ".join([sentence, sources, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    collect()
    print(table())
