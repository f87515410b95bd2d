"""What is refused because another job trains it already.

A parameter in two jobs would be summed by both, and its gradient be as many times too large as the
ranks are. So a job claims what it trains or splits: a mark on the parameter itself, which a copy
of the model leaves behind. What is frozen and whole, such as a backbone, may be in several jobs.
"""

from collections.abc import Mapping

from torch import nn

from dist_lab.errors import UserError
from dist_lab.layout.layout import Layout
from dist_lab.step.hooks import StaysBehind

MARK = "claimed_by_a_job"


class Claim(StaysBehind):
    """Stands on a parameter that a job trains or splits."""

    in_a_copy = None


def claim(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Mark what the job of this model trains or splits."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or layouts[name].splits:
            setattr(parameter, MARK, Claim())


def refuse_claimed(model: nn.Module) -> None:
    """Raise UserError for a parameter that another job has claimed."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, MARK, None) is not None:
            raise UserError(
                f"{name} is in another job already, whose sums over the ranks would be taken "
                "twice; put all modules that share it in one, and parallelize that"
            )
