"""Which weights stay: so many of every unit of a pattern, no more and no fewer."""

import math
import re

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.weight import in_groups

#: columns of a block
BLOCK = 128
NAMED = ("row", "block", "matrix")


def removed(total: int, share: float) -> int:
    """How many of a unit go if a share stays: `floor((1 - share) n)`.

    Example:
        >>> removed(10, 0.3), removed(10, 0.35), removed(10, 1.0)
        (7, 6, 0)
    """
    return math.floor((1 - share) * total + 1e-9)


def check_pattern(name: str, share: float, pattern: str) -> None:
    """A share from 0 to 1, and a pattern that keeps it.

    Raises:
        LayerwiseError: in the name of a method, one is out of range, or they contradict each other.
    """
    if not 0 <= share <= 1:
        raise LayerwiseError(
            f"{name}, option 'share'", allowed="0 to 1", found=share, fix="choose another"
        )
    kept, of = _counted(pattern)
    if pattern in NAMED or columns_of(pattern):
        return
    if not 0 <= kept <= of > 0:
        raise LayerwiseError(
            f"{name}, option 'pattern'",
            allowed="row, block, matrix, such as 2:4 for 2 kept of 4, or such as column:64",
            found=pattern,
            fix="choose one of them",
        )
    if abs(share - kept / of) > 1e-6:
        raise LayerwiseError(
            f"{name}, options 'share' and 'pattern'",
            allowed=f"share {kept / of:g} with pattern {pattern}",
            found=share,
            fix=f"set the share, or on a menu --set menu.share={kept / of:g}",
        )


def columns_of(pattern: str) -> int:
    """How many neighbouring columns stay or go as one, of all rows; 0 for another pattern.

    Example:
        >>> columns_of("column"), columns_of("column:64"), columns_of("row")
        (1, 64, 0)
    """
    found = re.fullmatch(r"column(?::([1-9]\d{0,6}))?", pattern)
    return int(found[1] or 1) if found else 0


def _counted(pattern: str) -> tuple[int, int]:
    """`2:4` as numbers; 1 of 0 for what is no such pattern."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", pattern)
    return (int(found[1]), int(found[2])) if found else (1, 0)


def unit_of(pattern: str, columns: int) -> tuple[int, bool]:
    """How many columns a unit has, and whether it has them of all rows.

    Example:
        >>> unit_of("row", 100), unit_of("matrix", 100), unit_of("2:4", 100)
        ((100, False), (100, True), (4, False))
    """
    width = {"block": BLOCK, "row": columns, "matrix": columns}.get(pattern)
    return min(width or _counted(pattern)[1], columns), pattern in ("block", "matrix")


def in_units(
    matrix: Float[Tensor, "out in"], width: int, together: bool
) -> list[Float[Tensor, "units members"]]:
    """A matrix by units: first those that are whole, then a shorter last one of every row."""
    rows, whole = len(matrix), matrix.shape[1] // width * width
    parts = []
    for part, size in ((matrix[:, :whole], width), (matrix[:, whole:], matrix.shape[1] - whole)):
        if part.numel():
            groups = part.reshape(rows, -1, size)  # [out, groups, width]
            parts.append(groups.transpose(0, 1).flatten(1) if together else groups.flatten(0, 1))
    return parts


def keep_largest(
    scores: Float[Tensor, "out in"], share: float, pattern: str
) -> Bool[Tensor, "out in"]:
    """Which weights stay: the best of every unit, of equal ones the last.

    Example:
        >>> keep_largest(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 0.5, "row")
        tensor([[ True, False, False,  True]])
    """
    rows, columns = scores.shape
    if columns_of(pattern):
        energy = column_energy(scores, columns_of(pattern))
        gone = energy.argsort(stable=True)[: removed(len(energy), share)]
        return spread_columns(gone, columns_of(pattern), scores)
    width, together = unit_of(pattern, columns)
    masks = []
    for members in in_units(scores, width, together):
        gone = members.argsort(dim=1, stable=True)[:, : removed(members.shape[1], share)]
        kept = torch.ones_like(members, dtype=torch.bool).scatter_(1, gone, False)
        size = members.shape[1] // rows if together else members.shape[1]
        if together:
            kept = kept.reshape(-1, rows, size).transpose(0, 1)  # [out, groups, width]
        masks.append(kept.reshape(rows, -1))
    return torch.cat(masks, 1) if masks else torch.ones_like(scores, dtype=torch.bool)


def column_energy(scores: Float[Tensor, "out in"], block: int) -> Float[Tensor, " blocks"]:
    """The sum of the squares of every block of columns; a last one may be shorter."""
    return in_groups(scores.square(), block).sum((0, 2))


def spread_columns(
    gone: Int[Tensor, " gone"], block: int, like: Float[Tensor, "out in"]
) -> Bool[Tensor, "out in"]:
    """Which weights stay where some blocks of columns go."""
    kept = torch.ones(-(-like.shape[1] // block), dtype=torch.bool, device=like.device)
    kept[gone] = False
    return kept.repeat_interleave(block)[: like.shape[1]].expand(like.shape).clone()
