"""The models: plain nn.Modules that know nothing of the rest, and the table of their sizes.

A model class carries, as data, what it `reads`, "text" or "images", and what a strategy has to know
of it: `units`, the classes or names of its blocks, `ends`, the names of large layers before and
after them, and `stages`, globs on module names (a `*` is one name between dots) where a pipeline
may cut it; `tp_plan()` says what tensor parallelism splits. `init_weight(fqn, tensor, generator)`
fills one of its parameters, and `init_buffer(fqn, buffer)` one of its buffers, if it has any.
"""

from typing import Any

import torch

from dist_lab.zoo.gpt import GPT
from dist_lab.zoo.init import InitFn, draw, initialize
from dist_lab.zoo.mlp import MLP
from dist_lab.zoo.resnet import ResNet18
from dist_lab.zoo.vit import ViT

__all__ = [
    "GPT", "MLP", "MODELS", "SIZES", "InitFn", "Model", "ResNet18", "ViT", "build", "draw",
    "initialize",
]  # fmt: skip

Model = GPT | MLP | ViT | ResNet18
MODELS: dict[str, type[GPT] | type[MLP] | type[ViT] | type[ResNet18]] = {
    "gpt": GPT,
    "mlp": MLP,
    "vit": ViT,
    "resnet18": ResNet18,
}

# Parameters on the right: at a vocabulary of 256, and for images of 1 x 28 x 28 of 34 classes.
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "gpt": {
        "tiny": {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 480},  #     1.0 M
        "small": {"layers": 8, "width": 256, "heads": 8, "kv_heads": 4, "ffn": 1024},  #   8.0 M
        "25m": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536},  #    25.4 M
        "124m": {"layers": 12, "width": 1024, "heads": 16, "kv_heads": 4, "ffn": 2496},  # 124.0 M
    },
    "mlp": {
        "tiny": {"layers": 4, "width": 160, "ffn": 640, "context": 16, "features": 32},
        "small": {"layers": 8, "width": 352, "ffn": 1408, "context": 16, "features": 32},
        "25m": {"layers": 8, "width": 624, "ffn": 2496, "context": 16, "features": 32},
        "124m": {"layers": 12, "width": 1136, "ffn": 4544, "context": 16, "features": 32},
    },
    "vit": {
        "tiny": {"patch": 4, "layers": 4, "width": 144, "heads": 4, "ffn": 576},  #    1.0 M
        "small": {"patch": 4, "layers": 8, "width": 288, "heads": 8, "ffn": 1152},  #  8.0 M
        "25m": {"patch": 4, "layers": 8, "width": 512, "heads": 8, "ffn": 2048},  #   25.3 M
        "124m": {"patch": 4, "layers": 12, "width": 928, "heads": 16, "ffn": 3712},  # 124.2 M
    },
    "resnet18": {"tiny": {}},  # it has one size, its own: 11.2 M
}


def build(
    name: str,
    size: str,
    *,
    vocab: int,
    image: tuple[int, int, int] | None = None,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> Model:
    """A model of the zoo, initialized by (seed, parameter name) and by nothing else.

    `vocab` is the number of tokens, or of classes; `image` the (channels, height, width) that a
    model of images reads. `overrides` replace constructor arguments of SIZES: `layers=2`,
    `tied=True`. On the "meta" device nothing is drawn and nothing allocated;
    `initialize(model, seed)` does both later.

    Raises ValueError for a name or size that is not in SIZES, an `image` that is missing or for
    nothing, or one that the model cannot take.
    """
    if name not in SIZES:
        raise ValueError(f"no model named {name!r}: choose from {', '.join(SIZES)}")
    if size not in SIZES[name]:
        raise ValueError(f"{name} has no size {size!r}: choose from {', '.join(SIZES[name])}")
    reads = MODELS[name].reads
    if (image is not None) != (reads == "images"):
        raise ValueError(f"{name} reads {reads}, not image={image}")
    shape: dict[str, Any] = {} if image is None else {"image": image}
    with torch.device("meta"):
        model: Model = MODELS[name](vocab, **SIZES[name][size] | shape | overrides).to(dtype)
    if torch.device(device).type != "meta":
        initialize(model, seed, device)
    return model
