"""The tensors of a quantised gpt: which names, shapes and dtypes a folder must have, and values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lab.checkpoint.exchange.gptq_config import GptqConfig
from dist_lab.checkpoint.exchange.llama import HEAD, LlamaShape, check_embedding
from dist_lab.checkpoint.exchange.tensors import Kinds
from dist_lab.errors import MachineError, UserError
from dist_lab.quantize.formula import WHOLE
from dist_lab.quantize.linear import shapes_of
from dist_lab.quantize.packing import SUBTRACTED, check_storable, unpack_words

INPUT_RANGE = ("input_scale", "input_zero")  # of inputs that are rounded in a fixed range
BLOCKS = ("self_attn.{}_proj", "mlp.{}_proj")
LINEARS = tuple(BLOCKS[0].format(n) for n in "qkvo") + tuple(
    BLOCKS[1].format(n) for n in ("gate", "up", "down")
)  # of a layer


@dataclass(frozen=True)
class Wanted:
    """A tensor that a folder must have. `integers`: it is int32, else of any real numbers."""

    shape: tuple[int, ...]
    integers: bool = False
    optional: bool = False


def linears_of(shape: LlamaShape) -> Iterator[tuple[str, int, int]]:
    """The Linears that are quantised: all of the layers, not the head. Yields (name, inputs,
    outputs).
    """
    model = shape.build()
    for layer in range(shape.layers):
        for name in LINEARS:
            full = f"model.layers.{layer}.{name}"
            outputs, inputs = model.get_parameter(f"{full}.weight").shape
            yield full, inputs, outputs


def wanted(shape: LlamaShape, config: GptqConfig) -> dict[str, Wanted]:
    """The tensors of a model of this shape, by name. A tied head is not among them."""
    tensors = {n: Wanted(tuple(t.shape)) for n, t in shape.build().state_dict().items()}
    if shape.tied:
        tensors[HEAD] = Wanted(tensors[HEAD].shape, optional=True)
    for name, inputs, outputs in linears_of(shape):
        del tensors[f"{name}.weight"]
        groups = 1 if config.group == WHOLE else -(-inputs // config.group)
        for key, size in shapes_of(inputs, outputs, config.bits, groups).items():
            tensors[f"{name}.{key}"] = Wanted(size, integers=key != "scales")
        tensors[f"{name}.bias"] = Wanted((outputs,), optional=True)
        for key in INPUT_RANGE if config.static else ():
            tensors[f"{name}.{key}"] = Wanted((1, 1))
    return tensors


def check_kinds(kinds: Kinds, shape: LlamaShape, config: GptqConfig, what: str) -> None:
    """Raise UserError unless these are the tensors of a quantised model, in one line."""
    least = (4 * len(LINEARS) + 2) * shape.layers
    if len(kinds) < least:  # first, because millions of layers would take long to build
        raise UserError(
            f"{what} has {len(kinds)} tensors, too few for {shape.layers} quantised layers of "
            f"{4 * len(LINEARS) + 2}; it is not whole, or its config is another model's"
        )
    check_embedding(kinds, shape, what)
    for name, inputs, outputs in linears_of(shape):
        check_storable((outputs, inputs), f"{what}: {name}")
    tensors = wanted(shape, config)
    missing = sorted(n for n, t in tensors.items() if n not in kinds and not t.optional)
    unknown = sorted(kinds.keys() - tensors.keys())
    if missing or unknown:
        odd = f"{missing[0]} is missing" if missing else f"{unknown[0]} has no place in it"
        raise UserError(
            f"{what}: {len(missing) + len(unknown)} names do not fit its config, first: {odd}"
        )
    for name, (found, dtype) in kinds.items():
        if tuple(found) != tensors[name].shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(found)}, and its config needs "
                f"{tensors[name].shape}"
            )
        fits = dtype == torch.int32 if tensors[name].integers else dtype.is_floating_point
        if not fits:
            needed = "int32" if tensors[name].integers else "a floating-point dtype"
            raise UserError(f"{what}: {name} is of {dtype}, and must be of {needed}")


def check_values(name: str, state: Mapping[str, Tensor], config: GptqConfig) -> None:
    """Raise MachineError if a layer's tensors cannot be a quantised weight, in one line."""
    scales, g_idx = state[f"{name}.scales"], state[f"{name}.g_idx"]
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= scales.size(0):
        raise MachineError(
            f"{name}.g_idx has groups from {int(g_idx.min())} to {int(g_idx.max())}, and there are "
            f"{scales.size(0)}; get the folder again"
        )
    if not bool(scales.isfinite().all()):
        raise MachineError(f"{name}.scales has numbers that are not finite; get the folder again")
    if config.symmetric:
        stored = unpack_words(state[f"{name}.qzeros"].t(), config.bits, scales.size(1)).int()
        zeros, half = stored + SUBTRACTED[config.format], 2 ** (config.bits - 1)
        if bool((zeros != half).any()):
            odd = int(zeros[zeros != half][0])
            raise MachineError(
                f"{name}.qzeros has a zero of {odd}, and with sym all of them are {half}; get the "
                "folder again, or set sym to false"
            )
