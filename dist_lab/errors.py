"""The two ways a run is refused. Both carry one line for the person who typed the command.

A message says what is wrong, with the numbers, and what to type instead. The launcher prints it
once, without a traceback; library users catch them as the ValueError and RuntimeError they are.
Everything else that is raised is a defect of ours and keeps its traceback.
"""

from collections.abc import Sequence


class UserError(ValueError):
    """What was asked for cannot be: a wrong flag, a batch that does not divide, a misused call."""

    exit_status = 2


class Drawn(UserError):
    """One whose line is followed by a drawing of the place, line by line."""


class MachineError(RuntimeError):
    """What was asked for is fine; the machine, its files or its network refuse."""

    exit_status = 1


class TrainingDiverged(MachineError):
    """The loss or a gradient is no longer a number. The weights are those of the step before."""


def nearest(degrees: Sequence[int], wanted: int) -> int:
    """Of degrees that work the one to try instead.

    >>> nearest([1, 2, 4], 3)
    2
    """
    return min(degrees, key=lambda n: (abs(n - wanted), n))
