"""Inspect: every layer, measured in one pass over the data."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from layerwise.core.data import Texts
from layerwise.core.method import find
from layerwise.core.network import Network, open_network
from layerwise.core.reader import windows
from layerwise.core.stats import Stats, observe
from layerwise.jobs.depth import layer_bytes
from layerwise.jobs.session import Progress, load_reader, silent

MEASURES = ("residual_cosine", "update_norm")


class Inspected(NamedTuple):
    """A row per layer, and the statistics behind them."""

    rows: list[dict[str, Any]]
    stats: Stats
    network: Network


def inspect_model(
    model: str | Path,
    texts: Texts = Texts(),
    *,
    measures: tuple[str, ...] = MEASURES,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Inspected:
    """Measure every layer in one pass.

    Args:
        model: a folder, hub id or `demo`.
        texts: the calibrate part of it is read.
        measures: names of registered measures of layers.
        device: where to compute.
        dtype: in which type to compute.
        progress: called with what is done, how far, and out of how much.

    Returns:
        One row per layer with its parts, bytes and every measure that is a number.
    """
    network = open_network(model, device=device, dtype=dtype)
    batches = windows(load_reader(network), texts, "calibrate")
    probes = {find(name, "measure").name: find(name, "measure").bind()() for name in measures}
    stats = observe(network, batches, probes, partial(progress, "measuring layers"))
    sizes = layer_bytes(network)
    rows = []
    for layer in network.layers():
        row: dict[str, Any] = {
            "layer": layer.key,
            "parts": [part.name for part in layer.parts],
            "matrices": len(layer.matrices),
            "bytes": sizes[layer.key],
        }
        for name, value in stats.at(layer.key).items():
            if isinstance(value, float):
                row[name] = value
        if "residual_cosine" in row:
            row["block_influence"] = 1 - row["residual_cosine"]
        rows.append(row)
    return Inspected(rows, stats, network)
