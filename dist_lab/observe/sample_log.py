"""The samples that each rank trained on, logged on request, and a proof that none was lost.

    RUN/samples-rank0.jsonl    {"step": 12, "data_rank": 0, "data_ranks": 2, "samples": 1000,
                                "ids": [417, 12, ...]}

Each rank writes a line after each step, in one file per rank. `prove(RUN)` reads all of them. They
prove that every sample occurred exactly once per epoch, over the whole run, also if the run was
killed, resumed, or continued on another number of ranks.

A step is logged after it is taken, and before it can be saved. A resumed run takes the steps after
its checkpoint again. So it first removes their lines: see [Note: each step once] in sinks.py.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lab.data import Data
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe.sinks import Sink, drop_rows

STEM = "samples-rank"
FILES = f"{STEM}*.jsonl"  # a glob
Line = Mapping[str, Any]


class SampleLog(Sink):
    """Writes this rank's file. A line is written in one piece.

    Args:
        rows: the rows of the global batch that this rank trains on.
        first: the steps that were taken before. Lines of later steps are removed, also those of
            ranks that there are no more.
    """

    def __init__(self, folder: Path, mesh: Mesh, data: Data, rows: slice, first: int) -> None:
        assert data.sample_ids is not None, "refuse_unnumbered was not called"
        self._ids, self._rows = data.sample_ids, rows
        self._same = {
            "data_rank": mesh.data.index, "data_ranks": mesh.data.size, "samples": data.samples,
        }  # fmt: skip
        with _as_machine_error(folder):
            folder.mkdir(parents=True, exist_ok=True)  # on another machine
            for path in folder.glob(FILES):
                if int(path.stem.removeprefix(STEM)) % mesh.size == mesh.rank:
                    drop_rows(path, first)
            self._file = (folder / f"{STEM}{mesh.rank}.jsonl").open("ab", buffering=0)

    def tick(self, step: int) -> None:
        ids = [int(number) for number in self._ids(step - 1, self._rows)]
        line = {"step": step, **self._same, "ids": ids}
        with _as_machine_error(self._file.name):
            self._file.write(json.dumps(line).encode() + b"\n")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self._file.close()


def refuse_unnumbered(data: Data) -> None:
    """Raise UserError if the samples of this data have no numbers to log."""
    if data.sample_ids is None:
        raise UserError(
            f"data {data.name!r} does not number its samples (--log-samples); give it a method "
            "sample_ids(step, rows) and samples, their number per epoch, or leave --log-samples out"
        )


# --- the proof ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What the logs of a run prove: all of its steps, each sample once in each of its epochs."""

    steps: range
    samples: int | None  # per epoch; None: there are no epochs, and no sample occurred twice
    whole_epochs: int
    read: int  # samples, over all ranks and steps

    def __str__(self) -> str:
        steps = f"steps {self.steps.start} to {self.steps.stop - 1}"
        if self.samples is None:
            return f"{steps}: {self.read} samples, none of them twice"
        return (
            f"{steps}: {self.read} samples, each of {self.samples} exactly once in "
            f"{self.whole_epochs} whole epochs, and at most once in those begun"
        )


def prove(folder: Path | str) -> Proof:
    """Read the logs of all ranks, and prove that each sample occurred once per epoch.

    Raises:
        UserError: there are no logs, or they are not of one run.
        MachineError: the first step or sample that is missing, or occurred twice.
    """
    batches = dict(sorted(_global_batches(Path(folder)).items()))
    steps = range(min(batches), max(batches) + 1)
    if missing := [step for step in steps if step not in batches]:
        raise MachineError(f"step {missing[0]} is in no log of {str(folder)!r}")
    sizes = {(samples, len(ids)) for samples, ids in batches.values()}
    if len(sizes) > 1:
        raise UserError(f"{str(folder)!r} has logs of several runs: samples, batch are {sizes}")
    ((samples, batch),) = sizes
    numbered = ((step, n) for step, (_, ids) in batches.items() for n in ids)
    first = (steps.start - 1) * batch
    whole = _check_epochs(numbered, samples, first)
    return Proof(steps, samples, whole, len(steps) * batch)


def _global_batches(folder: Path) -> dict[int, tuple[int | None, list[int]]]:
    """Returns step -> samples per epoch, and the ids of the global batch in the order of its rows.

    Raises MachineError if a rank has a step twice, ranks differ, or a data rank has not logged.
    """
    paths = sorted(folder.glob(FILES))
    if not paths:
        raise UserError(f"{str(folder)!r} has no {FILES}; train with --log-samples")
    parts: dict[int, dict[int, tuple[Line, Path]]] = {}
    for path in paths:
        last = 0
        for line in _lines(path):
            step, data_rank = line["step"], line["data_rank"]
            if step <= last:
                raise MachineError(f"step {step} follows step {last} in {str(path)!r}")
            last = step
            other, where = parts.setdefault(step, {}).setdefault(data_rank, (line, path))
            if other != line:
                both = f"{path.name} and {where.name}"
                raise MachineError(f"step {step} has other samples for one data rank in {both}")
    batches = {}
    for step, of_rank in parts.items():
        lines = [line for _, (line, _) in sorted(of_rank.items())]
        ranks = lines[0]["data_ranks"]
        if sorted(of_rank) != list(range(ranks)) or any(x["data_ranks"] != ranks for x in lines):
            found = f"logs of data ranks {sorted(of_rank)}, not of all {ranks}"
            raise MachineError(f"step {step} has {found}, in {str(folder)!r}")
        batches[step] = lines[0]["samples"], [number for line in lines for number in line["ids"]]
    return batches


def _check_epochs(numbered: Iterable[tuple[int, int]], samples: int | None, position: int) -> int:
    """Raise MachineError for the first sample that occurs twice in an epoch, or in none.

    Args:
        numbered: (step, sample) of the whole run, in order.
        position: that of the first sample in the endless stream, which is 0 for step 1.

    Returns:
        The number of whole epochs. An epoch is whole if its first and last samples are there.
    """
    seen: dict[int, int] = {}  # sample -> step, of the running epoch
    every: set[int] | None = None  # the samples of the first whole epoch
    whole, from_start = 0, samples is None or position % samples == 0
    for step, number in numbered:
        epoch = None if samples is None else position // samples
        if number in seen:
            where = ", and its data has no epochs" if epoch is None else f" of epoch {epoch}"
            twice = f"occurs twice, in steps {seen[number]} and {step}{where}"
            raise MachineError(f"sample {number} {twice}")
        seen[number] = step
        position += 1
        if samples is not None and position % samples == 0:
            if from_start:
                every, whole = every or set(seen), whole + 1
                if odd := every ^ set(seen):
                    raise MachineError(f"sample {min(odd)} is not in every epoch, see {epoch}")
            seen, from_start = {}, True
    return whole


def _lines(path: Path) -> Iterator[Line]:
    with _as_machine_error(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                raise MachineError(f"{str(path)!r}:{number} is not a whole line") from None


@contextmanager
def _as_machine_error(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"cannot read or write {str(path)!r}: {error.strerror}") from error
