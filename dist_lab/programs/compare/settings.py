"""What is compared: train.py's settings, with a list of strategies where that has one."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dist_lab.errors import UserError, one_of, shown
from dist_lab.mesh.topology import DATA_AXES
from dist_lab.programs.cli.checks import check_nproc, check_settings
from dist_lab.programs.cli.config import Config, RunSettings
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.cli.registry import MODELS, STRATEGIES
from dist_lab.programs.cli.settings import AtLeast, setting
from dist_lab.programs.cli.settings import read as read_settings
from dist_lab.programs.compare.ratios import CONFIDENCE, fewest_rounds

DEFAULTS = {"steps": 3}  # a round; short rounds are close in time
SMOKE = {"size": "tiny", "batch": AtLeast(8), "seq": 32, "steps": 2, "rounds": 8}
WITHOUT = [
    "strategy", "impl", "val_every", "log_every", "log_collectives", "check_collectives",
]  # fmt: skip
ALL = "all"


@dataclass(frozen=True)
class ListedStrategy:
    """One strategy in the list. Listed twice it has two labels: dp, dp#2."""

    label: str
    strategy: str
    impl: str

    @property
    def alone(self) -> bool:
        """It takes one process: rank 0 runs it on the whole batch, and the others wait."""
        return not STRATEGIES[self.strategy].axes


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of runs, of which `steps` are those of each strategy in each round."""

    # fmt: off
    strategies: str = setting(ALL, "by commas, each NAME or NAME@IMPL; all: every one that the "
        "mesh allows. One that is listed twice is compared with itself",
        heading="what is compared", first=True, metavar="LIST")
    reference: str = setting("", "what the others are measured against; default: the first that "
        "runs", metavar="NAME")
    rounds: int = setting(24, "in each, every strategy runs --steps steps, in changing order",
        low=1)
    smoke: bool = setting(False, "a small one, to see that all works: "
        + ", ".join(f"{name} {value}" for name, value in SMOKE.items()))
    # fmt: on

    def entries(self) -> list[ListedStrategy]:
        """All that are listed.

        Raises:
            UserError: an empty list, or something in it that is no strategy.
        """
        if self.strategies == ALL:
            every = entries(f"{n}@{by}" for n, row in STRATEGIES.items() for by in row.impls)
            return [entry for entry in every if not self.misfit(entry)]
        return entries(self.strategies.split(","))

    def misfit(self, entry: ListedStrategy) -> str:
        """Why it cannot run on the mesh that was asked for; "" if it can."""
        if self.emulate_compute is not None and (entry.strategy, entry.impl) != ("pp", "hand"):
            return "computes for real, and the others are emulated (--emulate-compute)"
        asked, own = self.mesh or {}, STRATEGIES[entry.strategy].axes
        if entry.alone or set(asked) <= set(own):
            return ""
        foreign = " and ".join(f"{name}={size}" for name, size in asked.items() if name not in own)
        return f"does not run along {foreign} (--mesh); its axes are {', '.join(own)}"

    def of(self, entry: ListedStrategy) -> Config:
        """What train.py would have to be told to run one entry.

        A setting that only other strategies in the list know is left out.
        """
        own = STRATEGIES[entry.strategy].options
        known = {name for other in self.entries() for name in STRATEGIES[other.strategy].options}
        changes: dict[str, Any] = {name: None for name in known if name not in own}
        changes |= {"mesh": None, "nproc": None} if entry.alone else {}
        return self.run(strategy=entry.strategy, impl=entry.impl, **changes)

    def fitted(self, size: int) -> "Settings":
        """These settings on so many processes; what was not given is such that every entry runs.

        The batch divides for all, and the model has a block for each stage of a pipeline.
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
                with suppress(UserError):  # `axes` says it, of this entry alone
                    stages.append(run.pipeline(axes["pp"]).stages if "pp" in axes else 0)
            if max(stages) > stages[0]:
                changes["layers"] = max(stages)
        return replace(self, **changes)

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """Where all ranks meet between rounds. Each strategy has a mesh of its own besides.

        Raises:
            UserError: no strategy, or a batch, that fits so many processes.
        """
        fitting = [entry for entry in self.entries() if not self.misfit(entry)]
        if not fitting:
            raise UserError(
                f"none of the strategies runs on mesh {mesh_in_words(self.mesh or {})} (--mesh); "
                "drop --mesh, or name others in --strategies"
            )
        if plain and not all(entry.alone for entry in fitting):
            raise UserError(
                "a comparison runs on several processes, this is one alone (--strategies); add "
                "--nproc 4, or start it by torchrun --nproc_per_node=4"
            )
        unfit, fitted = {}, self.fitted(size)
        for entry in fitting:
            run = fitted.of(entry)
            if not entry.alone:
                run.check_batch(run.mesh_on(size))
            try:
                run.axes(1 if entry.alone else size)
            except UserError as error:
                unfit[entry.label] = error
        # Of all there are, those that fit run, and the others are listed with what they said.
        parallel = [entry for entry in fitting if not entry.alone]
        if unfit and (self.strategies != ALL or len(unfit) == len(parallel)):
            raise next(iter(unfit.values()))
        return {DATA_AXES[0]: size}


def entries(names: Any) -> list[ListedStrategy]:
    """
    >>> [entry.label for entry in entries(["dp", "ddp@torch", "dp@hand"])]
    ['dp', 'ddp@torch', 'dp#2']
    """
    known = {f"{name}@{by}": (name, by) for name, row in STRATEGIES.items() for by in row.impls}
    found: list[ListedStrategy] = []
    for word in names:
        full = word.strip() if "@" in word else f"{word.strip()}@hand"
        if full not in known:
            choices = [name.removesuffix("@hand") for name in known]
            raise UserError(
                f"no strategy {shown(word)} (--strategies); give, by commas, "
                f"{one_of(choices, word)}"
            )
        strategy, impl = known[full]
        label = full.removesuffix("@hand")
        earlier = sum((entry.strategy, entry.impl) == (strategy, impl) for entry in found)
        found.append(ListedStrategy(label + (f"#{earlier + 1}" if earlier else ""), strategy, impl))
    return found


def read(argv: Sequence[str] | None, description: str | None = None) -> Settings:
    """The command line of compare.py; a `--smoke` in it changes the defaults of the others."""

    def parse(defaults: Mapping[str, Any]) -> Settings:
        settings, where = read_settings(
            Settings, argv, "compare.py", description, defaults, WITHOUT
        )
        check(settings, where)
        return settings

    settings = parse(DEFAULTS)
    return parse(DEFAULTS | SMOKE) if settings.smoke else settings


def check(settings: Settings, where: Mapping[str, str]) -> None:
    """What no setting shows alone, and what train.py would refuse of any of the strategies."""
    listed = settings.entries()
    fitting = [entry for entry in listed if not settings.misfit(entry)]
    if settings.reference:
        labels = [entry.label for entry in listed]
        if settings.reference.removesuffix("@hand") not in labels:
            raise UserError(
                f"reference {shown(settings.reference)} is not compared ({where['reference']}); "
                f"give {one_of(labels, settings.reference)}, or name it in --strategies"
            )
    if settings.rounds < fewest_rounds():
        raise UserError(
            f"{settings.rounds} rounds are too few for an interval of {CONFIDENCE:.0%} "
            f"({where['rounds']}); give {fewest_rounds()} or more"
        )
    for entry in fitting:
        check_settings(settings.of(entry), where)
    check_nproc(settings, where)
