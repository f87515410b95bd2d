"""The sizes of the models, as constructor arguments. This file does not import torch."""

# Comments: the number of parameters, for a vocabulary of 256, or 1 x 28 x 28 images and 34 classes.
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
    "resnet18": {"tiny": {}},  # it has only one size: 11.2 M
}
