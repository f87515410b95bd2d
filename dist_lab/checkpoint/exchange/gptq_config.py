"""The settings of AutoGPTQ's folders: quantize_config.json, and quantization_config of config.json.

AutoGPTQ reads the first, transformers the second. We write both. In a folder with both they must
agree on how its tensors are read. Fields:

    bits, group_size, sym       see Scheme; a group_size of -1 is one scale per row
    desc_act                    inputs were quantised in the order of their size (act-order)
    static_groups               and the groups are neighbors all the same
    true_sequential, damp_percent       how GPTQ ran; nothing reads them
    quant_method, checkpoint_format     "gptq", and "gptq" or "gptq_v2": see packing.py
    activations, activation_bits, activation_sym    ours: inputs are rounded, too; "static": in a
                                fixed range, whose scale is input_scale; "dynamic": in each row's
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lab.checkpoint.exchange.folders import inside, read_json
from dist_lab.checkpoint.exchange.gptq_names import CONFIG, QUANTIZE, TABLE
from dist_lab.errors import MachineError, UserError, one_of, shown
from dist_lab.quantize.formula import WHOLE, WIDTHS, Scheme
from dist_lab.quantize.packing import SUBTRACTED

LARGEST_GROUP = 2**31 - 1
MUST_AGREE = ("bits", "group_size", "sym", "checkpoint_format", "activations")


@dataclass(frozen=True)
class GptqConfig:
    """The fields that say how tensors are read, and `about`: those that say how they were made."""

    bits: int
    group: int
    symmetric: bool
    format: str = "gptq"
    inputs: Scheme | None = None
    static: bool = False
    about: Mapping[str, Any] | None = None

    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group, self.symmetric)

    def to_json(self) -> dict[str, Any]:
        """The table of either file."""
        table = {
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": False,
            "damp_percent": 0.01,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "checkpoint_format": self.format,
        } | dict(self.about or {})
        if self.inputs is not None:
            table |= {
                "activations": "static" if self.static else "dynamic",
                "activation_bits": self.inputs.bits,
                "activation_sym": self.inputs.symmetric,
            }
        return table


def read_config(folder: Path, config: Mapping[str, Any]) -> tuple[GptqConfig, Mapping[str, Any]]:
    """The settings of a folder, and their table as it is.

    Args:
        config: the content of its config.json.

    Raises:
        UserError: it is not quantised, or in a format that we do not read.
        MachineError: the two files differ.
    """
    tables = {}
    if (folder / QUANTIZE).exists() or (folder / QUANTIZE).is_symlink():
        tables[QUANTIZE] = read_json(inside(folder, QUANTIZE, "AutoGPTQ's format"))
    if TABLE in config:
        table = config[TABLE]
        if not isinstance(table, dict):
            raise MachineError(f"{TABLE} of {CONFIG} is {shown(table)}, not a table; get it again")
        tables[f"{TABLE} of {CONFIG}"] = table
    if not tables:
        raise UserError(
            f"{str(folder)!r} is not quantised: it has no {QUANTIZE}, and no {TABLE} in {CONFIG}; "
            "import it as a Hugging Face folder"
        )
    (first, table), *others = tables.items()
    for other, values in others:
        for key in MUST_AGREE:
            if key in table and key in values and table[key] != values[key]:
                raise MachineError(
                    f"{first} has {key} {shown(table[key])}, and {other} {shown(values[key])}; get "
                    "the folder again"
                )
    merged = {key: value for values in reversed(tables.values()) for key, value in values.items()}
    return _checked(merged, first), merged


def _checked(table: Mapping[str, Any], file: str) -> GptqConfig:
    method = table.get("quant_method", "gptq")
    if method != "gptq":
        raise UserError(f"{file} has quant_method {shown(method)}; only gptq's folders are read")
    if table.get("is_marlin_format", False):
        raise UserError(f"{file} has is_marlin_format true; take the folder before it was repacked")
    format = table.get("checkpoint_format") or "gptq"
    if format not in SUBTRACTED:
        raise UserError(
            f"{file} has checkpoint_format {shown(format)}; it must be "
            f"{one_of(list(SUBTRACTED), format)}"
        )
    bits, group = _bits(table, "bits", file), table.get("group_size", WHOLE)
    if type(group) is not int or not (group == WHOLE or 1 <= group <= LARGEST_GROUP):
        raise UserError(f"{file} has group_size {shown(group)}, not 1 or more, or -1")
    symmetric = _flag(table, "sym", True, file)
    activations = table.get("activations")
    if activations not in (None, "static", "dynamic"):
        raise UserError(f"{file} has activations {shown(activations)}, not static or dynamic")
    inputs = None
    if activations is not None:
        wide = None if activations == "static" else WHOLE
        signed = _flag(table, "activation_sym", True, file)
        inputs = Scheme(_bits(table, "activation_bits", file), wide, signed)
    return GptqConfig(bits, group, symmetric, format, inputs, activations == "static")


def _bits(table: Mapping[str, Any], key: str, file: str) -> int:
    value = table.get(key)
    if type(value) is not int or value not in WIDTHS:
        raise UserError(f"{file} has {key} {shown(value)}, not 2, 3, 4 or 8")
    return value


def _flag(table: Mapping[str, Any], key: str, default: bool, file: str) -> bool:
    value = table.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{file} has {key} {shown(value)}, not true or false")
    return value
