"""The models: plain nn.Modules that do not depend on the rest of the package, and their sizes.

A model class has attributes for the data loader and for strategies:

    reads          "text" or "images"
    units          the classes or names of its blocks
    ends           the names of large layers before and after the blocks
    stages         globs on module names (`*`: one name between dots); a pipeline cuts between them
    tp_plan()      the role of each module under tensor parallelism
    scale_plan()   what makes the input of each Linear, so that quantisation can move scales

`init_weight(fqn, tensor, generator)` initializes one parameter, and `init_buffer(fqn, buffer)` one
buffer, if the model has buffers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_lab.zoo.sizes import SIZES

if TYPE_CHECKING:
    from dist_lab.zoo.gpt import GPT
    from dist_lab.zoo.mlp import MLP
    from dist_lab.zoo.models import MODELS, Model, build
    from dist_lab.zoo.resnet import ResNet18
    from dist_lab.zoo.vit import ViT

__all__ = ["GPT", "MLP", "MODELS", "SIZES", "Model", "ResNet18", "ViT", "build"]


def __getattr__(name: str) -> Any:
    """Import a name, and torch, at its first use. The table of sizes needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.models"), name)
