"""Image data: every mesh reads the same samples; glyphs, noise, datasets on disk, downloads."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lab import data
from dist_lab.data import Data, datasets, images
from dist_lab.data.cast import Cast
from dist_lab.data.datasets import DATASETS
from dist_lab.data.glyphs import CLASSES, MEAN, STD, Glyphs, draw_characters
from dist_lab.errors import MachineError, UserError

ROOT = Path(__file__).parents[2]
SPLITS = [[10], [5, 5], [4, 3, 3], [1, 2, 3, 4], [10, 0], [1] * 10]


def idx(folder: Path, name: str, array: np.ndarray) -> None:
    """Write a file in the format of MNIST: magic number, sizes, bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(cache: Path, *, train: int = 25, test: int = 12) -> None:
    """Write images with all pixels i and class i % 10; test images have i from 100."""
    folder = cache / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, first, count in (("train", 0, train), ("t10k", 100, test)):
        numbers = np.arange(first, first + count)
        idx(folder, f"{split}-images-idx3-ubyte", numbers[:, None, None] + np.zeros((1, 28, 28)))
        idx(folder, f"{split}-labels-idx1-ubyte", numbers % 10)


def opened(spec: str, cache: Path | None = None, *, batch: int = 10, seed: int = 3) -> Data:
    if cache is None:
        return data.open_data(spec, batch=batch, seq=1, seed=seed)
    return data.open_data(spec, batch=batch, seq=1, seed=seed, cache_dir=cache)


@pytest.fixture
def mnist(tmp_path: Path) -> Data:
    write_mnist(tmp_path)
    return opened("mnist", tmp_path)


