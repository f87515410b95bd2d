"""Dropout whose mask is the same in every layout, and its place in a model.

    keep[b, t, d] = bits(seed, step, module, call, sample b, position t, feature d) >= p 2^32
    y = x keep / (1 - p)                                  Srivastava et al. 2014, JMLR 15:1929

torch's dropout asks a generator for the next numbers. They depend on the rank, on the rows and
features that it holds, and on what was drawn before. This one hashes the address of each element
(bits.py) in the unsharded tensor: dim 0 is the sample, the last dim the feature, and dims between
are positions. Nothing is sent, and nothing is saved for a recomputation but the address.

    dist_lab.Dropout(0.1)                                 in a model of one's own
    dist_lab.parallelize(model, ..., dropout="exact")     every nn.Dropout of a model

`use_exact_dropout` changes the class of a module and nothing else: it keeps its name and its hooks.
A copy or a pickle of it is the module that it was.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.randomness.bits import key_of, random_bits
from dist_lab.randomness.full_shapes import offsets
from dist_lab.randomness.place import Place
from dist_lab.torch_private import AnyDropout, not_compiled


@dataclass
class Bound:
    """What a dropout needs to know of its model: its place, and its own name in the whole model."""

    place: Place
    name: str


class Dropout(nn.Dropout):
    """x (rows, ..., features) -> the same shape, with a mask that does not depend on the layout.

    In training it works only in a model that `parallelize` has been given, in one process too.

    Attributes:
        plain: the class that a copy has.
        channels: drop whole channels, (rows, channels): those of Dropout1d, 2d and 3d.
    """

    bound: Bound | None = None
    plain: type[nn.Module] | None = None
    channels = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        y = self._drop(x)
        return x.copy_(y) if self.inplace else y

    @not_compiled
    def _drop(self, x: Tensor) -> Tensor:
        if self.bound is None:
            if x.is_meta:  # only its shape is wanted
                return torch.empty_like(x)
            raise UserError(
                "dist_lab.Dropout in training needs the number of each row in the global batch: "
                "call dist_lab.parallelize(model, mesh) first, in one process too, or model.eval()"
            )
        if self.p == 1:
            return x * 0
        bits = random_bits(*self._address(x, self.bound.place, self.bound.name))
        threshold = min(round(self.p * 2**32) - 2**31, 2**31 - 1)  # of signed numbers
        keep = (bits >= threshold).view(*bits.shape, *[1] * (x.dim() - bits.dim()))
        return torch.where(keep, x * (1 / (1 - self.p)), 0)

    def _address(self, x: Tensor, place: Place, name: str) -> tuple[int, list[Tensor]]:
        """The key of this call, and for each dim the numbers of this shard's positions."""
        call, now = place.call_of(name), place.current
        if now.samples is None:
            raise UserError(
                f"{name} runs outside a forward of the whole model, so the numbers of its rows are "
                "not known; call job.model, or use job.microbatch(last=..., samples=...)"
            )
        rows = len(x) if x.dim() else 0
        if rows != len(now.samples):
            raise UserError(
                f"{name} reads a tensor of shape {tuple(x.shape)}, but the micro-batch has "
                f"{len(now.samples)} rows; put the rows in dim 0, or set p=0"
            )
        shape = x.shape[:2] if self.channels else x.shape
        starts: list[int] | None = [0] * len(shape)
        if now.shapes is not None:
            full = now.shapes.get(name, [])
            axis = place.tensor
            if call < len(full) and full[call][0] == rows:
                starts = offsets(x.shape, full[call], axis.size, axis.index)
            else:  # such as (rows * heads, ...): rows of heads are not rows of the batch
                starts = None
            if starts is None:
                raise UserError(
                    f"{name} reads a tensor of shape {tuple(x.shape)}, which is no shard of what "
                    f"it reads in the unsharded model, {[*map(tuple, full)]}; set p=0, or use it "
                    "before the colwise or after the rowwise layer"
                )
        assert starts is not None
        positions = [
            torch.arange(start, start + length, device=x.device)
            for start, length in zip(starts[1:], shape[1:], strict=False)
        ]
        return (
            key_of(place.seed, place.step, name, call),
            [now.samples.to(x.device), *positions],
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[Any, ...]]:
        state = {k: v for k, v in vars(self).items() if k not in ("bound", "plain", "channels")}
        return _plain_module, (self.plain or type(self), state)


def _plain_module(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module


CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def use_exact_dropout(model: nn.Module) -> None:
    """Change every nn.Dropout of a model, in place, to one whose mask is equal in every layout.

    Raises:
        UserError: a layer draws random numbers in another way; names it.
    """
    for name, module in model.named_modules():
        if why := _cannot_be_exact(module):
            raise UserError(
                f"{name or 'the model'} ({type(module).__name__}) {why}, which cannot be equal in "
                "every layout; set it to 0, or put an nn.Dropout into the model instead"
            )
    for module in model.modules():
        if type(module) in (nn.Dropout, *CHANNELS):
            _make_exact(module)


def _make_exact(module: Any) -> None:
    plain = type(module)
    module.__class__ = Dropout
    module.plain, module.channels = plain, plain is not nn.Dropout


def _cannot_be_exact(module: nn.Module) -> str:
    """Why the random numbers of a layer cannot be exact; "" if they can, or if it draws none."""
    p = getattr(module, "dropout", 0.0)
    if isinstance(module, nn.MultiheadAttention) and p:
        return f"has dropout={p} inside fused attention"
    if isinstance(module, nn.RNNBase) and p and module.num_layers > 1:
        return f"has dropout={p} between its layers"
    if isinstance(module, AnyDropout) and module.p:
        kinds = (nn.Dropout, *CHANNELS)
        return "" if isinstance(module, kinds) else f"has p={module.p} and draws noise of its own"
    return "draws random numbers" if isinstance(module, nn.RReLU) else ""


def named_dropouts(model: nn.Module) -> dict[str, Dropout]:
    """The dropouts that are exact and not switched off by p=0, by their names in this model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Dropout) and m.p > 0}


def bind(dropouts: dict[str, Dropout], place: Place) -> None:
    """Let these dropouts read a place. Their names are those in the whole model."""
    for name, module in dropouts.items():
        module.bound = Bound(place, name or "the model")


def places_of(model: nn.Module) -> Iterator[str]:
    """All names of the dropouts that have several: one module in several places of the model."""
    names: dict[Dropout, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Dropout) and module.p > 0:
            names.setdefault(module, []).append(name)
    yield from (" and ".join(several) for several in names.values() if len(several) > 1)
