"""Runs a model block after block over calibration rows, which several ranks share.

    rows        0   1   2   3   4   5   6   7         V = 8 virtual shards of equally many rows
    2 ranks     rank 0: 0-3     rank 1: 4-7           each rank runs its own shards, one at a time
    sums        along one binary tree over the shards: on 1, 2, 4 or 8 ranks the same bits

A method that quantises after training looks at the inputs of each Linear. It goes through the
blocks in order: it observes the inputs of a block's Linears, changes the block's weights, and runs
the block again for the inputs of the next one. So the next block sees the errors made so far, and
can make up for them. Only the hidden states between two blocks are kept.

    for block in walk(model, calibration):
        observers = observe(block, make_observer)
        ...                                 # change the weights of block.module

All that a method needs of its ranks is here: their shards of the rows (`shards_of_rows`), sums over
all of them (`tree_sum`), and who solves which Linear (`share_out`, `broadcast_quantized`).

Letters: B rows in a shard, T tokens in each, D inputs of a Linear, F its outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import check_tensors_agree
from dist_lab.comm.by_hand.pairwise import add_in_pairs
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.activations import ActivationGrid
from dist_lab.quantize.blocks import Block, blocks_of, check_chain, first_call, linear_inputs
from dist_lab.quantize.formula import Grid, Quantized, Scheme, precise, round_to_nearest
from dist_lab.step.fixed_order.order import SHARDS, shards_of_each
from dist_lab.step.fixed_order.totals import aligned

Watch = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Calibration:
    """Rows of tokens in virtual shards, of which this rank has a subtree: see `shards_of_rows`.

    shards: this rank's virtual shards, each (B, T) int64, or images for a model that reads those
    axis: the data axis; size 1 in one process
    watch: yields the blocks one after another, and may show how far they are
    """

    shards: Sequence[Tensor]
    axis: Axis
    watch: Watch = iter


@dataclass(frozen=True)
class Result:
    """What a method returns. It has also changed the model, which computes with these weights.

    weights: the full name of each Linear -> its quantised weight
    notes: lines for the user, such as "model.layers.0.mlp.down_proj: 3 dead columns"
    inputs: the full name -> how the inputs are rounded, if they are. The model itself does not
        round them: see linear.py's `replace_linears`
    """

    weights: dict[str, Quantized] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, ActivationGrid] = field(default_factory=dict)


class Observer(Protocol):
    """Sees the inputs of a Linear."""

    def see(self, x: Tensor) -> None:
        """One virtual shard's inputs x (B*T, D). Called once per shard of this rank, in order."""


SomeObserver = TypeVar("SomeObserver", bound=Observer)


def shards_of_rows(rows: Tensor, axis: Axis, shards: int = SHARDS) -> Calibration:
    """This rank's virtual shards of all calibration rows. Collective.

    Args:
        rows: (rows, T), the same on every rank.
        shards: the number V of virtual shards, of all ranks together. Results depend on it.

    Raises:
        UserError: rows, shards and ranks do not divide, there are no rows, or ranks differ in them.
    """
    check_tensors_agree({"the calibration rows": rows}, axis)
    check_rows(len(rows), shards)
    own = shards_of_each(shards, axis.size, "shards=", f"shards={axis.size}")
    chunks = rows.to(axis.device).chunk(shards)[axis.index * own : (axis.index + 1) * own]
    return Calibration([aligned(chunk) for chunk in chunks], axis)


def walk(model: nn.Module, calibration: Calibration) -> Iterator[Block]:
    """Yields block after block. The caller may change the weights of each before the next.

    Raises:
        UserError: the blocks do not run one after another on one hidden tensor.
    """
    blocks = blocks_of(model)
    check_chain(model, blocks, calibration.shards[0][:1])
    calls = [first_call(model, blocks[0][1], shard) for shard in calibration.shards]
    inputs, others = [hidden for hidden, _ in calls], [others for _, others in calls]
    for i, (name, module) in enumerate(calibration.watch(blocks)):
        block = Block(name, module, inputs, others)
        yield block
        if i + 1 < len(blocks):
            inputs = block.run()


