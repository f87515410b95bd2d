"""Which samples of a finite set come when, by arithmetic alone.

    position = step * batch + row           rows of all steps form one endless stream
    epoch, place = divmod(position, n)      n samples an epoch; a batch may straddle two
    sample = permutation(n, seed, epoch)[place]

No rank, no world size and no state occurs in it. That is why any layout reads the same samples,
and why a resumed run needs only the number of its step.
"""

from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Order:
    """The order of `n` samples, each exactly once an epoch, `batch` a step."""

    def __init__(self, n: int, *, batch: int, seed: int) -> None:
        self.n, self._batch = n, batch
        # A memo of a pure function, for speed only. Two, because a batch may straddle epochs.
        self._permutation = lru_cache(maxsize=2)(partial(permutation, n, seed))

    def __call__(self, step: int, rows: slice) -> Ids:
        """The numbers of the samples in these rows of the global batch of `step`, (R,)."""
        epochs, places = np.divmod(positions(step, rows, self._batch), self.n)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return ids


def permutation(n: int, seed: int, epoch: int) -> Ids:
    """An order of n samples: of n random 64-bit words, which is smallest, which next, and so on.

    numpy promises that a bit generator's raw words never change, and promises no such thing of its
    shuffles (NEP 19): a run resumed under a newer numpy must not see another order.

    >>> [permutation(5, seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    [[3, 1, 4, 2, 0], [1, 3, 2, 0, 4]]
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    return np.argsort(words, kind="stable")


def positions(step: int, rows: slice, batch: int) -> Ids:
    """Where in the endless stream these rows of the global batch of `step` stand, (R,).

    >>> positions(2, slice(1, 3), batch=4)
    array([ 9, 10])
    """
    assert rows.stop is None or rows.stop <= batch, f"{rows} of a global batch of {batch}"
    return step * batch + np.arange(batch)[rows]
