"""Notes on what makes a strategy slower or larger than necessary, from the model and its layouts.

Each rule is a function `rule(case) -> lines`; RULES lists the strategies it applies to. Every line
has numbers of this model and the fix. For a healthy model no rule yields a line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import mean
from typing import Any

from torch import nn

from dist_lab.layout.layout import Layout
from dist_lab.parallel.param_slots import owners, param_slots
from dist_lab.parallel.pipeline.partition import (
    cut,
    meta_copy,
    pieces_by_seams,
    seam_costs,
    seams,
    to_meta,
)
from dist_lab.parallel.pipeline.trace import node_costs, trace
from dist_lab.programs.doctor.report import size
from dist_lab.programs.doctor.units import bytes_of, repeated_class
from dist_lab.step.protocol import ROOT
from dist_lab.torch_private import AnyBatchNorm

# Bytes of a message below which its latency exceeds its transfer time: 0.05 ms at about 1 GB/s.
TINY = 1 << 16
UNEVEN = 1.25  # a maximum above this many times the mean counts as uneven


@dataclass(frozen=True)
class Facts:
    """Facts about a model before any strategy is applied.

    Attributes:
        model: the model as it was built.
        units: the fsdp units, by name.
        idle: trained parameters that get no gradient on the batch.
    """

    model: nn.Module
    units: Mapping[str, nn.Module]
    idle: Sequence[str]
    ranks: int

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameter -> bytes."""
        return {name: p.nbytes for name, p in self.model.named_parameters()}

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def share(self, number: int) -> str:
        return f"{size(number)}, {number / self.total:.0%}"

    @cached_property
    def owner(self) -> dict[str, str]:
        """Parameter -> the unit that it is gathered with."""
        return owners(param_slots(self.model), {ROOT: self.model, **self.units})

    @cached_property
    def tied_across(self) -> list[str]:
        """Parameters used in several units; they belong to the root unit for that reason."""
        inside = {module for unit in self.units.values() for module in unit.modules()}
        return [
            name
            for name, slots in param_slots(self.model).items()
            if self.owner[name] == ROOT and len(slots) > 1 and inside & {m for m, _ in slots}
        ]

    def bytes_of(self, unit: str) -> int:
        return sum(n for name, n in self.sizes.items() if self.owner[name] == unit)


@dataclass(frozen=True)
class Case:
    """The facts about one applied strategy that the rules use.

    Attributes:
        kept: the bytes of parameters on each rank.
        example: the inputs of one micro-batch, for pp.
    """

    facts: Facts
    layouts: Mapping[str, Layout]
    kept: Sequence[int]
    example: Any


Rule = Callable[[Case], Iterator[str]]


def notes_for(
    strategy: str, facts: Facts, layouts: Mapping[str, Layout], kept: Sequence[int], example: Any
) -> list[str]:
    """Returns the notes on one strategy, one line each."""
    if facts.ranks == 1:
        return []
    case = Case(facts, layouts, kept, example)
    return [line for rule, strategies in RULES if strategy in strategies for line in rule(case)]


# --- strategies that split the rows ---------------------------------------------------------------


def batchnorm(case: Case) -> Iterator[str]:
    names = [n for n, m in case.facts.model.named_modules() if isinstance(m, AnyBatchNorm)]
    if names:
        yield (
            f"BatchNorm ({_first(names)}) normalizes over each rank's own rows: "
            "parallelize(sync_batchnorm=True) uses the rows of all ranks, at two collectives per "
            "layer"
        )


def idle_in_buckets(case: Case) -> Iterator[str]:
    facts = case.facts
    if facts.idle:
        total = sum(facts.sizes[name] for name in facts.idle)
        yield (
            f"parameters without a gradient ({size(total)}, {_first(facts.idle)}) are sent as "
            "zeros, and their bucket and all later ones are reduced only after backward; freeze "
            "them, or use ddp, which never sends them"
        )


# --- fsdp -----------------------------------------------------------------------------------------


