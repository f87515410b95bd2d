"""Chains of layouts: a checkpoint goes through many of them, and comes out as it went in.

    python tests/nightly/reshard.py [--chains 20] [--length 6] [--seed 0]

Each chain begins with a job that trains two steps and saves. Then one layout after another, drawn
at random from those of tests/helpers/saved.py, loads the last checkpoint on real ranks into a job
with other weights, and saves again. All tensors, weights and moments, must keep their bits; and
the next step in each layout must have the loss that the first one has, to 1e-12.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import evidence
import saved
import torch

from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD

OPTIMIZERS = ("adamw", "adamw", "sgd", "muon", "shampoo")


def run_chain(pool: Pool, names: list[str], model: str, optimizer: str) -> str:
    """What went wrong, or ""."""
    with tempfile.TemporaryDirectory() as root:
        lay = saved.LAYS[names[0]]
        arguments = lay, root, model, optimizer
        losses = pool.run(lay.ranks, saved.save, *arguments, timeout=120.0)[0]
        folder = Path(root, "step-00000002")
        first = Checkpoint.open(folder)
        for name in names[1:]:
            lay = saved.LAYS[name]
            arguments = lay, str(folder), model, optimizer
            outcome = pool.run(lay.ranks, saved.load, *arguments, timeout=120.0)[0]
            folder, after = Path(outcome[1]), outcome[2]
            last = Checkpoint.open(folder)
            last.verify()
            if last.names() != first.names():
                return f"{name} has other tensors"
            for tensor in first.names():
                if not torch.equal(last.read(tensor), first.read(tensor)):
                    return f"{tensor} has other bits in {name}"
            if model != "conv" and abs(after[0] / losses[0] - 1) > 1e-12:
                return f"the next loss is {after[0]} in {name}, and was {losses[0]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--length", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    evidence.add_out(parser)
    options = parser.parse_args()
    draw, pool, wrong = random.Random(options.seed), Pool([*PRELOAD, "saved"]), 0
    for number in range(1, options.chains + 1):
        optimizer = draw.choice(OPTIMIZERS)
        model = draw.choice(("gpt", "gpt-tied", "frozen")) if optimizer == "adamw" else "gpt"
        names = [name for name in saved.LAYS if optimizer in ("adamw", "sgd") or "@" not in name]
        chain = draw.sample(names, options.length)
        began = time.monotonic()
        problem = run_chain(pool, chain, model, optimizer)
        wrong += bool(problem)
        print(
            f"{number:3} of {options.chains} {time.monotonic() - began:5.1f} s  {model} "
            f"{optimizer} {' -> '.join(chain)}: {problem or 'equal'}",
            flush=True,
        )
    pool.close()
    equal = f"{options.chains - wrong} of {options.chains} chains of {options.length} equal"
    print(equal)
    evidence.note(options.out, "R14", "", f"{equal} to the bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
