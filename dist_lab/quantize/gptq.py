"""GPTQ of a model: block after block, with the Linears of a block shared out over the ranks.

gptq_layer.py has the algorithm, for one matrix. Here is what a model, and several ranks, add to it.

    per block:   run it on the rows, and add up H of each Linear's input    H{U_X} -> H
                 each rank solves some of the Linears                       H, W -> Q on one rank
                 all get all of the codes, and set the weights              Q -> Q on all ranks
                 run it again, for the inputs of the next block

So a block is calibrated on the outputs of quantised blocks. (Its own Linears all see the inputs
that its unquantised ones make.) Running blocks and adding up H is split over the rows exactly.
Solving is split by Linears: it is cubic in the inputs of a Linear, so the widest one alone may take
longer than all others together, and then more ranks do not help. Sums follow one binary tree over
virtual shards, and a Linear is solved on one rank: codes and scales have the same bits on any
number of ranks, if all have the same number of threads.

Letters: F rows (outputs), D columns (inputs), X the data axis.
"""

import json
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dist_lab.comm import ops
from dist_lab.comm.agree import together
from dist_lab.errors import UserError, shown
from dist_lab.mesh.mesh import Axis
from dist_lab.quantize.blocks import check_linears, linears_of
from dist_lab.quantize.calibrate import (
    Calibration,
    Result,
    broadcast_quantized,
    observe,
    set_weights,
    share_out,
    walk,
)
from dist_lab.quantize.formula import Quantized, Scheme, precise, round_to_nearest
from dist_lab.quantize.gptq_layer import Solution, by_blocks, solve
from dist_lab.quantize.hessian import HessianObserver, output_error


def quantize(
    model: nn.Module, calibration: Calibration, scheme: Scheme, *, act_order: bool = False,
    static_groups: bool = False, damping: float = 0.01, block: int = 128,
) -> Result:  # fmt: skip
    """Quantise all Linears of the model's blocks, in place. Collective.

    Args:
        act_order, static_groups, damping: see `gptq_layer.solve`.
        block: the number of columns between two products: speed, not codes, depends on it.

    Raises:
        UserError: see `check_linears`, `walk` and `inverse_factor`.
    """
    check_linears(model, scheme)
    if type(block) is not int or block < 1:
        raise UserError(f"block={shown(block)} is no number of columns; give 128")
    solver = partial(
        solve, scheme=scheme, act_order=act_order, static_groups=static_groups, damping=damping,
        method=partial(by_blocks, block=block),
    )  # fmt: skip
    axis, result = calibration.axis, Result()
    for layer in walk(model, calibration):
        linears = linears_of(layer.module)
        observers = observe(layer, lambda name: HessianObserver(len(calibration.shards)))
        stacks = stacks_of(observers, scheme)
        totals = {each: each.total(axis) for each in dict.fromkeys(observers.values())}
        hessians = {first: totals[observers[first]] for first in stacks}
        owners = share_out(costs(stacks, linears), axis)
        solved: dict[str, Quantized] = {}  # on this rank
        notes: dict[str, list[str]] = {}
        with together(axis):  # an input may be not finite
            for first, names in stacks.items():
                if owners[first] == axis.index:
                    weight = torch.cat([precise_weight(linears[name]) for name in names])
                    solution = solver(weight, hessians[first])
                    solved |= unstacked(solution.quantized, {n: linears[n] for n in names})
                    tokens = observers[first].tokens * axis.size
                    notes[first] = [
                        f"{', '.join(f'{layer.name}.{name}' for name in names)}: {note}"
                        for note in notes_on(weight, hessians[first], solution, tokens, damping)
                    ]
        weights = {
            name: broadcast_quantized(solved.get(name), linears[name], scheme, axis, owners[first])
            for first, names in stacks.items()
            for name in names
        }
        set_weights(layer.module, weights)
        result.weights.update({f"{layer.name}.{name}": weights[name] for name in linears})
        result.notes.extend(gathered(notes, stacks, axis))
    return result


def stacks_of(observers: Mapping[str, HessianObserver], scheme: Scheme) -> dict[str, list[str]]:
    """Linears that are solved together, as their input is the same: the first one -> all of them.

    See [Note: rows]. One scale for a whole matrix is the one thing that its rows share.
    """
    stacks: dict[str, list[str]] = {}
    for name, observer in observers.items():
        first = next(other for other in observers if observers[other] is observer)
        stacks.setdefault(name if scheme.group is None else first, []).append(name)
    return stacks


def costs(stacks: Mapping[str, list[str]], linears: Mapping[str, nn.Linear]) -> dict[str, float]:
    """About how long each stack takes to solve, in units of 12 ps: measured on one core.

    D^3 is for U, F D^2 for moving weights and for the error of rounding to nearest, and D for the
    Python of each column.
    """
    sizes = {
        first: (sum(linears[name].out_features for name in names), linears[first].in_features)
        for first, names in stacks.items()
    }
    return {first: d**3 + 7 * f * d**2 + 4e6 * d for first, (f, d) in sizes.items()}


def unstacked(quantized: Quantized, linears: Mapping[str, nn.Linear]) -> dict[str, Quantized]:
    """The quantised weight of each Linear of a stack, from that of the stack."""
    parts, start = {}, 0
    for name, linear in linears.items():
        rows = slice(start, start + linear.out_features)
        parts[name] = Quantized(quantized.codes[rows], quantized.grid.rows(rows))
        start = rows.stop
    return parts


def notes_on(
    weight: Tensor, hessian: Tensor, solution: Solution, tokens: int, damping: float
) -> list[str]:
    """What the user should know about the calibration of a matrix."""
    notes = []
    diagonal, columns = hessian.diagonal(), len(hessian)
    if dead := int((diagonal == 0).sum()):
        notes.append(f"{dead} dead columns: their inputs were always 0, and so are they now")
    if tokens < columns:
        notes.append(f"{tokens} calibration tokens are fewer than {columns} columns: give more")
    if solution.factor.damping != damping:
        more = solution.factor.damping
        notes.append(f"its Hessian is singular with damping {damping:g}, so {more:g} was taken")
    weight = torch.where(diagonal > 0, weight, 0)
    change = weight - round_to_nearest(weight, solution.quantized.grid.scheme).values()
    nearest = output_error(change, hessian)
    error = float(solution.errors.sum())
    if error > 1.001 * nearest:  # both have rounding errors
        notes.append(
            f"the error {error:.4g} is larger than that of rounding to nearest, {nearest:.4g}"
        )
    return notes


def gathered(
    notes: Mapping[str, list[str]], stacks: Mapping[str, list[str]], axis: Axis
) -> list[str]:
    """The notes of all ranks, in the order of the Linears. Collective."""
    by_rank = ops.all_gather_bytes(json.dumps(notes).encode(), axis)
    together = {first: lines for data in by_rank for first, lines in json.loads(data).items()}
    return [line for first in stacks for line in together[first]]


def precise_weight(linear: nn.Linear) -> Tensor:
    """W (F, D) in the dtype in which it is solved."""
    return linear.weight.detach().to(precise(linear.weight.dtype))
