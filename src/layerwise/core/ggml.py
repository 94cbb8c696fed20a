"""GGML's own encoders and decoders, out of the llama.cpp library that `xllamacpp` ships."""

import ctypes
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from layerwise.core.errors import LayerwiseError, nearest, refusing

#: quantized types that matrices may take, from many bits to few
TYPES = (
    *("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "TQ2_0", "IQ2_XXS", "IQ1_M", "TQ1_0"),
    "IQ1_S",
)
#: plain floating-point numbers
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: what llama.cpp takes where a row is no whole number of blocks; IQ4_NL stands for all IQ types
_FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
_FALLBACK |= {"TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
#: share of the mean below which no input's importance falls: encoders divide by sums of them
_LEAST = 1e-6


class Format(NamedTuple):
    """A GGML type: its number, and how many weights a block of how many bytes holds."""

    name: str
    number: int
    weights: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.weights * self.nbytes


@cache
def format_of(name: str) -> Format:
    """What GGML knows of a type.

    Raises:
        LayerwiseError: there is no such type, or the `gguf` package is not installed.

    Example:
        >>> format_of("Q4_K")
        Format(name='Q4_K', number=12, weights=256, nbytes=144)
    """
    with needing_gguf():
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    if name not in (*TYPES, *FLOATS):
        raise LayerwiseError(
            "GGML type",
            allowed=", ".join((*TYPES, *FLOATS)),
            found=name,
            fix=nearest(str(name), (*TYPES, *FLOATS), "choose one of these"),
        )
    number = GGMLQuantizationType[name]
    return Format(name, int(number), *GGML_QUANT_SIZES[number])


def needing_gguf() -> AbstractContextManager[None]:
    """A block that imports what writes, encodes and runs GGUF."""
    return refusing(
        "target gguf",
        allowed="the packages gguf and xllamacpp being installed",
        fix='pip install "layerwise[gguf]"',
    )


def fitting(name: str, columns: int) -> Format:
    """The type itself, or what llama.cpp takes in its place for rows of that many weights.

    Example:
        >>> fitting("Q4_K", 256).name, fitting("Q4_K", 96).name, fitting("Q4_K", 100).name
        ('Q4_K', 'Q5_0', 'F16')
    """
    wanted = format_of(name)
    if columns % wanted.weights == 0:
        return wanted
    other = format_of(_FALLBACK.get(name, "IQ4_NL"))
    return other if columns % other.weights == 0 else format_of("F16")


def library_file() -> str:
    """Where llama.cpp lies: in the extension module of `xllamacpp`.

    Raises:
        LayerwiseError: the package is not installed.
    """
    with needing_gguf():
        found = find_spec("xllamacpp.xllamacpp")
        if found is None or found.origin is None:
            raise ImportError("xllamacpp without its extension module")
        return found.origin


@cache
def library() -> ctypes.CDLL:
    """llama.cpp in this process.

    Raises:
        LayerwiseError: the package is not installed.
    """
    opened = ctypes.CDLL(library_file())
    opened.ggml_quantize_chunk.restype = ctypes.c_size_t
    size, where = ctypes.c_int64, ctypes.c_void_p
    opened.ggml_quantize_chunk.argtypes = [ctypes.c_int, where, where, size, size, size, where]
    return opened


def encode(
    weight: Float[Tensor, "out in"], name: str, importance: Float[Tensor, " in"] | None = None
) -> UInt8[Tensor, "out bytes"]:
    """The bytes of a matrix in a type that its rows fit.

    Args:
        weight: `[out, in]`.
        name: of the type.
        importance: mean square of every input, `[in]`; only their ratios count.

    Raises:
        LayerwiseError: the type is unknown, or a weight is not finite.
    """
    kind, (rows, columns) = format_of(name), weight.shape
    values = weight.float().contiguous().cpu()
    if name in FLOATS:
        return values.to(FLOATS[name]).view(torch.uint8)
    if columns % kind.weights or not values.isfinite().all():
        raise LayerwiseError(
            f"GGML type {name}",
            allowed=f"finite weights in rows of a multiple of {kind.weights}",
            found=f"rows of {columns}, {values.isfinite().float().mean():.1%} finite",
            fix="choose another type, or mend the weights",
        )
    given = weighing(importance, columns)
    result = torch.empty(rows, kind.row_bytes(columns), dtype=torch.uint8)
    pointers = values.data_ptr(), result.data_ptr()
    written = library().ggml_quantize_chunk(
        kind.number, *pointers, 0, rows, columns, given.data_ptr()
    )
    assert written == result.nbytes
    return result


def weighing(importance: Tensor | None, columns: int) -> Float[Tensor, " in"]:
    """Importances with a mean of 1 and none of them 0; all alike where nothing is known."""
    if importance is None:
        return torch.ones(columns)
    found = importance.float().cpu().contiguous()
    if not found.isfinite().all() or (found < 0).any():
        raise LayerwiseError(
            "importance of inputs",
            allowed="finite numbers, none below 0",
            found=f"{found.min():.3g} to {found.max():.3g}",
            fix="calibrate on more or other text, or compute in float32",
        )
    mean = found.mean()
    return (found / mean).clamp_min(_LEAST) if mean > 0 else torch.ones(columns)


def decode(data: UInt8[Tensor, "out bytes"], name: str, columns: int) -> Float[Tensor, "out in"]:
    """The matrix that the bytes stand for, by GGML's own decoder, in float32."""
    if name in FLOATS:
        return data.view(FLOATS[name]).float()
    symbol = name.lower()
    symbol = symbol[:-1] + "K" if symbol.endswith("_k") else symbol
    call = library()[f"dequantize_row_{symbol}"]
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    call.restype = None
    given = data.cpu().contiguous()
    result = torch.empty(len(data), columns)
    call(given.data_ptr(), result.data_ptr(), result.numel())
    return result
