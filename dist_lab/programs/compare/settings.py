"""The settings of compare.py: those of train.py, with a list of strategies instead of one."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.programs.cli.checks import check_settings
from dist_lab.programs.cli.config import Config, RunSettings
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.mixes import IllegalMix, strategies_on
from dist_lab.programs.cli.ranks import check_nproc, needs_ranks
from dist_lab.programs.cli.registry import MODELS, STRATEGIES
from dist_lab.programs.cli.settings import AtLeast, setting
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.compare.ratios import CONFIDENCE, fewest_rounds

DEFAULTS = {"steps": 3}  # per round; strategies are compared best within short rounds
SMOKE = {"size": "tiny", "batch": AtLeast(8), "seq": 32, "steps": 2, "rounds": 8}
WITHOUT = [
    "strategy", "impl", "val_every", "log_every", "log_collectives", "check_collectives",
]  # fmt: skip
ALL = "all"


@dataclass(frozen=True)
class ListedStrategy:
    """One strategy in --strategies. If it is listed twice, the labels are dp and dp#2."""

    label: str
    strategy: str
    impl: str

    @property
    def alone(self) -> bool:
        """Whether it runs in one process: rank 0 runs the whole batch, and the other ranks wait."""
        return not STRATEGIES[self.strategy].axes


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of a comparison. `steps` is per strategy and round."""

    # fmt: off
    strategies: str = setting(ALL, "strategies to compare, separated by commas, each NAME or "
        "NAME@IMPL; all: every one that --mesh allows; listed twice, a strategy is compared with "
        "itself", heading="comparison", metavar="LIST")
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
            UserError: the list is empty, or a name in it is not a strategy.
        """
        if self.strategies == ALL:
            all_entries = entries(f"{n}@{by}" for n, row in STRATEGIES.items() for by in row.impls)
            return [entry for entry in all_entries if not self.misfit(entry)]
        return entries(self.strategies.split(","))

    def misfit(self, entry: ListedStrategy) -> str:
        """Returns why the strategy cannot run on --mesh; "" if it can."""
        if self.emulate_compute is not None and (entry.strategy, entry.impl) != ("pp", "hand"):
            return "cannot emulate its compute as pp does (--emulate-compute)"
        if entry.alone or not self.mesh:
            return ""
        try:
            strategies_on(self.mesh, entry.strategy)
        except IllegalMix as error:
            return f"does not fit --mesh {mesh_in_words(self.mesh)}: {error.typed}"
        return ""

    def of(self, entry: ListedStrategy) -> Config:
        """Returns the settings with which train.py runs one entry.

        They leave out settings that only other listed strategies have.
        """
        options = STRATEGIES[entry.strategy].options
        listed = {name for other in self.entries() for name in STRATEGIES[other.strategy].options}
        changes: dict[str, Any] = {name: None for name in listed if name not in options}
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
            raise UserError(
                f"none of the strategies runs on mesh {mesh_in_words(self.mesh or {})} (--mesh); "
                "leave out --mesh, or name others in --strategies"
            )
        if plain and not all(entry.alone for entry in fitting):
            raise needs_ranks("a comparison", "--strategies", 4)
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


def entries(names: Any) -> list[ListedStrategy]:
    """Parse names of strategies, each NAME or NAME@IMPL.

    >>> [entry.label for entry in entries(["dp", "ddp@torch", "dp@hand"])]
    ['dp', 'ddp@torch', 'dp#2']
    """
    known = {f"{name}@{by}": (name, by) for name, row in STRATEGIES.items() for by in row.impls}
    listed: list[ListedStrategy] = []
    for word in names:
        full = word.strip() if "@" in word else f"{word.strip()}@hand"
        if full not in known:
            choices = [name.removesuffix("@hand") for name in known]
            raise UserError(
                f"no strategy {shown(word)} (--strategies); give, separated by commas, "
                f"{one_of(choices, word)}"
            )
        strategy, impl = known[full]
        label = full.removesuffix("@hand")
        earlier = sum((entry.strategy, entry.impl) == (strategy, impl) for entry in listed)
        listed.append(
            ListedStrategy(label + (f"#{earlier + 1}" if earlier else ""), strategy, impl)
        )
    return listed


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
    check_nproc(settings, where)
