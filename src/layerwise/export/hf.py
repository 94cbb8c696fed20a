"""Dense checkpoints that stock transformers loads."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from layerwise.core.find_widths import widths_named
from layerwise.core.method import method
from layerwise.core.network import Network
from layerwise.core.plan import Plan, Step
from layerwise.core.stack import Layer, Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.weight import Weight
from layerwise.core.width import narrowed_config
from layerwise.export._writer import Finished, dense_tensors, write_folder


@method("export")
def hf(
    stack: Stack, plan: Plan, path: Path, *, network: Network, layers: Iterable[Finished]
) -> int:
    """Write dense safetensors under stock names; fewer layers are an ordinary configuration.

    So is a smaller width: channels or heads that the edits of a plan left without weights are
    taken out of all matrices that hold them.

    Args:
        stack: the layers.
        plan: what was applied.
        path: the folder to write.
        network: given; the network whose weights are written.
        layers: given; every layer once, with what the edits made of its matrices.

    Returns:
        Bytes of all tensors.
    """
    if not plan.widths:
        return write_folder(network, path, layers, dense_tensors)
    widths = widths_named(network, plan.widths)
    config = narrowed_config(network.model.config, plan.widths)

    def convert(
        layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]
    ) -> dict[str, Tensor]:
        made, start = dense_tensors(layer, tensors, records), f"{layer.path}."
        inside = {n.removeprefix(start): tensor for n, tensor in made.items()}
        for width, units in widths:
            inside = width.narrowed(inside, units, network.original_key(layer))
        return {start + name: tensor for name, tensor in inside.items()}

    return write_folder(network, path, layers, convert, config=config)


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    return matrix.size * itemsize


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    return None


TARGET = Target("hf", False, _refuses, _nbytes, method="")
