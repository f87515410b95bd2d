"""Two steps of rank 0, run against ranks that are only simulated.

The step is not described, it is run: rank 0's real model, strategy and loop, on a mesh whose other
ranks are pretended (`mesh.dry_run`). So what is shown cannot differ from what a run does, and
costs two steps of one rank in time and memory.
"""

from dataclasses import dataclass, replace

from torch.optim import Optimizer

from dist_lab.comm.ledger import Call
from dist_lab.job import Job
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import memory
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.setup import build, open_run
from dist_lab.programs.train import loop
from dist_lab.programs.train.meter import Meter


@dataclass(frozen=True)
class Seen:
    """Two steps of rank 0: the first, in which a strategy may learn, and one like all others."""

    job: Job
    optimizer: Optimizer
    first: list[Call]
    steady: list[Call]
    peak: memory.Peak


def observe(config: Config, mesh: Mesh) -> Seen:
    """Run the two steps on a mesh, of which this process is rank 0."""
    data = open_run(replace(config, log_collectives=False), mesh)
    job = build(config, mesh, data)
    optimizer = loop.make_optimizer(job, config)
    steps, meter = [], Meter(job, optimizer)
    for number in range(2):
        rows = data.batch(number, loop.own_rows(config.batch, job))
        with meter.step(number + 1), mesh.comm.ledger.recording() as calls:
            loop.take_step(job, optimizer, *rows, number + 1, config)
        steps.append(calls)
    return Seen(job, optimizer, steps[0], steps[1], meter.memory)
