"""A toy program for tests/processes/test_launcher.py: `toy.py nproc=3 do=fail` runs fail().

The function named by `do` runs on every rank. Like a real program it imports torch only on ranks,
so that a wrong setting is refused at once.
"""

import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lab.errors import MachineError, UserError
from dist_lab.processes import launcher

if TYPE_CHECKING:
    from torch import Tensor

    from dist_lab.mesh.mesh import Mesh


@dataclass(frozen=True)
class Toy:
    do: str = "fine"
    nproc: int | None = None
    folder: Path = Path()
    timeout: float = 10.0
    threads: int | None = None
    backend: str = "gloo"
    collectives: str = "auto"
    check_collectives: bool = False
    debug: bool = False
    restarts: int = 0
    out: str = ""
    again: bool = False

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        if size == 5:
            raise UserError("batch 8 does not divide by 5 ranks; give --batch 10")
        return {"dp": size}

    def attempt(self, out: str, *, again: bool) -> "Toy":
        return replace(self, out=out, again=again)


def place(config: Toy) -> str:
    """Chooses a new folder each time that it is called: runs have to call it once."""
    return tempfile.mkdtemp(dir=config.folder, prefix="out-")


def parse(argv: Sequence[str] | None = None) -> Toy:
    settings = dict(word.split("=") for word in (sys.argv[1:] if argv is None else argv))
    if unknown := settings.keys() - Toy.__annotations__.keys():
        raise UserError(f"no setting {unknown.pop()}")
    types = {"nproc": int, "timeout": float, "folder": Path, "threads": int, "debug": bool}
    types["restarts"] = int
    return Toy(**{name: types.get(name, str)(value) for name, value in settings.items()})


def body(config: Toy, mesh: "Mesh") -> int:
    import torch

    from dist_lab.comm import ops

    assert ops.all_reduce(torch.tensor(1.0), mesh["dp"]) == mesh.size
    last = mesh.rank == mesh.size - 1
    status = DO[config.do](config, mesh, last)
    ops.all_reduce(torch.tensor(1.0), mesh["dp"])  # here the surviving ranks wait for the others
    return status or 0


def threads(config: Toy, mesh: "Mesh", last: bool) -> int:
    import torch

    return torch.get_num_threads()


def refuse(config: Toy, mesh: "Mesh", last: bool) -> None:
    raise UserError("tp=3 does not divide\n 4 heads; give tp=2")


def refuse_on_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        raise MachineError("no space left in /scratch")


def fail(config: Toy, mesh: "Mesh", last: bool) -> None:
    raise KeyError("the same everywhere")


def fail_on_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    keep_a_thread(config, mesh, last)  # it must not keep the process and its connections
    if last:
        time.sleep(0.05)  # by now the other ranks wait
        raise KeyError("only here")


def kill_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_on_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        os._exit(0)


def hang_on_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        os.dup2(os.open(config.folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        time.sleep(600)


def stop_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_gil_on_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        re.match(r"(a+)+b", 40 * "a")  # for hours


def receive_on_last(config: Toy, mesh: "Mesh", last: bool) -> None:
    import torch

    from dist_lab.comm import ops

    if last:
        ops.exchange([], [(torch.empty(4), 0)], mesh["dp"])[0].wait()


def hang_in_a_library(config: Toy, mesh: "Mesh", last: bool) -> None:
    import torch

    if last:
        time.sleep(600)
    torch.distributed.all_reduce(torch.ones(4))


def wait(config: Toy, mesh: "Mesh", last: bool) -> None:
    (config.folder / f"{mesh.rank}.tmp").write_text(str(os.getpid()))
    (config.folder / f"{mesh.rank}.tmp").rename(config.folder / f"{mesh.rank}.ready")
    for _ in range(6000):  # many short sleeps, so that a signal just before one is handled soon
        time.sleep(0.1)


def wait_stubbornly(config: Toy, mesh: "Mesh", last: bool) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait(config, mesh, last)


def keep_a_thread(config: Toy, mesh: "Mesh", last: bool) -> None:
    if last:
        threading.Thread(target=time.sleep, args=(600,)).start()


def count_to_9(config: Toy, mesh: "Mesh", last: bool) -> None:
    """Trains by counting to 9. The file `count` is its checkpoint, written after every third step.

    `plan` has a line for each attempt: the step, the rank and the way of a failure. One a step, all
    ranks add 1 to a sum that no attempt may lose or count twice.
    """
    from dist_lab.comm import ops

    folder = Path(config.out)
    with (folder / f"attempts-{mesh.rank}").open("a") as file:
        file.write(f"{config.again} {os.getpid()}\n")
    attempt = len((folder / f"attempts-{mesh.rank}").read_text().splitlines())
    plan = (config.folder / "plan").read_text().splitlines()
    failures = [line.split() for line in plan if line.split()[0] == str(attempt)]
    saved = folder / "count"
    step, total = (
        map(float, saved.read_text().split()) if config.again and saved.exists() else (0, 0)
    )
    while step < 9:
        step += 1
        for _, when, rank, way in failures:
            if step == int(when) and mesh.rank == int(rank):
                WAYS[way]()
        total += float(ops.all_reduce(tensor_of(1.0), mesh["dp"]))
        if step % 3 == 0 and mesh.rank == 0:
            (folder / "count.tmp").write_text(f"{step} {total}")
            (folder / "count.tmp").rename(saved)
    if mesh.rank == 0:
        (config.folder / "result").write_text(f"{attempt} {total}")


def tensor_of(number: float) -> "Tensor":
    import torch

    return torch.tensor(number)


def raise_key_error() -> None:
    raise KeyError("a defect")


def refuse_to_go_on() -> None:
    raise MachineError("no space left in /scratch")


WAYS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(3),
    "exc": raise_key_error,
    "refuse": refuse_to_go_on,
}

DO: dict[str, Callable[[Toy, "Mesh", bool], int | None]] = {
    "fine": lambda config, mesh, last: None,
    "status": lambda config, mesh, last: 7 if last else 0,
    "threads": threads,
    "refuse": refuse,
    "refuse on last": refuse_on_last,
    "fail": fail,
    "fail on last": fail_on_last,
    "kill last": kill_last,
    "leave on last": leave_on_last,
    "hang on last": hang_on_last,
    "hang in a library": hang_in_a_library,
    "stop last": stop_last,
    "hold the gil on last": hold_the_gil_on_last,
    "receive on last": receive_on_last,
    "wait": wait,
    "wait stubbornly": wait_stubbornly,
    "keep a thread": keep_a_thread,
    "count to 9": count_to_9,
}


if __name__ == "__main__":
    sys.exit(launcher.main("toy.py", parse, "toy:body", place=place))
