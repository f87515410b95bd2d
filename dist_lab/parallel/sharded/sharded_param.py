"""A parameter in two: what of it stays on this rank, and the whole of it, while that is borrowed.

[Note: two tensors of one name]

    module._parameters["weight"]    the local part: what optimizers, norms and checkpoints see
    module.__dict__["weight"]       the whole: what a forward computes with; Python finds it first

The whole is a leaf, so backward leaves its gradient in `whole.grad`; a strategy sums that over the
ranks into `local.grad`. No name changes, and when the whole is hidden the module is what it was.

The whole keeps its identity for good, because autograd remembers it from forward to backward. Only
the memory behind it goes and comes back: its storage is made empty, and grows again. Who fills it
does so through `rows`, of which autograd does not know, so that nothing seems to have been modified
since it was saved.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.layout.layout import Shard, shard_of
from dist_lab.mesh.mesh import Axis
from dist_lab.transforms.offload import Make

Place = tuple[nn.Module, str]  # a module, and the name under which it holds a parameter


def places(model: nn.Module) -> dict[str, list[Place]]:
    """Where each parameter stands, by the first of its names; a tied one stands in several places.

    Raises:
        UserError: a recurrent layer, which keeps its weights where nothing can be put before them.
    """
    name_of = {p: name for name, p in model.named_parameters()}
    found: dict[str, list[Place]] = {name: [] for name in name_of.values()}
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UserError(f"{path} is recurrent and holds its weights twice: it cannot be split")
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found[name_of[parameter]].append((module, attribute))
    return found


@dataclass(frozen=True)
class Split:
    """One parameter under a strategy that splits it.

    Attributes:
        local: this rank's part; in the module from now on.
        whole: the leaf that forwards use, in the dtype of compute.
        rows: the memory of `whole` as (size, elements of a piece); the last may be padding.
        trained: when it was split. One that is frozen since gets no gradient.
    """

    name: str
    places: list[Place]
    local: nn.Parameter
    whole: nn.Parameter
    rows: Tensor
    trained: bool

    def show(self) -> None:
        for module, attribute in self.places:
            module.__dict__[attribute] = self.whole

    def hide(self) -> None:
        for module, attribute in self.places:
            module.__dict__.pop(attribute, None)

    def grow(self) -> None:
        self.rows.untyped_storage().resize_(self.rows.numel() * self.rows.element_size())

    def shrink(self) -> None:
        self.rows.untyped_storage().resize_(0)

    def check(self, memory: Tensor) -> None:
        """Raises UserError if the local part is not in `memory` any more, where others read it."""
        if self.local.requires_grad and not self.trained:
            raise UserError(
                f"{self.name} was frozen when parallelize() was called; unfreeze it before, or "
                "freeze it again"
            )
        here = [module._parameters[attribute] for module, attribute in self.places]
        now = next((found for found in here if found is not self.local), self.local)
        inside = self.local.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        if now is not self.local or self.local.dtype != memory.dtype or not inside:
            raise UserError(
                f"{self.name} was moved, cast or replaced after parallelize() (it was "
                f"{describe(memory)}, it is {describe(now)}); do that before, and load values by "
                "job.load_full_state_dict()"
            )


def beginning(rows: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of that shape on the memory of `rows`, which is then let go."""
    flat = rows.data.view(-1)[: math.prod(shape)]  # .data: not a view for autograd
    rows.untyped_storage().resize_(0)
    return flat.view(shape)


def split(name: str, own: list[Place], local: Tensor, whole: Tensor, rows: Tensor) -> Split:
    """Put the local part into the model."""
    parameter = put(own, local)
    trained = parameter.requires_grad
    return Split(name, own, parameter, nn.Parameter(whole, trained), rows, trained)


def put(own: Sequence[Place], tensor: Tensor) -> nn.Parameter:
    """Make it the parameter wherever that stands, trained as before."""
    before = parameter_at(own)
    parameter = nn.Parameter(tensor, before.requires_grad)
    parameter.__dict__.update(before.__dict__)  # what a user has written on it
    for module, attribute in own:
        module._parameters[attribute] = parameter
    return parameter


def parameter_at(own: Sequence[Place]) -> nn.Parameter:
    """The parameter that stands there."""
    module, attribute = own[0]
    parameter = module._parameters[attribute]
    assert parameter is not None, attribute
    return parameter


def describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def owners(found: Mapping[str, list[Place]], units: Mapping[str, nn.Module]) -> dict[str, str]:
    """The unit of each parameter: the innermost that contains every place where it stands.

    So one that is tied across units belongs to what contains them all, in the end to the model
    itself, the unit "", and is whole as long as any of them may need it.
    """
    within = {name: set(module.modules()) for name, module in units.items()}
    owner = {}
    for name, own in found.items():
        around = [u for u, modules in within.items() if all(module in modules for module, _ in own)]
        owner[name] = min(around, key=lambda unit: len(within[unit]))
    return owner


def used_by(groups: Sequence["Group"], units: Mapping[str, nn.Module]) -> dict[str, list["Group"]]:
    """Unit -> the groups that must be whole while it is used: its own, and of the units around it
    those that stand somewhere in it.
    """
    within = {name: set(module.modules()) for name, module in units.items()}

    def needs(unit: str, group: "Group") -> bool:
        around = units[unit] in within[group.unit]
        stands = any(module in within[unit] for p in group.parts for module, _ in p.places)
        return group.unit == unit or (around and stands)

    return {unit: [group for group in groups if needs(unit, group)] for unit in units}


def piece_length(shape: torch.Size, size: int) -> int:
    """Elements in one of `size` pieces along dim 0, the largest; a 0-dim tensor is one piece.

    >>> piece_length(torch.Size([10, 3]), 4), piece_length(torch.Size([]), 4)
    (9, 1)
    """
    return -(-shape[0] // size) * math.prod(shape[1:]) if shape else 1


def local_value(value: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of a value; of a 0-dim one, which only the first rank keeps, as a vector."""
    if value.dim():
        return shard_of(value, Shard(0), axis.size, axis.index)
    return value.flatten()[axis.index :]


class Group:
    """Parameters of one unit and dtype, side by side in one piece of memory and in one message.

        flat  = [ rows of a | rows of b | ... ]                       this rank's parts
        total = [ gradient of these rows of a | of b | ... | flags ]  a flag for each: who used it

    Pieces are as long on every rank; one that has fewer rows than others has padding at its end.

    Args:
        members: name -> where it stands.
        dtype: what is kept, and what is gathered and computed with.
        axis, gather_axis: where gradients and parameters travel.
        full_value: gives the whole of a parameter; each is asked for, and let go, in turn.
        keep: makes the memory for the parts, where that is not the memory for compute.
    """

    def __init__(
        self,
        unit: str,
        members: Mapping[str, list[Place]],
        dtype: tuple[torch.dtype, torch.dtype],
        axis: Axis,
        gather_axis: Axis,
        full_value: Callable[[str], Tensor],
        keep: Make | None,
    ) -> None:
        self.unit, self.axis, self.gather_axis = unit, axis, gather_axis
        kept, computed = dtype
        device = axis.wire.device
        shapes = [parameter_at(own).shape for own in members.values()]
        self.lengths = [piece_length(shape, axis.size) for shape in shapes]
        length = sum(self.lengths)
        self.computed = computed
        # What others read; where it is not the parts themselves, it is filled for each gather.
        self.sent = None if keep else ops.shared_buffer(length, computed, gather_axis)
        if keep:
            self.flat = keep(length, kept)
        elif self.sent is not None and kept == computed:
            self.flat = self.sent
        else:
            self.flat = torch.zeros(length, dtype=kept, device=device)
        self.parts: list[Split] = []
        pieces = self.flat.split(self.lengths)
        for (name, own), shape, piece in zip(members.items(), shapes, pieces, strict=True):
            rows = torch.empty(axis.size, len(piece), dtype=computed, device=device)
            whole = beginning(rows, shape)
            value = local_value(full_value(name), axis)
            local = piece[: value.numel()].view(value.shape).copy_(value)
            self.parts.append(split(name, own, local, whole, rows))
            del value  # or it would be there still when the next one is asked for
        self.trained = [part for part in self.parts if part.local.requires_grad]
        by_name = dict(zip(members, self.lengths, strict=True))
        self.reduced_lengths = [by_name[part.name] for part in self.trained]
        self.reduced = sum(self.reduced_lengths) + len(self.trained)
        self.sum_in = kept
        self.users: set[str] = set()  # units that are open and need it
        self.gathering: ops.Pending | None = None
        self.is_whole = False
        self.missing: set[str] = set()  # gradients that this micro-batch still has to bring
        self.visits = 0  # of its unit in forward, which backward has still to come through
        self.complete = False  # no gradient is to come before it is reduced
        self.total: Tensor | None = None
        self.incoming: Tensor | None = None
        self.reducing: ops.Pending | None = None

    def check(self) -> None:
        for part in self.parts:
            part.check(self.flat)
            part.whole.requires_grad_(part.local.requires_grad)

    # --- parameters: W[D_X, F] -> W[D, F] ---------------------------------------------------------

    def start_gather(self) -> bool:
        """Whether there was a need to."""
        if self.is_whole or self.gathering is not None:
            return False
        for part in self.parts:
            part.grow()
        rows = [part.rows for part in self.parts]
        with self.gather_axis.wire.during(unit=self.unit or "root"):
            self.gathering = ops.all_gather_coalesced(rows, self._to_send(), self.gather_axis)
        return True

    def _to_send(self) -> Tensor:
        if self.sent is None:
            return self.flat.to(self.gather_axis.wire.device, self.computed)
        if self.sent is not self.flat:
            self.wait_for_readers()
            self.sent.copy_(self.flat)
        return self.sent

    def finish_gather(self) -> None:
        if self.gathering is not None:
            pending, self.gathering = self.gathering, None
            pending.wait()
            self.is_whole = True
            for part in self.parts:
                part.show()

    def free(self) -> None:
        self.finish_gather()  # who is still writing must not write into what is somebody else's
        if self.is_whole:
            self.is_whole = False
            for part in self.parts:
                part.hide()
                part.shrink()

    def wait_for_readers(self) -> None:
        """Wait until no rank reads what is about to be written."""
        if self.sent is not None:
            ops.wait_for_readers(self.sent, self.gather_axis)

    # --- gradients: dW[D, F]{U_X} -> dW[D_X, F] ---------------------------------------------------

    def start_reduce(self, staging: Tensor) -> None:
        """Give away this micro-batch's gradients."""
        gradients = [part.whole.grad for part in self.trained]
        used = torch.tensor([g is not None for g in gradients], device=staging.device)
        self.incoming = torch.empty(self.reduced, dtype=self.flat.dtype, device=staging.device)
        with self.axis.wire.during(unit=self.unit or "root"):
            self.reducing = ops.reduce_scatter_coalesced(
                self.incoming,
                [*gradients, used.repeat(self.axis.size)],
                [*self.reduced_lengths, len(used)],
                staging,
                self.axis,
            )
        for part in self.trained:
            part.whole.grad = None

    def finish_reduce(self) -> None:
        """Add them to those of the micro-batches before."""
        assert self.reducing is not None, self.unit
        self.reducing.wait()
        incoming, self.reducing, self.incoming = self.incoming, None, None
        if incoming is None:  # given up since
            return
        self.drop_cleared()
        self.total = incoming if self.total is None else self.total.add_(incoming)
        self.hand_out()

    def drop_cleared(self) -> None:
        """What `zero_grad()` has made None since is not part of the total any more."""
        if all(part.local.grad is None for part in self.trained):
            self.total = None
        if self.total is not None:
            *pieces, flags = self._pieces(self.total)
            for part, piece, flag in zip(self.trained, pieces, flags, strict=True):
                if part.local.grad is None:  # cleared, or not used yet
                    piece.zero_()
                    flag.zero_()

    def start_sum(self, replicate: Axis) -> ops.Pending:
        """dW[D_X, F]{U_Y} -> dW[D_X, F]"""
        if self.total is None:  # used by another replica alone
            self.total = torch.zeros(self.reduced, dtype=self.flat.dtype, device=self.flat.device)
        with self.axis.wire.during(unit=self.unit or "root"):
            return ops.all_reduce_into(self.total, replicate)

    def hand_out(self) -> None:
        """Make `.grad` of each local part its piece of the total.

        If no rank used it, it stays as it was: None, or zeros.
        """
        assert self.total is not None, self.unit
        *pieces, flags = self._pieces(self.total)
        for part, piece, used in zip(self.trained, pieces, (flags > 0).tolist(), strict=True):
            own = piece[: part.local.numel()].view_as(part.local)
            if used:
                part.local.grad = own.to(part.local.device)

    def _pieces(self, total: Tensor) -> Sequence[Tensor]:
        return total.split([*self.reduced_lengths, len(self.trained)])

    def forget(self) -> None:
        for part in self.trained:
            part.whole.grad = None
        self.missing, self.complete, self.visits = set(), False, 0
        self.incoming = None  # and who is still at work on it is waited for before the next

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            yield "gathered", part.rows
            if part.whole.grad is not None:
                yield "gradients", part.whole.grad
        if self.sent is not None and self.sent is not self.flat:
            yield "buffers", self.sent
        for tensor in (self.total, self.incoming):
            if tensor is not None:
                yield "gradients", tensor
