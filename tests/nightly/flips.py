"""Flip single bits of a checkpoint, and count those that are found before a tensor is used:

    python tests/nightly/flips.py --count 2000

Every flip must be found, and its one line must name the file and both hashes. Writes a line of
JSON. The exit status is 1 if a flip was missed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import evidence
from damage import flips_not_found

import dist_lab


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    evidence.add_out(parser)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        missed = flips_not_found(small_checkpoint(Path(folder)), given.count, given.seed)
    seconds = time.perf_counter() - start
    row = {"flips": given.count, "found": given.count - len(missed), "seed": given.seed}
    print(json.dumps(row | {"seconds": round(seconds, 1), "missed": missed[:10]}))
    evidence.note(given.out, "R7", "", f"{row['found']:,} of {given.count:,} found")
    return bool(missed)


def small_checkpoint(folder: Path) -> Path:
    """A checkpoint of a small model and its optimizer."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8))
    job = dist_lab.parallelize(model, dist_lab.init_mesh(), "single")
    optimizer = job.optimizer(torch.optim.AdamW)
    job.model(torch.ones(4, 16)).sum().backward()
    job.finish()
    optimizer.step()
    job.after_step()
    return job.save(folder, optimizer, step=1)


if __name__ == "__main__":
    sys.exit(main())
