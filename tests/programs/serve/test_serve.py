"""launch/serve.py as a program, with ranks: its command line, its texts, and every way to end."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import short_run
from processes import all_gone, listening, with_mark
from programs import ROOT, run
from web_server import Server

from dist_lab.errors import MachineError
from dist_lab.processes.failures import Failure
from dist_lab.programs.serve import command

AT = re.compile(r"serve\.py: (\S+) is at http://127\.0\.0\.1:(\d+); Ctrl-C stops\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return short_run.trained(tmp_path_factory.getbasetemp())


def played(client, checkpoint, *flags, ranks=2, begins_at=200):
    """Run serve.py in this process, whose forkserver is warm, and `client(server)` in a thread.

    Args:
        begins_at: the status of /health at which the client begins.

    Returns:
        What the program has returned and printed, and what the client has returned.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        server = Server(free.getsockname()[1])
    returned, errors = [], []

    def play():
        try:
            server.until(lambda: health(server) == begins_at, 60)
            returned.append(client(server))
        except BaseException as error:
            errors.append(error)
        finally:
            server.close()
            if health(server) == 200:
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=play)
    thread.start()
    flags = (f"--checkpoint={checkpoint}", f"--port={server.port}", f"--nproc={ranks}", *flags)
    done = run("serve.py", *flags)
    thread.join()
    if errors:
        raise AssertionError(done.stderr) from errors[0]
    return done, returned[0]


def new_ranks(others):
    """Name -> process of the ranks, without those of the pool of the tests."""
    children = multiprocessing.active_children()
    return {child.name: child for child in children if child.pid not in others}


def health(server):
    """The status of /health; None if nobody answers."""
    with suppress(OSError):
        return server.ask("/health").status
    return None


@contextmanager
def started(checkpoint, *flags, ranks=2):
    """A server in a new process, and what it prints. It must leave no process behind."""
    mark = f"DIST_LAB_MARK=serve-{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [sys.executable, "launch/serve.py", f"--checkpoint={checkpoint}", "--port=0",
         f"--nproc={ranks}", *flags],
        cwd=ROOT, env=os.environ | {name: value}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        found = AT.fullmatch(line := process.stderr.readline())
        assert found, line + process.stderr.read()
        server = Server(int(found[2]))
        yield server, process, mark
        server.close()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert all_gone(mark)


def ended(process, within=20.0):
    """The exit status, and all that it has printed since its address."""
    _, printed = process.communicate(timeout=within)
    return process.returncode, printed


# --- the command line -----------------------------------------------------------------------------

REFUSED = [
    (["--port=99999"], 2, "port cannot be 99999 (--port); give a whole number, 65535 or less"),
    (["--policy=vlm"], 2, "policy cannot be 'vlm' (--policy); give static, orca, tgi, vllm"),
    (["--nproc=2", "--mesh=tp=4"], 2, "mesh tp=4 needs 4 processes, 2 were started (--mesh)"),
    (["--nproc=2", "--mesh=dp=2"], 2, "mesh axis 'dp' does not split a model that generates text"),
    (["--host=no.such.host.invalid"], 2, "host 'no.such.host.invalid' is no address of this"),
    (["--checkpoint=/no/such"], 2, "there is no folder '/no/such' (--checkpoint)"),
    (["--line=x"], 2, "no flag '--line=x'"),
]


@pytest.mark.parametrize(("flags", "status", "words"), REFUSED)
def test_a_mistake_is_one_line(trained, flags, status, words):
    given = [] if flags[0].startswith("--checkpoint") else [f"--checkpoint={trained}"]
    done = run("serve.py", *given, *flags)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1)
    assert words in done.stderr


def test_a_port_in_use_is_one_line(trained):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("serve.py", f"--checkpoint={trained}", f"--port={port}")
    assert done.returncode == 1
    assert done.stderr == (
        f"serve.py: error: cannot listen at port {port} of 127.0.0.1: Address already in use "
        "(--port); give another --port, or 0 for any that is free\n"
    )


