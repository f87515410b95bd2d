"""Loading: each rank reads the boxes that it holds, whoever has saved them.

    open_newest      all ranks agree on a checkpoint, and share out the work of checking its hashes
    load             names, shapes and options are compared first; then tensors are read

The layout may be another one than at the save: another number of ranks, another strategy, other
stages. A rank reads its boxes of parameters and moments from the files of the ranks that had them.
Random generators go on where they were if the mesh is the same; on another mesh they are seeded
anew, because there is no rank whose numbers they could continue.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint.entries import Entry, Trained, extra_state, model_entries
from dist_lab.checkpoint.manifest import Damaged, of_others
from dist_lab.checkpoint.optimizer_state import (
    create_state,
    load_options,
    options_of,
    unwrapped,
)
from dist_lab.checkpoint.reader import Checkpoint, first_difference
from dist_lab.checkpoint.saver import shadow_entries
from dist_lab.checkpoint.state_check import check_groups, check_imported, check_state
from dist_lab.comm import ops
from dist_lab.comm.agree import first_says, together
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh
from dist_lab.randomness import generators
from dist_lab.step.shadow import Shadow


def open_newest(
    folder: str | Path, mesh: Mesh, tell: Callable[[str], None] = lambda line: None
) -> Checkpoint:
    """Open a checkpoint, or the newest one in a folder that is whole. Collective.

    Args:
        tell: called on rank 0 with a line for each checkpoint that is damaged.

    Raises:
        UserError: there is none, or a newer version of this library has saved the newest.
        MachineError: this one, or every one in the folder, is damaged; or one cannot be read now.
    """
    path = Path(folder).expanduser().absolute()

    def listed() -> str:
        if path.is_dir() and not folders.is_checkpoint(path):
            found = [str(step) for _, step in folders.steps(path)]
            if not found:
                raise UserError(f"there is no checkpoint in {str(path)!r}{of_others(path)}")
            return json.dumps(found)
        return json.dumps([str(path)])

    with mesh.comm.label("load", unit=""):
        paths = json.loads(first_says(listed, mesh.world))
        for number, candidate in enumerate(paths, 1):
            damage = ""
            with together(mesh.world):
                try:
                    checkpoint = Checkpoint.open(candidate)
                    check_name(checkpoint)
                    for file in checkpoint.files()[mesh.rank :: mesh.size]:
                        checkpoint.verify_file(file)
                except Damaged as error:
                    damage = str(error)
            damage = first_text(damage, mesh)
            if not damage:
                return checkpoint
            if number == len(paths):
                raise Damaged(damage)
            if mesh.rank == 0:
                tell(f"{damage}: taking {Path(paths[number]).name}")
    raise AssertionError("a folder without checkpoints was refused above")


def first_text(text: str, mesh: Mesh) -> str:
    """The text of the first rank that has one, on every rank; "" if none has. Collective."""
    texts = map(json.loads, ops.all_gather_bytes(json.dumps(text).encode(), mesh.world))
    return next(filter(None, texts), "")


def check_name(checkpoint: Checkpoint) -> None:
    """Raise UserError if a folder named for one step has the checkpoint of another."""
    match = folders.WHOLE.fullmatch(checkpoint.folder.name)
    if match and int(match[1]) != checkpoint.step:
        raise UserError(
            f"checkpoint {str(checkpoint.folder)!r} is of step {checkpoint.step}: it was renamed; "
            f"name it {folders.name_of(checkpoint.step)}"
        )


def load(
    checkpoint: Checkpoint,
    job: Trained,
    optimizer: Optimizer | None = None,
    *,
    shadow: Shadow | None = None,
) -> dict[str, Any]:
    """Load a checkpoint that `open_newest` has returned. Collective.

    Returns:
        The `extra` of the save.

    Raises:
        UserError: it is of another model or optimizer. Nothing has been changed then.
    """
    mesh, tables = job.mesh, checkpoint.tables
    saved = checkpoint.names()
    numbers = {k: v for table in tables for k, v in table["numbers"].items()}
    with mesh.comm.label("load", unit=""):
        with together(mesh.world):
            entries = [*model_entries(job)]
            _check_model(checkpoint, job, entries)
            entries += shadow_entries(job, shadow) if shadow is not None else []
            if shadow is not None and not any(name.startswith("shadow/") for name in saved):
                raise UserError(
                    f"checkpoint {str(checkpoint.folder)!r} has no moving average; load it without"
                    " shadow="
                )
            if optimizer is not None:
                _check_optimizer(checkpoint, job, optimizer, numbers)
        with together(mesh.world):
            for entry in entries:
                checkpoint.read_into(entry)
            if optimizer is not None:
                for entry in create_state(optimizer, job, saved, numbers):
                    checkpoint.read_into(entry)
    _load_modules(job, tables)
    if shadow is not None:
        shadow.copy_buffers()
    job.weights_changed()
    job.place.step = checkpoint.step
    if checkpoint.manifest["mesh"] == dict(mesh.axes):
        generators.from_json(tables[mesh.rank]["random"])
    else:
        generators.start_anew(tables[0]["random"]["torch"], mesh.rank)
    return checkpoint.manifest["extra"] or {}


def _check_model(checkpoint: Checkpoint, job: Trained, entries: Sequence[Entry]) -> None:
    """Raise UserError unless the checkpoint has this model's tensors, in their shapes, and ties.

    Args:
        entries: of the model, on this rank.
    """
    layouts = {**job.layouts, **job.buffer_layouts()}
    own = {f"model/{name}": (tuple(x.shape), x.dtype) for name, x in layouts.items()}
    for entry in entries:  # a buffer that is expanded has a smaller shape there
        own[entry.name] = entry.shape, entry.local.dtype
    saved = checkpoint.names()
    there = {name: about for name, about in saved.items() if name.startswith("model/")}
    ties = checkpoint.manifest["tied"]  # None: it is not known, as from another library's file
    differences = [*first_difference(there, own), *other_ties(ties or job.tied, job.tied)]
    if differences:
        raise UserError(
            f"checkpoint {str(checkpoint.folder)!r} is of another model: {differences[0]}"
            + (f", and {len(differences) - 1} more differences" if differences[1:] else "")
        )


def _check_optimizer(
    checkpoint: Checkpoint, job: Trained, optimizer: Optimizer, numbers: Mapping[str, Any]
) -> None:
    """Raise UserError unless the optimizer can go on from its state. Sets the groups' options.

    Another library's file has moments, but no options as we know them: then the optimizer's stay.
    """
    name, kind = str(checkpoint.folder), type(unwrapped(optimizer))
    shapes = {tensor: shape for tensor, (shape, _) in checkpoint.names().items()}
    tables = [table["optimizer"] for table in checkpoint.tables]
    if tables[0] is None:
        has_moments = any(tensor.startswith("optimizer/") for tensor in shapes)
        if not has_moments or checkpoint.manifest["optimizer"] is not None:
            raise UserError(
                f"checkpoint {name!r} has no state of an optimizer; load it without one"
            )
        tables = [options_of(optimizer, job)]
        check_imported(name, kind, tables[0], shapes, job.layouts)
    check_groups(name, tables)
    check_state(name, kind, tables, shapes, numbers)
    load_options(optimizer, job, name, tables)


def other_ties(saved: Mapping[str, str], own: Mapping[str, str]) -> Iterator[str]:
    """Yield the names that are tied to other tensors in a checkpoint than in a model, in words.

    >>> [*other_ties({"head": "embedding"}, {})]
    ['head is embedding there and a name of its own here']
    """
    for name in sorted({**saved, **own}):
        there, here = (ties.get(name, "a name of its own") for ties in (saved, own))
        if there != here:
            yield f"{name} is {there} there and {here} here"


def _load_modules(job: Trained, tables: list[Mapping[str, Any]]) -> None:
    """Give modules their extra state: each from the rank that had it."""
    states = {name: value for table in reversed(tables) for name, value in table["modules"].items()}
    for name in extra_state(job.model):
        if name in states:
            job.model.get_submodule(name.rpartition(".")[0]).set_extra_state(states[name])
