"""Grids of integers: fitting scales and zeros, and rounding to them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.weight import in_groups


class Grid(NamedTuple):
    """`value = (code - zero) * scale` per group of columns, in float32; the scale is already
    rounded to the dtype in which it is stored."""

    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    bits: int
    group: int

    def column(self, index: int) -> tuple[Tensor, Tensor]:
        """Scale and zero `[out]` of one column."""
        at = index // self.group
        return self.scale[:, at], self.zero[:, at]


def check_bits(name: str, bits: int, group: int) -> None:
    """Bits from 2 to 8 and a group that is not negative."""
    if not 2 <= bits <= 8:
        raise LayerwiseError(
            f"{name}, option 'bits'", allowed="2 to 8", found=bits, fix="choose bits in range"
        )
    if group < 0:
        raise LayerwiseError(
            f"{name}, option 'group'",
            allowed="0 for one group per row, or a number of columns",
            found=group,
            fix="choose a group that is not negative",
        )


def fit_grid(
    weight: Float[Tensor, "out in"],
    bits: int,
    group: int,
    symmetric: bool,
    shrink: bool,
    dtype: torch.dtype,
) -> Grid:
    """Min/max grid per group of columns, extended to 0; with `shrink` the range is searched.

    Symmetric: `scale = 2 max|w| / (2^b - 1)`, zero 0. Else `scale = (max - min) / (2^b - 1)` and
    `zero = round(-min / scale) - 2^(b-1)`. The search tries ranges from 1 down to 0.5 of the
    full one and keeps the least `sum |w - q|^2.5` per group.
    """
    width = group or weight.shape[1]
    blocks = in_groups(weight.float(), width)  # [out, groups, width]
    low, high = (
        blocks.amin(-1).clamp_max(0),
        blocks.amax(-1).clamp_min(0),
    )  # 10x faster than aminmax
    best = _grid(low, high, bits, width, symmetric, dtype)
    if not shrink:
        return best
    loss = _loss(blocks, best)
    for share in torch.linspace(0.975, 0.5, 20).tolist():
        trial = _grid(low * share, high * share, bits, width, symmetric, dtype)
        found = _loss(blocks, trial)
        better = found < loss
        loss = torch.where(better, found, loss)
        best = best._replace(
            scale=torch.where(better, trial.scale, best.scale),
            zero=torch.where(better, trial.zero, best.zero),
        )
    return best


def _grid(
    low: Tensor, high: Tensor, bits: int, width: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    steps, half = 2**bits - 1, 2 ** (bits - 1)
    span = 2 * torch.maximum(high, -low) if symmetric else high - low
    scale = (span / steps).to(dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale)
    if not symmetric:
        zero = ((-low / scale).round() - half).clamp(-half, half - 1)
    return Grid(scale, zero, bits, width)


#: values that a search looks at together, so that they stay in a processor's cache
TOGETHER = 1 << 16


def _loss(blocks: Tensor, grid: Grid) -> Tensor:
    """`sum |w - q|^2.5` of every group; the power as a square times a root, which is 5x faster."""
    half = 2 ** (grid.bits - 1)
    found = torch.empty(blocks.shape[:2], device=blocks.device)
    step = max(1, TOGETHER // blocks[0].numel())
    for at in range(0, len(blocks), step):
        part, zero = blocks[at : at + step], grid.zero[at : at + step, :, None]
        scale = grid.scale[at : at + step, :, None]
        codes = (part / scale).round_().add_(zero).clamp_(-half, half - 1)
        error = codes.sub_(zero).mul_(scale).sub_(part).abs_()
        found[at : at + step] = error.sqrt().mul_(error).mul_(error).sum(-1)
    return found


def round_column(values: Float[Tensor, " out"], grid: Grid, index: int) -> tuple[Tensor, Tensor]:
    """Codes and values of one column on its grid."""
    half = 2 ** (grid.bits - 1)
    scale, zero = grid.column(index)
    codes = (values / scale).round_().add_(zero).clamp_(-half, half - 1)
    return codes, (codes - zero).mul_(scale)


def round_to_grid(weight: Float[Tensor, "out in"], grid: Grid) -> Int[Tensor, "out in"]:
    """Nearest codes of a whole matrix."""
    half, columns = 2 ** (grid.bits - 1), weight.shape[1]
    found = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    step = max(1, TOGETHER // columns)
    for at in range(0, len(weight), step):
        some = slice(at, at + step)
        codes = in_groups(weight[some].float(), grid.group) / grid.scale[some, :, None]
        codes.round_().add_(grid.zero[some, :, None]).clamp_(-half, half - 1)
        found[some] = codes.flatten(1)[:, :columns]  # of [rows, groups, width]
    return found
