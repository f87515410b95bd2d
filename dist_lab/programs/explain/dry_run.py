"""A dry run: two steps of one rank, with all other ranks simulated.

The rank runs its real model, strategy and training loop on a mesh whose other ranks are simulated
(`mesh.dry_run`). So the result cannot differ from what a run does. With `shapes_only` it computes
hardly any values, and so needs little time and memory; else those of two steps of one rank.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch.optim import Optimizer

from dist_lab.comm.ledger import Call
from dist_lab.job import Job
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import memory, memory_series
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.setup import build, open_run
from dist_lab.programs.explain.shapes_only import shapes_only
from dist_lab.programs.train import loop
from dist_lab.programs.train.meter import Meter


@dataclass(frozen=True)
class DryRunResult:
    """The collectives and the memory of two steps of the rank.

    In the first step a strategy may learn the order of its buckets or units; the second is like all
    later steps.

    Attributes:
        operations: floating-point operations of a step, of all ranks that are not simulated.
        series: the bytes of the step with the higher peak over time: see memory_series.py.
    """

    job: Job
    optimizer: Optimizer
    first: list[Call]
    steady: list[Call]
    peak: memory.Peak
    operations: float
    series: memory_series.Entry


def observe(config: Config, mesh: Mesh, *, values: bool = True) -> DryRunResult:
    """Take the two steps as this rank of the mesh.

    Args:
        values: compute the step's numbers; False: only sizes, see shapes_only.py.
    """
    first, second = take_steps([config, config], mesh, values=values)
    higher = second if second.peak.total > first.peak.total else first
    return replace(second, first=first.steady, series=higher.series, operations=first.operations)


def take_steps(configs: Sequence[Config], mesh: Mesh, *, values: bool = True) -> list[DryRunResult]:
    """Take one step after another as this rank of the mesh, each with its own settings.

    Args:
        configs: they may differ in the number of their micro-batches, of which the last has most.

    Returns:
        A result for each step. Its `first` and `steady` are this step's; its `peak` is of this step
        or the first, as a run measures it: the larger one of each kind.
    """
    results: list[DryRunResult] = []
    with nullcontext() if values else shapes_only(mesh):
        data = open_run(replace(configs[-1], log_collectives=False), mesh)
        job = build(configs[-1], mesh, data)
        optimizer = loop.make_optimizer(job, configs[-1])
        for number, config in enumerate(configs):
            rows = data.batch(number, loop.own_rows(config.batch, job))
            meter = Meter(job, optimizer, first=number)
            with meter.step(), mesh.comm.ledger.recording() as calls:
                loop.take_step(job, optimizer, *rows, number + 1, config)
            peak = results[0].peak.worst(meter.memory) if results else meter.memory
            results.append(DryRunResult(
                job, optimizer, calls, calls, peak, meter.flops_per_step, meter.series
            ))  # fmt: skip
    return results
