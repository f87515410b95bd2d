"""The models of the matrix: those of the zoo with tiny shapes, and one with BatchNorm.

Nothing divides the vocabulary of 61, or that of 259. There are two key heads, fewer than 4 ranks of
tp: then ranks hold copies of one head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dist_lab import zoo
from dist_lab.loss import Pair
from dist_lab.transforms.init import initialize

VOCAB, SEQ = 61, 8
IMAGE = (2, 12, 8)  # channels, height, width
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # model -> its name in the zoo, and its shape
    "gpt": ("gpt", {"width": 32, "heads": 4, "kv_heads": 2, "ffn": 48}),
    "mlp": ("mlp", {"width": 24, "ffn": 40, "context": 4, "features": 8}),
    "vit": ("vit", {"width": 24, "heads": 4, "ffn": 40, "patch": 4, "image": IMAGE}),
}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {  # model -> its shape above, and what is changed
    "gpt-tied": ("gpt", {"tied": True}),
    "gpt-259": ("gpt", {"vocab": 259}),
    "frozen": ("gpt", {}),
    "gpt-drop": ("gpt", {"dropout": 0.1}),
    "mlp-drop": ("mlp", {"dropout": 0.1}),
}
DROPOUT = ("gpt-drop", "mlp-drop")  # trained with exact dropout


def build(
    model: str, layers: int, dtype: torch.dtype, device: str = "cpu"
) -> "zoo.Model | ConvNet":
    """Build a model of the matrix, with the same weights at every call."""
    if model == "conv":
        with torch.device("meta"):
            conv = ConvNet(layers).to(dtype)
        if device != "meta":
            initialize(conv, 0, device)
        return conv
    base, changes = CHANGES.get(model, (model, {}))
    name, shape = SHAPES[base]
    options = {"vocab": VOCAB, "layers": layers, **shape, **changes}
    built = zoo.build(name, "tiny", seed=0, dtype=dtype, device=device, **options)
    if model == "frozen":
        for parameter in built.get_submodule("model.layers.1").parameters():
            parameter.requires_grad_(False)
        built.get_submodule("model.embed_tokens").requires_grad_(False)
    return built


def batch(model: str, step: int, rows: int, dtype: torch.dtype) -> Pair:
    """A global batch that differs in every row and every step."""
    generator = torch.Generator().manual_seed(step)
    if model in ("vit", "conv"):
        pixels = torch.randn(rows, *IMAGE, generator=generator, dtype=dtype)
        return pixels, torch.randint(VOCAB, (rows,), generator=generator)
    tokens = torch.randint(VOCAB, (rows, SEQ + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, ReLU, around which the input is added: (B, C, h, w) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    """images (B, C, height, width) -> logits (B, V), with a BatchNorm in every block.

    No layer before a BatchNorm has a bias, because its gradient would be zero in theory.
    """

    units = (ConvBlock,)
    ends = ("stem", "head")
    stages = ("stem", "blocks.*", "pool", "flatten", "head")

    def __init__(self, layers: int, channels: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(IMAGE[0], channels, 3, padding=1)
        self.blocks = nn.ModuleDict({str(i): ConvBlock(channels) for i in range(layers)})
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(channels, VOCAB)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.flatten(self.pool(x)))

    def init_weight(self, fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Norms are 1, biases 0, and other weights Normal(0, 1 / sqrt(inputs of an output))."""
        if tensor.ndim == 1:
            tensor.fill_(0.0 if fqn.endswith("bias") else 1.0)
        else:
            tensor.normal_(0.0, 1 / math.sqrt(tensor[0].numel()), generator=generator)

    def init_buffer(self, fqn: str, buffer: Tensor) -> None:
        buffer.fill_(1 if fqn.endswith("running_var") else 0)
