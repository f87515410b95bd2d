"""checkpoint.py reshard: a checkpoint in another layout, without starting its ranks.

Each rank of the new mesh is built in this process, one after another, on a mesh whose other ranks
are simulated (`dry_run`). It loads the boxes that it holds, as on a real mesh, and its part is
written. So the layouts cannot differ from those of a run, and the memory is that of one rank.

A run needs no resharding: it resumes from any layout. But it may read less then, and files from
another number of ranks need not be kept.
"""

import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from dist_lab.checkpoint.entries import Entry, entry_of
from dist_lab.checkpoint.exchange.ours import about_of, optimizer_of
from dist_lab.checkpoint.load import load
from dist_lab.checkpoint.offline import OfflineWriter
from dist_lab.checkpoint.optimizer_state import numbers_of, options_of
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.checkpoint.saver import entries_of
from dist_lab.job import Job
from dist_lab.layout.gather import local_part
from dist_lab.mesh.mesh import Mesh, dry_run
from dist_lab.observe.console import watched
from dist_lab.programs.checkpoint.settings import Reshard, layout_of
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.find import check_data, check_target, newest, settings_of
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.setup import build, open_run
from dist_lab.programs.train import loop
from dist_lab.randomness import generators


def reshard(config: Reshard) -> int:
    """Write the checkpoint in the layout that --mesh and --strategy say. Returns 0."""
    check_target(config.target)
    source = newest(config.source)
    source.verify()
    settings = settings_of(source)
    check_data(config.source, config.data, settings)
    # A run with another batch may go on from these weights, so the batch need not divide here.
    settings.pop("batch", None)
    run = layout_of(config, **settings)
    size = math.prod((config.mesh or {}).values())
    run = run.fitted(size)
    axes, target = run.axes(size) or {"dp": 1}, Path(config.target).expanduser().absolute()
    about = {key: source.manifest[key] for key in ("settings", "extra", "tied", "versions")}
    about |= {"strategies": "", "optimizer": None}  # the first rank says
    tokenizer = source.tokenizer
    with OfflineWriter(target, source.step, axes, about, tokenizer=tokenizer) as writer:
        for rank in watched(range(size), "ranks written"):
            write_part(writer, source, run, axes, rank)
            gc.collect()  # hooks and modules refer to each other: free them before the next rank
        path = writer.commit()
    where = f"{mesh_in_words(axes)}: {size} ranks" if size > 1 else "one process"
    print(f"resharded {source.folder} to {path}, {where}")
    return 0


def write_part(
    writer: OfflineWriter, source: Checkpoint, run: Config, axes: Mapping[str, int], rank: int
) -> None:
    """Build one rank, load what it holds, and write it."""
    with dry_run(axes, rank) as mesh:
        table, about, entries = part_on(mesh, source, run)
        writer.about |= about
        writer.write(rank, entries, table)


def part_on(
    mesh: Mesh, source: Checkpoint, run: Config
) -> tuple[dict[str, Any], dict[str, Any], list[Entry]]:
    """This rank's table, what the manifest says about the job, and the entries that it holds."""
    job = build(run, mesh, open_run(run, mesh))
    optimizer = loop.make_optimizer(job, run) if optimizer_of(source) else None
    before = generators.to_json()
    try:
        load(source, job, optimizer)
        random = generators.to_json()
    finally:
        generators.from_json(before)
    table = {
        "random": random,
        "optimizer": own_groups(source, optimizer, job) if optimizer else None,
        "numbers": numbers_of(optimizer, job) if optimizer else {},
        "modules": about_of(source)["modules"],
    }
    about = {"strategies": job.strategies}
    about |= {"optimizer": table["optimizer"]} if mesh.rank == 0 else {}
    entries = [*entries_of(job, optimizer, None), *_shadow(source, job)]
    return table, about, entries


def own_groups(source: Checkpoint, optimizer: Optimizer, job: Job) -> dict[str, Any]:
    """The source's groups of the optimizer, with the names that this rank has.

    Groups have one order on all ranks. Here the parameters of other stages are not known, so this
    rank's optimizer may have another order.
    """
    saved = optimizer_of(source)
    assert saved is not None
    own = [name for group in options_of(optimizer, job)["groups"] for name in group["names"]]
    return {
        "class": saved["class"],
        "groups": [
            {"options": group["options"], "names": [name for name in own if name in group["names"]]}
            for group in saved["groups"]
        ],
    }


def _shadow(source: Checkpoint, job: Job) -> Iterator[Entry]:
    """The moving average of the weights, if there is one: it lies as the parameters do."""
    names = source.names()
    for name, parameter in job.named_parameters():
        if f"shadow/{name}" in names:
            _, dtype = names[f"shadow/{name}"]
            local = torch.empty_like(local_part(parameter.detach()), dtype=dtype)
            entry = entry_of(f"shadow/{name}", job.layouts[name], local, job.mesh)
            source.read_into(entry)
            yield entry
