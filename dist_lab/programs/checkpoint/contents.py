"""checkpoint.py inspect: what is in a checkpoint, and which rank has saved what."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from dist_lab.checkpoint.exchange.ours import IMPORTED
from dist_lab.checkpoint.manifest import TOKENIZER
from dist_lab.checkpoint.reader import Checkpoint, Saved
from dist_lab.comm.board.board import numbers_in_words
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import printable, shown
from dist_lab.layout.boxes import numel_of
from dist_lab.layout.layout import Box
from dist_lab.observe.console import empty_table, wide_console
from dist_lab.programs.checkpoint.settings import Inspect
from dist_lab.programs.cli.find import all_in
from dist_lab.programs.cli.mesh_text import mesh_in_words

FIRST = 12  # tensors that are listed without --tensors


def show(config: Inspect) -> int:
    """Print the step, layout, settings and tensors of a checkpoint. Reads no tensor."""
    paths = all_in(config.checkpoint)
    checkpoint, console = Checkpoint.open(paths[0]), wide_console()
    for line in heading(checkpoint):
        say(console, line)
    if len(paths) > 1:
        say(console, f"  older ones beside it: {', '.join(path.name for path in paths[1:])}")
    console.print(kinds_table(checkpoint))
    names = sorted(checkpoint.tensors, key=in_order)
    listed = names if config.tensors else names[:FIRST]
    console.print(tensors_table(checkpoint, listed))
    if len(listed) < len(names):
        say(console, f"and {len(names) - len(listed)} more: --tensors lists them all")
    return 0


def heading(checkpoint: Checkpoint) -> list[str]:
    """The step, and what the manifest says about the run."""
    about = checkpoint.manifest
    mesh, versions = about["mesh"], about["versions"]
    where = f" on {mesh_in_words(mesh)}" if len(checkpoint.tables) > 1 else ""
    ranks = len(checkpoint.tables)
    lines = [
        f"{checkpoint.folder}: step {checkpoint.step:,}",
        f"  saved by {ranks} rank{'s' * (ranks > 1)}: {about['strategies']}{where}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"  settings: {in_words(about['settings']) or f'none, {origin(checkpoint)}'}",
        f"  optimizer: {optimizer_in_words(checkpoint)}",
    ]
    if checkpoint.tokenizer is not None:
        lines.append(f"  tokenizer: {tokenizer_in_words(checkpoint)}")
    if about["extra"]:
        lines.append(f"  extra: {in_words(about['extra'])}")
    return lines


def tokenizer_in_words(checkpoint: Checkpoint) -> str:
    assert checkpoint.tokenizer is not None
    found = FileTokenizer(checkpoint.tokenizer, repr(str(checkpoint.folder / TOKENIZER)))
    return f"{found.vocab:,} tokens, sha256 {found.sha256[:12]}"


def in_words(settings: Mapping[str, Any] | None) -> str:
    """
    >>> in_words({"model": "gpt", "layers": None, "lr": 0.1})
    "model='gpt', lr=0.1"
    """
    return ", ".join(
        f"{k}={shown(value)}" for k, value in (settings or {}).items() if value is not None
    )


def origin(checkpoint: Checkpoint) -> str:
    """How a checkpoint came about that has no settings of a run."""
    imported = checkpoint.manifest["strategies"] == IMPORTED
    return "it was imported" if imported else "a script has saved it"


def optimizer_in_words(checkpoint: Checkpoint) -> str:
    optimizer = checkpoint.manifest["optimizer"]
    if optimizer is None:
        moments = moments_in_words(checkpoint.names())
        return f"{moments}; its options were not imported" if moments else "none"
    rates = dict.fromkeys(shown(group["options"].get("lr")) for group in optimizer["groups"])
    count = len(optimizer["groups"])
    return f"{optimizer['class']}, {count} group{'s' * (count > 1)}, lr {' and '.join(rates)}"


def moments_in_words(names: Iterable[str]) -> str:
    """
    >>> moments_in_words(["model/w", "optimizer/w/step", "optimizer/w/exp_avg"])
    'exp_avg, step of 1 parameters'
    >>> moments_in_words(["model/w"])
    ''
    """
    own = [name for name in names if name.startswith("optimizer/")]
    ofs = [name.removeprefix("optimizer/").rpartition("/") for name in own]
    keys, parameters = {key for _, _, key in ofs}, {parameter for parameter, _, _ in ofs}
    return f"{', '.join(sorted(keys))} of {len(parameters)} parameters" if ofs else ""


def kinds_table(checkpoint: Checkpoint) -> Any:
    """Bytes by kind: the model, each key of the optimizer's state, the moving average."""
    count: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name, saved in checkpoint.tensors.items():
        kind = kind_of(name)
        count[kind] += 1
        elements[kind] += torch.Size(saved.shape).numel()
        size[kind] += bytes_of(saved)
    table = empty_table(["kind"], ["tensors", "elements", "bytes"])
    for kind in count:
        table.add_row(kind, f"{count[kind]:,}", f"{elements[kind]:,}", f"{size[kind]:,}")
    table.add_section()
    totals = (sum(counter.values()) for counter in (count, elements, size))
    table.add_row("total", *(f"{total:,}" for total in totals))
    return table


