"""What makes a strategy slower or larger than it need be, read off the model and its layouts.

Each rule is a function `rule(case) -> lines`, and RULES says of which strategies it speaks. A line
has numbers of this model, and what to do; of a healthy model no rule says anything.
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

# Bytes of a message below which starting it costs more than carrying it: 0.05 ms at about 1 GB/s.
TINY = 1 << 16
UNEVEN = 1.25  # times the mean: what may be called uneven


@dataclass(frozen=True)
class Facts:
    """What is known of a model before any strategy is applied.

    Attributes:
        model: as it was built.
        units: of fsdp, by name.
        idle: trained parameters without a gradient on the batch.
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
        """Parameter -> the unit with which it is gathered."""
        return owners(param_slots(self.model), {ROOT: self.model, **self.units})

    @cached_property
    def tied_across(self) -> list[str]:
        """Parameters with places in several units, which lie in the model itself for that."""
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
    """One strategy that has been applied.

    Attributes:
        kept: bytes of parameters on each rank.
        example: a micro-batch of pp.
    """

    facts: Facts
    layouts: Mapping[str, Layout]
    kept: Sequence[int]
    example: Any


Rule = Callable[[Case], Iterator[str]]


def of(
    strategy: str, facts: Facts, layouts: Mapping[str, Layout], kept: Sequence[int], example: Any
) -> list[str]:
    """The lines on one strategy."""
    if facts.ranks == 1:
        return []
    case = Case(facts, layouts, kept, example)
    return [line for rule, strategies in RULES if strategy in strategies for line in rule(case)]


# --- whoever shares out rows ----------------------------------------------------------------------


def batchnorm(case: Case) -> Iterator[str]:
    names = [n for n, m in case.facts.model.named_modules() if isinstance(m, AnyBatchNorm)]
    if names:
        yield (
            f"BatchNorm ({_first(names)}) normalizes by each rank's own rows: "
            "parallelize(sync_batchnorm=True) takes those of all ranks, for two messages a layer"
        )


def idle_in_buckets(case: Case) -> Iterator[str]:
    facts = case.facts
    if facts.idle:
        total = sum(facts.sizes[name] for name in facts.idle)
        yield (
            f"parameters without a gradient ({size(total)}, {_first(facts.idle)}) travel as zeros, "
            "and the buckets from theirs on are summed only when backward is over; freeze them, or "
            "take ddp, which never sends them"
        )


# --- fsdp -----------------------------------------------------------------------------------------


def no_units(case: Case) -> Iterator[str]:
    facts = case.facts
    repeated = repeated_class(facts.model)
    if not facts.units and repeated and facts.total >= 2 * TINY:
        kind, modules = repeated
        largest = max(map(bytes_of, modules.values()))
        yield (
            f"without units all of the model ({size(facts.total)}) is gathered at once, before "
            f"anything computes; units=[{kind}] gathers {len(modules)} modules of "
            f"{size(largest)} in turn"
        )


def large_unit(case: Case) -> Iterator[str]:
    facts = case.facts
    for name in facts.units:
        own = facts.bytes_of(name)
        if own > facts.total / 2 and own >= 2 * TINY:
            inside = repeated_class(facts.units[name])
            fix = f"units=[{inside[0]}, ...]" if inside else "make units of the modules inside it"
            yield (
                f"the unit {name} holds most of the model ({facts.share(own)}), which is gathered "
                f"at once; {fix}"
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
            f"parameters outside of the units ({facts.share(outside)}, {_first(by_size)}) stay "
            "gathered as long as a forward or a backward takes; make units of what holds them: "
            f"{', '.join(m for m in modules[:3] if m) or 'put them into a module'}"
        )


def tiny_units(case: Case) -> Iterator[str]:
    facts = case.facts
    small = {u: own for u in facts.units if 0 < (own := facts.bytes_of(u)) < TINY}
    if len(small) > 1 and facts.total >= 2 * TINY:
        least = min(small, key=lambda unit: small[unit])
        yield (
            f"{len(small)} of {len(facts.units)} units have less than {size(TINY)}, the smallest "
            f"{least} {size(small[least])}: to start their messages takes longer than to carry "
            "them; make the module around them the unit"
        )


