"""Run the alternating rounds, on every rank. Read `measure` first; it calls the rest.

All strategies live side by side in the same processes. Each has its own model, optimizer and
batches, all from the same seed. So they compute the same steps, and differ only in communication
and memory. In each round every strategy runs a few steps, in an order that ratios.py makes fair.
"""

import gc
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.comm.context import CommContext
from dist_lab.comm.ledger import Call
from dist_lab.data import Data, prefetch
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh, init_mesh
from dist_lab.observe import run_dir, sockets
from dist_lab.observe.console import Progress
from dist_lab.programs.cli import setup
from dist_lab.programs.cli.config import Config
from dist_lab.programs.compare import files, tables
from dist_lab.programs.compare.entries import ListedStrategy
from dist_lab.programs.compare.ratios import fewest_rounds, orders
from dist_lab.programs.compare.report import (
    CompareReport,
    ContenderRow,
    by_collective,
    mean_of_ranks,
)
from dist_lab.programs.compare.rounds import barrier, block
from dist_lab.programs.compare.settings import Settings
from dist_lab.programs.train.loop import make_optimizer, own_rows, take_step
from dist_lab.programs.train.meter import Meter, peak_rate

WARM_UP = 4  # steps: two to measure memory and FLOPs, one to settle, one to count bytes


def run(config: Settings, mesh: Mesh) -> int:
    """Compare the strategies, print the tables and write the files that README describes."""
    requested, config = config, config.fitted(mesh.size)
    names = ("batch", "layers")
    changed = [n for n in names if getattr(config, n) != getattr(requested, n)]
    chosen = [f"{name} {getattr(config, name)}" for name in changed]
    if chosen and mesh.rank == 0:
        print(f"{' and '.join(chosen)}, so that every strategy runs", flush=True)
    with ExitStack() as cleanup:
        data = setup.open_run(config, mesh)
        with together(mesh.world):
            if mesh.rank == 0:
                folder = cleanup.enter_context(run_dir.claimed(config, "compare"))
        # Ctrl-C leaves the rounds that were measured until then.
        keep = partial(files.keep, folder) if mesh.rank == 0 else None
        report = measure(config, mesh, data, config.entries(), keep=keep)
        if report is not None:
            files.write(report, folder)
            tables.show(report, folder)
    return 0


def measure(
    config: Settings, mesh: Mesh, data: Data, entries: Sequence[ListedStrategy],
    *, keep: Callable[[CompareReport], None] | None = None,
) -> CompareReport | None:  # fmt: skip
    """Run all entries that can run in alternating rounds. Collective; rank 0 gets the report.

    Args:
        keep: called on rank 0 with the report so far, now and then between two rounds.

    Raises:
        UserError: none of the entries can run, or the reference cannot.
    """
    with ExitStack() as cleanup:
        progress = Progress("rounds", config.rounds, quiet=mesh.rank > 0, auto_refresh=False)
        cleanup.callback(progress.close)
        running: list[Contender] = []
        refused: dict[str, str] = {}
        for entry in entries:
            progress.say(f"warm-up of {entry.label}")
            try:
                running.append(warmed_up(Contender(entry, config, mesh), data, cleanup))
            except UserError as error:
                refused[entry.label] = str(error)
            gc.collect()  # frees a refused contender: its model and hooks form a reference cycle
        reference, peak = find_reference(config, running, refused), peak_rate(config.dtype, mesh)
        reported = partial(report_of, config, mesh, data, running, refused, reference, peak)
        for done, order in enumerate(orders(len(running), config.rounds, config.seed), start=1):
            for contender in (running[place] for place in order):
                step, alone = contender.step, contender.entry.alone
                seconds = block(step, config.steps, mesh.world, alone=alone)
                contender.rounds.append(seconds)
            times = "  ".join(
                f"{contender.entry.label} {statistics.median(contender.rounds[-1]) * 1e3:.0f} ms"
                for contender in running
            )
            progress.reach(done)
            progress.say(f"round {done:>3}/{config.rounds}  {times}", on_the_bar="")
            if fewest_rounds() <= done < config.rounds and done % 4 == 0:
                so_far = reported()
                if so_far is not None and keep is not None:
                    keep(so_far)
        return reported()


def report_of(
    config: Settings, mesh: Mesh, data: Data, running: Sequence["Contender"],
    refused: dict[str, str], reference: str, peak: float,
) -> CompareReport | None:  # fmt: skip
    """The results until now. Collective; rank 0 gets them."""
    rows = [row_of(contender) for contender in running]
    if mesh.rank > 0:
        return None
    first = running[0]
    setting = setup.describe(first.config, first.job, data)
    setting |= {"config": config.to_dict(), "mesh": mesh.axes, "world_size": mesh.size}
    text = data.image is None
    unit = "tokens/s" if text else "samples/s"
    batch = config.batch * config.seq if text else config.batch
    return CompareReport(setting, reference, unit, batch, peak, rows, refused)


