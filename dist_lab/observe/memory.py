"""Bytes of tensor storage alive on this rank by what they are for, and their peak within a step.

Not the process's resident memory, which also holds the interpreter, the libraries and whatever the
allocator keeps for later: a number to compare with a formula must count tensors and nothing else.
Every operation passes through a dispatch mode; a storage counts from the first operation that has
to do with it to the moment its last reference goes, autograd's own references included. Memory of
other ranks that this one maps is no tensor's, and counts there (comm/shared/memory.py). It costs
some microseconds an operation, so a run measures its first two steps (the second has the
optimizer's state) and not more.

    parameters      what lies here of the parameters
    gradients       what autograd accumulates into, and every .grad
    optimizer       its state: moments, step counts
    gathered        what compute reads instead of a parameter: gathered from others, or cast
    buffers         communication: buckets that are no gradients, what is packed to be sent
    module_buffers  the model's own: statistics of BatchNorm, tables of positions
    activations     everything else: the batch, what is kept for backward, all that is on its way

[Note: what a storage is for] That shows after its birth: a product of backward becomes a gradient
when autograd puts it into .grad, zeros become a moment when the optimizer keeps them. So sizes are
written down as they change, with the storage, and added up by kind when the step is over and all is
known. A storage counts, for all its life, as the first in the list above that it has been.

[Note: resized storages] FSDP2 grows the storage of a parameter and shrinks it to nothing again,
which is no operation. Its size is read again at every operation that touches it, and
at each verb of `Sync`, through a link that hears of it after the strategy.
"""

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
from dist_lab.layout.layout import local_numel
from dist_lab.step.grad_elsewhere import real_grad
from dist_lab.step.protocol import Phase, Sync
from dist_lab.torch_private import TorchDispatchMode, storage_key

KINDS = (
    "parameters", "gradients", "optimizer", "gathered", "buffers", "module_buffers", "activations",
)  # fmt: skip


@contextmanager
def measured(job: Job, optimizer: torch.optim.Optimizer) -> Iterator["LiveBytes"]:
    """Counts what is alive in a step that is taken inside the block. Then ask for `.by_kind()`."""
    live = LiveBytes()
    naming = Naming(live, job)
    naming.look()
    naming.look_at(optimizer)
    with job.listening(naming), naming.at_each_gradient(), live:
        yield live
        naming.look_at(optimizer)  # which has made its state meanwhile


@dataclass(frozen=True)
class Peak:
    """Bytes. The kinds of `at_peak` add up to `total`; each of `own` has been at another moment."""

    total: int
    at_peak: Mapping[str, int]
    own: Mapping[str, int]

    def worst(self, other: "Peak") -> "Peak":
        """Of two steps: the one with the higher peak, and each kind's own highest."""
        higher = max(self, other, key=lambda peak: peak.total)
        own = {kind: max(self.own[kind], other.own[kind]) for kind in KINDS}
        return Peak(higher.total, higher.at_peak, own)

    def to_dict(self) -> dict[str, dict[str, int]]:
        return {"at_peak": dict(self.at_peak), "own_peak": dict(self.own)}


NOTHING = Peak(0, dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0))


