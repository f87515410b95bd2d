"""Initial weights: every parameter is a function of the seed and its name only.

Initial weights must not depend on the layout, or layouts could not be compared. So each parameter
has its own random generator, seeded by the seed and its fully qualified name (FQN). Any rank may
draw any parameters in any order, from the meta device or in place, and no broadcast is needed. A
parameter is drawn in full, in float32 on the CPU; then sharded, cast and moved. Buffers are not
random: a model with buffers fills them in `init_buffer`.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

InitFn = Callable[[str, Tensor, torch.Generator], None]  # fills the tensor of that FQN in place


@runtime_checkable
class InitializesItself(Protocol):
    def init_weight(self, fqn: str, tensor: Tensor, generator: torch.Generator) -> None: ...


@runtime_checkable
class InitializesItsBuffers(Protocol):
    def init_buffer(self, fqn: str, buffer: Tensor) -> None: ...


def initialize(
    model: nn.Module,
    seed: int,
    device: torch.device | str = "cpu",
    init_fn: InitFn | None = None,
) -> None:
    """Fill every parameter of `model` in place. Meta tensors are materialized on `device`.

    `init_fn(fqn, tensor, generator)` defaults to the model's `init_weight`. A tied parameter is
    drawn once, under its first name, and stays tied. Buffers are filled by the model's
    `init_buffer(fqn, buffer)`; without that method they keep their values.

    Raises ValueError if there is no `init_fn`, if it leaves a value unset, or if a buffer is on
    meta and the model has no `init_buffer`, because only the model knows its values.
    """
    init_fn = own_init(model) if init_fn is None else init_fn
    initialize_buffers(model, device)
    for fqn, parameter in model.named_parameters():  # each once, by its first name
        value = draw(fqn, parameter.shape, seed, init_fn)
        if parameter.is_meta:
            value = value.to(device, parameter.dtype)
            fresh = nn.Parameter(value, requires_grad=parameter.requires_grad)
            fresh.__dict__.update(parameter.__dict__)
            # The Parameter stays the same object. So ties hold (module.to_empty would break them),
            # and an optimizer that was built before still refers to it.
            torch.utils.swap_tensors(parameter, fresh)
        else:
            with torch.no_grad():
                parameter.copy_(value)


def own_init(model: nn.Module) -> InitFn:
    """The model's `init_weight`. Raises ValueError if it has none."""
    if not isinstance(model, InitializesItself):
        raise ValueError(
            f"{type(model).__name__} has no init_weight(fqn, tensor, generator): "
            "pass init_fn=, a function of these three arguments that fills the tensor in place"
        )
    return model.init_weight


def initialize_buffers(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Fill every buffer by the model's `init_buffer`; see `initialize`."""
    meta_buffers = [fqn for fqn, buffer in model.named_buffers() if buffer.is_meta]
    if isinstance(model, InitializesItsBuffers):
        for fqn, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                buffer = torch.empty_like(buffer, device=device)
                module, _, leaf = fqn.rpartition(".")
                setattr(model.get_submodule(module), leaf, buffer)
            model.init_buffer(fqn, buffer)
    elif meta_buffers:
        raise ValueError(
            f"{type(model).__name__} has buffers on the meta device ({meta_buffers[0]}, "
            f"{len(meta_buffers)} in all): they have no random values, so register them on a real "
            "device, or give the model a method init_buffer(fqn, buffer)"
        )


def draw(fqn: str, shape: Sequence[int], seed: int, init_fn: InitFn) -> Tensor:
    """Draw one full parameter, float32 on the CPU. Equal on every rank, in any order of draws."""
    key = hashlib.sha256(f"{seed} {fqn}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little"))
    tensor = torch.full(tuple(shape), torch.nan, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        init_fn(fqn, tensor, generator)
    if tensor.sum().isnan() and tensor.isnan().any():  # the sum first: it allocates nothing
        raise ValueError(f"init_fn left values of {fqn} unset: fill the whole tensor in place")
    return tensor
