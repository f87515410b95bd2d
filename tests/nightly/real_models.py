"""Real architectures of other libraries under every strategy: exact, or refused as expected.

    python tests/nightly/real_models.py [--only NAME] [--strategy S] [--table]

Each cell is one `dist_lab.verify` in float64: two ranks with different rows, gradient accumulation
over two micro-batches, three optimizer steps. It compares loss, gradients, norm, weights and
buffers. The exit status is 1 if a cell is neither exact nor refused with the expected message.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from pickle import dumps
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]  # as pytest does

import of_torchvision  # noqa: E402
import of_transformers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from models import axes_of  # noqa: E402
from others import Other  # noqa: E402

import dist_lab  # noqa: E402
from dist_lab.processes.pool import Pool  # noqa: E402
from dist_lab.processes.ranks import PRELOAD  # noqa: E402
from dist_lab.testing import SentTest  # noqa: E402
from dist_lab.testing import run as run_on_ranks  # noqa: E402

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "fsdp sync", "pp")  # sync means sync_batchnorm=True
MODELS: dict[str, Other] = of_transformers.MODELS | of_torchvision.MODELS
RANKS, MICROBATCHES, STEPS = 2, 2, 3
TIMEOUT = 240.0  # seconds that a cell may take before it counts as hung


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell: the largest error of a run, or the error message of a refusal.

    Attributes:
        surprise: what was not expected, or "".
        seconds: how long the cell took.
    """

    error: float | None = None
    line: str = ""
    surprise: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.surprise:
            return f"SURPRISE: {self.surprise}"
        return f"refused: {self.line}" if self.line else f"exact, {self.error:.0e}"


def main() -> int:
    options = arguments()
    if find_spec("transformers") is None:
        print("transformers is not installed: pip install -e '.[hf]'", file=sys.stderr)
        return 1
    outcomes: dict[tuple[str, str], Outcome] = {}
    pool = Pool(PRELOAD)
    try:
        for name in options.only or MODELS:
            for strategy in options.strategy or STRATEGIES:
                if strategy == "fsdp sync" and not MODELS[name].has_batchnorm:
                    continue
                outcome = outcomes[name, strategy] = run(pool, name, strategy)
                print(f"{name:28} {strategy:10} {outcome.seconds:5.1f} s  {outcome}", flush=True)
    finally:
        pool.close()
    if options.table:
        print(table(outcomes))
    surprises = sum(bool(outcome.surprise) for outcome in outcomes.values())
    refused = sum(bool(outcome.line) and not outcome.surprise for outcome in outcomes.values())
    exact = len(outcomes) - surprises - refused
    counts = f"{exact} exact, {refused} refused as expected, {surprises} surprises"
    print(f"{len(outcomes)} cells: {counts}")
    return 1 if surprises or not outcomes else 0


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*MODELS], metavar="NAME")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--table", action="store_true", help="print a table for RESULTS.md")
    return parser.parse_args()


def run(pool: Pool, name: str, strategy: str) -> Outcome:
    """Run one cell on its ranks, and check whether the outcome is expected."""
    started, printed = time.monotonic(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        values = {"name": name, "strategy": strategy, "folder": folder}
        test = SentTest(
            axes=None, module="real_models", path=__file__,
            name="cell", search=sys.path, filters=dumps(warnings.filters),
            values={key: dumps(value) for key, value in values.items()},
        )  # fmt: skip
        try:
            with contextlib.redirect_stdout(printed):
                run_on_ranks(pool, RANKS, test, TIMEOUT)
        except pytest.fail.Exception as failed:
            return Outcome(surprise=f"{failed}\n{printed.getvalue()}", seconds=_since(started))
        texts = {path.read_text() for path in Path(folder).iterdir()}
    if len(texts) > 1:
        return Outcome(surprise=f"ranks differ: {sorted(texts)}", seconds=_since(started))
    outcome = replace(Outcome(**json.loads(texts.pop())), seconds=_since(started))
    return judge(outcome, MODELS[name].refused.get(strategy))


def judge(outcome: Outcome, expected: str | None) -> Outcome:
    """Return the outcome with its `surprise` filled in.

    Args:
        expected: a pattern of the expected error message; None if the cell should be exact.
    """
    surprise = outcome.surprise
    if outcome.line and (expected is None or not re.search(expected, outcome.line)):
        surprise = f"refused with an unexpected message: {outcome.line}"
    elif not outcome.line and not surprise and expected is not None:
        surprise = f"exact, but expected to be refused with {expected!r}"
    if "\n" in outcome.line:
        surprise = f"refused in several lines: {outcome.line}"
    return replace(outcome, surprise=surprise)


def _since(started: float) -> float:
    return time.monotonic() - started


# --- on each rank ---------------------------------------------------------------------------------


def cell(name: str, strategy: str, folder: str) -> None:
    """Run a cell on this rank, and write the outcome to this rank's file."""
    outcome = asdict(verify(name, strategy))
    Path(folder, str(torch.distributed.get_rank())).write_text(json.dumps(outcome))


def verify(name: str, strategy: str) -> Outcome:
    """Verify a model under a strategy, whatever the expected outcome is."""
    strategy, _, sync = strategy.partition(" ")
    other = (strategy == "pp" and MODELS[name].for_pp) or MODELS[name]
    optimizer, options = other.optimizer
    extra: dict[str, Any] = {}
    if strategy == "fsdp":
        extra["units"] = other.unit_names(other.build())
    if strategy == "pp":
        extra["example_inputs"] = other.example(MICROBATCHES)
    try:
        report = dist_lab.verify(
            other.build, other.batch, dist_lab.init_mesh(**axes_of(strategy, RANKS)), strategy,
            steps=STEPS, microbatches=MICROBATCHES, optimizer=optimizer, options=options,
            loss_sum=other.loss_sum, sync_batchnorm=bool(sync), tolerance=other.tolerance, **extra,
        )  # fmt: skip
    except dist_lab.UserError as refusal:
        return Outcome(line=str(refusal))
    worst = max(c.error for c in report.comparisons if c.judged)
    return Outcome(error=worst, surprise="" if report.equal else report.sentence())


# --- for RESULTS.md -------------------------------------------------------------------------------


def table(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """Return a Markdown table: each model's largest errors, or numbers of the reasons below."""
    strategies = [s for s in STRATEGIES if any(s == strategy for _, strategy in outcomes)]
    lines = ["| model | parameters | " + " | ".join(strategies) + " |"]
    lines.append("|---|---|" + "---|" * len(strategies))
    reasons: dict[str, int] = {}
    for name in dict.fromkeys(name for name, _ in outcomes):
        cells = []
        for strategy in strategies:
            outcome = outcomes.get((name, strategy))
            if outcome is None:
                cells.append("-")
            elif outcome.surprise:
                cells.append("**wrong**")
            elif outcome.line:
                number = reasons.setdefault(outcome.line, len(reasons) + 1)
                cells.append(f"refused ({number})")
            else:
                cells.append(f"{outcome.error:.0e}")
        size = sum(p.numel() for p in MODELS[name].build().parameters())
        lines.append(f"| {name} | {size:,} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
