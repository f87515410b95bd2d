"""Kill ranks of real runs at random, and compare each run with the one that was never killed.

    python tests/nightly/kills.py --kills 100 [--seed 0] [--ranks 4] [--by torchrun]

Each run trains gpt tiny for 24 steps, saves every 4th, and loses 5 random ranks in random steps and
phases (forward, backward, reduce, optimizer, save). Strategies take turns. A run is equal if the
bits of every step's loss and gradient norm, and the SHA-256 of the weights and of the optimizer's
state, are those of a run without kills. Then come R2's cases: two ranks in one step, a kill while
ranks restart, and a kill of the launcher.

Prints a JSON line for each kill: seed, mode, rank, step, phase, and the seconds until the launcher
said so and until the first new step. The last line is the summary; the exit status is 1 if a run
was not equal or did not end.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import evidence

from dist_lab.checkpoint import folder as folders
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.step.fixed_order.digest import sha256

ROOT = Path(__file__).parents[2]
MODES = {
    "dp": "--strategy dp",
    "ddp": "--strategy ddp --dtype float64",  # of so many bytes that it saves in the background
    "fsdp": "--strategy fsdp",
    "tp": "--strategy tp",
    "pp": "--strategy pp --microbatches 4",
}
SMALL = "--size tiny --batch 8 --seq 16 --log-every 1 --val-every 0 --timeout 20".split()
STEPS, SAVE_EVERY, KILLS = 24, 4, 5
DATA = ROOT / "dist_lab/job.py"  # any text
SAME = ("steps", "final_loss", "final_val_loss", "parameters", "flops_per_step")
FAILED = re.compile(
    r"train\.py: .* failed first: .*restart \d+ of|Sending process|failed \(exitcode"
)
STEP = re.compile(r"step +(\d+)/")


@dataclass
class Ended:
    """A run of train.py that has ended, with the time of each line that it printed."""

    status: int
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


def command(
    mode: str, ranks: int, out: Path, *flags: object, by: str = "launcher", restarts: int = 0,
    steps: int = STEPS, save_every: int = SAVE_EVERY,
) -> list[str]:  # fmt: skip
    """The command line of a run."""
    start = [sys.executable, str(ROOT / "launch/train.py")]
    if by == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start[1:1] = [*torchrun, f"--max-restarts={restarts}"]
    else:
        start += ["--nproc", str(ranks), "--oversubscribe"]
        start += ["--restarts", str(restarts)] if restarts else []
    cache = out.parent / "cache"
    run = ["--data", DATA, "--cache", cache, "--out", out, "--steps", steps]
    run += ["--save-every", save_every]
    return [*start, *MODES[mode].split(), *SMALL, *map(str, [*run, *flags])]


def finished(
    arguments: Sequence[str], react: Callable[[str, int], None] = lambda line, pid: None
) -> Ended:
    """Run a command until it ends. `react(line, pid)` hears each line when it is printed."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )  # fmt: skip
    ended = Ended(0)
    assert process.stdout is not None

    def read(stream: IO[str]) -> None:
        for line in stream:
            ended.lines.append((time.time(), line.rstrip()))
            react(line, process.pid)

    reader = threading.Thread(target=read, args=(process.stdout,))
    reader.start()
    ended.status = process.wait()
    reader.join()
    process.stdout.close()
    return ended


def numbers(out: Path) -> dict[str, object]:
    """What a run has computed: the bits of each row, and the digest of weights and moments.

    Its summary is another's, apart from times.
    """
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    saved = Checkpoint.open(folders.steps(out / "checkpoints")[0][1])
    summary = json.loads((out / "summary.json").read_text())
    return {
        "summary": {name: summary[name] for name in SAME},
        "rows": [(r["step"], r["loss"].hex(), float(r["grad_norm"]).hex()) for r in rows],
        "saved": saved.step,
        "sha256": sha256({name: saved.read(name) for name in sorted(saved.names())}),
    }


def kills_of(out: Path, ended: Ended, **about: object) -> list[dict[str, object]]:
    """For each fault that happened, when it was noticed, and when the next step had ended."""
    kills = []
    path = out / "faults.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        happened = json.loads(line)
        kind, rank, step, phase = re.findall(
            r"(\w+):rank=(\d+)@step=(\d+),phase=(\w+)", happened["fault"]
        )[0]
        noticed = [t for t, text in ended.lines if t > happened["time"] and FAILED.search(text)]
        steps = [t for t, text in ended.lines if STEP.match(text) and noticed and t > noticed[0]]
        kills.append({
            **about, "kind": kind, "rank": int(rank), "step": int(step), "phase": phase,
            "noticed_s": round(noticed[0] - happened["time"], 3) if noticed else None,
            "recovered_s": round(steps[0] - happened["time"], 3) if steps else None,
        })  # fmt: skip
    return kills


def survives(
    mode: str, ranks: int, folder: Path, expected: dict[str, object], spec: str, **options: object
) -> tuple[str, list[dict[str, object]], Ended]:
    """One run with faults. Returns what is wrong with it, its kills, and all that it printed."""
    out = folder / "run"
    arguments = command(mode, ranks, out, "--fault", spec, restarts=30, **options)  # type: ignore[arg-type]
    ended = finished(arguments)
    return wrong(out, ended, expected), kills_of(out, ended, mode=mode, spec=spec), ended


