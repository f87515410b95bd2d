"""Initial weights: every tensor is a function of (seed, its name), and of nothing else.

A layout must not change the numbers a run starts from, or no two layouts could ever be compared.
So each parameter has a generator of its own, keyed by the seed and its fully qualified name (FQN):
any rank may draw any subset in any order, from the meta device or in place, and nobody has to
broadcast. Drawn whole, in float32 and on the CPU; then cut, cast and moved. Buffers are not drawn:
what they begin with is no chance, and a model that has any fills them by `init_buffer`.
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
    """Fills every parameter of `model` in place; those on meta come to life on `device`.

    `init_fn(fqn, tensor, generator)` is the model's own `init_weight` unless given. A tied
    parameter is drawn once, as the first of its names, and stays tied. Buffers are filled by the
    model's own `init_buffer(fqn, buffer)`; without one they stay as they are.

    Raises ValueError if there is no `init_fn`, if it leaves a value unset, or if a buffer is on
    meta and no `init_buffer` there, because its values are known to the model alone.
    """
    init_fn = own_init(model) if init_fn is None else init_fn
    initialize_buffers(model, device)
    for fqn, parameter in model.named_parameters():  # each once, by the first of its names
        value = draw(fqn, parameter.shape, seed, init_fn)
        if parameter.is_meta:
            value = value.to(device, parameter.dtype)
            fresh = nn.Parameter(value, requires_grad=parameter.requires_grad)
            fresh.__dict__.update(parameter.__dict__)
            # The Parameter stays the same object, so ties hold (module.to_empty would undo them)
            # and an optimizer made before still points at it.
            torch.utils.swap_tensors(parameter, fresh)
        else:
            with torch.no_grad():
                parameter.copy_(value)


def own_init(model: nn.Module) -> InitFn:
    """The model's own `init_weight`. Raises ValueError if it has none."""
    if not isinstance(model, InitializesItself):
        raise ValueError(
            f"{type(model).__name__} has no init_weight(fqn, tensor, generator): "
            "pass init_fn=, a function of these three that fills the tensor in place"
        )
    return model.init_weight


def initialize_buffers(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Fills every buffer by the model's own `init_buffer`; see `initialize`."""
    absent = [fqn for fqn, buffer in model.named_buffers() if buffer.is_meta]
    if isinstance(model, InitializesItsBuffers):
        for fqn, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                buffer = torch.empty_like(buffer, device=device)
                module, _, leaf = fqn.rpartition(".")
                setattr(model.get_submodule(module), leaf, buffer)
            model.init_buffer(fqn, buffer)
    elif absent:
        raise ValueError(
            f"{type(model).__name__} has buffers on the meta device ({absent[0]}, {len(absent)} in "
            "all): their values cannot be drawn, so register them on a real device, or give the "
            "model an init_buffer(fqn, buffer)"
        )


def draw(fqn: str, shape: Sequence[int], seed: int, init_fn: InitFn) -> Tensor:
    """One whole parameter, float32 on the CPU: the same on every rank, whatever else is drawn."""
    key = hashlib.sha256(f"{seed} {fqn}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little"))
    tensor = torch.full(tuple(shape), torch.nan, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        init_fn(fqn, tensor, generator)
    if tensor.sum().isnan() and tensor.isnan().any():  # the sum takes no memory, the mask a quarter
        raise ValueError(f"init_fn left values of {fqn} unset: fill the whole tensor in place")
    return tensor
