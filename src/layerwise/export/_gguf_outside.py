"""What a GGUF file holds beside the layers: embeddings, final norm, head, rotary factors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.core.ggml import encode, fitting
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.weight import Packed, Weight
from layerwise.export._gguf_facts import rope_factors
from layerwise.export._gguf_models import known, text_config
from layerwise.export._gguf_names import Names
from layerwise.export._gguf_rows import plain

#: tables of tokens, one for the network and one for all of its layers
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def outside_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Tensors that belong to no layer, each once, by their name in memory.

    Those of what sees or hears, beside the model of text, are no part of the file.
    """
    inside = tuple(f"{layer.path}." for layer in network.layers())
    whole = network.model.config is text_config(network)
    text = "" if whole else network.stack.container.rpartition(".")[0]
    tied = network.model.all_tied_weights_keys or {}
    held, without = network.module.state_dict(), known(network).without
    stored = {n: t for n, t in held.items() if network.stored.is_stored(n)}
    return {
        name: tuple(tensor.shape)
        for name, tensor in stored.items()
        if not name.startswith(inside) and tied.get(name) not in stored
        if name.startswith((text, "lm_head.")) and not name.startswith(without)
    }


def names_outside(network: Network, names: Names) -> dict[str, list[str]]:
    """The tensors of the file that belong to no layer, and what each holds, one after the other."""
    found: dict[str, list[str]] = {}
    for name in outside_shapes(network):
        found.setdefault(names(name), []).append(name)
    return found


def type_outside(name: str, shape: tuple[int, ...], options: Mapping[str, str]) -> str:
    """The type of a tensor outside of the layers: only embedding and head are encoded."""
    wanted = {**dict.fromkeys(EMBEDDINGS, "embedding"), "output.weight": "output"}.get(name)
    if wanted is None:
        return "F32"
    return fitting(find("gguf", "export").values(options)[wanted], shape[1]).name


def made_outside(network: Network, options: Mapping[str, str]) -> dict[str, Weight]:
    """Embedding and head as they are written, by their name in memory."""
    names, found = Names(network), network.fetch_outside()
    made: dict[str, Weight] = {}
    for name, shape in outside_shapes(network).items():
        kind = type_outside(names(name), shape, options)
        if len(shape) == 2 and kind != "F32":
            made[name] = Packed(encode(found[name], kind), kind, shape[1])
    return made


def bytes_outside(
    network: Network, names: Names, encoded: Mapping[str, Weight]
) -> dict[str, Tensor]:
    """All tensors outside of the layers as bytes, by their name in the file."""
    found = network.fetch_outside()
    bytes_: dict[str, Tensor] = {}
    for own, held in names_outside(network, names).items():
        record = encoded.get(held[0])
        parts = (plain(found[name], own, names) for name in held)
        rows = record.data if isinstance(record, Packed) else torch.cat([*parts])
        first = [0] * names.repeated(own, len(rows))
        bytes_[own] = torch.cat([rows, rows[first]]) if first else rows
    extra = rope_factors(network)
    return bytes_ | {name: t.float().view(torch.uint8) for name, t in extra.items()}
