"""The order of calls within a step, for every runner.

    run, or backward by hand     gradients add up
    finish()                     gradients are summed over ranks            phase "finish"
    after_step()                 new weights are sent where needed          phase "after_step"

[Note: closed gradients] Gradients of micro-batches and ranks add up (see step/protocol.py). A
backward onto gradients that were already summed over ranks would count other ranks' shares twice;
averaging over ranks would hide this. So a gradient is closed after its last micro-batch, and opens
again when it is cleared. A backward that adds to a closed gradient raises an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from dist_lab.comm.context import LOOP, CommContext
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.loss import LossFn, Pair
from dist_lab.randomness.place import Place
from dist_lab.step.grad_elsewhere import real_grad
from dist_lab.step.protocol import Chain


class Step(ABC):
    """Base class of both runners: keeps the order of a step.

    Attributes:
        has_gradients: there are gradients that finish() has not summed.
        place: the step, micro-batch and rows that are computed now, for random masks.
    """

    def __init__(
        self, model: nn.Module, sync: Chain, comm: CommContext, stepped: Mapping[str, nn.Parameter]
    ) -> None:
        self.model, self.sync, self.comm, self._stepped = model, sync, comm, stepped
        self.has_gradients, self.place = False, Place()
        # Looked up once: during backward the model may hold the unsharded tensor under this name.
        self._parameters = {n: p for n, p in self.named_parameters() if p.requires_grad}
        self._parameters_at_start = dict(model.named_parameters())
        self._closed: set[str] = set()  # complete gradients: see [Note: closed gradients]

    @abstractmethod
    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Marks the block as one micro-batch; `last`: the last one before `finish`."""

    @abstractmethod
    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """Forward and backward. Returns the sum of this rank's shares of the loss."""

    @abstractmethod
    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """Forward only. Returns the same sum."""

    @abstractmethod
    def timeline(self) -> list[list[Any]]:
        """For each rank, the actions of the last run with their times; empty without a schedule."""

    @abstractmethod
    def _before_finish(self) -> None:
        """Completes unfinished work of backward, before gradients are summed."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters that optimizers step on, with their names."""
        for name, parameter in self.model.named_parameters():
            yield name, self._stepped.get(name, parameter)

    def finish(self) -> None:
        """Sums gradients over ranks. Raises UserError if already summed, or the model changed."""
        parameters = dict(self.model.named_parameters())
        self._refuse_other_parameters(parameters)
        grads = {n: real_grad(self._stepped.get(n, p)) for n, p in parameters.items()}
        unfrozen = [n for n, g in grads.items() if g is not None and n not in self._parameters]
        if unfrozen:
            raise UserError(
                f"{unfrozen[0]} has a gradient but was frozen when parallelize() was called; "
                "unfreeze it before that call, or freeze it again"
            )
        # A rank whose batch was empty has no closed gradients, and adds zeros to the sum.
        if not self.has_gradients and any(_is_nonzero(grads.get(name)) for name in self._closed):
            raise UserError(
                "finish() without a backward since the last one: the gradients are already summed "
                "over the ranks, and a second sum would multiply them; call finish() once a step, "
                "and zero_grad() after the step"
            )
        del grads  # these references would keep memory alive that the strategy frees
        self._before_finish()
        try:
            with self.comm.label("finish", unit="", then=LOOP):
                self.sync.finish()
        finally:
            self.has_gradients = False
        self._closed = set(self._parameters)
        self.place.end_step()

    def after_step(self) -> None:
        """Raises UserError if the optimizer has stepped on gradients that were not summed."""
        if self.has_gradients:
            raise UserError(
                "after_step() without finish(): each rank has stepped on its own gradients, so the "
                "weights now differ; call job.finish() after backward, before optimizer.step()"
            )
        with self.comm.label("after_step", unit=""):
            self.sync.after_step()

    def weights_changed(self) -> None:
        """Parameters have changed without an optimizer step, such as by loading a checkpoint."""
        with self.comm.label("load", unit=""):
            self.sync.after_step()

    def _refuse_other_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise UserError if a parameter was replaced, added or removed: no strategy knows it."""
        before = self._parameters_at_start
        changed = [n for n in {**parameters, **before} if parameters.get(n) is not before.get(n)]
        if changed:
            what = "replaced in" if changed[0] in before else "added to"
            what = what if changed[0] in parameters else "tied in, or removed from,"
            raise UserError(
                f"{changed[0]} was {what} the model after parallelize(), but only parameters "
                "given to parallelize() are trained; change the model before that call"
            )

    def _reopen(self) -> None:
        """Open all gradients that were cleared since finish(), even if this rank won't use them."""
        if not self.has_gradients:
            self._closed = {name for name in self._closed if self._has_nonzero_grad(name)}

    def _refuse_closed(self, name: str) -> None:
        """Backward is about to add to this gradient: see [Note: closed gradients]."""
        if name in self._closed:
            if self._has_nonzero_grad(name):
                raise UserError(
                    f"backward on gradients that hold their last micro-batch ({name}): call "
                    "optimizer.zero_grad() after the step, or wrap all micro-batches but the last "
                    "in job.microbatch(last=False)"
                )
            self._closed.discard(name)

    def _has_nonzero_grad(self, name: str) -> bool:
        return _is_nonzero(real_grad(self._parameters[name]))


def _is_nonzero(grad: Tensor | None) -> bool:
    return grad is not None and bool(local_part(grad).any())
