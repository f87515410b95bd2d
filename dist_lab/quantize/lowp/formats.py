"""Floating-point numbers of 8 and 4 bits: a sign, an exponent and a mantissa, as data.

    e4m3    s eeee mmm    8 bits     0 and 2^-9 to 448          weights and activations
    e5m2    s eeeee mm    8 bits     0 and 2^-16 to 57344       gradients: more range, fewer digits
    e2m1    s ee m        4 bits     0, .5, 1, 1.5, 2, 3, 4, 6
    e8m0      eeeeeeee    8 bits     2^-127 to 2^127            scales: an exponent and nothing else

A number is `fraction x step`, where the step depends on the exponent: 2^m fractions later it
doubles. So codes count along the positive numbers, and rounding is one line: divide by the step,
round, and multiply again.

    e2m1, m = 1     code      0    1    2    3    4    5    6    7
                    number    0   .5    1  1.5    2    3    4    6
                    step       .5 .5   .5   .5    1    1    2    2

Below the smallest exponent the step stays the same: the subnormal numbers, and 0. Formats as in the
OCP specifications "8-bit Floating Point" v1.0 and "Microscaling Formats" v1.0, section 5.3.

[Note: rounding] Numbers between two codes go to the nearest one; from the middle, to the even code.
Beyond the largest number they saturate: infinity becomes the largest number, too. (torch's casts
make NaN and infinity of them.) NaN stays NaN. e2m1 has no code for it, and codes 0: there the scale
must be NaN. We round once, from any dtype; torch's casts round a float64 to float32 first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """Numbers with a sign, an exponent and a mantissa.

    exponent_bits, mantissa_bits: of a code
    max: the largest number
    infinity: the code of infinity; codes above it are NaN
    nan: the code that NaN gets; without an infinity the only one. None: there is no NaN
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    infinity: int | None = None
    nan: int | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Of the smallest number that is not subnormal."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def max_exponent(self) -> int:
        """Of the largest number: max is between 2^this and twice that."""
        return int(torch.frexp(torch.tensor(self.max))[1]) - 1

    @property
    def smallest(self) -> float:
        """The smallest number above 0. All numbers are multiples of it."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    def rounded(self, x: Tensor) -> Tensor:
        """The nearest number of the format, in the dtype of x (float32 or float64)."""
        x = x.clamp(-self.max, self.max)
        step = self._power(x) * 2.0**-self.mantissa_bits
        return (x / step).round() * step

    def encode(self, x: Tensor) -> Tensor:
        """The codes of the nearest numbers: uint8, the sign in the highest bit that is used."""
        magnitude = x.abs().clamp(max=self.max)
        power = self._power(magnitude)
        exponent = torch.frexp(power)[1] - 1
        fractions = (magnitude / power * 2**self.mantissa_bits).round()
        code = (exponent - self.min_exponent) * 2**self.mantissa_bits + fractions
        code = torch.where(x.isnan(), self.nan or 0, code)
        return (code + x.signbit() * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that codes stand for."""
        codes = codes.int()
        sign, magnitude = codes >> (self.bits - 1), codes & (2 ** (self.bits - 1) - 1)
        field, fraction = magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)
        fraction = torch.where(field > 0, fraction + 2**self.mantissa_bits, fraction)
        x = torch.ldexp(fraction.to(dtype) * self.smallest, (field - 1).clamp(min=0))
        if self.infinity is not None:
            x = torch.where(magnitude == self.infinity, torch.inf, x)
        if self.nan is not None:
            first_nan = self.nan if self.infinity is None else self.infinity + 1
            x = torch.where(magnitude >= first_nan, torch.nan, x)
        return torch.where(sign > 0, -x, x)

    def _power(self, x: Tensor) -> Tensor:
        """The power of two at or below |x|, but at least that of the smallest exponent."""
        return power_below(x).clamp(min=2.0**self.min_exponent)


E4M3 = Format("e4m3", 4, 3, 448.0, nan=0x7F)
E5M2 = Format("e5m2", 5, 2, 57344.0, infinity=0x7C, nan=0x7F)
E2M1 = Format("e2m1", 2, 1, 6.0)

E8M0_BIAS, E8M0_NAN = 127, 255


def encode_e8m0(x: Tensor) -> Tensor:
    """The codes of powers of two from 2^-127 to 2^127, and NaN: uint8."""
    code = torch.frexp(x)[1] - 1 + E8M0_BIAS
    return torch.where(x.isfinite(), code, E8M0_NAN).to(torch.uint8)


def decode_e8m0(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The powers of two that codes stand for."""
    x = torch.ldexp(torch.ones(codes.shape, dtype=dtype), codes.int() - E8M0_BIAS)
    return torch.where(codes == E8M0_NAN, torch.nan, x)


def power_below(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), which is x without the bits of its sign and mantissa.

    It is 0 where x is subnormal in its own dtype, and infinity where x is NaN.
    """
    integer, mask = {
        torch.float32: (torch.int32, 0xFF << 23),
        torch.float64: (torch.int64, 0x7FF << 52),
    }[x.dtype]
    return (x.view(integer) & mask).view(x.dtype)
