"""What is tried: somebody's model on some ranks, and what each strategy is told of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_lab.comm.context import Wire
from dist_lab.errors import UserError
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.parallel.tensor.plan import Plan
from dist_lab.programs.cli.registry import STRATEGIES
from dist_lab.programs.doctor.subject import Subject
from dist_lab.programs.verify import batch as batches

Unit = type[nn.Module] | str


@dataclass(frozen=True)
class Trial:
    """What is tried, on which ranks, and what it is told. `units` are names of modules."""

    subject: Subject
    mesh: Mesh
    units: tuple[str, ...]
    plan: Plan | None
    microbatches: int
    steps: int

    def own_mesh(self, strategy: str) -> Mesh:
        """A mesh for one strategy, over the same ranks, or of this rank alone."""
        wire, timeout = self.mesh.wire, self.mesh.timeout
        if not STRATEGIES[strategy].axes or self.mesh.size == 1:
            axes = STRATEGIES[strategy].default_axes(1) or {"dp": 1}
            return Mesh(axes, Wire(0, 1, backend=wire.backend), timeout)
        axes = STRATEGIES[strategy].default_axes(self.mesh.size)
        return init_mesh(
            timeout=timeout, backend=wire.backend, check=wire.check, collectives=wire.collectives,
            **axes,
        )  # fmt: skip

    def microbatches_of(self, strategy: str) -> int:
        """A pipeline of p ranks has 2p, if each then has four rows: of fewer BatchNorm is rough."""
        if strategy != "pp" or self.subject.batch is None:
            return self.microbatches
        rows = batches.rows_in(self.subject.batch[0])
        most = max(rows // 4, min(2, rows // 2))
        return max(self.microbatches, min(most, 2 * self.mesh.size))

    def options(self, strategy: str, batch: Pair | None) -> dict[str, Any]:
        """What `parallelize` is told besides."""
        if strategy in ("fsdp", "hsdp"):
            return {"units": self.units}
        if strategy == "tp" and self.plan is not None:
            return {"plan": self.plan}
        if strategy == "pp" and batch is not None:
            first = batches.slice_rows(batch, self.microbatches_of("pp"))[0]
            return {"example_inputs": first[0]}
        return {}


def units_by_name(model: nn.Module, units: Iterable[Unit]) -> dict[str, nn.Module]:
    """The units, each a class, the name of a class or of a module. UserError: one matches none."""
    modules = {name: module for name, module in model.named_modules() if name}
    classes = {type(module).__name__ for module in modules.values()}
    found: dict[str, nn.Module] = {}
    for unit in units:
        matched = {
            name: module
            for name, module in modules.items()
            if (unit in (name, type(module).__name__) if isinstance(unit, str)
                else isinstance(module, unit))
        }  # fmt: skip
        if not matched:
            label = unit if isinstance(unit, str) else unit.__name__
            raise UserError(
                f"unit {label} matches no module (--units); classes here: "
                f"{', '.join(sorted(classes))}"
            )
        found |= matched
    return found
