"""Folders that hold every layer once, and beside them the order in which layers run."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from layerwise.core.adapters import save_adapters
from layerwise.core.machine import write_whole
from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.plan import Plan, Step
from layerwise.core.stack import Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.visits import FOLDED, folded, with_adapters
from layerwise.export._writer import Finished, dense_tensors, write_folder


@method("export", name="compact")
def compact_(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write dense safetensors with every layer that runs once, and the order in `wiring.yaml`.

    What single visits have of their own lies beside, in `layerwise.adapters`.
    `layerwise.open` and `layerwise run` execute the order; a stock engine would run every layer
    once. Orders that stock engines can hold are written out by the target `hf`.

    Args:
        stack: the layers.
        plan: what was applied.
        path: the folder to write.
        network: given; the network whose weights are written, without its order.
        layers: given; every layer once.

    Returns:
        Bytes of all tensors.
    """
    nbytes = write_folder(network, path, layers, dense_tensors)
    write_orders(path, {name: folded(order)[1] for name, order in plan.wiring.items()})
    if not any(map(with_adapters, plan.wiring.values())):
        return nbytes
    ordered = open_network(network.checkpoint.folder, wiring=plan.wiring)
    own = ordered.adapters
    named = {layer.key: own[layer.path] for layer in ordered.layers() if layer.path in own}
    return nbytes + save_adapters(path, named)


def write_orders(path: Path, orders: Mapping[str, list[Any]]) -> None:
    """Write in which order the layers of a folder run, by stack."""
    text = yaml.safe_dump(dict(orders), sort_keys=False, default_flow_style=None)
    write_whole(path / FOLDED, text)


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    return matrix.size * itemsize


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    return "an edit of weights, which would be solved for another order" if chain else None


TARGET = Target("compact", False, _refuses, _nbytes, engine="layerwise")
