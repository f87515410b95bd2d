"""What training in 8 and 4 bits costs in loss: `python tests/nightly/recipes.py [--steps 200]`

Trains gpt tiny on the source of Python's standard library with each recipe, on 4 ranks of fsdp,
and prints a table: the validation loss at the last step, the bytes that a rank sends in a step, and
the time of a step. All else is equal. The products are emulated, so the time is no forecast: it is
what rounding costs here. Seven runs of 200 steps take about 7 minutes on 2 quiet cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = (None, "fp8", "fp8-pow2", "fp8-block", "mxfp8", "mxfp4", "nvfp4")


def summary_of(recipe: str | None, flags: list[str], out: Path) -> dict[str, float]:
    command = ["launch/train.py", "--nproc", "4", "--strategy", "fsdp", "--out", str(out), *flags]
    command += [] if recipe is None else ["--recipe", recipe]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((out / "summary.json").read_text())
    return {"loss": summary["final_val_loss"], **summary["median"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    known, flags = parser.parse_known_args()
    flags += ["--steps", str(known.steps), "--val-every", "0"]
    print("| recipe | validation loss | MB sent a step | ms a step |")
    print("|---|---|---|---|", flush=True)
    for recipe in RECIPES:
        for seed in range(known.seeds):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                found = summary_of(recipe, [*flags, "--seed", str(seed)], out)
            sent = found["comm_sent_bytes"] / 1e6
            print(
                f"| {recipe or 'none'} | {found['loss']:.4f} | {sent:.2f} "
                f"| {found['step_ms']:.0f} |", flush=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
