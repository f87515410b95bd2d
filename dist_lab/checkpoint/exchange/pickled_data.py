"""Reads the data in a pickle without running the pickle.

A pickle is a program for a small machine with a stack. Two of its instructions make it dangerous:
one looks up any function of any module by name, another calls it. `pickle.load` does as it is told.
This machine has the same stack and neither of the two: a name stays a `Name`, and a call becomes a
`Record` of the name and its arguments. So nothing is imported and nothing is called, and whoever
reads the result decides what a record means.

    Metadata(...)   pickled   ->   Record(Name("torch...metadata", "Metadata"), (), state={...})

Only the instructions are known that Python writes for plain data and dataclasses, protocols 2 to 5.
A dict becomes a list of (key, value) pairs, because a record has no hash.
"""

import pickletools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from dist_lab.errors import MachineError, UserError


@dataclass(frozen=True)
class Name:
    """A class or function, which is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object: the class or function that would make it, its arguments, and its state."""

    of: Name
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class Pairs:
    """The items of a dict, in order."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


class NotPlain(ValueError):
    """The pickle is damaged, or uses an instruction that plain data does not need."""


MARK = object()
PLAIN = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
}  # fmt: skip
WITH_VALUE = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
}  # fmt: skip
IGNORED = {"PROTO", "FRAME"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(data: bytes, allowed: Collection[str], what: str) -> Any:
    """The object in a pickle, of plain data, `Record`s and `Pairs`.

    Args:
        allowed: the full names of classes and functions that may occur.
        what: the file, for messages.

    Raises:
        UserError: another name occurs.
        MachineError: the pickle is damaged, or has more than plain data in it.
    """
    try:
        return _run(data, allowed, what)
    except (NotPlain, ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        detail = str(error) if isinstance(error, NotPlain) else type(error).__name__
        raise MachineError(
            f"{what} is damaged, or is not of its kind ({detail}); get it again"
        ) from None


def _run(data: bytes, allowed: Collection[str], what: str) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def name(module: Any, attribute: Any) -> Name:
        found = Name(module, attribute)
        if str(found) not in allowed:
            raise UserError(
                f"{what} would call {str(found)!r} when it is unpickled, which a checkpoint "
                "does not need; do not trust it"
            )
        return found

    def after_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise NotPlain("no mark")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def record(arguments: Any, of: Any) -> Record:
        if not isinstance(of, Name) or not isinstance(arguments, tuple):
            raise NotPlain("a call of no name")
        return Record(of, arguments)

    value: Any
    for opcode, value, _ in pickletools.genops(data):
        code = opcode.name
        if code in IGNORED:
            continue
        if code in PLAIN:
            stack.append(PLAIN[code])
        elif code in WITH_VALUE:
            stack.append(value)
        elif code == "MARK":
            stack.append(MARK)
        elif code in TUPLES:
            start = len(stack) - TUPLES[code]
            if start < 0:
                raise NotPlain("an empty stack")
            stack[start:] = [tuple(stack[start:])]
        elif code == "TUPLE":
            stack.append(tuple(after_mark()))
        elif code == "EMPTY_LIST":
            stack.append([])
        elif code == "EMPTY_DICT":
            stack.append(Pairs())
        elif code in ("APPEND", "APPENDS"):
            items = after_mark() if code == "APPENDS" else [stack.pop()]
            _a(list, stack[-1]).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = after_mark() if code == "SETITEMS" else [stack.pop(-2), stack.pop()]
            pairs = zip(items[::2], items[1::2], strict=True)
            _a(Pairs, stack[-1]).items.extend(pairs)
        elif code == "GLOBAL":
            stack.append(name(*value.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(name(module, attribute))
        elif code in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(record(arguments, stack.pop()))
        elif code == "BUILD":
            state = stack.pop()
            _a(Record, stack[-1]).state = state
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif code == "STOP":
            if len(stack) != 1 or stack[0] is MARK:
                raise NotPlain("not one value")
            return stack[0]
        else:
            raise NotPlain(f"instruction {code}")
    raise NotPlain("no end")


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise NotPlain(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value
