"""Checkpoints that are damaged, or made by someone who does not mean well."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.exchange.tensors import same_bits
from dist_lab.checkpoint.files import sha256_of
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import MachineError, UserError

ODD_VALUES = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, "", "x", "../x", "/etc/passwd", "a\0b", "é",
    [], [1], [[]], {}, {"a": 1}, "rank-0.json", "load", "float64", [-1, 2], [[[0, 10**18]]],
]  # fmt: skip


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def flips_not_found(folder: Path, count: int, seed: int) -> list[str]:
    """Flip single bits of a checkpoint, one after another. Returns those that were not found, or
    whose message does not name the file and both hashes.

    A flip in manifest.json may make it no JSON, or change the hash that it says; then there are no
    two hashes to name.
    """
    draw, missed = random.Random(seed), []
    files = sorted(path for path in folder.iterdir())
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        # Half of the flips by size, and half in any file: the tables are small.
        path = draw.choices(files, sizes if number % 2 else None)[0]
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        line = refusal(folder)
        named = path.name in line and ("SHA-256" in line or path.name == manifest.NAME)
        if not named or "\n" in line:
            missed.append(f"{path.name}, bit {bit}: {line or 'not found'}")
        flip(path, bit)
    assert not refusal(folder)
    return missed


def refusal(folder: Path) -> str:
    """The message with which a checkpoint is refused; "" if it is read."""
    try:
        Checkpoint.open(folder).verify()
    except (UserError, MachineError) as error:
        return str(error)
    return ""


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one change: a key removed or added, or another value."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    holder, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "", "../x", "__class__"])] = draw.choice(ODD_VALUES)
    elif kind == 2 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * draw.choice([-1, 2, 10**6]) + draw.choice([-1, 0, 1])
    else:
        holder[key] = draw.choice(ODD_VALUES)
    return value


def _places(value: Any):
    """All (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def seal(folder: Path) -> None:
    """Make all hashes of a checkpoint right again, as its author could."""
    path = folder / manifest.NAME
    about = json.loads(path.read_text())
    if isinstance(about.get("files"), dict):
        for name, entry in about["files"].items():
            table = folder / name if name.endswith(".json") and "\0" not in name else folder
            if table.is_file() and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys():
                entry |= {"bytes": table.stat().st_size, "sha256": sha256_of(table)}
    about.pop("sha256", None)
    path.write_bytes(manifest.sealed(about))


def read_all(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
