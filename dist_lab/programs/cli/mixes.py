"""Which strategies a mesh stands for, and which of them can be mixed. Does not import torch.

    pp=2,fsdp=2,tp=2              pp, then tp, then fsdp     a mesh alone implies its strategies
    zero1 on pp=2,dp=2            pp, then zero1             the strategy of the data axes is named
    tp, without a mesh            tp along all ranks         a strategy alone

A mix has at most one strategy of each family: one that orders work in time, one that splits the
work of each layer, and one that splits the rows of the batch. They are applied in this order: a
pipeline stage is split by tp, and what is left on a rank is sharded by fsdp.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from dist_lab.errors import UserError, one_of, shown
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.programs.cli.registry import REFUSED, STRATEGIES

AXES = ("pp", "dp", "fsdp", "tp")  # the mesh axes that have a strategy
DATA = ("dp", "ddp", "zero1", "zero2", "fsdp", "hsdp")
FAMILIES = (("pp",), ("tp",), DATA)  # in the order of application, outermost first
# The data axes of a mesh -> the strategies that they can have. The first is implied.
FITTING = {
    ("dp",): ("ddp", "dp", "zero1", "zero2"),
    ("fsdp",): ("fsdp",),
    ("dp", "fsdp"): ("hsdp", "fsdp"),
}
# Pairs of strategies that a library's implementations cannot mix, and the reason.
UNMIXABLE = {
    ("tp", "ddp"): "its DistributedDataParallel takes the DTensors of its tp by device_mesh= only, "
    "and then removes them from the model in the first forward",
    ("tp", "zero1"): "its ZeroRedundancyOptimizer broadcasts parameters, which the DTensors of its "
    "tp do not support",
}


class IllegalMix(UserError):
    """A mesh and a strategy that do not fit, or that an implementation does not have.

    Attributes:
        problem: the first half of the message.
        typed: the second half, as flags of the command line.
        advice: the second half, if it has no flags; "" if it has.
        meshes, strategies: legal ones instead.
    """

    def __init__(
        self, problem: str, advice: str = "", *, meshes: Sequence[Mapping[str, int]] = (),
        strategies: Sequence[str] = (), impls: Sequence[str] = (),
    ) -> None:  # fmt: skip
        calls = [f"init_mesh({_joined(axes, ', ')})" for axes in meshes]
        flags = [f"--mesh {_joined(axes, ',')}" for axes in meshes]
        for name, values in (("strategy", strategies), ("impl", impls)):
            calls += [f'{name}="{value}"' for value in values]
            flags += [f"--{name} {value}" for value in values]
        super().__init__(f"{problem}; {advice or 'give ' + ' or '.join(calls)}")
        self.problem, self.typed = problem, advice or "give " + " or ".join(flags)
        self.advice, self.meshes, self.strategies = advice, meshes, strategies


def strategies_on(axes: Mapping[str, int], strategy: str | None = None) -> tuple[str, ...]:
    """The strategies of a mesh, in the order of application.

    Args:
        axes: axis -> size.
        strategy: the strategy of the data axes, or of the only axis; None: what the mesh implies.

    Raises:
        IllegalMix: there is no such strategy, or the mesh is not for it.

    >>> strategies_on({"pp": 2, "dp": 2, "fsdp": 2}), strategies_on({"dp": 4, "tp": 2}, "zero1")
    (('pp', 'hsdp'), ('tp', 'zero1'))
    """
    if strategy is not None and strategy not in STRATEGIES:
        known = list(STRATEGIES)
        raise IllegalMix(f"no strategy {shown(strategy)}", f"give {one_of(known, strategy)}")
    data = tuple(axis for axis in DATA_AXES if axis in axes)
    others = tuple(name for name in ("pp", "tp") if name in axes)
    if strategy is None:
        return (*others, FITTING[data][0]) if data else others or ("single",)
    if strategy not in DATA:
        return _alone(axes, strategy)
    split = [axis for axis in data if axes[axis] > 1]
    shards_nothing = strategy == "fsdp" and split == ["dp"]
    rows_are_whole = not split and (data or max(axes.values(), default=1) == 1)
    if rows_are_whole or (strategy in FITTING.get(data, ()) and not shards_nothing):
        return (*others, strategy)
    rest = {axis: size for axis, size in axes.items() if axis not in data}
    ranks = math.prod(axes[axis] for axis in data) if data else 2
    raise IllegalMix(
        f"the mesh is {in_text(axes)}, but {strategy} runs along "
        + " and ".join(STRATEGIES[strategy].default or STRATEGIES[strategy].axes),
        meshes=[_in_order(rest | STRATEGIES[strategy].default_axes(ranks))],
        strategies=[name for name in FITTING.get(data, ()) if name != strategy] or others[:1],
    )


def _alone(axes: Mapping[str, int], strategy: str) -> tuple[str, ...]:
    """single, tp and pp are not strategies of data axes, so they are named without one only."""
    long = {axis: size for axis, size in axes.items() if size > 1}
    data = tuple(axis for axis in DATA_AXES if axis in axes)
    implied = strategies_on(axes)[-1]
    if strategy == "single" and long:
        problem = f"strategy single is for one process, but the mesh is {in_text(axes)}"
        raise IllegalMix(problem, strategies=[implied])
    if long and strategy != "single" and strategy not in axes:
        problem = f"the mesh is {in_text(axes)}, but {strategy} runs along {strategy} only"
        meshes = [{strategy: math.prod(axes.values())}, _in_order({**axes, strategy: 2})]
        raise IllegalMix(problem, meshes=meshes)
    if any(axis in long for axis in data):
        raise IllegalMix(
            f"the mesh is {in_text(axes)}, and {strategy} is not the strategy of its data axes; "
            f"{strategy} is implied",
            strategies=FITTING[data],
        )
    return tuple(name for name in ("single", "pp", "tp") if name == strategy or name in axes)


def check_impl(strategies: Sequence[str], impl: str) -> None:
    """Raise IllegalMix unless all strategies have this implementation, and it can mix them."""
    for name in strategies:
        if (name, impl) in REFUSED:
            raise IllegalMix(f"no strategy {name}@{impl}", REFUSED[name, impl])
    for name in strategies:
        if impl not in STRATEGIES[name].impls:
            problem = f"strategy {name} has no impl {shown(impl)}"
            raise IllegalMix(problem, impls=list(STRATEGIES[name].impls))
    if len(strategies) > 1 and impl == "accelerate":
        raise IllegalMix(
            f"on CPU accelerate does not mix {' and '.join(strategies)}", impls=["hand", "torch"]
        )
    for pair, reason in UNMIXABLE.items():
        if impl == "torch" and set(pair) <= set(strategies):
            raise IllegalMix(f"{' x '.join(pair)} by torch: {reason}", impls=["hand"])


def _in_order(axes: Mapping[str, int]) -> dict[str, int]:
    return {axis: axes[axis] for axis in AXES if axis in axes}


def in_text(axes: Mapping[str, int]) -> str:
    """
    >>> in_text({"pp": 2, "dp": 2})
    'pp=2 x dp=2'
    """
    return _joined(axes, " x ")


def _joined(axes: Mapping[str, int], separator: str) -> str:
    return separator.join(f"{name}={size}" for name, size in axes.items())


def table() -> list[list[str]]:
    """All mixes, as the rows of the table in parallel/README.md: which implementations have them.

    A row for each strategy of the data axes, and a column for each mix with pp and tp.
    """
    outers = ((), ("pp",), ("tp",), ("pp", "tp"))
    rows = []
    for data in (*DATA, ""):
        mixes = [(*outer, data) if data else outer for outer in outers]
        rows.append([data or "none", *(", ".join(_impls_of(mix)) or "-" for mix in mixes)])
    return rows


def _impls_of(mix: Sequence[str]) -> list[str]:
    impls = []
    for impl in ("hand", "torch", "accelerate") if mix else ():
        with suppress(IllegalMix):
            check_impl(mix, impl)
            impls.append(impl)
    return impls
