"""What the scripts of this folder have measured about checkpoints, kills and hangs, as a table.

    python tests/nightly/flips.py --count 2000 --out tests/nightly/evidence.jsonl
    python tests/nightly/evidence.py                  the table, into dist_lab/RESULTS.md

A script appends a line of JSON for each of its goals: what it measured, when, and by which command.
The table has the newest line of each, and the goals that tests hold. A goal that nobody has
measured says so. No number is written by hand.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE, RESULTS = Path(__file__).with_suffix(".jsonl"), ROOT / "dist_lab/RESULTS.md"
BEGIN, END = "<!-- evidence: begin -->\n", "<!-- evidence: end -->\n"
GOALS: Mapping[str, str] = {
    "R1": "random kills in dp, ddp, fsdp, tp and pp, of any rank in any phase",
    "R2": "two ranks killed in one step, a kill while ranks restart, a kill of the launcher",
    "R3": "torchrun restarts again and again",
    "R4": "from a kill to the first new step",
    "R5": "a save that stops after any file operation leaves the old checkpoint or the new",
    "R7": "single flipped bits of a checkpoint",
    "R8": "mismatched collectives",
    "R9": "`--check-collectives`: a step beside one without",
    "R10": "hung ranks",
    "R11": "every process group has the time limit of the mesh",
    "R12": "a full or read-only disk: one line, and the older checkpoint is whole",
    "R13": "a NaN or infinity on one rank stops all ranks in that step, with its name",
    "R14": "chains of layouts: adamw, sgd, muon, shampoo",
    "R15": "samples of runs that are killed and go on with other ranks",
    "R16": "a rank that is slow for 20 steps, after 200 normal steps",
    "R17": "the same command and seed: the same bits",
    "R18": "signals: no rank lives longer than its launcher",
    "R20": "no rank listens off loopback",
    "R21": "mutated manifests and tables: one line, or no tensor changes",
    "R23": "after kills each step is once in metrics.jsonl and in TensorBoard",
    "layouts": "27 layouts load each other: weights and moments to the bit, the next loss to 1e-12",
    "save": "a save beside plain safetensors files with fsync",
    "background": "a step after which a save in the background begins, beside a step without",
    "shrink": "one of two machines is lost under torchrun, and the other goes on",
}  # fmt: skip
IN_TESTS: Mapping[str, str] = {
    "R5": "tests/checkpoint/test_save.py",
    "R11": "tests/mesh/test_time_limits.py",
    "R12": "tests/checkpoint/test_save.py",
    "R13": "tests/faults/test_inject.py",
    "R17": "tests/programs/train/test_kills.py",
    "R18": "tests/processes/test_launcher.py",
    "R20": "tests/processes/test_sockets.py",
    "R21": "tests/checkpoint/test_security.py",
    "R23": "tests/programs/train/test_kills.py",
    "layouts": "tests/checkpoint/test_layouts.py",
}


def add_out(parser: argparse.ArgumentParser) -> None:
    """Give a script the flag that `note` wants."""
    parser.add_argument("--out", type=Path, help="append the results to this file of JSON lines")


def note(out: Path | None, goal: str, about: str, measured: str) -> None:
    """Append a line to the file, if there is one.

    Args:
        goal: a key of GOALS.
        about: which of several measurements for this goal; "" if there is one.
        measured: the result, in words.
    """
    line = {"goal": goal, "about": about, "measured": measured, "command": command()}
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(line | {"date": str(date.today())}) + "\n")


def command() -> str:
    """The command line of this process, without --out."""
    words = list(sys.argv[1:])
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    size = os.environ.get("WORLD_SIZE")
    by = f"torchrun --nproc_per_node={size}" if size else "python"
    return " ".join([by, f"tests/nightly/{Path(sys.argv[0]).name}", *words])


def table(lines: Iterable[str]) -> str:
    """The table of these lines of JSON, in the order of GOALS."""
    newest: dict[tuple[str, str], Mapping[str, str]] = {}
    for line in lines:
        row = json.loads(line)
        newest[row["goal"], row["about"]] = row
    rows = ["| | result | command |", "|---|---|---|"]
    for goal, what in GOALS.items():
        measured = [row for (key, _), row in newest.items() if key == goal]
        for row in measured:
            about = f" ({row['about']})" if row["about"] else ""
            rows.append(f"| {what}{about} | {row['measured']} | `{row['command']}` |")
        if goal in IN_TESTS:
            tests = f'pytest -m "slow or not slow" {IN_TESTS[goal]}'
            rows.append(f"| {what} | held by tests | `{tests}` |")
        elif not measured:
            rows.append(f"| {what} | not measured | |")
    return "\n".join(rows) + "\n"


def with_table(text: str, lines: Iterable[str]) -> str:
    """The text of RESULTS.md with this table in the place of the old one."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(lines)}{END}{after}"


if __name__ == "__main__":
    RESULTS.write_text(with_table(RESULTS.read_text(), FILE.read_text().splitlines()))
