"""Is the state of an optimizer in a checkpoint one that such an optimizer can go on with?

Hashes show that a checkpoint is what its author has saved, not that it is right. A moment that is
missing would be a KeyError in the next step, or begin at zero without a word. So keys and options
are compared before any tensor is read.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_lab.checkpoint.entries import Shape
from dist_lab.checkpoint.manifest import ANOTHER, Damaged
from dist_lab.errors import UserError, shown
from dist_lab.optim.muon import Muon
from dist_lab.optim.shampoo import Shampoo

KNOWN = ("torch", "dist_lab")  # packages whose optimizers make all keys of a state at once
ADAM = (torch.optim.Adam, torch.optim.AdamW)
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
WITH_STATE = (*ADAM, Muon, Shampoo)  # after a step they have some


def check_stepped(name: str, kind: type[Optimizer], tensors: Iterable[str]) -> None:
    """Raise Damaged if the optimizer must have some state, as it has stepped, and has none.

    Args:
        tensors: the names of those in the checkpoint.
    """
    if kind in WITH_STATE and not any(tensor.startswith("optimizer/") for tensor in tensors):
        raise Damaged(
            f"checkpoint {name!r} was saved after steps of {kind.__name__}, and has no state of "
            f"it for any parameter; {ANOTHER}"
        )


def check_state(
    name: str,
    kind: type[Optimizer],
    tables: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, Shape],
    numbers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Compare the keys of the state of all parameters that have some.

    Args:
        name: the checkpoint, for messages.
        kind: the class of the optimizer that is to go on.
        tables: of the optimizer, on each rank, as from `options_of`.
        shapes: name -> shape of the full tensor, of the checkpoint's tensors.
        numbers: as from `numbers_of`, of all ranks.

    Raises:
        Damaged: one lacks a key that others of its group and number of dims have.
    """
    if kind.__name__ != tables[0]["class"] or kind.__module__.partition(".")[0] not in KNOWN:
        return
    keys = _keys(shapes, numbers)
    common: dict[tuple[int, int], set[str]] = {}
    for number, group in _groups(tables):
        for parameter in (parameter for parameter in group["names"] if parameter in keys):
            shape = shapes.get(f"model/{parameter}", ())
            needed = MOMENTS if kind in ADAM else set()
            if kind in ADAM and group["options"].get("amsgrad"):
                needed = MOMENTS | {"max_exp_avg_sq"}
            wanted = common.setdefault((number, len(shape)), keys[parameter] | needed)
            if differing := sorted(wanted ^ keys[parameter]):
                raise Damaged(
                    f"checkpoint {name!r} has {differing[0]} of some parameters that "
                    f"{kind.__name__} has stepped and not of others, such as {parameter}; {ANOTHER}"
                )
            for key in MOMENTS - {"step"} if kind in ADAM else ():
                if (found := shapes.get(f"optimizer/{parameter}/{key}")) != shape:
                    raise Damaged(
                        f"checkpoint {name!r} has {key} of shape {found} for {parameter} of shape "
                        f"{shape}; {ANOTHER}"
                    )


def check_imported(
    name: str,
    kind: type[Optimizer],
    table: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    parameters: Container[str],
) -> None:
    """Compare what another library has saved, which does not say of what class the optimizer was.

    Args:
        table: of the optimizer that is to go on, as from `options_of`.
        parameters: the names of the model's.

    Raises:
        UserError: it is of parameters that the model does not have, or of another optimizer.
    """
    keys = _keys(shapes, {})
    if unknown := [parameter for parameter in keys if parameter not in parameters]:
        raise UserError(
            f"checkpoint {name!r} has moments of {shown(unknown[0])}, which is no parameter of "
            "this model; save it again with the names of torch's get_state_dict(model, optimizer), "
            "or load without an optimizer"
        )
    found, wanted = set().union(*keys.values()), set[str]()
    if kind in ADAM:
        amsgrad = any(group["options"].get("amsgrad") for group in table["groups"])
        wanted = MOMENTS | ({"max_exp_avg_sq"} if amsgrad else set())
    elif kind is torch.optim.SGD:
        wanted = {"momentum_buffer"}
    if wanted and found != wanted:
        raise UserError(
            f"checkpoint {name!r} has {', '.join(sorted(found))} of an optimizer, and "
            f"{kind.__name__} keeps {', '.join(sorted(wanted))}; build the optimizer that it was "
            "saved with, or load without one"
        )


def check_options(name: str, own: Mapping[str, Any], saved: Mapping[str, Any], number: int) -> None:
    """Compare the kinds of a group's options. One that the optimizer has not must be a number.

    Raises:
        Damaged: one is of another kind, such as a text in place of a learning rate.
    """
    for key, value in saved.items():
        if _kind(value) != _kind(own.get(key, 0.0)):
            here = shown(own[key]) if key in own else "no such option"
            raise Damaged(
                f"checkpoint {name!r} has {key} {shown(value)} in group {number} of the optimizer, "
                f"which has {here}; build the same optimizer, or {ANOTHER}"
            )


def check_groups(name: str, tables: Sequence[Mapping[str, Any] | None]) -> None:
    """Raise Damaged unless all ranks have the same class, and as many groups."""
    kinds = {(table["class"], len(table["groups"])) if table else None for table in tables}
    if len(kinds) > 1:
        raise Damaged(f"checkpoint {name!r} has another optimizer on each rank; {ANOTHER}")


def _keys(
    shapes: Mapping[str, Shape], numbers: Mapping[str, Mapping[str, Any]]
) -> dict[str, set[str]]:
    """Parameter -> the keys of its state. Matrices that one tensor packs count as one."""
    keys = {name: set(values) for name, values in numbers.items()}
    for full_name in shapes:
        if full_name.startswith("optimizer/"):
            name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
            first, _, rest = key.partition(".")
            keys.setdefault(name, set()).add(rest if first.isdigit() else key)
    return keys


def _groups(tables: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for table in tables:
        yield from enumerate(table["groups"])


def _kind(value: Any) -> Any:
    """What an option is: a number, true or false, a text, None, or a list of these.

    >>> _kind((0.9, 1)) == _kind([0.9, 0.5]), _kind(1) == _kind(True)
    (True, False)
    """
    if isinstance(value, list | tuple):
        return [_kind(one) for one in value]
    if isinstance(value, Tensor):
        return _kind(value.item())
    return float if type(value) in (int, float) else type(value)
