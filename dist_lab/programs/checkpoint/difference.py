"""checkpoint.py diff: where two checkpoints differ. Their layouts may be different ones.

Two are equal if they have the same step, the same tensors with the same bits, the same numbers of
the optimizer and the same tokenizer. Layouts, settings and random generators are listed, and decide
nothing.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lab.checkpoint.exchange.ours import numbers_of, optimizer_of
from dist_lab.checkpoint.exchange.tensors import same_bits
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import shown
from dist_lab.observe.console import empty_table, watched, wide_console
from dist_lab.programs.checkpoint.contents import say
from dist_lab.programs.checkpoint.settings import Diff
from dist_lab.programs.cli.find import newest
from dist_lab.programs.cli.mesh_text import mesh_in_words

FIRST = 12  # tensors that are listed without --tensors


@dataclass(frozen=True)
class Difference:
    """How much a tensor differs.

    Attributes:
        elements: how many, of `total`.
        largest: the largest |a - b|; relative: over the largest |b|.
    """

    name: str
    elements: int
    total: int
    largest: float
    relative: float


def compare(config: Diff) -> int:
    """Print what differs. Returns 0 if the two are equal, 1 if not."""
    a, b = newest(config.first), newest(config.second)
    a.verify()
    b.verify()
    console = wide_console()
    reasons = [*_other_names(a, b), *_other_numbers(a, b)]
    different = [*differences(a, b)]
    if different:
        first = different[0]
        reasons.append(f"{len(different)} of {len(a.tensors)} tensors, first {in_words(first)}")
        table = empty_table(["tensor"], ["elements that differ", "largest", "relative"])
        for one in different if config.tensors else different[:FIRST]:
            count = f"{one.elements:,} of {one.total:,}"
            table.add_row(one.name, count, f"{one.largest:.1e}", f"{one.relative:.1e}")
        console.print(table)
        if len(different) > FIRST and not config.tensors:
            say(console, f"and {len(different) - FIRST} more: --tensors lists them all")
    for line in _of_the_runs(a, b):
        say(console, line)
    if reasons:
        common = sum(b.names().get(name) == kind for name, kind in a.names().items())
        say(console, f"they differ: {'; '.join(reasons)}")
        say(console, f"{common - len(different)} of {common} tensors that both have are equal")
        return 1
    say(console, f"they are equal: step {a.step}, {len(a.tensors)} tensors, to the bit")
    return 0


def differences(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Compare the tensors that both have, in one shape and dtype; one at a time is in memory."""
    for name, kind in watched([*a.names().items()], "tensors"):
        if b.names().get(name) == kind:
            one, other = a.read(name), b.read(name)
            if not same_bits(one, other):
                yield difference(name, one, other)


def difference(name: str, a: Tensor, b: Tensor) -> Difference:
    """
    >>> difference("w", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    Difference(name='w', elements=1, total=2, largest=2.0, relative=0.5)
    """
    wide = torch.complex128 if a.is_complex() else torch.float64
    one, other = a.to(wide), b.to(wide)
    apart = (one - other).abs()
    equal = (one == other) | (one.isnan() & other.isnan())
    largest = apart[~equal].max().item() if not equal.all() else 0.0  # else -0.0 and 0.0
    scale = other.abs().nan_to_num(0.0).max().item()
    relative = largest / scale if scale else math.inf if largest else 0.0
    bits = (_bits(a) != _bits(b)).any(-1)
    return Difference(name, int(bits.sum()), a.numel(), largest, relative)


def in_words(one: Difference) -> str:
    return (
        f"{one.name}: {one.elements:,} of {one.total:,} elements, by {one.largest:.1e} at most, "
        f"{one.relative:.1e} of the largest"
    )


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of each element: (elements, bytes)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _other_names(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    ours, theirs = a.names(), b.names()
    for these, others, which in ((ours, theirs, "first"), (theirs, ours, "second")):
        alone = [name for name in these if name not in others]
        if alone:
            more = f" and {len(alone) - 1} more" if alone[1:] else ""
            yield f"only the {which} has {alone[0]}{more}"
    odd = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if odd:
        kinds = [
            f"{str(dtype).removeprefix('torch.')}{list(shape)}"
            for shape, dtype in (ours[odd[0]], theirs[odd[0]])
        ]
        more = f", and {len(odd) - 1} more such" if odd[1:] else ""
        yield f"{odd[0]} is {kinds[0]} in the first and {kinds[1]} in the second{more}"


def _other_numbers(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    if a.step != b.step:
        yield f"the first is of step {a.step}, the second of step {b.step}"
    if optimizer_of(a) != optimizer_of(b):
        yield "the optimizers have different options"
    if numbers_of(a) != numbers_of(b):
        yield "the optimizers have different numbers"
    if a.tokenizer != b.tokenizer:
        yield "the tokenizers differ"


def _of_the_runs(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """What else differs: it does not make the state another one."""
    layouts = [f"{c.manifest['strategies']} on {mesh_in_words(c.manifest['mesh'])}" for c in (a, b)]
    if layouts[0] != layouts[1]:
        yield f"layout: {layouts[0]} in the first, {layouts[1]} in the second"
    for what in ("settings", "extra", "versions"):
        yield from _keys(what, a.manifest[what] or {}, b.manifest[what] or {})


def _keys(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    for key in (key for key in a if key in b and a[key] != b[key]):
        if isinstance(a[key], dict):
            yield f"{what}: {key} differs"
        else:
            yield f"{what}: {key} is {shown(a[key])} in the first, {shown(b[key])} in the second"
    for these, others, which in ((a, b, "first"), (b, a, "second")):
        alone = [key for key in these if key not in others and these[key] is not None]
        if alone:
            yield f"{what}: only the {which} has {', '.join(alone)}"
