"""A trial of a user's model: the model, the ranks, and the options of each strategy."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_lab.comm.context import CommContext
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.parallel.tensor.plan import Plan
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.doctor.subject import Subject
from dist_lab.programs.verify import batch as batches

Unit = type[nn.Module] | str


@dataclass(frozen=True)
class Trial:
    """A model under examination, its ranks and its settings. `units` are module names."""

    subject: Subject
    mesh: Mesh
    units: tuple[str, ...]
    plan: Plan | str | None
    microbatches: int
    steps: int

    def mesh_for(self, strategy: str) -> Mesh:
        """A mesh for one strategy: over the same ranks, or of this rank alone for `single`."""
        comm, timeout = self.mesh.comm, self.mesh.timeout
        if not STRATEGIES[strategy].axes or self.mesh.size == 1:
            axes = STRATEGIES[strategy].default_axes(1) or {"dp": 1}
            return Mesh(axes, CommContext(0, 1, backend=comm.backend), timeout)
        axes = STRATEGIES[strategy].default_axes(self.mesh.size)
        return init_mesh(
            timeout=timeout, backend=comm.backend, check=comm.check, collectives=comm.collectives,
            **axes,
        )  # fmt: skip

    def microbatches_of(self, strategy: str) -> int:
        """The number of micro-batches of one rank.

        pp on p ranks uses 2p, as long as each keeps four rows: BatchNorm over fewer is too noisy.
        """
        if strategy != "pp" or self.subject.batch is None:
            return self.microbatches
        rows = batches.rows_in(self.subject.batch[0])
        most = max(rows // 4, min(2, rows // 2))
        return max(self.microbatches, min(most, 2 * self.mesh.size))

    def options(self, strategy: str, batch: Pair | None) -> dict[str, Any]:
        """The strategy's options for `parallelize`."""
        if strategy in ("fsdp", "hsdp"):
            return {"units": self.units}
        if strategy == "tp" and self.plan is not None:
            return {"plan": self.plan}
        if strategy == "pp" and batch is not None:
            first = batches.slice_rows(batch, self.microbatches_of("pp"))[0]
            return {"example_inputs": first[0]}
        return {}
