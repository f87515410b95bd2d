"""A model from the meta device: parameters with shapes and no values, which a rank draws as it needs.

    model = zoo.build(..., device="meta")             no bytes
    job = parallelize(model, mesh, "fsdp", seed=0)    a rank draws a parameter, keeps its rows, and
                                                      lets it go before it draws the next one

So no rank ever holds the model. A value depends on (seed, name) alone: see transforms/init.py.
"""  # noqa: E501

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.transforms.init import InitFn, draw, initialize, initialize_buffers, own_init


def is_meta(model: nn.Module) -> bool:
    """Raises UserError for a model of which some parameters have values and some have none."""
    where = {parameter.is_meta: name for name, parameter in model.named_parameters()}
    if len(where) == 2:
        raise UserError(
            f"{where[True]} is on the meta device and {where[False]} is not; build the whole model "
            "under torch.device('meta'), or none of it"
        )
    return True in where


def materialize(model: nn.Module, seed: int, device: torch.device, init_fn: InitFn | None) -> None:
    """Draw every parameter, in place. Raises UserError if the model does not say how."""
    with _explained():
        initialize(model, seed, device, init_fn)


def deferred_init(
    model: nn.Module, seed: int, device: torch.device, init_fn: InitFn | None
) -> Callable[[str], Tensor]:
    """Fill the buffers now. Returns a function that draws one whole parameter, by its name."""
    with _explained():
        fill = own_init(model) if init_fn is None else init_fn
        initialize_buffers(model, device)
    about = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}

    def value_of(name: str) -> Tensor:
        shape, dtype = about[name]
        with _explained():
            return draw(name, shape, seed, fill).to(dtype)

    return value_of


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"the model is on the meta device, without values, and {error}") from None
