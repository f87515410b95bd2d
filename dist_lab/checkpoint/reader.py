"""Reading a checkpoint: any box of any tensor, whichever ranks have saved its parts.

    saved by 4 ranks of fsdp:   W[0:2] W[2:4] W[4:6] W[6:8]
    wanted on a rank of tp:     W[:, 3:6]                       three columns of each part

Files are mapped into memory, so only the pages of the wanted boxes are read. Nothing here is
collective, and no mesh is needed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.entries import Entry, Shape
from dist_lab.checkpoint.manifest import ANOTHER, TOKENIZER, Damaged, check_hash, read_text
from dist_lab.checkpoint.shard import DTYPES
from dist_lab.checkpoint.table import check, length, listed
from dist_lab.layout.boxes import intersection, lengths, numel_of, overlap, relative
from dist_lab.layout.layout import Box

DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in one file: `boxes` of the full tensor, box after box."""

    file: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Saved:
    """A tensor of a checkpoint: its full shape, and the pieces that it was saved in."""

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class Checkpoint:
    """A checkpoint on disk. `Checkpoint.open(folder)` checks its manifest and tables.

    Attributes:
        folder, manifest: where it is, and what its manifest says.
        tokenizer: the contents of its tokenizer.json, if it has one.
        tensors: name -> `Saved`.
        tables: of each rank: numbers of the optimizer, random generators and the like.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], tables: Sequence[Mapping[str, Any]]
    ) -> None:
        self.folder, self.manifest, self.tables = folder, about, list(tables)
        self.tensors: dict[str, Saved] = {}
        for rank, table in enumerate(tables):
            check(table)
            size = 0
            for name, entry in table["tensors"].items():
                size += self._add(f"rank-{rank}.safetensors", name, entry)
            self._check_size(f"rank-{rank}.safetensors", size)
        for name, saved in self.tensors.items():
            self._check_covered(name, saved)
        self._open: dict[str, Any] = {}

    @staticmethod
    def open(folder: str | Path) -> "Checkpoint":
        """Read a checkpoint's manifest and tables, but none of its tensors.

        Raises:
            UserError: it is no checkpoint, or of a newer version.
            Damaged: a file is missing, cut off or, as far as it was read, changed.
        """
        path = Path(folder).expanduser()
        about = manifest.read(path)
        tables = []
        ranks = math.prod(about["mesh"].values())
        for rank in range(ranks):
            name = f"rank-{rank}.json"
            if name not in about["files"] or f"rank-{rank}.safetensors" not in about["files"]:
                raise Damaged(f"checkpoint {str(path)!r} has no part of rank {rank}; {ANOTHER}")
            check_hash(path, name, about["files"][name]["sha256"])
            tables.append(manifest.read_json(path / name))
        try:
            return Checkpoint(path, about, tables)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            why = f"{error}; {ANOTHER}"
            raise Damaged(f"checkpoint {str(path)!r} has a wrong table: {why}") from error

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @cached_property
    def tokenizer(self) -> str | None:
        """The contents of tokenizer.json, whose hash is compared; None if there is none."""
        if TOKENIZER not in self.manifest["files"]:
            return None
        check_hash(self.folder, TOKENIZER, self.manifest["files"][TOKENIZER]["sha256"])
        return read_text(self.folder / TOKENIZER)

    def names(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> shape and dtype of the full tensor."""
        return {name: (saved.shape, saved.dtype) for name, saved in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """A full tensor."""
        return self.read_box(name, tuple(slice(0, n) for n in self.tensors[name].shape))

    def read_box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor."""
        out = torch.empty(lengths(box), dtype=self.tensors[name].dtype)
        self._fill(name, box, out)
        return out

    @torch.no_grad()
    def read_into(self, entry: Entry) -> None:
        """Fill an entry's local tensor: the boxes that this rank holds."""
        local = entry.local
        in_place = local.is_contiguous() and local.device.type == "cpu"
        flat = local.view(-1) if in_place else torch.empty(local.numel(), dtype=local.dtype)
        sizes = [numel_of(box) for box in entry.boxes]
        for box, part in zip(entry.boxes, flat.split(sizes), strict=True):
            self._fill(entry.name, box, part.view(lengths(box)))
        if not in_place:
            local.copy_(flat.view(local.shape))

    def verify(self) -> None:
        """Compare the hash of every file. Raises Damaged."""
        for name in self.files():
            self.verify_file(name)

    def files(self) -> list[str]:
        return sorted(self.manifest["files"])

    def verify_file(self, name: str) -> None:
        """Compare a file's hash; of a file of tensors also shapes and dtypes. Raises Damaged."""
        check_hash(self.folder, name, self.manifest["files"][name]["sha256"])
        self.check_tensors(name)

    def check_tensors(self, name: str) -> None:
        """Compare shapes and dtypes in a file with those that its table says. Raises Damaged."""
        for tensor, saved in self.tensors.items():
            for piece in saved.pieces:
                if piece.file == name:
                    self._slice(piece, tensor)

    # --- pieces -----------------------------------------------------------------------------------

    def _add(self, file: str, name: str, entry: Mapping[str, Any]) -> int:
        """Add a piece. Returns its size in bytes."""
        shape, dtype = tuple(map(length, entry["shape"])), DTYPE_OF.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} has a dtype that is none")
        boxes = tuple(
            tuple(slice(*map(length, listed(side, 2))) for side in box) for box in entry["boxes"]
        )
        for box in boxes:
            sides = zip(box, shape, strict=True)
            if not all(0 <= side.start <= side.stop <= length for side, length in sides):
                raise ValueError(f"{name} of shape {list(shape)} has a box outside of it")
        before = self.tensors.get(name, Saved(shape, dtype, ()))
        if (before.shape, before.dtype) != (shape, dtype):
            raise ValueError(f"{name} has two shapes or dtypes")
        self.tensors[name] = Saved(shape, dtype, (*before.pieces, Piece(file, boxes)))
        return sum(map(numel_of, boxes)) * dtype.itemsize

    def _check_size(self, file: str, size: int) -> None:
        """A file has the bytes that its tensors need: before memory is taken for them."""
        found = self.manifest["files"][file]["bytes"]
        if size > found:
            raise ValueError(f"{file} has {found} bytes, and its tensors need {size}")

    def _check_covered(self, name: str, saved: Saved) -> None:
        """Every element must be there once."""
        boxes = [box for piece in saved.pieces for box in piece.boxes]
        found = sum(map(numel_of, boxes))
        if found != math.prod(saved.shape):
            raise ValueError(f"{name} has {found} of {math.prod(saved.shape)} elements")
        if overlap(boxes):
            raise ValueError(f"{name} has elements twice, and others not at all")

    def _fill(self, name: str, box: Box, out: Tensor) -> None:
        """Copy a box into a tensor of its shape."""
        for piece in self.tensors[name].pieces:
            first = 0
            for saved in piece.boxes:
                size = numel_of(saved)
                common = intersection(saved, box)
                if numel_of(common):
                    values = self._part(piece, name, saved, first, relative(common, saved))
                    out[relative(common, box)] = values
                first += size

    def _part(self, piece: Piece, name: str, saved: Box, first: int, wanted: Box) -> Tensor:
        """A part of one of a piece's boxes, whose elements begin at `first` in the file."""
        values = self._slice(piece, name)
        try:
            if not wanted:
                return self._open[piece.file].get_tensor(name).reshape(())
            if len(piece.boxes) == 1:
                return values[wanted]
            return values[first : first + numel_of(saved)].view(lengths(saved))[wanted]
        except (SafetensorError, OSError, IndexError, RuntimeError) as error:
            raise self._unreadable(piece, name, error) from error

    def _slice(self, piece: Piece, name: str) -> Any:
        """A tensor in a file, not read yet. Its dtype and shape are those that the table says."""
        try:
            if piece.file not in self._open:
                path = self.folder / piece.file
                self._open[piece.file] = safe_open(path, "pt").__enter__()
            values = self._open[piece.file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(piece, name, error) from error
        one = len(piece.boxes) == 1
        shape = lengths(piece.boxes[0]) if one else [sum(map(numel_of, piece.boxes))]
        wanted = DTYPES[self.tensors[name].dtype], shape
        if (found := (values.get_dtype(), values.get_shape())) != wanted:
            why = f"it is {found[0]}{found[1]} in the file and {wanted[0]}{shape} in the table"
            raise self._unreadable(piece, name, why)
        return values

    def _unreadable(self, piece: Piece, name: str, why: object) -> Damaged:
        path = str(self.folder / piece.file)
        return Damaged(f"cannot read {name} from {path!r}: {why}; {ANOTHER}")


def first_difference(
    saved: Mapping[str, tuple[Shape, torch.dtype]], own: Mapping[str, tuple[Shape, torch.dtype]]
) -> Iterator[str]:
    """Yield how a checkpoint's tensors differ from those of a model, in words."""
    for name in own:
        if name not in saved:
            yield f"it has no {name}"
        elif saved[name] != own[name]:
            yield f"{name} is {_in_words(saved[name])} there and {_in_words(own[name])} here"
    yield from (f"it has {name}, which the model has not" for name in saved if name not in own)


def _in_words(about: tuple[Shape, torch.dtype]) -> str:
    return f"{str(about[1]).removeprefix('torch.')}{list(about[0])}"
