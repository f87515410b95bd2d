"""Runs a model one block at a time, and finds the inputs of a block's Linears.

A block is a module of one of the model's `units` classes: one layer of a transformer. The blocks
must run one after another, and each must take one hidden tensor, and return the next:

    x = embed(tokens);   per block: x = block(x, *others);   head(x)

`others` are the same for all blocks, such as positions or a mask. Then each block runs alone, and a
forward of the whole model is needed only up to the first one. `check_chain` runs one row through
the whole model to see that this is so.

Letters: B rows in a shard, T tokens in each, D inputs of a Linear.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab.errors import UserError
from dist_lab.quantize.formula import Scheme, check_groups, grid_of
from dist_lab.step.find_units import find_units

Others = tuple[tuple[Any, ...], dict[str, Any]]  # args after the first, kwargs


@dataclass(frozen=True)
class Block:
    """A block of the model, with its inputs over the calibration rows of this rank.

    name: its full name, `model.layers.0`
    module: the block
    inputs: the hidden states of each shard, (B, T, D)
    others: the other arguments of each shard's call, such as positions
    """

    name: str
    module: nn.Module
    inputs: Sequence[Tensor]
    others: Sequence[Others]

    def run(self) -> list[Tensor]:
        """The outputs of each shard, with the weights that the block has now."""
        return [self.run_shard(i) for i in range(len(self.inputs))]

    @torch.no_grad()
    def run_shard(self, index: int) -> Tensor:
        with evaluating(self.module):
            args, kwargs = self.others[index]
            output: Tensor = self.module(self.inputs[index], *args, **kwargs)
            return output


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's blocks, with their full names, in order: modules of its `units` classes.

    Raises:
        UserError: the model does not name its units.
    """
    units = getattr(model, "units", None)
    if not units:
        raise UserError(
            f"{type(model).__name__} does not name its blocks; give the class an attribute "
            "units = (Block,)"
        )
    return list(find_units(model, units).items())


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a block by their names in the block, in order. These are quantised."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def check_linears(model: nn.Module, scheme: Scheme) -> None:
    """Raise UserError unless all Linears of the blocks can be quantised, before any work is done.

    There must be one, in float32 or wider, with columns that divide into groups, and with scales
    that the scheme can hold. All parameters of the model must be finite. A weight must have one
    name only: other modules would go on with the weight that is not quantised.
    """
    linears = {
        f"{block}.{name}": linear
        for block, module in blocks_of(model)
        for name, linear in linears_of(module).items()
    }
    if not linears:
        raise UserError(
            f"the blocks of {type(model).__name__} have no nn.Linear, so there is nothing to "
            "quantise; give a model whose `units` have one, such as a transformer"
        )
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, linear in linears.items():
        dtype = linear.weight.dtype
        if dtype.itemsize < 4:
            raise UserError(f"{name} computes in {dtype}; quantise it in float32: model.float()")
        if len(shared := names[linear.weight]) > 1:
            raise UserError(
                f"{' and '.join(shared)} are one weight, which cannot be quantised for one of them "
                "alone; give each module a weight of its own"
            )
    check_groups({name: linear.in_features for name, linear in linears.items()}, scheme)
    for name, parameter in model.named_parameters():
        if bad := int((~parameter.isfinite()).sum()):
            raise UserError(
                f"{name}: {bad} of {parameter.numel()} values are not finite, and have no codes; "
                "give a model whose loss is finite, such as an earlier checkpoint"
            )
    for name, linear in linears.items():
        try:
            grid_of(linear.weight.detach(), scheme)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In the block the module is in evaluation mode, without dropout."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def linear_inputs(block: Block, index: int) -> dict[str, Tensor]:
    """Run a block on one shard: the name of each Linear -> its input (B, T, D).

    Linears that are called with the same tensor have the same object here.

    Raises:
        UserError: a Linear is called twice, or never.
    """
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, linear in linears_of(block.module).items():

            def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if name in inputs:
                    raise UserError(
                        f"{block.name}.{name} is called twice in one forward: its two inputs "
                        "cannot be told apart; give each call a Linear of its own"
                    )
                inputs[name] = args[0]

            hooks.callback(linear.register_forward_pre_hook(hook).remove)
        block.run_shard(index)
    for name in linears_of(block.module):
        if name not in inputs:
            raise UserError(
                f"{block.name}.{name} is never called in a forward, so it has no inputs to "
                "calibrate with; leave its block out of `units`"
            )
    return {name: inputs[name] for name in linears_of(block.module)}


class Stop(Exception):
    """Ends a forward."""


@torch.no_grad()
def first_call(model: nn.Module, first: nn.Module, shard: Tensor) -> tuple[Tensor, Others]:
    """Run what comes before the first block: its input (B, T, D), and its other arguments."""
    calls: list[tuple[Tensor, Others]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], (args[1:], kwargs)))
        raise Stop

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with evaluating(model):
            model(shard)
    except Stop:
        pass
    finally:
        hook.remove()
    return calls[0]


@torch.no_grad()
def check_chain(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], row: Tensor) -> None:
    """Raise UserError unless each block's input is the output of the one before it.

    Args:
        row: (1, T), a row to run the model on.
    """
    calls: list[tuple[str, Tensor, Others]] = []
    output: Any = None
    why = ""

    with ExitStack() as hooks, evaluating(model):
        for name, module in blocks:

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                nonlocal why
                if not args or not isinstance(args[0], Tensor):
                    why = why or f"{name} takes no tensor as its first argument"
                elif calls and not is_same(args[0], output):
                    why = why or f"the input of {name} is not the output of {calls[-1][0]}"
                elif calls and not same_arguments((args[1:], kwargs), calls[-1][2]):
                    why = why or f"{name} has other arguments than {calls[-1][0]}"
                calls.append((name, args[0] if args else row, (args[1:], kwargs)))

            def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
                nonlocal output
                output = result

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        model(row)
    order = [name for name, *_ in calls]
    if not why and order != [name for name, _ in blocks]:
        why = f"a forward calls {', '.join(order) or 'none of them'}"
    if why:
        raise UserError(
            f"the blocks of {type(model).__name__} do not run one after another: {why}; quantise a "
            "model whose units pass on one hidden tensor"
        )


def is_same(x: Tensor, output: Any) -> bool:
    """The tensor is the output, or a copy. NaN is not equal to itself, so values are not enough."""
    return x is output or (isinstance(output, Tensor) and x.equal(output))


def same_arguments(a: Others, b: Others) -> bool:
    """Two calls have the same other arguments: the same objects."""
    (args_a, kwargs_a), (args_b, kwargs_b) = a, b
    same_names = len(args_a) == len(args_b) and kwargs_a.keys() == kwargs_b.keys()
    return (
        same_names
        and all(x is y for x, y in zip(args_a, args_b, strict=True))
        and all(kwargs_a[name] is kwargs_b[name] for name in kwargs_a)
    )
