"""Packed weights in the compressed-tensors format, with bits that differ from group to group."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.method import find, method
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, chain_for
from layerwise.core.stack import Layer, Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.weight import Frame, Quantized, Weight, packed_bytes
from layerwise.export._writer import Finished, dense_tensors, write_folder

#: (bits, group, symmetric) -> the modules that are packed so
Schemes = dict[tuple[int, int, bool], list[str]]
#: `weight_shape`, two int64
_SHAPE_BYTES = 16


@method("export", name="compressed-tensors")
def compressed_tensors(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write `pack-quantized` weights: dense int32 words, a scale and zero per group of columns.

    Every distinct (bits, group, symmetric) becomes one config group that names its modules.

    Args:
        stack: the layers.
        plan: what was applied.
        path: the folder to write.
        network: given; the network whose weights are written.
        layers: given; every layer once, with what the edits made of its matrices.

    Returns:
        Bytes of all tensors.
    """
    schemes: Schemes = {}

    def convert(layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]) -> Any:
        for matrix, record in _packed(layer, records):
            scheme = (record.bits, record.group, record.zero is None)
            schemes.setdefault(scheme, []).append(_module(layer, matrix))
        return _convert(layer, tensors, records)

    def extra() -> dict[str, Any]:
        return {"quantization_config": _config(schemes, network.module)} if schemes else {}

    return write_folder(network, path, layers, convert, extra)


def _packed(layer: Layer, records: Mapping[str, Weight]) -> list[tuple[Matrix, Quantized]]:
    found = ((m, records.get(m.key)) for m in layer.matrices)
    return [(m, r) for m, r in found if isinstance(r, Quantized)]


def _module(layer: Layer, matrix: Matrix) -> str:
    return f"{layer.path}.{matrix.parameter.removesuffix('.weight')}"


def _convert(
    layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]
) -> dict[str, Tensor]:
    packed = _packed(layer, records)
    kept = {k: r for k, r in records.items() if not isinstance(r, Quantized)}
    result = dense_tensors(layer, tensors, kept)
    for matrix, record in packed:
        module = _module(layer, matrix)
        del result[f"{module}.weight"]
        result |= {f"{module}.{name}": t for name, t in pack(record).items()}
    return result


def pack(record: Quantized) -> dict[str, Tensor]:
    """The tensors that the format stores for one matrix."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {
        "weight_packed": pack_to_int32(record.codes.to(torch.int8), record.bits),
        "weight_scale": record.scale,
        "weight_shape": torch.tensor(record.codes.shape, dtype=torch.int64),
    }
    if record.zero is not None:
        zero = record.zero.to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zero, record.bits, packed_dim=0).contiguous()
    return tensors


def unpack(folder: Checkpoint, layer: Layer, edits: Sequence[Edit]) -> dict[str, Weight]:
    """The records of a layer that lie packed in a folder, by the edits that packed them."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    records: dict[str, Weight] = {}
    for matrix in layer.matrices:
        grid, module = _grid(chain_for(edits, matrix)), _module(layer, matrix)
        names = [f"{module}.weight_packed", f"{module}.weight_scale"]
        if grid is not None and names[0] in folder.tensors:
            packed, scale = folder.read(names).values()
            codes = unpack_from_int32(packed, grid[0], torch.Size(matrix.shape))
            records[matrix.key] = Quantized(codes, scale, None, grid[0], grid[1])
    return records


def _config(schemes: Schemes, network: nn.Module) -> dict[str, Any]:
    packed = {name for names in schemes.values() for name in names}
    linears = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    groups = {}
    for number, ((bits, group, symmetric), names) in enumerate(sorted(schemes.items())):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if group else "channel",
            "group_size": group or None,
            "dynamic": False,
        }
        groups[f"group_{number}"] = {"targets": names, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in packed],
    }


def _grid(chain: Sequence[Step]) -> tuple[int, int, bool] | None:
    """Bits, group and symmetry that the last step of a chain leaves the matrix in.

    None where it leaves no integers, or integers inside a frame: those are stored dense.
    """
    kinds = [get_type_hints(find(s.method, "weight").function)["return"] for s in chain]
    if not chain or kinds[-1] is not Quantized or any(kind in get_args(Frame) for kind in kinds):
        return None
    chosen = find(chain[-1].method, "weight").values(chain[-1].options)
    return chosen["bits"], chosen["group"], chosen["symmetric"]


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    grid = _grid(chain)
    if grid is None:
        return matrix.size * itemsize
    bits, group, symmetric = grid
    scale = torch.float32 if itemsize == 4 else torch.bfloat16
    return packed_bytes(matrix.shape, bits, group, not symmetric, scale) + _SHAPE_BYTES


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    grid = _grid(chain)
    if grid is None:
        return "the format holds plain integers, which this chain does not leave" if chain else None
    if matrix.expert is not None or not isinstance(module, nn.Linear):
        return f"{type(module).__name__} modules cannot be packed, only nn.Linear"
    if not grid[2]:
        # compressed-tensors 0.20 makes room for unpacked zero points and then finds packed ones.
        return "stock transformers cannot load packed zero points; use symmetric grids"
    if grid[1] and matrix.shape[1] % grid[1]:
        return f"{matrix.shape[1]} columns are no multiple of the group of {grid[1]}"
    return None


TARGET = Target("compressed-tensors", True, _refuses, _nbytes, bare=True)

#: A price list, not a format: packed bytes of any matrix, whatever module holds it.
PACKED = Target("packed", True, lambda matrix, module, chain: None, _nbytes)
