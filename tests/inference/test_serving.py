"""The line between a router and rank 0, and the commands of it on several ranks."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from web_server import Letters

from dist_lab.errors import MachineError
from dist_lab.inference import line as lines
from dist_lab.inference.line import Line, as_line
from dist_lab.inference.serving import serve
from dist_lab.mesh.mesh import init_mesh


@pytest.fixture
def ends():
    """A line, and the router's end of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Line(ours), theirs


def test_only_whole_lines_are_received(ends):
    line, router = ends
    assert line.receive(0) == b""
    router.sendall(b'{"do": "st')
    assert line.receive(1) == b""
    router.sendall(b'op"}\n{"do": "stop"}\n{')
    assert line.receive(1) == b'{"do": "stop"}\n{"do": "stop"}\n'
    router.sendall(b"}\n")
    assert line.receive(1) == b"{}\n"


def test_a_message_is_one_line_whatever_its_texts_have(ends):
    line, router = ends
    message = {"text": "a\nb\r\u2028é\0\x85"}
    line.send(message)
    received = router.recv(999)
    assert received.endswith(b"\n")
    assert [json.loads(one) for one in received.splitlines()] == [message]
    assert received == as_line(message)


def test_a_line_that_is_too_long_and_a_router_that_ends_are_errors(ends, monkeypatch):
    line, router = ends
    monkeypatch.setattr(lines, "LARGEST", 100)
    router.sendall(b"x" * 101)
    with pytest.raises(MachineError, match="more than 100 bytes"):
        line.receive(1)
    router.close()
    with pytest.raises(MachineError, match="the router has ended"):
        line.receive(1)
    with pytest.raises(MachineError, match="the router has ended"):
        line.send({})
        line.send({})  # the first one may still be taken by the kernel


def play_router(router, seen):
    """Asks for two texts, cancels one of them, and stops when the other has ended."""
    two = {"prompt": "a", "new_tokens": 3, "sampling": {}, "seeds": [1, 2], "stops": []}
    one = two | {"seeds": [3]}
    router.sendall(as_line({"do": "add", "name": "1", "asked": [two]}))
    router.sendall(as_line({"do": "add", "name": "2", "asked": [one, one | {"prompt": ""}]}))
    router.sendall(as_line({"do": "cancel", "name": "1.0"}))
    with router.makefile("rb") as file:
        for one in map(json.loads, file):
            seen.append(one)
            if any(reason for _, _, reason in one["events"]):
                router.sendall(as_line({"do": "stop"}))
                return


def serve_on_rank(rank):
    """Serve letters on this rank. Returns the engine's log, and on rank 0 what the router saw."""
    mesh, engine, seen = init_mesh(tp=2), Letters(), []
    if rank > 0:
        serve(engine, mesh.world, None)
        return engine.log, seen
    ours, theirs = socket.socketpair()
    with ours, theirs:
        router = threading.Thread(target=play_router, args=(theirs, seen))
        router.start()
        serve(engine, mesh.world, Line(ours), beat=0.05)
        router.join()
    return engine.log, seen


def test_every_rank_makes_the_calls_that_rank_0_is_told(on_ranks):
    (log, seen), (other, _) = on_ranks(2, serve_on_rank)
    assert log == other
    assert log == ["add 1.0", "add 1.1", "add 2.0", "cancel 2.0", "cancel 1.0"]
    accepted = {name: n for message in seen for name, n in message["accepted"].items()}
    refused = {name: why for message in seen for name, why in message["refused"].items()}
    assert accepted == {"1": [1, 1]}
    assert list(refused) == ["2"]
    assert "empty" in refused["2"]
    texts = [event for message in seen for event in message["events"] if event[0] == "1.1"]
    assert texts == [["1.1", "b", ""], ["1.1", "c", ""], ["1.1", "d", "length"]]


def test_an_idle_engine_says_so_once_in_a_beat_so_that_no_rank_waits_for_ever(ends):
    line, router = ends
    world, start = SimpleNamespace(size=1), time.monotonic()
    served = threading.Thread(target=serve, args=(Letters(), world, line, 0.05))
    served.start()
    with router.makefile("rb") as file:
        counts = [json.loads(next(file))["counts"]["running"] for _ in range(4)]
    assert time.monotonic() - start > 0.1  # three beats, less the accuracy of a clock
    router.sendall(as_line({"do": "stop"}))
    served.join(10)
    assert counts == [0] * 4
    assert not served.is_alive()
