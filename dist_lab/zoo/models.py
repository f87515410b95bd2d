"""The table of model classes, and `build`, which creates a model of a given size."""

from typing import Any

import torch

from dist_lab.transforms.init import initialize
from dist_lab.zoo.gpt import GPT
from dist_lab.zoo.mlp import MLP
from dist_lab.zoo.resnet import ResNet18
from dist_lab.zoo.sizes import SIZES, OwnSize, numbers_of
from dist_lab.zoo.vit import ViT

Model = GPT | MLP | ViT | ResNet18
MODELS: dict[str, type[GPT] | type[MLP] | type[ViT] | type[ResNet18]] = {
    "gpt": GPT,
    "mlp": MLP,
    "vit": ViT,
    "resnet18": ResNet18,
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
    """Create a model. Its weights are a function of (seed, parameter name) only.

    `vocab` is the number of tokens or of classes, unless the size has its own; `image` is the
    (channels, height, width) of the images that an image model reads. `overrides` replace
    constructor arguments from SIZES: `layers=2`, `tied=True`. On the "meta" device nothing is
    allocated or initialized; `initialize(model, seed)` does both later.

    Raises ValueError for a name or size that is not in SIZES, and for an `image` that is missing,
    that is given for a text model, or whose shape the model cannot read.
    """
    if name not in SIZES:
        raise ValueError(f"no model named {name!r}: choose from {', '.join(SIZES)}")
    if size not in SIZES[name] and not isinstance(size, OwnSize):
        raise ValueError(f"{name} has no size {size!r}: choose from {', '.join(SIZES[name])}")
    reads = MODELS[name].reads
    if (image is not None) != (reads == "images"):
        raise ValueError(f"{name} reads {reads}, not image={image}")
    shape: dict[str, Any] = {} if image is None else {"image": image}
    numbers = dict(numbers_of(name, size))
    vocab = numbers.pop("vocab", vocab)
    with torch.device("meta"):
        model: Model = MODELS[name](vocab, **numbers | shape | overrides).to(dtype)
    if torch.device(device).type != "meta":
        initialize(model, seed, device)
    return model
