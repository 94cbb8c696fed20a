"""Writing a model folder layer by layer, under the names that `save_pretrained` would use."""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig

from layerwise.core import apart
from layerwise.core.companions import copy_companions
from layerwise.core.network import Network
from layerwise.core.shards import ShardWriter
from layerwise.core.stack import Layer
from layerwise.core.weight import Weight


class Finished(NamedTuple):
    """A layer on its way out: its stored tensors by their name inside it, and what edits made of
    its matrices."""

    layer: Layer
    tensors: dict[str, Tensor]
    records: Mapping[str, Weight]


#: layer tensors by their full name in memory, and records by matrix key -> what is stored
Convert = Callable[[Layer, dict[str, Tensor], Mapping[str, Weight]], dict[str, Tensor]]


def write_folder(
    network: Network,
    path: Path,
    layers: Iterable[Finished],
    convert: Convert,
    extra: Callable[[], Mapping[str, Any]] = dict,
    config: PretrainedConfig | None = None,
    beside: Callable[[Layer, Mapping[str, Weight]], dict[str, Tensor]] = lambda *_: {},
) -> int:
    """Write weights, configuration and the files that come along; returns the tensor bytes.

    `beside` gives what else is stored of a layer, under its names on disk. `extra` gives further
    entries of the configuration, asked for when all layers are written; `config` takes the place
    of the network's own, where layers are written in another shape.
    """
    path.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(path)
    for layer, tensors, records in layers:
        own = {f"{layer.path}.{name}": t for name, t in tensors.items()}
        writer.add(on_disk(network, convert(layer, own, records)) | beside(layer, records))
    outside = network.fetch_outside()
    tied = network.model.all_tied_weights_keys
    kept = {n: t for n, t in outside.items() if tied.get(n) not in outside}
    writer.add(on_disk(network, kept))
    writer.close()
    write_config(network, path, extra(), config)
    copy_companions(network.stored.checkpoint.folder, path)
    return writer.nbytes


def on_disk(network: Network, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names in memory to names on disk, through transformers' own conversions."""
    return apart.on_disk(network.model, network.stored, tensors)


def write_config(
    network: Network, path: Path, extra: Mapping[str, Any], other: PretrainedConfig | None = None
) -> None:
    """The configuration of the network as it is built, or another, under its stored dtype."""
    config = copy.deepcopy(other or network.model.config)
    config.architectures = [type(network.model).__name__]
    config.dtype = str(network.stored.dtype).removeprefix("torch.")
    vars(config).update(extra)
    config.save_pretrained(path)


def dense_tensors(
    layer: Layer, tensors: dict[str, Tensor], records: Mapping[str, Weight]
) -> dict[str, Tensor]:
    """The layer's tensors with every record put in its place as a dense matrix."""
    made: dict[str, Tensor] = {}
    for matrix in layer.matrices:
        if matrix.key in records:
            name = f"{layer.path}.{matrix.parameter}"
            made[name] = matrix.put(records[matrix.key].dense(), tensors[name], made.get(name))
    return {**tensors, **made}
