"""Runs the cells of a sweep that have no result yet, and reports all of them."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_lab.data import check
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe.run_dir import make_folder
from dist_lab.processes.launcher import on_new_ranks
from dist_lab.programs.sweep.report import report
from dist_lab.programs.sweep.results import points
from dist_lab.programs.sweep.settings import Cell, Sweep

# Settings that change no number.
IDLE = ("out", "debug", "timeout", "oversubscribe", "config", "about")


def run(sweep: Sweep, mesh: Mesh) -> int:
    """Measure one cell after another. A cell that was measured with these settings stays."""
    check(**sweep.data_wanted())
    folder = make_folder(sweep.out, "sweep.json")
    found = []
    cells = sweep.cells()
    for number, cell in enumerate(cells, 1):
        path = folder / f"{cell}.json"
        report_of_cell = read(path, cell)
        state = "measured before" if report_of_cell else cell.settings.strategies
        print(f"{number} of {len(cells)}: {cell}, {state}", flush=True)
        if report_of_cell is None:
            settings = replace(cell.settings, out=str(path))
            body = "dist_lab.programs.sweep.cell:run"
            if status := on_new_ranks("sweep.py", settings, body, cell.ranks):
                return status
            report_of_cell = read(path, cell)
            assert report_of_cell is not None, path
        found.append(report_of_cell)
    report(points(found), sweep, folder)
    return 0


def read(path: Path, cell: Cell) -> dict[str, Any] | None:
    """The report in a cell's file; None if there is none, or one of other settings."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(cell.settings.to_dict()))
        if meaning(found["setting"]["config"]) == meaning(wanted):
            return found
    return None


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in IDLE}