def no_units(case: Case) -> Iterator[str]:
    facts = case.facts
    repeated = repeated_class(facts.model)
    if not facts.units and repeated and facts.total >= 2 * TINY:
        kind, modules = repeated
        largest = max(map(bytes_of, modules.values()))
        yield (
            f"without units the whole model ({size(facts.total)}) is all-gathered before anything "
            f"computes; units=[{kind}] all-gathers {len(modules)} modules of {size(largest)} one "
            "at a time"
        )


def large_unit(case: Case) -> Iterator[str]:
    facts = case.facts
    for name in facts.units:
        unit_bytes = facts.bytes_of(name)
        if unit_bytes > facts.total / 2 and unit_bytes >= 2 * TINY:
            inside = repeated_class(facts.units[name])
            fix = f"units=[{inside[0]}, ...]" if inside else "make units of the modules inside it"
            yield (
                f"the unit {name} holds most of the model ({facts.share(unit_bytes)}) and is "
                f"all-gathered at once; {fix}"
            )


def outside_units(case: Case) -> Iterator[str]:
    facts = case.facts
    names = [n for n, u in facts.owner.items() if u == ROOT and n not in facts.tied_across]
    outside = sum(facts.sizes[n] for n in names)
    largest = max(map(facts.bytes_of, facts.units), default=0)
    if facts.units and outside > max(largest, 2 * TINY):
        by_size = sorted(names, key=lambda n: -facts.sizes[n])
        modules = list(dict.fromkeys(n.rpartition(".")[0] for n in by_size))
        yield (
            f"parameters outside the units ({facts.share(outside)}, {_first(by_size)}) stay "
            "unsharded during the whole forward and backward; make units of the modules that hold "
            f"them: {', '.join(m for m in modules[:3] if m) or 'put them into a module'}"
        )


def tiny_units(case: Case) -> Iterator[str]:
    facts = case.facts
    small = {u: unit_bytes for u in facts.units if 0 < (unit_bytes := facts.bytes_of(u)) < TINY}
    if len(small) > 1 and facts.total >= 2 * TINY:
        least = min(small, key=lambda unit: small[unit])
        yield (
            f"{len(small)} of {len(facts.units)} units are below {size(TINY)}, the smallest is "
            f"{least} with {size(small[least])}: starting their messages takes longer than sending "
            "the bytes; make the module around them the unit"
        )


def tied_units(case: Case) -> Iterator[str]:
    facts = case.facts
    every = list(facts.model.named_parameters(remove_duplicate=False))
    for name in facts.tied_across:
        parameter = facts.model.get_parameter(name)
        places = " and ".join(n for n, p in every if p is parameter)
        yield (
            f"{places} are one parameter ({size(facts.sizes[name])}) of several units, so it "
            "belongs to the root unit and stays unsharded during the whole forward and backward; "
            "untie it, or let one unit hold all its uses"
        )


def idle_in_units(case: Case) -> Iterator[str]:
    facts = case.facts
    used = {unit for name, unit in facts.owner.items() if name not in facts.idle}
    idle = [name for name in facts.idle if facts.owner[name] in used]
    if idle:
        total = sum(facts.sizes[name] for name in idle)
        yield (
            f"parameters without a gradient ({size(total)}, {_first(idle)}) are all-gathered with "
            "their unit, and their zero gradients reduced; make them a unit of their own, which "
            "sends nothing while it is not called"
        )


def frozen_gathered(case: Case) -> Iterator[str]:
    facts = case.facts
    frozen = [n for n, p in facts.model.named_parameters() if not p.requires_grad]
    total = sum(facts.sizes[n] for n in frozen)
    if total >= TINY:
        yield (
            f"frozen parameters ({facts.share(total)}, {_first(frozen)}) are all-gathered in every "
            "step although they never change; if they fit on one rank, use ddp or zero, which send "
            "nothing for them"
        )


