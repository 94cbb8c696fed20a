"""Folders for layerwise alone: records of weights as they are, or every layer once and an order."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from layerwise.core.absent import unstored
from layerwise.core.adapters import save_adapters
from layerwise.core.chain import outcome
from layerwise.core.compact import RECORDS, STORED, to_stored
from layerwise.core.errors import LayerwiseError
from layerwise.core.machine import write_whole
from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.plan import Plan, Step
from layerwise.core.stack import Layer, Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.visits import FOLDED, folded, with_adapters
from layerwise.core.weight import Dense, Product, Weight
from layerwise.export._writer import Finished, on_disk, write_folder


@method("export", name="compact")
def compact_(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write every layer that runs once, edited matrices as the records that edits left of them.

    Sparse matrices are their values and a bit mask, those of low rank two factors, integers their
    codes in as many bits as they have; `records.json` says which. Of matrices in parts that never
    run, nothing is stored. The order is in `wiring.yaml`, and what single visits have of their own
    lies in `layerwise.adapters`. `layerwise.open` and `layerwise run` make the weights dense and
    execute the order; no stock engine does. Orders that stock engines can hold are written out by
    the target `hf`.

    Args:
        stack: the layers.
        plan: what was applied.
        path: the folder to write.
        network: given; the network whose weights are written, without its order.
        layers: given; every layer once, with what the edits made of its matrices.

    Returns:
        Bytes of all tensors.

    Raises:
        LayerwiseError: an edited matrix is stored in other pieces than it is computed in.
    """
    held: dict[str, Any] = {}

    def convert(layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]) -> Any:
        result = dict(tensors)
        gone = unstored(layer, network.visits.get(layer.path))
        made = {**records, **{m.key: _nothing(m) for m in gone}}
        for matrix in layer.matrices:
            if matrix.key in made:
                name = f"{layer.path}.{matrix.parameter}"
                whole = result.pop(name)
                entry, own = _stored(network, matrix, whole, made[matrix.key])
                held[_on_disk(network, name, matrix)] = entry
                result |= {f"{name}:{field}": tensor for field, tensor in own.items()}
        return result

    nbytes = write_folder(network, path, layers, convert)
    if held:
        write_whole(path / RECORDS, json.dumps(held, indent=1))
    write_orders(path, {name: folded(order)[1] for name, order in plan.wiring.items()})
    if not any(map(with_adapters, plan.wiring.values())):
        return nbytes
    ordered = open_network(network.checkpoint.folder, wiring=plan.wiring)
    own = ordered.adapters
    named = {layer.key: own[layer.path] for layer in ordered.layers() if layer.path in own}
    return nbytes + save_adapters(path, named)


def _nothing(matrix: Matrix) -> Weight:
    """What is kept of a matrix that does not run: its shape."""
    return Product(
        *(Dense(torch.zeros(size)) for size in ((matrix.shape[0], 0), (0, matrix.shape[1])))
    )


def write_orders(path: Path, orders: Mapping[str, list[Any]]) -> None:
    """Write in which order the layers of a folder run, by stack."""
    text = yaml.safe_dump(dict(orders), sort_keys=False, default_flow_style=None)
    write_whole(path / FOLDED, text)


def _stored(
    network: Network, matrix: Matrix, whole: Tensor, record: Weight
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tree, tensors = to_stored(record)
    dtype = str(network.stored.dtype).removeprefix("torch.")
    place = {"shape": list(whole.shape), "transposed": matrix.transposed, "dtype": dtype}
    return {**place, "record": tree}, tensors


def _on_disk(network: Network, name: str, matrix: Matrix) -> str:
    """The name on disk of what a matrix leaves under its name in memory."""
    (found,) = on_disk(network, {f"{name}:x": torch.zeros(1)})
    if not found.endswith(":x"):
        raise LayerwiseError(
            f"compact, {matrix.key}",
            allowed="matrices that are stored under a name of their own",
            found=found,
            fix="keep it as it is, or use target hf",
        )
    return found.removesuffix(":x")


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    if not chain:
        return matrix.size * itemsize
    return outcome(chain, matrix.shape, torch.float32 if itemsize == 4 else torch.bfloat16).nbytes


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    if not chain:
        return None
    if matrix.expert is not None:
        return "one of several experts in a parameter, which are stored in other pieces"
    left = outcome(chain, (8, 256), torch.float32).kinds - STORED
    return f"a record of {', '.join(sorted(left))}, which it does not hold" if left else None


TARGET = Target(
    "compact",
    True,
    _refuses,
    _nbytes,
    method="",
    rounds=lambda *_: True,
    engine="layerwise",
)
