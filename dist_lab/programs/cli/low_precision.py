"""The settings of a run whose Linears multiply fewer numbers. Does not import torch."""

import math
import re
from dataclasses import dataclass

from dist_lab.errors import UserError, shown
from dist_lab.programs.cli.ranks import RankSettings
from dist_lab.programs.cli.settings import setting

BITS = (2, 3, 4, 8)  # of a code; the same as in quantize/formula.py, which imports torch
WHOLE_ROW, WHOLE_MATRIX = -1, "tensor"
RECIPES = {  # as in quantize/lowp/codecs.py; the tokens of a block, of which dW is a sum
    "fp8": 1, "fp8-pow2": 1, "fp8-block": 128, "fp8-block-pow2": 128, "mxfp8": 32, "mxfp4": 32,
    "nvfp4": 16, "nvfp4-pow2": 16,
}  # fmt: skip


def read_scheme(value: object, where: str) -> str:
    """Read BITS, BITS:GROUP or BITS:tensor. Raises UserError if it is none of these."""
    text = str(value)
    match = re.fullmatch(r"(\d)(?::(\d{1,6}|tensor))?", text)
    if not match or int(match[1]) not in BITS or match[2] == "0":
        raise UserError(
            f"{shown(value)} is no scheme of codes ({where}); give 2, 3, 4 or 8 bits, with one "
            "scale per row (4), one per 32 columns of a row (4:32), or one in all (4:tensor)"
        )
    return text


def scheme_of(text: str) -> tuple[int, int | None]:
    """The bits and the group of a scheme, as quantize/formula.py has them.

    >>> scheme_of("4"), scheme_of("3:32"), scheme_of("8:tensor")
    ((4, -1), (3, 32), (8, None))
    """
    bits, _, group = text.partition(":")
    if group == WHOLE_MATRIX:
        return int(bits), None
    return int(bits), int(group) if group else WHOLE_ROW


@dataclass(frozen=True)
class LowPrecision(RankSettings):
    """What the Linears of the model's blocks multiply."""

    # fmt: off
    qat: str | None = setting(None, "quantisation-aware training: forward rounds the weights of "
        "the blocks' Linears to 2, 3, 4 or 8 bits, with one scale per row, per GROUP columns of a "
        "row, or (tensor) in all; backward goes straight through", heading="quantisation",
        metavar="BITS[:GROUP]", read=read_scheme)
    qat_inputs: str | None = setting(None, "with --qat: round the inputs of these Linears, too, "
        "with one scale per token, or (tensor) one for all rows of all ranks",
        metavar="BITS[:tensor]", read=read_scheme)
    recipe: str | None = setting(None, "the blocks' Linears multiply 8-bit or 4-bit floating-point "
        "numbers, emulated, in forward and backward: fp8 (one scale per matrix), fp8-block (per "
        "128 values), mxfp8, mxfp4 (per 32), nvfp4 (per 16); -pow2: scales are powers of two, as "
        "those of mxfp8 and mxfp4; with others a run differs in its last digits between layouts",
        choices=tuple(RECIPES))
    # fmt: on

    def check_tokens(self, batch: int, seq: int, ranks: int, microbatches: int) -> None:
        """Raise UserError if a block of tokens would lie on two data-parallel ranks.

        With --reduce-order it need not be called: each virtual shard is rounded by itself.

        Args:
            batch, seq: samples of a step, and tokens of each.
        """
        block = RECIPES[self.recipe] if self.recipe else 1
        samples = block // math.gcd(block, seq)  # that fill blocks
        parts = ranks * microbatches
        if ranks > 1 and batch % (parts * samples) and samples > 1:
            fitting = max(1, round(batch / parts / samples)) * parts * samples
            raise UserError(
                f"recipe {self.recipe} has blocks of {block} tokens, and batch {batch} x seq {seq} "
                f"over {ranks} data-parallel ranks x {microbatches} micro-batches does not fill "
                f"them (--recipe, --batch); give --batch {fitting}, a --seq that is a multiple of "
                f"{block}, or --recipe fp8"
            )
