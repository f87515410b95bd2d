"""dist_lab: distributed training on one laptop, with every strategy written by hand.

    mesh = dist_lab.init_mesh(dp=4)
    job = dist_lab.parallelize(model, mesh, strategy="dp")

`import dist_lab` is instant and changes nothing in the process. A name is imported, and torch with
it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_lab.compose import parallelize
    from dist_lab.data.sampler import BatchSampler
    from dist_lab.errors import MachineError, ReplicasDiffer, TrainingDiverged, UserError
    from dist_lab.job import Job
    from dist_lab.loss import cross_entropy_sum
    from dist_lab.mesh.mesh import Axis, Mesh, init_mesh
    from dist_lab.programs.doctor.examine import doctor
    from dist_lab.programs.verify.engine import verify
    from dist_lab.randomness.dropout import Dropout
    from dist_lab.torchvision_import import fix_torchvision

WHERE = {
    "Axis": "mesh.mesh",
    "BatchSampler": "data.sampler",
    "Dropout": "randomness.dropout",
    "Job": "job",
    "MachineError": "errors",
    "Mesh": "mesh.mesh",
    "ReplicasDiffer": "errors",
    "TrainingDiverged": "errors",
    "UserError": "errors",
    "cross_entropy_sum": "loss",
    "doctor": "programs.doctor.examine",
    "fix_torchvision": "torchvision_import",
    "init_mesh": "mesh.mesh",
    "parallelize": "compose",
    "verify": "programs.verify.engine",
}

__version__ = "0.1.0"
__all__ = [
    "Axis", "BatchSampler", "Dropout", "Job", "MachineError", "Mesh", "ReplicasDiffer",
    "TrainingDiverged", "UserError", "cross_entropy_sum", "doctor", "fix_torchvision", "init_mesh",
    "parallelize", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'dist_lab' has no attribute {name!r}")
    return getattr(import_module(f"dist_lab.{WHERE[name]}"), name)
