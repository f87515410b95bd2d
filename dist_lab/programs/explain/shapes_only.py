"""Run a step without its numbers: every tensor has its size, and hardly any has values.

    with shapes_only(mesh):
        job = build(config, mesh, data)         405 billion parameters, in seconds and little memory

Below everything else in torch, a dispatch mode takes each operation. A large result is not
computed: it gets the size that the operation has on the meta device, and memory that nothing ever
touches, so that the kernel never provides it. All the rest is real: strategies, autograd, hooks,
storages and their lifetimes. So the code of a run has no branch for this, and what is counted is
what a run counts.

[Note: small tensors have values] A step makes decisions by values: which parameters were used,
whether a loss is finite, in what order gradients came. Those values are in small tensors, or in
small views of a large one, such as the flags at the end of a bucket. So an operation is computed if
all its tensors are small: floating-point numbers of up to `SMALL` bytes, masks of up to
`SMALL_MASKS`, and integers of up to `SMALL_INTEGERS`, such as token ids. Of a large vector that is
changed in place, the last elements are computed: there are flags. Likewise in memory that ranks
share, as if all ranks had the values of this one. A small result of a large tensor is made up: a
sum or a norm is 1, and a comparison is what zeros would give, so "is any of it not a number?" is
no.

[Note: what cannot be run so] An operation whose result has a size that depends on the values of a
large tensor, such as `nonzero`, is refused in one line; so is one that torch cannot run on the meta
device.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.explain import ends_only
from dist_lab.programs.explain.ends_only import FLAGS, end, untouched
from dist_lab.programs.explain.nested import key_of_sizes, leaves, mapped
from dist_lab.torch_private import TorchDispatchMode, of_plain_tensors, schema_of, storage_key

SMALL, SMALL_MASKS, SMALL_INTEGERS = 1 << 14, 1 << 20, 1 << 26  # bytes
EMPTY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}
RESIZES = {"aten::resize_", "aten::set_"}
RESHAPES = {
    "aten::as_strided_", "aten::detach_", "aten::squeeze_", "aten::swapaxes_", "aten::swapdims_",
    "aten::t_", "aten::transpose_", "aten::unsqueeze_",
}  # fmt: skip


@contextmanager
def shapes_only(mesh: Mesh, small: int = SMALL) -> Iterator[None]:
    """Inside the block, operations on large tensors are not computed. For a mesh of `dry_run`.

    Args:
        small: bytes of the largest tensor of floating-point numbers that has values.

    Raises:
        UserError: an operation cannot be run so; see [Note: what cannot be run so].
    """
    files, mesh.comm.files = mesh.comm.files, ends_only.FILES
    try:
        with ShapesOnly(small):
            yield
    finally:
        mesh.comm.files = files


class ShapesOnly(TorchDispatchMode):
    """Computes small tensors, and only the sizes of large ones."""

    def __init__(self, small: int = SMALL) -> None:
        super().__init__()
        self.small = small
        self._sizes: dict[Any, Any] = {}  # operation and arguments -> its result, of `Size`s

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return of_plain_tensors(self._run, func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        plan, tensors = plan_of(func), list(leaves([args, *kwargs.values()], Tensor))
        device = str(kwargs.get("device"))
        on_meta = device == "meta" or any(t.is_meta for t in tensors)
        all_small = all(self._is_small(t.dtype, _elements(t)) for t in tensors)
        stays = device in ("meta", "None")  # another device: it moves a tensor there
        if on_meta and stays and plan.in_place is None and not plan.is_view:
            return self._new_on_meta(func, args, kwargs, tensors)
        if plan.is_view or on_meta or (all_small and plan.in_place is not None):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            if all_small:
                return func(*args, **kwargs)
            return ends_only.collective(plan.name, func, args, kwargs)
        if plan.name == "aten::equal" and not all_small:
            return args[0].shape == args[1].shape
        if plan.is_number or plan.name in RESHAPES:
            return func(*args, **kwargs)
        if plan.in_place is None:
            return self._new(func, args, kwargs, tensors, all_small)
        if plan.name in RESIZES:
            raise _refused(func, "it changes the memory of a large tensor")
        if {t.shape for t in tensors if t.dim()} == {tensors[0].shape} and tensors[0].dim() == 1:
            func(*mapped(args, Tensor, end), **mapped(kwargs, Tensor, end))
        written = [args[i] if i < len(args) else kwargs[name] for i, name in plan.in_place]
        return None if not written else written[0] if len(written) == 1 else tuple(written)

    def _is_small(self, dtype: torch.dtype, elements: int) -> bool:
        """Whether operations on such a tensor are computed; see [Note: small ...]."""
        if dtype.is_floating_point or dtype.is_complex:
            return elements * dtype.itemsize <= self.small
        return elements * dtype.itemsize <= (SMALL_MASKS if dtype is torch.bool else SMALL_INTEGERS)

    def _new(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], all_small: bool
    ) -> Any:
        """The result of an operation that returns new tensors."""
        try:
            result = self._result(func, args, kwargs, tensors)
        except RuntimeError as error:
            if all_small:
                return func(*args, **kwargs)
            raise _refused(func, str(error).splitlines()[0]) from None
        sizes = leaves(result, Size)
        if all_small and all(self._is_small(size.dtype, prod(size.shape)) for size in sizes):
            value = func(*args, **kwargs)
            return value.fill_(1) if plan_of(func).name in EMPTY else value
        answer = not all_small and _answer_of_zeros(func, args, kwargs, tensors, result)
        return mapped(result, Size, lambda size: _untouched(size, tensors, answer))

    def _new_on_meta(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The same on the meta device, where many layers ask for the same."""
        result = self._result(func, args, kwargs, tensors)
        if any(size.offset or size.shares is not None for size in leaves(result, Size)):
            return func(*args, **kwargs)
        return mapped(result, Size, lambda size: torch.empty_strided(
            size.shape, size.stride, dtype=size.dtype, device="meta"))  # fmt: skip

    def _result(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What the operation returns, with a `Size` for each tensor."""
        key = key_of_sizes((args, kwargs))
        if key is None:
            return _on_meta_device(func, args, kwargs, tensors)
        if (func, key) not in self._sizes:
            self._sizes[func, key] = _on_meta_device(func, args, kwargs, tensors)
        return self._sizes[func, key]


@dataclass(frozen=True)
class Plan:
    """What the schema of an operation says.

    Attributes:
        name: such as aten::add.
        is_view: its result shares the memory of an argument.
        is_number: it returns no tensor, and changes none.
        in_place: (position, name) of the arguments that it changes and returns; None: it returns
            new tensors.
        has_device: it takes a device.
    """

    name: str
    is_view: bool
    is_number: bool
    in_place: tuple[tuple[int, str], ...] | None
    has_device: bool


@cache
def plan_of(func: Any) -> Plan:
    schema = schema_of(func)
    written = {
        frozenset(argument.alias_info.before_set): (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    returned = [
        None if value.alias_info is None else written.get(frozenset(value.alias_info.before_set))
        for value in schema.returns
    ]
    in_place = tuple(place for place in returned if place is not None)
    return Plan(
        name=schema.name,
        is_view=func.is_view,
        is_number=not written and not any("Tensor" in str(r.type) for r in schema.returns),
        in_place=in_place if written and len(in_place) == len(returned) else None,
        has_device=any(argument.name == "device" for argument in schema.arguments),
    )


def _elements(t: Tensor) -> int:
    """Of a view of a large memory, those of the memory, unless they may be flags at its end."""
    few = t.is_meta or t.numel() <= FLAGS
    return t.numel() if few else t.untyped_storage().nbytes() // t.itemsize


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A tensor that an operation returns.

    Attributes:
        memory: bytes of its storage.
        shares: the position of the argument whose memory it shares; None: it has its own.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    memory: int
    shares: int | None


def _on_meta_device(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    """The operation's result on the meta device, with a `Size` for each tensor."""
    twins = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
             for t in tensors}  # fmt: skip
    # A number in a tensor stays what it is, because it takes part in promotions of dtypes.
    numbers = {id(t) for t in tensors if not t.dim()}
    kwargs = dict(kwargs)
    if plan_of(func).has_device:
        kwargs["device"] = torch.device("meta")
    if "generator" in kwargs:
        kwargs["generator"] = None

    def run(kept: set[int]) -> Any:
        def twin(t: Tensor) -> Tensor:
            return t if id(t) in kept else twins[id(t)]

        return func(*mapped(args, Tensor, twin), **mapped(kwargs, Tensor, twin))

    try:
        value = run(numbers)
    except RuntimeError:
        if not numbers:
            raise
        value = run(set())  # it takes no number beside tensors on meta
    shared = {storage_key(twins[id(t)]): i for i, t in enumerate(tensors)}

    def size(t: Tensor) -> Size:
        memory = t.untyped_storage().nbytes()
        shares = shared.get(storage_key(t))
        offset = int(t.storage_offset())
        return Size(t.shape, t.stride(), offset, t.dtype, memory, shares)

    return mapped(value, Tensor, size)


