"""Images of characters to classify, without a download: Pillow's font, distorted at random.

Each class is a character, drawn once. A sample is that picture rotated, stretched, sheared and
shifted by random amounts. So no two samples are equal and there are no epochs. Validation uses
another random stream, so its distortions never occur in training.

Sample i of a stream uses words 8i to 8i + 7 of a counter-based random generator (Philox; Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which computes the words at any position
directly. So row r of step s is a function of (seed, s * batch + r), and all rows of a slice are
computed together.

Letters: R rows, S side of an image, V classes.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_lab.data.datasets import GLYPHS
from dist_lab.data.order import Ids, positions
from dist_lab.errors import MachineError

CLASSES = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O, which look like 1 and 0
SIDE = GLYPHS[1]
FONT = 26  # font size: capitals are 19 pixels high

# The largest distortions.
TURN = 0.4  # radians, in either direction
STRETCH = 0.3  # natural logarithm of the factor of width, and of that of height
SHEAR = 0.25  # columns per row
SHIFT = 0.2  # fraction of half a side, in each direction
WORDS = 8  # random 64-bit words per sample; 7 are used

MEAN, STD = 0.123, 0.279  # of pixels in [0, 1]: images are normalized to mean 0, deviation 1
TRAINING, VALIDATION = 0, 1  # numbers of the random streams


class Glyphs:
    """The `Data` of distorted characters: `batch` images per step, over all ranks."""

    name = "glyphs"
    vocab = len(CLASSES)
    image: tuple[int, int, int] | None = GLYPHS
    samples = None
    tokenizer = None

    def __init__(self, *, batch: int, seed: int, validation_batches: int) -> None:
        self.validation_batches = validation_batches
        self._batch, self._seed = batch, seed
        atlas = draw_characters()
        self.sha256 = hashlib.sha256(atlas.tobytes()).hexdigest()
        self._atlas = torch.from_numpy(atlas.astype(np.float32) / 255)[:, None]  # (V, 1, S, S)

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Images (R, 1, S, S) float32 and their classes (R,) int64."""
        return self._render(TRAINING, self._seed, step, rows)

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same images at every call and for every seed."""
        return self._render(VALIDATION, 0, index, rows)

    def sample_ids(self, step: int, rows: slice) -> Ids:
        """The positions of these rows in the endless stream, (R,): every sample is new."""
        return positions(step, rows, self._batch)

    def _render(self, stream: int, seed: int, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        words = random_words(stream, seed, positions(step, rows, self._batch))
        classes = torch.from_numpy((words[:, 0] % self.vocab).astype(np.int64))
        # 53 bits give a float64 in [0, 1), scaled to [-1, 1).
        uniform = torch.from_numpy((words[:, 1:7] >> 11).astype(np.float64) * 2.0**-52 - 1)
        grid = sampling_grid(uniform).float()
        images = F.grid_sample(self._atlas[classes], grid, align_corners=False)
        return (images - MEAN) / STD, classes


def draw_characters() -> npt.NDArray[np.uint8]:
    """Draw the characters, white on black, each centered in its square: (V, S, S).

    Raises MachineError if Pillow was built without FreeType, which it needs for its font.
    """
    try:
        font = ImageFont.load_default(size=FONT)
    except ImportError as error:
        raise MachineError(
            f"data=glyphs: this Pillow cannot draw its font ({error}); install one with "
            "FreeType: pip install --force-reinstall pillow"
        ) from error
    pictures = []
    for character in CLASSES:
        picture = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), character, 255, font, anchor="mm")
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def random_words(stream: int, seed: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The random words of these samples, (R, WORDS). One Philox counter gives four words."""
    if len(samples) == 0:
        return np.empty((0, WORDS), np.uint64)
    first, last = int(samples.min()), int(samples.max())
    generator = np.random.Philox(key=[seed, stream], counter=first * WORDS // 4)
    return generator.random_raw((last + 1 - first) * WORDS).reshape(-1, WORDS)[samples - first]


def sampling_grid(uniform: Tensor) -> Tensor:
    """The position in the drawn picture of each pixel of a sample, (R, 6) -> (R, S, S, x and y).

    Coordinates run from -1 to 1 over the picture. All arithmetic is elementwise, because a matmul
    may round differently for another number of rows.
    """
    turn, wide, high, shear, right, down = uniform[:, :, None, None].unbind(1)  # each (R, 1, 1)
    across = (torch.arange(SIDE, dtype=uniform.dtype) + 0.5) * 2 / SIDE - 1  # (S,)
    x = (across - SHIFT * right) * torch.exp(STRETCH * wide)  # (R, 1, S)
    y = (across[:, None] - SHIFT * down) * torch.exp(STRETCH * high)  # (R, S, 1)
    x = x + SHEAR * shear * y  # (R, S, S)
    cos, sin = torch.cos(TURN * turn), torch.sin(TURN * turn)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
