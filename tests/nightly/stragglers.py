"""Slow ranks: are they named in time, and is nobody named in 200 normal steps?

    python tests/nightly/stragglers.py [--runs 20]

Each run trains 200 normal steps on 4 ranks, and then a random rank takes twice as long for 20
steps. Prints a line for each run: after how many steps the rank was named, and false alarms. The
exit status is 1 if a rank was named after more than 10 steps, or not at all, or if there was a
false alarm. On a machine that is busy with other work a rank may really be slow: run it alone.
"""

import argparse
import os
import random
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import evidence
from programs import run

NORMAL = 200
LAYOUTS = (
    "--strategy dp", "--strategy ddp", "--strategy zero2", "--strategy fsdp", "--strategy tp",
    "--mesh pp=2,dp=2", "--mesh dp=2,tp=2",
)  # fmt: skip
SIZE = "--nproc 4 --layers 2 --batch 16 --seq 32 --val-every 0 --log-every 100"
NOTICE = re.compile(r"^step (\d+): rank (\d+) is slow since step (\d+)", re.MULTILINE)


def train(layout: str, rank: int, step: int, seed: int, folder: Path) -> list[tuple[int, int]]:
    """Train, with a rank that is slow from a step on. Returns (step, rank) of each notice."""
    words = f"{layout} {SIZE} --steps {step + 25} --seed {seed}"
    done = run(
        "train.py", *words.split(), "--fault", f"slow:rank={rank}@step={step}", "--out", folder
    )
    if done.returncode:
        raise SystemExit(f"{layout}: {done.stderr}")
    return [(int(step), int(rank)) for step, rank, _ in NOTICE.findall(done.stdout)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    evidence.add_out(parser)
    known = parser.parse_args()
    late, alarms, runs = 0, 0, known.runs
    for seed in range(runs):
        draw, layout = random.Random(seed), LAYOUTS[seed % len(LAYOUTS)]
        rank, step = draw.randrange(4), NORMAL + 3 + draw.randrange(5)  # 2 steps are warm-up
        with tempfile.TemporaryDirectory() as folder:
            notices = train(layout, rank, step, seed, Path(folder) / "run")
        named = [at - step for at, who in notices if who == rank and at >= step]
        false = [(at, who) for at, who in notices if who != rank or at < step]
        late += not named or named[0] > 10
        alarms += len(false)
        after = f"named after {named[0]} steps" if named else "not named"
        load = os.getloadavg()[0]
        print(
            f"{layout:20} rank {rank} at step {step}: {after}; false {false}; load {load:.1f}",
            flush=True,
        )
    counted = f"{runs} runs: {late} not named within 10 steps, {alarms} false alarms"
    print(counted)
    evidence.note(known.out, "R16", "", counted)
    return int(late + alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
