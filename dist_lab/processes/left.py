"""What a run leaves in its output folder: a fault on purpose that ended a rank, and how to go on.

Only names of files and lines of JSON are read, so that the launcher need not import torch.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_lab.faults.grammar import FILE
from dist_lab.observe.run_dir import CHECKPOINTS
from dist_lab.processes.failures import Failure

WHOLE = re.compile(r"step-\d{8,}")  # a save gives its folder this name last
FAULT = re.compile(r"(\w+):rank=(\d+)@")


def with_faults(failures: Sequence[Failure], out: str, since: float) -> list[Failure]:
    """Says of ranks that died without a message which fault of `--fault` it was, if it was one.

    Args:
        out: the output folder.
        since: time.time() at the start of this attempt.
    """
    kinds = {}
    for entry in rows(Path(out) / FILE):
        if entry["time"] >= since and (match := FAULT.match(entry["fault"])):
            kinds[int(match[2])] = match[1]
    return [
        replace(failure, summary=f"{failure.summary.partition(',')[0]}, by --fault {kind}")
        if (kind := kinds.get(failure.rank)) and not failure.details
        else failure
        for failure in failures
    ]


def way_on(out: str) -> str:
    """How far a run came that has been stopped, and how it goes on: in one line, without an end."""
    folder = Path(out)
    steps = [row["step"] for row in rows(folder / "metrics.jsonl")]
    names = [path.name for path in (folder / CHECKPOINTS).glob("step-*")]
    whole = sorted(filter(WHOLE.fullmatch, names), key=lambda name: (len(name), name))
    if not steps and not whole:
        return "it has logged no step and saved no checkpoint"
    logged = f"last logged step {steps[-1]}" if steps else "no step was logged since"
    if not whole:
        return f"{logged}; no checkpoint is whole in {out}, --save-every N saves some"
    return (
        f"{logged}; newest whole checkpoint {folder / CHECKPOINTS / whole[-1]}; to go on, give the "
        f"same command with --resume auto --out {out}"
    )


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON objects. The last one may be cut off."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)
