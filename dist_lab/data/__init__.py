"""Data: a global batch is a pure function of (seed, step), and a rank takes a slice of its rows.

Every rank knows which samples the global batch has, and makes only the rows that its data
coordinate owns, so a run sees the same samples in the same order in every layout, and after a
resume.

    corpus.py    bytes from the standard library, a text file or a folder, cached as a memory map
    text.py      windows of those bytes, each exactly once an epoch
    glyphs.py    characters of Pillow's font, distorted at random
    datasets.py  MNIST and CIFAR-10 on disk, or fetched by one process
    images.py    their images, each exactly once an epoch; and noise
    order.py     which sample comes when
    custom.py    your own `module:function`, judged before the first step
    prefetch.py  the next batch, made while this one is used

This file, corpus.py and datasets.py import no torch: the launcher calls `check` before it starts a
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dist_lab.data import corpus, custom, datasets
from dist_lab.data.corpus import DEFAULT_CACHE
from dist_lab.data.datasets import DATASETS, image_of
from dist_lab.data.prefetch import prefetch
from dist_lab.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_CACHE", "Data", "check", "open_data", "prefetch"]

Shape = tuple[int, int, int]  # of an image: channels, height, width


class Data(Protocol):
    """Batches of text or images, as the training loop reads them.

    `rows` picks rows of the GLOBAL batch, as in `range(batch)[rows]`. Both methods return
    (inputs, targets).

        text    int64 token ids below `vocab`, each (rows, seq); targets[r, t] is what a model
                should say after inputs[r, : t + 1]
        images  float32 (rows, channels, height, width), of mean 0 and deviation 1 or about that;
                int64 classes below `vocab`, (rows,)

    They are pure: the same arguments give the same tensors in every process, and slices laid end
    to end give the whole batch.
    """

    name: str  # for the log
    vocab: int  # token ids, or classes, are 0 .. vocab - 1
    image: Shape | None  # None: text. Data of your own that has no such attribute is text
    sha256: str  # of everything there is to read, for the log; "" if there is no such hash
    validation_batches: int  # how many different ones `validation` has; 0 means no validation

    def batch(self, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the global training batch of `step`, counted from 0 and never exhausted."""

    def validation(self, index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of global validation batch `index`, 0 <= index < validation_batches."""


def check(
    spec: str,
    *,
    seq: int,
    cache_dir: Path = DEFAULT_CACHE,
    download: bool = False,
    fits: Callable[[Shape | None], None] = lambda image: None,
) -> corpus.Corpus | None:
    """Answer for `--data spec` before a rank starts: the errors of `open_data`, without torch.

    The cached corpus is built on the way, and returned, or the dataset fetched. Of a
    `module:function` only the module is looked for; what the function returns is judged by
    `open_data`, because running it may well take torch.

    Args:
        download: fetch a dataset that is not in the cache folder.
        fits: told the shape of an image, None for text; raises if the model cannot take such data.
    """
    if download and spec not in DATASETS:
        raise UserError(
            f"download=True fetches data {' or '.join(DATASETS)}, and data={spec!r} is neither; "
            "drop it"
        )
    if custom.is_custom(spec):
        custom.locate(spec)
        return None
    fits(image_of(spec))
    if spec in DATASETS:
        datasets.require(spec, cache_dir, download=download)
    if image_of(spec) is not None:
        return None
    text = corpus.find(spec, cache_dir)
    corpus.require(text, seq)
    return text


def open_data(
    spec: str,
    *,
    batch: int,
    seq: int,
    seed: int,
    cache_dir: Path = DEFAULT_CACHE,
    download: bool = False,
    fits: Callable[[Shape | None], None] = lambda image: None,
    validation_batches: int = 8,
) -> Data:
    """Open what `--data` names: `batch` samples a step, all ranks together.

    That is the name of images (`datasets.image_of`), a `module:function`, or else text
    (`corpus.ACCEPTED`), which comes in sequences of `seq`. At most `validation_batches` batches are
    held ready for validation, fewer if there is no more to hold out; a custom `module:function`
    decides for itself. `download` and `fits` as in `check`.

    Raises UserError when there is nothing of that name, not one sequence in it, or the function
    does not keep the protocol of Data; MachineError when the cache folder cannot be written, or a
    dataset not be fetched.
    """
    text = check(spec, seq=seq, cache_dir=cache_dir, download=download, fits=fits)
    if custom.is_custom(spec):
        data = custom.open_custom(spec, batch=batch, seq=seq, seed=seed)
        fits(data.image)
        return data
    order = {"batch": batch, "seed": seed, "validation_batches": validation_batches}
    # What follows is imported here and not above, because it imports torch.
    if text is not None:
        from dist_lab.data.text import Text

        return Text(text, seq=seq, **order)
    if spec == "glyphs":
        from dist_lab.data.glyphs import Glyphs

        return Glyphs(**order)
    from dist_lab.data.images import Fake, Stored

    return Stored(spec, cache_dir, **order) if spec in DATASETS else Fake(spec, **order)
