"""Reading a GGUF file back: the records of its matrices, under the names of a network."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.ggml import FLOATS, decode, needing_gguf
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.weight import Dense, Packed, Weight
from layerwise.export._gguf_names import Names
from layerwise.export._gguf_outside import EMBEDDINGS, outside_shapes
from layerwise.export._gguf_rows import reordered, together
from layerwise.export.gguf import FILE

__all__ = ["FILE", "GgufFile"]


class GgufFile:
    """A GGUF file: its tensors, mapped, not read.

    Raises:
        LayerwiseError: it is none, or it is broken.
    """

    def __init__(self, path: Path) -> None:
        with needing_gguf():
            from gguf import GGUFReader
        self.path = path
        with refusing(str(path), allowed="a whole GGUF file", fix="take another copy of it"):
            self._reader = GGUFReader(path)

    @cached_property
    def tensors(self) -> Mapping[str, Any]:
        """Tensors by their name, as the `gguf` package gives them."""
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(tensor.n_bytes) for tensor in self.tensors.values())

    def rows(self, name: str, network: Network) -> Packed:
        """A tensor as it lies in the file, its rows in the order of transformers.

        Raises:
            LayerwiseError: the file has no tensor of that name.
        """
        if name not in self.tensors:
            raise LayerwiseError(
                str(self.path),
                allowed=f"a tensor {name}, which this network has",
                found="none",
                fix="take the file that was made of this network",
            )
        tensor = self.tensors[name]
        raw = torch.from_numpy(numpy.array(tensor.data)).view(torch.uint8)
        rows = reordered(raw.reshape(-1, raw.shape[-1]), name, network, back=True)
        return Packed(rows, tensor.tensor_type.name, int(tensor.shape[0]))

    def records(self, network: Network, layer: Layer) -> dict[str, Weight]:
        """What the file holds of the matrices of a layer."""
        names, found = Names(network), {}
        for name in dict.fromkeys(m.parameter for m in layer.matrices):
            own = [m for m in layer.matrices if m.parameter == name]
            parts = names.pieces(f"{layer.path}.{name}")
            pieces = [self.rows(part, network) for part in parts]
            blocks = [piece.data.unflatten(0, (len(own), -1)) for piece in pieces]
            for matrix, data in zip(own, together(blocks, parts, names, 1), strict=True):
                found[matrix.key] = _record(replace(pieces[0], data=data))
        return found

    def unpack(self, path: Path) -> None:
        """Write the same file with every weight in float32: what llama.cpp then runs is exact.

        Multiplying with packed weights, llama.cpp rounds what they are multiplied with to 8 bits;
        with half-precision weights, to half precision.
        """
        from gguf import GGMLQuantizationType, GGUFWriter

        fields = self._reader.fields
        writer = GGUFWriter(path, fields["general.architecture"].contents())
        for name, field in fields.items():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kinds = field.types
                writer.add_key_value(name, field.contents(), kinds[0], (*kinds, None)[1])
        for name, tensor in self.tensors.items():
            size = [int(n) for n in reversed(tensor.shape)]
            full = GGMLQuantizationType.F32
            writer.add_tensor_info(name, size, None, 4 * int(tensor.n_elements), full)  # type: ignore[arg-type]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self.tensors.values():
            raw = torch.from_numpy(numpy.array(tensor.data)).view(torch.uint8)
            rows = raw.reshape(-1, raw.shape[-1])
            wide = decode(rows, tensor.tensor_type.name, int(tensor.shape[0]))
            writer.write_tensor_data(wide.numpy())
        writer.close()

    def outside(self, network: Network) -> dict[str, Weight]:
        """What the file holds of the embedding and the head, by their name in memory."""
        names, found = Names(network), {}
        for name, shape in outside_shapes(network).items():
            own = names(name)
            if own in self.tensors and own in (*EMBEDDINGS, "output.weight"):
                rows = self.rows(own, network)
                found[name] = _record(replace(rows, data=rows.data[: shape[0]]))
        return found


def _record(rows: Packed) -> Weight:
    """Plain numbers are dense."""
    return Dense(rows.data.view(FLOATS[rows.type])) if rows.type in FLOATS else rows
