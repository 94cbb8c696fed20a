"""How compressed-tensors stores one matrix: packed integers, 8-bit floats, microscaled floats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.chain import framed, kind_left, made_by
from layerwise.core.floats import FLOAT_TYPES, POWERS, SMALL, FloatType
from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.core.weight import Codebook, Quantized, Weight, packed_bytes

#: `weight_shape` of packed integers, two int64
_SHAPE_BYTES = 16
#: the format of integers, and of each type of small floats
INTEGERS = "pack-quantized"
FORMATS = {
    "fp8": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
#: integers of a matrix that are packed together: on the way there each takes ten times its bytes
TOGETHER = 1 << 20
#: how a config group names the type of scales
_SCALES = {POWERS: "torch.uint8", SMALL: "torch.float8_e4m3fn"}


class Scheme(NamedTuple):
    """What all matrices of a config group have in common; a `group` of 0 is the whole row."""

    format: str
    bits: int
    group: int
    symmetric: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """The weights' entry of the config group."""
        scale, strategy = self.floats.scale, "group" if self.group else "channel"
        if scale is SMALL:
            strategy = "tensor_group"
        return {
            "num_bits": self.bits,
            "type": "int" if self.format == INTEGERS else "float",
            "symmetric": self.symmetric,
            "strategy": strategy,
            "group_size": self.group or None,
            "dynamic": False,
            **({"scale_dtype": _SCALES[scale]} if scale else {}),
        }

    @property
    def floats(self) -> FloatType:
        """The small floats, those of a row for integers."""
        name = next((name for name, held in FORMATS.items() if held == self.format), "fp8")
        return FLOAT_TYPES[name]

    def nbytes(self, shape: tuple[int, int], scale: torch.dtype, modules: int = 1) -> int:
        """Exact bytes of a matrix whose rows are the weights of so many modules."""
        if self.format == INTEGERS:
            packed = packed_bytes(shape, self.bits, self.group, not self.symmetric, scale)
            return packed + modules * _SHAPE_BYTES
        groups = shape[1] // self.group if self.group else 1
        each = 1 if self.group else scale.itemsize
        shared = 4 if self.floats.scale is SMALL else 0
        return shape[0] * (shape[1] * self.bits // 8 + groups * each) + shared


def _floats(name: str) -> Scheme:
    return Scheme(FORMATS[name], FLOAT_TYPES[name].bits, FLOAT_TYPES[name].group)


def scheme_of(record: Weight | None) -> Scheme | None:
    """How a record is stored, or None where it is stored dense."""
    if isinstance(record, Quantized):
        return Scheme(INTEGERS, record.bits, record.group, record.zero is None)
    if isinstance(record, Codebook):
        for name, kind in FLOAT_TYPES.items():
            same = record.group == kind.group and len(record.book) == len(kind.values)
            if same and torch.equal(record.book[:, 0] * _shared(record, kind), kind.values):
                return _floats(name)
    return None


def _shared(record: Codebook, kind: FloatType) -> Tensor:
    """What the scales of a matrix are divided by, `[1]`."""
    return kind.largest / record.book[-1] if kind.scale is SMALL else torch.ones(1)


def scheme_after(chain: Sequence[Step]) -> Scheme | None:
    """How a chain leaves a matrix: by its last step that does not keep what it was given.

    None where it leaves no such grid, or one inside a frame: those are stored dense.
    """
    step = made_by(chain)
    if step is None or framed(chain):
        return None
    chosen = find(step.method, "weight").values(step.options)
    if kind_left(step) is Quantized:
        return Scheme(INTEGERS, chosen["bits"], chosen["group"], chosen["symmetric"])
    return _floats(chosen["type"]) if chosen.get("type") in FORMATS else None


def pack(record: Weight) -> dict[str, Tensor]:
    """The tensors that the format stores for a matrix that has a scheme."""
    if isinstance(record, Quantized):
        return _integers(record)
    assert isinstance(record, Codebook)
    return _small_floats(record)


def _integers(record: Quantized) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    some = record.codes.split(max(1, TOGETHER // record.codes.shape[1]))
    tensors = {
        "weight_packed": torch.cat([pack_to_int32(c.to(torch.int8), record.bits) for c in some]),
        "weight_scale": record.scale,
        "weight_shape": torch.tensor(record.codes.shape, dtype=torch.int64),
    }
    if record.zero is not None:
        zero = record.zero.to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zero, record.bits, packed_dim=0).contiguous()
    return tensors


def _small_floats(record: Codebook) -> dict[str, Tensor]:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    scheme = scheme_of(record)
    assert scheme is not None
    values = scheme.floats.values[record.codes.long()]  # [out, in]
    powers = scheme.floats.scale is POWERS
    scales = {"weight_scale": record.scale.view(torch.uint8) if powers else record.scale}
    if scheme.floats.scale is SMALL:
        scales["weight_global_scale"] = _shared(record, scheme.floats).float()
    if len(record.book) > 16:
        return {"weight": values.to(torch.float8_e4m3fn), **scales}
    return {"weight_packed": pack_fp4_to_uint8(values), **scales}


def unpack(scheme: Scheme, shape: tuple[int, int], read: Callable[[str], Tensor]) -> Weight:
    """The record that `pack` stored; `read` gives a tensor by its name in the module."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scale = read("weight_scale")
    if scheme.format == INTEGERS:
        codes = unpack_from_int32(read("weight_packed"), scheme.bits, torch.Size(shape))
        return Quantized(codes, scale, None, scheme.bits, scheme.group)
    values = scheme.floats.values
    if scheme.bits == 4:
        dense = unpack_fp4_from_uint8(read("weight_packed"), *shape, dtype=torch.float32)
    else:
        dense = read("weight").float()
    codes = torch.searchsorted(values, dense.contiguous()).to(torch.int16)
    scale = scale.view(POWERS) if scheme.floats.scale is POWERS else scale
    shared = read("weight_global_scale") if scheme.floats.scale is SMALL else 1.0
    return Codebook(codes, scale, values[:, None] / shared, scheme.group, shape[1])


def config_groups(schemes: Mapping[Scheme, Sequence[str]]) -> tuple[str, dict[str, Any]]:
    """The format of a folder, and a config group for each scheme, naming its modules."""
    formats = {scheme.format for scheme in schemes}
    groups: dict[str, Any] = {}
    for number, (scheme, names) in enumerate(sorted(schemes.items())):
        groups[f"group_{number}"] = {"targets": list(names), "weights": scheme.arguments}
        if len(formats) > 1:
            groups[f"group_{number}"]["format"] = scheme.format
    return formats.pop() if len(formats) == 1 else "mixed-precision", groups
