"""Images from a finite set: a dataset on disk, or noise with the shape of one.

order.py computes which image is row r of step s. Pixels are normalized by the dataset's mean and
deviation. There is no augmentation.

Letters: N images, C channels, H and W sides, R rows.
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
    """The `Data` of a dataset on disk, loaded into memory as bytes; validation has its test images.

    Raises UserError if the files are damaged.
    """

    tokenizer = None

    def __init__(
        self, spec: str, cache_dir: Path, *, batch: int, seed: int, validation_batches: int
    ) -> None:
        dataset = DATASETS[spec]
        self.name, self.vocab = spec, dataset.classes
        self.image: tuple[int, int, int] | None = dataset.image
        self._train, self._validation = (load(spec, cache_dir, train=t) for t in (True, False))
        parts = (array.tobytes() for pair in (self._train, self._validation) for array in pair)
        self.sha256 = hashlib.sha256(b"".join(parts)).hexdigest()
        self.samples = len(self._train[0])
        self._order = Order(self.samples, batch=batch, seed=seed)
        self._batch = batch
        # Too few test images for one batch still give one batch, which repeats some of them.
        self._held_out = len(self._validation[0])
        self.validation_batches = min(validation_batches, max(1, self._held_out // batch))
        self._mean = torch.tensor(dataset.mean)[:, None, None]
        self._deviation = torch.tensor(dataset.deviation)[:, None, None]

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Images (R, C, H, W) float32 and their classes (R,) int64, each image once per epoch."""
        return self._select(*self._train, self.sample_ids(step, rows))

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same images at every call, spread evenly over all test images."""
        number = positions(index, rows, self._batch)
        ids = number * self._held_out // (self.validation_batches * self._batch)
        return self._select(*self._validation, ids)

    def sample_ids(self, step: int, rows: slice) -> Ids:
        """The numbers of the training images of these rows, (R,)."""
        return self._order(step, rows)

    def _select(self, images: Pixels, classes: Ids, ids: Ids) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(images[ids]).float() / 255
        return (pixels - self._mean) / self._deviation, torch.from_numpy(classes[ids])


def load(spec: str, cache_dir: Path, *, train: bool) -> tuple[Pixels, Ids]:
    """Load images (N, C, H, W) and their classes (N,). torchvision checks the MD5 of CIFAR-10."""
    fix_torchvision()
    import torchvision

    dataset = DATASETS[spec]
    root = Path(os.path.expanduser(cache_dir))
    try:
        loaded = getattr(torchvision.datasets, dataset.torchvision)(root, train=train)
        images, classes = np.asarray(loaded.data), np.asarray(loaded.targets, np.int64)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        if images.shape != (len(classes), *dataset.image) or not len(classes):
            raise ValueError(f"images {images.shape} and classes {classes.shape}")
        if classes.min() < 0 or classes.max() >= dataset.classes:
            raise ValueError(f"classes from {classes.min()} to {classes.max()}")
    except Exception as error:  # torchvision's reader may raise anything for a damaged file
        message = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            f"data={spec}: the files in {str(root / dataset.folder)!r} are damaged ({message}); "
            "move that folder away and add download=True"
        ) from error
    return np.ascontiguousarray(images, np.uint8), classes


class Fake:
    """Noise with random classes, for measuring speed: a model can only memorize it.

    Sample i is sample i of torchvision's FakeData, before FakeData converts it to a picture: a
    normal tensor and then a class, drawn by a generator with seed i.
    """

    vocab = 10
    sha256 = ""
    tokenizer = None
    samples = 1000  # FakeData's default; those after these are for validation

    def __init__(self, spec: str, *, batch: int, seed: int, validation_batches: int) -> None:
        self.name, self.image = spec, image_of(spec)
        self.validation_batches = validation_batches
        self._batch = batch
        self._order = Order(self.samples, batch=batch, seed=seed)

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Images (R, C, H, W) float32 and their classes (R,) int64, each image once per epoch."""
        return self._noise(self.sample_ids(step, rows))

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same images at every call."""
        return self._noise(self.samples + positions(index, rows, self._batch))

    def sample_ids(self, step: int, rows: slice) -> Ids:
        """The numbers of these rows' images, which are the seeds of their noise, (R,)."""
        return self._order(step, rows)

    def _noise(self, ids: Ids) -> tuple[Tensor, Tensor]:
        assert self.image is not None
        images = torch.empty(len(ids), *self.image)
        classes = torch.empty(len(ids), dtype=torch.int64)
        for row, number in enumerate(ids):
            generator = torch.Generator().manual_seed(int(number))
            images[row] = torch.randn(self.image, generator=generator)
            classes[row] = torch.randint(self.vocab, (), generator=generator)
        return images, classes