def tensors_table(checkpoint: Checkpoint, names: Sequence[str]) -> Any:
    """Name, shape, dtype and bytes of tensors, and how they lay over the ranks."""
    table = empty_table(["tensor", "shape", "dtype", "saved by"], ["bytes"])
    for name in names:
        saved = checkpoint.tensors[name]
        shape = " x ".join(map(str, saved.shape)) or "one number"
        dtype = str(saved.dtype).removeprefix("torch.")
        table.add_row(name, shape, dtype, layout_in_words(saved), f"{bytes_of(saved):,}")
    return table


def in_order(name: str) -> list[tuple[int, str]]:
    """The key for a sort in which layer 10 follows layer 9.

    >>> sorted(["layers.10.w", "layers.9.w"], key=in_order)
    ['layers.9.w', 'layers.10.w']
    """
    words = re.split(r"(\d+)", name)
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def kind_of(name: str) -> str:
    """
    >>> kind_of("optimizer/layers.0.w/exp_avg"), kind_of("model/layers.0.w")
    ('optimizer exp_avg', 'model')
    """
    kind, _, rest = name.partition("/")
    return f"{kind} {rest.rpartition('/')[2]}" if kind == "optimizer" else kind


def bytes_of(saved: Saved) -> int:
    return torch.Size(saved.shape).numel() * saved.dtype.itemsize


def layout_in_words(saved: Saved) -> str:
    """Which ranks have saved a tensor, and along which dims it was split.

    >>> from dist_lab.checkpoint.reader import Piece
    >>> rows = [Piece(f"rank-{i}.safetensors", ((slice(i, i + 1), slice(0, 2)),)) for i in (0, 1)]
    >>> layout_in_words(Saved((2, 2), torch.float32, tuple(rows)))
    'ranks 0, 1: dim 0 in 2'
    """
    pieces = [piece for piece in saved.pieces if any(map(numel_of, piece.boxes))]
    ranks = [int(piece.file.removeprefix("rank-").partition(".")[0]) for piece in pieces]
    if len(pieces) < 2:
        return f"rank {ranks[0]}" if ranks else "nobody: it is empty"
    who = f"ranks {numbers_in_words(sorted(ranks), ', ')}"
    if any(len(piece.boxes) > 1 for piece in pieces):
        return f"{who}: ranges of elements"
    return f"{who}: " + " and ".join(_splits([piece.boxes[0] for piece in pieces]))


def _splits(boxes: Sequence[Box]) -> list[str]:
    """The dims along which boxes differ, and the number of different ranges along each."""
    words = []
    for dim in range(len(boxes[0])):
        ranges = {(box[dim].start, box[dim].stop) for box in boxes}
        if len(ranges) > 1:
            words.append(f"dim {dim} in {len(ranges)}")
    return words


def say(console: Console, line: str) -> None:
    """Print a line. It is not wrapped, [0] is not markup, and nothing in it steers the terminal."""
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
