"""Characters to tell apart, on a machine that has nothing: Pillow brings a font, chance the rest.

Each class is a character, drawn once. A sample is that picture turned, stretched, sheared and
shifted by random amounts, so no two samples are alike, there is no epoch, and validation shows
distortions that training never does: it draws its own from another stream.

Sample i of a stream is made from words 8i to 8i + 7 of a counter-based generator (Philox; Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which gives the words at any place without
those before. So row r of step s is a function of (seed, s * batch + r), and the rows of a slice
are made together.

Letters: R rows, S side of an image.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dist_lab.data.datasets import GLYPHS
from dist_lab.data.order import positions
from dist_lab.errors import MachineError

CLASSES = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and no O, as on licence plates: 1 and 0
SIDE = GLYPHS[1]
FONT = 26  # pixels: the capitals are 19 high

# The most that a sample differs from the drawn picture.
TURN = 0.4  # radians, to either side
STRETCH = 0.3  # natural logarithm of a factor, of width and height each
SHEAR = 0.25  # columns a row
SHIFT = 0.2  # of half a side, along each
WORDS = 8  # of 64 bits, that a sample takes; 7 are used

MEAN, STD = 0.123, 0.279  # of the pixels, in [0, 1]: a model is fed mean 0, deviation 1
TRAINING, VALIDATION = 0, 1  # streams of random numbers


class Glyphs:
    """The `Data` of distorted characters: `batch` images a step, all ranks together."""

    name = "glyphs"
    vocab = len(CLASSES)
    image: tuple[int, int, int] | None = GLYPHS

    def __init__(self, *, batch: int, seed: int, validation_batches: int) -> None:
        self.validation_batches = validation_batches
        self._batch, self._seed = batch, seed
        atlas = drawn()
        self.sha256 = hashlib.sha256(atlas.tobytes()).hexdigest()
        self._atlas = torch.from_numpy(atlas.astype(np.float32) / 255)[:, None]  # (V, 1, S, S)

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Images (R, 1, S, S) float32 and their classes (R,) int64."""
        return self._made(TRAINING, self._seed, step, rows)

    def validation(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same images at every call and for every seed."""
        return self._made(VALIDATION, 0, index, rows)

    def _made(self, stream: int, seed: int, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        words = random_words(stream, seed, positions(step, rows, self._batch))
        classes = torch.from_numpy((words[:, 0] % self.vocab).astype(np.int64))
        # 53 bits are a float64 of [0, 1); then to [-1, 1).
        uniform = torch.from_numpy((words[:, 1:7] >> 11).astype(np.float64) * 2.0**-52 - 1)
        grid = where_from(uniform).float()
        images = F.grid_sample(self._atlas[classes], grid, align_corners=False)
        return (images - MEAN) / STD, classes


def drawn() -> npt.NDArray[np.uint8]:
    """The characters, white on black, each in the middle of its square: (V, S, S).

    Raises MachineError if Pillow was built without FreeType, which draws its font.
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
    """The random words of these samples, (R, WORDS). A place of Philox has four words."""
    if len(samples) == 0:
        return np.empty((0, WORDS), np.uint64)
    first, last = int(samples.min()), int(samples.max())
    generator = np.random.Philox(key=[seed, stream], counter=first * WORDS // 4)
    return generator.random_raw((last + 1 - first) * WORDS).reshape(-1, WORDS)[samples - first]


def where_from(uniform: Tensor) -> Tensor:
    """Where each pixel of a sample lies in the drawn picture, (R, 6) -> (R, S, S, x and y).

    Coordinates run from -1 to 1 over the picture. Only elementwise arithmetic: a matmul may round
    differently in another number of rows.
    """
    turn, wide, high, shear, right, down = uniform[:, :, None, None].unbind(1)  # each (R, 1, 1)
    across = (torch.arange(SIDE, dtype=uniform.dtype) + 0.5) * 2 / SIDE - 1  # (S,)
    x = (across - SHIFT * right) * torch.exp(STRETCH * wide)  # (R, 1, S)
    y = (across[:, None] - SHIFT * down) * torch.exp(STRETCH * high)  # (R, S, 1)
    x = x + SHEAR * shear * y  # (R, S, S)
    cos, sin = torch.cos(TURN * turn), torch.sin(TURN * turn)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
