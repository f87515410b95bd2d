"""Where a model's weights come from: a checkpoint of any layout, or a Hugging Face folder.

A rank asks for the boxes that it holds, and no other bytes are read. So a model that was trained on
one number of ranks is served on another, and fits where one copy of it would not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.exchange.huggingface import LlamaFolder
from dist_lab.checkpoint.exchange.llama import (
    LlamaShape,
    check_names_and_shapes,
    shape_in_settings,
)
from dist_lab.checkpoint.exchange.tensors import Kinds, Under
from dist_lab.checkpoint.manifest import ANOTHER, TOKENIZER, Damaged
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.data.tokenizer import BYTES, FileTokenizer
from dist_lab.errors import UserError
from dist_lab.inference.text import Bytes, Tokenizer
from dist_lab.quantize.linear import QuantizedLinear


class Weights(Protocol):
    """The weights of a gpt on disk, each under its first name in the model."""

    @property
    def shape(self) -> LlamaShape: ...
    def tokenizer(self) -> FileTokenizer | None:
        """The tokenizer beside the weights; None: there is none, as where tokens are bytes."""

    def kinds(self) -> Kinds: ...
    def read_into(self, entry: Entry) -> None:
        """Fill an entry's local tensor, which has the dtype of the tensor on disk."""

    def quantized(self, name: str, dtype: torch.dtype) -> QuantizedLinear | None:
        """The whole Linear of this name if it is quantised; None: its weight can be read."""


@dataclass(frozen=True)
class OfCheckpoint:
    """The weights of a training checkpoint. `of_run` finds the shape in the run's settings."""

    checkpoint: Checkpoint
    shape: LlamaShape

    def tokenizer(self) -> FileTokenizer | None:
        file = self.checkpoint.tokenizer
        where = repr(str(self.checkpoint.folder / TOKENIZER))
        return None if file is None else FileTokenizer(file, where)

    def kinds(self) -> Kinds:
        return Under(self.checkpoint, "model/").names()

    def read_into(self, entry: Entry) -> None:
        self.checkpoint.read_into(replace(entry, name=f"model/{entry.name}"))

    def quantized(self, name: str, dtype: torch.dtype) -> None:
        return None


def of_run(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> OfCheckpoint:
    """The weights of a checkpoint that train.py has saved.

    Args:
        settings: from its manifest, checked; {} if a script has saved it.

    Raises:
        UserError: it is not of a gpt.
        Damaged: it has no tokenizer, although its tokens are no bytes.
    """
    folder = str(checkpoint.folder)
    if not settings:
        raise UserError(
            f"checkpoint {folder!r} was saved by a script, or imported, and does not say how many "
            "heads the model has; call inference.weights.OfCheckpoint with its shape"
        )
    if settings.get("model") != "gpt":
        raise UserError(
            f"checkpoint {folder!r} is of model {settings.get('model')}, and only gpt "
            "generates text; give the run of a gpt"
        )
    spec = settings.get("tokenizer", BYTES)
    if spec != BYTES and checkpoint.tokenizer is None:
        raise Damaged(
            f"checkpoint {folder!r} is of a run with tokenizer {spec}, and has no {TOKENIZER}; "
            f"{ANOTHER}"
        )
    kinds = Under(checkpoint, "model/").names()
    shape = shape_in_settings(settings, kinds)
    check_names_and_shapes(kinds, shape, f"checkpoint {folder!r}")
    return OfCheckpoint(checkpoint, shape)


@dataclass(frozen=True)
class OfFolder:
    """The weights of a Hugging Face folder of the Llama kind, which has been checked."""

    folder: LlamaFolder

    @property
    def shape(self) -> LlamaShape:
        return self.folder.shape

    def tokenizer(self) -> FileTokenizer | None:
        return self.folder.tokenizer()

    def kinds(self) -> Kinds:
        return self.folder.once.names()

    def read_into(self, entry: Entry) -> None:
        for box in entry.boxes:  # one: a shard; none: an empty shard
            entry.local.copy_(self.folder.read_box(entry.name, box))

    def quantized(self, name: str, dtype: torch.dtype) -> None:
        return None


def tokenizer_of(weights: Weights) -> Tokenizer:
    """The tokenizer of a model: that beside its weights, or bytes.

    Raises:
        UserError: the model's tokens are not known, or not exactly bytes of a text.
        MachineError: the file is damaged.
    """
    found, known = weights.tokenizer(), weights.shape.vocab
    if found is None:
        if known == Bytes.vocab:
            return Bytes()
        raise UserError(
            f"the model has {known} tokens and no {TOKENIZER}, without which only bytes, 256, are "
            "text; call inference.generate with its tokenizer"
        )
    if found.vocab > known:
        raise UserError(
            f"the {TOKENIZER} has {found.vocab} tokens, and the model {known}; it is of another "
            "model, so give the folder with its own"
        )
    return found
