"""A shadow of a model: the exponential moving average (EMA) of its weights.

    average = decay * average + (1 - decay) * weight          after each step; buffers are copied

Each rank averages its own shards, or its own pipeline stages. So nothing is sent in a step, and a
rank's average has the size of its shards. The average is elementwise, so the averages of the shards
are exactly the shards of the full model's average.

To compute with the average, we swap it into the model: averages and weights exchange their values,
and exchange them back afterwards. Then `changed` tells the strategy that gathered weights are old.
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
    """The part of `Job` that this file uses."""

    model: nn.Module

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]: ...
    def load_full_state_dict(self, full: Mapping[str, Any]) -> None: ...


class Shadow:
    """The moving average of the weights of one job.

    Attributes:
        decay: the weight of the old average in an update; may be changed between updates.
        averages: name -> the average of this rank's shard of that parameter.
    """

    def __init__(self, weights: Weights, decay: float, changed: Callable[[], None]) -> None:
        """Start from the current weights.

        Args:
            changed: tells the strategy that the weights have new values. Collective.
        """
        self.decay = decay
        self._weights, self._changed = weights, changed
        self._is_in_model = False
        self._check()
        with torch.no_grad():
            self.averages = {name: local.clone() for name, local in self._local_parameters()}
            self.copy_buffers()

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average and copy the buffers. After `job.after_step`."""
        self._check()
        for name, local in self._local_parameters():
            average = self.averages[name]
            if average.is_floating_point():
                average.mul_(self.decay).add_(local, alpha=1 - self.decay)
            else:
                average.copy_(local)
        self.copy_buffers()

    def copy_buffers(self) -> None:
        """Take over the model's buffers."""
        self._buffers = [local.clone() for local in self._local_buffers()]  # may be resized

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model's weights and buffers are the averages. Collective."""
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
        """The average of the full model, in the form of `job.full_state_dict`. Collective."""
        with self.swapped_in():
            return self._weights.full_state_dict(rank0_only=rank0_only)

    def load_full_state_dict(self, full: Mapping[str, Any]) -> None:
        """Continue from an average that `full_state_dict` has returned. Collective."""
        with self.swapped_in():
            self._weights.load_full_state_dict(full)

    def _check(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"a shadow's decay must be from 0 to 1, and is {self.decay}")
        if self._is_in_model:
            raise UserError(
                "the model holds the shadow's weights inside `with shadow.swapped_in()`: update "
                "the shadow, or swap it in again, after the block"
            )

    @torch.no_grad()
    def _swap(self) -> None:
        for name, local in self._local_parameters():
            _exchange(local, self.averages[name])
        for copied, local in zip(self._buffers, self._local_buffers(), strict=True):
            _exchange(local, copied)

    def _local_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields this rank's local tensor of each parameter, in the parameter's memory."""
        for name, parameter in self._weights.named_parameters():
            yield name, local_part(parameter.detach())

    def _local_buffers(self) -> Iterator[Tensor]:
        for buffer in self._weights.model.buffers():
            yield from pieces(buffer)


def _exchange(one: Tensor, other: Tensor) -> None:
    before = one.clone()
    one.copy_(other)
    other.copy_(before)
