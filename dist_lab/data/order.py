"""The order in which the samples of a finite set are read, as a formula.

    position = step * batch + row           rows of all steps form one endless stream
    epoch, place = divmod(position, n)      n samples per epoch; a batch may span two epochs
    sample = permutation(n, seed, epoch)[place]

The formula has no rank, no world size and no state. So every mesh reads the same samples, and a
resumed run needs only its step number.
"""

from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Order:
    """The order of `n` samples, each exactly once per epoch, `batch` per step."""

    def __init__(self, n: int, *, batch: int, seed: int) -> None:
        self.n, self._batch = n, batch
        # A cache, for speed only. Two permutations, because a batch may span two epochs.
        self._permutation = lru_cache(maxsize=2)(partial(permutation, n, seed))

    def __call__(self, step: int, rows: slice) -> Ids:
        """The sample numbers of these rows of the global batch of `step`, (R,)."""
        epochs, places = np.divmod(positions(step, rows, self._batch), self.n)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return ids


def permutation(n: int, seed: int, epoch: int) -> Ids:
    """A random permutation of n samples: the argsort of n random 64-bit words.

    A run that is resumed under a newer numpy must see the same order. numpy guarantees that the raw
    words of a bit generator never change, but gives no such guarantee for shuffles (NEP 19).

    >>> [permutation(5, seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    [[3, 1, 4, 2, 0], [1, 3, 2, 0, 4]]
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    return np.argsort(words, kind="stable")


def positions(step: int, rows: slice, batch: int) -> Ids:
    """The positions in the endless stream of these rows of the global batch of `step`, (R,).

    >>> positions(2, slice(1, 3), batch=4)
    array([ 9, 10])
    """
    assert rows.stop is None or rows.stop <= batch, f"{rows} of a global batch of {batch}"
    return step * batch + np.arange(batch)[rows]
