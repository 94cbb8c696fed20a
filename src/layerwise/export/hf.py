"""Dense checkpoints that stock transformers loads."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.plan import Plan, Step
from layerwise.core.stack import Matrix, Stack
from layerwise.core.target import Target
from layerwise.export._writer import Finished, dense_tensors, write_folder


@method("export")
def hf(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write dense safetensors under stock names; a depth edit is an ordinary configuration.

    Args:
        stack: the layers.
        plan: what was applied.
        path: the folder to write.
        network: given; the network whose weights are written.
        layers: given; every layer once, with what the edits made of its matrices.

    Returns:
        Bytes of all tensors.
    """
    return write_folder(network, path, layers, dense_tensors)


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    return matrix.size * itemsize


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    return None


TARGET = Target("hf", False, _refuses, _nbytes, method="")