@pytest.fixture(params=["glyphs", "fake", "fake:1x8x12", "mnist"])
def any_images(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    write_mnist(tmp_path)
    return opened(request.param, tmp_path)


# Batches: a pure function of (seed, step).


def test_a_batch_has_the_shapes_and_dtypes_of_the_data_protocol(any_images: Data) -> None:
    pixels, classes = any_images.batch(0, slice(0, 10))
    assert pixels.shape == (10, *any_images.image)
    assert (pixels.dtype, classes.dtype, classes.shape) == (torch.float32, torch.int64, (10,))
    assert pixels.isfinite().all()
    assert classes.min() >= 0
    assert classes.max() < any_images.vocab
    assert any_images.validation_batches >= 1


@pytest.mark.parametrize("step", [0, 2, 1000])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_consecutive_slices_concatenate_to_the_whole_batch(
    any_images: Data, sizes: list[int], step: int
) -> None:
    edges = np.cumsum([0, *sizes])
    for batch, at in ((any_images.batch, step), (any_images.validation, 0)):
        parts = [batch(at, slice(int(a), int(b))) for a, b in pairwise(edges)]
        for whole, slices in zip(batch(at, slice(None)), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(slices), whole)


def test_a_batch_depends_on_seed_and_step_and_not_on_earlier_calls(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    rows = slice(0, 10)
    for spec in ("glyphs", "fake", "mnist"):
        used, other = opened(spec, tmp_path), opened(spec, tmp_path, seed=4)
        for step in (3, 0, 7, 1):
            assert torch.equal(
                used.batch(step, rows)[0], opened(spec, tmp_path).batch(step, rows)[0]
            )
        assert not torch.equal(used.batch(0, rows)[0], used.batch(1, rows)[0])
        assert not torch.equal(used.batch(0, rows)[0], other.batch(0, rows)[0])
        assert torch.equal(used.validation(0, rows)[0], other.validation(0, rows)[0])
        assert opened(spec, tmp_path).sha256 == other.sha256


def test_batches_of_any_size_are_consecutive_ranges_of_one_stream() -> None:
    large, small = opened("glyphs", batch=12), opened("glyphs", batch=4)
    steps = [small.batch(step, slice(None))[0] for step in range(3)]
    assert torch.equal(torch.cat(steps), large.batch(0, slice(None))[0])


# Glyphs.


def test_no_two_glyphs_are_equal_in_training_or_validation() -> None:
    glyphs = Glyphs(batch=500, seed=0, validation_batches=2)
    trained = [glyphs.batch(step, slice(None))[0].flatten(1) for step in range(4)]
    held_out = [glyphs.validation(i, slice(None))[0].flatten(1) for i in range(2)]
    everything = torch.cat(trained + held_out)
    assert len(everything.unique(dim=0)) == len(everything) == 3000


def test_glyphs_are_normalized_and_all_classes_are_equally_frequent() -> None:
    pixels, classes = Glyphs(batch=6000, seed=1, validation_batches=1).batch(0, slice(None))
    assert abs(pixels.mean()) < 0.02
    assert abs(pixels.std() - 1) < 0.02
    counts = classes.bincount(minlength=len(CLASSES))
    assert counts.min() > 0.6 * 6000 / len(CLASSES)


def test_a_glyph_resembles_its_character() -> None:
    """The nearest drawn picture, after blurring, is the right one far more often than by chance."""
    atlas = torch.from_numpy(draw_characters()).float()[:, None] / 255
    pixels, classes = Glyphs(batch=400, seed=0, validation_batches=1).batch(0, slice(None))
    blur = torch.nn.AvgPool2d(9, 2, padding=4)
    near = torch.cdist(blur(pixels * STD + MEAN).flatten(1), blur(atlas).flatten(1)).argmin(1)
    assert (near == classes).float().mean() > 8 / len(CLASSES)


def test_the_drawn_characters_differ_and_fit_into_their_square() -> None:
    atlas = draw_characters()
    assert len(np.unique(atlas.reshape(len(CLASSES), -1), axis=0)) == len(CLASSES) == 34
    frame = np.ones_like(atlas[0], dtype=bool)
    frame[1:-1, 1:-1] = False
    assert atlas[:, frame].max() < 128
    assert (atlas.reshape(len(CLASSES), -1).max(1) > 200).all()


def test_a_pillow_without_freetype_is_a_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFont

    def unable(size: int) -> object:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", unable)
    with pytest.raises(MachineError, match=r"_imagingft.*pip install --force-reinstall pillow"):
        opened("glyphs")


# Noise.


def test_fake_images_equal_those_of_torchvisions_fakedata() -> None:
    from torchvision.datasets import FakeData
    from torchvision.transforms.functional import to_pil_image

    fake = images.Fake("fake:3x6x5", batch=7, seed=0, validation_batches=1)
    theirs = FakeData(size=2000, image_size=(3, 6, 5), num_classes=10)
    ids = fake._order(2, slice(None))
    pixels, classes = fake.batch(2, slice(None))
    held_out = fake.validation(0, slice(None))[1]
    for row, number in enumerate(ids):
        picture, target = theirs[int(number)]
        assert classes[row] == target
        assert picture.tobytes() == to_pil_image(pixels[row]).tobytes()
    assert held_out.tolist() == [theirs[1000 + i][1] for i in range(7)]


def test_fake_images_do_not_use_the_global_random_generator() -> None:
    before = torch.random.get_rng_state()
    opened("fake").batch(0, slice(None))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "spec", ["fake:", "fake:3x30", "fake:0x8x8", "fake:3x8x8x8", "fake:3x8x99999"]
)
def test_a_malformed_shape_of_fake_images_is_not_accepted(spec: str) -> None:
    assert datasets.image_of(spec) is None


# Datasets on disk.


def test_every_stored_image_is_read_once_per_epoch_with_its_class(mnist: Data) -> None:
    for epoch in range(2):
        numbers = []
        for position in range(25 * epoch, 25 * (epoch + 1)):
            step, row = divmod(position, 10)
            pixels, classes = mnist.batch(step, slice(row, row + 1))
            number = (pixels * 0.3081 + 0.1307).mul(255).round()
            assert number.min() == number.max()
            assert classes.item() == number[0, 0, 0, 0] % 10
            numbers.append(int(number.max()))
        assert sorted(numbers) == list(range(25))


def test_validation_is_spread_evenly_over_the_test_images(tmp_path: Path) -> None:
    write_mnist(tmp_path, test=50)
    few = opened("mnist", tmp_path)
    assert few.validation_batches == 5
    tiny = data.open_data(
        "mnist", batch=10, seq=1, seed=0, cache_dir=tmp_path, validation_batches=2
    )
    pixels = torch.cat([tiny.validation(i, slice(None))[0] for i in range(2)])
    numbers = (pixels[:, 0, 0, 0] * 0.3081 + 0.1307).mul(255).round()
    assert numbers.tolist() == [100 + i * 50 // 20 for i in range(20)]


def test_too_few_test_images_for_a_batch_still_give_one(tmp_path: Path) -> None:
    write_mnist(tmp_path, test=3)
    few = opened("mnist", tmp_path)
    assert few.validation_batches == 1
    assert few.validation(0, slice(None))[0].shape == (10, 1, 28, 28)


def test_cifar_is_read_in_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name in DATASETS["cifar10"].files:
        rows = np.repeat(np.arange(3, dtype=np.uint8) * 50, 1024)[None].repeat(4, 0)  # R, G, B
        content = {"data": rows, "labels": [0, 1, 2, 9], "label_names": list("abcdefghij")}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    lists = {"train_list": CIFAR10.train_list, "test_list": CIFAR10.test_list}
    for attribute, files in lists.items():
        monkeypatch.setattr(CIFAR10, attribute, [[name, sums[name]] for name, _ in files])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    cifar10 = opened("cifar10", tmp_path, batch=20)
    pixels, classes = cifar10.batch(0, slice(None))
    assert sorted(classes.tolist()) == 5 * [0] + 5 * [1] + 5 * [2] + 5 * [9]
    row = DATASETS["cifar10"]
    for channel in range(3):
        expected = (channel * 50 / 255 - row.mean[channel]) / row.deviation[channel]
        torch.testing.assert_close(pixels[:, channel], torch.full((20, 32, 32), expected))

    (folder / "data_batch_3").write_bytes(b"cut short")  # it is unpickled only if its MD5 is right
    with pytest.raises(UserError, match=r"are damaged \(RuntimeError Dataset not found or"):
        opened("cifar10", tmp_path)


def refusal(spec: str, cache: Path) -> str:
    """Returns the message, which is the same from `check` and `open_data`."""
    with pytest.raises(UserError) as checked:
        data.check(spec, seq=1, cache_dir=cache)
    with pytest.raises(UserError) as raised:
        opened(spec, cache)
    assert str(checked.value) == str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("spec", DATASETS)
def test_for_a_missing_dataset_the_error_says_how_to_download_it(spec: str, tmp_path: Path) -> None:
    line = refusal(spec, tmp_path / "cache")
    assert line.startswith(f"data={spec} is not on this machine: '{tmp_path}/cache/")
    count, size = len(DATASETS[spec].files), DATASETS[spec].megabytes
    assert f"lacks {count} of {count} files, first " in line
    assert f"download {size} MB by download=True, or name the root folder" in line
    assert not (tmp_path / "cache").exists()


def test_an_incomplete_dataset_is_refused_and_not_changed(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert "lacks 1 of 4 files, first 't10k-labels-idx1-ubyte'" in refusal("mnist", tmp_path)
    with pytest.raises(UserError, match=r"exists, but lacks 't10k-labels.*move it away"):
        data.check("mnist", seq=1, cache_dir=tmp_path, download=True)
    assert len(list((tmp_path / "MNIST" / "raw").iterdir())) == 3


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda folder: os.truncate(folder / "train-images-idx3-ubyte", 500),
    "empty": lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(b""),
    "text": lambda folder: (folder / "train-images-idx3-ubyte").write_text("<html>404</html>"),
    "fewer labels": lambda folder: idx(folder, "train-labels-idx1-ubyte", np.zeros(3)),
    "another size": lambda folder: idx(folder, "train-images-idx3-ubyte", np.zeros((25, 8, 8))),
    "a class too many": lambda folder: idx(folder, "t10k-labels-idx1-ubyte", np.full(12, 10)),
    "no images": lambda folder: [
        idx(folder, "train-images-idx3-ubyte", np.zeros((0, 28, 28))),
        idx(folder, "train-labels-idx1-ubyte", np.zeros(0)),
    ],
}


@pytest.mark.filterwarnings("default")  # torchvision's reader warns about some of these
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    DAMAGE[damage](tmp_path / "MNIST" / "raw")
    with pytest.raises(UserError) as caught:
        opened("mnist", tmp_path)
    line = str(caught.value)
    assert line.isprintable()
    assert re.match(r"data=mnist: the files in '.*MNIST/raw' are damaged \(\w+", line), line
    assert line.endswith("; move that folder away and add download=True")


# Downloads: by one process, complete or not at all, and only with --download.


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Makes torchvision download MNIST by `write_mnist`. Returns the folders it was called with."""
    from torchvision.datasets import MNIST

    folders: list[Path] = []

    def download(self: MNIST) -> None:
        folders.append(Path(self.root))
        write_mnist(Path(self.root))

    monkeypatch.setattr(MNIST, "download", download)
    return folders


def test_a_dataset_is_downloaded_once_and_only_with_download(
    downloads: list[Path], tmp_path: Path
) -> None:
    cache = tmp_path / "new" / "cache"
    refusal("mnist", cache)
    assert downloads == []
    data.check("mnist", seq=1, cache_dir=cache, download=True)
    again = data.open_data("mnist", batch=2, seq=1, seed=0, cache_dir=cache, download=True)
    assert again.batch(0, slice(None))[0].shape == (2, 1, 28, 28)
    assert len(downloads) == 1
    assert downloads[0].parent == cache  # on the same disk, so that a rename moves it to its place
    assert sorted(path.name for path in cache.iterdir()) == [".mnist.lock", "MNIST"]


@pytest.mark.slow
def test_a_process_waits_while_another_downloads_and_then_downloads_nothing(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import dist_lab
        dist_lab.fix_torchvision()
        import torchvision
        from dist_lab.data import datasets
        torchvision.datasets.MNIST.download = lambda self: sys.exit("downloaded again")
        print("ready", flush=True)
        datasets.require("mnist", Path(sys.argv[1]), download=True)
        print("complete", flush=True)
    """)
    with open(tmp_path / ".mnist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
        )  # fmt: skip
        assert waiting.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        write_mnist(tmp_path)
    stdout, stderr = waiting.communicate(timeout=60)
    assert (stdout, waiting.returncode) == ("complete\n", 0), stderr


def test_a_failed_download_is_reported_in_one_line_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import MNIST

    def cut_off(self: MNIST) -> None:
        Path(self.root, "MNIST").mkdir()
        raise RuntimeError("Error downloading train-images:\nTried http://a, got:\nno network\n")

    monkeypatch.setattr(MNIST, "download", cut_off)
    with pytest.raises(MachineError) as caught:
        data.check("mnist", seq=1, cache_dir=tmp_path, download=True)
    assert "(Error downloading train-images: Tried http://a, got: no network)" in str(caught.value)
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == [".mnist.lock"]
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"cannot download it to '.*file'"):
        data.check("mnist", seq=1, cache_dir=tmp_path / "file", download=True)


