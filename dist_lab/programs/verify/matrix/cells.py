"""The table of the matrix, as data: which mixes are compared with one process, and how.

    zero1:pp2xdp2xtp2 gpt-tied zb m4 sp       mix, model, schedule, micro-batches, options

A cell is one training run. `ROWS` has a row for each question, such as "every schedule under every
data strategy"; a row stands for the product of its lists. `unfit` gives the reason why a cell of a
product cannot exist, so that a row may be a plain product. Does not import torch.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from dist_lab.parallel.schedules.library import SCHEDULES
from dist_lab.programs.cli.mixes import strategies_on
from dist_lab.programs.cli.registry import STRATEGIES

FILE = "file"  # the schedule that is read from a user's file: its text is SCHEDULE_FILE
BUILT_IN = tuple(SCHEDULES)
ALL_SCHEDULES = (*BUILT_IN, FILE)
# Not a built-in schedule: rank 0 runs three forwards first, and both postpone weight gradients.
SCHEDULE_FILE = "0F0,0F1,0F2,0I0,0F3,0B1,0W0,0B2,0B3\n1F0,1F1,1B0,1F2,1I1,1I2,1W1,1F3,1W2,1B3\n"

# Option -> the keyword arguments of `verify`. Options without any are read by `cell` itself.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "regather": {"sequence_parallel": True, "regather": True},
    "keep-gathered": {"keep_gathered": True},
    "no-reshard": {"reshard_after_forward": False},
    "no-prefetch": {"prefetch": False},
    "defer": {"defer_reduce": True},
    "no-defer": {"defer_reduce": False},
    "small-buckets": {"bucket_mb": 0.01},
    "by-count": {"balance": "count"},
    "recompute": {"recompute": 1},
    "no-clip": {"clip": None},
    "sync-bn": {"sync_batchnorm": True},
    "offload": {},  # offload= a new folder
    "bf16": {},  # bfloat16 compute over float32 parameters
    "bf16-reduce": {},  # the same, and gradients are summed in bfloat16
    "ragged": {},  # rows that divide neither over the ranks nor over the micro-batches
    "round-trip": {},  # not training: a start from the meta device, evaluation, saving, loading
}
EVERYWHERE = ((), ("no-clip",), ("ragged",), ("bf16",), ("recompute",), ("round-trip",))
SHARDED = tuple((name,) for name in (
    "keep-gathered", "no-reshard", "no-prefetch", "defer", "no-defer", "offload", "bf16-reduce",
))  # fmt: skip
SPLIT = ((), ("sp",), ("regather",))  # of tp


@dataclass(frozen=True)
class Cell:
    """One training run that is compared with one process.

    Attributes:
        mix: the strategy of the data axes and the mesh, `zero1:pp2xdp2`; see `strategy`, `axes`.
        model: a name in models.py.
        microbatches: the number of micro-batches of each rank.
        schedule: of the pipeline; "" without one.
        options: names in OPTIONS.
    """

    mix: str
    model: str
    microbatches: int
    schedule: str = ""
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = self.mix, self.model, self.schedule, f"m{self.microbatches}", *self.options
        return " ".join(filter(None, words))

    @property
    def strategy(self) -> str | None:
        """The strategy of the data axes; None: what the mesh implies."""
        return self.mix.partition(":")[0] if ":" in self.mix else None

    @cached_property
    def axes(self) -> dict[str, int]:
        """The mesh: axis -> size."""
        parts = self.mix.rpartition(":")[2].split("x")
        return {re.sub(r"\d", "", part): int(re.sub(r"\D", "", part)) for part in parts}

    @cached_property
    def strategies(self) -> tuple[str, ...]:
        return strategies_on(self.axes, self.strategy)

    @property
    def ranks(self) -> int:
        return prod(self.axes.values())

    @property
    def data_ranks(self) -> int:
        return self.axes.get("dp", 1) * self.axes.get("fsdp", 1)

    @property
    def stages(self) -> int:
        """The number of pipeline stages."""
        return self.axes.get("pp", 1) * (2 if self.schedule in ("interleaved", "zbv") else 1)

    @property
    def layers(self) -> int:
        return max(2, self.stages)

    @property
    def rows(self) -> int:
        """The rows of the global batch."""
        even = max(16, self.data_ranks * self.microbatches)
        return even + 1 if "ragged" in self.options else even

    @property
    def is_low(self) -> bool:
        """Whether it computes in bfloat16."""
        return "bf16" in self.options or "bf16-reduce" in self.options

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments that its options mean."""
        return {k: value for name in self.options for k, value in OPTIONS[name].items()}


