"""demo.py trains, serves and completes, and tells early what is wrong."""

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from programs import ROOT, refusal

from dist_lab.errors import MachineError
from dist_lab.programs.demo.command import Demo, complete, parts, program, wait_until_healthy


def test_bad_input_is_one_line(tmp_path):
    assert f"'{tmp_path}' exists (--out); remove it" in refusal("demo.py", "--out", tmp_path)
    assert "--steps: invalid positive value: '0'" in refusal("demo.py", "--steps", "0")
    assert "--tokens: invalid positive value: 'x'" in refusal("demo.py", "--tokens", "x")
    assert "unrecognized arguments: --nproc" in refusal("demo.py", "--nproc=3")


def test_a_program_that_fails_ends_the_demo_with_its_status(tmp_path, capfd):
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    config = Demo(tmp_path, tmp_path / "run", steps=1, prompt="def ", tokens=1)
    with program(config, ["train.py"]) as ended, pytest.raises(MachineError, match="status 3"):
        wait_until_healthy("http://127.0.0.1:9", ended)
    assert f"$ python {tmp_path}/train.py" in capfd.readouterr().out


def test_a_program_that_still_runs_is_told_to_stop(tmp_path, capfd):
    (tmp_path / "serve.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('stopped')))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    config = Demo(tmp_path, tmp_path / "run", steps=1, prompt="def ", tokens=1)
    with program(config, ["serve.py"]) as server:
        while "up" not in capfd.readouterr().out:
            assert server.poll() is None
    assert capfd.readouterr().out == "stopped\n"
    assert server.returncode == 0


@pytest.fixture
def a_server_that_refuses():
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(400, "no")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_refusal_of_the_server_is_one_error(a_server_that_refuses, capsys):
    with pytest.raises(MachineError, match="the server answers 400"):
        complete(a_server_that_refuses, {"prompt": "def ", "stream": True})


@pytest.mark.parametrize(
    ("lines", "why"),
    [([b'data: {"choices": [{"text": "a"}]}', b""], "ended in the middle"),
     ([b'data: {"error": {"message": "a rank died"}}'], "has failed: a rank died")],
)  # fmt: skip
def test_a_text_without_an_end_is_an_error(lines, why):
    with pytest.raises(MachineError, match=why):
        list(parts(lines))
    with pytest.raises(MachineError, match="no longer answers"):
        complete("http://127.0.0.1:9", {"prompt": "def "})


@pytest.mark.slow
def test_the_demo_trains_serves_and_completes(tmp_path):
    done = subprocess.run(
        [sys.executable, "launch/demo.py", "--steps=4", "--tokens=8", f"--out={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [command.split()[2].split("/")[-1] for command in commands[:2]] == [
        "train.py",
        "serve.py",
    ]
    assert "bpe:1024" in done.stdout
    assert done.stdout.rindex("def ") > done.stdout.index("$ curl")
