"""What a GGUF file says of a network that embeds: how the states of its tokens become one."""

from pathlib import Path
from typing import Any

from layerwise.core.errors import notice
from layerwise.core.index import read_json
from layerwise.core.network import Network
from layerwise.export._gguf_models import sees_all

#: how sentence-transformers makes one vector of many -> the number it has in llama.cpp
_POOLINGS = {"mean_tokens": 1, "mean": 1, "cls_token": 2, "cls": 2, "lasttoken": 3}
#: fields of a configuration that GGUF knows under the same name
_CHOICES = ("hidden_activation",)
_PREFIX = "pooling_mode_"
#: what sentence-transformers puts behind a network, and llama.cpp as well
_PARTS = ("Pooling", "Normalize")


def embedding_facts(network: Network) -> dict[str, Any]:
    """Keys of GGUF, without the architecture's prefix, and their values."""
    folder = network.checkpoint.folder
    for path in sorted(folder.glob("[0-9]*_*/config.json")):
        kind = path.parent.name.partition("_")[2]
        if kind not in _PARTS:
            notice(f"{folder}: the file goes without {kind}, which comes behind the pooling")
    found: dict[str, Any] = _pooling(folder)
    if network.task == "embed" and sees_all(network):
        said = vars(network.model.config)
        found |= {key: said[key] for key in _CHOICES if said.get(key)}
        found["attention.causal"] = False
    return found


def _pooling(folder: Path) -> dict[str, int]:
    """How states become one, where a model of sentence-transformers says it."""
    for path in sorted(folder.glob("*_Pooling/config.json")):
        said = read_json(path)
        modes = [k.removeprefix(_PREFIX) for k, on in said.items() if k.startswith(_PREFIX) and on]
        modes = modes or [said.get(_PREFIX[:-1])]
        if len(modes) == 1 and modes[0] in _POOLINGS:
            return {"pooling_type": _POOLINGS[modes[0]]}
        notice(f"{path}: llama.cpp has no such pooling; choose one of its own with --pooling")
    return {}
