"""One comparison of a sweep, on each of its ranks."""

from pathlib import Path

from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import export
from dist_lab.programs.cli import setup
from dist_lab.programs.compare.measure import measure
from dist_lab.programs.compare.settings import Settings


def run(config: Settings, mesh: Mesh) -> int:
    """Measure all strategies; rank 0 writes the report to the file `config.out`."""
    data = setup.open_run(config, mesh)
    report = measure(config, mesh, data, config.entries())
    if report is not None:
        export.write_json(Path(config.out), report.to_dict())  # a sweep goes on after it
    return 0
