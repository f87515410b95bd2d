"""The models: plain nn.Modules that know nothing of the rest, and the table of their sizes.

A model class carries, as data, what a strategy has to know of it: `units`, the classes of its
blocks, and `stages`, globs on module names (a `*` is one name between dots) where a pipeline may
cut it. `init_weight(fqn, tensor, generator)` fills one of its parameters.
"""

from typing import Any

import torch

from dist_lab.zoo.gpt import GPT
from dist_lab.zoo.init import InitFn, draw, initialize
from dist_lab.zoo.mlp import MLP

__all__ = ["GPT", "MLP", "MODELS", "SIZES", "InitFn", "Model", "build", "draw", "initialize"]

Model = GPT | MLP
MODELS: dict[str, type[GPT] | type[MLP]] = {"gpt": GPT, "mlp": MLP}

SIZES: dict[str, dict[str, dict[str, int]]] = {  # parameters at a vocabulary of 256 on the right
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
}


def build(
    name: str,
    size: str,
    *,
    vocab: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> Model:
    """A model of the zoo, initialized by (seed, parameter name) and by nothing else.

    `overrides` replace constructor arguments of SIZES: `layers=2`, `tied=True`. On the "meta"
    device nothing is drawn and nothing allocated; `initialize(model, seed)` does both later.

    Raises ValueError for a name or size that is not in SIZES.
    """
    if name not in SIZES:
        raise ValueError(f"no model named {name!r}: choose from {', '.join(SIZES)}")
    if size not in SIZES[name]:
        raise ValueError(f"{name} has no size {size!r}: choose from {', '.join(SIZES[name])}")
    with torch.device("meta"):
        model: Model = MODELS[name](vocab, **SIZES[name][size] | overrides).to(dtype)
    if torch.device(device).type != "meta":
        initialize(model, seed, device)
    return model
