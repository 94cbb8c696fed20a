"""Packed weights in the compressed-tensors format, with bits that differ from group to group."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os.path import commonpath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.apart import Piece, merges, pieces
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import refusing
from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, chains_of, read_plan
from layerwise.core.stack import Layer, Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.weight import Codebook, Quantized, Weight
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
#: the scheme of experts that are not packed, and a target that matches nothing
EIGHT, NO_EXPERTS = Scheme(FORMATS["fp8"], 8, 0), "re:^no experts$"


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
    experts = _experts(network)

    def convert(layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]) -> Any:
        for matrix, scheme in _schemes(layer, records):
            names = schemes.setdefault(scheme, [])
            names += [n for n in experts if n not in names] if matrix.apart else []
            names += [] if matrix.apart else [_module(layer, matrix)]
        return _convert(layer, tensors, records)

    def extra() -> dict[str, Any]:
        return {"quantization_config": _config(schemes, network, experts)} if schemes else {}

    beside = partial(_pack_apart, network)
    return write_folder(network, path, layers, convert, extra, beside=beside)


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
        if matrix.apart:
            result.pop(f"{layer.path}.{matrix.parameter}", None)
            continue
        del result[f"{module}.weight"]
        result |= {f"{module}.{name}": t for name, t in pack(record).items()}
    return result


def _pack_apart(network: Network, layer: Layer, records: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The experts that are packed under names of their own, by their names on disk."""
    result: dict[str, Tensor] = {}
    packed = [matrix for matrix, _ in _schemes(layer, records) if matrix.apart]
    for matrix, held in _pieces(network, layer, packed):
        for module, rows in held:
            part = _rows(records[matrix.key], rows)
            result |= {f"{module}.{name}": t for name, t in pack(part).items()}
    return result


def _pieces(
    network: Network, layer: Layer, matrices: Sequence[Matrix]
) -> list[tuple[Matrix, list[Piece]]]:
    """The modules on disk of experts that are stored one by one, and the rows that these hold."""
    parameters = {m.parameter for m in matrices}
    found = {p: pieces(network.stored, layer, p) for p in parameters}
    return [(m, found[m.parameter][m.expert]) for m in matrices if m.expert is not None]


def _rows(record: Weight, rows: Tensor) -> Quantized | Codebook:
    """Some rows of a record that has a scheme."""
    assert isinstance(record, Quantized | Codebook)
    return replace(record, codes=record.codes[rows], scale=record.scale[rows])


def packed_records(
    folder: Checkpoint, network: Network, layer: Layer, edits: Sequence[Edit]
) -> dict[str, Weight]:
    """The records of a layer that lie packed in a folder, by the edits that packed them."""
    records: dict[str, Weight] = {}
    chain_of = chains_of(edits)
    schemes = {m.key: scheme_after(chain_of(m)) for m in layer.matrices}
    for matrix in (m for m in layer.matrices if not m.apart):
        scheme, module = schemes[matrix.key], _module(layer, matrix)
        if scheme is not None and f"{module}.weight_scale" in folder.tensors:
            records[matrix.key] = unpack(scheme, matrix.shape, partial(_read, folder, module))
    apart = [m for m in layer.matrices if m.apart and schemes[m.key] is not None]
    for matrix, held in _pieces(network, layer, apart):
        scheme = schemes[matrix.key]
        if scheme is not None and f"{held[0].module}.weight_scale" in folder.tensors:
            records[matrix.key] = _unpack_apart(folder, scheme, matrix, held)
    return records


def _unpack_apart(
    folder: Checkpoint, scheme: Scheme, matrix: Matrix, held: Sequence[Piece]
) -> Weight:
    parts: list[Any] = []
    for module, rows in held:
        shape = (len(rows), matrix.shape[1])
        parts.append(unpack(scheme, shape, partial(_read, folder, module)))
    order = torch.cat([rows for _, rows in held]).argsort()
    codes, scale = (torch.cat([getattr(p, n) for p in parts]) for n in ("codes", "scale"))
    return _rows(replace(parts[0], codes=codes, scale=scale), order)


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
        records = packed_records(held, network, layer, plan.edits)
        for matrix in layer.matrices:
            record = records.get(matrix.key)
            if isinstance(record, Quantized) and not matrix.apart:
                found[_module(layer, matrix)] = record
    return found


