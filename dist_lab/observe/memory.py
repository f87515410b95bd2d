"""Live bytes of tensor storage on this rank by kind, and their peak within a step.

This is not the process's resident memory, which also holds the interpreter, the libraries and the
allocator's reserve. To match a formula, a number must count only tensors. A dispatch mode
sees every operation. A storage counts from the first operation that uses it until its last
reference is dropped, including autograd's references. Shared memory of another rank is counted
on that rank only (comm/shared/memory.py). Measuring costs some microseconds per operation, so a
run measures only its first two steps (the second has the optimizer state).

    parameters      this rank's shards, or all of a parameter that is not sharded
    gradients       tensors that autograd accumulates into, and every .grad
    optimizer       the optimizer state: moments, step counts
    gathered        tensors that compute reads in place of a parameter: all-gathered, or cast
    buffers         communication: buckets that are not gradients, and packed messages
    module_buffers  the model's buffers: statistics of BatchNorm, tables of positions
    activations     everything else: the batch, saved tensors, temporary tensors

[Note: the kind of a storage] The kind is known only after a storage is created: a result of
backward becomes a gradient when autograd sets .grad, and a new tensor becomes a moment when the
optimizer stores it. So each change of size is recorded with its storage, and summed by kind after
the step. If a storage had several kinds, it always counts as the one listed first above.

[Note: resized storages] FSDP2 grows the storage of a parameter and shrinks it to nothing again,
without an operation that the dispatch mode sees. So a storage's size is read again at every
operation that uses it, and at each event of `Sync`, right after the strategy has handled it.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_lab.job import Job
from dist_lab.layout.gather import local_part
from dist_lab.layout.layout import local_numel, shard_shape
from dist_lab.optim.matrix_optimizer import MatrixOptimizer
from dist_lab.step.grad_elsewhere import real_grad
from dist_lab.step.protocol import Phase, Sync
from dist_lab.torch_private import TorchDispatchMode, storage_key

KINDS = (
    "parameters", "gradients", "optimizer", "gathered", "buffers", "module_buffers", "activations",
)  # fmt: skip
Label = tuple[str, str]  # phase, unit


@contextmanager
def measured(job: Job, optimizer: torch.optim.Optimizer) -> Iterator["LiveBytes"]:
    """Counts the live bytes of a step that runs inside the block. Then call `.by_kind()`."""
    comm = job.mesh.comm
    live = LiveBytes(label=lambda: (comm.phase, comm.unit))
    labels = KindLabels(live, job)
    labels.label_all()
    labels.label_optimizer(optimizer)
    live.before = len(live.changes)
    with job.listening(labels), labels.at_each_gradient(), live:
        yield live
        labels.label_optimizer(optimizer)  # a first step has created its state


@dataclass(frozen=True)
class Peak:
    """Bytes. The kinds of `at_peak` sum to `total`. `own` is the maximum of each kind over time."""

    total: int
    at_peak: Mapping[str, int]
    own: Mapping[str, int]

    def worst(self, other: "Peak") -> "Peak":
        """Returns the higher peak of two steps, with the higher own peak of each kind."""
        higher = max(self, other, key=lambda peak: peak.total)
        own = {kind: max(self.own[kind], other.own[kind]) for kind in KINDS}
        return Peak(higher.total, higher.at_peak, own)

    def to_dict(self) -> dict[str, dict[str, int]]:
        return {"at_peak": dict(self.at_peak), "own_peak": dict(self.own)}


NOTHING = Peak(0, dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0))


def by_layout(job: Job, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Returns the bytes of parameters, gradients and optimizer state computed from `job.layouts`.

    As in ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3), not by stage but by
    layout: local elements times bytes per element. Gradients are those that the optimizer steps on;
    during backward there may be unsharded ones as well. The optimizer keeps a fixed number of bytes
    per element: 8 for Adam. One of matrices has its own formula. Padding, and flags in a bucket,
    are not counted.
    """
    parameters = dict(job.model.named_parameters())
    per_element, per_tensor = bytes_of_state(optimizer)
    total = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for name, layout in job.layouts.items():
        if name in parameters:
            local = local_numel(layout, job.mesh.axes, job.mesh.coordinates)
            # A parameter that is sharded only for the optimizer is unsharded in the model.
            whole = math.prod(shard_shape(layout, job.mesh.axes, job.mesh.coordinates))
            in_model = whole if name in job.stepped else local
            total["parameters"] += in_model * layout.dtype.itemsize
            if parameters[name].requires_grad:
                total["gradients"] += local * layout.dtype.itemsize
                total["optimizer"] += local * per_element + per_tensor
    if isinstance(optimizer, MatrixOptimizer):  # the state of a matrix is on its owner
        total["optimizer"] = optimizer.bytes_by_formula()
    return total


