"""Runs that are killed and go on with other ranks: does each sample occur once per epoch?

    python tests/nightly/samples.py [--runs 20]

Each run is a random chain of six parts, each on 1 to 4 ranks and under a random strategy. Half of
the parts end by a fault after their last checkpoint. All parts log their samples in one folder, and
in the end these logs must prove that every sample occurred exactly once per epoch.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import evidence
from programs import run

from dist_lab.observe.sample_log import prove

PARTS = 6
SIZE = "--layers 1 --batch 12 --seq 32 --val-every 0 --log-samples --save-every 3 --resume auto"
STRATEGIES = ("dp", "ddp", "zero1", "zero2", "fsdp")


def train_in_parts(draw: random.Random, folder: Path) -> list[str]:
    """Train a random chain of parts, in folder/run. Returns a name for each part."""
    text = folder / "text.txt"  # an epoch is 50 to 120 windows, so it ends in any step
    text.write_text(draw.randbytes(draw.randrange(900, 2100)).hex())
    files = ["--data", text, "--cache", folder / "cache", "--out", folder / "run"]
    names, faults, step = [], list[str](), 0
    for _ in range(PARTS):
        ranks, step = draw.randint(1, 4), step + draw.randint(1, 9)
        strategy = draw.choice(STRATEGIES) if ranks > 1 else "single"
        layout = f"--strategy {strategy}" + (f" --nproc {ranks}" if ranks > 1 else "")
        fails = ranks > 1 and draw.random() < 0.5
        if fails:  # faults that have happened stay in the list: a run counts them
            faults.append(f"exit:rank={draw.randrange(ranks)}@step={step}")
        fault = ["--fault", ";".join(faults)] if fails else []
        done = run("train.py", *f"{SIZE} {layout} --steps {step}".split(), *files, *fault)
        if (done.returncode != 0) != fails:
            raise SystemExit(f"{names}, then {layout} to step {step}, {fault}: {done.stderr}")
        names.append(f"{strategy}@{ranks} to {step}" + ("!" if fails else ""))
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    evidence.add_out(parser)
    known = parser.parse_args()
    runs = known.runs
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            names = train_in_parts(random.Random(seed), Path(folder))
            print(f"seed {seed}: {', '.join(names)}: {prove(Path(folder) / 'run')}", flush=True)
    proved = f"{runs} runs: each sample once per epoch in all of them"
    print(proved)
    evidence.note(known.out, "R15", "", proved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
