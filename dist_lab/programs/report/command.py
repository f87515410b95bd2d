"""What `launch/report.py` does: it reads folders, and writes one page."""

from collections.abc import Sequence
from pathlib import Path

from dist_lab.errors import UserError
from dist_lab.observe.report.comparison import page_of_comparison
from dist_lab.observe.report.folder import REPORT, Comparison, Run, read
from dist_lab.observe.report.several import page_of_runs
from dist_lab.observe.run_dir import as_user_error


def report(words: Sequence[str], out: str = "") -> tuple[Path, list[str]]:
    """Writes the report of a run or of a comparison into its folder, of several beside them.

    Args:
        words: folders. An earlier report among them is ignored, so that runs/* can be given.
        out: the file to write, instead.

    Returns:
        The file, and a line about each folder that is left out of a report of several runs.

    Raises:
        UserError: a folder is not one of a finished run (of several: none is), or the file cannot
            be written.
    """
    folders = [Path(word).expanduser() for word in words if Path(word).name != REPORT]
    if not folders:
        raise UserError("no folder is given; type report.py and folders of runs, such as runs/*")
    folders = list({folder.resolve(): folder for folder in folders}.values())
    if len(folders) == 1:
        found = read(folders[0])
        return written(Path(out) if out else folders[0] / REPORT, page_of(found)), []
    runs, left_out = readable(folders)
    path = Path(out) if out else common_parent(folders) / REPORT
    return written(path, page_of_runs(runs, left_out, path.parent)), list(left_out.values())


def page_of(found: Run | Comparison) -> str:
    if isinstance(found, Comparison):
        return page_of_comparison(found)
    from dist_lab.observe.report.run import page_of_run  # imports torch, which is slow

    return page_of_run(found)


def readable(folders: Sequence[Path]) -> tuple[list[Run], dict[str, str]]:
    """The runs among some folders, and why the others are left out.

    Raises:
        UserError: no folder has a finished run.
    """
    runs, left_out = list[Run](), dict[str, str]()
    for folder in folders:
        try:
            found = read(folder)
            if isinstance(found, Run):
                runs.append(found)
            else:
                left_out[str(folder)] = (
                    f"{str(folder)!r} is a comparison, which has a report of its own: "
                    f"launch/report.py {folder}"
                )
        except UserError as error:
            left_out[str(folder)] = str(error)
    if not runs:
        first = next(iter(left_out.values()))
        raise UserError(f"none of {len(folders)} folders has a finished run; the first: {first}")
    return runs, left_out


def common_parent(folders: Sequence[Path]) -> Path:
    parents = {folder.resolve().parent for folder in folders}
    return parents.pop() if len(parents) == 1 else Path()


def written(path: Path, text: str) -> Path:
    with as_user_error(path.parent):
        path.write_text(text, encoding="utf-8")
    return path
