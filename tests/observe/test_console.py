"""observe/console.py: a bar for a person, and lines for a log."""

import io

import pytest
from rich.console import Console

from dist_lab.observe import console
from dist_lab.observe.console import watched


@pytest.fixture
def screen(monkeypatch):
    """What a person sees at a terminal of 80 columns."""
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(console, "Console", lambda quiet: terminal)
    return shown


def test_a_person_sees_a_bar_and_what_is_printed_above_it(screen):
    for item in watched(["a", "b"], "cells"):
        print(f"done with {item}")
    text = screen.getvalue()
    assert "cells" in text
    assert "2/2" in text
    assert text.index("done with a") < text.index("done with b")


def test_a_log_has_a_line_now_and_then_and_none_if_all_is_done_at_once(capsys, monkeypatch):
    assert [*watched(range(3), "ranks written")] == [0, 1, 2]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(console, "EVERY", -1.0)
    assert [*watched("xy", "files")] == ["x", "y"]
    assert capsys.readouterr().out == "files 0/2\nfiles 1/2\n"
    assert [*watched("xy", "files", lines=False)] == ["x", "y"]
    assert capsys.readouterr().out == ""


def test_a_bar_ends_when_its_loop_is_left(screen):
    with pytest.raises(ValueError, match="no"):
        for item in watched([1, 2], "cells"):
            raise ValueError(f"no {item}")
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue(), (
        "the cursor is shown again"
    )
