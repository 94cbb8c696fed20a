"""The values that a rounded record can hold, so that any solver can choose among them anew."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml_codes import codes_of
from layerwise.core.weight import Codebook, Packed, Quantized, Sum, Trits, Weight
from layerwise.edit.weight._grid import Grid, round_column
from layerwise.edit.weight._solve import RoundColumn


class Points(NamedTuple):
    """Codes of a record, how a column is rounded to its grid, and the record of other codes."""

    codes: Int[Tensor, "out in"]
    round_column: RoundColumn
    record: Callable[[Int[Tensor, "out in"]], Weight]


def points_of(record: Weight, name: str) -> Points:
    """The grid of integers, of a codebook of single values, of two trit planes, or of GGML blocks.

    Raises:
        LayerwiseError: in the name of a method, the record is no such grid.
    """
    if isinstance(record, Quantized):
        return _integers(record)
    if isinstance(record, Codebook) and record.book.shape[1] == 1:
        values = record.scale.float()[..., None] * record.book[:, 0]  # [out, groups, levels]
        return Points(
            record.codes,
            _among(values, record.group or record.columns),
            lambda codes: replace(record, codes=codes.to(record.codes.dtype)),
        )
    if isinstance(record, Sum) and isinstance(record.a, Trits) and isinstance(record.b, Trits):
        return _planes(record.a, record.b)
    own = codes_of(record.type) if isinstance(record, Packed) else None
    if isinstance(record, Packed) and own is not None:
        return Points(
            own.read(record.data),
            _among(own.values(record.data), own.width),
            lambda codes: replace(record, data=own.write(record.data, codes)),
        )
    raise LayerwiseError(
        f"{name}, the step before it",
        allowed="one that rounds each weight to a grid, such as rtn, gaussian or trit_planes",
        found=record.type if isinstance(record, Packed) else type(record).__name__,
        fix=f"put such a step before {name} in the chain",
    )


def grid_of(record: Quantized) -> Grid:
    """The grid that integers stand on, laid out column by column."""
    scale = record.scale.float().T.contiguous().T
    zero = torch.zeros_like(scale) if record.zero is None else record.zero.float()
    width = record.group or record.codes.shape[1]
    return Grid(scale, zero.T.contiguous().T, record.bits, width)


def _integers(record: Quantized) -> Points:
    grid = grid_of(record)
    return Points(
        record.codes,
        lambda values, place: round_column(values, grid, place),
        lambda codes: replace(record, codes=codes.to(torch.int8)),
    )


def _planes(a: Trits, b: Trits) -> Points:
    trits = torch.tensor([-1, 0, 1], device=a.codes.device)
    pairs = torch.cartesian_prod(trits, trits)  # [9, 2]
    values = a.scale.float()[..., None] * pairs[:, 0] + b.scale.float()[..., None] * pairs[:, 1]

    def record(codes: Tensor) -> Weight:
        chosen = pairs[codes.long()].to(torch.int8)
        return Sum(
            replace(a, codes=chosen[..., 0].contiguous()),
            replace(b, codes=chosen[..., 1].contiguous()),
        )

    codes = 3 * (a.codes + 1) + b.codes + 1
    return Points(codes, _among(values, a.group or a.codes.shape[1]), record)


def _among(values: Float[Tensor, "out groups levels"], width: int) -> RoundColumn:
    def round_one(column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        own = values[:, place // width]  # [out, levels]
        codes = (column[:, None] - own).abs().argmin(1)
        return codes, own.gather(1, codes[:, None])[:, 0]

    return round_one
