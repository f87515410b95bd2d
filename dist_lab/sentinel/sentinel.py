"""Sentinel: every N steps compares what several ranks hold alike, and stops at a difference.

    own digests, one number for each kind of group -> all ranks       8 bytes x kinds a rank

Replicas drift apart silently: a lost update, a bit that has flipped, a rank that draws other
numbers. Each rank's loss looks fine, and a checkpoint saves the values of one of them. What should
be equal to what follows from the layouts alone (layout/replicas.py):

    parameters, buffers      over the ranks whose boxes of the full tensor are equal
    step, norm, loss, ...    over all ranks: any number that the caller gives to `check`
    learning rates           over the ranks that hold the same parameters, shards or not
    random generators        over those of them whose generators were equal at the start
    inputs                   over the ranks at one position of the data axes, which read one batch

Parameters with the same groups share one digest, so the message is a few numbers. Only after a
difference the ranks exchange a digest for each tensor, to name the first. Bits are compared:
replicas get equal gradients from a collective, or compute them from equal numbers, and the same
update of equal bits is equal. Moments of the optimizer are not read: a difference there is one of
the weights a step later. Of the buffers those are compared whose elements are floating-point
numbers, without running statistics, which are of a rank's own rows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import ReplicasDiffer, UserError
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import FlatShard, Layout
from dist_lab.layout.replicas import Groups, replicas, same_along, stage_axes, without_flat
from dist_lab.mesh.mesh import Mesh
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.randomness.generators import GENERATORS
from dist_lab.sentinel.digest import digest
from dist_lab.step.hooks import tensors_in

STATISTICS = ("running_mean", "running_var")  # of a rank's own rows, merged when they are saved
SHARD = "the optimizer's shard of "


class Watched(Protocol):
    """The part of `Job` that this file uses."""

    model: nn.Module
    mesh: Mesh
    layouts: Mapping[str, Layout]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Kind:
    """Values that should be equal within each of some groups of ranks.

    values: what is compared -> this rank's value or digest, as text
    shown: the text says something to a reader
    """

    groups: Groups
    values: Mapping[str, str]
    shown: bool = False


class Sentinel:
    """Compares the replicas of one job. `job.sentinel(every)` builds it.

    Attributes:
        every: compare at every N-th call of `check`.
        last_equal: the last step after which everything was equal; None: it has never been.
    """

    def __init__(
        self, job: Watched, every: int, buffers: Mapping[str, Layout], step: int = 0
    ) -> None:
        """Compare for the first time. Collective.

        Args:
            buffers: name -> the layout of each buffer that a checkpoint saves, of any rank.
            step: the number of steps that were taken before.
        """
        if not isinstance(every, int) or every < 1:
            raise UserError(f"a sentinel compares every N steps, N >= 1; it was given {every!r}")
        self.job, self.every, self._calls = job, every, 0
        self.last_equal: int | None = None
        self._sizes, self._world = job.mesh.axes, job.mesh.world
        self._names: dict[Groups, list[str]] = {}  # tensors with the same groups, of any rank
        self._group_tensors(buffers)
        if not self._names:
            raise UserError(_nothing_to_compare(job.layouts, self._sizes))
        self._same_work = same_along(stage_axes(job.layouts), self._sizes)
        self._same_rows = same_along(set(DATA_AXES), self._sizes)
        self._generators = self._equal_generators()
        self._compare(step, [*self._tensor_kinds()])

    def check(
        self, step: int, optimizer: torch.optim.Optimizer | None = None, *, inputs: Any = None,
        now: bool = False, **numbers: Any,
    ) -> None:  # fmt: skip
        """Compare, at every N-th call. Call it after `job.after_step`. Collective.

        Args:
            step: the number of the step that has ended.
            optimizer: its learning rates are compared.
            inputs: this rank's rows, as tensors; equal where ranks should read the same rows.
            now: compare at this call in any case, for instance at the last step.
            numbers: what should be equal on every rank: norm=, loss=, position= in the data.

        Raises:
            ReplicasDiffer: names the first difference, in the same line on every rank.
        """
        self._calls += 1
        if self._calls % self.every and not now:
            return
        rates = [] if optimizer is None else [group["lr"] for group in optimizer.param_groups]
        self._compare(step, [
            Kind(same_along(set(), self._sizes), _as_text({"step": step} | numbers), shown=True),
            Kind(self._same_rows, {"the batch": _text_of([*tensors_in(inputs)])}),
            Kind(self._same_work, {"the learning rate": repr([*map(float, rates)])}, shown=True),
            *(Kind(groups, {name: _hash(GENERATORS[name]())}) for name, groups in self._generators),
            *self._tensor_kinds(),
        ])  # fmt: skip

    def _compare(self, step: int, kinds: Sequence[Kind]) -> None:
        own = [int(_hash([*kind.values.items()])) for kind in kinds]
        with self._world.comm.label("sentinel", unit=""):
            row = torch.tensor([own], device=self._world.device)
            columns = ops.all_gather(row, self._world).T.tolist()
        for kind, column in zip(kinds, columns, strict=True):
            for ranks in kind.groups:
                if len({column[rank] for rank in ranks}) > 1:
                    self._stop(step, kind, ranks)
        self.last_equal = step

    def _stop(self, step: int, kind: Kind, ranks: Sequence[int]) -> None:
        """Name what differs between these ranks. All ranks know that some do."""
        with self._world.comm.label("sentinel", unit="names"):
            texts = ops.all_gather_bytes(json.dumps(kind.values).encode(), self._world)
        values = {rank: json.loads(texts[rank]) for rank in ranks}
        name = next(n for n in values[ranks[0]] if len({values[r].get(n) for r in ranks}) > 1)
        usual = Counter(values[rank].get(name) for rank in ranks).most_common(1)[0][0]
        odd = next(rank for rank in ranks if values[rank].get(name) != usual)
        other = next(rank for rank in ranks if values[rank].get(name) == usual)
        shown = {r: f" ({values[r].get(name)})" if kind.shown else "" for r in (odd, other)}
        differs = (
            f"step {step}: {name} differs between rank {odd}{shown[odd]} and rank {other}"
            f"{shown[other]}, which should hold the same"
        )
        if self.last_equal is None:
            raise ReplicasDiffer(f"{differs}, already when the sentinel was made; start them equal")
        advice = "find what changes it on one of them only, and go on from a checkpoint of"
        if name in GENERATORS:
            advice = (
                "if each rank draws as many numbers as it has rows, give each a seed of its own "
                "before job.sentinel(); if not, go on from a checkpoint of"
            )
        raise ReplicasDiffer(
            f"{differs}; all that is compared was last equal after step {self.last_equal}; "
            f"{advice} step {self.last_equal} or before"
        )

    # --- what is compared -------------------------------------------------------------------------

    def _group_tensors(self, buffers: Mapping[str, Layout]) -> None:
        """Sort all tensors by the groups of ranks that hold the same of it."""
        layouts = {name: without_flat(layout) for name, layout in self.job.layouts.items()}
        for name, layout in self.job.layouts.items():
            if any(isinstance(how, FlatShard) for _, how in layout.splits):
                layouts[SHARD + name] = layout
        for name, layout in buffers.items():  # integers count the batches that a rank has seen
            is_own = name.endswith(STATISTICS) and self.job.mesh.data.size > 1
            if layout.dtype.is_floating_point and not is_own:
                layouts[name] = layout
        known: dict[Layout, Groups] = {}
        for name, layout in layouts.items():
            if layout not in known:
                known[layout] = replicas(layout, self._sizes)
            if known[layout]:
                self._names.setdefault(known[layout], []).append(name)

    def _tensor_kinds(self) -> Iterator[Kind]:
        stepped = {SHARD + name: p for name, p in self.job.named_parameters()}
        model = self.job.model
        local: dict[str, Tensor] = {**stepped, **dict(model.named_parameters())}
        local |= dict(model.named_buffers(remove_duplicate=False))
        for groups, names in self._names.items():
            held = self.job.mesh.rank in {rank for group in groups for rank in group}
            yield Kind(
                groups,
                {name: str(digest(local_part(local[name]))) for name in names if held},
            )

    def _equal_generators(self) -> list[tuple[str, Groups]]:
        """For each generator, the groups of ranks on which it is equal now. Collective.

        Data ranks may have different seeds. A pipeline's stages draw different numbers.
        """
        own = torch.tensor([[int(_hash(state())) for state in GENERATORS.values()]])
        with self._world.comm.label("sentinel", unit=""):
            columns = ops.all_gather(own.to(self._world.device), self._world).T.tolist()
        found = []
        for name, column in zip(GENERATORS, columns, strict=True):
            groups: dict[tuple[int, int], list[int]] = {}
            for i, ranks in enumerate(self._same_work):
                for rank in ranks:
                    groups.setdefault((i, column[rank]), []).append(rank)
            found.append((name, tuple(tuple(g) for g in groups.values() if len(g) > 1)))
        return found


def _nothing_to_compare(layouts: Mapping[str, Layout], sizes: Mapping[str, int]) -> str:
    name, layout = next(iter(layouts.items()))
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    axes = " and ".join(axis for axis, _ in layout.splits if sizes.get(axis, 1) > 1)
    how = f"{name} and all others are split over {axes}" if axes else "there is one rank"
    return (
        f"a sentinel compares what several ranks hold alike, and on mesh {mesh} no two ranks hold "
        f"the same parameter or buffer ({how}); only the step, the norm, learning rates and random "
        "generators would be left; leave it out, or add an axis that replicates: dp or tp"
    )


def _as_text(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Numbers as exact text. A tensor of one element counts as its number."""
    items = ((n, v.item() if isinstance(v, Tensor) else v) for n, v in numbers.items())
    return {name: repr(value) for name, value in items}


def _text_of(tensors: Sequence[Tensor]) -> str:
    return " ".join(f"{[*t.shape]} {digest(t)}" for t in tensors)


def _hash(value: object) -> str:
    """A 63-bit hash of anything whose repr has all of its value, as text."""
    data = value if isinstance(value, bytes) else repr(value).encode()
    return str(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1)
