"""Rotations of the columns of a matrix that need no storage but a bit per column."""

from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@cache
def hadamard(size: int) -> Float[Tensor, "size size"]:
    """The orthogonal, symmetric Hadamard matrix of a power of two.

    Example:
        >>> hadamard(4)[1]
        tensor([ 0.5000, -0.5000,  0.5000, -0.5000])
    """
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / size**0.5


def widths(size: int, block: int) -> list[int]:
    """Powers of two, none over `block`, that make up a size; the largest first.

    Example:
        >>> widths(100, 32), widths(100, 1024)
        ([32, 32, 32, 4], [64, 32, 4])
    """
    found = []
    while size:
        found.append(min(1 << (size.bit_length() - 1), 1 << (block.bit_length() - 1)))
        size -= found[-1]
    return found


def rotated(
    matrix: Float[Tensor, "rows in"], signs: Bool[Tensor, " in"], block: int
) -> Float[Tensor, "rows in"]:
    """Columns with signs flipped, then mixed in blocks: `M D H`, in float32."""
    return _mixed(torch.where(signs, -matrix.float(), matrix.float()), block)


def unrotated(
    matrix: Float[Tensor, "rows in"], signs: Bool[Tensor, " in"], block: int
) -> Float[Tensor, "rows in"]:
    """What `rotated` was given: `M H D`."""
    found = _mixed(matrix.float(), block)
    return torch.where(signs, -found, found)


def _mixed(matrix: Tensor, block: int) -> Tensor:
    pieces = matrix.split(widths(matrix.shape[1], block), dim=1)
    return torch.cat([p @ hadamard(p.shape[1]).to(p.device) for p in pieces], 1)
