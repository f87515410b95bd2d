"""Place: the step and the samples that the running forward computes, for modules that need them.

    job.run(microbatches, ...)              rows are numbered over micro-batches, then over ranks
    job.microbatch(last=, samples=...)      the caller numbers the rows
    job.finish()                            the next step begins

A dropout mask is a function of the step and of the number of each row in the global batch
(bits.py). Runners know both, modules do not. So a runner keeps a Place and says in it which
micro-batch is next, before each forward and backward; bound modules read it. The numbers are those
of the rows of one process: first all rows of the first data rank, in order, then those of the next.

[Note: recomputation] A forward that runs again in backward must see the place of its first run.
`remember` notes it before the first run, for transforms/recompute.py. Another library's
checkpointing tells us nothing. Then the running micro-batch is the right one, and the call is known
if the module is called once per micro-batch; if not, an error says so.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.randomness.full_shapes import FullShapes, Shapes
from dist_lab.step.hooks import ModuleHook, tensors_in
from dist_lab.torch_private import backward_number

Samples = Sequence[int] | Tensor
GIVE_SAMPLES = (
    "give job.microbatch(last=..., samples=range(first, first + rows)), the numbers of these rows "
    "in the global batch, or give all micro-batches of the step to one job.run"
)
SOME_RANKS_ONLY = (
    "job.microbatch has samples= on some ranks only, so dropout does not know the place of the "
    "other rows in the global batch; give samples= on all ranks, or on none"
)


@dataclass
class Microbatch:
    """One micro-batch: what a module in its forward can ask.

    samples: the number of each row in the global batch, (rows,); None: not known yet
    is_given: the caller has numbered the rows
    last: no other micro-batch of the step follows
    calls: module -> the number of its calls so far
    shapes: module -> the shape of its input at each call in the unsharded model; only under tp
    is_again: this is the second run of a forward
    """

    samples: Tensor | None = None
    is_given: bool = False
    last: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    shapes: Shapes | None = None
    is_again: bool = False


class Place:
    """The step, and the micro-batch that is being computed.

    Attributes:
        seed: of the masks.
        step: the number of steps that were finished. Set it to continue an earlier run.
        in_use: some module of the model, on any rank, reads this place.
    """

    def __init__(self) -> None:
        self.seed = self.step = 0
        self.in_use = False
        self.current = self._outside = Microbatch()  # `_outside` is that of no block
        self._of_run: list[Microbatch] = []
        self._begin_step()

    def use(
        self, model: nn.Module, seed: int, data: Axis, tensor: Axis,
        full_shapes: FullShapes | None = None,
    ) -> None:  # fmt: skip
        """Modules of the model will read this place: number the rows of its forwards.

        Args:
            data, tensor: the axes along which rows, and features or positions, are split.
            full_shapes: finds the shapes of the unsharded model; needed if `tensor` has several.
        """
        self.model, self.seed, self.data, self.tensor = model, seed, data, tensor
        self.full_shapes, self.in_use = full_shapes, True
        model.register_forward_pre_hook(
            ModuleHook(self._enter_forward), with_kwargs=True, prepend=True
        )

    # --- the order of a step ----------------------------------------------------------------------

    @contextmanager
    def microbatch(self, samples: Samples | None, *, last: bool) -> Iterator[None]:
        """The block is one micro-batch, or with `job.run` inside it, several."""
        given = None if samples is None else torch.as_tensor(list(samples), dtype=torch.int64)
        block = Microbatch(given, given is not None, last)
        with self._part_of_step(last=last), self._as(block):
            if given is not None:
                self._given += given.tolist()
            rows_before = self._rows_so_far
            yield
            if block.samples is not None and self._rows_so_far == rows_before:
                self._rows_so_far += len(block.samples)

    @contextmanager
    def run(self, microbatches: Sequence[tuple[Any, Any]]) -> Iterator[None]:
        """The block runs these micro-batches: `at(i)` is the place of the i-th. Collective."""
        if not self.in_use:
            yield
            return
        if self.current is self._outside:  # the run is the whole step
            with self.microbatch(None, last=True), self.run(microbatches):
                yield
            return
        rows = [rows_in(x) for x, _ in microbatches]
        samples = self._number(sum(rows))
        self._of_run = [
            replace(self.current, samples=numbers, calls={}, shapes=self._shapes((x,), {}))
            for numbers, (x, _) in zip(samples.split(rows), microbatches, strict=True)
        ]
        try:
            yield
            self._rows_so_far += sum(rows)
        finally:
            self._of_run = []

    def at(self, i: int) -> AbstractContextManager[None]:
        """The block computes the i-th micro-batch of the run, its forward or its backward."""
        return self._as(self._of_run[i] if self._of_run else self.current)

    def end_step(self) -> None:
        """The step is over. Raises UserError if its rows were not numbered right. Collective."""
        own = json.dumps([sorted(self._unchecked), self._given]).encode()
        self._begin_step()
        self.current = self._outside = Microbatch()
        self.step += 1
        if self.in_use and self.data.size > 1:
            with self.data.comm.label("samples"):
                gathered = ops.all_gather_bytes(own, self.data)
            rows, given = zip(*map(json.loads, gathered), strict=True)
            refuse_unless_right(rows, given)

    def _begin_step(self) -> None:
        self._rows_so_far = 0  # rows of this step that have been numbered
        self._unchecked: set[int] = set()  # rows of forwards that were numbered without asking
        self._given: list[int] = []  # numbers that the caller gave
        self._is_over = False  # the last micro-batch of the step is over

    @contextmanager
    def _part_of_step(self, *, last: bool) -> Iterator[None]:
        """The block is one part of a step, or the last. A step may be given up by an exception, or
        after its last part without `finish`; then the next part begins a new one.
        """
        if self._is_over:
            self._begin_step()
        try:
            yield
        except BaseException:
            self._begin_step()
            raise
        if last:
            self._rows_so_far, self._is_over = 0, True

    # --- recomputation ----------------------------------------------------------------------------

    def remember(self, _: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        """Note the place of a forward that begins: see [Note: recomputation]."""
        first = replace(self.current, calls=dict(self.current.calls), is_again=True)
        return lambda: self._as(replace(first, calls=dict(first.calls)))

    def call_of(self, name: str) -> int:
        """The number of this call of a module in its micro-batch. Counts it."""
        calls = self.current.calls
        call = calls.get(name, 0)
        if backward_number() != -1 and not self.current.is_again:
            if call == 0:
                raise UserError(
                    f"{name} is computed again in backward, outside its micro-batch, so its mask "
                    "is not known: call backward inside the block of job.microbatch, or recompute "
                    "by parallelize(..., units=[...], recompute=1)"
                )
            if call != 1:
                raise UserError(
                    f"{name} is called {call} times in a micro-batch, and backward computes one of "
                    "them again, but does not say which: call it once, or recompute by "
                    "parallelize(..., units=[...], recompute=1)"
                )
            return 0
        calls[name] = call + 1
        return call

    # --- numbers of rows --------------------------------------------------------------------------

    def _enter_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model, in a loop that was written by hand, or of a run."""
        now = self.current
        if not model.training or backward_number() != -1:
            return
        if not self._of_run and not now.is_given:
            rows = rows_in([args, kwargs])
            if self.data.size > 1:
                self._refuse_unless_whole_step()
                if not self._is_over:  # else this is a look at the model between steps
                    self._unchecked.add(rows)  # end_step compares them
            first = self.data.index * rows if self.data.size > 1 else self._rows_so_far
            now.samples = torch.arange(first, first + rows)
        if new := self._shapes(args, kwargs):  # after those of earlier forwards
            old = now.shapes or {}
            calls = now.calls
            joined = {n: [*old.get(n, [])[: calls.get(n, 0)], *new[n]] for n in new}
            now.shapes = {**old, **joined}

    def _number(self, rows: int) -> Tensor:
        """The numbers of this rank's rows of a run."""
        now, own = self.current, torch.tensor([[rows, -1]], device=self.data.device)
        if now.is_given and now.samples is not None:
            own[0, 1] = len(now.samples)
        with self.data.comm.label("samples"):
            by_rank = ops.all_gather(own, self.data).tolist()
        for count, given in by_rank:
            if given not in (-1, count):
                raise UserError(
                    f"samples= has {given} numbers, and the micro-batches have {count} rows; give "
                    "one number for each row"
                )
        if len({given == -1 for _, given in by_rank}) > 1:
            raise UserError(SOME_RANKS_ONLY)
        if now.is_given and now.samples is not None:
            return now.samples
        if self.data.size > 1:
            self._refuse_unless_whole_step()
        first = self._rows_so_far + sum(count for count, _ in by_rank[: self.data.index])
        return torch.arange(first, first + rows)

    def _refuse_unless_whole_step(self) -> None:
        if (not self.current.last or self._rows_so_far) and self.model.training:
            raise UserError(
                "dropout does not know the place of these rows in the global batch, as other "
                f"micro-batches of the step come before or after: {GIVE_SAMPLES}"
            )

    def _shapes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes | None:
        if self.tensor.size == 1:
            return None
        assert self.full_shapes is not None
        return self.full_shapes.of(args, kwargs)

    @contextmanager
    def _as(self, microbatch: Microbatch) -> Iterator[None]:
        before, self.current = self.current, microbatch
        try:
            yield
        finally:
            self.current = before


def rows_in(inputs: Any) -> int:
    """The number of rows: the length of the first tensor."""
    first = next(tensors_in(inputs), None)
    return len(first) if first is not None and first.dim() else 0


def refuse_unless_right(rows: Sequence[list[int]], given: Sequence[list[int]]) -> None:
    """Raise UserError if the numbers of rows in a step are not those of one process.

    Args:
        rows: of each data rank, the lengths of the batches that were numbered without asking.
        given: of each data rank, the numbers that the caller gave.
    """
    if any(map(any, rows)) and any(given) and not all(map(any, rows)):
        raise UserError(SOME_RANKS_ONLY)
    if any(r != rows[0] for r in rows):
        raise UserError(
            "ranks have different numbers of rows, so dropout does not know the place of each in "
            f"the global batch: {GIVE_SAMPLES}"
        )
    owner: dict[int, int] = {}
    for rank, numbers in enumerate(given):
        for number in numbers:
            if owner.setdefault(number, rank) != rank:
                raise UserError(
                    f"samples= has the number {number} on data ranks {owner[number]} and {rank}, "
                    "so different rows would have equal dropout masks; number the rows of all "
                    "ranks in one order, such as samples=range(rank * rows, (rank + 1) * rows)"
                )
