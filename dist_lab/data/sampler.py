"""BatchSampler: the order of order.py for your own loop and torch's DataLoader.

    sampler = dist_lab.BatchSampler(dataset, batch=32, seed=0, mesh=mesh, microbatches=2)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    while sampler.epoch < 3:
        for microbatches in sampler.steps(loader):      # one pass: to the end of the epoch
            total = job.count(sum(len(y) for _, y in microbatches))
            loss = job.run(microbatches, ...)
            ...
            job.save(folder, optimizer, step=sampler.step, extra={"sampler": sampler.state_dict()})

`batch` samples form a step, over all ranks, and each rank reads its own rows of them. The position
is the number of steps that were taken, nothing else: no permutation, and nothing of one rank. So
any rank's state resumes a run on any number of ranks, and every sample still occurs exactly once
per epoch. Epochs follow one another without a gap: the last batch of a pass may begin the next.

[Note: what has been used] A DataLoader with workers asks for indices long before training uses
them, so a sampler cannot tell how far training is. `steps` can: it hands out the batches. A step
counts as taken when it is handed out, so save after the optimizer's step. A plain `for batch in
loader` gives the same batches; but then there is no position to save, and `state_dict` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from itertools import pairwise
from typing import Any, Protocol

from dist_lab.data.order import Order
from dist_lab.errors import UserError, shown

SAME = ("samples", "batch", "seed")  # a state fits a sampler if these are equal
MOST = 2**62  # samples, over all epochs: numpy counts them in int64


class Axis(Protocol):
    """The position of this rank among those that read different rows."""

    @property
    def size(self) -> int: ...
    @property
    def index(self) -> int: ...


class Mesh(Protocol):
    """The part of a mesh that a sampler reads."""

    @property
    def data(self) -> Axis: ...


class Loader(Protocol):
    """The part of a DataLoader that a sampler reads."""

    @property
    def dataset(self) -> Any: ...
    @property
    def batch_sampler(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


class BatchSampler:
    """Yields lists of indices: one for each micro-batch of this rank, to the end of the epoch.

    Args:
        dataset: a map-style Dataset, or anything with the same len().
        batch: samples per step, over all ranks and micro-batches.
        seed: of the order; each epoch has another one.
        mesh: the mesh whose data-parallel ranks share the batch; None: this process reads all.
        microbatches: parts into which each rank's rows are split. Parts need not be equal.

    Attributes:
        step: the number of steps that were taken, from 0.
    """

    def __init__(
        self, dataset: Sized, *, batch: int, seed: int = 0, mesh: Mesh | None = None,
        microbatches: int = 1,
    ) -> None:  # fmt: skip
        self.samples, self.batch, self.seed, self.microbatches = (
            len(dataset), batch, seed, microbatches
        )  # fmt: skip
        self._ranks, self._index = (mesh.data.size, mesh.data.index) if mesh else (1, 0)
        parts = self._ranks * microbatches
        for name, number, least in (
            ("the dataset's len()", self.samples, 1), ("seed", seed, 0),
            ("microbatches", microbatches, 1), ("batch", batch, max(parts, 1)),
        ):  # fmt: skip
            if type(number) is not int or number < least:
                why = f"{self._ranks} data ranks x {microbatches} micro-batches"
                why = f", one sample for each of {why}" if name == "batch" else ""
                raise UserError(f"{name} is {number!r}; a sampler needs {least} or more{why}")
        self._order = Order(self.samples, batch=batch, seed=seed)
        self.step = 0
        self._counts = False  # whether the next pass is one of `steps`
        self._uncounted = False  # whether there was a pass that is not

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self.step * self.batch // self.samples

    def steps(self, loader: Loader) -> Iterator[list[Any]]:
        """Iterate to the end of the epoch: yields the micro-batches of each step, as a list.

        Raises UserError if the loader has another batch sampler, or a dataset of another length.
        """
        if loader.batch_sampler is not self:
            raise UserError(
                f"this loader's batch_sampler is a {type(loader.batch_sampler).__name__}, not this "
                "sampler; build it as DataLoader(dataset, batch_sampler=sampler)"
            )
        if len(loader.dataset) != self.samples:
            raise UserError(
                f"this loader's dataset has {len(loader.dataset)} samples, that of its sampler "
                f"{self.samples}; give both the same dataset"
            )
        self._counts = True
        try:
            loaded = iter(loader)
        finally:
            self._counts = False
        for step in self._steps_of_pass():
            microbatches = [next(loaded) for _ in range(self.microbatches)]
            if self.step != step:
                raise UserError(
                    f"the sampler was at step {step} in this pass, and now is at {self.step}; load "
                    "a state before a pass, or leave the pass"
                )
            self.step = step + 1
            yield microbatches
        next(loaded, None)  # ends the workers

    def __iter__(self) -> Iterator[list[int]]:
        """Indices to the end of the epoch, as a DataLoader asks for them."""
        self._uncounted |= not self._counts
        return self._indices(self._steps_of_pass(), self._counts)

    def __len__(self) -> int:
        """The number of micro-batches to the end of the epoch."""
        return len(self._steps_of_pass()) * self.microbatches

    def state_dict(self) -> dict[str, int]:
        """The position, as JSON: the same on every rank, and for any number of ranks.

        Raises UserError after a pass without `steps`: how far training is, is not known then.
        """
        if self._uncounted:
            raise UserError(
                "this sampler was iterated without steps(), and a DataLoader fetches more than "
                "training has used; iterate over sampler.steps(loader)"
            )
        return {"step": self.step} | {name: getattr(self, name) for name in SAME}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position. Call it before a pass.

        Raises UserError for the state of another dataset, batch or seed, which name another order.
        """
        if not isinstance(state, Mapping):
            raise UserError(f"{shown(state)} is no state of a sampler; give one of state_dict()")
        wrong = sorted({"step", *SAME} ^ set(state), key=str)
        if wrong:
            raise UserError(f"{wrong[0]!r} is missing in this state of a sampler, or unknown")
        for name in SAME:
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the saved sampler has {name} {state[name]!r}, this one "
                    f"{getattr(self, name)}, so samples would be left out or repeated; give both "
                    f"the same {name}"
                )
        step = state["step"]
        if type(step) is not int or not 0 <= step * self.batch < MOST:
            raise UserError(f"step is {shown(step)} in this state of a sampler, no step number")
        self.step, self._uncounted = step, False

    def _steps_of_pass(self) -> range:
        """The steps from this position to the one that completes the epoch."""
        return range(self.step, -(-(self.epoch + 1) * self.samples // self.batch))

    def _indices(self, steps: range, counts: bool) -> Iterator[list[int]]:
        first, stop = (i * self.batch // self._ranks for i in (self._index, self._index + 1))
        rows = stop - first
        edges = [first + i * rows // self.microbatches for i in range(self.microbatches + 1)]
        for step in steps:
            for start, end in pairwise(edges):
                yield self._order(step, slice(start, end)).tolist()
        if not counts:
            self.step = steps.stop
