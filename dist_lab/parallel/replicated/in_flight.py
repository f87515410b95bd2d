"""The gradients of one ddp bucket while their sum is in flight.

Backward goes on, and so may the user's loop. A gradient that is being summed is neither this rank's
nor the sum yet, so a stand-in takes its place in `.grad`: what is done to it would be lost.

[Note: broken off] An exception may end a step on this rank while buckets are in flight. Then it
sends the other buckets at once, with -N in place of their last flag, and every rank learns of it.
If all have broken off the step, the sums are dropped. If some went on, all raise the same line.
"""

import math
from collections.abc import Mapping

from torch import nn

from dist_lab.errors import UserError
from dist_lab.parallel.flat_buffer import FlatBuffer
from dist_lab.step.grad_elsewhere import GradElsewhere


class GradsInFlight:
    """What stands in `.grad` between the issue of a bucket and its wait.

    Attributes:
        used: gradients that this rank has sent.
        cleared: those of them that the user has cleared since.
        given_up: the number of ranks that have broken off the step.
        lost: gradients that were in flight when this rank broke off the step.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], gradients: FlatBuffer, size: int
    ) -> None:
        self.parameters, self.gradients, self.size = parameters, gradients, size
        self.used: set[str] = set()
        self.cleared: set[str] = set()
        self.given_up = 0
        self.lost: set[str] = set()
        self._stand_ins: dict[str, GradElsewhere] = {}  # made once
        self._shown = False

    def advice(self, name: str) -> str:
        """What to do about a second gradient while the first is in flight."""
        if name in self.cleared:
            return "call job.finish() before zero_grad(), also after a step that is not taken"
        return (
            "add up the losses and call backward once, or wrap all backwards but the last in "
            "job.microbatch(last=False)"
        )

    def leave(self, used: set[str]) -> None:
        """The sum of these gradients has been issued."""
        self.used, self.cleared = used, set()
        self.show_stand_ins()

    def arrive(self, told: float) -> set[str]:
        """The sums are here. Returns the gradients that the user has cleared meanwhile.

        Args:
            told: the sum of the ranks' last flags.
        """
        self.drop_stand_ins()
        self.given_up = self._ranks_that_gave_up(told)
        return self.cleared

    def show_stand_ins(self) -> None:
        """Put a stand-in into each `.grad`: see step/grad_elsewhere.py."""
        if self._shown:
            return
        self._shown = True
        for name in self.used - self.cleared:
            parameter = self.parameters[name]
            if name in self._stand_ins:
                parameter.grad = self._stand_ins[name]
                continue
            advice = f"the gradient of {name} is being summed: call job.finish() before you use it"
            self._stand_ins[name] = GradElsewhere.stand_at(parameter, None, advice)

    def drop_stand_ins(self) -> None:
        """Note which gradients a user has cleared, and leave every `.grad` empty."""
        for name in self.used - self.cleared if self._shown else ():
            parameter = self.parameters[name]
            if parameter.grad is None:
                self.cleared.add(name)
            elif parameter.grad is not self._stand_ins[name]:
                raise UserError(
                    f"the gradient of {name} was replaced while it was being summed: call "
                    "job.finish() before you change it"
                )
            parameter.grad = None
        self._shown = False

    def lose(self) -> None:
        """Drop the sums of a step that was broken off. `.grad` is NaN until it is cleared."""
        self.gradients.wait()
        self.given_up = self._ranks_that_gave_up(float(self.gradients.tail[-1]))
        self.drop_stand_ins()
        self.lost = self.used - self.cleared
        for name in self.lost:
            self.parameters[name].grad = self.gradients.views[name].fill_(math.nan)

    def refuse_lost(self) -> None:
        """Raise UserError if a gradient that is lost has not been cleared since."""
        for name in self.lost:
            grad = self.parameters[name].grad
            if grad is self.gradients.views[name] and grad.isnan().any():
                raise UserError(
                    f"the gradient of {name} was being summed when the step was broken off, and is "
                    "lost: call optimizer.zero_grad() after the exception"
                )
        self.lost = set()

    def refuse_given_up(self) -> None:
        """Raise UserError if some ranks have broken off the step, and others have not."""
        if 0 < self.given_up < self.size:
            raise UserError(
                f"{self.given_up} of {self.size} ranks have broken off a step by an exception "
                "while gradients were being summed, and the others went on: let it be raised on "
                "every rank, or on none"
            )

    def _ranks_that_gave_up(self, told: float) -> int:
        """Each adds -size, and others may add one each: see [Note: broken off]."""
        return round(max(-told, 0.0) / self.size + 0.49)
