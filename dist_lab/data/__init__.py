"""Data: a global batch is a pure function of (seed, step), and each rank reads a slice of its rows.

Every rank can compute which samples are in the global batch, and loads only its own rows. So a run
sees the same samples in the same order on any mesh, and also after a resume.

    corpus.py    bytes from the standard library, a text file or a folder, cached as a memory map
    tokenized.py the same in other tokens; bpe.py trains and encodes, tokenizer.py decodes
    text.py      windows of those tokens, each exactly once per epoch
    glyphs.py    characters of Pillow's font, distorted at random
    datasets.py  MNIST and CIFAR-10: are the files on disk, and downloading them once
    images.py    the images of datasets, each exactly once per epoch; and noise
    order.py     the order of samples
    custom.py    your own `module:function`, checked before the first step
    dataset.py   a map-style Dataset that such a function returns
    sampler.py   the same order for your own loop and torch's DataLoader
    prefetch.py  loads the next batch while the current one is used
    cast.py      images in the dtype of the model

This file, datasets.py and all that makes a corpus do not import torch, because the launcher calls
`check` before it starts a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dist_lab.data import corpus, custom, datasets
from dist_lab.data.corpus import DEFAULT_CACHE
from dist_lab.data.datasets import DATASETS, image_of
from dist_lab.data.prefetch import prefetch
from dist_lab.data.tokenized import tokenize
from dist_lab.data.tokenizer import BYTES
from dist_lab.errors import UserError

if TYPE_CHECKING:
    import torch

    from dist_lab.data.order import Ids
    from dist_lab.data.tokenizer import FileTokenizer

__all__ = ["DEFAULT_CACHE", "Data", "check", "open_data", "prefetch"]

Shape = tuple[int, int, int]  # of an image: channels, height, width


class Data(Protocol):
    """Batches of text or images, as the training loop reads them.

    `rows` picks rows of the GLOBAL batch, as in `range(batch)[rows]`. Both methods return
    (inputs, targets).

        text    int64 token ids below `vocab`, both (rows, seq); targets[r, t] is the token that
                follows inputs[r, : t + 1]
        images  float32 (rows, channels, height, width), with mean 0 and deviation 1, roughly;
                int64 classes below `vocab`, (rows,)

    They are pure functions: the same arguments give the same tensors in every process, and
    consecutive slices concatenate to the whole batch.

    These may be missing, which is the same as None: `image`; `tokenizer`, if a token of text is not
    a byte, and it is known which bytes it stands for; `samples`, the number of samples per epoch,
    each of which occurs once; the method `sample_ids(step, rows)`, which returns the numbers of the
    samples in these rows of a training batch, an array (rows,).
    """

    name: str  # for the log
    vocab: int  # token ids, or classes, are 0 .. vocab - 1
    image: Shape | None  # the shape of an image; None: text
    sha256: str  # hash of all samples, for the log; "" if there is none
    validation_batches: int  # number of validation batches; 0: no validation

    @property
    def tokenizer(self) -> FileTokenizer | None: ...

    @property
    def samples(self) -> int | None: ...

    @property
    def sample_ids(self) -> Callable[[int, slice], Ids] | None: ...

    def batch(self, step: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the global training batch of `step`, for any step from 0."""

    def validation(self, index: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of global validation batch `index`, 0 <= index < validation_batches."""


def check(
    spec: str,
    *,
    seq: int,
    tokenizer: str = BYTES,
    cache_dir: Path = DEFAULT_CACHE,
    download: bool = False,
    fits: Callable[[Shape | None], None] = lambda image: None,
    tell: Callable[[str], None] = lambda line: None,
) -> corpus.Corpus | None:
    """Check `--data spec` before a rank starts: raises the errors of `open_data`, without torch.

    This also builds the cached corpus and returns it, in tokens of the tokenizer, which is trained
    first if need be; or it downloads the dataset. For a `module:function` it only checks that the
    module exists; `open_data` checks the data that the function returns, because calling it usually
    needs torch.

    Args:
        tokenizer: of text: bytes or bpe:N.
        download: download a dataset that is not in the cache folder.
        fits: called with the shape of an image, or None for text; raises if the model cannot take
            such data.
        tell: called with a line before work that takes a while.
    """
    if download and spec not in DATASETS:
        raise UserError(
            f"download=True is for data {' or '.join(DATASETS)}, and data={spec!r} is neither; "
            "leave it out"
        )
    if tokenizer != BYTES and (custom.is_custom(spec) or image_of(spec) is not None):
        own = "its own tokens" if custom.is_custom(spec) else "images"
        raise UserError(
            f'tokenizer="{tokenizer}" is for text, and data={spec!r} has {own}; leave it out'
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
    if tokenizer == BYTES:
        return text
    tokens = tokenize(text, tokenizer, tell)
    corpus.require(tokens, seq)
    return tokens


def open_data(
    spec: str,
    *,
    batch: int,
    seq: int,
    seed: int,
    tokenizer: str = BYTES,
    cache_dir: Path = DEFAULT_CACHE,
    download: bool = False,
    fits: Callable[[Shape | None], None] = lambda image: None,
    tell: Callable[[str], None] = lambda line: None,
    validation_batches: int = 8,
) -> Data:
    """Open the data that `--data` names. `batch` is the number of samples per step, over all ranks.

    `spec` is the name of an image dataset (`datasets.image_of`), a `module:function`, or else text
    (`corpus.ACCEPTED`), read in sequences of `seq` tokens. There are at most `validation_batches`
    validation batches, fewer if not enough data is held out; the Data of a `module:function`
    decides for itself. `tokenizer`, `download`, `fits` and `tell` are as in `check`.

    Raises UserError when no data has that name, the text is shorter than one sequence or has too
    few pairs for the tokenizer, or the function does not return a Data or a Dataset; MachineError
    when the cache folder cannot be written, or a dataset cannot be downloaded.
    """
    text = check(
        spec, seq=seq, tokenizer=tokenizer, cache_dir=cache_dir, download=download, fits=fits,
        tell=tell,
    )  # fmt: skip
    order = {"batch": batch, "seed": seed, "validation_batches": validation_batches}
    if custom.is_custom(spec):
        data = custom.open_custom(spec, seq=seq, **order)
        fits(data.image)
        return data
    # Imported here and not above, because these files import torch.
    if text is not None:
        from dist_lab.data.text import Text

        return Text(text, seq=seq, **order)
    if spec == "glyphs":
        from dist_lab.data.glyphs import Glyphs

        return Glyphs(**order)
    from dist_lab.data.images import Fake, Stored

    return Stored(spec, cache_dir, **order) if spec in DATASETS else Fake(spec, **order)