def tied_units(case: Case) -> Iterator[str]:
    facts = case.facts
    every = list(facts.model.named_parameters(remove_duplicate=False))
    for name in facts.tied_across:
        parameter = facts.model.get_parameter(name)
        places = " and ".join(n for n, p in every if p is parameter)
        yield (
            f"{places} are one parameter ({size(facts.sizes[name])}) of several units, so it lies "
            "with the model itself, and stays gathered as long as a forward or a backward takes; "
            "untie it, or let one unit hold all its places"
        )


def idle_in_units(case: Case) -> Iterator[str]:
    facts = case.facts
    used = {unit for name, unit in facts.owner.items() if name not in facts.idle}
    idle = [name for name in facts.idle if facts.owner[name] in used]
    if idle:
        total = sum(facts.sizes[name] for name in idle)
        yield (
            f"parameters without a gradient ({size(total)}, {_first(idle)}) are gathered, and "
            "their zeros reduced, with the unit around them; a unit of their own is left alone "
            "while nothing calls it"
        )


def frozen_gathered(case: Case) -> Iterator[str]:
    facts = case.facts
    frozen = [n for n, p in facts.model.named_parameters() if not p.requires_grad]
    total = sum(facts.sizes[n] for n in frozen)
    if total >= TINY:
        yield (
            f"frozen parameters ({facts.share(total)}, {_first(frozen)}) are gathered in every "
            "step though they never change; if they fit on a rank, ddp and zero send nothing for "
            "them"
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
        of_it = f", first {worst} of {rows[worst]} rows" if worst else ""
        yield (
            f"rank {rank} keeps {size(max(case.kept))}, {max(case.kept) / average:.1f} times the "
            f"mean: shards are rows of dim 0, which do not divide over the ranks{of_it}; put the "
            "long dim first, or take zero1 or zero2, which cut by elements"
        )


# --- tp and pp ------------------------------------------------------------------------------------


def whole_under_tp(case: Case) -> Iterator[str]:
    facts = case.facts
    for path, module in facts.model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        name = f"{path}.weight" if path else "weight"
        layout = case.layouts.get(name)
        if layout and not layout.splits and facts.sizes[name] > max(facts.total / 4, TINY):
            role = "vocabulary" if isinstance(module, nn.Embedding) else "colwise"
            yield (
                f"{name} ({facts.share(facts.sizes[name])} of the model) lies whole on every rank; "
                f'the plan can split it: {{"{path}": "{role}"}}'
            )


def uneven_stages(case: Case) -> Iterator[str]:
    costs = stage_costs(case.facts.model, case.facts.ranks, case.example)
    if max(costs) > UNEVEN * mean(costs):
        slowest = costs.index(max(costs))
        shares = ", ".join(f"{cost / sum(costs):.0%}" for cost in costs)
        yield (
            f"stage {slowest} costs {max(costs) / mean(costs):.1f} times the mean (of the work "
            f"{shares}), and the others wait for it; give the model more and smaller pieces, or "
            "fewer stages"
        )


def tied_stages(case: Case) -> Iterator[str]:
    for name, layout in case.layouts.items():
        on = next((owed.positions for owed in layout.partial if owed.positions), None)
        if on:
            stages = " and ".join(map(str, on))
            yield (
                f"{name} lies on ranks {stages} of pp: each keeps all of it, and its gradient "
                f"({size(case.facts.sizes[name])}) travels when backward is over; untie it"
            )


def stage_costs(model: nn.Module, stages: int, example: Any) -> list[float]:
    """What each stage costs, where pp cuts a model: operations, and elements put out."""
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


ROWS = ("dp", "ddp", "zero1", "zero2", "fsdp", "hsdp")
SHARDED = ("fsdp", "hsdp")
RULES: Sequence[tuple[Rule, Sequence[str]]] = (
    (batchnorm, ROWS),
    (idle_in_buckets, ("zero1", "zero2")),
    (idle_in_units, SHARDED),
    (no_units, SHARDED),
    (large_unit, SHARDED),
    (outside_units, SHARDED),
    (tiny_units, SHARDED),
    (tied_units, SHARDED),
    (frozen_gathered, SHARDED),
    (uneven_shards, SHARDED),
    (whole_under_tp, ("tp",)),
    (uneven_stages, ("pp",)),
    (tied_stages, ("pp",)),
)
