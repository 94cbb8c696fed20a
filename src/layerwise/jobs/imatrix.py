"""Importance matrices out of our own second moments, and into a job in place of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.imatrix import Importance, Importances, read_imatrix
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.reader import windows
from layerwise.core.stats import observe
from layerwise.export._gguf_names import Names
from layerwise.jobs.session import Progress, load_reader, silent

MEASURE = "second_moment_diagonal"


def make_imatrix(network: Network, texts: Texts, progress: Progress = silent) -> Importances:
    """The mean square of every input of every matrix, under the names of GGUF.

    Args:
        network: the model.
        texts: what it reads.
        progress: called with what is done, how far, and out of how much.
    """
    names = Names(network)
    batches = windows(load_reader(network), texts, "calibrate")
    tell = lambda done, total: progress("measuring layers", done, total)  # noqa: E731
    found = observe(network, batches, {MEASURE: find(MEASURE, "measure").bind()()}, tell)[MEASURE]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {
        names(f"{layer.path}.{m.parameter}"): Importance(found[m.inputs], tokens)
        for layer in network.layers()
        for m in layer.matrices
        if m.inputs in found
    }


def given_by(network: Network, file: str) -> dict[str, Mapping[str, Any]]:
    """What a file says of every matrix, as statistics by the matrix's key; nothing without one.

    Raises:
        LayerwiseError: the file is no importance matrix, or not of this model.
    """
    if not file:
        return {}
    held, names = read_imatrix(Path(file)), Names(network)
    given: dict[str, Mapping[str, Any]] = {}
    for layer in network.layers():
        for m in layer.matrices:
            name = names(f"{layer.path}.{m.parameter}")
            size = len(held[name].squares) if name in held else 0
            if size != m.shape[1]:
                raise LayerwiseError(
                    f"imatrix {file}, {name}",
                    allowed=f"{m.shape[1]} values",
                    found=size or "no entry",
                    fix="make it of this very model: layerwise imatrix MODEL --out FILE",
                )
            given[m.key] = {MEASURE: held[name].squares}
    return given
