"""The results of cells, and the file that keeps them, one JSON line a cell. Does not import torch.

A run that was stopped can be resumed: cells that are in the file as equal are not run again, if
the same code wrote them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import dist_lab

LINES = "matrix.jsonl"


@dataclass(frozen=True)
class Result:
    """The result of a cell.

    Attributes:
        name: of the cell.
        verdict: "equal"; "not equal"; "refused" by a UserError; "failed" by any other error or a
            hang; "skipped".
        why: one line, or the tracebacks of a failure; "" if equal.
        worst: quantity -> the largest error that counts.
        compared: the number of tensors and numbers that were compared.
        seconds: how long the cell took.
    """

    name: str
    ranks: int
    verdict: str
    why: str = ""
    worst: dict[str, float] = field(default_factory=dict)
    compared: int = 0
    seconds: float = 0.0

    @property
    def is_wrong(self) -> bool:
        return self.verdict not in ("equal", "skipped")

    @property
    def worst_error(self) -> float:
        return max(self.worst.values(), default=0.0)

    def line(self) -> str:
        """The verdict in one line.

        >>> Result("ddp:dp2 gpt m2", 2, "equal", worst={"loss": 2e-15}).line()
        'equal (2e-15)  ddp:dp2 gpt m2'
        """
        error = f" ({self.worst_error:.0e})" if self.verdict == "equal" else ""
        first = self.why.strip().partition("\n")[0]
        return f"{self.verdict}{error}  {self.name}" + (f": {first}" if first else "")


def equal_in(folder: Path) -> dict[str, Result]:
    """Cells that an earlier run with the same code found equal: name -> result."""
    results = {}
    path = folder / LINES
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values: dict[str, Any] = json.loads(line)
            code = values.pop("code")
            result = Result(**values)
        except (ValueError, TypeError, KeyError):  # a line that a killed run has not finished
            continue
        if result.verdict == "equal" and code == code_fingerprint():
            results[result.name] = result
    return results


def append(folder: Path, result: Result) -> None:
    line = json.dumps(asdict(result) | {"code": code_fingerprint()})
    with (folder / LINES).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


@cache
def code_fingerprint() -> str:
    """A hash of this package's source files."""
    package = Path(dist_lab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