class Contender:
    """One strategy on this rank, with its model, optimizer and batches.

    Its steps do nothing on a rank that does not take part.

    Attributes:
        rounds: seconds of each step of each round, on the slowest rank.
        losses: the loss of every step, including warm-up.
    """

    def __init__(self, entry: ListedStrategy, settings: Settings, mesh: Mesh) -> None:
        self.entry, self.mesh = entry, mesh
        self.steps = WARM_UP + settings.rounds * settings.steps
        self.config = replace(settings.of(entry), steps=self.steps)
        self.misfit = settings.misfit(entry)
        self.takes_part = mesh.rank == 0 or not entry.alone
        self.taken = 0
        self.rounds: list[list[float]] = []
        self.losses: list[float] = []
        self.calls: list[Call] = []  # collectives of one step
        self.kernel_bytes: int | None = None  # sent in that step

    def build(self, data: Data, cleanup: ExitStack) -> None:
        if self.takes_part:
            config = self.config
            mesh = own_mesh(self.entry, config, self.mesh)
            with together(mesh.world):  # before the optimizer, which may be collective
                self.job = setup.build(config, mesh, data)
            self.optimizer = make_optimizer(self.job, config)
            rows = own_rows(config.batch, self.job)
            self.batches = cleanup.enter_context(closing(prefetch(data, rows, 0, self.steps)))
            self.meter = Meter(self.job, self.optimizer, watch=False)  # nothing but the step

    def step(self) -> None:
        """Take one complete step, as train.py does."""
        if not self.takes_part:
            return
        self.taken += 1
        with self.meter.step():
            loss, _ = take_step(
                self.job, self.optimizer, *next(self.batches), self.taken, self.config
            )
        self.losses.append(loss)

    def counted_step(self) -> None:
        """Take a step while the ledger and the kernel count its bytes."""
        with ExitStack() as counting:
            if self.takes_part:
                ledger = self.job.mesh.comm.ledger
                self.calls = counting.enter_context(ledger.recording())
            self.kernel_bytes = sent_during(self.step, self.mesh)

    def own_facts(self) -> dict[str, Any]:
        """This rank's measurements, as JSON values; empty if it took no part."""
        if not self.takes_part:
            return {}
        counted = self.entry.impl == "hand"  # a library's calls do not pass through our ledger
        steps = self.meter.steps[WARM_UP:]
        return {
            "mix": self.job.strategies,
            "mesh": self.job.mesh.axes,
            "about": self.job.about,
            "blocked": [traffic.blocked for _, traffic in steps] if counted else None,
            "peak_memory_bytes": self.meter.memory.total,
            "peak_memory": self.meter.memory.to_dict(),
            "flops_per_step": self.meter.flops_per_step,
            "model_flops_per_step": self.meter.model_flops_per_step,
            "traffic": by_collective(self.calls) if counted else None,
            "kernel_bytes": self.kernel_bytes,
        }


def own_mesh(entry: ListedStrategy, config: Config, mesh: Mesh) -> Mesh:
    """Returns a mesh for one strategy: the same processes, but its own ledger."""
    if entry.alone:
        return Mesh({"dp": 1}, CommContext(0, 1, backend=config.backend), config.timeout)
    axes = config.axes(mesh.size)
    return init_mesh(
        timeout=config.timeout, backend=config.backend, check=False,
        collectives=config.collectives, **axes,
    )  # fmt: skip


def warmed_up(contender: Contender, data: Data, cleanup: ExitStack) -> Contender:
    """Build a contender and take its warm-up steps. If one rank raises a UserError, all do."""
    with together(contender.mesh.world):
        if why := contender.misfit:
            raise UserError(why)
        contender.build(data, cleanup)
    for _ in range(WARM_UP - 1):
        with together(contender.mesh.world):
            contender.step()
    with together(contender.mesh.world):
        contender.counted_step()
    return contender


def find_reference(
    config: Settings, running: Sequence[Contender], refused: Mapping[str, str]
) -> str:
    """Returns the label of the reference: --reference, or else the first that runs."""
    labels = [contender.entry.label for contender in running]
    label = config.reference.removesuffix("@hand")
    if label in refused:
        raise UserError(f"reference {label} cannot run: {refused[label]}; give another --reference")
    if not labels:
        why = "; ".join(f"{label}: {reason}" for label, reason in refused.items())
        raise UserError(f"none of the strategies can run; {why}")
    return label or labels[0]


def sent_during(work: Callable[[], None], mesh: Mesh) -> int | None:
    """Returns the bytes that this rank's sockets send during `work`, as the kernel counts them."""
    marks = []
    barrier(mesh.world)
    for action in (lambda: None, work):  # the first measures the barrier alone
        marks.append(sockets.sent_bytes())
        action()
        barrier(mesh.world)  # after it, everything that was sent has arrived
    start, middle, end = [*marks, sockets.sent_bytes()]
    if start is None or middle is None or end is None:
        return None
    return max(0, (end - middle) - (middle - start))


def row_of(contender: Contender) -> ContenderRow:
    """Combine the measurements of all ranks for one strategy. Collective."""
    own_facts = json.dumps(contender.own_facts()).encode()
    gathered = [json.loads(b) for b in ops.all_gather_bytes(own_facts, contender.mesh.world)]
    facts = [fact for fact in gathered if fact]  # of the ranks that took part
    kernel = [fact["kernel_bytes"] for fact in facts]
    fullest = max(facts, key=lambda fact: fact["peak_memory_bytes"])
    over_ranks = {
        "peak_memory_bytes": fullest["peak_memory_bytes"],
        "peak_memory": fullest["peak_memory"],
        "traffic": mean_of_ranks([fact["traffic"] for fact in facts]),
        "kernel_bytes": None if None in kernel else statistics.fmean(kernel),
    }
    values = asdict(contender.entry) | facts[0] | over_ranks
    return ContenderRow(
        **values, processes=len(facts), rounds=contender.rounds, losses=contender.losses
    )
