"""Takes the two steps of `observe` on real ranks, and compares them with each rank's dry run."""

import gc

from dist_lab.layout.layout import to_json
from dist_lab.mesh import groups
from dist_lab.mesh.mesh import dry_run, init_mesh
from dist_lab.programs.cli.config import Config
from dist_lab.programs.explain.dry_run import DryRunResult, observe
from dist_lab.programs.explain.shapes_only import shapes_only


def explained_and_real(config: Config, mesh) -> tuple[dict, dict]:
    """Run on all ranks; then each rank explains itself, as `explain.py --rank` does.

    Returns:
        The dry run and the real one, as comparable values.
    """
    axes = config.axes(mesh.size)
    real = as_values(observe(config, init_mesh(timeout=mesh.timeout, **axes)))
    groups.disconnect()  # from here on each rank is a single process, as explain.py is
    gc.collect()
    with dry_run(axes, mesh.rank) as other, shapes_only(other, small=1024):
        return as_values(observe(config, other)), real


def as_values(result: DryRunResult) -> dict:
    return {
        "first": as_tuples(result.first),
        "steady": as_tuples(result.steady),
        "memory": result.peak.to_dict(),
        "peak": result.peak.total,
        "layouts": {name: to_json(layout) for name, layout in result.job.layouts.items()},
    }


def as_tuples(calls) -> list[tuple]:
    return [(c.phase, c.op, c.axis, c.size, c.unit, c.payload, c.sent) for c in calls]
