"""Folders of torch.distributed.checkpoint (DCP), and back.

    .metadata        a pickle: names, shapes, and which part of a tensor is where in which file
    __0_0.distcp     the parts of tensors that rank 0 wrote, each a small file of torch.save

DCP itself unpickles `.metadata`, which runs whatever is in it. We read it as data
(pickled_data.py), check it, and load each part with `weights_only`. DCP writes no hashes: a part
with a flipped bit loads, here as there. An export goes through DCP's own writer.

DCP joins the keys of nested dicts by dots, and keeps the path of keys beside. The paths of an
export are those that torch's own programs use for a model and its optimizer:

    model/FQN              {"model": {FQN: ...}}                      model.FQN
    optimizer/FQN/KEY      {"optimizer": {"state": {FQN: {KEY: ...}}}}  optimizer.state.FQN.KEY
    a name without /       {NAME: ...}                                NAME

So `dcp.load({"model": model.state_dict()}, checkpoint_id=folder)` finds the weights.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from dist_lab.checkpoint.exchange import pickled_data, torch_file
from dist_lab.checkpoint.exchange.folders import inside, is_folder, new_folder, one_line
from dist_lab.checkpoint.exchange.pickled_data import Name, Pairs, Record
from dist_lab.checkpoint.exchange.tensors import Kinds, Tensors, state_dict
from dist_lab.errors import MachineError, UserError

METADATA = ".metadata"
LARGEST_METADATA = 2**28  # bytes
_CLASSES = "torch.distributed.checkpoint.metadata"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
ALLOWED = {
    *(f"torch.{name}" for name in DTYPES),
    *(
        f"{_CLASSES}.{name}"
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.Size", "torch.serialization._get_layout",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
}  # fmt: skip


def export(tensors: Tensors, folder: str | Path) -> None:
    """Write all tensors to a new folder, which `dcp.load` reads. Needs the memory of all of them.

    Raises:
        UserError: the folder is not new.
        MachineError: it cannot be written.
    """
    nested: dict[str, Any] = {}
    for name, tensor in state_dict(tensors).items():
        *outer, last = path_of(name)
        table = nested
        for key in outer:
            table = table.setdefault(key, {})
        table[last] = tensor
    with new_folder(folder) as new, warnings.catch_warnings():
        # It says that it saves in a single process, which is what we want.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            save(nested, checkpoint_id=new, no_dist=True)
        except CheckpointException as error:
            raise MachineError(f"cannot write {str(folder)!r}: {one_line(error)}") from None


def path_of(name: str) -> tuple[str, ...]:
    """
    >>> path_of("optimizer/layers.0.w/exp_avg"), path_of("model/layers.0.w"), path_of("w")
    (('optimizer', 'state', 'layers.0.w', 'exp_avg'), ('model', 'layers.0.w'), ('w',))
    """
    kind, slash, rest = name.partition("/")
    if not slash:
        return (name,)
    if kind == "optimizer" and "/" in rest:
        return (kind, "state", *rest.rsplit("/", 1))
    return kind, rest


def name_of(path: Sequence[str]) -> str | None:
    """The inverse of `path_of`; None for a value that is neither a weight nor of an optimizer."""
    match path:
        case [name]:
            return name
        case ["model" | "shadow" as kind, name]:
            return f"{kind}/{name}"
        case ["optimizer" | "optim", "state", name, key]:
            return f"optimizer/{name}/{key}"
    return None


# --- import ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and the place of its bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class DcpFolder:
    """The tensors of a folder whose metadata has been checked.

    `left_out`: the names of what is no tensor, or is of no model or optimizer, such as a scheduler.
    """

    kinds: Kinds
    parts: Mapping[str, Sequence[Part]]
    left_out: Sequence[str] = field(default=())

    def names(self) -> Kinds:
        return self.kinds

    def read(self, name: str) -> Tensor:
        """Reads one tensor from its parts.

        Raises:
            MachineError: a part is damaged, or is not of the shape that the metadata says.
        """
        shape, dtype = self.kinds[name]
        whole = torch.empty(shape, dtype=dtype)
        covered = torch.zeros(shape, dtype=torch.bool)
        for part in self.parts[name]:
            what = f"{name} in {str(part.file)!r}, byte {part.offset}"
            with part.file.open("rb") as file:
                file.seek(part.offset)
                value = torch_file.load(file.read(part.length), what)
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (part.shape, dtype):
                raise MachineError(f"{what} is not what {METADATA} says; get the folder again")
            box = tuple(slice(a, a + n) for a, n in zip(part.start, part.shape, strict=True))
            whole[box], covered[box] = value, True
        if not covered.all():  # parts that overlap have the right sum of sizes, too
            raise MachineError(f"{METADATA} has overlapping parts of {name}; get the folder again")
        return whole


def open_folder(path: str | Path) -> DcpFolder:
    """Read and check a folder's metadata. Reads no tensor.

    Raises:
        UserError: there is no such folder, or its metadata would run code, or names a file outside.
        MachineError: it is damaged or not whole.
    """
    folder = is_folder(path, f"a folder of torch.distributed.checkpoint, with {METADATA}")
    file = inside(folder, METADATA, "a folder of torch.distributed.checkpoint")
    what = repr(str(file))
    if file.stat().st_size > LARGEST_METADATA:
        raise MachineError(f"{what} has {file.stat().st_size} bytes, too many for metadata")
    metadata = pickled_data.read(file.read_bytes(), ALLOWED, what)
    try:
        return _checked(_fields(metadata, "Metadata"), folder, what)
    except _Odd as error:
        raise MachineError(f"{what} is damaged ({error}); get the folder again") from None


class _Odd(Exception):
    """A part of the metadata that is not as DCP writes it."""


def _checked(metadata: Mapping[str, Any], folder: Path, what: str) -> DcpFolder:
    places = _places(metadata.get("storage_data"), folder, what)
    paths = _paths(metadata.get("planner_data"))
    kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
    parts: dict[str, list[Part]] = {}
    left_out = []
    for flat, entry in _items(metadata.get("state_dict_metadata")):
        name = name_of(paths.get(_text(flat), (flat,)))
        if name is None or _class(entry) == "BytesStorageMetadata":
            left_out.append(flat)
            continue
        fields = _fields(entry, "TensorStorageMetadata")
        kinds[name] = torch.Size(_size(fields.get("size"))), _dtype(fields.get("properties"))
        parts[name] = []
        for chunk in _list(fields.get("chunks")):
            box = _fields(chunk, "ChunkStorageMetadata")
            start, shape = _size(box.get("offsets")), _size(box.get("sizes"))
            place = places.get((flat, start))
            if place is None:
                raise _Odd(f"no file has {flat}")
            parts[name].append(Part(start, shape, *place))
        _check_parts(flat, *kinds[name], parts[name])
    if not any(name.startswith("model/") for name in kinds):
        plain = [name for name in kinds if "/" not in name]  # a model's state dict itself
        kinds |= {f"model/{name}": kinds.pop(name) for name in plain}
        parts |= {f"model/{name}": parts.pop(name) for name in plain}
    return DcpFolder(kinds, parts, left_out)


def _check_parts(name: str, shape: torch.Size, dtype: torch.dtype, parts: Sequence[Part]) -> None:
    """Check that the parts have the tensor's size, and bytes enough: before memory is taken."""
    for part in parts:
        ends = [a + n for a, n in zip(part.start, part.shape, strict=False)]
        if not len(part.start) == len(part.shape) == len(shape) or any(
            end > length for end, length in zip(ends, shape, strict=True)
        ):
            raise _Odd(f"a part of {name} is outside of it")
        if math.prod(part.shape) * dtype.itemsize > part.length:
            raise _Odd(f"a part of {name} has {part.length} bytes, too few for {part.shape}")
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise _Odd(f"the parts of {name} do not add up to {tuple(shape)}")


