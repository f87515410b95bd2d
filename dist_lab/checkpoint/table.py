"""What a rank's table may say: rank-K.json has these keys, with values of these kinds.

Hashes show that a checkpoint is what its author has saved. They do not show that its author means
well. So everything is checked that is used as a size, an index or a name before it is used.
"""

import base64
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dist_lab.errors import shown

KEYS = {"tensors", "random", "optimizer", "numbers", "modules", "file"}
LARGEST = 2**62  # of a length
WORDS = 624  # of the Mersenne twister, whose state is 32-bit words
TORCH_STATE = torch.Generator().get_state().numel()  # bytes


class Odd(ValueError):
    """A value is not of the kind that it must be."""


def check(table: Any) -> None:
    """Raise Odd unless this is the table of a rank. The reader checks the boxes of tensors."""
    keys(table, KEYS)
    for named in ("tensors", "modules", "numbers"):
        each(text, table[named])
    mapping(table["tensors"], lambda entry: keys(entry, {"shape", "dtype", "boxes"}))
    mapping(table["modules"], lambda state: None)
    mapping(table["numbers"], lambda numbers: mapping(numbers, number))
    optimizer(table["optimizer"])
    random(table["random"])
    file(table["file"])


def file(value: Any) -> None:
    """The size and the hash of a file."""
    keys(value, {"bytes", "sha256"})
    length(value["bytes"])
    if not isinstance(value["sha256"], str) or len(value["sha256"]) != 64:
        raise Odd("a SHA-256 that is none")


def optimizer(value: Any) -> None:
    """The class of an optimizer, and its groups."""
    if value is None:
        return
    keys(value, {"class", "groups"})
    text(value["class"])
    for group in listed(value["groups"]):
        keys(group, {"options", "names"})
        mapping(group["options"], plain)
        if "params" in group["options"]:
            raise Odd("an option 'params'")
        each(text, listed(group["names"]))


def random(value: Any) -> None:
    """The states of random generators: see randomness/generators.py."""
    keys({name: state for name, state in value.items() if name != "cuda"}, RANDOM)
    _, words, gauss = listed(value["python"], 3)
    each(word, listed(words, WORDS + 1))
    number(gauss or 0)
    if value["python"][0] != 3 or words[-1] > WORDS:
        raise Odd("a state of Python's random generator")
    kind, key, position, has_gauss, cached = listed(value["numpy"], 5)
    each(word, (position, has_gauss))
    number(cached)
    if kind != "MT19937" or position > WORDS or len(base64.b64decode(text(key))) != 4 * WORDS:
        raise Odd("a state of NumPy's random generator")
    if len(base64.b64decode(text(value["torch"]))) != TORCH_STATE:
        raise Odd("a state of torch's random generator")


RANDOM = {"torch", "python", "numpy"}

# --- kinds of values ------------------------------------------------------------------------------


def keys(value: Any, wanted: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != wanted:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise Odd(f"{found} in place of {sorted(wanted)}")


def mapping(value: Any, of: Callable[[Any], object]) -> None:
    if not isinstance(value, dict):
        raise Odd(f"a {type(value).__name__} in place of a table")
    each(of, value.values())


def each(of: Callable[[Any], object], values: Iterable[Any]) -> None:
    for value in values:
        of(value)


def listed(value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise Odd(
            f"a {type(value).__name__} in place of a list" + (f" of {count}" if count else "")
        )
    return value


def text(value: Any) -> str:
    """A name: it will be printed, so it must not have what steers a terminal.

    >>> text(chr(27) + "[2J")
    Traceback (most recent call last):
        ...
    dist_lab.checkpoint.table.Odd: a name '\\x1b[2J', which cannot be printed
    """
    if not isinstance(value, str):
        raise Odd(f"a {type(value).__name__} in place of a text")
    if not value.isprintable():
        raise Odd(f"a name {shown(value)}, which cannot be printed")
    return value


def length(value: Any) -> int:
    """
    >>> length(-1)
    Traceback (most recent call last):
        ...
    dist_lab.checkpoint.table.Odd: a length of -1
    """
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise Odd(f"a length of {shown(value)}")
    return value


def word(value: Any) -> None:
    if length(value) >= 2**32:
        raise Odd("a word of more than 32 bits")


def number(value: Any) -> None:
    if not isinstance(value, int | float | bool) or abs(value) > 2**64:
        raise Odd(f"a {type(value).__name__} in place of a number")


def plain(value: Any) -> None:
    """An option: a number, a text, or a list of them."""
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not isinstance(one, str):
            number(one)
