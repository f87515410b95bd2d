"""A quantised gpt as a folder of AutoGPTQ's format: a Hugging Face folder with packed weights.

    model.safetensors       LAYER.qweight, .qzeros, .scales, .g_idx; all other weights as they are
    config.json             the shape of the model: see llama.py; and quantization_config
    quantize_config.json    the same settings, for AutoGPTQ: see gptq_config.py
    dist_lab.json           ours: the run that it comes from, the loss before and after, hashes
    tokenizer.json          and its settings, unless ids are bytes
    README.md               how text becomes ids

    model = gptq_files.load(folder)      # an ordinary gpt, with QuantizedLinears

A loaded model computes what the saved one does, bit for bit: the packed tensors stay as they are,
and each QuantizedLinear unpacks what it needs. Folders of others load, too, without dist_lab.json.

The format packs 32 codes at a time and has one width for all layers, so a model of other widths, or
of mixed ones, is refused. Files are checked before memory is taken: names, shapes and dtypes by the
headers alone. There is no pickle, and no name leads out of the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_lab.checkpoint.exchange import tokenizer_files
from dist_lab.checkpoint.exchange.folders import (
    inside,
    is_folder,
    new_folder,
    read_json,
    write_json,
)
from dist_lab.checkpoint.exchange.gptq_config import GptqConfig, read_config
from dist_lab.checkpoint.exchange.gptq_names import CONFIG, QUANTIZE, TABLE, is_quantized
from dist_lab.checkpoint.exchange.gptq_tensors import check_kinds, check_values, linears_of
from dist_lab.checkpoint.exchange.huggingface import (
    INDEX,
    ONE,
    SafetensorsFiles,
    check_tied_head,
    kinds_in,
    open_files,
)
from dist_lab.checkpoint.exchange.llama import (
    EMBEDDING,
    HEAD,
    LlamaShape,
    from_config,
    shape_of,
    to_config,
)
from dist_lab.checkpoint.exchange.tensors import InMemory
from dist_lab.checkpoint.files import sha256_of
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import MachineError, UserError, shown
from dist_lab.quantize.formula import WHOLE
from dist_lab.quantize.linear import QuantizedLinear
from dist_lab.quantize.packing import SUBTRACTED, check_storable, pack_words
from dist_lab.zoo.gpt import GPT

__all__ = ["GptqFolder", "is_quantized", "load", "open_folder", "read_linear", "save"]

ABOUT, NOTE = "dist_lab.json", "README.md"


def save(
    model: nn.Module, folder: str | Path, *, about: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None, positions: int = 2048,
    tokenizer: FileTokenizer | None = None,
) -> GptqConfig:  # fmt: skip
    """Write a model whose layers' Linears are QuantizedLinears to a new folder.

    Args:
        about: for dist_lab.json: the method, settings of the run, the loss before and after.
        options: fields of AutoGPTQ's settings that only the method knows: desc_act, static_groups,
            true_sequential, damp_percent, model_name_or_path.
        positions: the longest text that the model was trained on.
        tokenizer: of the model's ids, if they are no bytes.

    Returns:
        The settings that were written. With `format` "gptq_v2" a group has a zero of 0, and
        AutoGPTQ itself cannot read the folder; GPTQModel can: see packing.py.

    Raises:
        UserError: the model is no gpt, a Linear of its layers is not quantised, or the format has
            no place for it.
        MachineError: the folder cannot be written.
    """
    if not isinstance(model, GPT):
        raise UserError(f"AutoGPTQ's format has names for gpt only, not for {type(model).__name__}")
    layers = _quantized_layers(model)
    config = _config_of(layers, options or {})
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name, layer in layers.items():
        if layer.format != config.format:
            zeros = layer.packed.zeros().int() - SUBTRACTED[config.format]
            tensors[f"{name}.qzeros"] = pack_words(zeros.t(), config.bits).t().cpu()
    shape = shape_of(model)
    if shape.tied:
        del tensors[HEAD]
    check_kinds(InMemory(tensors).names(), shape, config, "the model to save")
    with new_folder(folder) as new:
        block = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(block, new / ONE, {"format": "pt"})
        table = config.to_json()
        ends = tokenizer.ends if tokenizer is not None else ()
        hf = to_config(shape, tensors[EMBEDDING].dtype, positions, ends) | {TABLE: table}
        write_json(new / CONFIG, hf)
        write_json(new / QUANTIZE, table)
        if tokenizer is not None:
            tokenizer_files.write(new, tokenizer, positions)
        hashes = {path.name: sha256_of(path) for path in sorted(new.iterdir())}
        (new / NOTE).write_text(_note(config, shape, tokenizer), encoding="utf-8")
        write_json(new / ABOUT, {**(about or {}), "sha256": hashes})
    return config


def load(path: str | Path, dtype: torch.dtype | None = None) -> GPT:
    """The model of a folder, with QuantizedLinears, in CPU memory.

    Args:
        dtype: in which it computes; None: that of its embedding. Scales stay as they are stored.

    Raises:
        UserError, MachineError: as `open_folder`, or a tensor or file is damaged.
    """
    opened = open_folder(path)
    opened.check_hashes()
    shape, kinds = opened.shape, opened.tensors.names()
    dtype = dtype or kinds[EMBEDDING][1]
    model = shape.build().to(dtype)
    state = {name: opened.tensors.read(name) for name in kinds}
    for name, _, _ in linears_of(shape):
        model.set_submodule(name, _layer(opened.config, name, state, dtype))
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.endswith(".scales"):
            state[name] = tensor.to(dtype)
    if shape.tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    if shape.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def read_linear(opened: "GptqFolder", name: str, dtype: torch.dtype) -> QuantizedLinear:
    """One of a folder's quantised Linears, by its name in the model. Reads no other tensor.

    Raises:
        MachineError: a tensor is damaged.
    """
    names = [n for n in opened.tensors.names() if n.startswith(f"{name}.")]
    state = {n: opened.tensors.read(n) for n in names}
    layer = _layer(opened.config, name, state, dtype)
    for full, tensor in state.items():
        key = full.removeprefix(f"{name}.")
        real = tensor.is_floating_point() and key != "scales"
        setattr(layer, key, tensor.to(dtype) if real else tensor)
    layer.like = torch.empty(0, dtype=dtype)
    return layer


def _layer(
    config: GptqConfig, name: str, state: Mapping[str, Tensor], dtype: torch.dtype
) -> QuantizedLinear:
    """The layer of these tensors, on the meta device. Raises MachineError if they are damaged."""
    check_values(name, state, config)
    scales = state[f"{name}.scales"]
    return QuantizedLinear(
        len(state[f"{name}.g_idx"]), scales.size(1),
        replace(config.scheme(), scale_dtype=scales.dtype), groups=scales.size(0),
        bias=f"{name}.bias" in state, format=config.format, dtype=dtype, device="meta",
        inputs=config.inputs, static=config.static,
    )  # fmt: skip


# --- a folder, checked ----------------------------------------------------------------------------


@dataclass(frozen=True)
class GptqFolder:
    """A folder whose names, shapes and dtypes are those of a quantised gpt. No tensor is read yet.

    settings: quantize_config.json as it is
    about: dist_lab.json; empty for a folder of others
    """

    path: Path
    shape: LlamaShape
    config: GptqConfig
    tensors: SafetensorsFiles
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

    def check_hashes(self) -> None:
        """Raise MachineError if a file is not the one that was saved. Needs dist_lab.json."""
        hashes = self.about.get("sha256", {})
        if not isinstance(hashes, dict):
            raise MachineError(f"sha256 of {ABOUT} is no table; get the folder again")
        for name, expected in hashes.items():
            if sha256_of(inside(self.path, name, ABOUT)) != expected:
                raise MachineError(
                    f"{name} in {str(self.path)!r} is not the file that was saved: its SHA-256 "
                    f"differs from that in {ABOUT}; get the folder again"
                )


def open_folder(path: str | Path) -> GptqFolder:
    """Check a folder, and open its weights. Reads no weight.

    Raises:
        UserError: it is no folder of a quantised Llama, or a name in it leads out of it.
        MachineError: a file or a tensor is missing or damaged.
    """
    folder = is_folder(path, "a folder of AutoGPTQ's format, with config.json")
    table = read_json(inside(folder, CONFIG, "a folder of AutoGPTQ's format"))
    config, settings = read_config(folder, table)
    shape = from_config(table)
    tensors = _open_tensors(folder, settings)
    check_kinds(tensors.names(), shape, config, f"folder {str(path)!r}")
    if shape.tied:
        check_tied_head(tensors, shape)
    about = read_json(inside(folder, ABOUT, "it")) if (folder / ABOUT).exists() else {}
    return GptqFolder(folder, shape, config, tensors, settings, about)


def _open_tensors(folder: Path, settings: Mapping[str, Any]) -> SafetensorsFiles:
    """The tensors of model.safetensors, of an index, or of the file that the settings name."""
    base = settings.get("model_file_base_name")
    usual = (folder / ONE).exists() or (folder / INDEX).exists()
    if usual or not isinstance(base, str):
        found = open_files(folder)
    else:
        file = inside(folder, f"{base}.safetensors", QUANTIZE)
        kinds = kinds_in(file)
        found = SafetensorsFiles(dict.fromkeys(kinds, file), kinds)
    # Weights of the first Llamas also have a table that everyone computes.
    known = {n: k for n, k in found.kinds.items() if not n.endswith("rotary_emb.inv_freq")}
    return SafetensorsFiles(found.files, known)


# --- what is written ------------------------------------------------------------------------------


def _quantized_layers(model: GPT) -> dict[str, QuantizedLinear]:
    layers = {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            raise UserError(
                f"{name} is not quantised, and AutoGPTQ's format needs all Linears of the layers; "
                "give replace_linears a weight for each"
            )
        if isinstance(module, QuantizedLinear):
            layers[name] = module
    return layers


def _config_of(layers: Mapping[str, QuantizedLinear], options: Mapping[str, Any]) -> GptqConfig:
    """The settings that all layers share. Raises UserError if there are none."""
    (first_name, first), *others = layers.items()
    for name, layer in others:
        for key in ("bits", "group", "symmetric"):
            values = getattr(first.scheme, key), getattr(layer.scheme, key)
            if values[0] != values[1]:
                raise UserError(
                    f"{first_name} has {key}={shown(values[0])} and {name} {key}="
                    f"{shown(values[1])}; AutoGPTQ's format has one for all layers"
                )
        ranges = [(x.input_scheme, x.input_scale is None) for x in (first, layer)]
        if ranges[0] != ranges[1]:
            raise UserError(
                f"the inputs of {first_name} and {name} are rounded in different ways; dist_lab's "
                "folders have one way for all layers"
            )
    for name, layer in layers.items():
        check_storable(layer.packed.shape, name)
    groups = {name: layer.g_idx.long() for name, layer in layers.items()}
    shuffled = any(bool((index.diff() < 0).any()) for index in groups.values())
    formats = {layer.format for layer in layers.values()}
    about = dict(options)
    about["desc_act"] = bool(about.get("desc_act", False)) or shuffled
    return GptqConfig(
        first.scheme.bits, first.scheme.group or WHOLE, first.scheme.symmetric,
        "gptq_v2" if "gptq_v2" in formats else "gptq", first.input_scheme,
        first.input_scale is not None, about,
    )  # fmt: skip


def _note(config: GptqConfig, shape: LlamaShape, tokenizer: FileTokenizer | None) -> str:
    inputs = f", and its inputs to {config.inputs.bits}" if config.inputs is not None else ""
    ids = "Ids are the bytes of a text in UTF-8, 0 to 255, so there is no tokenizer file.\n"
    own = "Ids are those of tokenizer.json.\n" if tokenizer is not None else ""
    return (
        f"A Llama that dist_lab has quantised to {config.bits} bits{inputs}, in AutoGPTQ's format "
        f"({config.format}).\n\n"
        "    from dist_lab.checkpoint.exchange import gptq_files\n\n"
        '    model = gptq_files.load(".")\n\n' + (ids if shape.vocab == 256 else own)
    )
