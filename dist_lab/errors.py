"""The two ways a run is refused, and the words of a refusal: one line for the person who typed it.

A message says what is wrong, with the numbers, and what to type instead. The launcher prints it
once, without a traceback; library users catch them as the ValueError and RuntimeError they are.
Everything else that is raised is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


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


def nearest_degree(degrees: Sequence[int], wanted: int) -> int:
    """Of degrees that work the one to try instead.

    >>> nearest_degree([1, 2, 4], 3)
    2
    """
    return min(degrees, key=lambda n: (abs(n - wanted), n))


def one_of(choices: Sequence[str], value: Any) -> str:
    """What there is to choose from, and what was probably meant.

    >>> one_of(["adamw", "sgd"], "adam")
    'adamw or sgd (did you mean adamw?)'
    """
    near = nearest_word(str(value), choices) if len(choices) > 1 else None
    listed = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    return f"{listed} (did you mean {near}?)" if near else listed


def nearest_word(word: str, words: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The one that `word` is probably a slip of, if any."""
    found = difflib.get_close_matches(word[:99], list(words), n=1, cutoff=cutoff)
    return found[0] if found else None


def shown(value: Any) -> str:
    """A value as a short piece of one line, whatever is in it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return "so large a number"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