def unfit(cell: Cell) -> str:
    """Why there is no such cell; "" if there is."""
    strategies, keywords = cell.strategies, cell.keywords()
    known = {name for strategy in strategies for name in STRATEGIES[strategy].options}
    known |= {"balance"} if "pp_balance" in known else set()
    of_strategies = {name for row in STRATEGIES.values() for name in row.options} | {"balance"}
    foreign = set(keywords) & of_strategies - known
    splits_backward = cell.schedule in ("zb", "zbv", FILE)
    reasons = {
        "no strategy has this option": foreign,
        "only a pipeline has a schedule": ("pp" in cell.axes) != bool(cell.schedule),
        "the file is for two ranks and four micro-batches": cell.schedule == FILE
        and (cell.axes.get("pp"), cell.microbatches) != (2, 4),
        "recomputation needs a backward in one piece": "recompute" in cell.options
        and splits_backward,
        "a pipeline gathers a stage for each action, or once": "pp" in cell.axes
        and bool({"no-reshard", "no-prefetch"} & set(cell.options)),
        "tp does not split convolutions": cell.model == "conv" and "tp" in cell.axes,
        "there is no BatchNorm": "sync-bn" in cell.options and cell.model != "conv",
        "rows do not differ between ranks": "sync-bn" in cell.options and cell.data_ranks == 1,
        "only fsdp offloads": "offload" in cell.options and "offload" not in known,
        "only fsdp sums in another dtype": "bf16-reduce" in cell.options
        and "reduce_dtype" not in known,
        "a sequence of 7 tokens does not divide": cell.model == "vit" and "sequence_parallel"
        in keywords,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A question, and the product of lists that answers it."""

    question: str
    mixes: Sequence[str]
    models: Sequence[str]
    schedules: Sequence[str] = ("",)
    microbatches: Sequence[int] = (2,)
    options: Sequence[tuple[str, ...]] = ((),)

    def cells(self) -> list[Cell]:
        lists = self.mixes, self.models, self.microbatches, self.schedules, self.options
        return [cell for cell in (Cell(*values) for values in product(*lists)) if not unfit(cell)]


def each_data(*meshes: str) -> list[str]:
    """Mixes with each data strategy in place of the D in a mesh.

    >>> each_data("pp2xD4")[2:]
    ['zero1:pp2xdp4', 'zero2:pp2xdp4', 'fsdp:pp2xfsdp4']
    """
    return [
        f"{strategy}:{mesh.replace('D', 'fsdp' if strategy == 'fsdp' else 'dp')}"
        for mesh in meshes
        for strategy in ("dp", "ddp", "zero1", "zero2", "fsdp")
    ]


TWO = (*each_data("D2"), "hsdp:dp2xfsdp1", "tp2", "pp2")
FOUR_IN_PIPELINE = (*each_data("pp2xD2"), "hsdp:pp2xdp2xfsdp1", "pp2xtp2")
FOUR_SPLIT = each_data("D2xtp2")
FOUR = (*FOUR_IN_PIPELINE, *FOUR_SPLIT, "hsdp:dp2xfsdp2")
EIGHT = (*each_data("pp2xD2xtp2"), "hsdp:pp2xdp2xfsdp2", "hsdp:dp2xfsdp2xtp2")
SHARDING_FOUR = (
    "fsdp:pp2xfsdp2", "zero2:pp2xdp2", "fsdp:fsdp2xtp2", "zero2:dp2xtp2", "hsdp:dp2xfsdp2",
)  # fmt: skip

ROWS = [
    Row("strategies alone", TWO, ["gpt-tied", "mlp", "vit", "frozen"], ["", "1f1b"]),
    Row("alone: options", TWO, ["gpt"], ["", "1f1b"], [3], EVERYWHERE),
    Row("alone: BatchNorm", TWO, ["conv"], ["", "1f1b"], [2], [(), ("sync-bn",)]),
    Row("pipeline x data, each schedule", FOUR_IN_PIPELINE, ["gpt", "gpt-tied"], ALL_SCHEDULES,
        [4]),
    Row("pipeline x tp, each schedule", ["pp2xtp2"], ["gpt-tied"], ALL_SCHEDULES, [4], SPLIT[1:]),
    Row("tp x data", FOUR_SPLIT, ["gpt", "gpt-tied", "gpt-259"], [""], [2], SPLIT),
    Row("tp x data without accumulation", FOUR_SPLIT, ["gpt-tied"], [""], [1], SPLIT[:2]),
    Row("options", FOUR, ["gpt-tied"], ["", "1f1b"], [4], EVERYWHERE[1:]),
    Row("options of sharding", SHARDING_FOUR, ["gpt"], ["", "zb"], [4], SHARDED),
    Row("small buckets", FOUR, ["gpt-tied"], ["", "zbv"], [4], [("small-buckets",)]),
    Row("dropout", [*TWO, *FOUR], ["gpt-drop", "mlp-drop"], ["", *BUILT_IN], [4],
        [(), ("sp",), ("recompute",), ("ragged",)]),
    Row("dropout on three axes", EIGHT, ["gpt-drop", "mlp-drop"], ["", "1f1b", "zbv"], [4],
        SPLIT[:2]),
    Row("stages of equal counts", FOUR_IN_PIPELINE, ["gpt"], ["interleaved"], [4], [("by-count",)]),
    Row("other models", FOUR, ["mlp", "vit", "frozen"], ["", "zb"], [4]),
    Row("BatchNorm", FOUR, ["conv"], ["", "1f1b", "zbv"], [2], [(), ("sync-bn",)]),
    Row("many ranks of one axis", [*each_data("D4"), "pp4", "tp4"], ["gpt-tied"], ["", "zb"], [4]),
    Row("copied keys", ["tp4", *each_data("D2xtp4"), "pp2xtp4"], ["gpt-tied"], ["", "zb"], [4],
        SPLIT[:2]),
    Row("three axes", EIGHT, ["gpt-tied"], ["", "1f1b", "zb", "zbv"], [4], SPLIT[:2]),
    Row("three axes: a file", EIGHT, ["gpt-259"], [FILE], [4], [(), ("regather",)]),
    Row("three axes: options", EIGHT, ["gpt"], ["", "1f1b"], [4],
        [("ragged",), ("round-trip",), ("bf16", "sp")]),
    Row("a longer pipeline", each_data("pp4xD2"), ["gpt"], BUILT_IN, [8]),
    Row("a longer pipeline x tp", ["pp4xtp2"], ["gpt-tied"], ["1f1b", "zbv"], [8], [("sp",)]),
    Row("more data ranks", each_data("pp2xD4"), ["gpt-tied"], ["zb"], [4]),
    Row("four axes", ["hsdp:pp2xdp2xfsdp2xtp2"], ["gpt-tied"], ["1f1b", "zbv"], [4], SPLIT[:2]),
    Row("16 ranks", [*each_data("pp4xD2xtp2"), *each_data("pp2xD2xtp4")], ["gpt-tied"], ["1f1b"],
        [4], [("sp",)]),
    Row("16 ranks: more data", each_data("pp2xD4xtp2"), ["gpt"], ["zb"], [4]),
    Row("32 ranks", [
        "hsdp:pp4xdp2xfsdp2xtp2", "hsdp:pp2xdp2xfsdp2xtp4", "fsdp:pp4xfsdp4xtp2",
        "zero1:pp4xdp4xtp2", "zero2:pp2xdp4xtp4",
    ], ["gpt-tied"], ["1f1b"], [4], [("sp",)]),
]  # fmt: skip


def all_cells() -> list[Cell]:
    """Every cell once: few ranks first, and cells that share their reference together."""
    cells = dict.fromkeys(cell for row in ROWS for cell in row.cells())
    return sorted(cells, key=lambda c: (c.ranks, c.model, c.layers, c.rows, c.is_low))


def matching(text: str, cells: Iterable[Cell]) -> list[Cell]:
    """The cell of that name, or else the cells whose names contain every word of the text."""
    cells = list(cells)
    named = [cell for cell in cells if str(cell) == text]
    return named or [c for c in cells if all(word in str(c) for word in text.split())]
