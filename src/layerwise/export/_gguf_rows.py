"""Rows of queries, keys and values: in the order of transformers, and in that of llama.cpp."""

import torch
from torch import Tensor

from layerwise.core.network import Network
from layerwise.export._gguf_models import head_size, heads_of, known


def reordered(rows: Tensor, name: str, network: Network, back: bool = False) -> Tensor:
    """Rows of a tensor, by its GGUF name, in the order of llama.cpp, or `back`; others as they are.

    Args:
        rows: `[out, bytes]`.
        name: of the tensor in GGUF.
        network: whose tensor it is.
        back: from the order of llama.cpp to that of transformers.
    """
    entry = known(network)
    if entry.halves and any(f".attn_{x}." in name for x in "qk"):
        return _in_pairs(rows, heads_of(network.model.config, name), back)
    if entry.woven and ".attn_qkv." in name:
        return _apart(rows, network, back)
    return rows.contiguous()


def _in_pairs(rows: Tensor, heads: int, back: bool) -> Tensor:
    """Of a head's `d` rows, transformers turns row `i` with row `i + d/2`, llama.cpp `2i` with
    `2i + 1`.
    """
    split = (-1, 2) if back else (2, -1)
    halves = rows.reshape(heads, *split, rows.shape[1])  # [heads, 2, d / 2, bytes]
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def _apart(rows: Tensor, network: Network, back: bool) -> Tensor:
    """Fused rows that come head by head, for each key head its queries, itself and its values:
    llama.cpp wants all queries, then all keys, then all values.
    """
    heads = key_heads(len(rows), network)
    size, width = head_size(network.model.config), rows.shape[1]
    each = len(rows) // size // heads - 2  # queries of a key head
    if back:
        parts = rows.split([heads * each * size, heads * size, heads * size])
        woven = [part.reshape(heads, -1, size, width) for part in parts]  # [heads, each, d, bytes]
        return torch.cat(woven, 1).reshape(rows.shape)
    woven = rows.reshape(heads, each + 2, size, width).split([each, 1, 1], 1)
    return torch.cat([part.reshape(-1, width) for part in woven])


def key_heads(rows: int, network: Network) -> int:
    """Key heads of a fused matrix of so many rows: what is left beside its query heads."""
    config = network.model.config
    return (rows // head_size(config) - config.num_attention_heads) // 2
