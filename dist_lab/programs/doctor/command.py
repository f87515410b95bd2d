"""What one rank of `launch/doctor.py` runs."""

import os

from dist_lab.comm.agree import together
from dist_lab.data.user_code import importable_from
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import export, run_dir
from dist_lab.observe.console import wide_console
from dist_lab.programs.doctor import examine
from dist_lab.programs.doctor.settings import Doctor
from dist_lab.programs.doctor.subject import load


def doctor(config: Doctor, mesh: Mesh) -> int:
    """Examine the model that a function builds.

    Returns:
        Exit status 0 if every strategy in --strategies is exact. Without --strategies, 0 if at
        least one parallel strategy is exact.
    """
    with importable_from(os.getcwd()):  # the function may import modules while it runs
        with together(mesh.world):
            if mesh.rank == 0 and config.out:
                folder = run_dir.make_folder(config.out, "doctor.json")
            function = load(config.function)
        report = examine.doctor(
            function, mesh, units=config.unit_list, strategies=config.strategy_list,
            microbatches=config.microbatches, steps=config.steps,
        )  # fmt: skip
    if mesh.rank == 0:
        wide_console().print(report)
        if config.out:
            export.write_json(folder / "doctor.json", report.to_dict())
    if config.strategy_list:
        return 0 if len(report.exact) == len(report.rows) else 1
    return 0 if set(report.exact) - {"single"} else 1
