"""checkpoint.py verify: is every file of a checkpoint what was saved?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.files import sha256_of
from dist_lab.checkpoint.load import check_name
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import MachineError, UserError, shown
from dist_lab.observe.console import watched
from dist_lab.programs.checkpoint.settings import Verify
from dist_lab.programs.cli.find import all_in


def verify(config: Verify) -> int:
    """Print a line for each checkpoint, and one for each file that is wrong. Returns 0 or 1."""
    paths = all_in(config.checkpoint)
    if len(paths) == 1 and not (paths[0] / "manifest.json").is_file():
        Checkpoint.open(paths[0])  # raises: it is none, or not whole
    bad = 0
    for path in paths:
        problems = wrong_in(path)
        bad += bool(problems)
        for problem in problems:
            print(problem)
        if not problems:
            files = manifest.read(path)["files"]
            print(f"{path}: whole, {size_in_words(path, files)}, every SHA-256 as saved")
            for name in sorted({entry.name for entry in path.iterdir()} - {manifest.NAME, *files}):
                print(f"{path}: {shown(name)} is not of the checkpoint, and was not checked")
    if len(paths) > 1:
        print(f"{len(paths) - bad} of {len(paths)} checkpoints are whole")
    return 1 if bad else 0


def wrong_in(path: Path) -> list[str]:
    """What is wrong with a checkpoint: a line for each file that was changed."""
    try:
        checkpoint = Checkpoint.open(path)
        check_name(checkpoint)
    except (UserError, MachineError) as error:
        return [str(error)]
    problems = []
    for name in watched(checkpoint.files(), f"files of {path.name}"):
        expected = checkpoint.manifest["files"][name]["sha256"]
        try:
            actual = sha256_of(path / name)
        except OSError as error:
            problems.append(f"cannot read {str(path / name)!r}: {error.strerror}")
            continue
        if actual != expected:
            problems.append(
                f"{str(path / name)!r} was changed: its SHA-256 is {actual}, and was {expected} "
                "when it was saved"
            )
            continue
        try:
            checkpoint.check_tensors(name)
        except MachineError as error:
            problems.append(str(error))
    return problems


def size_in_words(path: Path, files: Mapping[str, Any]) -> str:
    """The number of files that were checked, and their bytes. `files`: of the manifest."""
    size = (path / manifest.NAME).stat().st_size + sum(about["bytes"] for about in files.values())
    return f"{len(files) + 1} files, {size:,} bytes"
