"""The sizes of the models, as constructor arguments. This file does not import torch."""

from collections.abc import Mapping
from typing import Any

# Comments: the number of parameters, for a vocabulary of 256, or 1 x 28 x 28 images and 34 classes.
# From 1b on these are published models, with their own vocabulary: 1b is TinyLlama (Zhang et al.
# 2024, arXiv:2401.02385, table 1); 7b and 13b are LLaMA (Touvron et al. 2023, arXiv:2302.13971,
# table 2); 70b is Llama 2 (arXiv:2307.09288); 405b is Llama 3 (Grattafiori et al. 2024,
# arXiv:2407.21783, table 3), with the vocabulary of its published weights.
# fmt: off
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt": {
        "tiny": {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "ffn": 480},  #     1.0 M
        "small": {"layers": 8, "width": 256, "heads": 8, "kv_heads": 4, "ffn": 1024},  #   8.0 M
        "25m": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536},  #    25.4 M
        "124m": {"layers": 12, "width": 1024, "heads": 16, "kv_heads": 4, "ffn": 2496},  # 124.0 M
        "1b": {
            "layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "ffn": 5632,
            "vocab": 32_000,
        },
        "7b": {
            "layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "ffn": 11_008,
            "vocab": 32_000,
        },
        "13b": {
            "layers": 40, "width": 5120, "heads": 40, "kv_heads": 40, "ffn": 13_824,
            "vocab": 32_000,
        },
        "70b": {
            "layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "ffn": 28_672,
            "vocab": 32_000,
        },
        "405b": {
            "layers": 126, "width": 16_384, "heads": 128, "kv_heads": 8, "ffn": 53_248,
            "vocab": 128_256, "rope_base": 500_000.0,
        },
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
    "resnet18": {"tiny": {}},  # it has only one size: 11.2 M
}
# fmt: on


class OwnSize(str):
    """A size that is not in `SIZES`: its name in messages, with its constructor arguments."""

    numbers: Mapping[str, Any]

    def __new__(cls, name: str, numbers: Mapping[str, Any]) -> "OwnSize":
        size = super().__new__(cls, name)
        size.numbers = numbers
        return size

    def __deepcopy__(self, memo: Any) -> "OwnSize":  # a copy has the numbers, too
        return self


def numbers_of(model: str, size: str) -> Mapping[str, Any]:
    """The constructor arguments of a model of this size."""
    return size.numbers if isinstance(size, OwnSize) else SIZES[model][size]