def uneven_shards(case: Case) -> Iterator[str]:
    average = mean(case.kept)
    if average and max(case.kept) > UNEVEN * average:
        rank = case.kept.index(max(case.kept))
        rows = {
            name: layout.shape[0] for name, layout in case.layouts.items()
            if len(layout.shape) and layout.shape[0] % case.facts.ranks
        }  # fmt: skip
        worst = max(rows, key=lambda name: case.facts.sizes[name], default="")
        example = f", first {worst} with {rows[worst]} rows" if worst else ""
        yield (
            f"rank {rank} keeps {size(max(case.kept))}, {max(case.kept) / average:.1f} times the "
            "mean: shards are rows of dim 0, and not all parameters divide evenly over the ranks"
            f"{example}; put the long dim first, or use zero1 or zero2, which shard by elements"
        )


# --- tp and pp ------------------------------------------------------------------------------------


def replicated_under_tp(case: Case) -> Iterator[str]:
    facts = case.facts
    for path, module in facts.model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        name = f"{path}.weight" if path else "weight"
        layout = case.layouts.get(name)
        if layout and not layout.splits and facts.sizes[name] > max(facts.total / 4, TINY):
            role = "vocabulary" if isinstance(module, nn.Embedding) else "colwise"
            yield (
                f"{name} ({facts.share(facts.sizes[name])} of the model) is replicated on every "
                f'rank; the plan can split it: {{"{path}": "{role}"}}'
            )


def uneven_stages(case: Case) -> Iterator[str]:
    costs = stage_costs(case.facts.model, case.facts.ranks, case.example)
    if max(costs) > UNEVEN * mean(costs):
        slowest = costs.index(max(costs))
        shares = ", ".join(f"{cost / sum(costs):.0%}" for cost in costs)
        yield (
            f"stage {slowest} costs {max(costs) / mean(costs):.1f} times the mean (the stages' "
            f"shares of the work: {shares}), and the others wait for it; give the model more and "
            "smaller modules, or use fewer stages"
        )


def tied_stages(case: Case) -> Iterator[str]:
    for name, layout in case.layouts.items():
        ranks = next((term.positions for term in layout.partial if term.positions), None)
        if ranks:
            yield (
                f"{name} is on pp ranks {' and '.join(map(str, ranks))}: each keeps a full copy, "
                f"and its gradient ({size(case.facts.sizes[name])}) is summed over them after "
                "backward; untie it to avoid both"
            )


def stage_costs(model: nn.Module, stages: int, example: Any) -> list[float]:
    """The cost of each stage in pp's partition: operations plus output elements."""
    carried: Sequence[float] = ()
    if seams(model) is None:
        _, costs, carried = node_costs(trace(model, example), example)
    else:
        pieces = [[model.get_submodule(n) for n in piece] for piece in pieces_by_seams(model)]
        meta_stages = meta_copy(nn.ModuleList(nn.ModuleList(piece) for piece in pieces))
        inputs = None if example is None else to_meta(example)
        costs = seam_costs([list(piece) for piece in meta_stages.children()], inputs)  # type: ignore[call-overload]
    ends = [*cut(costs, stages, carried), len(costs)]
    return [sum(costs[a:b]) for a, b in pairwise(ends)]


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


DATA_PARALLEL = ("dp", "ddp", "zero1", "zero2", "fsdp", "hsdp")
SHARDED = ("fsdp", "hsdp")
RULES: Sequence[tuple[Rule, Sequence[str]]] = (
    (batchnorm, DATA_PARALLEL),
    (idle_in_buckets, ("zero1", "zero2")),
    (idle_in_units, SHARDED),
    (no_units, SHARDED),
    (large_unit, SHARDED),
    (outside_units, SHARDED),
    (tiny_units, SHARDED),
    (tied_units, SHARDED),
    (frozen_gathered, SHARDED),
    (uneven_shards, SHARDED),
    (replicated_under_tp, ("tp",)),
    (uneven_stages, ("pp",)),
    (tied_stages, ("pp",)),
)
