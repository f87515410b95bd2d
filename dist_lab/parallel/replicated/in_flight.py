"""The gradients of one ddp bucket while their sum is in flight.

Meanwhile backward and the user's loop go on. A gradient in flight is no longer this rank's gradient
and not yet the sum: an edit of it would be lost. So `.grad` is a placeholder that refuses edits.

[Note: aborted steps] An exception may end a step on one of N ranks while buckets are in flight. The
rank then issues its other buckets at once, with -N as their last flag: so all ranks see the abort.
If all ranks have aborted the step, the sums are dropped. If only some have, all ranks raise.
"""

import math
from collections.abc import Mapping

from torch import nn

from dist_lab.errors import UserError
from dist_lab.parallel.flat_buffer import FlatBuffer
from dist_lab.step.grad_elsewhere import GradElsewhere


class GradsInFlight:
    """Protects each `.grad` of a bucket from when its all_reduce is issued until the wait.

    Attributes:
        used: gradients that this rank has sent.
        cleared: gradients in `used` that the user has cleared since.
        aborted: the number of ranks that have aborted the step.
        lost: gradients that were in flight when this rank aborted the step.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], gradients: FlatBuffer, size: int
    ) -> None:
        self.parameters, self.gradients, self.size = parameters, gradients, size
        self.used: set[str] = set()
        self.cleared: set[str] = set()
        self.aborted = 0
        self.lost: set[str] = set()
        self._placeholders: dict[str, GradElsewhere] = {}  # reused in each step
        self._shown = False

    def advice(self, name: str) -> str:
        """The advice in the error message, if backward reaches a gradient in flight."""
        if name in self.cleared:
            return "call job.finish() before zero_grad(), also if the step is skipped"
        return (
            "add up the losses and call backward once, or wrap all backwards but the last in "
            "job.microbatch(last=False)"
        )

    def on_issue(self, used: set[str]) -> None:
        """Called when the bucket is issued. `used`: the gradients that this rank has sent."""
        self.used, self.cleared = used, set()
        self.show_placeholders()

    def on_wait(self, last_flag: float) -> set[str]:
        """Called when the sums have arrived. Returns the gradients that the user has cleared.

        Args:
            last_flag: summed over the ranks.
        """
        self.drop_placeholders()
        self.aborted = self._count_aborted(last_flag)
        return self.cleared

    def show_placeholders(self) -> None:
        """Make each `.grad` a placeholder: see step/grad_elsewhere.py."""
        if self._shown:
            return
        self._shown = True
        for name in self.used - self.cleared:
            parameter = self.parameters[name]
            if name in self._placeholders:
                parameter.grad = self._placeholders[name]
                continue
            advice = f"the gradient of {name} is being summed: call job.finish() before you use it"
            self._placeholders[name] = GradElsewhere.stand_at(parameter, None, advice)

    def drop_placeholders(self) -> None:
        """Make each `.grad` None, and record in `cleared` which ones the user has cleared."""
        for name in self.used - self.cleared if self._shown else ():
            parameter = self.parameters[name]
            if parameter.grad is None:
                self.cleared.add(name)
            elif parameter.grad is not self._placeholders[name]:
                raise UserError(
                    f"the gradient of {name} was replaced while it was being summed: call "
                    "job.finish() before you change it"
                )
            parameter.grad = None
        self._shown = False

    def discard_sums(self) -> None:
        """Drop the sums of an aborted step, and make each `.grad` NaN until it is cleared."""
        self.gradients.wait()
        self.aborted = self._count_aborted(float(self.gradients.tail[-1]))
        self.drop_placeholders()
        self.lost = self.used - self.cleared
        for name in self.lost:
            self.parameters[name].grad = self.gradients.views[name].fill_(math.nan)

    def refuse_lost(self) -> None:
        """Raise UserError if a lost gradient has not been cleared since."""
        for name in self.lost:
            grad = self.parameters[name].grad
            if grad is self.gradients.views[name] and grad.isnan().any():
                raise UserError(
                    f"the gradient of {name} was being summed when an exception ended the step, "
                    "and is lost: call optimizer.zero_grad() after the exception"
                )
        self.lost = set()

    def refuse_partial_abort(self) -> None:
        """Raise UserError if some ranks have aborted the step and others have not."""
        if 0 < self.aborted < self.size:
            raise UserError(
                f"{self.aborted} of {self.size} ranks aborted a step by an exception while "
                "gradients were being summed, and the others went on: raise it on every rank, or "
                "on none"
            )

    def _count_aborted(self, last_flag: float) -> int:
        """An aborted rank's flag is -size, another's 0 or 1: see [Note: aborted steps]."""
        return math.ceil(max(-last_flag, 0.0) / self.size)