def bytes_of_state(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Returns the bytes of state per element of a parameter, and per parameter (a step count)."""
    per_element = per_tensor = 0
    if optimizer.state:
        largest = max(optimizer.state, key=Tensor.numel)
        for value in optimizer.state[largest].values():
            if isinstance(value, Tensor) and value.shape == largest.shape:
                per_element += value.element_size()
            elif isinstance(value, Tensor):
                per_tensor += value.nbytes
    return per_element, per_tensor


class LiveBytes(TorchDispatchMode):
    """Counts live bytes inside its `with` block, beginning with those of `tensors`.

    Args:
        label: returns the phase of the step and the unit that run now.

    Attributes:
        live, peak: bytes.
        changes: every change of size, in order, as (storage, bytes).
        before: the first so many changes are of tensors from before the step.
        labels: (position in `changes`, phase, unit), from this change on.
    """

    def __init__(
        self, tensors: Iterable[Tensor] = (), label: Callable[[], Label] = lambda: ("", "")
    ) -> None:
        super().__init__()
        self.live = self.peak = self.before = 0
        # Live storages by address. Keep the weak reference: its callback reports the free.
        self._known: dict[int, tuple[weakref.ref[Any], Storage]] = {}
        self.changes: list[tuple[Storage, int]] = []
        self.labels: list[tuple[int, str, str]] = []
        self._label, self._now = label, ("", "")
        for tensor in tensors:
            self.note(tensor)

    def note(self, tensor: Tensor, kind: str = "activations", owner: str = "") -> None:
        """Record that this tensor is alive and of that kind, and the size of its storage.

        `owner`: the name of the parameter that it belongs to.
        """
        if tensor.is_meta:  # it has a size but no memory
            return
        local = local_part(tensor)
        storage, key = local.untyped_storage(), storage_key(local)
        if key not in self._known:  # views and in-place results share a storage that already counts
            new = Storage(*self._label())
            self._known[key] = weakref.ref(storage, partial(self._freed, key)), new
        _, known = self._known[key]
        known.kind = min(known.kind, KINDS.index(kind))
        if owner:
            known.owners[owner] = None
        self._resized(known, storage.nbytes())

    def by_kind(self) -> Peak:
        """Returns the peak of everything recorded so far: see [Note: the kind of a storage]."""
        now, own, at_peak = (dict.fromkeys(KINDS, 0) for _ in range(3))
        live = peak = 0
        for storage, change in self.changes:
            kind = KINDS[storage.kind]
            now[kind] += change
            own[kind] = max(own[kind], now[kind])
            live += change
            if live > peak:
                peak, at_peak = live, dict(now)
        return Peak(peak, at_peak, own)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors(args):
            self.note(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.note(tensor)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._known.clear()  # storages freed later do not count

    def _resized(self, storage: "Storage", size: int) -> None:
        if size != storage.size:
            if (now := self._label()) != self._now:
                self._now = now
                self.labels.append((len(self.changes), *now))
            self.changes.append((storage, size - storage.size))
            self.live += size - storage.size
            self.peak = max(self.peak, self.live)
            storage.size = size

    def _freed(self, key: int, reference: Any) -> None:
        _, storage = self._known.pop(key)
        self._resized(storage, 0)


class Storage:
    """A storage's current size, its kind as a position in KINDS, and whose it is.

    phase, unit: those that ran when it was first seen
    owners: the names of the parameters that it belongs to, in order
    """

    def __init__(self, phase: str, unit: str) -> None:
        self.size, self.kind = 0, len(KINDS) - 1
        self.phase, self.unit, self.owners = phase, unit, dict[str, None]()


class KindLabels(Sync):
    """Called after the strategy at each step event; labels every live tensor with its kind."""

    def __init__(self, live: LiveBytes, job: Job) -> None:
        self.live, self.job = live, job

    def label_all(self) -> None:
        """Label everything except the optimizer state."""
        for name, parameter in self.job.named_parameters():
            self.live.note(parameter, "parameters", name)
        for name, buffer in self.job.model.named_buffers():
            self.live.note(buffer, "module_buffers", name)
        self._label_gradients(dict(self.job.model.named_parameters()))
        self._label_strategy()

    def label_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        names = {id(parameter): name for name, parameter in self.job.named_parameters()}
        for parameter, tensor in state_of(optimizer):
            self.live.note(tensor, "optimizer", names.get(id(parameter), ""))

    @contextmanager
    def at_each_gradient(self) -> Iterator[None]:
        """Label each gradient before the strategy sees it, which may send and free it at once."""
        leaves = dict(self.job.model.named_parameters()) | dict(self.job.leaves)

        def note(name: str, leaf: Tensor) -> None:
            if leaf.grad is not None:
                self.live.note(leaf.grad, "gradients", name)

        trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        hooks = [
            leaf.register_post_accumulate_grad_hook(partial(note, name))
            for name, leaf in trained.items()
        ]
        yield
        for hook in hooks:
            hook.remove()

    def unshard(self, unit: str, phase: Phase) -> None:
        self._label_strategy()
        for module in self.job.units[unit].modules():
            for name in module._parameters:
                cast = module.__dict__.get(name)
                if isinstance(cast, Tensor):
                    self.live.note(cast, "gathered", unit)

    def reshard(self, unit: str, phase: Phase) -> None:
        self._label_strategy()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self._label_gradients(names)
        self._label_strategy()

    finish = after_step = label_all

    def _label_gradients(self, names: Iterable[str]) -> None:
        for name in names:
            for leaf in (self.job.leaves.get(name), self.job.model.get_parameter(name)):
                if leaf is not None and (gradient := real_grad(leaf)) is not None:
                    self.live.note(gradient, "gradients", name)

    def _label_strategy(self) -> None:
        """Label the strategy's extra memory and its unsharded leaves, at their current size."""
        for kind, tensor in self.job.sync.extra_memory():
            self.live.note(tensor, kind)
        for name, leaf in self.job.leaves.items():
            if local_part(leaf).untyped_storage().nbytes() >= local_part(leaf).nbytes:
                self.live.note(leaf, "gathered", name)  # it has memory at the moment


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


def state_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, Tensor]]:
    """Yields (parameter, tensor) of the state, also that of a wrapped optimizer, as in
    ZeroRedundancyOptimizer.
    """
    for parameter, state in optimizer.state.items():
        yield from ((parameter, value) for value in state.values() if isinstance(value, Tensor))
    for inner in vars(optimizer).values():
        if isinstance(inner, torch.optim.Optimizer):
            yield from state_of(inner)
