"""Packed weights in the compressed-tensors format, with bits that differ from group to group."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import refusing
from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, chain_for, read_plan
from layerwise.core.stack import Layer, Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.weight import Quantized, Weight
from layerwise.export._packed import (
    FORMATS,
    INTEGERS,
    Scheme,
    config_groups,
    pack,
    scheme_after,
    scheme_of,
    unpack,
)
from layerwise.export._writer import Finished, dense_tensors, write_folder

#: what the modules have in common -> those that are packed so
Schemes = dict[Scheme, list[str]]


@method("export", name="compressed-tensors")
def compressed_tensors(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write packed weights: integers of 2 to 8 bits in words of 32, 8-bit or microscaled floats.

    Every distinct grid becomes one config group that names its modules.

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
        for matrix, scheme in _schemes(layer, records):
            schemes.setdefault(scheme, []).append(_module(layer, matrix))
        return _convert(layer, tensors, records)

    def extra() -> dict[str, Any]:
        return {"quantization_config": _config(schemes, network.module)} if schemes else {}

    return write_folder(network, path, layers, convert, extra)


def _schemes(layer: Layer, records: Mapping[str, Weight]) -> list[tuple[Matrix, Scheme]]:
    """The matrices of a layer that are packed, and how."""
    found = ((m, scheme_of(records.get(m.key))) for m in layer.matrices)
    return [(matrix, scheme) for matrix, scheme in found if scheme is not None]


def _module(layer: Layer, matrix: Matrix) -> str:
    return f"{layer.path}.{matrix.parameter.removesuffix('.weight')}"


def _convert(
    layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]
) -> dict[str, Tensor]:
    packed = [matrix for matrix, _ in _schemes(layer, records)]
    keys = {matrix.key for matrix in packed}
    result = dense_tensors(layer, tensors, {k: r for k, r in records.items() if k not in keys})
    for matrix in packed:
        module, record = _module(layer, matrix), records[matrix.key]
        del result[f"{module}.weight"]
        result |= {f"{module}.{name}": t for name, t in pack(record).items()}
    return result


def packed_records(folder: Checkpoint, layer: Layer, edits: Sequence[Edit]) -> dict[str, Weight]:
    """The records of a layer that lie packed in a folder, by the edits that packed them."""
    records: dict[str, Weight] = {}
    for matrix in layer.matrices:
        scheme, module = scheme_after(chain_for(edits, matrix)), _module(layer, matrix)
        if scheme is not None and f"{module}.weight_scale" in folder.tensors:
            read = partial(_read, folder, module)
            records[matrix.key] = unpack(scheme, matrix.shape, read)
    return records


def packed_linears(folder: Path, network: Network) -> dict[str, Quantized]:
    """The integers that a folder holds packed, by the path of their linear module.

    None where the folder holds no packed weights, leaves layers out, or was made by others.
    """
    if not (folder / "plan.yaml").exists() or not (folder / "config.json").exists():
        return {}
    plan, held = read_plan(folder / "plan.yaml"), Checkpoint(folder)
    if plan.target != "compressed-tensors" or plan.wiring:
        return {}
    found: dict[str, Quantized] = {}
    for layer in network.layers():
        records = packed_records(held, layer, plan.edits)
        for matrix in layer.matrices:
            record = records.get(matrix.key)
            if isinstance(record, Quantized):
                found[_module(layer, matrix)] = record
    return found


def _read(folder: Checkpoint, module: str, name: str) -> Tensor:
    return folder.read([f"{module}.{name}"])[f"{module}.{name}"]


def _config(schemes: Schemes, network: nn.Module) -> dict[str, Any]:
    packed = {name for names in schemes.values() for name in names}
    linears = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    format_, groups = config_groups(schemes)
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in packed],
    }


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    scheme = scheme_after(chain)
    if scheme is None:
        return matrix.size * itemsize
    return scheme.nbytes(matrix.shape, torch.float32 if itemsize == 4 else torch.bfloat16)


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    scheme = scheme_after(chain)
    if scheme is None:
        found = "the format holds integers and small floats, which this chain does not leave"
        return found if chain else None
    if matrix.expert is not None or not isinstance(module, nn.Linear):
        return f"{type(module).__name__} modules cannot be packed, only nn.Linear"
    if not scheme.symmetric:
        # compressed-tensors 0.20 makes room for unpacked zero points and then finds packed ones.
        return "stock transformers cannot load packed zero points; use symmetric grids"
    if scheme.format not in (INTEGERS, FORMATS["fp8"]) and module.weight.dtype != torch.bfloat16:
        return f"stock transformers unpacks {scheme.format} in bfloat16, not {module.weight.dtype}"
    if scheme.group and matrix.shape[1] % scheme.group:
        return f"{matrix.shape[1]} columns are no multiple of the group of {scheme.group}"
    return None


def _accepts(network: Network) -> None:
    """Refuse where nothing could be packed, before anything is computed."""
    with refusing(
        "target compressed-tensors",
        allowed="the package compressed-tensors being installed",
        fix='pip install "layerwise[compressed-tensors]"',
    ):
        import compressed_tensors.compressors  # noqa: F401


TARGET = Target("compressed-tensors", True, _refuses, _nbytes, bare=True, accepts=_accepts)

#: A price list, not a format: packed bytes of any matrix, whatever module holds it.
PACKED = Target("packed", True, lambda matrix, module, chain: None, _nbytes)
