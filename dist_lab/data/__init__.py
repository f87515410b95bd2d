"""What a model learns from: a batch is a pure function of (seed, step), sliced by its rows.

Every rank computes the same global batch in its mind and fetches only the rows its data coordinate
owns, so a run sees the same samples in the same order in every layout, and after a resume.

    corpus.py    bytes from the standard library, a text file or a folder, cached as a memory map
    text.py      windows of those bytes, each exactly once an epoch
    custom.py    your own `module:function`, judged before the first step
    prefetch.py  the next batch, made while this one is used

This file and corpus.py import no torch: the launcher calls `check` before it starts a rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dist_lab.data import corpus, custom
from dist_lab.data.corpus import DEFAULT_CACHE
from dist_lab.data.prefetch import prefetch

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_CACHE", "Data", "check", "open_data", "prefetch"]


class Data(Protocol):
    """Batches of text, as the training loop reads them.

    `rows` picks rows of the GLOBAL batch, as in `range(batch)[rows]`. Both methods return
    (inputs, targets): int64 token ids below `vocab`, each (rows, seq); targets[r, t] is what a
    model should say after inputs[r, : t + 1]. They are pure: the same arguments give the same
    tensors in every process, and slices laid end to end give the whole batch.
    """

    name: str  # for the log
    vocab: int  # token ids are 0 .. vocab - 1
    sha256: str  # of everything there is to read, for the log; "" if there is no such hash
    validation_batches: int  # how many different ones `validation` has; 0 means no validation

    def batch(self, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the global training batch of `step`, counted from 0 and never exhausted."""

    def validation(self, index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of global validation batch `index`, 0 <= index < validation_batches."""


def check(spec: str, *, seq: int, cache_dir: Path = DEFAULT_CACHE) -> None:
    """Answer for `--data spec` before a rank starts: the errors of `open_data`, without torch.

    The cached corpus is built on the way. Of a `module:function` only the module is looked for;
    what the function returns is judged by `open_data`, because running it may well take torch.
    """
    if custom.is_custom(spec):
        custom.locate(spec)
    else:
        corpus.require(corpus.find(spec, cache_dir), seq)


def open_data(
    spec: str,
    *,
    batch: int,
    seq: int,
    seed: int,
    cache_dir: Path = DEFAULT_CACHE,
    validation_batches: int = 8,
) -> Data:
    """Open what `--data` names (`corpus.ACCEPTED`): `batch` sequences a step, all ranks together.

    At most `validation_batches` batches are held ready for validation, fewer if the held-out text
    has no more; a custom `module:function` decides for itself.

    Raises UserError when there is nothing of that name, not one sequence in it, or the function
    does not keep the protocol of Data; MachineError when the cache folder cannot be written.
    """
    if custom.is_custom(spec):
        return custom.open_custom(spec, batch=batch, seq=seq, seed=seed)
    found = corpus.find(spec, cache_dir)
    corpus.require(found, seq)

    from dist_lab.data.text import Text  # here and not above, because it imports torch

    return Text(found, batch=batch, seq=seq, seed=seed, validation_batches=validation_batches)
