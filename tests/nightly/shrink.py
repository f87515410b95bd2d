"""Two machines train under torchrun, one is lost, and the run goes on with the other's ranks.

    python tests/nightly/shrink.py

Two torchruns on this machine stand for two machines: --nnodes=1:2, with two ranks each. After step
5 that one is killed, with its ranks, that does not have rank 0. The other must go on with two ranks
after the newest checkpoint, in the folder that rank 0 chose before, with the same global batch:
losses as in a run of one process. Prints a JSON line; the exit status is 1 if that is not so.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evidence
import kills

STEPS = 20
TRAIN = (
    "--size tiny --seq 16 --log-every 1 --val-every 0 --timeout 20 --dtype float64 --save-every 3 "
    f"--steps {STEPS}"
).split()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    evidence.add_out(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = [str(kills.ROOT / "launch/train.py"), *TRAIN, "--data", str(kills.DATA)]
        train += ["--cache", str(folder / "cache")]
        alone = kills.finished([sys.executable, *train, "--out", str(folder / "alone")])
        assert alone.status == 0, alone.text
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        machines = [start(folder, number, port, train) for number in range(2)]
        deadline = time.monotonic() + 300
        while not any("step     5/" in text(folder, n) for n in range(2)):
            assert time.monotonic() < deadline, text(folder, 0) + text(folder, 1)
            time.sleep(0.05)
        first = int("step     5/" in text(folder, 1))  # the machine with rank 0
        lost = machines[1 - first]
        for pid in [*kills.children(lost.pid), lost.pid]:
            os.kill(pid, signal.SIGKILL)
        lost.wait()
        try:
            status = machines[first].wait(300)
        except subprocess.TimeoutExpired:
            status = -1
            for pid in [*kills.children(machines[first].pid), machines[first].pid]:
                os.kill(pid, signal.SIGKILL)
        (out,) = (folder / "runs").iterdir()
        found, expected = losses(out), losses(folder / "alone")
        worst = max((abs(found[s] - expected[s]) for s in expected if s in found), default=1.0)
        about = {
            "status": status,
            "steps": sorted(found) == sorted(expected),
            "largest difference": worst,
            "ranks": json.loads((out / "summary.json").read_text())["world_size"],
        }
        print(json.dumps(about))
        is_right = not status and about["steps"] and worst < 1e-9 and about["ranks"] == 2
        if not is_right:
            print(text(folder, first)[-4000:], file=sys.stderr)
        same = f"largest difference of a loss {worst:.0e}" if is_right else "the run went wrong"
        evidence.note(given.out, "shrink", "", same)
        return int(not is_right)


def start(folder: Path, number: int, port: int, train: list[str]) -> "subprocess.Popen[bytes]":
    by = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3"]
    by += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=shrink"]
    by += ["--rdzv-conf=last_call_timeout=5,join_timeout=120", "--local-addr=127.0.0.1"]
    with (folder / f"machine-{number}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *by, *train, "--strategy", "ddp"],
            cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(kills.ROOT), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def text(folder: Path, number: int) -> str:
    return (folder / f"machine-{number}").read_text()


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


if __name__ == "__main__":
    sys.exit(main())
