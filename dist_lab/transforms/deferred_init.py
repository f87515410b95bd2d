"""Deferred initialization: parameters on the meta device get values only when a rank needs them.

    model = zoo.build(..., device="meta")             no memory
    job = parallelize(model, mesh, "fsdp", seed=0)    a rank draws a parameter, keeps its shard, and
                                                      frees the rest before it draws the next one

So no rank ever holds the full model. A value depends only on (seed, name): see transforms/init.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.transforms.init import InitFn, draw, initialize_buffers, own_init


def is_meta(model: nn.Module) -> bool:
    """Whether the parameters are on the meta device. Raises UserError if only some of them are."""
    example = {parameter.is_meta: name for name, parameter in model.named_parameters()}
    if len(example) == 2:
        raise UserError(
            f"{example[True]} is on the meta device and {example[False]} is not; build the "
            "whole model under torch.device('meta'), or none of it"
        )
    return True in example


def deferred_init(
    model: nn.Module, seed: int, device: torch.device, init_fn: InitFn | None
) -> Callable[[str], Tensor]:
    """Fill the buffers now. Returns a function that draws one full parameter, given its name."""
    with _as_user_error():
        fill = own_init(model) if init_fn is None else init_fn
        initialize_buffers(model, device)
    shapes_and_dtypes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}

    def draw_parameter(name: str) -> Tensor:
        shape, dtype = shapes_and_dtypes[name]
        with _as_user_error():
            return draw(name, shape, seed, fill).to(dtype)

    return draw_parameter


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"the model is on the meta device, without values, and {error}") from None
