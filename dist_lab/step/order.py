"""What must come when within a step, whoever runs its forwards and backwards.

    run, or backward by hand     gradients add up
    finish()                     whatever is still owed              phase "finish"
    after_step()                 what the new weights owe            phase "after_step"

[Note: sums do not forgive] Gradients of micro-batches and ranks add up (see step/protocol.py). A
backward onto gradients that were already summed over ranks would count the others' share again,
where an average would have hidden it. So each gradient is closed once its last micro-batch is in,
and opens again when it is cleared; a backward that adds to a closed one is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from dist_lab.comm.context import CommContext
from dist_lab.errors import UserError
from dist_lab.layout.gather import local_part
from dist_lab.loss import LossFn, Pair
from dist_lab.step.grad_elsewhere import real_grad
from dist_lab.step.protocol import Chain


class Step(ABC):
    """The order of a step, which both runners keep.

    Attributes:
        has_gradients: that finish() has not seen.
    """

    def __init__(
        self, model: nn.Module, sync: Chain, comm: CommContext, stepped: Mapping[str, nn.Parameter]
    ) -> None:
        self.model, self.sync, self.comm, self._stepped = model, sync, comm, stepped
        self.has_gradients = False
        # Kept, because a name may mean the whole of it while backward runs.
        self._parameters = {n: p for n, p in self.named_parameters() if p.requires_grad}
        self._held = dict(model.named_parameters())
        self._closed: set[str] = set()  # gradients that hold their last micro-batch

    @abstractmethod
    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """What runs inside the block is not, or is, the last before `finish`."""

    @abstractmethod
    def run(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """Forward and backward. Returns the sum of this rank's shares of the loss."""

    @abstractmethod
    def evaluate(self, microbatches: Sequence[Pair], loss_fn: LossFn) -> Tensor:
        """The same by forward alone."""

    @abstractmethod
    def timeline(self) -> list[list[Any]]:
        """When each rank did which action of the last run; empty where there are none."""

    @abstractmethod
    def _before_finish(self) -> None:
        """Backward is over."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What optimizers step on, by name."""
        for name, parameter in self.model.named_parameters():
            yield name, self._stepped.get(name, parameter)

    def finish(self) -> None:
        """Raises UserError on gradients that were summed already, or that no strategy knows."""
        now = dict(self.model.named_parameters())
        self._refuse_other_parameters(now)
        gradients = {n: real_grad(self._stepped.get(n, p)) for n, p in now.items()}
        late = [n for n, g in gradients.items() if g is not None and n not in self._parameters]
        if late:
            raise UserError(
                f"{late[0]} has a gradient but was frozen when parallelize() was called; unfreeze "
                "it before, or freeze it again"
            )
        # A rank that had no rows to compute on has nothing left over, and joins in the sum.
        if not self.has_gradients and any(_holds(gradients.get(name)) for name in self._closed):
            raise UserError(
                "finish() without a backward since the last one: the gradients are summed over "
                "the ranks already, a second sum would multiply them; call finish() once a step, "
                "and zero_grad() after it"
            )
        del gradients  # or they would be there still when the strategy has let them go
        self._before_finish()
        try:
            with self.comm.label("finish", unit=""):
                self.sync.finish()
        finally:
            self.has_gradients = False
        self._closed = set(self._parameters)

    def after_step(self) -> None:
        """Raises UserError if the gradients that were stepped on had not been summed."""
        if self.has_gradients:
            raise UserError(
                "after_step() without finish(): each rank has stepped on its own gradients and the "
                "weights now differ; call job.finish() after backward, before optimizer.step()"
            )
        with self.comm.label("after_step", unit=""):
            self.sync.after_step()

    def weights_changed(self) -> None:
        """The parameters were given new values, by no optimizer."""
        with self.comm.label("load", unit=""):
            self.sync.after_step()

    def _refuse_other_parameters(self, now: Mapping[str, nn.Parameter]) -> None:
        """Raise UserError if the model holds others than it did: no strategy knows of them."""
        before = self._held
        odd = [n for n in {**now, **before} if now.get(n) is not before.get(n)]
        if odd:
            what = "replaced in"
            if odd[0] not in before:
                what = "added to"
            elif odd[0] not in now:
                what = "tied in, or removed from,"
            raise UserError(
                f"{odd[0]} was {what} the model after parallelize(), which trains the parameters "
                "that it was given; change the model before"
            )

    def _reopen(self) -> None:
        """Open what has been cleared since finish(), whether or not this rank will use it."""
        if not self.has_gradients:
            self._closed = {name for name in self._closed if self._holds_gradient(name)}

    def _refuse_closed(self, name: str) -> None:
        """A gradient is about to be added to: see [Note: sums do not forgive]."""
        if name in self._closed:
            if self._holds_gradient(name):
                raise UserError(
                    f"backward on gradients that hold their last micro-batch ({name}): call "
                    "optimizer.zero_grad() after the step, or wrap all micro-batches but the "
                    "last in job.microbatch(last=False)"
                )
            self._closed.discard(name)

    def _holds_gradient(self, name: str) -> bool:
        return _holds(real_grad(self._parameters[name]))


def _holds(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(local_part(gradient).any())