def wrong(out: Path, ended: Ended, expected: dict[str, object]) -> str:
    """What is wrong with a run; "" if it has computed what it should."""
    if ended.status:
        return f"exit status {ended.status}"
    found = numbers(out)
    return ", ".join(f"{name} differ" for name in expected if found[name] != expected[name])


# --- cases that need another process --------------------------------------------------------------


def kill_while_restarting(mode: str, ranks: int, folder: Path, expected: dict[str, object]) -> str:
    """A rank is killed, and another as soon as the restart is announced."""
    first: set[int] = set()  # the ranks of the first attempt
    victims: list[int] = []

    def react(line: str, pid: int) -> None:
        if STEP.match(line) and not victims:
            first.update(ranks_of(pid))
        if "failed first" in line and "restart 1 of" in line:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not victims:
                victims.extend([rank for rank in ranks_of(pid) if rank not in first][:1])
            for victim in victims:
                os.kill(victim, signal.SIGKILL)

    out = folder / "run"
    spec = "kill:rank=0@step=6,phase=backward"
    ended = finished(command(mode, ranks, out, "--fault", spec, restarts=5), react)
    problem = wrong(out, ended, expected)
    return problem or ("" if "restart 2 of 5" in ended.text else "no rank was killed twice")


def kill_the_launcher(mode: str, ranks: int, folder: Path, expected: dict[str, object]) -> str:
    """The launcher is killed after step 6: its ranks must end, and the run go on by hand."""
    out, workers = folder / "run", list[int]()

    def react(line: str, pid: int) -> None:
        if (match := STEP.match(line)) and int(match[1]) == 6:
            workers.extend(ranks_of(pid))
            os.kill(pid, signal.SIGKILL)

    ended = finished(command(mode, ranks, out, restarts=5), react)
    if ended.status != -signal.SIGKILL or len(workers) < ranks:
        return f"exit status {ended.status}, {len(workers)} workers"
    deadline = time.monotonic() + 2
    while alive := [pid for pid in workers if is_running(pid)]:
        if time.monotonic() > deadline:
            return f"workers {alive} live 2 s after the launcher"
        time.sleep(0.02)
    ended = finished(command(mode, ranks, out, "--resume", "auto", restarts=5))
    return wrong(out, ended, expected)


def ranks_of(launcher: int) -> list[int]:
    """The rank processes of our launcher: the children of its forkserver."""
    return [rank for server in children(launcher) for rank in children(server)]


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the program ----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--by", choices=["launcher", "torchrun"], default="launcher")
    parser.add_argument("--modes", default=",".join(MODES))
    evidence.add_out(parser)
    known = parser.parse_args()
    modes, ranks, problems = known.modes.split(","), known.ranks, list[str]()
    cases = 0
    kills: list[dict[str, object]] = []

    def note(name: str, problem: str) -> None:
        print(json.dumps({"run": name, "equal": not problem, "problem": problem}), flush=True)
        problems.extend([f"{name}: {problem}"] * bool(problem))

    with tempfile.TemporaryDirectory() as name:
        expected = {}
        for mode in modes:
            out = Path(name, mode, "run")
            ended = finished(command(mode, ranks, out))
            assert ended.status == 0, ended.text
            expected[mode] = numbers(out)
        run = 0
        while len(kills) < known.kills:
            mode, seed = modes[run % len(modes)], known.seed + run
            spec = f"random:n={KILLS},seed={seed}"
            folder = Path(name, str(run))
            folder.mkdir()
            problem, new, ended = survives(mode, ranks, folder, expected[mode], spec, by=known.by)
            for kill in new:
                print(json.dumps({"seed": seed, **kill}), flush=True)
            kills, run = kills + new, run + 1
            note(f"{mode} {spec}", problem)
            if problem:
                print(ended.text, file=sys.stderr)
        for mode in modes if known.by == "launcher" else []:
            for case in ("two", "again", "launcher"):
                folder = Path(name, f"{mode}-{case}")
                folder.mkdir()
                if case == "two":
                    spec = f"kill:rank=0@step=7,phase=reduce;kill:rank={ranks - 1}@step=7"
                    problem, _, _ = survives(mode, ranks, folder, expected[mode], spec)
                elif case == "again":
                    problem = kill_while_restarting(mode, ranks, folder, expected[mode])
                else:
                    problem = kill_the_launcher(mode, ranks, folder, expected[mode])
                note(f"{mode} {case}", problem)
                cases += 1
    recovered = sorted(float(str(k["recovered_s"])) for k in kills if k["recovered_s"])
    median, p95 = statistics.median(recovered), recovered[int(0.95 * (len(recovered) - 1))]
    print(json.dumps({
        "kills": len(kills), "runs": run, "problems": problems,
        "recovered_median_s": median, "recovered_p95_s": p95,
    }))  # fmt: skip
    by = "" if known.by == "launcher" else "by torchrun"
    equal = "all equal to the bit" if not problems else f"{len(problems)} not equal"
    times = f"recovery median {median:.1f} s, 95% within {p95:.1f} s"
    evidence.note(known.out, "R1", by, f"{run} runs, {len(kills)} kills: {equal}; {times}")
    if cases:
        evidence.note(known.out, "R2", by, f"{cases} runs: {equal}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