def observe(block: Block, make: Callable[[str], SomeObserver]) -> dict[str, SomeObserver]:
    """Run a block on each shard, and show each Linear's inputs to an observer.

    Linears with the same input, such as q, k and v, share one observer: the value of several names.

    Args:
        make: makes the observer of a Linear, given its name in the block.

    Returns:
        the name of each Linear in the block -> its observer.
    """
    observers: dict[str, SomeObserver] = {}
    first_of: dict[str, str] = {}  # the name of a Linear -> the first one with the same input
    for index in range(len(block.inputs)):
        inputs = linear_inputs(block, index)
        sharing = {name: next(n for n in inputs if inputs[n] is inputs[name]) for name in inputs}
        if not observers:
            first_of = sharing
            made = {name: make(name) for name in dict.fromkeys(first_of.values())}
            observers = {name: made[first] for name, first in first_of.items()}
        assert sharing == first_of, (sharing, first_of)
        for name in dict.fromkeys(first_of.values()):
            observers[name].see(inputs[name].flatten(0, -2))  # (B, T, D) -> (B*T, D)
    return observers


def set_weights(model: nn.Module, weights: Mapping[str, Quantized]) -> None:
    """Replace the weights of Linears by the values that their codes stand for, in place."""
    with torch.no_grad():
        for name, quantized in weights.items():
            model.get_parameter(f"{name}.weight").copy_(quantized.values())


# --- the ranks ------------------------------------------------------------------------------------


def tree_sum(parts: Sequence[Tensor], axis: Axis) -> Tensor:
    """The sum over the virtual shards of all ranks, along one binary tree. Collective.

    The same bits on any number of ranks.

    Args:
        parts: a term for each virtual shard of this rank, of equal shapes; a power of two of them.
    """
    assert len(parts) & (len(parts) - 1) == 0, f"{len(parts)} terms are no full subtree"
    local = add_in_pairs(parts, torch.add)
    return ops.all_reduce(local, replace(axis, pairwise=True))


def share_out(costs: Mapping[str, float], axis: Axis) -> dict[str, int]:
    """The position on the axis that does each piece of work: the costliest first, to the least
    busy rank (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Every rank computes the same answer, with no message.
    """
    busy = [0.0] * axis.size
    owners = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable: equal costs keep order
        owners[name] = busy.index(min(busy))
        busy[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def broadcast_quantized(
    quantized: Quantized | None, linear: nn.Linear, scheme: Scheme, axis: Axis, source: int
) -> Quantized:
    """The quantised weight of a Linear, from the rank at position `source` to all. Collective.

    Args:
        quantized: on the source; elsewhere it is not read.
    """
    if axis.index != source or quantized is None:
        assert axis.index != source, f"rank {source} has nothing to broadcast"
        zeros = torch.zeros_like(linear.weight, dtype=precise(linear.weight.dtype))
        quantized = round_to_nearest(zeros, scheme)  # its shapes and dtypes
    parts = [quantized.codes, quantized.grid.scale, quantized.grid.zero, quantized.grid.groups]
    on_device = [part.detach().to(axis.device) for part in parts]
    codes, scale, zero, groups = (ops.broadcast(part, axis, source) for part in on_device)
    return Quantized(codes, Grid(scheme, scale, zero, groups))


def check_rows(rows: int, shards: int) -> None:
    """Raise UserError unless rows divide into a power of two of virtual shards."""
    if shards < 1 or shards & (shards - 1):
        below = 1 << (max(shards, 1).bit_length() - 1)
        raise UserError(
            f"{shards} virtual shards are no power of two (shards=); give {below} or {2 * below}"
        )
    if rows == 0:
        raise UserError("there are no calibration rows (rows=); give at least one row a shard")
    if rows % shards:
        raise UserError(
            f"{rows} calibration rows do not divide into {shards} virtual shards (rows=); give "
            f"{-(-rows // shards) * shards}"
        )
