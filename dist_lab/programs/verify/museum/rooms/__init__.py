"""The rooms of the museum: a group of bugs -> its exhibits. To add one, append it to a room."""

import difflib
from collections.abc import Mapping

from dist_lab.errors import UserError, shown
from dist_lab.programs.verify.museum.exhibit import Exhibit
from dist_lab.programs.verify.museum.rooms import (
    accumulation,
    normalization,
    norms,
    pipeline,
    replicas,
    sharded,
    state,
    tensor,
)

ROOMS: Mapping[str, tuple[Exhibit, ...]] = {
    "normalization": normalization.EXHIBITS,
    "accumulation": accumulation.EXHIBITS,
    "replicas": replicas.EXHIBITS,
    "sharded parameters": sharded.EXHIBITS,
    "tensor parallelism": tensor.EXHIBITS,
    "pipelines": pipeline.EXHIBITS,
    "norms and clipping": norms.EXHIBITS,
    "initial weights, optimizers, buffers": state.EXHIBITS,
}
EXHIBITS = {exhibit.name: exhibit for room in ROOMS.values() for exhibit in room}


def exhibit_named(name: str) -> Exhibit:
    """The exhibit of that name.

    Raises:
        UserError: there is none; names the nearest ones.
    """
    if name not in EXHIBITS:
        containing = [key for key in EXHIBITS if name.lower() in key]
        close = difflib.get_close_matches(name[:99], EXHIBITS, n=3, cutoff=0.4)
        near = list(dict.fromkeys([*containing, *close]))[:3]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"no exhibit {shown(name)} (--bug); {hint}--bug list shows all {len(EXHIBITS)}"
        )
    return EXHIBITS[name]


def room_of(name: str) -> str:
    return next(room for room, all_in in ROOMS.items() if any(e.name == name for e in all_in))
