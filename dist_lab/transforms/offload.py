"""Optimizer state that lies somewhere else than in the memory that compute needs: on disk.

    offload_states(optimizer, partial(on_disk, "/scratch"))     8 of Adam's 16 bytes a parameter

The optimizer's state is idle from one step to the next, while activations come and go. A tensor
whose memory is a file is idle for free: the kernel keeps of it in memory what there is room for,
writes the rest out, and reads it again when the next step touches it. No operation knows of it, so
the values are the same to the bit; what changes is who owns the memory, and how long a step takes
when there is not enough. With `pinned`, the same idea on an accelerator: the state waits in the
memory of the host, and is on the device for the step alone. Ren et al. 2021, "ZeRO-Offload"
(arXiv:2101.06840); Rajbhandari et al. 2021, "ZeRO-Infinity" (arXiv:2104.07857).

The files have no name: the kernel gives their space back when the tensor is gone, or the process,
however it ends. An optimizer makes its state in its first step, and from there it is moved; so in
that one step it is in memory all at once.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dist_lab.errors import UserError

Make = Callable[[int, torch.dtype], Tensor]  # (length, dtype) -> a flat tensor, somewhere


def maker(where: str, device: torch.device) -> Make | None:
    """What makes memory of this kind: "cpu", or the name of a folder; "": none.

    Raises:
        UserError: "cpu", for a model that computes there.
    """
    if where != "cpu":
        return partial(on_disk, where) if where else None
    if device.type == "cpu":
        raise UserError(
            "the model computes on the CPU, and lies in its memory already (offload='cpu'); name a "
            "folder, to keep it in files"
        )
    return pinned


def offloaded(
    make: Make,
    cls: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer that keeps its state in memory that `make` makes."""
    optimizer = cls(groups, **options)
    offload_states(optimizer, make)
    return optimizer


def offload_states(optimizer: torch.optim.Optimizer, make: Make) -> None:
    """Keep the optimizer's state between steps in tensors that `make` makes.

    Where they are on the device of the parameter, the optimizer works on them in place; otherwise
    they come to it for each step. `state_dict` and `load_state_dict` are as before. Numbers, such
    as a count of steps, stay where they are.

    Raises:
        UserError: `make` raises it; also later, in the first step, which is when sizes are known.
    """
    homes: dict[tuple[Tensor, str], Tensor] = {}

    def back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if (parameter, key) in homes and value is homes[parameter, key]:
                    state[key] = value.to(parameter.device, non_blocking=True)

    def away(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    if (parameter, key) not in homes:
                        homes[parameter, key] = _like(value, make)
                    state[key] = homes[parameter, key].copy_(value)  # onto itself: nothing

    make(1, torch.uint8)  # a folder that is not there is refused before any step
    away(optimizer)
    optimizer.register_step_pre_hook(back)
    optimizer.register_step_post_hook(away)
    optimizer.register_load_state_dict_post_hook(away)


def on_disk(folder: str | Path, length: int, dtype: torch.dtype) -> Tensor:
    """Zeros, (length,), whose memory is a file without a name in this folder.

    Raises:
        UserError: the folder cannot be written, or has no room for as many bytes.
    """
    size = length * dtype.itemsize
    if size == 0:
        return torch.empty(0, dtype=dtype)  # there is no map of nothing
    try:
        with tempfile.TemporaryFile(dir=Path(folder).expanduser()) as file:
            _reserve(file, size)
            # By its number: it has no name any more, or never had one. The map outlives the file.
            path = f"/dev/fd/{file.fileno()}"
            return torch.from_file(path, shared=True, size=length, dtype=dtype)
    except OSError as error:
        raise UserError(
            f"cannot keep {size:,} bytes in {folder}: {error.strerror}; name a folder that can be "
            "written and has room"
        ) from error


def pinned(length: int, dtype: torch.dtype) -> Tensor:
    """(length,), in memory of the host that an accelerator copies from and to by itself."""
    return torch.empty(length, dtype=dtype, pin_memory=True)


def _like(value: Tensor, make: Make) -> Tensor:
    # In the same order in memory: a fused step goes through parameter and moments side by side.
    strides = torch.empty_like(value, device="meta").stride()
    return make(value.numel(), value.dtype).as_strided(value.shape, strides)


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the space now: a map that finds the disk full later ends the process."""
    there = os.fstatvfs(file.fileno())
    if size > there.f_bavail * there.f_frsize:  # before others find the disk full meanwhile
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # macOS has no such call
        file.truncate(size)
