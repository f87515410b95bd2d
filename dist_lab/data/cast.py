"""Cast the images of any data to another dtype, that of the model's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dist_lab.data import Data


class Cast:
    """A `Data` with the images of another one in `dtype`. Token ids and classes do not change."""

    def __init__(self, data: Data, dtype: torch.dtype) -> None:
        self.name, self.vocab, self.image = data.name, data.vocab, data.image
        self.sha256, self.validation_batches = data.sha256, data.validation_batches
        self.tokenizer = data.tokenizer
        self.samples, self.sample_ids = data.samples, data.sample_ids
        self._data, self._dtype = data, dtype

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        return self._cast(*self._data.batch(step, rows))

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        return self._cast(*self._data.validation(index, rows))

    def _cast(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.to(self._dtype) if inputs.is_floating_point() else inputs, targets
