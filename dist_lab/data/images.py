"""Images that are the same every time: a dataset from disk, and noise that stands for one.

Which image is row r of step s is order.py's arithmetic; pixels are centered and scaled by the
dataset's own mean and deviation, and nothing is augmented.

Letters: N images, C channels, H and W sides, R rows asked for.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_lab.data.datasets import DATASETS, image_of
from dist_lab.data.order import Ids, Order, positions
from dist_lab.errors import UserError
from dist_lab.torchvision_import import fix_torchvision

Pixels = npt.NDArray[np.uint8]


class Stored:
    """The `Data` of a dataset on disk, held in memory as bytes; its test images for validation.

    Raises UserError if the files do not hold what they should.
    """

    def __init__(
        self, spec: str, cache_dir: Path, *, batch: int, seed: int, validation_batches: int
    ) -> None:
        dataset = DATASETS[spec]
        self.name, self.vocab = spec, dataset.classes
        self.image: tuple[int, int, int] | None = dataset.image
        self._train, self._validation = (load(spec, cache_dir, train=t) for t in (True, False))
        parts = (array.tobytes() for pair in (self._train, self._validation) for array in pair)
        self.sha256 = hashlib.sha256(b"".join(parts)).hexdigest()
        self._order = Order(len(self._train[0]), batch=batch, seed=seed)
        self._batch = batch
        # Test images too few for one batch still give one, in which they come more than once.
        self._held_out = len(self._validation[0])
        self.validation_batches = min(validation_batches, max(1, self._held_out // batch))
        self._mean = torch.tensor(dataset.mean)[:, None, None]
        self._deviation = torch.tensor(dataset.deviation)[:, None, None]

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Images (R, C, H, W) float32 and their classes (R,) int64, each image once an epoch."""
        return self._picked(*self._train, self._order(step, rows))

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same images at every call, spread evenly over all test images."""
        number = positions(index, rows, self._batch)
        ids = number * self._held_out // (self.validation_batches * self._batch)
        return self._picked(*self._validation, ids)

    def _picked(self, images: Pixels, classes: Ids, ids: Ids) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images[ids]).float() / 255
        return (pixels - self._mean) / self._deviation, torch.from_numpy(classes[ids])


def load(spec: str, cache_dir: Path, *, train: bool) -> tuple[Pixels, Ids]:
    """Images (N, C, H, W) and their classes (N,). torchvision checks CIFAR-10's files by MD5."""
    fix_torchvision()
    import torchvision

    dataset = DATASETS[spec]
    root = Path(os.path.expanduser(cache_dir))
    try:
        found = getattr(torchvision.datasets, dataset.torchvision)(root, train=train)
        images, classes = np.asarray(found.data), np.asarray(found.targets, np.int64)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        if images.shape != (len(classes), *dataset.image) or not len(classes):
            raise ValueError(f"images {images.shape} and classes {classes.shape}")
        if classes.min() < 0 or classes.max() >= dataset.classes:
            raise ValueError(f"classes from {classes.min()} to {classes.max()}")
    except Exception as error:  # whatever a damaged file provokes in somebody else's reader
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            f"data={spec}: the files in {str(root / dataset.folder)!r} are damaged ({said}); "
            "move that folder out of the way and add download=True"
        ) from error
    return np.ascontiguousarray(images, np.uint8), classes


class Fake:
    """Noise with classes by chance, for measuring speed: there is nothing to learn but by heart.

    Sample i is that of torchvision's FakeData, before FakeData makes it a picture: a normal tensor
    and a class, drawn in this order by a generator that i seeds.
    """

    vocab = 10
    sha256 = ""
    samples = 1000  # FakeData's own default; validation has the samples after these

    def __init__(self, spec: str, *, batch: int, seed: int, validation_batches: int) -> None:
        self.name, self.image = spec, image_of(spec)
        self.validation_batches = validation_batches
        self._batch = batch
        self._order = Order(self.samples, batch=batch, seed=seed)

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Images (R, C, H, W) float32 and their classes (R,) int64, each image once an epoch."""
        return self._drawn(self._order(step, rows))

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same images at every call."""
        return self._drawn(self.samples + positions(index, rows, self._batch))

    def _drawn(self, ids: Ids) -> tuple[Tensor, Tensor]:
        assert self.image is not None
        images = torch.empty(len(ids), *self.image)
        classes = torch.empty(len(ids), dtype=torch.int64)
        for row, number in enumerate(ids):
            generator = torch.Generator().manual_seed(int(number))
            images[row] = torch.randn(self.image, generator=generator)
            classes[row] = torch.randint(self.vocab, (), generator=generator)
        return images, classes
