"""The weights of a model that nobody has trained: what it writes means nothing, its times do."""

from dataclasses import dataclass

import torch

from dist_lab.checkpoint.entries import Entry
from dist_lab.checkpoint.exchange.llama import LlamaShape, shape_of
from dist_lab.checkpoint.exchange.tensors import Kinds
from dist_lab.inference.text import Bytes
from dist_lab.zoo.gpt import GPT
from dist_lab.zoo.models import build


@dataclass(frozen=True)
class OfModel:
    """The weights of a whole model in memory."""

    model: GPT

    @property
    def shape(self) -> LlamaShape:
        return shape_of(self.model)

    def tokenizer(self) -> None:
        return None

    def kinds(self) -> Kinds:
        return {name: (tuple(p.shape), p.dtype) for name, p in self.model.named_parameters()}

    def read_into(self, entry: Entry) -> None:
        for box in entry.boxes:
            entry.local.copy_(self.model.get_parameter(entry.name).detach()[box])

    def quantized(self, name: str, dtype: torch.dtype) -> None:
        return None


def random_weights(size: str) -> OfModel:
    """The weights with which a gpt of this size, for bytes, begins its training."""
    model = build("gpt", size, vocab=Bytes.vocab, seed=0)
    assert isinstance(model, GPT)
    return OfModel(model)
