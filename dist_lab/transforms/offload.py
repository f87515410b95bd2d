"""Offloading of optimizer state: to files, or from an accelerator to host memory.

    offload_states(optimizer, partial(on_disk, "/scratch"))     8 of Adam's 16 bytes per parameter

Optimizer state is idle from one step to the next, while activations need memory. If a tensor's
memory is a mapped file, the kernel keeps as much of it in memory as there is room for, writes the
rest to disk, and reads it again in the next step. Operations see an ordinary tensor, so values are
the same to the bit, but a step takes longer if memory is short. `pinned` is the same idea on an
accelerator: the state stays in host memory, and is on the device only during a step. Ren et al.
2021, "ZeRO-Offload" (arXiv:2101.06840); Rajbhandari et al. 2021, "ZeRO-Infinity"
(arXiv:2104.07857).

The files have no name: the kernel frees their space when the tensor is freed or the process ends,
in whatever way. An optimizer creates its state in its first step, and we move the state after that
step. So during the first step all of it is in memory.
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

Make = Callable[[int, torch.dtype], Tensor]  # (length, dtype) -> a flat tensor for the state


def maker(where: str, device: torch.device) -> Make | None:
    """Returns the function that allocates state in `where`: "cpu" or a folder; None for "".

    Raises:
        UserError: "cpu", for a model that computes on the CPU.
    """
    if where != "cpu":
        return partial(on_disk, where) if where else None
    if device.type == "cpu":
        raise UserError(
            "offload='cpu', but the model computes on the CPU, where the optimizer state is "
            "already; name a folder to keep it in files"
        )
    return pinned


def offloaded(
    make: Make,
    cls: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Builds an optimizer whose state is in tensors that `make` allocates."""
    optimizer = cls(groups, **options)
    offload_states(optimizer, make)
    return optimizer


def offload_states(optimizer: torch.optim.Optimizer, make: Make) -> None:
    """Keep the optimizer's state between steps in tensors that `make` allocates.

    If they are on the parameter's device, the optimizer works on them in place. Otherwise they are
    copied to the device for each step. `state_dict` and `load_state_dict` work as before. Scalars,
    such as the number of steps, are not moved.

    Raises:
        UserError: raised by `make`, now or in the first step, when the sizes are known.
    """
    stored: dict[tuple[Tensor, str], Tensor] = {}

    def to_device(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if (parameter, key) in stored and value is stored[parameter, key]:
                    state[key] = value.to(parameter.device, non_blocking=True)

    def to_storage(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    if (parameter, key) not in stored:
                        stored[parameter, key] = _make_like(value, make)
                    state[key] = stored[parameter, key].copy_(value)  # a copy onto itself is free

    make(1, torch.uint8)  # raises UserError for a missing folder before any step
    to_storage(optimizer)
    optimizer.register_step_pre_hook(to_device)
    optimizer.register_step_post_hook(to_storage)
    optimizer.register_load_state_dict_post_hook(to_storage)


def on_disk(folder: str | Path, length: int, dtype: torch.dtype) -> Tensor:
    """Returns zeros, (length,), in a mapped file in this folder. The file has no name.

    Raises:
        UserError: the folder cannot be written, or has not enough room.
    """
    size = length * dtype.itemsize
    if size == 0:
        return torch.empty(0, dtype=dtype)  # 0 bytes cannot be mapped
    try:
        with tempfile.TemporaryFile(dir=Path(folder).expanduser()) as file:
            _reserve(file, size)
            # Opened by descriptor: it has no name. The map stays valid after the file is closed.
            path = f"/dev/fd/{file.fileno()}"
            return torch.from_file(path, shared=True, size=length, dtype=dtype)
    except OSError as error:
        raise UserError(
            f"cannot keep {size:,} bytes in {folder}: {error.strerror}; name a writable folder "
            "with enough room"
        ) from error


def pinned(length: int, dtype: torch.dtype) -> Tensor:
    """Returns an empty tensor, (length,), in page-locked host memory, for fast copies."""
    return torch.empty(length, dtype=dtype, pin_memory=True)


def _make_like(value: Tensor, make: Make) -> Tensor:
    # With the same strides: a fused step reads parameter and state in one memory order.
    strides = torch.empty_like(value, device="meta").stride()
    return make(value.numel(), value.dtype).as_strided(value.shape, strides)


def _reserve(file: IO[bytes], size: int) -> None:
    """Allocate the space now: a map that runs out of disk later kills the process."""
    disk = os.fstatvfs(file.fileno())
    if size > disk.f_bavail * disk.f_frsize:  # or other programs would find the disk full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # macOS has no such call
        file.truncate(size)
