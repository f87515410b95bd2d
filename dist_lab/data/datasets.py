"""The names of image datasets; for MNIST and CIFAR-10, checking for the files and downloading them.

The files are torchvision's, in the same folders below --cache as torchvision has below its `root`.
So a copy made by torchvision works here, and the other way round. Nothing is downloaded without
--download. torch is imported only for a download: the launcher checks for the files before it
starts a rank.

[Note: one download]
If files are missing, all ranks call `fetch`. A file lock admits one at a time: the first downloads,
and the others then find the files. They wait for the lock and not in a collective, which would time
out long before. Files are downloaded into a hidden folder that is renamed when complete.
"""

import fcntl
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dist_lab.errors import MachineError, UserError
from dist_lab.torchvision_import import fix_torchvision


@dataclass(frozen=True)
class Dataset:
    """An image dataset of torchvision."""

    torchvision: str  # the class in torchvision.datasets
    folder: str  # below the cache folder
    files: tuple[str, ...]  # in the folder
    megabytes: int  # to download
    image: tuple[int, int, int]  # channels, height, width
    classes: int
    mean: tuple[float, ...]  # per channel, over the training images with pixels in [0, 1]
    deviation: tuple[float, ...]


DATASETS = {
    "mnist": Dataset(
        "MNIST", "MNIST/raw",
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
         "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        11, (1, 28, 28), 10, (0.1307,), (0.3081,),
    ),
    "cifar10": Dataset(
        "CIFAR10", "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        170, (3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
}  # fmt: skip

GLYPHS = (1, 28, 28)  # a choice of ours, because glyphs.py draws them
IMAGES = {"glyphs": GLYPHS, "fake": (3, 32, 32)} | {n: d.image for n, d in DATASETS.items()}


def image_of(spec: str) -> tuple[int, int, int] | None:
    """The shape of the images that --data names; None for text and for `module:function`.

    >>> image_of("mnist"), image_of("fake"), image_of("fake:1x20x24"), image_of("stdlib")
    ((1, 28, 28), (3, 32, 32), (1, 20, 24), None)
    """
    if sides := re.fullmatch(r"fake:([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3})", spec):
        channels, height, width = map(int, sides.groups())
        return channels, height, width
    return IMAGES.get(spec)


def require(spec: str, cache_dir: Path, *, download: bool) -> None:
    """Raise UserError if files are missing; with `download`, download them instead.

    Raises MachineError when the download fails.
    """
    dataset, cache = DATASETS[spec], Path(os.path.expanduser(cache_dir))
    folder = cache / dataset.folder
    absent = missing(folder, dataset)
    if not absent:
        return
    if not download:
        raise UserError(
            f"data={spec} is not on this machine: {str(folder)!r} lacks {len(absent)} of "
            f"{len(dataset.files)} files, first {absent[0]!r}; download {dataset.megabytes} MB by "
            "download=True, or name the root folder of torchvision's datasets: cache=DIR"
        )
    try:
        fetch(spec, cache)
    except (OSError, RuntimeError) as error:  # torchvision raises a RuntimeError of many lines
        message = " ".join(f"{error}".split())[:200]
        raise MachineError(
            f"data={spec}: cannot download it to {str(cache)!r} ({message}); put the files of "
            f"torchvision's {dataset.torchvision} there by hand, or name another folder: cache=DIR"
        ) from error


def missing(folder: Path, dataset: Dataset) -> list[str]:
    """The names of files that are not in the folder."""
    return [name for name in dataset.files if not (folder / name).is_file()]


def fetch(spec: str, cache: Path) -> None:
    """Download the files unless another process has done so: [Note: one download]."""
    dataset = DATASETS[spec]
    target = cache / dataset.folder.partition("/")[0]
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{spec}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        absent = missing(cache / dataset.folder, dataset)
        if not absent:
            return
        if target.exists():
            raise UserError(
                f"data={spec}: {str(target)!r} exists, but lacks {absent[0]!r}; move it away, and "
                "download=True will replace it"
            )
        fix_torchvision()
        import torchvision

        with tempfile.TemporaryDirectory(prefix=f".{spec}-", dir=cache) as partial:
            getattr(torchvision.datasets, dataset.torchvision)(partial, download=True)
            os.rename(Path(partial, target.name), target)
