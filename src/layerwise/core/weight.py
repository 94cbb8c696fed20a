"""What an edit makes of a matrix: nested records that know their dense form and their bytes.

The model always runs on `record.dense()` of what is written, never on a solver's floats, so that
a result does not depend on whether it was just computed or read back.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from layerwise.core.ggml import decode
from layerwise.core.rotation import rotated, unrotated


@dataclass(frozen=True)
class Dense:
    """A matrix as it is, or any other tensor of a layer."""

    value: Float[Tensor, "..."]

    def dense(self) -> Float[Tensor, "..."]:
        return self.value

    @property
    def nbytes(self) -> int:
        return self.value.nbytes


@dataclass(frozen=True)
class Quantized:
    """Integers on a grid: `w = (code - zero) * scale`, one scale and zero per group of columns.

    Codes and zeros are signed, from -2^(bits-1) to 2^(bits-1) - 1. A `group` of 0 means one group
    per row; a last group that is shorter keeps its own scale. The product is formed in float32,
    where it is exact for 16-bit scales: rounding it to their dtype gives what a reader gets that
    multiplies in that dtype.
    """

    codes: Int[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Int[Tensor, "out groups"] | None
    bits: int
    group: int

    def dense(self) -> Float[Tensor, "out in"]:
        rows, columns = self.codes.shape
        values = in_groups(self.codes, self.group or columns).float()  # [out, groups, width]
        if self.zero is not None:
            values = values.sub_(self.zero.float()[..., None])
        values = values.mul_(self.scale.float()[..., None])
        return values.reshape(rows, -1)[:, :columns]

    @property
    def nbytes(self) -> int:
        return packed_bytes(
            (self.codes.shape[0], self.codes.shape[1]),
            self.bits,
            self.group,
            self.zero is not None,
            self.scale.dtype,
        )


@dataclass(frozen=True)
class Packed:
    """Blocks of a GGML type: the bytes that a GGUF file holds, row by row."""

    data: UInt8[Tensor, "out bytes"]
    type: str
    columns: int

    def dense(self) -> Float[Tensor, "out in"]:
        return decode(self.data, self.type, self.columns)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True)
class Sparse:
    """Kept values and a bit mask of where they stand."""

    values: Float[Tensor, " kept"]
    mask: Tensor

    def dense(self) -> Float[Tensor, "out in"]:
        result = torch.zeros(self.mask.shape, dtype=self.values.dtype, device=self.values.device)
        return result.masked_scatter(self.mask, self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + math.ceil(self.mask.numel() / 8)


@dataclass(frozen=True)
class Product:
    """`a @ b`: a matrix of low rank, of factors that are records themselves; or one per expert."""

    a: "Weight"
    b: "Weight"

    def dense(self) -> Float[Tensor, "*experts out in"]:
        return self.a.dense() @ self.b.dense()

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class Sum:
    """`a + b`: for instance a quantized matrix and a low-rank correction."""

    a: "Weight"
    b: "Weight"

    def dense(self) -> Float[Tensor, "out in"]:
        return self.a.dense() + self.b.dense()

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class Gather:
    """Columns in another order: `dense()[:, i] = inner.dense()[:, order[i]]`."""

    inner: "Weight"
    order: Int[Tensor, " in"]

    def dense(self) -> Float[Tensor, "out in"]:
        return self.inner.dense()[:, self.order.long()]

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self.order.nbytes


@dataclass(frozen=True)
class Rotated:
    """A matrix on inputs that are rotated: `inner` stands for `W D H`, in blocks of columns.

    It is a frame: the steps of a chain that follow see the rotated weight and moments.
    """

    inner: "Weight"
    signs: Bool[Tensor, " in"]
    block: int

    def dense(self) -> Float[Tensor, "out in"]:
        return unrotated(self.inner.dense(), self.signs, self.block)

    def moment(self, value: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """A moment of the inputs as they are inside."""
        half = rotated(value, self.signs, self.block)
        return rotated(half.T, self.signs, self.block).T

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + math.ceil(len(self.signs) / 8)


@dataclass(frozen=True)
class Scaled:
    """A matrix on inputs that are divided by `scale`: `inner` stands for `W diag(scale)`.

    It is a frame, as `Rotated` is.
    """

    inner: "Weight"
    scale: Float[Tensor, " in"]

    def dense(self) -> Float[Tensor, "out in"]:
        return self.inner.dense().float() / self.scale.float()

    def moment(self, value: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """A moment of the inputs as they are inside."""
        return value / self.scale.float() / self.scale.float()[:, None]

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class Codebook:
    """Vectors of neighbouring columns out of a table, times a scale per group of columns.

    The table is a constant of the format and takes no bytes of a matrix; the columns that fill up
    the last vector do.
    """

    codes: Int[Tensor, "out vectors"]
    scale: Shaped[Tensor, "out groups"]  # of any floating-point dtype, powers of two as well
    book: Float[Tensor, "levels dim"]
    group: int
    columns: int

    def dense(self) -> Float[Tensor, "out in"]:
        values = self.book[self.codes.long()].flatten(1)[:, : self.columns]  # [out, in]
        blocks = in_groups(values, self.group or self.columns)
        return (blocks * self.scale.float()[..., None]).flatten(1)[:, : self.columns]

    @property
    def nbytes(self) -> int:
        bits = math.ceil(math.log2(len(self.book)))
        rows, vectors = self.codes.shape
        return 4 * rows * math.ceil(vectors * bits / 32) + self.scale.nbytes


@dataclass(frozen=True)
class Trits:
    """-1, 0 or 1, five to a byte, times a scale per group of columns."""

    codes: Int[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    group: int

    def dense(self) -> Float[Tensor, "out in"]:
        columns = self.codes.shape[1]
        blocks = in_groups(self.codes.float(), self.group or columns)
        return (blocks * self.scale.float()[..., None]).flatten(1)[:, :columns]

    @property
    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        return rows * math.ceil(columns / 5) + self.scale.nbytes


Weight = (
    Dense
    | Quantized
    | Packed
    | Sparse
    | Product
    | Sum
    | Gather
    | Rotated
    | Scaled
    | Codebook
    | Trits
)
Frame = Rotated | Scaled
_KINDS = {
    kind.__name__: kind
    for kind in (
        *(Dense, Quantized, Packed, Sparse, Product, Sum, Gather),
        *(Rotated, Scaled, Codebook, Trits),
    )
}


#: fields that hold something of every row
_BY_ROW = {
    Dense: ("value",),
    Quantized: ("codes", "scale", "zero"),
    Codebook: ("codes", "scale"),
}


def some_rows(record: Weight, rows: slice) -> Weight:
    """The record of some rows of a matrix, where every row is stored for itself."""
    if isinstance(record, Frame):
        return replace(record, inner=some_rows(record.inner, rows))
    held = {name: getattr(record, name) for name in _BY_ROW[type(record)]}
    return replace(record, **{k: v if v is None else v[rows] for k, v in held.items()})


def in_groups(matrix: Tensor, width: int) -> Shaped[Tensor, "out groups width"]:
    """A matrix cut into groups of columns; a last one that is shorter is filled with zeros."""
    rows, columns = matrix.shape
    if columns % width:
        matrix = torch.nn.functional.pad(matrix, (0, -columns % width))
    return matrix.reshape(rows, -1, width)  # [out, groups, width]


def packed_bytes(
    shape: tuple[int, int], bits: int, group: int, zero: bool, scale: torch.dtype
) -> int:
    """Bytes of a packed matrix: rows of whole 32-bit words, a scale and perhaps a zero per group.

    `4 out ceil(in bits / 32) + out groups s [+ 4 groups ceil(out bits / 32)]`
    """
    rows, columns = shape
    groups = math.ceil(columns / group) if group else 1
    codes = 4 * rows * math.ceil(columns * bits / 32)
    zeros = 4 * groups * math.ceil(rows * bits / 32) if zero else 0
    return codes + rows * groups * scale.itemsize + zeros


def flatten(record: Weight, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record as a tree of plain values and a flat dictionary of tensors."""
    tree: dict[str, Any] = {"kind": type(record).__name__}
    tensors: dict[str, Tensor] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            tensors[f"{prefix}{field.name}"] = value
            tree[field.name] = {"tensor": f"{prefix}{field.name}"}
        elif isinstance(value, Weight):
            tree[field.name], inner = flatten(value, f"{prefix}{field.name}.")
            tensors |= inner
        else:
            tree[field.name] = value
    return tree, tensors


def unflatten(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Weight:
    """The record that `flatten` took apart."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "kind":
            continue
        if isinstance(value, dict):
            values[key] = (
                tensors[value["tensor"]] if "tensor" in value else unflatten(value, tensors)
            )
        else:
            values[key] = value
    return _KINDS[tree["kind"]](**values)