@pytest.mark.parametrize("spec", ["stdlib", "glyphs", "my:own"])
def test_download_is_refused_for_data_that_cannot_be_downloaded(spec: str, tmp_path: Path) -> None:
    line = f"download=True is for data mnist or cifar10, and data={spec!r} is neither; leave it out"
    with pytest.raises(UserError, match=re.escape(line)):
        data.check(spec, seq=1, cache_dir=tmp_path, download=True)
    with pytest.raises(UserError, match=re.escape(line)):
        data.open_data(spec, batch=1, seq=1, seed=0, cache_dir=tmp_path, download=True)


def test_data_that_the_model_cannot_take_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def fits(image: object) -> None:
        raise UserError(f"not {image}")

    for spec, image in {"mnist": (1, 28, 28), "glyphs": (1, 28, 28), "stdlib": None}.items():
        with pytest.raises(UserError, match=re.escape(f"not {image}")):
            data.check(spec, seq=1, cache_dir=tmp_path, fits=fits)
        with pytest.raises(UserError, match=re.escape(f"not {image}")):
            data.open_data(spec, batch=1, seq=1, seed=0, cache_dir=tmp_path, fits=fits)
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_checks_images_without_torch(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from dist_lab import data
        for spec in ("glyphs", "fake", "mnist"):
            data.check(spec, seq=8, cache_dir=Path(sys.argv[1]))
        print("torch" in sys.modules, "PIL" in sys.modules)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("False False\n", "")


# module:function that returns images.

OWN = """
import torch

class Dots:
    name, vocab, sha256, validation_batches = "dots", 3, "", 1
    image = (2, 4, 6)

    def batch(self, step, rows):
        classes = torch.arange(100)[rows] % 3
        return torch.ones(len(classes), 2, 4, 6) * classes[:, None, None, None], classes

    validation = batch

def dots(batch, seq, seed):
    return Dots()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield (tmp_path / "pictures.py").write_text
    assert sys.path == path
    sys.modules.pop("pictures", None)


def test_a_users_own_data_may_be_images(module: Callable[[str], None]) -> None:
    module(OWN)
    own = opened("pictures:dots", batch=4)
    assert (own.name, own.vocab, own.image) == ("dots", 3, (2, 4, 6))
    assert own.batch(0, slice(2, 4))[1].tolist() == [2, 0]


def test_a_users_own_data_without_an_image_attribute_is_text(module: Callable[[str], None]) -> None:
    tokens = "torch.zeros(len(torch.arange(100)[rows]), 1).long()"
    body = OWN.replace("    image = (2, 4, 6)\n", "    __slots__ = ()\n")
    start, end = body.index("        classes ="), body.index("    validation =")
    module(f"{body[:start]}        return {tokens}, {tokens}\n\n{body[end:]}")
    assert opened("pictures:dots", batch=4).image is None


MISSHAPEN = {
    "no shape": ("(2, 4, 6)", "(4, 6)", "whose image is (4, 6); make it (channels, height, width)"),
    "no side": ("(2, 4, 6)", "(2, 4, 0)", "whose image is (2, 4, 0); make it"),
    "bytes": (
        "return torch.ones(len(classes), 2, 4, 6) *", "return torch.ones(1).long() *",
        "returned inputs (4, 1, 1, 1) of torch.int64, not (4, 2, 4, 6) of torch.float32",
    ),
    "channels last": (
        "2, 4, 6) *", "4, 6, 2) *", "returned inputs (4, 4, 6, 2) of torch.float32, not (4, 2, 4, 6"
    ),
    "not finite": ("6) * classes", "6) * float('nan') * classes", "inputs that are not finite;"),
    "a class too many": ("vocab, sha256, validation_batches = \"dots\", 3", "vocab, sha256, "
        "validation_batches = \"dots\", 2", "targets from 0 to 2, although vocab is 2"),
    "a class a pixel": (", classes\n", ", classes[:, None]\n", "returned targets (4, 1) of torch."),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSHAPEN)
def test_a_users_own_images_with_a_wrong_shape_dtype_or_class_are_refused(
    case: str, module: Callable[[str], None]
) -> None:
    old, new, message = MISSHAPEN[case]
    assert old in OWN
    module(OWN.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        opened("pictures:dots", batch=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# In another dtype.


def test_images_are_cast_and_classes_and_tokens_are_not(tmp_path: Path) -> None:
    fake = opened("fake")
    wide = Cast(fake, torch.float64)
    for a, b in ((wide.batch, fake.batch), (wide.validation, fake.validation)):
        (pixels, classes), (narrow, same) = a(0, slice(None)), b(0, slice(None))
        assert (pixels.dtype, classes.dtype) == (torch.float64, torch.int64)
        assert torch.equal(pixels.float(), narrow)
        assert torch.equal(classes, same)
    (tmp_path / "text.txt").write_text("some words " * 50)
    text = data.open_data(str(tmp_path / "text.txt"), batch=2, seq=5, seed=0, cache_dir=tmp_path)
    tokens = Cast(text, torch.float64).batch(0, slice(None))[0]
    assert tokens.dtype == torch.int64
