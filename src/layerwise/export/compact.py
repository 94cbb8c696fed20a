"""Folders that hold every layer once, and beside them the order in which layers run."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from torch import nn

from layerwise.core.machine import write_whole
from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.plan import Plan, Step
from layerwise.core.stack import Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.visits import FOLDED, folded
from layerwise.export._writer import Finished, dense_tensors, write_folder


@method("export", name="compact")
def compact_(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write dense safetensors with every layer that runs once, and the order in `wiring.yaml`.

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
    orders = {name: folded(order)[1] for name, order in plan.wiring.items()}
    write_whole(path / FOLDED, yaml.safe_dump(orders, sort_keys=False, default_flow_style=None))
    return nbytes


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    return matrix.size * itemsize


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    return "an edit of weights, which would be solved for another order" if chain else None


TARGET = Target("compact", False, _refuses, _nbytes, engine="layerwise")
