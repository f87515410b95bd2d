"""Refuses parameters that another job trains already.

Two jobs with one parameter would both sum its gradient over the ranks, and the gradient would be
multiplied by the number of ranks. So a job claims the parameters that it trains or splits:
it sets a mark on the parameter, which copies of the model do not have. A frozen parameter that is
not split, such as a backbone's, may be in several jobs.
"""

from collections.abc import Mapping

from torch import nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout
from dist_lab.step.hooks import StaysBehind

MARK = "claimed_by_a_job"


class Claim(StaysBehind):
    """The mark on a parameter that a job trains or splits."""

    in_a_copy = None


def claim(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Mark the parameters that the job of this model trains or splits."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or layouts[name].splits:
            setattr(parameter, MARK, Claim())


def refuse_claimed(model: nn.Module) -> None:
    """Raise UserError for a parameter that another job has claimed."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, MARK, None) is not None:
            raise UserError(
                f"{name} is in another job already, and two jobs would sum its gradient over the "
                "ranks twice; put all modules that share it in one module, and parallelize that"
            )
