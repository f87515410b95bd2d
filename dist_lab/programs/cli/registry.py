"""The table of strategies, and that of models: what there is to choose from, as data without torch.

A strategy's row says what it does and where its code is; compose.py reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dist_lab.errors import UserError, nearest_degree, one_of, shown
from dist_lab.zoo.sizes import SIZES


class Casts(Enum):
    """What a strategy casts to the dtype of compute by itself."""

    NOTHING = "nothing"
    PARAMETERS = "parameters"  # what it gathers; inputs are cast for it
    ALL = "parameters and inputs"


@dataclass(frozen=True)
class Impl:
    """One implementation of a strategy.

    apply: "module:function"
    draws: it asks for the value of each parameter and keeps what it needs, so that no rank has to
        hold a whole model from the meta device
    """

    apply: str
    draws: bool = False
    casts: Casts = Casts.NOTHING


@dataclass(frozen=True)
class Strategy:
    """A strategy, by whom it is written, and where it can run.

    impls: "hand", "torch" or "accelerate" -> that implementation
    axes: of a mesh, along which it can run, outer first; none: it takes one process
    default: those of them that a mesh has by default
    options: settings that are its own
    """

    impls: Mapping[str, Impl]
    axes: tuple[str, ...]
    default: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def default_axes(self, size: int) -> dict[str, int]:
        """The mesh for so many processes: all along the first axis, or, of two, 2 along it.

        >>> STRATEGIES["fsdp"].default_axes(4), STRATEGIES["hsdp"].default_axes(6)
        ({'fsdp': 4}, {'dp': 2, 'fsdp': 3})
        """
        axes = self.default or self.axes
        if len(axes) < 2:
            return dict.fromkeys(axes, size)
        outer = math.gcd(2, size)
        return {axes[0]: outer, axes[1]: size // outer}


SHARDING = (
    "reduce_dtype", "reshard_after_forward", "keep_gathered", "defer_reduce", "prefetch", "offload",
)  # fmt: skip
DDP = {
    "hand": Impl("dist_lab.parallel.replicated.ddp:apply"),
    "torch": Impl("dist_lab.parallel.replicated.ddp_torch:apply"),
    "accelerate": Impl("dist_lab.parallel.replicated.ddp_accelerate:apply"),
}
FSDP = {
    "hand": Impl("dist_lab.parallel.sharded.fsdp:apply", draws=True, casts=Casts.PARAMETERS),
    "torch": Impl("dist_lab.parallel.sharded.fsdp_torch:apply", draws=True, casts=Casts.PARAMETERS),
}
PP = {
    "hand": Impl("dist_lab.parallel.pipeline.pp:apply", draws=True, casts=Casts.ALL),
    "torch": Impl("dist_lab.parallel.pipeline.pp_torch:apply", draws=True, casts=Casts.ALL),
}
ZERO1 = {
    "hand": Impl("dist_lab.parallel.sharded.zero:stage1", draws=True),
    "torch": Impl("dist_lab.parallel.sharded.zero_torch:apply"),
}
ZERO2 = {"hand": Impl("dist_lab.parallel.sharded.zero:stage2", draws=True)}
TP = {
    "hand": Impl("dist_lab.parallel.tensor.tp:apply", draws=True),
    "torch": Impl("dist_lab.parallel.tensor.tp_torch:apply"),
}
STRATEGIES: Mapping[str, Strategy] = {
    "single": Strategy({"hand": Impl("dist_lab.parallel.replicated.single:apply")}, axes=()),
    "dp": Strategy({"hand": Impl("dist_lab.parallel.replicated.dp:apply")}, axes=("dp",)),
    "ddp": Strategy(DDP, axes=("dp",), options=("bucket_mb",)),
    "zero1": Strategy(ZERO1, axes=("dp",), options=("bucket_mb",)),
    "zero2": Strategy(ZERO2, axes=("dp",), options=("bucket_mb",)),
    "fsdp": Strategy(FSDP, axes=("dp", "fsdp"), default=("fsdp",), options=SHARDING),
    "hsdp": Strategy(FSDP, axes=("dp", "fsdp"), options=SHARDING),
    "tp": Strategy(TP, axes=("tp",), options=("sequence_parallel", "regather")),
    "pp": Strategy(
        PP, axes=("pp",), options=("schedule", "chunks", "pp_balance", "emulate_compute")
    ),
}
# Every strategy by everyone who has written it.
IMPLEMENTATIONS = tuple((name, by) for name, row in STRATEGIES.items() for by in row.impls)

# Strategies are applied in this order, outermost first, each along the axes that it has here.
ORDER_OF_APPLICATION = (("pp",), ("tp",), ("dp", "fsdp"))
# Axes that may have more than one position at once.
MIXES = (frozenset({"pp"}), frozenset({"tp"}), frozenset({"dp", "fsdp"}), frozenset({"dp"}))

IGNORED = (
    "accelerate leaves its FSDP plugin unused on CPU: it takes the processes for MULTI_CPU, and "
    "what it prepares is DistributedDataParallel; give --impl torch, or strategy ddp"
)
# Library implementations that we do not offer, and the reason we give.
REFUSED = {(strategy, "accelerate"): IGNORED for strategy in ("fsdp", "hsdp")}


@dataclass(frozen=True)
class Model:
    """A model: the data it reads, the images it can take, and what of it cannot be split.

    Its sizes stand in zoo/sizes.py.
    """

    name: str
    reads: str  # text or images
    data: str  # that it learns from unless told otherwise
    patch: int = 1  # sides of an image divide by it
    smallest: int = 1  # side of an image
    own_blocks: int = 0  # of a model without `layers`
    whole: str = ""  # why tp cannot split it

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(SIZES[self.name])

    def blocks(self, size: str) -> int:
        """The number of blocks, between which a pipeline may cut the model."""
        return SIZES[self.name][size].get("layers", self.own_blocks)

    def heads(self, size: str) -> tuple[int, int] | None:
        """The heads of queries, and those of keys and values; None without attention."""
        shape = SIZES[self.name][size]
        return (shape["heads"], shape.get("kv_heads", shape["heads"])) if "heads" in shape else None

    def check_split(self, size: str, impl: str, ranks: int) -> None:
        """Raise UserError unless so many ranks can share the heads of the model of this size."""
        name, heads = self.name, self.heads(size)
        if self.whole:
            able = [f"--model {other}" for other, m in MODELS.items() if not m.whole]
            raise UserError(f"no tp of {name}: {self.whole} (--model); give {' or '.join(able)}")
        if heads is None:
            return
        queries, keys = heads

        def fits(n: int) -> bool:
            shared = impl == "hand" and n % keys == 0  # a key head may lie on several ranks
            return queries % n == 0 and (keys % n == 0 or shared)

        if not fits(ranks):
            degrees = [n for n in range(1, queries + 1) if fits(n)]
            raise UserError(
                f"{name} {size} has {queries} heads and {keys} of keys and values, which {ranks} "
                f"ranks of tp@{impl} cannot share out (--mesh); degrees that work: "
                f"{', '.join(map(str, degrees))}; give --mesh tp={nearest_degree(degrees, ranks)}"
            )

    def check_fits(self, data: str, image: tuple[int, int, int] | None) -> None:
        """Raise UserError unless the model takes images of this shape, or None, text.

        Args:
            data: what --data said.
        """
        name, what = self.name, f"--data {shown(data)}"
        if image is None:
            if self.reads != "text":
                raise UserError(
                    f"model {name} reads images, and {what} is text (--model); give --data "
                    f"{one_of(IMAGES, data)}"
                )
            return
        _, height, width = image
        if self.reads != "images":
            others = [f"--model {other}" for other, m in MODELS.items() if m.reads == "images"]
            raise UserError(
                f"model {name} reads text, and {what} is images of {height} x {width} "
                f"(--model); give --data {self.data}, or {' or '.join(others)}"
            )
        if height % self.patch or width % self.patch:
            near = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
            raise UserError(
                f"model {name} cuts an image into patches of {self.patch} x {self.patch}, "
                f"which {height} x {width} does not divide into ({what}); give images of "
                f"{near[0]} x {near[1]}"
            )
        if min(height, width) < self.smallest:
            raise UserError(
                f"model {name} halves an image three times, which {height} x {width} is too "
                f"small for ({what}); give images of {self.smallest} x {self.smallest} or more"
            )


MODELS = {
    "gpt": Model("gpt", reads="text", data="stdlib"),
    "mlp": Model("mlp", reads="text", data="stdlib"),
    "vit": Model("vit", reads="images", data="glyphs", patch=4),
    "resnet18": Model(
        "resnet18",
        reads="images",
        data="glyphs",
        smallest=9,
        own_blocks=8,
        whole="tp splits matrices, and all but 17,442 of its parameters are convolutions and norms",
    ),
}
ALL_SIZES = tuple(dict.fromkeys(size for model in MODELS.values() for size in model.sizes))
IMAGES = ("glyphs", "mnist", "cifar10", "fake", "module:function")  # what --data takes for images