def by_layout(job: Job, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer by what `job.layouts` says, and by nothing else.

    The formula of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 3) without its table of
    stages: so many elements lie here, each of so many bytes. Gradients are those that the optimizer
    steps on; while backward runs there may be whole ones as well. Of the optimizer it knows what it
    keeps for one element: 8 bytes of Adam's. Padding, and flags in a bucket, are not in it.
    """
    parameters = dict(job.model.named_parameters())
    element, tensor = bytes_of_state(optimizer)
    found = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for name, layout in job.layouts.items():
        if name in parameters:
            here = local_numel(layout, job.mesh.axes, job.mesh.coordinates)
            # What is split for the optimizer alone is whole in the model.
            stays = layout.shape.numel() if name in job.stepped else here
            found["parameters"] += stays * layout.dtype.itemsize
            if parameters[name].requires_grad:
                found["gradients"] += here * layout.dtype.itemsize
                found["optimizer"] += here * element + tensor
    return found


def bytes_of_state(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """What it keeps for an element of a parameter, and besides for a parameter: a step count."""
    element = tensor = 0
    if optimizer.state:
        largest = max(optimizer.state, key=Tensor.numel)
        for value in optimizer.state[largest].values():
            if isinstance(value, Tensor) and value.shape == largest.shape:
                element += value.element_size()
            elif isinstance(value, Tensor):
                tensor += value.nbytes
    return element, tensor


class LiveBytes(TorchDispatchMode):
    """Counts while entered. `held` are tensors that are alive already.

    Attributes:
        live, peak: bytes.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        # Those alive, by address, with the reference that tells of their end as long as it is kept.
        self._known: dict[int, tuple[weakref.ref[Any], _Storage]] = {}
        self._changes: list[tuple[_Storage, int]] = []  # all there ever were, in order
        for tensor in held:
            self.note(tensor)

    def note(self, tensor: Tensor, kind: str = "activations") -> None:
        """This tensor is alive and of that kind; its storage may have been resized."""
        if tensor.is_meta:  # it has a size, and no memory
            return
        local = local_part(tensor)
        storage, key = local.untyped_storage(), storage_key(local)
        if key not in self._known:  # views and in-place results share what is counted already
            self._known[key] = weakref.ref(storage, partial(self._gone, key)), _Storage()
        _, known = self._known[key]
        known.kind = min(known.kind, KINDS.index(kind))
        self._resized(known, storage.nbytes())

    def by_kind(self) -> Peak:
        """Of all that was seen until now: see [Note: what a storage is for]."""
        now, own, at_peak = (dict.fromkeys(KINDS, 0) for _ in range(3))
        live = peak = 0
        for storage, change in self._changes:
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
        self._known.clear()  # what dies from now on is nobody's business

    def _resized(self, storage: "_Storage", size: int) -> None:
        if size != storage.size:
            self._changes.append((storage, size - storage.size))
            self.live += size - storage.size
            self.peak = max(self.peak, self.live)
            storage.size = size

    def _gone(self, key: int, reference: Any) -> None:
        _, storage = self._known.pop(key)
        self._resized(storage, 0)


class _Storage:
    """What is known of one: its size now, and its kind, as a place in KINDS."""

    def __init__(self) -> None:
        self.size, self.kind = 0, len(KINDS) - 1


class Naming(Sync):
    """Hears of every verb after the strategy, and says of what it then finds what it is for."""

    def __init__(self, live: LiveBytes, job: Job) -> None:
        self.live, self.job = live, job

    def look(self) -> None:
        """At all there is but the optimizer."""
        for parameter in self.job.parameters():
            self.live.note(parameter, "parameters")
        for buffer in self.job.model.buffers():
            self.live.note(buffer, "module_buffers")
        self._gradients(dict(self.job.model.named_parameters()))
        self._held()

    def look_at(self, optimizer: torch.optim.Optimizer) -> None:
        for tensor in state_of(optimizer):
            self.live.note(tensor, "optimizer")

    @contextmanager
    def at_each_gradient(self) -> Iterator[None]:
        """Look at a gradient before the strategy does, which may send it and drop it at once."""
        leaves = dict(self.job.model.named_parameters()) | dict(self.job.leaves)

        def note(leaf: Tensor) -> None:
            if leaf.grad is not None:
                self.live.note(leaf.grad, "gradients")

        trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
        hooks = [leaf.register_post_accumulate_grad_hook(note) for leaf in trained]
        yield
        for hook in hooks:
            hook.remove()

    def unshard(self, unit: str, phase: Phase) -> None:
        self._held()
        for module in self.job.model.get_submodule(unit).modules():
            for name in module._parameters:
                cast = module.__dict__.get(name)
                if isinstance(cast, Tensor):
                    self.live.note(cast, "gathered")

    def reshard(self, unit: str, phase: Phase) -> None:
        self._held()

    def grads_ready(self, names: Sequence[str], *, last: bool) -> None:
        self._gradients(names)
        self._held()

    finish = after_step = look

    def _gradients(self, names: Iterable[str]) -> None:
        for name in names:
            for held in (self.job.leaves.get(name), self.job.model.get_parameter(name)):
                if held is not None and (gradient := real_grad(held)) is not None:
                    self.live.note(gradient, "gradients")

    def _held(self) -> None:
        """What the strategy keeps, and what it borrows, whatever size that now has."""
        for kind, tensor in self.job.sync.extra_memory():
            self.live.note(tensor, kind)
        for leaf in self.job.leaves.values():
            if local_part(leaf).untyped_storage().nbytes() >= local_part(leaf).nbytes:
                self.live.note(leaf, "gathered")  # it has memory now


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from _tensors(item)


def state_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors of its state, and of an optimizer that it drives, as torch's sharded one does."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for inner in vars(optimizer).values():
        if isinstance(inner, torch.optim.Optimizer):
            yield from state_of(inner)
