"""The errors that we raise on purpose, and helpers for their one-line messages.

A message says what is wrong, with the numbers, and what to type instead. The launcher prints it
once, without a traceback. Library users catch these errors as ValueError or RuntimeError. Any other
exception is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class UserError(ValueError):
    """The request is wrong: a bad flag, a batch that does not divide, or a misused call."""

    exit_status = 2


class Drawn(UserError):
    """A UserError whose one line is followed by a drawing that shows the place of the mistake."""


class MachineError(RuntimeError):
    """The request is fine, but the machine, its files or its network fail."""

    exit_status = 1


class CollectiveError(RuntimeError):
    """A collective failed in the transport: a rank died, or did not arrive in time.

    The message is a line about this rank's call, and then `board`: what every rank was doing.
    `is_first`: no other rank of this machine has failed before.
    """

    def __init__(self, line: str, board: str = "", *, is_first: bool = False) -> None:
        super().__init__(f"{line}\n{board}" if board else line)
        self.board, self.is_first = board, is_first


class CollectiveMismatch(CollectiveError):
    """The ranks of a group call different collectives."""


class TrainingDiverged(MachineError):
    """The loss or a gradient is not finite. The weights are still those of the last step."""


class ReplicasDiffer(MachineError):
    """Ranks that should hold the same values do not: see sentinel/sentinel.py."""


def nearest_degree(degrees: Sequence[int], wanted: int) -> int:
    """Return the degree nearest to `wanted`; if two are equally near, the smaller.

    >>> nearest_degree([1, 2, 4], 3)
    2
    """
    return min(degrees, key=lambda n: (abs(n - wanted), n))


def one_of(choices: Sequence[str], value: Any) -> str:
    """List the choices for an error message, with a guess at what was meant.

    >>> one_of(["adamw", "sgd"], "adam")
    'adamw or sgd (did you mean adamw?)'
    """
    guess = nearest_word(str(value), choices) if len(choices) > 1 else None
    listed = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    return f"{listed} (did you mean {guess}?)" if guess else listed


def nearest_word(word: str, words: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the word that `word` is probably a misspelling of, or None."""
    matches = difflib.get_close_matches(word[:99], list(words), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def printable(text: str, keep: str = "") -> str:
    """Escape what is not printable: a text from a file must not steer the terminal.

    Args:
        keep: characters that stay, as line breaks of a text that is shown in full.

    >>> print(printable("red: " + chr(27) + "[31m"))
    red: \\x1b[31m
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """Format any value for an error message, on one line and in at most 80 characters."""
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
