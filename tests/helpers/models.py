"""Small models for the tests: models of the zoo, and Odd with every unusual kind of parameter."""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_lab import fix_torchvision, zoo
from dist_lab.programs.cli import registry

VOCAB = 61  # prime: nothing divides it
IMAGE = (2, 12, 8)


def gpt(
    dtype: torch.dtype = torch.float64, *, tied: bool = False, seed: int = 0, layers: int = 2
) -> nn.Module:
    shape = {"layers": layers, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
    return zoo.build("gpt", "tiny", vocab=VOCAB, seed=seed, dtype=dtype, tied=tied, **shape)


def mlp(dtype: torch.dtype = torch.float64, *, seed: int = 0, layers: int = 2) -> nn.Module:
    shape = {"layers": layers, "width": 24, "ffn": 40, "context": 4, "features": 8}
    return zoo.build("mlp", "tiny", vocab=VOCAB, seed=seed, dtype=dtype, **shape)


def vit(dtype: torch.dtype = torch.float64, *, seed: int = 0, layers: int = 2) -> nn.Module:
    shape = {"patch": 4, "layers": layers, "width": 24, "heads": 4, "ffn": 40}
    return zoo.build("vit", "tiny", vocab=VOCAB, image=IMAGE, seed=seed, dtype=dtype, **shape)


def resnet(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two of resnet18's blocks, one of them with stride 2: all of resnet18 would take too long.

    No layer before a BatchNorm has a bias, because its gradient would be zero in theory.
    """
    fix_torchvision()
    from torchvision.models.resnet import BasicBlock

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shortcut = nn.Sequential(nn.Conv2d(6, 10, 1, stride=2, bias=False), nn.BatchNorm2d(10))
        return nn.Sequential(
            nn.Conv2d(IMAGE[0], 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            BasicBlock(6, 6),
            BasicBlock(6, 10, stride=2, downsample=shortcut),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, VOCAB),
        ).to(dtype)


class Odd(nn.Module):
    """A tied head, a frozen layer, an unused layer, a 0-dim parameter, a prime width, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 13)
        self.frozen = nn.Linear(13, 13)
        self.unused = nn.Linear(5, 7)
        self.mix = nn.Linear(13, 13)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(13, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, T, 13)
        return self.head(x + self.scale * torch.tanh(self.mix(self.frozen(x))))  # (B, T, V)


def odd(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd().to(dtype)


class Experts(nn.Module):
    """The input decides which experts run, so it differs by rank and step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 12)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, T, 12)
        mask = F.one_hot(tokens[:, 0] % 4, 4).to(x.dtype)  # (B, 4)
        for i, expert in enumerate(self.experts):
            if mask[:, i].any():
                x = x + mask[:, i, None, None] * torch.tanh(expert(x))
        return self.head(x)


def batch(step: int, rows: int = 8, seq: int = 6) -> tuple[Tensor, Tensor]:
    """A global batch that differs in every row and every step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (rows, seq + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def images(step: int, rows: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A global batch of images and classes that differs in every row and every step."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(rows, *IMAGE, generator=generator, dtype=dtype)
    return pixels, torch.randint(VOCAB, (rows,), generator=generator)


def batch_of(
    model: str, step: int, rows: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A global batch for the model of that name in MODELS; images are in `dtype`."""
    return images(step, rows, dtype) if model in READS_IMAGES else batch(step, rows)


def axes_of(strategy: str, size: int) -> dict[str, int]:
    """The mesh on which a strategy runs, unless told otherwise."""
    return registry.STRATEGIES[strategy].default_axes(size) or {"dp": size}


def in_stage_order(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that match `stages`, by name, in the order of the globs."""
    modules_by_name = {}
    for glob in model.stages:
        pattern = re.escape(glob).replace(r"\*", r"[^.]+")
        matched = {fqn: m for fqn, m in model.named_modules() if re.fullmatch(pattern, fqn)}
        assert matched, f"{glob} names no module"
        modules_by_name |= matched
    return modules_by_name


def units_of(model: str) -> tuple[str, ...]:
    """The units of FSDP: blocks, and layers of which one is frozen and one is never used."""
    return UNITS[model]


UNITS = {
    "gpt": ("model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"),
    "gpt tied": ("model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"),
    "mlp": ("embed", "blocks.0", "blocks.1"),
    "odd": ("frozen", "unused", "mix"),
    "vit": ("layers.0", "layers.1"),
    "resnet": ("3", "4"),
}
READS_IMAGES = {"vit", "resnet"}
PLANS = {  # tp plans of models without a tp_plan()
    "odd": {
        "embed": "vocabulary", "frozen": "colwise", "unused": "colwise", "mix": "rowwise",
        "head": "vocabulary",
    },
}  # fmt: skip


def plan_of(strategy: str, model: str, impl: str = "hand") -> dict[str, Any]:
    """Return the options that `parallelize` needs for this model under this strategy."""
    if strategy == "pp":  # torch's 1f1b needs at least as many micro-batches as ranks
        options = {"schedule": "1f1b" if impl == "hand" else "gpipe"}
        if model in BLOCKS:
            return options
        return options | {"example_inputs": batch_of(model, 0, rows=2)[0]}
    return {"plan": PLANS[model]} if strategy == "tp" and model in PLANS else {}


def build(strategy: str, model: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build the model of that name; under pp with four layers, if it has layers."""
    if strategy != "pp" or model not in BLOCKS:
        return MODELS[model](dtype)
    return BLOCKS[model](dtype, layers=4)


def refused(strategy: str, impl: str, model: str, size: int) -> bool:
    """Return whether tp refuses the model on `size` ranks; test_tp.py checks the reasons."""
    few_keys = impl == "torch" and model.startswith("gpt") and size > 2
    uneven = impl == "torch" and model == "odd" and size > 1
    return strategy == "tp" and (
        model == "resnet" or few_keys or uneven or (size == 3 and model == "gpt")
    )


BLOCKS = {"gpt": gpt, "gpt tied": partial(gpt, tied=True), "mlp": mlp, "vit": vit}
MODELS = {
    "gpt": gpt,
    "gpt tied": lambda dtype=torch.float64: gpt(dtype, tied=True),
    "mlp": mlp,
    "odd": odd,
    "vit": vit,
    "resnet": resnet,
}
