"""A shadow of a model: the exponential moving average of its weights.

    average = decay * average + (1 - decay) * weight          after each step, buffers are copied

Each rank averages its own parts: of a sharded parameter its shard, of a pipeline its stages. So
nothing is sent in a step, and a rank holds as much of the average as it holds of the model. Since
an average is taken element by element, the parts are those of the average of the whole model.

To be computed with, the average is swapped into the model: the two change places in memory, and
change back afterwards. What strategies have gathered of the weights is then told to be stale.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lab.comm.anything import pieces
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part


class Weights(Protocol):
    """The weights of a model: a job has them."""

    model: nn.Module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]: ...
    def load_full_state_dict(self, full: Mapping[str, Any]) -> None: ...


class Shadow:
    """The moving average of the weights of one job.

    Attributes:
        decay: how much of the average stays at an update; may be changed between updates.
    """

    def __init__(self, weights: Weights, decay: float, changed: Callable[[], None]) -> None:
        """Begin with the weights as they are now.

        Args:
            changed: tells the strategy that weights were written to. Collective.
        """
        self.decay = decay
        self._weights, self._changed = weights, changed
        self._is_in_model = False
        self._check()
        with torch.no_grad():
            self._averages = {name: part.clone() for name, part in self._parts()}
            self._buffers = [part.clone() for part in self._buffer_parts()]

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights of now to the average, and copy the buffers. After `job.after_step`."""
        self._check()
        for name, part in self._parts():
            average = self._averages[name]
            if average.is_floating_point():
                average.mul_(self.decay).add_(part, alpha=1 - self.decay)
            else:
                average.copy_(part)
        self._buffers = [part.clone() for part in self._buffer_parts()]  # which may have grown

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model has the average for its weights and buffers. Collective."""
        self._check()
        self._swap()
        self._is_in_model = True
        try:
            self._changed()
            yield
        finally:
            self._swap()
            self._is_in_model = False
        self._changed()

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """The average of the whole model, as `job.full_state_dict` gives the weights."""
        with self.swapped_in():
            return self._weights.full_state_dict(rank0_only=rank0_only)

    def load_full_state_dict(self, full: Mapping[str, Any]) -> None:
        """Go on from an average that `full_state_dict` gave."""
        with self.swapped_in():
            self._weights.load_full_state_dict(full)

    def _check(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"a shadow's decay is from 0 to 1, this one {self.decay}")
        if self._is_in_model:
            raise UserError(
                "the model has the shadow's weights inside `with shadow.swapped_in()`: update it "
                "and swap it in again after the block"
            )

    @torch.no_grad()
    def _swap(self) -> None:
        for name, part in self._parts():
            _exchange(part, self._averages[name])
        for copied, part in zip(self._buffers, self._buffer_parts(), strict=True):
            _exchange(part, copied)

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each parameter, in its memory."""
        for name, parameter in self._weights.named_parameters():
            yield name, local_part(parameter.detach())

    def _buffer_parts(self) -> Iterator[Tensor]:
        for buffer in self._weights.model.buffers():
            yield from pieces(buffer)


def _exchange(one: Tensor, other: Tensor) -> None:
    before = one.clone()
    one.copy_(other)
    other.copy_(before)
