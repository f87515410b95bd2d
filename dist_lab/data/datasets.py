"""Images by name; of MNIST and CIFAR-10, whether the files are there, and fetching them once.

The files are torchvision's: the same in the same folders below --cache as torchvision keeps below
its `root`, so a copy made by torchvision serves, and the other way round. Nothing is fetched
unless asked for, by --download. No torch is imported unless something is fetched: the launcher
looks whether the files are there before it starts a rank.

[Note: fetched by one, whole or not at all]
Ranks that find nothing all come here, and one lock lets them in one after the other: the first
fetches, the others then find it done. They wait for the lock and not in a collective, which would
give up long before. Files are fetched into a hidden folder that is renamed when complete.
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
    """A set of images that torchvision knows."""

    torchvision: str  # the class in torchvision.datasets
    folder: str  # below the cache folder
    files: tuple[str, ...]  # in it
    megabytes: int  # to fetch
    image: tuple[int, int, int]  # channels, height, width
    classes: int
    mean: tuple[float, ...]  # of each channel over the training images, pixels being in [0, 1]
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

GLYPHS = (1, 28, 28)  # made here, of any size one likes
IMAGES = {"glyphs": GLYPHS, "fake": (3, 32, 32)} | {n: d.image for n, d in DATASETS.items()}


def image_of(spec: str) -> tuple[int, int, int] | None:
    """The shape of the images that --data names; None for all else, which may have some or none.

    >>> image_of("mnist"), image_of("fake"), image_of("fake:1x20x24"), image_of("stdlib")
    ((1, 28, 28), (3, 32, 32), (1, 20, 24), None)
    """
    if sides := re.fullmatch(r"fake:([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3})", spec):
        channels, height, width = map(int, sides.groups())
        return channels, height, width
    return IMAGES.get(spec)


def require(spec: str, cache_dir: Path, *, download: bool) -> None:
    """Raise UserError unless the files are there; with `download`, fetch them if they are not.

    Raises MachineError when fetching fails.
    """
    dataset, cache = DATASETS[spec], Path(os.path.expanduser(cache_dir))
    folder = cache / dataset.folder
    lacking = missing(folder, dataset)
    if not lacking:
        return
    if not download:
        raise UserError(
            f"data={spec} is not on this machine: {str(folder)!r} lacks {len(lacking)} of "
            f"{len(dataset.files)} files, first {lacking[0]!r}; fetch {dataset.megabytes} MB by "
            "download=True, or name the folder that torchvision was given: cache=DIR"
        )
    try:
        fetch(spec, cache)
    except (OSError, RuntimeError) as error:  # torchvision tells by a RuntimeError of many lines
        said = " ".join(f"{error}".split())[:200]
        raise MachineError(
            f"data={spec}: cannot fetch it into {str(cache)!r} ({said}); put the files of "
            f"torchvision's {dataset.torchvision} there by hand, or name another folder: cache=DIR"
        ) from error


def missing(folder: Path, dataset: Dataset) -> list[str]:
    return [name for name in dataset.files if not (folder / name).is_file()]


def fetch(spec: str, cache: Path) -> None:
    """Fetch the files, unless another process does: [Note: fetched by one, whole or not at all]."""
    dataset = DATASETS[spec]
    place = cache / dataset.folder.partition("/")[0]
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{spec}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        lacking = missing(cache / dataset.folder, dataset)
        if not lacking:
            return
        if place.exists():
            raise UserError(
                f"data={spec}: {str(place)!r} is there, but lacks {lacking[0]!r}; move it out of "
                "the way for download=True"
            )
        fix_torchvision()
        import torchvision

        with tempfile.TemporaryDirectory(prefix=f".{spec}-", dir=cache) as partial:
            getattr(torchvision.datasets, dataset.torchvision)(partial, download=True)
            os.rename(Path(partial, place.name), place)
