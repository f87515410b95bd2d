"""A checkpoint of ours as `Tensors`, and `Tensors` as a checkpoint of ours.

The numbers of a checkpoint (step, options of the optimizer, settings) are JSON. On the way through
another form they are one more tensor, "about.json", of the bytes of that JSON. A form that has no
room for it, such as Hugging Face's, loses them; then a checkpoint begins at step 0.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lab.checkpoint import table
from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.exchange.llama import EMBEDDING, HEAD
from dist_lab.checkpoint.exchange.tensors import Kinds, Renamed, Tensors, Under
from dist_lab.checkpoint.manifest import TOKENIZER
from dist_lab.checkpoint.offline import OfflineWriter
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import UserError
from dist_lab.randomness import generators

ABOUT = "about.json"
IMPORTED = "imported"  # in place of strategies
KEYS = ("step", "optimizer", "numbers", "modules", "settings", "extra", "tied", TOKENIZER)


@dataclass(frozen=True)
class WithAbout:
    """All tensors of a checkpoint, and its numbers as the tensor "about.json"."""

    checkpoint: Checkpoint

    def names(self) -> Kinds:
        about = self.read(ABOUT)
        return {**self.checkpoint.names(), ABOUT: (about.shape, about.dtype)}

    def read(self, name: str) -> Tensor:
        if name != ABOUT:
            return self.checkpoint.read(name)
        text = json.dumps(about_of(self.checkpoint)).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def weights_of(checkpoint: Checkpoint) -> Tensors:
    """The tensors of the model, as `model.state_dict()` has them.

    A checkpoint has a tied tensor under its first name only. Here it has its other names, too.
    """
    weights = Under(checkpoint, "model/")
    names = {name: name for name in weights.names()}
    tied = checkpoint.manifest["tied"]
    if tied is None:  # not known: only a gpt's head can be missing
        tied = {HEAD: EMBEDDING}
    return Renamed(weights, {a: name for a, name in tied.items() if name in names} | names)


def about_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The numbers of a checkpoint, those of all ranks together."""
    tables = reversed(checkpoint.tables)
    return {
        "step": checkpoint.step,
        "optimizer": optimizer_of(checkpoint),
        "numbers": numbers_of(checkpoint),
        "modules": {name: state for part in tables for name, state in part["modules"].items()},
        "settings": checkpoint.manifest["settings"],
        "extra": checkpoint.manifest["extra"],
        "tied": checkpoint.manifest["tied"],
        TOKENIZER: checkpoint.tokenizer,
    }


def optimizer_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The class and the groups of the optimizer; each group with the names that any rank has."""
    tables = [part["optimizer"] for part in checkpoint.tables]
    if tables[0] is None:
        return None
    groups = []
    for number, group in enumerate(tables[0]["groups"]):
        same = [one for part in tables for one in part["groups"][number : number + 1]]
        names = {name for one in same for name in one["names"]}
        groups.append({"options": group["options"], "names": sorted(names)})
    return {"class": tables[0]["class"], "groups": groups}


def numbers_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Parameter -> key -> number, of the state that is no tensor."""
    return {name: n for part in checkpoint.tables for name, n in part["numbers"].items()}


def write(
    tensors: Tensors, root: str | Path, *, settings: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
) -> Path:  # fmt: skip
    """Write tensors as a checkpoint of one rank, in a folder of checkpoints.

    Args:
        tensors: named model/FQN, optimizer/FQN/KEY or shadow/FQN, with "about.json" or without.
        settings: of the run, if there is no "about.json".
        tokenizer: the contents of tokenizer.json, likewise.

    Returns:
        The new checkpoint.

    Raises:
        UserError: "about.json" is not as we write it, or there is a checkpoint of its step.
        MachineError: it cannot be written.
    """
    about: dict[str, Any] = {"step": 0, "optimizer": None, "numbers": {}, "modules": {}}
    about |= {
        "extra": None,
        "tied": None,
        "settings": dict(settings) if settings is not None else None,
        TOKENIZER: tokenizer,
    }
    if ABOUT in tensors.names():
        about = _read_about(tensors.read(ABOUT))
    entries = [_whole(name, tensors.read(name)) for name in tensors.names() if name != ABOUT]
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    manifest = {key: about[key] for key in ("optimizer", "settings", "extra", "tied")}
    strategies = "single@hand" if ABOUT in tensors.names() else IMPORTED
    manifest |= {"strategies": strategies, "versions": versions}
    own = {key: about[key] for key in ("optimizer", "numbers", "modules")}
    folder = Path(root).expanduser().absolute()
    one, tokenizer = {"dp": 1}, about[TOKENIZER]
    with OfflineWriter(folder, about["step"], one, manifest, tokenizer=tokenizer) as writer:
        writer.write(0, entries, {**own, "random": generators.to_json()})
        return writer.commit()


def _whole(name: str, tensor: Tensor) -> Entry:
    box = tuple(slice(0, length) for length in tensor.shape)
    return Entry(name, tuple(tensor.shape), [box], True, tensor)


def _read_about(tensor: Tensor) -> dict[str, Any]:
    try:
        about = json.loads(bytes(tensor.tolist()))
    except (ValueError, TypeError, RecursionError):
        about = None
    try:
        if isinstance(about, dict):
            about = {TOKENIZER: None} | about  # exports had none before there were tokenizers
        table.keys(about, set(KEYS))
        assert isinstance(about, dict)
        if not isinstance(about[TOKENIZER], str | None):
            raise table.Odd(f"a {TOKENIZER} that is no text")
        table.length(about["step"])
        table.optimizer(about["optimizer"])
        table.mapping(about["numbers"], lambda numbers: table.mapping(numbers, table.number))
        table.mapping(about["modules"], lambda state: None)
        for key in ("settings", "extra"):
            table.mapping(about[key] or {}, lambda value: None)
        table.mapping(about["tied"] or {}, table.text)
    except table.Odd as error:
        raise UserError(f"its {ABOUT} has {error}; get the whole folder again") from None
    return about
