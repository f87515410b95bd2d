"""The table of methods of quantize.py. Does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_lab.errors import UserError, one_of, shown

ALL = (2, 3, 4, 8)
QAT = "qat"  # in --table only: a run that was trained with rounded weights, and then rounded
QAT_WIDTHS = (2, 3, 4)


@dataclass(frozen=True)
class Method:
    """A method of post-training quantisation.

    function: "module:function", called as function(model, calibration, scheme, **options)
    about: for --help
    widths: the bits of a weight that it has
    default: those that it takes if none are given
    options: its settings that other methods do not have
    activations: the inputs of each layer have 8 bits, too
    calibrates: it reads samples
    """

    function: str
    about: str
    widths: tuple[int, ...] = ALL
    default: int = 4
    options: tuple[str, ...] = ()
    activations: bool = False
    calibrates: bool = True


METHODS: Mapping[str, Method] = {
    "rtn": Method(
        "dist_lab.quantize.rtn:quantize", "rounds each weight to the nearest code",
        calibrates=False,
    ),
    "gptq": Method(
        "dist_lab.quantize.gptq:quantize", "rounds one column after another, and the columns to "
        "come make up for its error", options=("act_order", "damping"),
    ),
    "awq": Method(
        "dist_lab.quantize.awq:quantize", "scales up the columns that large inputs meet, before "
        "it rounds",
    ),
    "w8a8": Method(
        "dist_lab.quantize.w8a8:quantize", "8 bits for inputs, too: integer products",
        widths=(8,), default=8, options=("inputs",), activations=True,
    ),
    "smoothquant": Method(
        "dist_lab.quantize.smoothquant:quantize", "w8a8, after large inputs are scaled down and "
        "their weights up", widths=(8,), default=8, options=("inputs",), activations=True,
    ),
}  # fmt: skip


def check_width(method: str, bits: int | None) -> int:
    """The bits of a weight. Raises UserError if the method has no such width.

    >>> check_width("gptq", None), check_width("w8a8", None)
    (4, 8)
    """
    widths = METHODS[method].widths
    if bits is None:
        return METHODS[method].default
    if bits not in widths:
        others = [name for name, row in METHODS.items() if bits in row.widths]
        other = f", or --method {one_of(others, '')}" if others else ""
        known = one_of([str(width) for width in widths], bits)
        raise UserError(f"{method} has no codes of {bits} bits (--bits); give {known}{other}")
    return bits


def read_bits(value: object, where: str) -> int:
    """The value of --bits. Raises UserError if no method has such codes."""
    if str(value) not in map(str, ALL):
        raise UserError(f"there are no codes of {shown(value)} bits ({where}); give 2, 3, 4 or 8")
    return int(str(value))
