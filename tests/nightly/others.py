"""Other: a library's model, with its random weights, its batches, its loss, and what we expect.

Each model is the library's own class, tiny, in float64, with dropout off. of_transformers.py and
of_torchvision.py have the tables, and real_models.py runs them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_lab import fix_torchvision
from dist_lab.step.hooks import map_tensors
from dist_lab.torch_private import AnyBatchNorm

VOCAB = 61  # prime: nothing divides it
LENGTH = 6  # tokens per row
CLASSES = 5
ROWS = 8

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Other:
    """Attributes:
    make: builds the model with random weights from torch's generator, in any dtype and mode.
    batch: step -> (inputs, targets); inputs that are a dict are keyword arguments.
    loss_sum: (output, targets) -> the loss, summed over the rows.
    units: class names of fsdp's units.
    refused: strategy -> a pattern of the expected error message.
    tolerance: of the comparison; None: the default of float64.
    adam: train with AdamW; see `optimizer`.
    for_pp: the model that pp trains instead, because a traced graph must not depend on values.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss_sum: Callable[[Any, Tensor], Tensor]
    units: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    adam: bool = True
    for_pp: "Other | None" = None

    def build(self) -> nn.Module:
        """Build the model, with the same weights at every call."""
        fix_torchvision()  # because transformers imports torchvision
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = without_dropout(self.make().double().train())
        inputs, _ = self.batch(0)
        return ByName(model, inputs) if isinstance(inputs, dict) else model

    @property
    def optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, float]]:
        """AdamW, or SGD with momentum if some gradients are zero in theory.

        AdamW turns the rounding error of such a gradient into a full step. It is the gradient of a
        bias before a BatchNorm, or of a bias of keys, which cancels in softmax.
        """
        if self.adam and not self.has_batchnorm:
            return torch.optim.AdamW, {"lr": 1e-3}
        return torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}

    @property
    def has_batchnorm(self) -> bool:
        return any(isinstance(module, AnyBatchNorm) for module in self.build().modules())

    def example(self, parts: int) -> Any:
        """Return the inputs of one of `parts` micro-batches."""
        inputs, _ = self.batch(0)
        return map_tensors(lambda t: t[: len(t) // parts], inputs)

    def unit_names(self, model: nn.Module) -> list[str]:
        names = [n for n, m in model.named_modules() if type(m).__name__ in self.units]
        assert names, f"no module is a {' or '.join(self.units)}"
        return names


class ByName(nn.Module):
    """Passes a dict of inputs to the model as keyword arguments, like `model(**batch)`.

    Args:
        names: the names of the keyword arguments; a traced graph does not know them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.model(**{name: batch[name] for name in self.names})


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off dropout modules of all kinds."""
    for module in model.modules():
        for name in ("p", "drop_prob"):
            if "drop" in type(module).__name__.lower() and isinstance(
                getattr(module, name, None), float
            ):
                setattr(module, name, 0.0)
    return model


# --- batches, different for each row and step -----------------------------------------------------


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def text(step: int, rows: int = ROWS) -> Batch:
    """Tokens; some rows end in padding, which is masked and ignored by the loss."""
    generator = _generator(step)
    tokens = torch.randint(3, VOCAB, (rows, LENGTH + 1), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    inputs = {"input_ids": tokens[:, :-1] * mask, "attention_mask": mask}
    return inputs, tokens[:, 1:].masked_fill(mask == 0, -100)


def tokens_alone(step: int, rows: int = ROWS) -> Batch:
    tokens = torch.randint(3, VOCAB, (rows, LENGTH + 1), generator=_generator(step))
    return {"input_ids": tokens[:, :-1]}, tokens[:, 1:]


def translation(step: int, rows: int = ROWS) -> Batch:
    inputs, targets = text(step, rows)
    target_tokens = torch.randint(3, VOCAB, (rows, LENGTH), generator=_generator(1000 + step))
    return inputs | {"decoder_input_ids": target_tokens}, targets


def images(step: int, *, shape: tuple[int, ...], rows: int = ROWS) -> Batch:
    """Images or videos, and their classes."""
    generator = _generator(step)
    pixels = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(CLASSES, (rows,), generator=generator)


def labelled(step: int, *, shape: tuple[int, ...], rows: int = ROWS) -> Batch:
    """Images, and a class for each pixel."""
    generator = _generator(step)
    pixels = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(CLASSES, (rows, *shape[1:]), generator=generator)


# --- losses, each a sum over the rows -------------------------------------------------------------


def of_logits(output: Any, targets: Tensor) -> Tensor:
    return entropy(output.logits, targets)


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
