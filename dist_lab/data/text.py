"""Windows of a corpus: which bytes are row r of step s, by arithmetic alone.

Window i is bytes [i * seq, (i + 1) * seq), and its targets are the same shifted by one. Windows
share no input, and together they are all of the training split but a ragged end shorter than one.

    position = step * batch + row           rows of all steps form one endless stream
    epoch, place = divmod(position, n)      n windows an epoch; a batch may straddle two
    window = permutation(n, seed, epoch)[place]

No rank, no world size and no state occurs in it. That is why any layout reads the same samples,
and why a resumed run needs only the number of its step.

Letters: R rows asked for, T = seq.
"""

from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch

from dist_lab.data.corpus import Bytes, Corpus

Ids = npt.NDArray[np.int64]


class Text:
    """The `Data` of a corpus: `batch` windows of `seq` bytes a step, all ranks together.

    Expects a corpus with a window in each split (`corpus.require`) and a seed of 0 or more.
    """

    vocab = 256

    def __init__(
        self, corpus: Corpus, *, batch: int, seq: int, seed: int, validation_batches: int
    ) -> None:
        self.name, self.sha256 = corpus.name, corpus.sha256
        self.windows = (len(corpus.train) - 1) // seq  # an epoch; its last target is one byte on
        self._batch, self._seq = batch, seq
        self._train, self._validation = np.asarray(corpus.train), np.asarray(corpus.validation)
        # A memo of a pure function, for speed only. Two, because a batch may straddle epochs.
        self._permutation = lru_cache(maxsize=2)(partial(permutation, self.windows, seed))
        # A split too short for one batch of disjoint windows still gives one, of overlapping ones.
        whole_batches = max(1, (len(corpus.validation) - 1) // seq // batch)
        self.validation_batches = min(validation_batches, whole_batches)

    def batch(self, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of these rows of the global batch of `step`, each (R, T) int64."""
        return cut(self._train, self.sample_ids(step, rows) * self._seq, self._seq)

    def validation(self, index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The same windows at every call, each (R, T) int64, spread evenly over the whole split."""
        count = self.validation_batches * self._batch
        last = len(self._validation) - self._seq - 1  # where the last window starts
        number = index * self._batch + picked(rows, self._batch)  # (R,), below count
        return cut(self._validation, number * last // max(count - 1, 1), self._seq)

    def sample_ids(self, step: int, rows: slice) -> Ids:
        """Which training windows these rows are, (R,): for tests and logs."""
        position = step * self._batch + picked(rows, self._batch)
        epochs, places = np.divmod(position, self.windows)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return ids


def permutation(n: int, seed: int, epoch: int) -> Ids:
    """An order of n windows: of n random 64-bit words, which is smallest, which next, and so on.

    numpy promises that a bit generator's raw words never change, and promises no such thing of its
    shuffles (NEP 19): a run resumed under a newer numpy must not see another order.

    >>> [permutation(5, seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    [[3, 1, 4, 2, 0], [1, 3, 2, 0, 4]]
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    return np.argsort(words, kind="stable")


def picked(rows: slice, batch: int) -> Ids:
    """The row numbers a slice of the global batch stands for, (R,)."""
    assert rows.stop is None or rows.stop <= batch, f"{rows} of a global batch of {batch}"
    return np.arange(batch)[rows]


def cut(text: Bytes, starts: Ids, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (R, T) int64, of the windows that start at `starts` (R,)."""
    window = text[starts[:, None] + np.arange(seq + 1)]  # (R, T+1)
    inputs, targets = window[:, :-1].astype(np.int64), window[:, 1:].astype(np.int64)
    return torch.from_numpy(inputs), torch.from_numpy(targets)
