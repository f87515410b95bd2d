"""Windows of a corpus: order.py computes which window is row r of step s.

Window i has tokens [i * seq, (i + 1) * seq) as inputs, and the same tokens shifted by one as
targets. Inputs of different windows do not overlap. Together they cover the training split except
for a rest that is shorter than one window. A token is a byte, unless the corpus has a tokenizer.

Letters: R rows, T = seq.
"""

import numpy as np
import torch

from dist_lab.data.corpus import Corpus, Tokens
from dist_lab.data.order import Ids, Order, positions


class Text:
    """The `Data` of a corpus: `batch` windows of `seq` tokens per step, over all ranks.

    The corpus must have at least one window in each split (`corpus.require`), and the seed must be
    0 or more.
    """

    image: tuple[int, int, int] | None = None

    def __init__(
        self, corpus: Corpus, *, batch: int, seq: int, seed: int, validation_batches: int
    ) -> None:
        self.name, self.sha256, self.tokenizer = corpus.name, corpus.sha256, corpus.tokenizer
        self.vocab = 256 if self.tokenizer is None else self.tokenizer.vocab
        self.windows = (len(corpus.train) - 1) // seq  # per epoch; -1: targets are one byte on
        self.samples = self.windows
        self._batch, self._seq = batch, seq
        self._train, self._validation = np.asarray(corpus.train), np.asarray(corpus.validation)
        self._order = Order(self.windows, batch=batch, seed=seed)
        # A split that is too short for one batch of disjoint windows gives one of overlapping ones.
        whole_batches = max(1, (len(corpus.validation) - 1) // seq // batch)
        self.validation_batches = min(validation_batches, whole_batches)

    def batch(self, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of these rows of the global batch of `step`, each (R, T) int64."""
        return windows_at(self._train, self.sample_ids(step, rows) * self._seq, self._seq)

    def validation(self, index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The same windows at every call, each (R, T) int64, spread evenly over the whole split."""
        count = self.validation_batches * self._batch
        last = len(self._validation) - self._seq - 1  # where the last window starts
        numbers = positions(index, rows, self._batch)  # (R,), each below count
        return windows_at(self._validation, numbers * last // max(count - 1, 1), self._seq)

    def sample_ids(self, step: int, rows: slice) -> Ids:
        """The numbers of the training windows of these rows, (R,)."""
        return self._order(step, rows)


def windows_at(text: Tokens, starts: Ids, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (R, T) int64, of the windows that start at `starts` (R,)."""
    window = text[starts[:, None] + np.arange(seq + 1)]  # (R, T+1)
    inputs, targets = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(targets)