def test_without_its_packages_it_says_what_to_install(trained, monkeypatch):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    done = run("serve.py", f"--checkpoint={trained}")
    assert done.returncode == 2
    assert done.stderr == (
        "serve.py: error: serve.py needs uvicorn, which is not installed; type pip install "
        "'dist_lab[serve]'\n"
    )


def test_it_cannot_be_a_rank_of_torchrun(trained, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    done = run("serve.py", f"--checkpoint={trained}", "--port=0")
    assert done.returncode == 2
    assert "start it without torchrun, with --nproc" in done.stderr


def test_ranks_that_cannot_load_the_model_end_the_server_with_their_line(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run("serve.py", f"--checkpoint={tmp_path / 'empty'}", "--port=0", "--nproc=2")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("serve.py: error: ")
    assert done.stderr.count("\n") == 1
    done = run("serve.py", f"--checkpoint={trained}", "--port=0", "--nproc=3")
    assert done.returncode == 2
    assert "heads" in done.stderr


# --- with ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["tp=2", pytest.param("pp=2", marks=pytest.mark.slow)])
def test_two_ranks_serve_the_texts_of_one_process_and_stop_when_asked(trained, mesh):
    texts = [
        run("generate.py", f"--checkpoint={trained}", f"--prompt={prompt}", "--tokens=9").stdout
        for prompt in ("def ", "x")
    ]

    def client(server):
        both = server.complete(["def ", "x"], 9, temperature=0).json["choices"]
        assert [choice["text"] for choice in both] == texts
        assert server.stream("def ", 9, temperature=0).text() == texts[0]
        assert server.complete("a", 20_000).status == 400
        assert server.metric("dist_lab_blocks_used") == 0

    done, _ = played(client, trained, f"--mesh={mesh}")
    assert done.returncode == 0
    address, stop = done.stderr.splitlines()
    assert address.startswith("serve.py: short-run is at http://127.0.0.1:")
    assert stop == "serve.py: stopping; texts may go on for 10 s, and Ctrl-C ends them now"


def test_a_signal_while_the_model_is_loaded_ends_the_server_at_once(trained):
    others = {child.pid for child in multiprocessing.active_children()}

    def client(server):
        assert server.ask("/health").json["status"] == "loading"
        assert server.complete().status == 503
        server.until(lambda: len(new_ranks(others)) == 2)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    done, _ = played(client, trained, begins_at=503)
    assert (done.returncode, done.stderr) == (143, "")


def test_a_client_that_goes_away_frees_its_blocks(trained):
    def client(server):
        stream = server.stream("a" * 99, 20_000)
        server.until(lambda: server.metric("dist_lab_blocks_used") >= 7)
        whole = server.raw("/v1/completions", b'{"prompt": "b", "max_tokens": 10000}')
        server.until(lambda: server.metric("dist_lab_texts_running") == 2)
        stream.close()
        whole.close()
        server.until(lambda: server.metric("dist_lab_blocks_used") == 0)
        assert server.metric("dist_lab_open_texts") == 0

    assert played(client, trained, "--blocks=2000")[0].returncode == 0


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_server_with_its_name_and_clients_get_an_error(trained, victim):
    others = {child.pid for child in multiprocessing.active_children()}

    def client(server):
        stream = server.stream("a", 100_000)
        server.until(lambda: server.metric("dist_lab_texts_running") == 1)
        new_ranks(others)[f"rank {victim}"].kill()
        *_, last = stream
        return last

    done, last = played(client, trained, "--blocks=8000")
    assert last["error"]["type"] == "server_error"
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == [
        f"serve.py: error: rank {victim} of 2: killed by SIGKILL, which the kernel sends when "
        "memory runs out; the server has ended, and 1 open texts got an error"
    ]


@pytest.mark.parametrize(
    ("ready", "words"),
    [(True, "rank 0 of 2: disk full; the server has ended, and 3 open texts got an error"),
     (False, "disk full")],
)  # fmt: skip
def test_an_error_of_a_rank_names_it_once_the_server_has_served(capsys, ready, words):
    failure = Failure.of(0, MachineError("disk full"))
    lost = Failure.of(1, RuntimeError("Connection closed by peer"))
    http = SimpleNamespace(ready=ready, cut=3)
    assert command.tell_failures([lost, failure], 2, http, debug=False) == 1
    assert capsys.readouterr().err == f"serve.py: error: {words}\n"


# --- in a new process -----------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_to_all_processes_lets_texts_end_and_nobody_listens_elsewhere(trained):
    with started(trained, "--stop-seconds=60") as (server, process, mark):
        addresses = {a.split(":")[0] for pid in with_mark(mark) for a in listening(pid)}
        assert addresses <= {"0100007F", f"{'0' * 24}01000000"}
        stream = server.stream("a", 100)
        server.until(lambda: server.metric("dist_lab_texts_running") == 1)
        os.killpg(process.pid, signal.SIGTERM)  # the ranks too, as a service manager does
        assert stream.text()
        status, printed = ended(process)
        assert status == 0
        assert printed.startswith("serve.py: stopping; texts may go on for 60 s")
        assert printed.count("\n") == 1


@pytest.mark.slow
def test_a_long_text_is_cut_by_a_stop_and_a_second_signal_ends_at_once(trained):
    def client(server):
        stream = server.stream("a", 100_000)
        server.until(lambda: server.metric("dist_lab_texts_running") == 1)
        os.kill(os.getpid(), signal.SIGINT)
        *_, last = stream
        return last

    done, last = played(client, trained, "--blocks=8000", "--stop-seconds=0.5")
    assert last["error"]["message"].startswith("the server is stopping")
    assert done.returncode == 0
    with started(trained, "--blocks=8000", "--stop-seconds=60") as (server, process, _):
        server.stream("a", 100_000)
        server.until(lambda: server.metric("dist_lab_texts_running") == 1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert ended(process, within=8)[0] == 143


# --- hostile clients ------------------------------------------------------------------------------

HUGE = b'{"prompt": "' + b"x" * (2**20) + b'"}'
HOSTILE = {
    "huge": HUGE,
    "long prompt": b'{"prompt": "' + b"x" * 500_000 + b'"}',
    "long prompt of many texts": json.dumps({"prompt": "x" * 600_000, "n": 16}).encode(),
    "many tokens": b'{"prompt": [' + b"1," * 200_000 + b"1]}",
    "deep": b'{"prompt": ' + b"[" * 500_000,
    "unknown token": b'{"prompt": [999999999]}',
    "no json": b"\x00\xff\xfe",
    "surrogate": b'{"prompt": "\\ud800"}',
    "not finite": b'{"prompt": "a", "temperature": 1e999}',
    "negative": b'{"prompt": "a", "max_tokens": -1}',
    "unknown field": b'{"prompt": "a", "__class__": "os.system"}',
    "nul": b'{"prompt": "\\u0000\\u0001", "max_tokens": 2}',
    "many stops": json.dumps({"prompt": "a", "stop": ["b"] * 9999}).encode(),
}


@pytest.mark.slow
def test_twenty_hostile_clients_have_no_effect_on_a_stream_beside_them(trained):
    def client(server):
        alone = server.stream("def ", 120, temperature=0).text()
        good = server.stream("def ", 120, temperature=0)
        for _ in range(2):  # slow bodies
            server.raw("/v1/completions", b'{"prompt', length=99)
        server.raw("/v1/completions", b'{"prompt": "a"', length=99).close()
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(b"POST /v1/comp")
        leaves = server.stream("a", 5000)
        next(iter(leaves))
        leaves.close()
        server.stream("a", 200)  # reads nothing
        statuses = {
            name: server.ask("/v1/completions", body).status for name, body in HOSTILE.items()
        }
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
            assert connection.recv(99).startswith(b"HTTP/1.1 400")
        assert server.ask("/v1/completions", method="DELETE").status == 405
        assert statuses.pop("huge") == 413
        assert statuses.pop("nul") == 200
        assert set(statuses.values()) == {400}
        assert good.text() == alone
        slow.close()
        server.close()
        server.until(lambda: server.metric("dist_lab_blocks_used") == 0)

    assert played(client, trained, "--blocks=600", "--max-queue=24")[0].returncode == 0
