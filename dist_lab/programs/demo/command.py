"""What demo.py does: three commands, each shown before it runs.

train.py        fsdp on 4 ranks  ->  runs/demo/checkpoints
serve.py        tp on 2 ranks: other ranks, other shards, the same weights
a client        POST /v1/completions, and the text as it comes
"""

import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from dist_lab.errors import MachineError, UserError, printable
from dist_lab.programs.serve.command import check_installed

START = 120  # seconds in which a server must answer
STOP = 30  # seconds in which it must end


@dataclass(frozen=True)
class Demo:
    """What the demo does.

    Args:
        launch: the folder of the programs.
        out: the run; must not exist yet.
        steps: of training.
        prompt: the text to continue.
        tokens: generate so many at most.
    """

    launch: Path
    out: Path
    steps: int
    prompt: str
    tokens: int


def demo(config: Demo) -> None:
    """Train, serve and complete.

    Raises:
        UserError: the folder exists.
        MachineError: a package is missing, a program has failed, or the server does not answer.
    """
    check_installed()  # not after minutes of training
    if config.out.exists():
        raise UserError(f"{str(config.out)!r} exists (--out); remove it, or give another folder")
    train = [
        "train.py", "--nproc", "4", "--strategy", "fsdp", "--tokenizer", "bpe:1024",
        "--steps", str(config.steps), "--save-every", str(config.steps), "--out", str(config.out),
    ]  # fmt: skip
    with program(config, train) as training:
        if status := training.wait():
            raise MachineError(f"train.py ended with status {status}; its lines above say why")
    port = free_port()
    serve = [
        "serve.py", "--checkpoint", str(config.out), "--nproc", "2", "--mesh", "tp=2",
        "--port", str(port),
    ]  # fmt: skip
    with program(config, serve) as server:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, server)
        asked = {"prompt": config.prompt, "max_tokens": config.tokens, "stop": "\n\n"}
        complete(address, asked | {"temperature": 0.5, "seed": 0, "stream": True})


@contextmanager
def program(config: Demo, words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Show a command, and run it. What still runs at the end is told to stop."""
    shown = ["python", str(config.launch / words[0]), *words[1:]]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    running = subprocess.Popen([sys.executable, *shown[1:]])
    try:
        yield running
    finally:
        if running.poll() is None:
            running.terminate()
            try:
                running.wait(STOP)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
    return port


def wait_until_healthy(address: str, server: subprocess.Popen[bytes]) -> None:
    """Raises MachineError if the server ends, or does not answer in time."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if (status := server.poll()) is not None:
            raise MachineError(f"serve.py ended with status {status}; its lines above say why")
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except OSError:  # it does not listen yet, or answers that it is loading
            time.sleep(0.1)
    raise MachineError(f"serve.py has not answered for {START} seconds at {address}")


def complete(address: str, body: dict[str, object]) -> None:
    """Ask for a completion, and show prompt and text as it comes."""
    data = json.dumps(body).encode()
    print(f"\n$ curl -N {address}/v1/completions -H 'Content-Type: application/json' \\")
    print(f"    -d {shlex.quote(data.decode())}\n")
    print(body["prompt"], end="", flush=True)
    request = Request(
        f"{address}/v1/completions", data, headers={"Content-Type": "application/json"}
    )
    try:
        with urlopen(request, timeout=START) as answer:
            for text in parts(answer):
                print(printable(text, keep="\n\t"), end="", flush=True)
    except HTTPError as error:
        raise MachineError(f"the server answers {error.code}: {error.read().decode()}") from None
    except OSError as error:
        raise MachineError(f"the server no longer answers: {error}") from None
    print("\n", flush=True)


def parts(lines: Iterable[bytes]) -> Iterator[str]:
    """The parts of a text from server-sent events. MachineError if its end does not come."""
    for line in lines:
        event = line.removeprefix(b"data: ").strip()
        if event == b"[DONE]":
            return
        if event:
            message = json.loads(event)
            if "error" in message:
                raise MachineError(f"the server has failed: {message['error']['message']}")
            yield message["choices"][0]["text"]
    raise MachineError("the server has ended in the middle of the text; its lines above say why")