def _places(
    storage: Any, folder: Path, what: str
) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """(name, start of the box) -> the file of a part, and the offset and length in it."""
    places = {}
    paths: dict[str, Path] = {}
    for index, info in _items(storage):
        key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise UserError(f"{what} has encoded or compressed tensors, which cannot be imported")
        file = place.get("relative_path")
        if not isinstance(file, str):
            raise _Odd("a file has no name")
        if file not in paths:
            paths[file] = inside(folder, file, METADATA)
        offset, length = _count(place.get("offset")), _count(place.get("length"))
        size = paths[file].stat().st_size
        if offset + length > size:
            raise _Odd(f"{file} has {size} bytes, and {offset + length} are needed")
        start = _size(key["offset"]) if key.get("offset") is not None else ()
        places[_text(key.get("fqn")), start] = paths[file], offset, length
    return places


def _paths(planner: Any) -> dict[str, tuple[str, ...]]:
    """Joined name -> its path of keys; a list's number as text."""
    paths = {}
    for name, path in _items(planner) if planner is not None else ():
        if not isinstance(path, tuple) or not all(isinstance(key, str | int) for key in path):
            raise _Odd("a path is not one")
        paths[_text(name)] = tuple(map(str, path))
    return paths


# --- records of pickled_data, as what they should be ----------------------------------------------


def _class(value: Any) -> str:
    return value.of.name if isinstance(value, Record) else ""


def _fields(value: Any, wanted: str) -> dict[str, Any]:
    if _class(value) != wanted:
        raise _Odd(f"no {wanted}")
    return {_text(key): item for key, item in _items(value.state)}


def _items(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, Pairs):
        raise _Odd("a table is missing")
    return value.items


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Odd("a list is missing")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Odd("a name is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _Odd("a size is no number")
    return value


def _size(value: Any) -> tuple[int, ...]:
    if _class(value) != "Size" or len(value.arguments) != 1:
        raise _Odd("a size is missing")
    if not isinstance(value.arguments[0], tuple):
        raise _Odd("a size is no tuple")
    return tuple(map(_count, value.arguments[0]))


def _dtype(properties: Any) -> torch.dtype:
    state = properties.state if _class(properties) == "TensorProperties" else None
    if not isinstance(state, tuple) or not state or not isinstance(state[0], Name):
        raise _Odd("a dtype is missing")
    if str(state[0]) != f"torch.{state[0].name}" or state[0].name not in DTYPES:
        raise _Odd("a dtype is none")
    return DTYPES[state[0].name]
