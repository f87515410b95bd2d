"""Files of `torch.save(model.state_dict(), path)`, and back. Nothing in them is run.

Such a file is a zip archive: raw numbers, and a pickle that says which tensor has which. torch
reads the pickle with `weights_only=True`, which makes tensors and refuses all else. Before that we
look at the archive: it must be stored, not compressed, so that reading it takes no more memory than
the file has bytes. (A file of zeros compresses a thousandfold; torch would inflate it.)
"""

import io
import math
import os
import pickle
import re
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_lab.checkpoint.exchange.folders import one_line
from dist_lab.checkpoint.exchange.tensors import InMemory, Tensors, state_dict
from dist_lab.errors import MachineError, UserError, shown

GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message: what is no tensor


def export(tensors: Tensors, path: str | Path) -> None:
    """Write all tensors to one file, for `model.load_state_dict(torch.load(path))`.

    Tensors that are one under several names stay one.

    Raises:
        UserError: the file exists.
        MachineError: it cannot be written.
    """
    final = Path(path).expanduser()
    if final.exists() or final.is_symlink():
        raise UserError(f"{str(path)!r} exists; give a new name")
    new = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict(tensors), new)
        os.replace(new, final)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise MachineError(f"cannot write {str(path)!r}: {one_line(error)}") from None
    finally:
        new.unlink(missing_ok=True)


def open_file(path: str | Path) -> InMemory:
    """The tensors of a state dict file. They are mapped from the file, and read when they are used.

    Raises:
        UserError: there is no such file, or it holds something else than named tensors.
        MachineError: it is damaged.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{str(path)!r} {found}; give a file of torch.save")
    value, left_out = load(file, repr(str(path))), tuple[str, ...]()
    if isinstance(value, dict):
        for key in ("state_dict", "model"):  # as many training scripts wrap it
            if isinstance(value.get(key), dict):
                left_out = tuple(str(other) for other in value if other != key)
                value = value[key]
                break
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"{str(path)!r} holds a {type(value).__name__}, not a state dict; save "
            "model.state_dict()"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{str(path)!r} has {shown(name)}, a {type(tensor).__name__} and not a "
                "tensor; save model.state_dict()"
            )
    return InMemory({name: tensor.detach() for name, tensor in value.items()}, left_out)


def without_ties(weights: InMemory) -> InMemory:
    """Each tensor under its first name only: tied ones share their memory, also in a file."""
    firsts: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in weights.tensors.items():
        key = tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape, tensor.stride()
        firsts.setdefault(key, name)
    own = {name: weights.tensors[name] for name in firsts.values()}
    return InMemory(own, weights.left_out)


def load(source: Path | bytes, what: str) -> Any:
    """What torch reads from a file, or from the bytes of one, with `weights_only`.

    Raises:
        UserError: it would run code.
        MachineError: it is damaged, or is compressed.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            compressed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if compressed or sum(entry.file_size for entry in entries) > size:
            raise MachineError(f"{what} is a compressed archive, which torch.save does not write")
        if isinstance(stream, io.BytesIO):
            stream.seek(0)
            value = torch.load(stream, map_location="cpu", weights_only=True)
        else:
            value = torch.load(stream, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile:
        raise MachineError(
            f"{what} is damaged, or not a file of torch.save since torch 1.6; get it again"
        ) from None
    except pickle.UnpicklingError as error:
        found = GLOBAL.search(str(error))
        raise UserError(
            f"{what} has more than tensors in it{f', {found[1]}' if found else ''}, and is not "
            "loaded because that could run code; save model.state_dict()"
        ) from None
    except MachineError:
        raise
    except Exception as error:  # a damaged archive raises anything, from KeyError to RuntimeError
        raise MachineError(f"{what} is damaged ({one_line(error)[:80]}); get it again") from None
    for tensor in value.values() if isinstance(value, dict) else [value]:
        if isinstance(tensor, Tensor) and _bytes(tensor) > size:
            raise MachineError(
                f"{what} has a tensor of {_bytes(tensor)} bytes in {size}; it is expanded, or the "
                "file is damaged"
            )
    return value


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
