"""Text that is shown is valid and final: nothing is taken back, and nothing is lost."""

import pytest

from dist_lab.errors import UserError
from dist_lab.inference.text import Bytes, TextStream


def shown(data, stops=()):
    stream = TextStream(Bytes(), stops)
    parts = [stream.feed(byte) for byte in data] + [stream.finish()]
    assert "".join(parts) == stream.text
    return parts, stream


def test_half_a_character_is_held_back():
    parts, _ = shown("é€😀x".encode())
    assert parts == ["", "é", "", "", "€", "", "", "", "😀", "x", ""]


def test_half_a_character_at_the_end_is_dropped():
    assert shown("a€".encode()[:-1])[1].text == "a"


def test_bytes_that_are_no_utf8_become_the_replacement_character():
    _, stream = shown(b"a\xffb\xc3(")
    assert stream.text == "a\ufffdb\ufffd("
    stream.text.encode()


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [("one\n\ntwo", ["\n\n"], "one"), ("aab", ["ab"], "a"), ("abab", ["abc"], "abab"),
     ("x#y;z", [";", "#"], "x"), ("héé!", ["é!"], "hé"), ("stop", ["stop"], "")],
)  # fmt: skip
def test_a_stop_string_and_all_after_it_is_left_out(text, stops, kept):
    _, stream = shown(text.encode(), stops)
    assert stream.text == kept
    assert stream.stopped == (kept != text)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not():
    parts, _ = shown(b"a\n\nb", ["\n\n\n"])
    assert parts == ["a", "", "", "\n\nb", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        TextStream(Bytes(), [""])
