"""A gpt as a Hugging Face folder: `transformers` loads it, and its Llama folders load here.

    config.json                          the shape of the model: see llama.py
    model.safetensors                    all weights, in one file if they fit
    model-00001-of-00002.safetensors     or in several files of at most `file_bytes`,
    model.safetensors.index.json         and this index: name of a tensor -> its file
    tokenizer.json                       and its settings, unless ids are bytes
    README.md                            how text becomes ids

Weights are read from safetensors files only. Older folders have pytorch_model.bin, a pickle; that
is refused. A tied head is written once, as the embedding. Files are read as they are needed: an
import needs the memory of one tensor, an export that of one file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_lab.checkpoint.exchange import tokenizer_files
from dist_lab.checkpoint.exchange.folders import (
    inside,
    is_folder,
    new_folder,
    one_line,
    read_json,
    write_json,
)
from dist_lab.checkpoint.exchange.llama import (
    EMBEDDING,
    HEAD,
    LlamaShape,
    check_names_and_shapes,
    from_config,
    to_config,
)
from dist_lab.checkpoint.exchange.tensors import Kind, Kinds, Renamed, Tensors, same_bits
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import MachineError, UserError
from dist_lab.layout.layout import Box

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FILE_BYTES = 5_000_000_000  # what transformers writes by default


def export(
    tensors: Tensors, shape: LlamaShape, folder: str | Path, *, positions: int = 2048,
    file_bytes: int = FILE_BYTES, ids: str = "bytes", tokenizer: FileTokenizer | None = None,
) -> None:  # fmt: skip
    """Write the model to a new folder.

    Args:
        tensors: the weights, under the names of `model.state_dict()`.
        positions: the longest text that the model was trained on.
        file_bytes: the most bytes of tensors in one file; a larger tensor has a file of its own.
        ids: "bytes", or in words what the ids stand for.
        tokenizer: that of the ids, if there is one; its files are written, too.

    Raises:
        UserError: these are not the tensors of such a model, or the folder is not new.
    """
    check_names_and_shapes(tensors.names(), shape, "the model to export")
    check_tied_head(tensors, shape)
    kinds = {name: kind for name, kind in tensors.names().items() if not _is_tied(name, shape)}
    files = split_over_files(kinds, file_bytes)
    with new_folder(folder) as new:
        for file, names in files.items():
            block = {name: tensors.read(name).contiguous() for name in names}
            save_file(block, new / file, {"format": "pt"})
        if len(files) > 1:
            total = sum(_bytes(kind) for kind in kinds.values())
            where = {name: file for file, names in files.items() for name in names}
            write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        dtype = kinds[EMBEDDING][1]
        ends = tokenizer.ends if tokenizer is not None else ()
        write_json(new / CONFIG, to_config(shape, dtype, positions, ends))
        if tokenizer is not None:
            tokenizer_files.write(new, tokenizer, positions)
        (new / "README.md").write_text(_note(shape, ids, tokenizer), encoding="utf-8")


def split_over_files(kinds: Kinds, file_bytes: int) -> dict[str, list[str]]:
    """File -> the names of its tensors, in order; a new file begins where one would be too large.

    >>> one = torch.Size([2]), torch.float32
    >>> split_over_files({"a": one, "b": one, "c": one}, 16)  # doctest: +NORMALIZE_WHITESPACE
    {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, kind in kinds.items():
        if groups[-1] and size + _bytes(kind) > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(kind)
    if len(groups) == 1:
        return {ONE: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def check_tied_head(tensors: Tensors, shape: LlamaShape) -> None:
    """Raise UserError if a tied head is there as well, and is not equal to the embedding."""
    both = shape.tied and HEAD in tensors.names()
    if both and not same_bits(tensors.read(HEAD), tensors.read(EMBEDDING)):
        raise UserError(
            f"{HEAD} and {EMBEDDING} are tied and have different values; untie them, or drop the "
            "wrong one"
        )


# --- import ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SafetensorsFiles:
    """The tensors of several safetensors files. `files`: name of a tensor -> its file."""

    files: Mapping[str, Path]
    kinds: Kinds

    def names(self) -> Kinds:
        return self.kinds

    def read(self, name: str) -> Tensor:
        with _open(self.files[name]) as file:
            return file.get_tensor(name)

    def read_box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor. No other part of the file is read."""
        with _open(self.files[name]) as file:
            part: Tensor = file.get_slice(name)[box]
            return part


@dataclass(frozen=True)
class LlamaFolder:
    """A folder that has been checked: its tensors are those of a gpt of this shape.

    The names are those of `model.state_dict()`. So a tied head has two, for one tensor.
    """

    path: Path
    shape: LlamaShape
    tensors: Renamed
    files: SafetensorsFiles

    def read_box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor, by its name in the model."""
        return self.files.read_box(self.tensors.sources[name], box)

    def tokenizer(self) -> FileTokenizer | None:
        """The folder's tokenizer, if it has one. Raises the errors of tokenizer_files.read."""
        return tokenizer_files.read(self.path)

    @property
    def once(self) -> Renamed:
        """The same tensors, a tied head under its first name only: the embedding's."""
        sources = {name: s for name, s in self.tensors.sources.items() if name == s}
        return Renamed(self.tensors.source, sources)


def open_folder(path: str | Path) -> LlamaFolder:
    """Check a folder's config, names and shapes, and open its weights. Reads no weight.

    Raises:
        UserError: there is no such folder, it is not a Llama's, it has its weights as a pickle, or
            a name in it leads out of it.
        MachineError: a file is missing or damaged.
    """
    folder = is_folder(path, "a Hugging Face folder, with config.json and model.safetensors")
    config = read_json(inside(folder, CONFIG, "a Hugging Face folder"))
    if "quantization_config" in config:
        raise UserError(
            f"{str(path)!r} is quantised; load it with dist_lab.checkpoint.exchange.gptq_files.load"
        )
    shape = from_config(config)
    found = open_files(folder)
    # Weights of the first Llamas also have a table that everyone computes.
    kinds = {n: k for n, k in found.names().items() if not n.endswith("rotary_emb.inv_freq")}
    check_names_and_shapes(kinds, shape, f"folder {str(path)!r}")
    check_tied_head(found, shape)
    sources = {name: name for name in kinds}
    if shape.tied:
        sources[HEAD] = EMBEDDING
    return LlamaFolder(folder, shape, Renamed(found, sources), found)


def open_files(folder: Path) -> SafetensorsFiles:
    """The tensors of model.safetensors, or of the files of an index, whose names must agree."""
    if not (folder / INDEX).exists():
        if not (folder / ONE).exists():
            pickles = sorted(
                p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
            )
            hint = "get the whole folder"
            if pickles:
                hint = f"{pickles[0]} is a pickle, which runs code when it is read: convert it"
            raise UserError(f"no {ONE} in {str(folder)!r}; {hint}")
        path = inside(folder, ONE, "a Hugging Face folder")
        kinds = kinds_in(path)
        return SafetensorsFiles(dict.fromkeys(kinds, path), kinds)
    listed = read_json(inside(folder, INDEX, "a Hugging Face folder")).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise MachineError(f"{INDEX} in {str(folder)!r} has no weight_map; get it again")
    paths = {name: inside(folder, name, INDEX) for name in dict.fromkeys(listed.values())}
    within = {name: kinds_in(path) for name, path in paths.items()}
    for name, file in listed.items():
        if name not in within[file]:
            raise MachineError(f"{file} has no {name}, which {INDEX} says is there; get it again")
    for file, kinds in within.items():
        for name in kinds:
            if listed.get(name) != file:
                raise MachineError(f"{file} has {name}, which {INDEX} does not say; get it again")
    return SafetensorsFiles(
        {name: paths[file] for name, file in listed.items()},
        {name: within[file][name] for name, file in listed.items()},
    )


def kinds_in(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The names, shapes and dtypes in a safetensors file. No tensor is read."""
    with _open(path) as file:
        kinds = {}
        for name in file.keys():  # noqa: SIM118  it is no dict
            part = file.get_slice(name)
            kinds[name] = torch.Size(part.get_shape()), _dtype(part.get_dtype(), name, path)
        return kinds


class _open:
    """Opens a safetensors file; any error of it is a MachineError of one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.file = safe_open(self.path, framework="pt")
            return self.file.__enter__()
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.__exit__(None, None, None)
        if isinstance(error, SafetensorError | OSError):
            raise self._damaged(error) from None

    def _damaged(self, error: BaseException) -> MachineError:
        return MachineError(
            f"{str(self.path)!r} is not a whole safetensors file ({one_line(error)}); get it again"
        )


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _dtype(name: str, tensor: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"{tensor} in {str(path)!r} is of dtype {name}, which has no use here")
    return DTYPES[name]


def _bytes(kind: Kind) -> int:
    return math.prod(kind[0]) * kind[1].itemsize


def _is_tied(name: str, shape: LlamaShape) -> bool:
    return shape.tied and name == HEAD


# --- the note -------------------------------------------------------------------------------------

BYTES = """Ids are the bytes of a text in UTF-8, 0 to 255, so there is no tokenizer file. No id
marks a beginning, an end or padding.

    ids = torch.tensor([list("def main".encode())])
    out = model.generate(ids, max_new_tokens=80, do_sample=True)
    text = bytes(out[0].tolist()).decode(errors="replace")
"""


def _note(shape: LlamaShape, ids: str, tokenizer: FileTokenizer | None) -> str:
    meaning = BYTES if ids == "bytes" and shape.vocab == 256 else f"Ids: {ids}.\n"
    if tokenizer is not None:
        meaning = tokenizer_files.NOTE
    return (
        "A Llama that dist_lab has trained.\n\n"
        "    import torch\n"
        "    from transformers import AutoModelForCausalLM\n\n"
        '    model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n\n' + meaning
    )
