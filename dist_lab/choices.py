"""What there is to choose from: strategies and models, as data that costs no torch to read.

The code behind the names is in compose.py and zoo/; tests hold the two against each other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_lab.errors import UserError, nearest
from dist_lab.settings import one_of, shown


@dataclass(frozen=True)
class Strategy:
    """What goes with a strategy: who has written it, and the axes of a mesh it can run along."""

    impls: tuple[str, ...]
    axes: tuple[str, ...]  # outer first; none: it takes one process
    options: tuple[str, ...] = ()  # settings that are its own

    def default_axes(self, size: int) -> dict[str, int]:
        """The mesh for so many processes: all along the first axis, or, of two, 2 along it.

        >>> STRATEGIES["fsdp"].default_axes(4), STRATEGIES["hsdp"].default_axes(6)
        ({'fsdp': 4}, {'dp': 2, 'fsdp': 3})
        """
        if len(self.axes) < 2:
            return dict.fromkeys(self.axes, size)
        outer = math.gcd(2, size)
        return {self.axes[0]: outer, self.axes[1]: size // outer}


SHARDING = (
    "reduce_dtype", "reshard_after_forward", "keep_gathered", "defer_reduce", "prefetch", "offload",
)  # fmt: skip
STRATEGIES = {
    "single": Strategy(impls=("hand",), axes=()),
    "dp": Strategy(impls=("hand",), axes=("dp",)),
    "ddp": Strategy(("hand", "torch", "accelerate"), axes=("dp",), options=("bucket_mb",)),
    "zero1": Strategy(("hand", "torch"), axes=("dp",), options=("bucket_mb",)),
    "zero2": Strategy(("hand",), axes=("dp",), options=("bucket_mb",)),
    "fsdp": Strategy(("hand", "torch"), axes=("fsdp",), options=SHARDING),
    "hsdp": Strategy(("hand", "torch"), axes=("dp", "fsdp"), options=SHARDING),
    "tp": Strategy(("hand", "torch"), axes=("tp",), options=("sequence_parallel", "regather")),
    "pp": Strategy(
        ("hand", "torch"),
        axes=("pp",),
        options=("schedule", "chunks", "pp_balance", "emulate_compute"),
    ),
}


@dataclass(frozen=True)
class Model:
    """What goes with a model: the sizes there are, the data it reads, the images it can take."""

    sizes: tuple[str, ...]
    blocks: Mapping[str, int]  # of a size: what a pipeline may cut between
    reads: str  # text or images
    data: str  # that it learns from unless told otherwise
    patch: int = 1  # sides of an image divide by it
    smallest: int = 1  # side of an image
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of a size: queries, keys
    whole: str = ""  # why tp cannot split it


SIZES = ("tiny", "small", "25m", "124m")
LAYERS = {"tiny": 4, "small": 8, "25m": 8, "124m": 12}
MODELS = {
    "gpt": Model(
        SIZES,
        LAYERS,
        reads="text",
        data="stdlib",
        heads={"tiny": (4, 2), "small": (8, 4), "25m": (8, 4), "124m": (16, 4)},
    ),
    "mlp": Model(SIZES, LAYERS, reads="text", data="stdlib"),
    "vit": Model(
        SIZES,
        LAYERS,
        reads="images",
        data="glyphs",
        patch=4,
        heads={"tiny": (4, 4), "small": (8, 8), "25m": (8, 8), "124m": (16, 16)},
    ),
    "resnet18": Model(
        SIZES[:1],
        {"tiny": 8},
        reads="images",
        data="glyphs",
        smallest=9,
        whole="tp splits matrices, and all but 17,442 of its parameters are convolutions and norms",
    ),
}
IMAGES = ("glyphs", "mnist", "cifar10", "fake", "module:function")  # what --data takes for images
DATA_AXES = ("dp", "fsdp")  # along these, ranks share out the rows of the batch
COLLECTIVES = ("auto", "backend", "ring", "direct", "tree")


def check_split(name: str, size: str, impl: str, ranks: int) -> None:
    """Raise UserError unless so many ranks can share the heads of a model of this size."""
    model = MODELS[name]
    if model.whole:
        able = [f"--model {other}" for other, m in MODELS.items() if not m.whole]
        raise UserError(f"no tp of {name}: {model.whole} (--model); give {' or '.join(able)}")
    if size not in model.heads:
        return
    queries, keys = model.heads[size]

    def fits(n: int) -> bool:
        shared = impl == "hand" and n % keys == 0  # a key head may lie on several ranks
        return queries % n == 0 and (keys % n == 0 or shared)

    if not fits(ranks):
        degrees = [n for n in range(1, queries + 1) if fits(n)]
        raise UserError(
            f"{name} {size} has {queries} heads and {keys} of keys and values, which {ranks} ranks "
            f"of tp@{impl} cannot share out (--mesh); degrees that work: "
            f"{', '.join(map(str, degrees))}; give --mesh tp={nearest(degrees, ranks)}"
        )


def check_fits(name: str, data: str, image: tuple[int, int, int] | None) -> None:
    """Raise UserError unless the model of this name takes images of this shape, or None, text.

    Args:
        data: what --data said.
    """
    model, what = MODELS[name], f"--data {shown(data)}"
    if image is None:
        if model.reads != "text":
            raise UserError(
                f"model {name} reads images, and {what} is text (--model); give --data "
                f"{one_of(IMAGES, data)}"
            )
        return
    _, height, width = image
    if model.reads != "images":
        others = [f"--model {other}" for other, m in MODELS.items() if m.reads == "images"]
        raise UserError(
            f"model {name} reads text, and {what} is images of {height} x {width} "
            f"(--model); give --data {model.data}, or {' or '.join(others)}"
        )
    if height % model.patch or width % model.patch:
        near = [max(1, round(side / model.patch)) * model.patch for side in (height, width)]
        raise UserError(
            f"model {name} cuts an image into patches of {model.patch} x {model.patch}, "
            f"which {height} x {width} does not divide into ({what}); give images of "
            f"{near[0]} x {near[1]}"
        )
    if min(height, width) < model.smallest:
        raise UserError(
            f"model {name} halves an image three times, which {height} x {width} is too "
            f"small for ({what}); give images of {model.smallest} x {model.smallest} or more"
        )
