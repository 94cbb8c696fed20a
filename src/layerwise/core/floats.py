"""Small floating-point numbers: their values, and how a group of weights shares a scale."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

#: scales that are powers of two, a byte each
POWERS = torch.float8_e8m0fnu
#: scales that are small floats themselves, a byte each, and the largest of them
SMALL, MOST = torch.float8_e4m3fn, 448.0
#: what all small scales of a matrix are divided by, less where a weight is too large for that
SHARED = 256.0


class FloatType(NamedTuple):
    """A type: bits of the exponent and of the mantissa, its largest value, columns of a group.

    A `group` of 0 is the whole row, with a scale in the dtype of the weight; other groups have a
    scale of one byte: a power of two, or a small float that a number of the matrix divides.
    """

    exponent: int
    mantissa: int
    largest: float
    group: int = 0
    scale: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits of a value, with its sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def values(self) -> Float[Tensor, " levels"]:
        """Every finite value once, from the smallest to the largest."""
        return _values(self.exponent, self.mantissa, self.largest)


#: OCP 8-bit floats, OCP microscaling formats 1.0, and what Blackwell multiplies with
FLOAT_TYPES = {
    "fp8": FloatType(4, 3, 448.0),
    "mxfp8": FloatType(4, 3, 448.0, 32, POWERS),
    "mxfp4": FloatType(2, 1, 6.0, 32, POWERS),
    "nvfp4": FloatType(2, 1, 6.0, 16, SMALL),
}


@cache
def _values(exponent: int, mantissa: int, largest: float) -> Tensor:
    """`2^e (1 + m)` for normal and `2^(1 - bias) m` for subnormal numbers, of both signs."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    found = {
        2.0 ** (max(e, 1) - bias) * ((e > 0) + m / steps)
        for e in range(2**exponent)
        for m in range(steps)
    }
    kept = sorted(v for v in found if v <= largest)
    return torch.tensor([-v for v in reversed(kept) if v] + kept)