def _read(folder: Checkpoint, module: str, name: str) -> Tensor:
    return folder.read([f"{module}.{name}"])[f"{module}.{name}"]


def _experts(network: Network) -> list[str]:
    """Targets that match the modules on disk of experts that are stored one by one."""
    found: dict[str, None] = {}
    for layer in network.layers():
        apart = [matrix for matrix in layer.matrices if matrix.apart]
        modules = [piece.module for _, held in _pieces(network, layer, apart) for piece in held]
        if modules:
            head = commonpath(name.replace(".", "/") for name in modules).replace("/", ".")
            inside = re.split("[0-9]+", head)[-1]  # of whichever layer
            found[f"re:.*{re.escape(inside)}[.][0-9]+[.].+"] = None
    return [*found]


def _config(schemes: Schemes, network: Network, experts: Sequence[str]) -> dict[str, Any]:
    packed = {name for names in schemes.values() for name in names}
    linears = [name for name, m in network.module.named_modules() if isinstance(m, nn.Linear)]
    if merges(network.stored) and packed.isdisjoint(experts):
        # Stock transformers takes all that it merges to be packed like the group that names
        # experts; only where these are 8-bit floats, it lets dense weights pass.
        schemes = {**schemes, EIGHT: [*schemes.get(EIGHT, []), NO_EXPERTS]}
    format_, groups = config_groups(schemes)
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in [*linears, *experts] if name not in packed],
    }


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    scheme = scheme_after(chain)
    if scheme is None:
        return matrix.size * itemsize
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    return scheme.nbytes(matrix.shape, dtype, max(1, matrix.apart))


def _alike(matrix: Matrix, chain: Sequence[Step]) -> Hashable:
    """The grid of experts that are stored one by one, for which the readers know only one."""
    return (scheme_after(chain),) if matrix.apart else None


def _rounds(matrix: Matrix, record: Weight) -> bool:
    """Stock transformers multiplies the integers of such experts with scales as they are stored."""
    return matrix.apart > 0 and isinstance(record, Quantized)


def _limits(network: Network, matrix: Matrix, chain: Sequence[Step]) -> str | None:
    if not matrix.apart or not chain:
        return None
    patterns = [p for c in merges(network.stored) for p in c.source_patterns]
    for pattern in patterns:
        if "*" not in pattern or "experts" not in pattern.partition("*")[0]:
            return f"stock transformers would take {pattern} to be packed with the experts"
    return None


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    scheme = scheme_after(chain)
    if scheme is None:
        found = "the format holds integers and small floats, which this chain does not leave"
        return found if chain else None
    if not matrix.apart and (matrix.expert is not None or not isinstance(module, nn.Linear)):
        return f"{type(module).__name__} modules cannot be packed, only nn.Linear"
    if not scheme.symmetric:
        # compressed-tensors 0.20 makes room for unpacked zero points and then finds packed ones.
        return "stock transformers cannot load packed zero points; use symmetric grids"
    if matrix.apart and scheme.format not in (INTEGERS, FORMATS["fp8"]):
        return f"stock transformers unpacks no {scheme.format} experts that are stored one by one"
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


TARGET = Target(
    "compressed-tensors",
    True,
    _refuses,
    _nbytes,
    bare=True,
    alike=_alike,
    limits=_limits,
    rounds=_rounds,
    accepts=_accepts,
)

#: A price list, not a format: packed bytes of any matrix, whatever module holds it.
PACKED = Target("packed", True, lambda matrix, module, chain: None, _nbytes)
