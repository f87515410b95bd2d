"""Runs exhibits: with and without the mistake, and each cheaper check that might have found it.

Everything that the museum says about a bug is measured here. The ranks come from a warm pool, as
those of the matrix do.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from dist_lab.observe import export, run_dir
from dist_lab.observe.console import watched
from dist_lab.processes.pool import Pool, RanksFailed
from dist_lab.processes.ranks import PRELOAD
from dist_lab.programs.verify.museum import table
from dist_lab.programs.verify.museum import trial as on_rank
from dist_lab.programs.verify.museum.exhibit import Exhibit
from dist_lab.programs.verify.museum.result import CHECKS, Check, Result
from dist_lab.programs.verify.museum.rooms import EXHIBITS, exhibit_named, room_of
from dist_lab.programs.verify.museum.trial import Outcome, Trial

LOSS = 1e-3  # relative: a log shows four digits
WEIGHTS = 1e-4  # relative: the tolerance of verify in float32
Run = Callable[[Trial], Outcome]


def museum(out: str) -> int:
    """Run all exhibits, and print a line for each. Returns status 0 if all behave as they say.

    Args:
        out: the folder for museum.json and museum.md; "" writes no files.
    """
    folder = run_dir.make_folder(out, "museum.json") if out else None
    started = time.monotonic()
    with ranks() as run:
        results = []
        exhibits = watched([*EXHIBITS.values()], "exhibits", lines=False)
        for number, exhibit in enumerate(exhibits, 1):
            results.append(result_of(exhibit, run))
            print(f"{number:3} of {len(EXHIBITS)}  {table.line(results[-1])}", flush=True)
    seconds = time.monotonic() - started
    print(f"\n{table.sentence(results)}; {seconds / 60:.1f} minutes")
    if folder is not None:
        everything = {"sentence": table.sentence(results), "seconds": seconds}
        export.write_json(
            folder / "museum.json", everything | {"exhibits": [as_json(r) for r in results]}
        )
        (folder / "museum.md").write_text(table.page(results), encoding="utf-8")
    return 0 if all(result.as_told for result in results) else 1


def show(name: str, out: str) -> int:
    """Run one exhibit, and print its page; `list` prints the names of all."""
    if name == "list":
        print(table.names(), end="")
        return 0
    exhibit = exhibit_named(name)
    folder = run_dir.make_folder(out, "museum.json") if out else None
    print(table.introduction(exhibit), flush=True)
    with ranks() as run:
        result = result_of(exhibit, run)
    print(table.measured(result))
    if folder is not None:
        export.write_json(folder / "museum.json", {"exhibits": [as_json(result)]})
    return 0 if result.as_told else 1


def result_of(exhibit: Exhibit, run: Run) -> Result:
    """Measure an exhibit: without its mistake, with it, and by each cheaper check."""
    started, main = time.monotonic(), main_trial(exhibit)
    right, wrong = run(replace(main, mistaken=False)), run(main)
    checks = () if exhibit.escapes else tuple(checked(exhibit, main, wrong, run))
    seconds = round(time.monotonic() - started, 1)
    return Result(
        exhibit.name, room_of(exhibit.name), right, wrong, checks, exhibit.escapes, seconds,
        exhibit.is_reached,
    )  # fmt: skip


def main_trial(exhibit: Exhibit) -> Trial:
    return Trial(exhibit.name, exhibit.cell, optimizer=exhibit.optimizer)


def checked(exhibit: Exhibit, main: Trial, wrong: Outcome, run: Run) -> Iterator[Check]:
    """Each cheaper check, run for real, in the order of CHECKS."""
    cell = exhibit.cell
    loss, weights, one, same, fewer = CHECKS
    if not wrong.losses:  # refused: there is nothing to look at
        yield from (Check(loss, None), Check(weights, None))
    else:
        yield Check(loss, not max(wrong.losses) <= LOSS)
        if main.optimizer == "adamw":
            yield Check(weights, is_off(wrong))
        else:
            yield check(weights, replace(main, optimizer="adamw"), run, is_off)
    if cell.microbatches > 1:
        yield check(one, replace(main, cell=replace(cell, microbatches=1)), run)
    else:
        yield Check(one, None)
    if cell.data_ranks > 1:
        yield check(same, replace(main, same_rows=True), run)
    else:
        yield Check(same, None)
    if exhibit.smaller:
        schedule = cell.schedule if "pp" in exhibit.smaller else ""
        small = replace(cell, mix=exhibit.smaller, schedule=schedule)
        if "tp" not in small.axes:
            small = replace(small, options=tuple(o for o in small.options if o != "sp"))
        yield check(fewer, replace(main, cell=small), run)
    else:
        yield Check(fewer, None)


def is_off(outcome: Outcome) -> bool:
    return not outcome.weights <= WEIGHTS


def sees(outcome: Outcome) -> bool:
    return outcome.verdict in ("not equal", "refused")


def check(name: str, trial: Trial, run: Run, judge: Callable[[Outcome], bool] = sees) -> Check:
    """Run a cheaper trial without the mistake, and with it.

    It applies only if it is equal without the mistake: one that is refused in any case, such as a
    schedule with one micro-batch, has not seen the mistake. A crash is no way to see it either.
    """
    for mistaken in (False, True):
        outcome = run(replace(trial, mistaken=mistaken))
        if outcome.verdict == "failed":
            return Check(name, None, outcome.sentence)
        if not mistaken and outcome.verdict != "equal":
            return Check(name, None)
    return Check(name, judge(outcome))


@contextlib.contextmanager
def ranks() -> Iterator[Run]:
    """Yields a function that runs a trial on warm ranks."""
    pool = Pool([*PRELOAD, on_rank.__name__])

    def run(trial: Trial) -> Outcome:
        printed = io.StringIO()  # a mistake may make torch print warnings
        timeout = 60.0 + 10.0 * trial.cell.ranks
        try:
            with contextlib.redirect_stdout(printed):
                outcomes = pool.run(trial.cell.ranks, on_rank.run, trial, timeout=timeout)
        except RanksFailed as failed:
            return Outcome("failed", str(failed))
        outcome: Outcome = outcomes[0]
        return outcome

    try:
        yield run
    finally:
        complaints = pool.close()
    assert not complaints, complaints


def as_json(result: Result) -> dict[str, Any]:
    """A result as JSON data, which has no infinity: such an error is null."""
    return json.loads(json.dumps(asdict(result)), parse_constant=lambda _: None) | {
        "verdict": result.verdict
    }
