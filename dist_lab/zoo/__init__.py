"""The models: plain nn.Modules that know nothing of the rest, and the table of their sizes.

A model class carries, as data, what it `reads`, "text" or "images", and what a strategy has to know
of it: `units`, the classes or names of its blocks, `ends`, the names of large layers before and
after them, and `stages`, globs on module names (a `*` is one name between dots) where a pipeline
may cut it; `tp_plan()` says what tensor parallelism splits. `init_weight(fqn, tensor, generator)`
fills one of its parameters, and `init_buffer(fqn, buffer)` one of its buffers, if it has any.
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
    """Load a name, and torch, when it is first used: the table of sizes is read without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.models"), name)
