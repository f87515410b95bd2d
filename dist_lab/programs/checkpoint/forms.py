"""checkpoint.py export and import: other programs' files. See checkpoint/exchange/README.md."""

from pathlib import Path

import torch

from dist_lab.checkpoint.exchange import dcp, huggingface, llama, ours, torch_file
from dist_lab.checkpoint.exchange.tensors import Converted, Tensors, Under, prefixed
from dist_lab.checkpoint.manifest import TOKENIZER
from dist_lab.data.bpe import spec_of
from dist_lab.data.custom import is_custom
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import MachineError, UserError
from dist_lab.programs.checkpoint.contents import moments_in_words
from dist_lab.programs.checkpoint.settings import Export, Import
from dist_lab.programs.cli.find import check_target, newest
from dist_lab.programs.cli.saved_settings import checked_settings
from dist_lab.zoo.sizes import SIZES


def export(config: Export) -> int:
    """Write a checkpoint in another form. Returns 0."""
    checkpoint = newest(config.source)
    checkpoint.verify()
    weights = ours.weights_of(checkpoint)
    if config.to == "hf":
        saved = checkpoint.manifest["settings"]
        if saved is None:
            raise UserError(
                f"checkpoint {config.source!r} was saved by a script, or imported, and does not "
                "say how many heads the model has; call exchange.huggingface.export with its "
                "shape, or export it to dcp or torch"
            )
        settings = checked_settings(saved, checkpoint.folder)
        kinds = Under(checkpoint, "model/").names()
        data, file = str(settings.get("data")), checkpoint.tokenizer
        where = repr(str(checkpoint.folder / TOKENIZER))
        huggingface.export(
            weights, llama.shape_in_settings(settings, kinds), config.target,
            positions=settings.get("seq", 2048), file_bytes=config.file_mb * 10**6,
            ids=f"of the data {data}" if is_custom(data) else "bytes",
            tokenizer=None if file is None else FileTokenizer(file, where),
        )  # fmt: skip
    elif config.to == "dcp":
        dcp.export(ours.WithAbout(checkpoint), config.target)
    else:
        torch_file.export(weights, config.target)
    what = "" if config.to == "dcp" else "the weights of "
    print(f"exported {what}{checkpoint.folder} to {config.target}")
    return 0


def import_(config: Import) -> int:
    """Write a checkpoint of step-... from another form, which is told by its files. Returns 0."""
    check_target(config.target)
    source = Path(config.source).expanduser()
    settings, left_out, tokenizer = None, tuple[str, ...](), None
    tensors: Tensors
    if (source / dcp.METADATA).exists():
        folder = dcp.open_folder(source)
        tensors, left_out = folder, tuple(folder.left_out)
    elif source.is_dir():
        read = huggingface.open_folder(source)
        tensors = prefixed(read.once, "model/")
        try:
            tokenizer = read.tokenizer()
        except (UserError, MachineError) as error:
            print(f"left out its tokenizer: {error}")
        settings = settings_of(read.shape, tokenizer)
    else:
        weights = torch_file.without_ties(torch_file.open_file(source))
        tensors, left_out = prefixed(weights, "model/"), tuple(weights.left_out)
    if config.dtype:
        tensors = Converted(tensors, getattr(torch, config.dtype))
    file = None if tokenizer is None else tokenizer.text
    path = ours.write(tensors, config.target, settings=settings, tokenizer=file)
    print(f"imported {config.source} as {path}")
    moments = moments_in_words(tensors.names())
    if moments and ours.ABOUT not in tensors.names():
        print(
            f"with {moments}, and without the options of the optimizer, such as its learning rate: "
            "whoever loads it goes on with the options of his own optimizer"
        )
    if left_out:
        print(f"left out, because only weights and moments are imported: {_some(left_out)}")
    return 0


def settings_of(
    shape: llama.LlamaShape, tokenizer: FileTokenizer | None
) -> dict[str, object] | None:
    """The settings of a run of such a model; None if it has no size of the zoo's."""
    size = shape.size()
    if size is None:
        return None
    layers = None if shape.layers == SIZES["gpt"][size]["layers"] else shape.layers
    settings: dict[str, object] = {"model": "gpt", "size": size, "layers": layers}
    if tokenizer is not None:  # a run that goes on from here must have the same
        spec = spec_of(tokenizer.text)
        settings |= {"tokenizer_sha256": tokenizer.sha256} | ({"tokenizer": spec} if spec else {})
    return settings


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
