"""Pickles read as data: the same data as pickle reads, and nothing is imported or called."""

import pickle
from dataclasses import dataclass

import pytest

from dist_lab.checkpoint.exchange.pickled_data import Name, Pairs, Record, read
from dist_lab.errors import MachineError, UserError


@dataclass
class Point:
    x: int
    tags: tuple[str, ...]


POINT = f"{__name__}.Point"
VALUE = [1, -5, 2**70, 1.5, "text", None, True, False, (), (1,), (1, 2, 3, 4), [[]], 300]


def plain(value):
    """Data as pickle would give it."""
    if isinstance(value, Pairs):
        return {plain(key): plain(item) for key, item in value.items}
    if isinstance(value, Record):
        return Point(**plain(value.state))
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value", [VALUE, {"a": {"b": [1, 2]}, (1, 2): "x"}, [Point(3, ("a", "b"))] * 3], ids=str
)
def test_plain_data_and_dataclasses_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    assert plain(read(data, {POINT}, "x")) == pickle.loads(data)


def test_a_name_is_not_looked_up_and_a_call_is_not_made():
    class Calls:
        def __reduce__(self):
            return print, ("run",)

    value = read(pickle.dumps(Calls()), {"builtins.print"}, "x")
    assert (value.of, value.arguments) == (Name("builtins", "print"), ("run",))
    assert read(b"cno.such.module\nthing\n.", {"no.such.module.thing"}, "x").name == "thing"


def test_a_name_that_is_not_allowed_is_refused_wherever_it_is():
    for value in (Point, [1, {"a": (Point(1, ()),)}]):
        with pytest.raises(UserError, match=r"f would call '.*Point' when it is unpickled"):
            read(pickle.dumps(value), set(), "f")


@pytest.mark.parametrize(
    "data",
    [
        b"", b".", b"N", b"(.", b"0.", b"t.", b"u.", b"a.", b"R.", b"b.", b"h\x09.", b"\x93.",
        b"}a.", b"]u.", b"NNb.", b"Nb.", b"(K\x01N\x85.", b"I1\n.", b"X\xff\xff\xff\x7fabc.",
        b"P1\n.", b"(i__main__\nA\n.", b"\x8f.", b"N}N\x81.", b"NN.",
    ],
)  # fmt: skip
def test_a_damaged_or_unusual_pickle_is_one_line(data):
    with pytest.raises(MachineError, match=r"f is damaged, or is not of its kind \(") as refusal:
        read(data, set(), "f")
    assert "\n" not in str(refusal.value)


def test_a_pickle_that_grows_by_repetition_takes_no_time():
    """Each tuple has the last one twice: 2^200 values, if they were copied."""
    data = b"(N\x94" + b"".join(b"h%ch%c\x86\x94" % (last, last) for last in range(200)) + b"t."
    value = read(data, set(), "f")
    assert len(value) == 201
    assert value[-1][0] is value[-1][1] is value[-2]
