"""Importance matrices: the mean square of every input of a matrix, in llama.cpp's two formats."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.ggml import needing_gguf


class Importance(NamedTuple):
    """Mean squares of the inputs of a matrix, and over how many tokens: `diag(H)`."""

    squares: Float[Tensor, " in"]
    tokens: int


#: by the name of the tensor in GGUF
Importances = Mapping[str, Importance]


def write_imatrix(path: Path, found: Importances, source: str = "") -> None:
    """Write importances for `llama-quantize --imatrix`.

    Args:
        path: `.dat` for the older binary format, anything else for GGUF.
        found: by the name of the tensor in GGUF.
        source: what they were measured on.
    """
    if path.suffix == ".dat":
        path.write_bytes(_legacy(found, source))
        return
    with needing_gguf():
        from gguf import GGUFWriter
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", max((i.tokens for i in found.values()), default=1))
    for name, (squares, tokens) in sorted(found.items()):
        sums = squares.float().cpu().numpy()[None] * numpy.float32(tokens)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", numpy.array([[tokens]], numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _legacy(found: Importances, source: str) -> bytes:
    """Per entry: name, calls, sums over calls; then the last chunk and the data's name."""
    pieces = [struct.pack("<i", len(found))]
    for name, (squares, _) in sorted(found.items()):
        known = name.encode()
        pieces += [struct.pack("<i", len(known)), known, struct.pack("<ii", 1, len(squares))]
        pieces.append(squares.float().cpu().numpy().astype("<f4").tobytes())
    known = source.encode()
    return b"".join([*pieces, struct.pack("<ii", 1, len(known)), known])


def read_imatrix(path: Path) -> dict[str, Importance]:
    """Read what `llama-imatrix` or `write_imatrix` wrote, in either format.

    Raises:
        LayerwiseError: the file is none, is broken, or holds numbers that are no mean squares.
    """
    with refusing(
        f"imatrix {path}",
        allowed="a whole file that llama-imatrix wrote",
        fix="check the path, or make it again",
    ):
        raw = path.read_bytes()
        found = _read_gguf(path) if raw[:4] == b"GGUF" else _read_legacy(raw)
    for name, (squares, _) in found.items():
        if not squares.isfinite().all() or (squares < 0).any():
            raise LayerwiseError(
                f"imatrix {path}, {name}",
                allowed="finite numbers, none below 0",
                found=f"{squares.min():.3g} to {squares.max():.3g}",
                fix="make it again on other text",
            )
    return found


def _read_gguf(path: Path) -> dict[str, Importance]:
    from gguf import GGUFReader

    tensors = {t.name: torch.from_numpy(numpy.array(t.data)) for t in GGUFReader(path).tensors}
    found = {}
    for name in (n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")):
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].reshape(-1, 1)
        whole = (sums.reshape(len(counts), -1).sum(0), counts.sum())  # all experts together
        found[name] = Importance(whole[0] / whole[1].clamp_min(1), int(whole[1]))
    return found


def _read_legacy(raw: bytes) -> dict[str, Importance]:
    place, found = 4, {}
    for _ in range(struct.unpack_from("<i", raw)[0]):
        (length,) = struct.unpack_from("<i", raw, place)
        name = raw[place + 4 : place + 4 + length].decode()
        calls, count = struct.unpack_from("<ii", raw, place + 4 + length)
        place += 12 + length
        if count < 0 or place + 4 * count > len(raw):
            raise ValueError(f"{count} values for {name!r} in a file of {len(raw)} bytes")
        values = numpy.frombuffer(raw, "<f4", count, place).copy()
        found[name] = Importance(torch.from_numpy(values) / max(calls, 1), calls)
        place += 4 * count
    return found
