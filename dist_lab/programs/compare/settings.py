"""The settings of compare.py: those of train.py, with a list of strategies instead of one."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.programs.cli.checks import check_settings
from dist_lab.programs.cli.config import RESTARTS, Config, RunSettings
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.mixes import IllegalMix, check_impl, strategies_on
from dist_lab.programs.cli.ranks import check_nproc, needs_ranks
from dist_lab.programs.cli.registry import MODELS, STRATEGIES
from dist_lab.programs.cli.settings import AtLeast, setting
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.compare.entries import ListedStrategy, entries
from dist_lab.programs.compare.ratios import CONFIDENCE, fewest_rounds

DEFAULTS = {"steps": 3}  # per round; strategies are compared best within short rounds
SMOKE = {"size": "tiny", "batch": AtLeast(8), "seq": 32, "steps": 2, "rounds": 8}
WITHOUT = [
    "strategy", "impl", "val_every", "log_every", "log_samples", "sentinel", "log_collectives",
    "check_collectives", "reduce_order", *RESTARTS,
]  # fmt: skip
ALL = "all"


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of a comparison. `steps` is per strategy and round."""

    # fmt: off
    strategies: str = setting(ALL, "what to compare, separated by commas: NAME[@IMPL] runs on "
        "--mesh or its default mesh, [NAME:]MESH[@IMPL] on its own, such as pp2xfsdp2 or "
        "zero1:pp2xdp2@torch; all: every NAME@IMPL that --mesh allows; listed twice, a strategy is "
        "compared with itself", heading="comparison", metavar="LIST")
    reference: str = setting("", "the strategy that the others are compared with; default: the "
        "first that runs", metavar="NAME")
    rounds: int = setting(24, "number of rounds; in each, every strategy runs --steps steps, and "
        "the order changes", low=1)
    smoke: bool = setting(False, "a quick run to see that everything works; changes the defaults "
        "to: "
        + ", ".join(f"{name} {value}" for name, value in SMOKE.items()))
    # fmt: on

    def entries(self) -> list[ListedStrategy]:
        """Returns the strategies of --strategies; for `all`, those that --mesh allows.

        Raises:
            UserError: the list is empty, or a word in it is no strategy and no legal mesh.
        """
        if self.strategies == ALL:
            all_entries = entries(f"{n}@{by}" for n, row in STRATEGIES.items() for by in row.impls)
            return [entry for entry in all_entries if not self.misfit(entry)]
        return entries(self.strategies.split(","))

    def misfit(self, entry: ListedStrategy) -> str:
        """Returns why the entry cannot run on its mesh, or on --mesh; "" if it can."""
        if self.emulate_compute is not None and (
            entry.impl != "hand" or "emulate_compute" not in self.options(entry)
        ):
            return "cannot emulate its compute as pp does (--emulate-compute)"
        mesh = entry.mesh or self.mesh
        if entry.alone or not mesh:
            return ""
        try:
            strategies = strategies_on(mesh, entry.strategy)
        except IllegalMix as error:
            return f"does not fit --mesh {mesh_in_words(mesh)}: {error.typed}"
        try:
            check_impl(strategies, entry.impl)
        except IllegalMix as error:
            return f"{error.problem}; {error.advice or f'leave out @{entry.impl}'}"
        return ""

    def options(self, entry: ListedStrategy) -> set[str]:
        """The settings of an entry's strategies that some other strategies do not have."""
        mesh = entry.mesh or self.mesh
        strategies: tuple[str, ...] = (entry.strategy,)
        if mesh and not entry.alone:
            with suppress(IllegalMix):  # `misfit` tells
                strategies = strategies_on(mesh, entry.strategy)
        return {option for name in strategies for option in STRATEGIES[name].options}

    def of(self, entry: ListedStrategy) -> Config:
        """Returns the settings with which train.py runs one entry.

        They leave out settings that only other listed strategies have.
        """
        listed = set().union(*(self.options(other) for other in self.entries()))
        changes: dict[str, Any] = dict.fromkeys(listed - self.options(entry))
        changes["mesh"] = entry.mesh or self.mesh
        changes |= {"mesh": None, "nproc": None} if entry.alone else {}
        return self.run(strategy=entry.strategy, impl=entry.impl, **changes)

    def fitted(self, size: int) -> "Settings":
        """Returns these settings with a default batch and default layers that suit every entry.

        The batch divides over the ranks of every entry, and the model has at least as many blocks
        as a pipeline has stages.
        """
        runs = [self.of(e) for e in self.entries() if not self.misfit(e) and not e.alone]
        meshes = [(run, run.mesh_on(size)) for run in runs]
        changes: dict[str, Any] = {}
        if isinstance(self.batch, AtLeast):
            parts = math.lcm(*(run.parts(axes) for run, axes in meshes))
            changes["batch"] = self.batch.divided_by(parts)
        model = MODELS[self.model]
        if self.layers is None and not model.own_blocks:
            stages = [model.blocks(self.size)]
            for run, axes in meshes:
                with suppress(UserError):  # `axes` raises it again, for this entry
                    stages.append(run.pipeline(axes["pp"]).stages if "pp" in axes else 0)
            if max(stages) > stages[0]:
                changes["layers"] = max(stages)
        return replace(self, **changes)

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Returns the mesh for the barriers between rounds. Each strategy also has its own mesh.

        Raises:
            UserError: no strategy fits `size` processes, or the batch does not divide.
        """
        fitting = [entry for entry in self.entries() if not self.misfit(entry)]
        if not fitting:
            raise self.none_fits()
        ranks = self.ranks()
        if plain and not all(entry.alone for entry in fitting):
            raise needs_ranks("a comparison", "--strategies", max([*ranks.values()], default=4))
        for label, needed in ranks.items():
            if needed != size:
                raise UserError(
                    f"{label} has {needed} ranks, {size} were started (--strategies); give a mesh "
                    f"of {size} ranks, or type torchrun --nproc_per_node={needed} ... or --nproc "
                    f"{needed}"
                )
        errors, fitted = {}, self.fitted(size)
        for entry in fitting:
            run = fitted.of(entry)
            if not entry.alone:
                run.check_batch(run.mesh_on(size))
            try:
                run.axes(1 if entry.alone else size)
            except UserError as error:
                errors[entry.label] = error
        # With `all`, the strategies that fit run, and the others are listed with their errors.
        parallel = [entry for entry in fitting if not entry.alone]
        if errors and (self.strategies != ALL or len(errors) == len(parallel)):
            raise next(iter(errors.values()))
        return {DATA_AXES[0]: size}

    def ranks(self) -> dict[str, int]:
        """The number of ranks of each entry that has a mesh of its own, by label.

        Raises:
            UserError: they differ. All entries run in the same ranks.
        """
        own = {e.label: math.prod(e.mesh.values()) for e in self.entries() if e.mesh}
        first = next(iter(own), "")
        for label, number in own.items():
            if number != own[first]:
                raise UserError(
                    f"{first} has {own[first]} ranks and {label} has {number} (--strategies); all "
                    "run in the same ranks: give meshes of one number of ranks"
                )
        return own

    def none_fits(self) -> UserError:
        """The error of a list in which no entry can run."""
        listed = self.entries()
        if not any(entry.mesh for entry in listed):
            return UserError(
                f"none of the strategies runs on mesh {mesh_in_words(self.mesh or {})} (--mesh); "
                "leave out --mesh, or name others in --strategies"
            )
        reasons = "; ".join(f"{entry.label}: {self.misfit(entry)}" for entry in listed)
        return UserError(f"none of the strategies can run (--strategies); {reasons}")


def read(argv: Sequence[str] | None, description: str | None = None) -> Settings:
    """Read the command line of compare.py. --smoke changes the defaults of other settings."""

    def parse(defaults: Mapping[str, Any]) -> Settings:
        settings, where = read_settings(
            Settings, argv, "compare.py", description, defaults, WITHOUT
        )
        check(settings, where)
        return settings

    settings = parse(DEFAULTS)
    return parse(DEFAULTS | SMOKE) if settings.smoke else settings


def check(settings: Settings, where: Mapping[str, str]) -> None:
    """Check the settings together, and each listed strategy as train.py checks it."""
    listed = settings.entries()
    fitting = [entry for entry in listed if not settings.misfit(entry)]
    if settings.reference:
        labels = [entry.label for entry in listed]
        if settings.reference.removesuffix("@hand") not in labels:
            raise UserError(
                f"reference {shown(settings.reference)} is not listed ({where['reference']}); "
                f"give {one_of(labels, settings.reference)}, or name it in --strategies"
            )
    if settings.rounds < fewest_rounds():
        raise UserError(
            f"{settings.rounds} rounds are too few for a {CONFIDENCE:.0%} confidence interval "
            f"({where['rounds']}); give {fewest_rounds()} or more"
        )
    for entry in fitting:
        check_settings(settings.of(entry), where)
    settings.ranks()
    check_nproc(settings, where)
