"""The tables of strategies and of models, as data without torch.

A strategy's row says where its code is, along which mesh axes it runs and which settings it has.
compose.py reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_lab.errors import UserError, nearest_degree, one_of, shown
from dist_lab.zoo.sizes import SIZES, numbers_of


@dataclass(frozen=True)
class Impl:
    """One implementation of a strategy.

    apply: "module:function"
    draws: it initializes parameters one by one and keeps only this rank's shards, so a model on
        the meta device is never materialized in full
    casts: it casts the parameters to the dtype of forward and backward itself, in their all-gather
    """

    apply: str
    draws: bool = False
    casts: bool = False


@dataclass(frozen=True)
class Strategy:
    """A strategy: its implementations, its mesh axes and its settings.

    impls: "hand", "torch" or "accelerate" -> that implementation
    axes: the mesh axes along which it can run, outermost first; empty: it runs in one process
    default: the axes of its default mesh, if not all of `axes`
    options: its settings that some other strategies do not have
    """

    impls: Mapping[str, Impl]
    axes: tuple[str, ...]
    default: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def default_axes(self, size: int) -> dict[str, int]:
        """Returns the default mesh: all ranks along a single axis, or 2 along the first of two.

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
    "hand": Impl("dist_lab.parallel.sharded.fsdp:apply", draws=True, casts=True),
    "torch": Impl("dist_lab.parallel.sharded.fsdp_torch:apply", draws=True, casts=True),
}
PP = {
    "hand": Impl("dist_lab.parallel.pipeline.pp:apply", draws=True),
    "torch": Impl("dist_lab.parallel.pipeline.pp_torch:apply", draws=True),
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
    "zero2": Strategy(ZERO2, axes=("dp",), options=("bucket_mb", "defer_reduce")),
    "fsdp": Strategy(FSDP, axes=("dp", "fsdp"), default=("fsdp",), options=SHARDING),
    "hsdp": Strategy(FSDP, axes=("dp", "fsdp"), options=SHARDING),
    "tp": Strategy(TP, axes=("tp",), options=("sequence_parallel", "regather")),
    "pp": Strategy(
        PP, axes=("pp",), options=("schedule", "chunks", "pp_balance", "emulate_compute")
    ),
}

# All (strategy, implementation) pairs.
IMPLEMENTATIONS = tuple((name, by) for name, row in STRATEGIES.items() for by in row.impls)

IGNORED = (
    "accelerate ignores its FSDP plugin on CPU: it treats the processes as MULTI_CPU and wraps "
    "the model in DistributedDataParallel; give --impl torch, or strategy ddp"
)
# Library implementations that we do not offer, and the reason we give.
REFUSED = {(strategy, "accelerate"): IGNORED for strategy in ("fsdp", "hsdp")}


@dataclass(frozen=True)
class Model:
    """A model: the data it reads, the images it accepts, and whether tp can split it.

    Its sizes are in zoo/sizes.py.
    """

    name: str
    reads: str  # text or images
    data: str  # its default --data
    patch: int = 1  # height and width of an image must be multiples of it
    smallest: int = 1  # height and width of an image, at least
    own_blocks: int = 0  # the number of blocks of a model without `layers`
    no_tp: str = ""  # the reason why tp cannot split it; "" if it can
    # Linears of a block, one for each number of inputs that they have -> its name in zoo/sizes.py
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(SIZES[self.name])

    def blocks(self, size: str) -> int:
        """The number of blocks; a pipeline cuts the model between blocks."""
        blocks: int = numbers_of(self.name, size).get("layers", self.own_blocks)
        return blocks

    def columns(self, size: str) -> dict[str, int]:
        """Linears of a block -> the columns of their weights, one for each number of columns."""
        shape = numbers_of(self.name, size)
        return {linear: shape[name] for linear, name in self.inputs.items()}

    def heads(self, size: str) -> tuple[int, int] | None:
        """The number of query heads and of key and value heads; None without attention."""
        shape = numbers_of(self.name, size)
        return (shape["heads"], shape.get("kv_heads", shape["heads"])) if "heads" in shape else None

    def check_split(self, size: str, impl: str, ranks: int) -> None:
        """Raise UserError unless the attention heads divide over `ranks` tensor-parallel ranks."""
        name, heads = self.name, self.heads(size)
        if self.no_tp:
            splittable = [f"--model {other}" for other, m in MODELS.items() if not m.no_tp]
            raise UserError(
                f"model {name} has no tp: {self.no_tp} (--model); give {' or '.join(splittable)}"
            )
        if heads is None:
            return
        queries, keys = heads

        def fits(n: int) -> bool:
            shared = impl == "hand" and n % keys == 0  # several ranks may replicate a key head
            return queries % n == 0 and (keys % n == 0 or shared)

        if not fits(ranks):
            degrees = [n for n in range(1, queries + 1) if fits(n)]
            raise UserError(
                f"{name} {size} has {queries} query heads and {keys} key and value heads, which do "
                f"not divide over {ranks} ranks of tp@{impl} (--mesh); sizes that work: "
                f"{', '.join(map(str, degrees))}; give tp={nearest_degree(degrees, ranks)}"
            )

    def check_fits(self, data: str, image: tuple[int, int, int] | None) -> None:
        """Raise UserError unless the model takes images of this shape, or text (`image` None).

        Args:
            data: the value of --data.
        """
        name, flag = self.name, f"--data {shown(data)}"
        if image is None:
            if self.reads != "text":
                raise UserError(
                    f"model {name} reads images, and {flag} is text (--model); give --data "
                    f"{one_of(IMAGES, data)}"
                )
            return
        _, height, width = image
        if self.reads != "images":
            readers = [f"--model {other}" for other, m in MODELS.items() if m.reads == "images"]
            raise UserError(
                f"model {name} reads text, and {flag} is images of {height} x {width} "
                f"(--model); give --data {self.data}, or {' or '.join(readers)}"
            )
        if height % self.patch or width % self.patch:
            near = [max(1, round(side / self.patch)) * self.patch for side in (height, width)]
            raise UserError(
                f"model {name} cuts an image into patches of {self.patch} x {self.patch}, "
                f"and {height} x {width} does not divide into them ({flag}); give images of "
                f"{near[0]} x {near[1]}"
            )
        if min(height, width) < self.smallest:
            raise UserError(
                f"model {name} halves an image three times, and {height} x {width} is too "
                f"small for that ({flag}); give images of {self.smallest} x {self.smallest} or more"
            )


MODELS = {
    "gpt": Model(
        "gpt", reads="text", data="stdlib",
        inputs={"self_attn.q_proj": "width", "mlp.down_proj": "ffn"},
    ),
    "mlp": Model("mlp", reads="text", data="stdlib", inputs={"up": "width", "down": "ffn"}),
    "vit": Model(
        "vit", reads="images", data="glyphs", patch=4,
        inputs={"self_attn.q_proj": "width", "mlp.down_proj": "ffn"},
    ),
    "resnet18": Model(
        "resnet18",
        reads="images",
        data="glyphs",
        smallest=9,
        own_blocks=8,
        no_tp="tp splits matrices, and all but 17,442 of its parameters are convolutions and norms",
    ),
}  # fmt: skip
ALL_SIZES = tuple(dict.fromkeys(size for model in MODELS.values() for size in model.sizes))
IMAGES = ("glyphs", "mnist", "cifar10", "fake", "module:function")  # values of --data