def _untouched(size: Size, arguments: list[Tensor], answer: bool) -> Tensor:
    """A tensor of this size in untouched memory. A small one is all ones, zeros or `answer`."""
    offset, elements = size.offset, size.memory // size.dtype.itemsize
    if size.shares is not None:
        whole = arguments[size.shares]
        offset += int(whole.storage_offset())
    elif size.memory <= SMALL or answer:
        value = 1.0 if size.dtype.is_floating_point else answer
        whole = torch.full((elements,), value, dtype=size.dtype, device="cpu")
    else:
        whole = torch.frombuffer(untouched(size.memory), dtype=size.dtype)
    result = torch.empty(0, dtype=size.dtype, device="cpu")  # to autograd a view is something else
    return result.set_(whole.untyped_storage(), offset, size.shape, size.stride)


def _answer_of_zeros(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> bool:
    """What an operation on large tensors that returns true or false would return for zeros."""
    if not isinstance(result, Size) or result.dtype != torch.bool:
        return False

    def zero(t: Tensor) -> Tensor:
        return torch.zeros([1] * t.dim(), dtype=t.dtype, device="cpu")

    try:
        return bool(func(*mapped(args, Tensor, zero), **mapped(kwargs, Tensor, zero)).any())
    except (RuntimeError, IndexError):  # it needs other shapes
        return False


def _refused(func: Any, why: str) -> UserError:
    return UserError(
        f"{plan_of(func).name} cannot be run without values ({why.rstrip('.')}); add --values, to "
        "run the step in real memory"
    )
