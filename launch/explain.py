"""What would a run do? Ranks, layout, buckets and bytes of a strategy, with no rank started:

    python launch/explain.py --strategy ddp --mesh dp=8 --size 25m
    python launch/explain.py --strategy dp --microbatches 2
    python launch/explain.py --strategy pp --schedule zb --stages 4 --svg zb.svg

One step of rank 0 is run, against ranks that are only pretended; what it sends is what is shown.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lab import data, launcher
from dist_lab.config import Config, check_together, parse_as
from dist_lab.errors import UserError
from dist_lab.settings import setting

WITHOUT = [
    "nproc", "oversubscribe", "timeout", "steps", "optimizer", "lr", "weight_decay", "warmup",
    "out", "overwrite", "about", "val_every", "log_every", "log_collectives", "check_collectives",
]  # fmt: skip


@dataclass(frozen=True)
class Explain(Config):
    """The settings of a run that is only looked at."""

    # fmt: off
    stages: int | None = setting(None, "pp: short for --mesh pp=N", heading="what is looked at",
        low=1, high=1024)
    svg: str = setting("", "pp: draw the schedule, and what each rank holds, into this file: .svg, "
        ".png or .pdf", metavar="FILE")
    # fmt: on

    def __post_init__(self) -> None:
        if self.stages is not None:
            object.__setattr__(self, "mesh", f"pp={self.stages}")
        super().__post_init__()

    def axes(self, size: int, *, plain: bool = False) -> dict[str, int]:
        """This process alone, whatever mesh is asked about."""
        if size > 1:
            raise UserError(
                f"explain starts no ranks and needs none, {size} were started; type python "
                "launch/explain.py --mesh dp=4 ..."
            )
        return {}


def read(argv: Sequence[str] | None) -> Explain:
    config = parse_as(
        Explain, check_together, argv,
        program="explain.py", description=__doc__, defaults={}, without=WITHOUT,
    )  # fmt: skip
    for name, value in (("stages", config.stages), ("svg", config.svg)):
        if value and config.strategy != "pp":
            raise UserError(
                f"strategy {config.strategy} has no {name} (--{name}); leave it out, or give "
                "--strategy pp"
            )
    data.check(**config.data_wanted())
    return config


if __name__ == "__main__":
    sys.exit(launcher.main("explain.py", read, "dist_lab.explain:explain"))
