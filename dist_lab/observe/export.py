"""Writes a measurement to files: everything as JSON, its rows as CSV, and a picture."""

import csv
import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lab.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(
    folder: Path,
    name: str,
    everything: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    picture: "Figure",
) -> None:
    """Write NAME.json, NAME.csv and NAME.png to `folder`. All rows have the first one's columns."""
    write_json(folder / f"{name}.json", everything)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    picture.savefig(folder / f"{name}.png")


def write_json(path: Path, everything: Mapping[str, Any]) -> None:
    """Write JSON to a file, at once: a reader, or a stop at any moment, never leaves half of it."""
    text = json.dumps(everything, indent=1, allow_nan=False) + "\n"
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a MachineError of one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        free = f", {shutil.disk_usage(folder).free:,} bytes are free" if full else ""
        raise MachineError(
            f"cannot write to {str(error.filename or folder)!r}: {error.strerror}{free}; make room,"
            " or give another folder (--out)"
        ) from error
